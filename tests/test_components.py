"""Every part is in its table, its oracle, a strategy and the public names; and it is right."""

import dataclasses
from typing import get_args

import components
import numpy as np
import oracle
import pytest
import torch
from batches import batches
from components import AGGREGATIONS, BOUNDS, CAPS, OBJECTIVES, RULES
from hypothesis import find, given, settings, strategies as st

import iscorrect as ic
from iscorrect.loss import aggregate
from iscorrect.testing import strategies


@pytest.mark.parametrize("name", components.TABLES)
def test_a_table_has_every_part_of_its_module(name):
    table, defined = components.TABLES[name]
    assert set(table.values()) == defined


def test_every_name_of_an_aggregation_is_one_that_type_checkers_know():
    assert get_args(aggregate.Name) == tuple(ic.AGGREGATIONS)


@pytest.mark.parametrize(
    "part",
    [*BOUNDS.values(), *RULES.values(), *CAPS.values(), *AGGREGATIONS.values()]
    + [OBJECTIVES[name] for name in ic.OBJECTIVES],
    ids=lambda part: type(part).__name__,
)
def test_a_part_is_a_public_value_that_says_how_far_it_looks(part):
    assert getattr(ic, type(part).__name__) is type(part)
    assert eval(repr(part), vars(ic)) == part
    assert hash(part) == hash(dataclasses.replace(part))
    assert part in CAPS.values() or part.scope in ("token", "sequence", "batch")


@pytest.mark.parametrize(
    ("parts", "oracles", "others"),
    [
        (ic.PRESETS, oracle.PRESETS | oracle.OF_A_BATCH, {"pareto-is"}),
        (BOUNDS, oracle.BOUNDS, {"ParetoSmooth"}),
        (RULES, oracle.RULES | oracle.RULES_OF_A_BATCH, set()),
        (ic.OBJECTIVES, oracle.OBJECTIVES, set()),
        (ic.AGGREGATIONS, oracle.AGGREGATIONS, set()),
    ],
)
def test_every_part_has_an_oracle(parts, oracles, others):
    assert set(parts) - others == set(oracles)


def drawn(strategy, accept):
    return find(strategy, accept, settings=settings(max_examples=2000, database=None))


@pytest.mark.parametrize(
    ("strategy", "parts"),
    [
        (strategies.bounds, BOUNDS), (strategies.rules, RULES), (strategies.objectives, OBJECTIVES),
        (strategies.aggregations, AGGREGATIONS),
    ],
    ids=["bounds", "rules", "objectives", "aggregations"],
)
def test_every_part_is_drawn(strategy, parts):
    for part in parts.values():
        assert drawn(strategy(), lambda x, part=part: type(x) is type(part)) is not None


@pytest.mark.parametrize("name", CAPS)
def test_every_cap_is_drawn(name):
    cap = CAPS[name]
    assert drawn(strategies.bounds(), lambda x: type(getattr(x, "cap", None)) is type(cap))


def evidence(batch):
    seen = []
    correction = ic.Correction(bound=lambda ratio, known: seen.append((ratio, known)) or ratio)
    correction(
        old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs,
        mask=ic.Layout(batch.mask, age=batch.ages()), advantages=batch.advantages,
    )
    return seen[0]


def agree(values, mask, expected):
    """Values "b t" are those of the sequences, where the mask counts."""
    for row, where, theirs in zip(values, mask, expected, strict=True):
        np.testing.assert_allclose(row[where].double().numpy(), theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", oracle.BOUNDS)
@given(batch=batches())
def test_a_bound_agrees_with_its_oracle(name, batch):
    ratio, known = evidence(batch)
    fields = vars(BOUNDS[name])
    expected = [
        oracle.BOUNDS[name](oracle.token_is(s), s, **fields) for s in batch.sequences()
    ]
    agree(BOUNDS[name](ratio, known), batch.mask, expected)


@pytest.mark.parametrize("name", oracle.RULES)
@given(batch=batches())
def test_a_rule_agrees_with_its_oracle(name, batch):
    _, known = evidence(batch)
    fields = vars(RULES[name])
    expected = [
        oracle.RULES[name](s, **fields) if len(s.old) else s.old for s in batch.sequences()
    ]
    agree(RULES[name](known), batch.mask, expected)


@pytest.mark.parametrize("over", ["pushed", "all"])
@pytest.mark.parametrize("name", oracle.RULES_OF_A_BATCH)
@given(batch=batches(), limit=st.sampled_from([0.0, 1e-8, 0.04, 1.0]))
def test_a_rule_of_the_batch_agrees_with_its_oracle(name, over, batch, limit):
    _, known = evidence(batch)
    rule = dataclasses.replace(RULES[name], limit=limit, over=over)
    expected = oracle.RULES_OF_A_BATCH[name](batch.sequences(), **vars(rule))
    agree(rule(known), batch.mask, expected)


@pytest.mark.parametrize("name", OBJECTIVES)
@given(batch=batches(scales=(1e-4, 0.05, 1.0)))
def test_an_objective_and_its_gradient_agree_with_the_oracle(name, batch):
    objective = OBJECTIVES[name]
    family = next(n for n, make in ic.OBJECTIVES.items() if isinstance(objective, make))
    x, old, a = (
        torch.where(batch.mask, t, 0.0)
        for t in (batch.log_probs, batch.old_log_probs, batch.advantages)
    )
    x.requires_grad_()
    terms = objective(x, old, a, ic.Layout(batch.mask))
    terms.loss[batch.mask].sum().backward()
    losses, slopes = [], []
    for s in batch.sequences():
        losses.append(oracle.OBJECTIVES[family](s.log_probs, s, **vars(objective)))
        steps = s.log_probs + 1e-30j * np.eye(len(s.old))
        each = [oracle.OBJECTIVES[family](step, s, **vars(objective)).sum() for step in steps]
        slopes.append(np.imag(each) / 1e-30)
    agree(terms.loss.detach(), batch.mask, losses)
    agree(x.grad, batch.mask, slopes)


@pytest.mark.parametrize("name", AGGREGATIONS)
@given(batch=batches())
def test_an_aggregation_agrees_with_its_oracle(name, batch):
    rows = [s.advantages for s in batch.sequences() if len(s.advantages)]
    expected = oracle.AGGREGATIONS[name](rows, **vars(AGGREGATIONS[name])) if rows else 0
    value = AGGREGATIONS[name](batch.advantages, ic.Layout(batch.mask))
    assert value.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def seen(*, log_probs=-1.0, rollout=-1.0, advantage=1.0):
    """The evidence of one token."""
    def one(x):
        return torch.tensor([[x]], dtype=torch.float64)

    found = []
    ic.Correction(bound=lambda ratio, known: found.append(known) or ratio)(
        old_log_probs=one(log_probs), rollout_log_probs=one(rollout), advantages=one(advantage),
        mask=torch.ones(1, 1, dtype=torch.bool),
    )
    return found[0]


def test_a_bound_keeps_the_edges_of_its_band():
    edges = torch.tensor([[0.5, 2.0]])
    assert torch.equal(ic.Mask(0.5, 2.0)(edges, None), edges)
    assert torch.equal(ic.Mask(0.5)(edges, None), edges)


SHIFT = seen(log_probs=-0.5, rollout=-1.0)
EDGES = [
    (ic.RatioOutside(low=1.0, high=1.0), seen()),
    (ic.Veto(low=1.0, high=1.0), seen()),
    (ic.DivergenceAbove(limit=0.0), seen()),
    (ic.DivergenceAbove(limit=0.125, estimator="k2"), SHIFT),
    (ic.BinaryKL(limit=0.0), seen()),
    (ic.ProbabilityShift(
        limit=(SHIFT.old_log_probs.exp() - SHIFT.rollout_log_probs.exp()).item()), SHIFT),
    (ic.OffPolicyNegative(limit=0.5), seen(log_probs=-1.0, rollout=-0.5, advantage=-1.0)),
    (ic.SecondMomentAbove(limit=0.25), SHIFT),
]


@pytest.mark.parametrize(("rule", "evidence"), EDGES, ids=lambda x: type(x).__name__)
def test_a_rule_keeps_what_is_exactly_at_its_limit(rule, evidence):
    assert rule(evidence).all()


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_where_nothing_counts_an_aggregation_is_zero(name):
    nothing = ic.Layout(torch.zeros(2, 3, dtype=torch.bool))
    assert AGGREGATIONS[name](torch.ones(2, 3), nothing).item() == 0
