"""Policy losses: composition, gradients, micro-batches, blocks of rows."""

import dataclasses
import itertools
import warnings

import numpy as np
import oracle
import pytest
import torch
from batches import batches, make_batch
from components import DIVIDED, OBJECTIVES
from hypothesis import given, strategies as st
from test_layout import loss_and_gradient

import iscorrect as ic
from iscorrect import PRESETS, Layout, PolicyLoss, token_tis
from iscorrect.loss import policy_loss


def call(loss_fn, batch, **changes):
    tensors = batch._replace(**changes)
    return loss_fn(
        tensors.log_probs, rollout_log_probs=tensors.rollout_log_probs,
        advantages=tensors.advantages, mask=tensors.mask, old_log_probs=tensors.old_log_probs,
    )


@given(batch=batches())
def test_the_loss_is_the_weighted_objective_over_the_tokens_of_the_mask(batch):
    value, _ = call(PolicyLoss(correction=token_tis(1.2), objective=ic.PPOClip()), batch)
    total = n = 0.0
    for s, current, m in zip(batch.sequences(), batch.log_probs, batch.mask, strict=True):
        r = np.exp(current[m].numpy() - s.old)
        surrogate = np.minimum(r * s.advantages, np.clip(r, 0.8, 1.2) * s.advantages)
        total -= (np.minimum(oracle.token_is(s), 1.2) * surrogate).sum()
        n += len(s.old)
    assert value.item() == pytest.approx(total / max(n, 1), rel=1e-10, abs=1e-12)


@given(batch=batches())
def test_omitting_old_log_probs_weighs_the_current_policy(batch):
    loss_fn = PolicyLoss(correction=token_tis())
    log_probs = batch.log_probs.clone().requires_grad_()
    value, _ = loss_fn(
        log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
        mask=batch.mask,
    )
    value.backward()
    weights = token_tis()(
        old_log_probs=batch.log_probs, rollout_log_probs=batch.rollout_log_probs, mask=batch.mask
    ).weights
    n = max(1, batch.mask.sum().item())
    expected = torch.where(batch.mask, -weights * batch.advantages / n, 0)
    torch.testing.assert_close(log_probs.grad, expected, rtol=1e-12, atol=1e-15)


def test_bypass_leaves_the_correction_to_the_ppo_ratio():
    batch = make_batch(1)
    loss_fn = PolicyLoss(correction=token_tis(), objective=ic.PPOClip())
    value, metrics = call(loss_fn, batch, old_log_probs=batch.rollout_log_probs)
    plain, _ = call(
        PolicyLoss(correction=ic.uncorrected(), objective=ic.PPOClip()), batch,
        old_log_probs=batch.rollout_log_probs,
    )
    assert metrics["is/weight/mean"] == 1
    assert torch.equal(value, plain)


def test_advantages_may_be_one_per_row():
    batch = make_batch(2)
    per_row = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expanded = per_row[:, None].expand(batch.mask.shape)
    a, _ = call(PolicyLoss(), batch, advantages=per_row)
    b, _ = call(PolicyLoss(), batch, advantages=expanded)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("named", "spec"),
    [
        (ic.token_tis_loss, PolicyLoss(correction=token_tis())),
        (ic.masked_is_loss, PolicyLoss(correction=ic.icepop())),
        (
            ic.sequence_is_loss,
            PolicyLoss(correction=ic.sequence_is(), aggregation="seq-mean-token-sum"),
        ),
    ],
)
def test_named_losses_are_compositions(named, spec):
    batch = make_batch(3, scale=0.5)
    assert torch.equal(call(named, batch).loss, call(spec, batch).loss)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("aggregation", DIVIDED)
@given(
    batch=batches(),
    preset=st.sampled_from([name for name in PRESETS if PRESETS[name]().scope != "batch"]),
    cut=st.integers(1, 3),
)
def test_micro_batches_with_a_normalizer_add_up_to_the_batch(
    objective, aggregation, batch, preset, cut
):
    loss_fn = PolicyLoss(
        correction=PRESETS[preset](), objective=OBJECTIVES[objective],
        aggregation=DIVIDED[aggregation],
    )
    whole, gradient, metrics = loss_and_gradient(
        PolicyLoss(**{**vars(loss_fn), "reference_kl": ic.ReferenceKL()}), batch, Layout(batch.mask)
    )
    loss_fn = PolicyLoss(**{**vars(loss_fn), "reference_kl": ic.ReferenceKL()})
    normalizer = ic.global_normalizer(
        batch.mask, DIVIDED[aggregation], group=None, gradients="summed"
    )
    log_probs = batch.log_probs.clone().requires_grad_()
    total, merged = 0.0, None
    for start in range(0, len(batch.mask), cut):
        part = batch._replace(log_probs=log_probs).rows(slice(start, start + cut))
        value, seen = loss_fn(
            part.log_probs, rollout_log_probs=part.rollout_log_probs, advantages=part.advantages,
            mask=part.mask, old_log_probs=part.old_log_probs, ref_log_probs=part.ref_log_probs,
            normalizer=normalizer,
        )
        value.backward()
        total, merged = total + value.detach(), seen if merged is None else merged + seen
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_probs.grad[batch.mask], gradient, rtol=1e-12, atol=1e-12)
    assert merged.to_floats() == pytest.approx(metrics, rel=1e-12, abs=1e-12)


def ragged(rows, width, dtype=torch.float32):
    batch = make_batch(4, rows=rows, width=width, scale=0.1)
    return batch.to(dtype)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_blocks_of_rows_equal_the_whole(monkeypatch, objective, preset):
    batch = ragged(7, 9, torch.float64)
    loss_fn = PolicyLoss(
        correction=PRESETS[preset](), objective=OBJECTIVES[objective],
        aggregation="seq-mean-token-mean", reference_kl=ic.ReferenceKL(coefficient=0.1),
    )
    layout = Layout(batch.mask)
    expected, expected_gradient, expected_metrics = loss_and_gradient(loss_fn, batch, layout)
    monkeypatch.setattr(policy_loss, "BLOCK", 20)
    value, gradient, metrics = loss_and_gradient(loss_fn, batch, layout)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)
    assert metrics == pytest.approx(expected_metrics, rel=1e-12, abs=1e-12)


def test_blocks_of_rows_serve_packed_rows_and_bf16(monkeypatch):
    batch = ragged(6, 10).to(torch.bfloat16)
    ids = torch.arange(10).expand(6, 10) // 4
    layout = Layout(batch.mask, sequence_ids=ids)
    loss_fn = PolicyLoss(correction=ic.sequence_tis(), objective=ic.PPOClip(level="geometric"),
                         reference_kl=ic.ReferenceKL())
    expected = loss_and_gradient(loss_fn, batch, layout)
    monkeypatch.setattr(policy_loss, "BLOCK", 25)
    value, gradient, metrics = loss_and_gradient(loss_fn, batch, layout)
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(gradient, expected[1])
    assert metrics == pytest.approx(expected[2], rel=1e-6, abs=1e-6)


def test_blocks_of_rows_differentiate_as_often_as_the_whole(monkeypatch):
    batch = ragged(7, 9, torch.float64)
    found = []
    for block in (policy_loss.BLOCK, 20):
        monkeypatch.setattr(policy_loss, "BLOCK", block)
        log_probs = batch.log_probs.clone().requires_grad_()
        value, _ = call(PolicyLoss(), batch, log_probs=log_probs)
        (one,) = torch.autograd.grad(value**2, log_probs, create_graph=True)
        (two,) = torch.autograd.grad(one.square().sum(), log_probs)
        found.append((value, one, two))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    assert found[0][2].abs().sum() > 0


class Learned(torch.nn.Module):
    scope = "token"

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, log_probs, old_log_probs, advantages, layout):
        return -self.slope * advantages * log_probs


def test_blocks_of_rows_give_a_gradient_to_what_an_objective_learns(monkeypatch):
    batch = ragged(7, 9, torch.float64)
    found = []
    for block in (policy_loss.BLOCK, 20):
        monkeypatch.setattr(policy_loss, "BLOCK", block)
        objective = Learned()
        call(PolicyLoss(objective=objective), batch).loss.backward()
        found.append(objective.slope.grad)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    assert found[0].abs() > 0


@pytest.mark.parametrize("level", ["token", "geometric", "sequence", "prefix"])
@pytest.mark.parametrize("nonfinite", ["drop", "neutral"])
def test_a_token_that_is_not_finite_has_no_gradient_in_blocks_of_rows_either(
    monkeypatch, level, nonfinite
):
    batch = ragged(7, 9, torch.float64)
    loss_fn = PolicyLoss(
        correction=ic.Correction(nonfinite=nonfinite), objective=ic.PPOClip(level=level)
    )
    row, column = batch.mask.nonzero()[5]
    found = []
    for block in (policy_loss.BLOCK, 20):
        monkeypatch.setattr(policy_loss, "BLOCK", block)
        log_probs = batch.log_probs.clone()
        log_probs[row, column] = torch.nan
        log_probs.requires_grad_()
        call(loss_fn, batch, log_probs=log_probs).loss.backward()
        found.append(log_probs.grad)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    assert found[1][row, column] == 0


def test_a_float16_gradient_in_blocks_of_rows_is_scaled_before_it_is_rounded(monkeypatch):
    batch = ragged(7, 9, torch.float64)
    monkeypatch.setattr(policy_loss, "BLOCK", 20)
    exact = batch.log_probs.half().double().requires_grad_()
    call(PolicyLoss(), batch, log_probs=exact).loss.mul(2.0**-14).backward()
    half = batch.log_probs.half().requires_grad_()
    (call(PolicyLoss(), batch, log_probs=half).loss * 2.0**-14 * 2.0**14).backward()
    torch.testing.assert_close(half.grad.double(), exact.grad * 2.0**14, rtol=1e-3, atol=0)


def test_error_positions_are_those_of_the_batch_also_where_rows_go_in_blocks(monkeypatch):
    batch = ragged(7, 9, torch.float64)
    monkeypatch.setattr(policy_loss, "BLOCK", 20)
    row, column = batch.mask.nonzero()[-1].tolist()
    log_probs = batch.log_probs.clone()
    log_probs[row, column] = torch.nan
    with pytest.raises(ic.InputError, match=rf"at \({row}, {column}\)"):
        call(PolicyLoss(correction=ic.Correction(nonfinite="raise")), batch, log_probs=log_probs)


def test_blocks_of_rows_ask_for_no_gradient_where_none_is_wanted(monkeypatch):
    batch = ragged(7, 9, torch.float64)
    expected, _ = call(PolicyLoss(), batch)
    monkeypatch.setattr(policy_loss, "BLOCK", 20)
    with torch.no_grad():
        value, _ = call(PolicyLoss(), batch, log_probs=batch.log_probs.clone().requires_grad_())
    assert not value.requires_grad
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("over", ["mask", "kept"])
def test_denominators_count_the_mask_or_what_is_kept(over):
    batch = make_batch(6, rows=3, width=8, scale=1.0)
    value, _ = call(PolicyLoss(correction=ic.icepop(), over=over), batch)
    _, keep, _ = ic.icepop()(
        old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs,
        mask=batch.mask,
    )
    total, _ = call(PolicyLoss(correction=ic.icepop(), aggregation="sum"), batch)
    assert 0 < keep.sum() < batch.mask.sum()
    denominator = batch.mask.sum() if over == "mask" else keep.sum()
    torch.testing.assert_close(value, total / denominator)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("over", ["mask", "kept"])
def test_a_batch_in_which_everything_is_rejected_gives_zero_and_finite_gradients(
    objective, preset, over
):
    batch = make_batch(8)
    nan = torch.full_like(batch.rollout_log_probs, torch.nan)
    loss_fn = PolicyLoss(
        correction=PRESETS[preset](), objective=OBJECTIVES[objective], over=over
    )
    for changes in ({"rollout_log_probs": nan}, {"mask": torch.zeros_like(batch.mask)}):
        log_probs = batch.log_probs.clone().requires_grad_()
        value, metrics = call(loss_fn, batch, log_probs=log_probs, **changes)
        value.backward()
        assert value == 0
        assert not log_probs.grad.any()
        assert metrics["is/rejected"] == (metrics["batch/tokens"] > 0)
        assert all(np.isfinite(list(metrics.to_floats().values())))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
def test_zero_sequences_and_one_token_are_batches_too(shape):
    x = torch.full(shape, -1.0, requires_grad=True)
    value, metrics = PolicyLoss(correction=token_tis(), objective=ic.PPOClip())(
        x, rollout_log_probs=x.detach(), advantages=torch.ones(shape), mask=torch.ones(shape).bool()
    )
    value.backward()
    assert value == (-1 if shape == (1, 1) else 0)
    assert x.grad.shape == shape
    assert all(np.isfinite(list(metrics.to_floats().values())))


@pytest.mark.parametrize("nonfinite", ["drop", "neutral"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("which", ["log_probs", "old_log_probs", "rollout_log_probs"])
@pytest.mark.parametrize(
    "value", [float("nan"), float("-inf"), torch.finfo(torch.float32).min, -1e30, 1e30]
)
def test_a_value_that_is_no_log_prob_never_reaches_the_loss(nonfinite, objective, which, value):
    batch = make_batch(9, rows=2, width=5)
    batch = batch._replace(mask=torch.tensor([[True] * 5, [True, True, False, True, False]]))
    clean = [torch.nan_to_num(x, -1.0, -1.0, -1.0) for x in batch[:-1]]
    batch = type(batch)(*clean, batch.mask)
    broken = getattr(batch, which).clone()
    broken[0, 2] = value
    batch = batch._replace(**{which: broken})
    log_probs = batch.log_probs.clone().requires_grad_()
    loss_fn = PolicyLoss(
        correction=ic.Correction(nonfinite=nonfinite), objective=OBJECTIVES[objective]
    )
    result, metrics = call(loss_fn, batch, log_probs=log_probs)
    result.backward()
    assert result.isfinite()
    assert log_probs.grad.isfinite().all()
    if nonfinite == "drop" and objective in ("reinforce", "cispo"):
        assert log_probs.grad[0, 3] != 0
    if which == "log_probs":
        assert log_probs.grad[0, 2] == 0
    assert metrics["is/nonfinite"] == 1 / 8


def test_a_reference_that_is_not_finite_is_left_out_of_the_penalty():
    batch = make_batch(12)
    i, j = batch.mask.nonzero()[0]
    ref = batch.ref_log_probs.clone()
    ref[i, j] = torch.nan
    loss_fn = PolicyLoss(reference_kl=ic.ReferenceKL(coefficient=0.3))
    value, gradient, _ = loss_and_gradient(
        loss_fn, batch._replace(ref_log_probs=ref), Layout(batch.mask)
    )
    ref[i, j] = batch.log_probs[i, j]
    expected = loss_and_gradient(loss_fn, batch._replace(ref_log_probs=ref), Layout(batch.mask))
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(gradient, expected[1])


def test_an_extra_term_is_added_under_the_mask_without_a_weight():
    batch = make_batch(10)
    extra = batch.advantages.clone().requires_grad_()
    log_probs = batch.log_probs.clone().requires_grad_()
    loss_fn = PolicyLoss(correction=token_tis())
    value, _ = loss_fn(
        log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
        mask=batch.mask, extra=extra,
    )
    plain, _ = loss_fn(
        log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
        mask=batch.mask,
    )
    torch.testing.assert_close(value - plain, batch.advantages[batch.mask].mean())
    value.backward()
    torch.testing.assert_close(extra.grad, batch.mask.double() / batch.mask.sum())


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_reference_penalty_is_weighted_only_where_it_says_so(estimator, corrected):
    batch = make_batch(12, scale=0.5)
    penalty = ic.ReferenceKL(coefficient=0.3, estimator=estimator, corrected=corrected)
    loss_fn = PolicyLoss(correction=ic.icepop(), reference_kl=penalty)
    value, _, _ = loss_and_gradient(loss_fn, batch, Layout(batch.mask))
    plain, _ = call(PolicyLoss(correction=ic.icepop()), batch)
    total = 0.0
    for s, current, ref, m in zip(
        batch.sequences(), batch.log_probs, batch.ref_log_probs, batch.mask, strict=True
    ):
        d = (ref - current)[m].numpy()
        k = {"k1": -d, "k2": d**2 / 2, "k3": np.expm1(d) - d}[estimator]
        total += (k * (oracle.icepop(s) if corrected else 1)).sum()
    expected = 0.3 * total / batch.mask.sum().item()
    assert (value - plain).item() == pytest.approx(expected, rel=1e-10)


def test_a_callable_may_take_the_place_of_every_part():
    batch = make_batch(13)
    mine = PolicyLoss(
        correction=ic.Correction(
            bound=lambda ratio, evidence: ratio.sqrt(),
            reject=(lambda evidence: evidence.log_ratio < 0.05,),
        ),
        objective=lambda log_probs, old, advantages, layout: -advantages * log_probs,
        aggregation=lambda per_token, layout: layout.total(per_token) / 10,
    )
    value, metrics = call(mine, batch)
    total = 0.0
    for s, current, m in zip(batch.sequences(), batch.log_probs, batch.mask, strict=True):
        d = oracle.log_ratio(s)
        total -= (np.exp(d / 2) * (d < 0.05) * s.advantages * current[m].numpy()).sum()
    torch.testing.assert_close(value.item(), total / 10)
    assert mine.scope == "batch"
    assert 0 < metrics["is/rejected"] < 1


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_autocast_changes_nothing(objective, preset):
    batch = make_batch(16).to(torch.float32)
    loss_fn = PolicyLoss(correction=PRESETS[preset](), objective=OBJECTIVES[objective],
                         reference_kl=ic.ReferenceKL())
    layout = Layout(batch.mask)
    expected = loss_and_gradient(loss_fn, batch, layout)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient, metrics = loss_and_gradient(loss_fn, batch, layout)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])
    assert metrics == expected[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_float32_loss_stays_float32_whatever_its_normalizer(dtype):
    batch = make_batch(14).to(dtype)
    normalizer = ic.global_normalizer(batch.mask, group=None, gradients="summed")
    value, _ = PolicyLoss()(
        batch.log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
        mask=batch.mask, normalizer=normalizer,
    )
    assert value.dtype == torch.float32


def test_float64_stays_float64():
    for objective, preset in itertools.product(OBJECTIVES.values(), PRESETS.values()):
        value, _ = call(PolicyLoss(correction=preset(), objective=objective), make_batch(14))
        assert value.dtype == torch.float64


# A weight that carries no gradient, or a cap that keeps one, leaves no function of which it is the
# derivative: these have a weight of 1 or a cap out of reach. ASPO has neither.
DIFFERENTIATED = {name: objective for name, objective in OBJECTIVES.items() if name != "aspo"} | {
    "cispo": ic.CISPO(low=1.0, high=1.0),
    "vespo": ic.VESPO(k_positive=0, lambda_positive=0, k_negative=0, lambda_negative=0),
    "capped-ppo-clip": ic.PPOClip(low=None, high=None, cap=1e4),
}


@pytest.mark.parametrize("objective", DIFFERENTIATED)
@pytest.mark.parametrize("preset", ["uncorrected", "token-tis", "sequence-mis", "topr"])
def test_gradients_are_those_of_finite_differences(objective, preset):
    batch = make_batch(15, rows=2, width=4)
    clean = torch.where(batch.mask, batch.log_probs, -1.0).requires_grad_()
    loss_fn = PolicyLoss(correction=PRESETS[preset](), objective=DIFFERENTIATED[objective])
    assert torch.autograd.gradcheck(lambda x: call(loss_fn, batch, log_probs=x).loss, (clean,))


def three_tokens(**changes):
    x = torch.full((1, 3), -1.0, dtype=torch.float64)
    batch = dict(
        log_probs=x, rollout_log_probs=x, old_log_probs=x, advantages=torch.ones_like(x),
        mask=torch.ones(1, 3, dtype=torch.bool),
    )
    return batch | changes


def test_a_neutral_token_without_a_current_log_prob_adds_nothing_to_the_loss():
    current = torch.tensor([[-1.0, torch.nan, -1.0]], dtype=torch.float64)
    loss_fn = PolicyLoss(
        correction=ic.Correction(nonfinite="neutral"), objective=ic.PPOClip()
    )
    value, metrics = loss_fn(**three_tokens(log_probs=current))
    assert value.item() == pytest.approx(-2 / 3, rel=1e-12)
    assert metrics["is/rejected"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("width", [2, 4, 9])
def test_padding_stays_out_of_a_penalty_that_is_not_zero_at_zero(width):
    penalty = ic.ReferenceKL(coefficient=1.0, estimator=torch.exp)
    x = torch.zeros(1, width)
    mask = torch.arange(width)[None] < 2
    loss_fn = PolicyLoss(reference_kl=penalty)
    value, _ = loss_fn(
        x, rollout_log_probs=x, advantages=x, mask=mask, ref_log_probs=x,
    )
    assert value == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_reference_a_thousand_nats_away_leaves_the_loss_and_its_gradient_finite(dtype, estimator):
    x = torch.full((1, 2), -1000.0, dtype=dtype, requires_grad=True)
    loss_fn = PolicyLoss(reference_kl=ic.ReferenceKL(estimator=estimator))
    value, _ = loss_fn(
        x, rollout_log_probs=x.detach(), advantages=torch.ones_like(x),
        mask=torch.ones(1, 2, dtype=torch.bool), ref_log_probs=torch.full_like(x, -1.0).detach(),
    )
    value.backward()
    assert value.isfinite()
    assert x.grad.isfinite().all()


def test_a_horizon_beside_a_callable_aggregation_is_refused():
    with pytest.raises(ic.InputError, match="`horizon` must be None for <function"):
        PolicyLoss(aggregation=lambda per_token, layout: per_token.sum(), horizon=5)


@pytest.mark.parametrize("objective", [ic.Reinforce(), ic.CISPO()])
def test_forward_mode_gives_the_directional_derivative(objective):
    batch = make_batch(14, rows=3, width=5)
    loss_fn = PolicyLoss(correction=token_tis(), objective=objective)
    along = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(log_probs):
        return call(loss_fn, batch, log_probs=log_probs).loss

    current = torch.where(batch.mask, batch.log_probs, -1.0)
    _, forward = torch.func.jvp(loss, (current,), (along,))
    leaf = current.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(forward, (gradient * along).sum(), rtol=1e-12, atol=1e-14)
    assert forward != 0


@dataclasses.dataclass(frozen=True)
class OverRootLength(ic.Aggregation):
    """Σ_s Σ_t x / √n_s, over the number of sequences."""

    scope = "sequence"

    def counted(self, layout):
        return layout.sequence_starts()

    def coefficients(self, layout, dtype):
        return layout.sequence_count(dtype).clamp(min=1).rsqrt()


def test_an_aggregation_of_ones_own_divides_like_a_built_in_one():
    batch = make_batch(15, rows=5, width=6)
    loss_fn = PolicyLoss(correction=token_tis(), aggregation=OverRootLength())
    whole, _ = call(loss_fn, batch)
    lengths = batch.mask.sum(-1)
    rows = [call(PolicyLoss(correction=token_tis(), aggregation="sum"), batch.rows(slice(i, i + 1)))
            .loss / n.clamp(min=1).double().sqrt() for i, n in enumerate(lengths)]
    torch.testing.assert_close(whole, sum(rows) / (lengths > 0).sum(), rtol=1e-12, atol=1e-14)
    assert loss_fn.scope == "token"

    normalizer = ic.global_normalizer(
        batch.mask, OverRootLength(), group=None, gradients="summed"
    )
    total = sum(
        loss_fn(
            part.log_probs, rollout_log_probs=part.rollout_log_probs, advantages=part.advantages,
            mask=part.mask, old_log_probs=part.old_log_probs, normalizer=normalizer,
        ).loss
        for part in (batch.rows(slice(0, 2)), batch.rows(slice(2, 5)))
    )
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("which", ["log_probs", "rollout_log_probs", "advantages", "mask"])
def test_what_is_missing_is_named(which):
    with pytest.raises(ic.InputError, match=f"PolicyLoss: `{which}` must be"):
        PolicyLoss()(**three_tokens(**{which: None}))


@pytest.mark.parametrize("normalizer", [3.0, torch.tensor(3.0), torch.tensor([3.0])])
def test_the_loss_is_a_scalar_whatever_the_shape_of_its_normalizer(normalizer):
    value, _ = PolicyLoss()(**three_tokens(), normalizer=normalizer)
    assert value.shape == ()
    assert value == 1


def test_a_normalizer_of_nothing_divides_nothing():
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    value, metrics = PolicyLoss()(**three_tokens(mask=nothing), normalizer=torch.tensor(0.0))
    assert value == 0
    assert metrics["is/rejected"] == 0


@pytest.mark.parametrize("normalizer", ["token-mean", True, -1, torch.ones(2)])
def test_a_normalizer_is_a_positive_number(normalizer):
    with pytest.raises(ic.InputError, match="`normalizer` must be a number > 0"):
        PolicyLoss()(**three_tokens(), normalizer=normalizer)


def test_metrics_add_up_with_sum():
    metrics = [PolicyLoss()(**three_tokens()).metrics for _ in range(3)]
    assert sum(metrics)["batch/tokens"] == 9


def test_a_clip_without_old_log_probs_says_that_it_never_clips():
    x, mask = torch.full((1, 2), -1.0), torch.ones(1, 2, dtype=torch.bool)
    loss_fn = PolicyLoss(objective=ic.PPOClip())
    given = {"rollout_log_probs": x, "advantages": x, "mask": mask}
    with pytest.warns(UserWarning, match="nothing is ever clipped"):
        loss_fn(x.clone().requires_grad_(), **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(x.clone().requires_grad_(), old_log_probs=x, **given)
        PolicyLoss()(x.clone().requires_grad_(), **given)


def test_a_correction_of_the_whole_batch_says_that_it_sees_a_part():
    x, mask = torch.full((1, 2), -1.0), torch.ones(1, 2, dtype=torch.bool)
    loss_fn = PolicyLoss(correction=ic.Correction(normalize=True))
    given = {"rollout_log_probs": x, "advantages": x, "mask": mask}
    with pytest.warns(UserWarning, match="micro-batches will not add up"):
        loss_fn(x.clone().requires_grad_(), normalizer=8.0, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(x.clone().requires_grad_(), **given)
        PolicyLoss()(x.clone().requires_grad_(), normalizer=8.0, **given)


def test_over_what_is_kept_a_rejected_token_brings_no_extra_term_either():
    loss_fn = PolicyLoss(correction=ic.token_mis(high=3.0), over="kept")
    loss, _ = loss_fn(
        torch.full((1, 2), -1.0), rollout_log_probs=torch.tensor([[-1.0, -9.0]]),
        advantages=torch.zeros(1, 2), mask=torch.ones(1, 2, dtype=torch.bool),
        extra=torch.tensor([[1.0, 100.0]]),
    )
    assert loss.item() == 1.0


@pytest.mark.parametrize("how", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_a_denominator_is_at_least_one(how):
    nothing = Layout(torch.zeros(2, 3, dtype=torch.bool))
    assert ic.AGGREGATIONS[how]().denominator(nothing) == 1


@pytest.mark.parametrize("which", ["log_probs", "rollout_log_probs", "advantages"])
def test_numbers_of_eight_bits_are_refused(which):
    x = torch.full((1, 3), -1.0).to(torch.float8_e4m3fn)
    message = f"`{which}` must be a floating-point tensor of 16 bits"
    with pytest.raises(ic.InputError, match=message):
        PolicyLoss()(**three_tokens(**{which: x}))


@pytest.mark.parametrize("how", ["token-mean", "seq-mean-token-mean"])
def test_an_aggregate_of_16_bit_losses_is_made_in_float32(how):
    x = torch.full((1, 70_000), 0.5, dtype=torch.float16, requires_grad=True)
    loss = ic.aggregate(x, torch.ones(1, 70_000, dtype=torch.bool), how)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(0.5)
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 70_000), rtol=1e-2, atol=0)


def test_a_count_in_the_place_of_what_is_kept_is_warned_of():
    x = torch.tensor([[-1.0, -1.0], [-1.0, -5.0]])
    inputs = {"rollout_log_probs": x, "advantages": torch.ones(2),
              "mask": torch.ones(2, 2, dtype=torch.bool)}
    loss_fn = PolicyLoss(correction=ic.icepop(), over="kept")
    with pytest.warns(UserWarning, match="over='kept' divides by how many"):
        loss_fn(torch.full((2, 2), -1.0), **inputs, normalizer=4.0)


@pytest.mark.parametrize("returned", [None, 1.0, torch.ones(2)])
def test_an_aggregation_of_ones_own_returns_one_number(returned):
    x = torch.zeros(1, 2)
    with pytest.raises(ic.InputError, match="a tensor of one number"):
        PolicyLoss(aggregation=lambda per_token, layout: returned)(
            x, rollout_log_probs=x, advantages=torch.ones(1),
            mask=torch.ones(1, 2, dtype=torch.bool))


def test_an_objective_of_ones_own_returns_a_loss_a_token():
    x = torch.zeros(2, 2)
    with pytest.raises(ic.InputError, match="the loss of shape"):
        PolicyLoss(objective=lambda log_probs, *_: log_probs.sum(-1))(
            x, rollout_log_probs=x, advantages=torch.ones(2),
            mask=torch.ones(2, 2, dtype=torch.bool))


@pytest.mark.parametrize("normalizer", [np.int64(4), np.float32(4)])
def test_numbers_of_numpy_are_numbers(normalizer):
    x, mask = torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool)
    assert ic.aggregate(x, mask, normalizer=normalizer) == 1
    assert token_tis(cap=np.float32(2)).bound.cap == 2


@pytest.mark.parametrize("normalizer", [torch.inf, torch.nan, 0, -1])
def test_a_normalizer_is_finite_and_above_zero(normalizer):
    with pytest.raises(ic.InputError, match="a number > 0"):
        ic.aggregate(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool), normalizer=normalizer)


def test_what_centers_a_score_is_floating():
    head = torch.zeros(1, 2, 3)
    for which in range(3):
        given = [head, head, torch.ones(1, 2)]
        given[which] = given[which].long()
        with pytest.raises(ic.InputError, match="a floating-point tensor, got int64"):
            ic.score_centering(*given)


def test_values_of_packed_sequences_are_to_be_spread_over_tokens():
    x = torch.zeros(1, 6)
    with pytest.raises(ic.InputError, match="one number per token"):
        ic.token_tis_loss(x, rollout_log_probs=x, advantages=torch.ones(5),
                          mask=torch.ones(1, 6, dtype=torch.bool))
