"""A loss, its gradient and its mean ratio against NumPy, for any parts, layout and dtype."""

import components
import numpy as np
import oracle
import torch
from batches import make_batch
from hypothesis import strategies as st
from test_layout import flatten, pack

import iscorrect as ic
from tests.fuzz._search import search

CASES = st.fixed_dictionaries({
    "seed": st.integers(0, 2**32 - 1), "rows": st.integers(1, 4), "width": st.integers(1, 7),
    "scale": st.sampled_from([1e-4, 0.05, 1.0]), "preset": st.sampled_from(sorted(oracle.PRESETS)),
    "objective": st.sampled_from(sorted(components.OBJECTIVES)),
    "aggregation": st.sampled_from(sorted(components.AGGREGATIONS)),
    "over": st.sampled_from(["mask", "kept"]), "old": st.booleans(),
    "layout": st.sampled_from(["padded", "packed", "flat"]),
    "reference": st.sampled_from([None, "k1", "k2", "k3"]), "extra": st.booleans(),
    "dtype": st.sampled_from(["float64", "float32"]),
})


def weights(case, sequence):
    if not case["old"]:
        sequence = sequence._replace(old=sequence.log_probs)
    return oracle.PRESETS[case["preset"]](sequence)


def expected(case, batch):
    """Loss, and its derivative in each counted token, by complex steps."""
    objective = components.OBJECTIVES[case["objective"]]
    family = next(n for n, make in ic.OBJECTIVES.items() if isinstance(objective, make))
    aggregation = components.AGGREGATIONS[case["aggregation"]]

    def terms(x, s, w, reference):
        before = s if case["old"] else s._replace(old=s.log_probs)
        loss = w * oracle.OBJECTIVES[family](x, before, **vars(objective))
        if case["reference"]:
            loss = loss + 0.1 * oracle.reference_kl(x, reference, case["reference"])
        if case["extra"]:
            loss = loss + s.rollout
        return loss if case["over"] == "mask" else loss[w != 0]

    found = [
        (s, weights(case, s), reference[m].numpy())
        for s, reference, m in zip(
            batch.sequences(), batch.ref_log_probs, batch.mask, strict=True
        ) if len(s.old)
    ]

    def total(steps):
        rows = [terms(s.log_probs + step, s, *rest) for step, (s, *rest) in
                zip(steps, found, strict=True)]
        rows = [row for row in rows if len(row)]
        kind = oracle.AGGREGATIONS[case["aggregation"]]
        return kind(rows, **vars(aggregation)) if rows else 0.0

    still = [np.zeros(len(s.old)) for s, *_ in found]
    slopes = []
    for i, zeros in enumerate(still):
        for t in range(len(zeros)):
            step = 1e-30j * (np.arange(len(zeros)) == t)
            slopes.append(np.imag(total([*still[:i], step, *still[i + 1:]])) / 1e-30)
    return np.real(total(still)), np.array(slopes)


def check(case):
    batch = make_batch(case["seed"], case["rows"], case["width"], case["scale"])
    loss_fn = ic.PolicyLoss(
        correction=ic.PRESETS[case["preset"]](),
        objective=components.OBJECTIVES[case["objective"]],
        aggregation=components.AGGREGATIONS[case["aggregation"]], over=case["over"],
        reference_kl=case["reference"]
        and ic.ReferenceKL(coefficient=0.1, estimator=case["reference"]),
    )
    value, slopes = expected(case, batch)
    ways = {"padded": lambda b: (b, ic.Layout(b.mask)), "packed": pack, "flat": flatten}
    given, layout = ways[case["layout"]](batch.to(getattr(torch, case["dtype"])))
    log_probs = given.log_probs.clone().requires_grad_()
    loss, metrics = loss_fn(
        log_probs, rollout_log_probs=given.rollout_log_probs, advantages=given.advantages,
        mask=layout, old_log_probs=given.old_log_probs if case["old"] else None,
        ref_log_probs=given.ref_log_probs if case["reference"] else None,
        extra=given.rollout_log_probs if case["extra"] else None,
    )
    loss.backward()
    assert all(np.isfinite(list(metrics.to_floats().values()))), metrics.to_floats()
    assert not log_probs.grad[~layout.mask].any()
    assert loss.dtype == given.log_probs.dtype
    if case["dtype"] == "float32":
        # Which side of a bound a ratio falls on is a matter of rounding.
        assert loss.isfinite()
        assert log_probs.grad.isfinite().all()
        return
    np.testing.assert_allclose(loss.item(), value, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log_probs.grad[layout.mask], slopes, rtol=1e-9, atol=1e-9)


def run(seed, seconds):
    return search("loss", CASES, check, seed, seconds)
