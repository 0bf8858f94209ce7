"""A loss taken a few rows at a time, as a CPU takes a large batch, against the whole."""

from unittest.mock import patch

import components
import torch
from batches import make_batch
from hypothesis import strategies as st
from test_layout import pack

import iscorrect as ic
from tests.fuzz._search import search

VALUES = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "-6e4": -6e4}
CASES = st.fixed_dictionaries({
    "seed": st.integers(0, 2**32 - 1), "rows": st.integers(2, 6), "width": st.integers(1, 7),
    "scale": st.sampled_from([1e-4, 0.05, 1.0]), "block": st.integers(1, 14),
    "correction": st.sampled_from(sorted(components.CORRECTIONS)),
    "objective": st.sampled_from(sorted(components.OBJECTIVES)),
    "aggregation": st.sampled_from(sorted(components.AGGREGATIONS)),
    "nonfinite": st.sampled_from(["drop", "neutral"]),
    "broken": st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.integers(0, 99),
                                 st.sampled_from(sorted(VALUES))), max_size=2),
    "old": st.booleans(), "reference": st.booleans(), "extra": st.booleans(),
    "packed": st.booleans(), "no_grad": st.booleans(),
    "dtype": st.sampled_from(["float64", "float32", "bfloat16", "float16"]),
})


def evaluate(loss_fn, case, batch, layout):
    log_probs = batch.log_probs.clone().requires_grad_()
    extra = batch.advantages.clone().requires_grad_() if case["extra"] else None
    with torch.set_grad_enabled(not case["no_grad"]):
        loss, metrics = loss_fn(
            log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
            mask=layout, old_log_probs=batch.old_log_probs if case["old"] else None,
            ref_log_probs=batch.ref_log_probs if case["reference"] else None, extra=extra,
        )
    if case["no_grad"]:
        return loss, metrics.to_floats(), []
    (1024 * loss).backward()
    return loss.detach(), metrics.to_floats(), [
        x.grad for x in (log_probs, extra) if x is not None
    ]


def check(case):
    batch = make_batch(case["seed"], case["rows"], case["width"], case["scale"])
    batch = batch.to(getattr(torch, case["dtype"]))
    for which, position, value in case["broken"]:
        x = batch[which]
        x.view(-1)[position % x.numel()] = VALUES[value]
    batch, layout = pack(batch) if case["packed"] else (batch, ic.Layout(batch.mask))
    correction = components.CORRECTIONS[case["correction"]]
    correction = ic.Correction(**{**vars(correction), "nonfinite": case["nonfinite"]})
    loss_fn = ic.PolicyLoss(
        correction=correction, objective=components.OBJECTIVES[case["objective"]],
        aggregation=components.AGGREGATIONS[case["aggregation"]],
        reference_kl=ic.ReferenceKL(coefficient=0.1) if case["reference"] else None,
    )
    whole = evaluate(loss_fn, case, batch, layout)
    with patch("iscorrect.loss.policy_loss.BLOCK", case["block"]):
        blocks = evaluate(loss_fn, case, batch, layout)
    tolerance = dict(rtol=1e-12, atol=1e-12)
    if case["dtype"] != "float64":
        tolerance = dict(rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(blocks[0], whole[0], **tolerance)
    for name, value in whole[1].items():
        torch.testing.assert_close(
            blocks[1][name], value, **tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert blocks[1].keys() == whole[1].keys()
    if case["dtype"] in ("bfloat16", "float16"):
        # The gradient is in the type of the log-probs: alike to its last digit.
        tolerance = dict(rtol=2**-7 if case["dtype"] == "bfloat16" else 2**-10, atol=1e-6)
    for a, b in zip(blocks[2], whole[2], strict=True):
        torch.testing.assert_close(a, b, **tolerance)
        assert a.isfinite().all()
        assert not a[~layout.mask].any()


def run(seed, seconds):
    return search("blocks", CASES, check, seed, seconds)
