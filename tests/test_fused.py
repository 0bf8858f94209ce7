"""The one-pass loss is the loss: same value, same metrics, same gradients, fewer products."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from products import Allocated, Products

from iscorrect import (
    ASPO,
    CISPO,
    GMPO,
    PRESETS,
    SAPO,
    VESPO,
    Correction,
    InputError,
    Layout,
    PolicyLoss,
    PPOClip,
    ReferenceKL,
    Reinforce,
    Truncate,
    global_normalizer,
    sequence_is,
    sequence_tis,
    token_tis,
)
from iscorrect.head import reader as reader_module
from iscorrect.head.fused import fp32_head_loss, fused_policy_loss
from iscorrect.head.linear import linear_log_probs

B, T, D, V = 5, 9, 8, 23


@dataclass(frozen=True)
class Batch:
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor
    rest: dict


def make(*, old=False, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight, bias = normal(B, T, D), normal(V, D), normal(V)
    target = torch.randint(V, (B, T), generator=generator)
    mask = torch.arange(T) < torch.tensor([[9], [4], [0], [7], [9]])
    mask[3, 2] = False
    wide = torch.promote_types(dtype, torch.float32)
    logits = hidden.double() @ weight.double().T + bias.double()
    exact = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0].to(wide)
    advantages = normal(B).to(wide)
    advantages[1] = 0
    rest = {
        "rollout_log_probs": exact + 0.3 * normal(B, T).to(wide), "advantages": advantages,
        "old_log_probs": exact + 0.1 * normal(B, T).to(wide) if old else None,
    }
    hidden[~mask] = torch.nan
    target[~mask] = -100
    return Batch(hidden, weight, bias, target, mask, rest)


def fused(loss_fn, batch, hidden, weight, bias, **more):
    return fused_policy_loss(
        loss_fn, hidden=hidden, weight=weight, bias=bias, target=batch.target,
        **({"mask": batch.mask} | batch.rest | more),
    )


def unfused(loss_fn, batch, hidden, weight, bias, **more):
    more.pop("chunk_size", None)
    arguments = {"mask": batch.mask} | batch.rest | more
    log_probs = linear_log_probs(
        hidden, weight, batch.target, bias=bias, layout=arguments["mask"]
    )
    return loss_fn(log_probs, **arguments)


def run(function, loss_fn, batch, *, backward_from=lambda loss: loss, **more):
    leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    loss, metrics = function(loss_fn, batch, *leaves, **more)
    backward_from(loss).backward()
    return loss.detach(), metrics.to_floats(), [x.grad for x in leaves]


def assert_same(loss_fn, batch, **more):
    loss, metrics, grads = run(fused, loss_fn, batch, **more)
    expected = run(unfused, loss_fn, batch, **more)
    torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=1e-14)
    assert metrics == pytest.approx(expected[1], rel=1e-9, abs=1e-12)
    torch.testing.assert_close(grads, expected[2], rtol=1e-10, atol=1e-13)
    assert grads[1].abs().sum() > 0


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A vocabulary of several blocks."""
    monkeypatch.setattr(reader_module, "CPU_ROWS", 5)


WIDE = {
    "geometric-rs": {"low": 0.5, "high": 2.0}, "trust-region-mask": {"max_k2": 1.0, "mean_k3": 1.0},
}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("chunk_size", [4, None])
def test_every_preset_is_the_same_in_one_pass(name, old, chunk_size):
    loss_fn = PolicyLoss(correction=PRESETS[name](**WIDE.get(name, {})))
    assert_same(loss_fn, make(old=old), chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 3, 100, None])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "objective",
    [
        Reinforce(), PPOClip(), PPOClip(level="geometric", low=0.9, high=1.1), CISPO(high=1.05),
        SAPO(), GMPO(low=0.9, high=1.1), VESPO(), ASPO(low=0.9, high=1.1, cap=1.05),
        PPOClip(low=None, high=None, cap=1.05),
    ],
    ids=repr,
)
@pytest.mark.parametrize("correction", [token_tis(), sequence_tis()], ids=["token", "sequence"])
def test_every_objective_is_the_same_in_one_pass(chunk_size, old, objective, correction):
    loss_fn = PolicyLoss(correction=correction, objective=objective)
    assert_same(loss_fn, make(old=old), chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("aggregation", "horizon"),
    [
        ("token-mean", None), ("seq-mean-token-sum", None), ("seq-mean-token-mean", None),
        ("seq-mean-token-sum-norm", 12), ("sum", None),
        (lambda per_token, layout: layout.mean(per_token).square(), None),
    ],
)
@pytest.mark.parametrize("over", ["mask", "kept"])
def test_every_aggregation_is_the_same_in_one_pass(aggregation, horizon, over):
    loss_fn = PolicyLoss(
        correction=PRESETS["icepop"](0.8, 1.2), aggregation=aggregation, horizon=horizon, over=over
    )
    assert_same(loss_fn, make(), chunk_size=4)


@dataclass(frozen=True)
class SquaredAdvantage:
    scope: ClassVar[str] = "token"

    def __call__(self, log_probs, old_log_probs, advantages, layout):
        return -advantages.square() * log_probs.exp()


@dataclass(frozen=True)
class LikelyTokens:
    """A derivative without an advantage."""

    scope: ClassVar[str] = "token"

    def __call__(self, log_probs, old_log_probs, advantages, layout):
        return -(advantages + 1) * log_probs


@dataclass(frozen=True)
class SquaredMean:
    """Says nothing of how far it looks, so it may look at the batch."""

    def __call__(self, log_probs, old_log_probs, advantages, layout):
        return -advantages * layout.mean(log_probs).square() * layout.mask


@pytest.mark.parametrize("objective", [SquaredAdvantage(), LikelyTokens(), SquaredMean()])
def test_parts_that_users_write_work_too(objective):
    loss_fn = PolicyLoss(correction=token_tis(), objective=objective)
    assert_same(loss_fn, make(), chunk_size=4)


def test_packed_rows_and_turns_are_sequences_and_segments():
    batch = make()
    ids = torch.arange(T).div(3, rounding_mode="floor").expand(B, T)
    turns = torch.arange(T).div(2, rounding_mode="floor").expand(B, T)
    layout = Layout(batch.mask, sequence_ids=ids, segment_ids=turns)
    for level in ("sequence", "segment", "prefix"):
        loss_fn = PolicyLoss(correction=Correction(level=level, bound=Truncate(1.2)))
        assert_same(loss_fn, batch, chunk_size=4, mask=layout)
        assert_same(loss_fn, batch, chunk_size=2, mask=layout)


def test_reference_kl_and_the_gradient_of_extra_are_kept():
    batch = make()
    loss_fn = PolicyLoss(correction=token_tis(), reference_kl=ReferenceKL(coefficient=0.3))
    ref = batch.rest["rollout_log_probs"] - 0.2
    assert_same(loss_fn, batch, chunk_size=4, ref_log_probs=ref)
    found = []
    for function in (fused, unfused):
        extra = torch.full((B, T), 0.5, dtype=torch.float64, requires_grad=True)
        run(function, loss_fn, batch, ref_log_probs=ref, extra=extra)
        found.append(extra.grad)
    torch.testing.assert_close(*found)
    assert found[0].abs().sum() > 0


def test_micro_batches_with_a_normalizer_add_up():
    batch, loss_fn = make(), PolicyLoss(correction=token_tis())
    whole = run(fused, loss_fn, batch)
    total = [torch.zeros_like(x) for x in whole[2][1:]]
    normalizer = global_normalizer(batch.mask, group=None, gradients="summed")
    for rows in (slice(0, 2), slice(2, 5)):
        rest = {k: x if x is None else x[rows] for k, x in batch.rest.items()}
        part = Batch(batch.hidden[rows], batch.weight, batch.bias, batch.target[rows],
                     batch.mask[rows], rest)
        grads = run(fused, loss_fn, part, normalizer=normalizer)[2][1:]
        total = [a + b for a, b in zip(total, grads, strict=True)]
    torch.testing.assert_close(total, whole[2][1:])


def multiplied(loss_fn, batch, **more):
    """Tokens that were multiplied by the whole head, and what came of it."""
    with Products() as products:
        out = run(fused, loss_fn, batch, **more)
    return products.tokens(batch.weight), out


def counted(batch):
    """Tokens that count, and those of them with an advantage."""
    return int(batch.mask.sum()), int(batch.mask[batch.rest["advantages"] != 0].sum())


def test_one_pass_computes_each_logit_once():
    batch = make()
    n, busy = counted(batch)
    tokens, _ = multiplied(PolicyLoss(correction=token_tis()), batch, chunk_size=4)
    assert busy < n
    assert tokens == n + 2 * busy


def test_known_old_log_probs_make_one_pass_of_whole_sequences():
    batch = make(old=True)
    n, busy = counted(batch)
    tokens, _ = multiplied(PolicyLoss(correction=sequence_tis()), batch, chunk_size=4)
    assert tokens == n + 2 * busy


def test_sequences_longer_than_a_chunk_take_two_passes():
    batch, loss_fn = make(), PolicyLoss(correction=sequence_is())
    n, busy = counted(batch)
    two, _ = multiplied(loss_fn, batch, chunk_size=4)
    assert two == n + 3 * busy


def test_sequences_that_fit_into_a_chunk_take_one_pass():
    batch = make()
    n, busy = counted(batch)
    tokens, _ = multiplied(PolicyLoss(correction=sequence_is()), batch, chunk_size=T)
    assert tokens == n + 2 * busy


def test_a_sequence_that_fits_where_the_gradient_will_be_takes_one_pass():
    batch = make()
    batch.mask[1:] = batch.mask[0, -1] = False
    n, _ = counted(batch)
    assert 4 < n <= D
    tokens, _ = multiplied(PolicyLoss(correction=sequence_is()), batch, chunk_size=4)
    assert tokens == 3 * n


def test_a_rejected_token_costs_no_gradient():
    batch = make()
    n, busy = counted(batch)
    loss_fn = PolicyLoss(correction=PRESETS["token-mis"](high=1.0))
    tokens, (_, metrics, _) = multiplied(loss_fn, batch, chunk_size=4)
    assert n < tokens < n + 2 * busy
    assert 0 < metrics["is/rejected"] < 1


def test_a_batch_without_advantage_has_zero_gradients():
    batch = make()
    batch.rest["advantages"].zero_()
    tokens, (_, _, grads) = multiplied(PolicyLoss(correction=token_tis()), batch)
    assert tokens == batch.mask.sum()
    assert all((g == 0).all() for g in grads)


def test_a_small_batch_is_read_twice_rather_than_held():
    batch = make()
    n, busy = counted(batch)
    tokens, _ = multiplied(PolicyLoss(correction=token_tis()), batch)
    assert tokens == n + 2 * busy + (busy - D)


def test_tokens_without_advantage_are_read_again_only_where_they_have_a_derivative():
    batch = make()
    n, busy = counted(batch)
    loss_fn = PolicyLoss(correction=token_tis(), objective=LikelyTokens())
    tokens, (_, _, grads) = multiplied(loss_fn, batch, chunk_size=4)
    assert tokens == n + 2 * busy + 3 * (n - busy)
    torch.testing.assert_close(grads, run(unfused, loss_fn, batch)[2], rtol=1e-10, atol=1e-13)


def test_no_hidden_state_is_copied_where_every_token_counts():
    batch = make()
    batch.mask[:] = True
    hidden = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    target = batch.target.clamp(min=0)
    batch.rest["advantages"][:] = 1
    batch.rest["rollout_log_probs"].nan_to_num_(nan=-1.0)
    with Allocated() as allocated:
        fused_policy_loss(
            PolicyLoss(correction=token_tis()), hidden=hidden, weight=batch.weight, target=target,
            mask=batch.mask, **batch.rest,
        )
    assert allocated.of(D) == [B * T]  # the gradient


@pytest.mark.parametrize("correction", [token_tis(), sequence_tis()], ids=["token", "sequence"])
def test_nothing_counts_nothing_happens(correction):
    batch = make()
    loss, _, grads = run(
        fused, PolicyLoss(correction=correction), batch, mask=torch.zeros_like(batch.mask)
    )
    assert loss == 0
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("name", ["token-tis", "sequence-tis"])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("nonfinite", ["drop", "neutral"])
def test_hidden_states_that_are_not_finite_reach_neither_loss_nor_gradient(name, old, nonfinite):
    batch = make(old=old)
    batch.hidden[0, 3] = torch.nan
    preset = PRESETS[name]()
    loss_fn = PolicyLoss(correction=Correction(
        level=preset.level, bound=preset.bound, nonfinite=nonfinite
    ))
    _, metrics, grads = run(fused, loss_fn, batch, chunk_size=20)
    _, expected_metrics, _ = run(unfused, loss_fn, batch)
    assert metrics == pytest.approx(expected_metrics, rel=1e-9)
    assert metrics["is/nonfinite"] > 0
    assert all(g.isfinite().all() for g in grads)


def test_raise_names_positions_of_the_batch():
    batch = make()
    batch.hidden[3, 1] = torch.nan
    loss_fn = PolicyLoss(correction=Correction(nonfinite="raise"))
    with pytest.raises(InputError, match=r"\(3, 1\)"):
        run(fused, loss_fn, batch, chunk_size=4)


def test_the_incoming_gradient_multiplies():
    batch, loss_fn = make(), PolicyLoss(correction=token_tis())
    once = run(fused, loss_fn, batch)[2]
    thrice = run(fused, loss_fn, batch, backward_from=lambda loss: 3 * loss)[2]
    torch.testing.assert_close(thrice, [3 * g for g in once])


def test_a_loss_scale_saves_float16_gradients_from_underflow():
    batch = make(dtype=torch.float16)
    loss_fn = PolicyLoss(correction=token_tis())
    batch.rest["advantages"] *= 1e-6
    lost = run(fused, loss_fn, batch)[2][1]
    scaled = run(fused, loss_fn, batch, backward_from=lambda loss: 2.0**16 * loss)[2][1]
    exact = run(unfused, loss_fn, Batch(
        batch.hidden.double(), batch.weight.double(), batch.bias.double(), batch.target, batch.mask,
        batch.rest,
    ))[2][1]
    error = (scaled.double() / 2.0**16 - exact).norm() / exact.norm()
    assert error < 1e-3
    assert (lost.double() - exact).norm() / exact.norm() > 10 * error


def test_tied_embeddings_add_up():
    batch, loss_fn = make(), PolicyLoss(correction=token_tis())
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(4))
    found = []
    for function in (fused, unfused):
        weight = batch.weight.clone().requires_grad_()
        function(loss_fn, batch, weight[ids].tanh(), weight, None)[0].backward()
        found.append(weight.grad)
    torch.testing.assert_close(*found)


def test_gradients_accumulate_over_losses():
    batch, loss_fn = make(), PolicyLoss(correction=token_tis())
    weight = batch.weight.clone().requires_grad_()
    fused(loss_fn, batch, batch.hidden, weight, None)[0].backward()
    first = weight.grad.clone()
    fused(loss_fn, batch, batch.hidden, weight, None)[0].backward()
    torch.testing.assert_close(weight.grad, 2 * first)


def test_without_gradients_the_loss_is_the_same():
    batch, loss_fn = make(), PolicyLoss(correction=token_tis())
    with torch.no_grad():
        loss, _ = fused(loss_fn, batch, batch.hidden, batch.weight, batch.bias)
    torch.testing.assert_close(loss, run(fused, loss_fn, batch)[0])
    assert not loss.requires_grad


def test_softcap_temperature_and_support_reach_the_head():
    batch, loss_fn = make(), PolicyLoss(correction=token_tis())
    ids = torch.stack([batch.target, (batch.target + 3) % V, (batch.target + 5) % V], -1)
    rest = {"softcap": 2.0, "temperature": 0.7, "support": ids}
    leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    fused(loss_fn, batch, *leaves, chunk_size=4, **rest)[0].backward()
    twins = [x.detach().clone().requires_grad_() for x in leaves]
    log_probs = linear_log_probs(
        twins[0], twins[1], batch.target, bias=twins[2], layout=batch.mask, **rest
    )
    loss_fn(log_probs, mask=batch.mask, **batch.rest)[0].backward()
    torch.testing.assert_close([x.grad for x in leaves], [x.grad for x in twins])


def test_the_slope_of_the_softcap_stays_with_its_token_when_others_are_rejected():
    batch, loss_fn = make(), PolicyLoss(correction=PRESETS["token-mis"](high=1.0))
    hidden, twin = (batch.hidden.clone().requires_grad_() for _ in range(2))
    loss, metrics = fused(
        loss_fn, batch, hidden, batch.weight, batch.bias, softcap=2.0, chunk_size=9
    )
    loss.backward()
    log_probs = linear_log_probs(
        twin, batch.weight, batch.target, bias=batch.bias, softcap=2.0, layout=batch.mask
    )
    loss_fn(log_probs, mask=batch.mask, **batch.rest)[0].backward()
    assert 0 < metrics["is/rejected"] < 1
    torch.testing.assert_close(hidden.grad, twin.grad)


@pytest.mark.parametrize("old", [False, True])
def test_the_float32_head_is_cispo_on_exact_logits(old):
    batch = make(old=old, dtype=torch.bfloat16)
    weight = batch.weight.clone().requires_grad_()
    loss, metrics = fp32_head_loss(
        batch.hidden, weight, batch.target, bias=batch.bias, mask=batch.mask, **batch.rest
    )
    loss.backward()
    exact = batch.weight.double().requires_grad_()
    log_probs = linear_log_probs(
        batch.hidden.double(), exact, batch.target, bias=batch.bias.double(), layout=batch.mask
    )
    expected, expected_metrics = PolicyLoss(
        correction=PRESETS["uncorrected"](), objective=CISPO()
    )(log_probs, mask=batch.mask, **batch.rest)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-2, atol=1e-4)
    assert metrics["mismatch/kl_k3"] == pytest.approx(
        expected_metrics["mismatch/kl_k3"].item(), rel=1e-4
    )


def test_a_second_backward_says_why_it_cannot_be():
    batch = make()
    weight = batch.weight.clone().requires_grad_()
    loss, _ = fused(PolicyLoss(correction=token_tis()), batch, batch.hidden, weight, None)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed over by the first backward"):
        loss.backward()


def test_differentiating_twice_says_that_it_is_not_supported():
    batch = make()
    weight = batch.weight.clone().requires_grad_()
    loss, _ = fused(PolicyLoss(correction=token_tis()), batch, batch.hidden, weight, None)
    with pytest.raises(RuntimeError, match=r"twice .* is not supported"):
        torch.autograd.grad(loss, weight, create_graph=True)


BAD = {
    "a correction for a loss": ({"loss_fn": token_tis()}, "loss_fn"),
    "narrow hidden states": ({"hidden": torch.zeros(B, T, D + 1)}, "hidden"),
    "rollout with gradient": (
        {"rollout_log_probs": torch.zeros(B, T, requires_grad=True)}, "rollout_log_probs",
    ),
    "advantages of other tokens": ({"advantages": torch.zeros(B, T + 1)}, "advantages"),
    "target beyond the vocabulary": ({"target": torch.full((B, T), V)}, "target"),
    "float mask": ({"mask": torch.ones(B, T)}, "mask"),
    "empty chunks": ({"chunk_size": 0}, "chunk_size"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    batch = make()
    bad, argument = BAD[case]
    arguments = {
        "loss_fn": PolicyLoss(), "hidden": batch.hidden, "weight": batch.weight,
        "target": batch.target, "mask": batch.mask,
    } | batch.rest | bad
    with pytest.raises(InputError, match=rf"`{argument}` must be .* Fix: "):
        fused_policy_loss(**arguments)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_log_prob_that_is_none_takes_its_sequence_out_of_the_gradient_too(frozen):
    """Finite, and below −10⁴ nats: the loss drops it, and so must the pass that makes gradients."""
    hidden = torch.tensor([[[1.0], [2e4], [1.0]]], dtype=torch.float64)
    head = torch.tensor([[1.0], [0.0], [0.5]], dtype=torch.float64)
    old = torch.full((1, 3), -1.0, dtype=torch.float64)
    hidden.requires_grad_()
    head.requires_grad_(not frozen)
    loss, metrics = fused_policy_loss(
        PolicyLoss(correction=sequence_is()), hidden=hidden, weight=head,
        target=torch.tensor([[0, 1, 2]]), old_log_probs=old, rollout_log_probs=old - 0.1,
        advantages=torch.ones(1, dtype=torch.float64), mask=torch.ones(1, 3, dtype=torch.bool),
    )
    loss.backward()
    assert loss == 0 and metrics["is/rejected"] == 1
    assert hidden.grad.abs().max() == 0
    assert frozen or head.grad.abs().max() == 0


def test_an_objective_without_gradient_is_a_loss_without_one():
    def nothing(log_probs, old_log_probs, advantages, layout):
        return torch.zeros_like(log_probs)

    hidden = torch.randn(1, 3, 4, requires_grad=True)
    loss, _ = fused_policy_loss(
        PolicyLoss(objective=nothing), hidden=hidden, weight=torch.randn(5, 4),
        target=torch.ones(1, 3).long(), rollout_log_probs=-torch.ones(1, 3),
        advantages=torch.ones(1, 3), mask=torch.ones(1, 3, dtype=torch.bool),
    )
    assert not loss and not loss.requires_grad
