"""The loss from hidden states in one pass, against all logits at once and autograd, in float64."""

import components
import pytest
import torch
from hypothesis import strategies as st
from test_ranks import HEADS, Model

import iscorrect as ic
from tests.fuzz._search import search

CASES = st.fixed_dictionaries({
    "seed": st.integers(0, 2**32 - 1), "rows": st.integers(1, 5), "vocabulary": st.integers(4, 13),
    "scale": st.sampled_from([1e-3, 0.3]), "head": st.integers(0, len(HEADS) - 1),
    "correction": st.sampled_from(sorted(components.CORRECTIONS)),
    "objective": st.sampled_from(sorted(components.OBJECTIVES)),
    "aggregation": st.sampled_from(sorted(components.AGGREGATIONS)),
    "over": st.sampled_from(["mask", "kept"]), "old": st.booleans(), "reference": st.booleans(),
    "chunk_size": st.sampled_from([1, 2, 3, 7, 100, None]), "idle": st.booleans(),
    "broken": st.booleans(), "way": st.sampled_from(["fused", "log-probs"]),
})


def check(case):
    model = Model.make(
        case["seed"], rows=case["rows"], vocabulary=case["vocabulary"], scale=case["scale"],
        **HEADS[case["head"]],
    )
    if case["idle"]:
        model.batch.advantages[0] = 0
    if case["broken"]:
        model.batch.rollout_log_probs[-1, 0] = torch.nan
    loss_fn = ic.PolicyLoss(
        correction=components.CORRECTIONS[case["correction"]],
        objective=components.OBJECTIVES[case["objective"]],
        aggregation=components.AGGREGATIONS[case["aggregation"]], over=case["over"],
        reference_kl=ic.ReferenceKL(coefficient=0.1) if case["reference"] else None,
    )
    loss, metrics, expected = model.whole(loss_fn, None, case["old"])
    hidden, weight, bias = leaves = [
        None if x is None else x.clone().requires_grad_()
        for x in (model.hidden, model.weight, model.bias)
    ]
    head = dict(bias=bias, support=model.support, chunk_size=case["chunk_size"], **model.options)
    data, mask = model.data(loss_fn, case["old"]), model.batch.mask
    if case["way"] == "fused":
        got, seen = ic.fused_policy_loss(
            loss_fn, hidden=hidden, weight=weight, target=model.target, mask=mask, **head, **data
        )
    else:
        log_probs = ic.linear_log_probs(
            hidden, weight, model.target, layout=ic.Layout(mask), **head
        )
        got, seen = loss_fn(log_probs, mask=mask, **data)
    got.backward()
    torch.testing.assert_close(got.detach(), loss, rtol=1e-10, atol=1e-12)
    assert seen.to_floats() == pytest.approx(metrics.to_floats(), rel=1e-9, abs=1e-10)
    for leaf, gradient in zip(leaves, expected, strict=True):
        if leaf is not None:
            scale = max(1e-3, gradient.abs().max().item())
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-9, atol=1e-10 * scale)


def run(seed, seconds):
    return search("fused", CASES, check, seed, seconds)
