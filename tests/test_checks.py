"""The ready checks pass what is right and catch each planted mistake."""

import os
import re
from functools import partial

import pytest
import torch
from hypothesis import settings

from iscorrect import (
    PRESETS,
    Correction,
    InputError,
    Layout,
    PolicyLoss,
    PPOClip,
    at_level,
    global_normalizer,
    sequence_is,
    sequence_mis,
    sequence_tis,
    token_is,
    token_tis,
    uncorrected,
)
from iscorrect.testing.checks import (
    check_finite,
    check_identity_when_equal,
    check_invariant_to_microbatching,
    check_invariant_to_packing,
    check_invariant_to_padding,
    check_monotone,
    check_no_gradient_outside_mask,
    check_same_as,
    check_sign,
    check_unbiased,
    check_weights,
)

tokens_of_the_batch = partial(global_normalizer, group=None, gradients="summed")


def sequences_of_the_batch(mask):
    return mask.any(-1).sum()


settings.register_profile(
    "failing", settings.get_profile("ci"), max_examples=300, derandomize=True
)


def fails(check, *arguments, **options):
    """The message with which a check fails, within three hundred examples."""
    settings.load_profile("failing")
    try:
        with pytest.raises(AssertionError) as error:
            check(*arguments, **options)
    finally:
        settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
    return str(error.value)


@pytest.mark.parametrize("preset", [
    x if x in ("token-tis", "sequence-mis") else pytest.param(x, marks=pytest.mark.slow)
    for x in PRESETS
])
def test_every_preset_passes_the_checks_that_hold_for_all(preset):
    loss_fn = PolicyLoss(correction=PRESETS[preset]())
    check_invariant_to_padding(loss_fn)
    check_invariant_to_packing(loss_fn)
    check_no_gradient_outside_mask(loss_fn)
    check_finite(loss_fn)


@pytest.mark.parametrize("aggregation", ["seq-mean-token-sum", "seq-mean-token-mean", "sum"])
def test_every_aggregation_passes_the_checks_that_hold_for_all(aggregation):
    loss_fn = PolicyLoss(correction=sequence_tis(), aggregation=aggregation)
    check_invariant_to_padding(loss_fn)
    check_invariant_to_packing(loss_fn)
    check_no_gradient_outside_mask(loss_fn)
    check_finite(loss_fn)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_the_identity_between_equal_policies(preset):
    check_identity_when_equal(
        PolicyLoss(correction=PRESETS[preset]()), PolicyLoss(correction=uncorrected())
    )


@pytest.mark.parametrize("preset", [name for name in PRESETS if PRESETS[name]().scope != "batch"])
def test_every_preset_without_batch_statistics_adds_up_over_micro_batches(preset):
    loss_fn = PolicyLoss(correction=PRESETS[preset]())
    check_invariant_to_microbatching(loss_fn, tokens_of_the_batch)


@pytest.mark.slow
def test_sequence_importance_sampling_is_unbiased_with_any_baseline_that_ignores_the_sequence():
    loss_fn = PolicyLoss(correction=sequence_is(), aggregation="seq-mean-token-sum")
    check_unbiased(loss_fn)
    check_unbiased(loss_fn, batch=2, group="rloo")
    check_unbiased(loss_fn, batch=2, group="dr-grpo", scale=1 / 2)


def test_three_policies_are_unbiased_where_both_ratios_are_products():
    loss_fn = PolicyLoss(
        correction=sequence_is(), aggregation="seq-mean-token-sum",
        objective=lambda log_probs, old, advantages, layout: -advantages * log_probs
        * at_level(log_probs.detach() - old, layout, "sequence").exp(),
    )
    check_unbiased(loss_fn, old=True)


@pytest.mark.slow
def test_what_is_biased_is_found_to_be():
    for correction in (uncorrected(), token_is(), sequence_tis(1.1), sequence_mis(high=1.1)):
        loss_fn = PolicyLoss(correction=correction, aggregation="seq-mean-token-sum")
        message = fails(check_unbiased, loss_fn)
        assert message.startswith("check_unbiased: the expected gradient is")
        for word in ("∇J", "logits = [[", "rollout_logits = [[", "reward = ["):
            assert word in message


# Planted mistakes, each in a loss that would otherwise be sequence importance sampling.


def sequence_loss(log_probs, *, rollout_log_probs, advantages, mask, ratio, normalizer=None):
    """Σ w A log π / number of sequences, with a weight of the caller's."""
    layout = mask if isinstance(mask, Layout) else Layout(mask)
    log_probs = torch.where(layout.mask, log_probs, 0)
    d = torch.where(layout.mask, log_probs - torch.where(layout.mask, rollout_log_probs, 0), 0)
    weights = ratio(d, layout)
    scale = layout.num_sequences() if normalizer is None else normalizer
    return -layout.total(weights * advantages * log_probs) / scale


def correct(d, layout):
    return at_level(d, layout, "sequence").detach().exp()


def not_detached(d, layout):
    return at_level(d, layout, "sequence").exp()


def upside_down(d, layout):
    return at_level(-d, layout, "sequence").detach().exp()


def sum_of_exponentials(d, layout):
    return layout.sequence_total(d.detach().exp())


def geometric_for_product(d, layout):
    return at_level(d, layout, "geometric").detach().exp()


def counted_twice(d, layout):
    return at_level(2 * d, layout, "sequence").detach().exp()


def test_the_loss_without_a_mistake_passes_everything():
    loss_fn = partial(sequence_loss, ratio=correct)
    check_unbiased(loss_fn)
    check_identity_when_equal(
        loss_fn, PolicyLoss(correction=uncorrected(), aggregation="seq-mean-token-sum")
    )
    check_invariant_to_padding(loss_fn)
    check_invariant_to_packing(loss_fn)
    check_invariant_to_microbatching(loss_fn, sequences_of_the_batch)
    check_no_gradient_outside_mask(loss_fn)


@pytest.mark.parametrize(
    "ratio",
    [not_detached, upside_down, sum_of_exponentials, geometric_for_product, counted_twice],
)
def test_a_wrong_weight_is_caught_as_a_bias(ratio):
    message = fails(check_unbiased, partial(sequence_loss, ratio=ratio))
    assert "check_unbiased: the expected gradient is" in message


def with_advantages(change):
    """The loss without a mistake, but for what it takes for A."""
    loss_fn = partial(sequence_loss, ratio=correct)
    return lambda log_probs, *, advantages, **others: loss_fn(
        log_probs, advantages=change(advantages), **others
    )


@pytest.mark.parametrize(
    "change", [torch.abs, torch.relu, lambda a: a.clamp(-1, 1)], ids=["abs", "relu", "clamp"]
)
def test_an_advantage_that_loses_its_sign_or_its_size_is_caught_as_a_bias(change):
    message = fails(check_unbiased, with_advantages(change))
    assert "check_unbiased: the expected gradient is" in message
    assert re.search(r"with length=\d, eos=(None|1), on", message)


@pytest.mark.parametrize("times", [lambda x: x.shape[1], lambda x: 2], ids=["width", "2"])
def test_a_sequence_divided_by_its_own_length_is_caught_as_a_bias(times):
    def loss_fn(log_probs, *, mask, advantages, **others):
        lengths = mask.sum(-1, keepdim=True)
        return partial(sequence_loss, ratio=correct)(
            log_probs, mask=mask, advantages=times(mask) * advantages / lengths, **others
        )

    fails(check_unbiased, loss_fn)


@pytest.mark.parametrize("ratio", [not_detached, sum_of_exponentials])
def test_a_weight_that_is_not_one_or_carries_gradient_is_caught_between_equal_policies(ratio):
    message = fails(
        check_identity_when_equal, partial(sequence_loss, ratio=ratio),
        PolicyLoss(correction=uncorrected(), aggregation="seq-mean-token-sum"),
    )
    assert "differs from the uncorrected one" in message


def test_a_ratio_in_the_weight_and_again_in_the_objective_is_caught():
    # The weight is π_old/μ; an objective on π/μ, not π/π_old, counts π_old/μ a second time.
    def loss_fn(log_probs, *, rollout_log_probs, old_log_probs, advantages, mask):
        inner = PolicyLoss(
            correction=sequence_is(), aggregation="seq-mean-token-sum",
            objective=PPOClip(low=None, high=None, level="sequence"),
        )
        weights = inner.correction(
            old_log_probs=old_log_probs, rollout_log_probs=rollout_log_probs, mask=mask
        ).weights
        update = at_level(log_probs - rollout_log_probs, Layout(mask), "sequence").exp()
        return -(weights * update * advantages).masked_fill(~mask, 0).sum() / len(mask)

    assert "old_logits" in fails(check_unbiased, loss_fn, old=True)


def test_a_mask_applied_after_the_exponential_is_caught():
    def loss_fn(log_probs, *, rollout_log_probs, advantages, mask):
        weights = (log_probs - rollout_log_probs).exp().detach()
        return -(weights * advantages * log_probs * mask).sum()

    message = fails(check_no_gradient_outside_mask, loss_fn)
    assert "outside the mask change the loss" in message
    assert "nan" in message


def test_a_ratio_that_overflows_is_caught():
    def loss_fn(log_probs, *, rollout_log_probs, advantages, mask):
        weights = torch.where(mask, log_probs - rollout_log_probs, 0).exp().detach()
        return -(weights * advantages * log_probs).masked_fill(~mask, 0).sum()

    assert "check_finite: the loss is" in fails(check_finite, loss_fn)


@pytest.mark.filterwarnings("ignore:.*over='kept':UserWarning")
def test_a_denominator_over_kept_tokens_is_caught():
    loss_fn = PolicyLoss(correction=sequence_mis(high=1.2), over="kept")
    message = fails(check_invariant_to_microbatching, loss_fn, tokens_of_the_batch)
    assert "the parts do not add up to the whole" in message


def test_a_denominator_of_the_rank_alone_is_caught():
    def loss_fn(log_probs, *, normalizer=None, **tensors):
        return PolicyLoss(correction=token_tis())(log_probs, **tensors)

    assert "do not add up" in fails(
        check_invariant_to_microbatching, loss_fn, tokens_of_the_batch
    )


def test_a_statistic_of_the_micro_batch_is_caught():
    loss_fn = PolicyLoss(correction=Correction(level="token", normalize=True))
    assert "do not add up" in fails(
        check_invariant_to_microbatching, loss_fn, tokens_of_the_batch
    )


def test_packing_off_by_one_is_caught():
    inner = partial(sequence_loss, ratio=correct)

    def loss_fn(log_probs, *, mask, **tensors):
        if mask.mask.shape[0] == 1:
            starts = mask.sequence_starts().roll(1, dims=-1)
            mask = Layout(mask.mask, sequence_ids=starts.long().cumsum(-1))
        return inner(log_probs, mask=mask, **tensors)

    message = fails(check_invariant_to_packing, loss_fn)
    assert "the packed loss differs from the padded one" in message


def test_a_denominator_of_the_padded_width_is_caught():
    def loss_fn(log_probs, *, mask, **tensors):
        total = PolicyLoss(correction=token_tis(), aggregation="sum")
        return total(log_probs, mask=mask, **tensors).loss / mask.numel()

    assert "columns before and" in fails(check_invariant_to_padding, loss_fn)


def test_the_smallest_example_is_the_one_shown():
    def loss_fn(log_probs, *, rollout_log_probs, advantages, mask):
        return -(1.5 * advantages * log_probs).masked_fill(~mask, 0).sum()

    message = fails(
        check_identity_when_equal, loss_fn,
        PolicyLoss(correction=uncorrected(), aggregation="sum"),
    )
    assert "mask = [[True]]" in message


def drops(advantages, **_):
    advantages.clamp_(min=0)


def centres(advantages, **_):
    advantages -= advantages.mean()


def forgets_the_engine(log_probs, rollout_log_probs, **_):
    rollout_log_probs.copy_(log_probs.detach())


def narrows(mask, **_):
    mask[:, 1:] = False


@pytest.mark.parametrize("change", [drops, centres, forgets_the_engine, narrows])
def test_a_loss_that_changes_its_inputs_is_caught(change):
    def wrong(log_probs, *, rollout_log_probs, advantages, mask):
        given = dict(rollout_log_probs=rollout_log_probs, advantages=advantages, mask=mask)
        change(log_probs=log_probs, **given)
        weights = (log_probs - rollout_log_probs).detach().exp().clamp(max=2)
        return -(weights * advantages * log_probs)[mask].sum()

    fails(check_same_as, wrong, PolicyLoss(correction=token_tis(), aggregation="sum"))
    if change is forgets_the_engine:  # the others have the right weights, of what they leave
        fails(check_weights, wrong, token_tis())


def test_a_loss_that_turns_its_advantages_round_is_caught():
    def flips(log_probs, *, rollout_log_probs, advantages, mask):
        advantages.abs_()
        return -(advantages * log_probs)[mask].mean()

    fails(check_sign, flips)


def per_token(log_probs, **_):
    return log_probs


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (lambda x: {"loss": x.sum()}, "got dict"),
        (lambda x: [x.sum()], "got list"),
        (lambda x: x.sum().item(), "got float"),
        (lambda x: None, "got NoneType"),
        (lambda x: (), "got tuple"),
        (lambda x: x, r"got float\d\d \("),
        (lambda x: ({"loss": x.sum()}, x), "a tuple that begins with dict"),
        (lambda x: x.sum().long(), r"got int64 \(\)"),
    ],
)
@pytest.mark.parametrize("check", [check_sign, check_unbiased, check_finite])
def test_a_loss_that_returns_no_scalar_is_told_what_to_return(check, result, got):
    with pytest.raises(InputError, match=f"{check.__name__}: `loss_fn` must be a loss .*{got}"):
        check(lambda log_probs, **_: result(log_probs))


def test_a_reference_that_returns_no_scalar_is_named_and_so_is_what_cannot_be_called():
    right = PolicyLoss(correction=token_tis())
    with pytest.raises(InputError, match="check_same_as: `reference` must be a loss"):
        check_same_as(right, per_token)
    with pytest.raises(InputError, match="check_identity_when_equal: `uncorrected_loss_fn`"):
        check_identity_when_equal(right, per_token)
    for wrong, got in ((None, "NoneType"), (PolicyLoss, "the class PolicyLoss"),
                       (token_tis(), "Correction")):
        with pytest.raises(InputError, match=f"`loss_fn` must be a function .*got {got}"):
            check_sign(wrong)


def test_errors_of_the_loss_come_through():
    with pytest.raises(InputError, match="`mask` must be"):
        check_finite(lambda log_probs, *, mask, **_: Layout(mask.float()))


def test_a_failure_shows_the_smallest_case_once_with_the_difference():
    right = PolicyLoss(correction=token_tis())

    def loss_fn(log_probs, **tensors):
        return right(log_probs, **tensors).loss * (1 + 1e-6)

    message = fails(check_same_as, loss_fn, right)
    first, *example = message.splitlines()
    assert "apart" in first
    assert "(tolerance 1e-09)" in first
    # The two numbers differ in print too.
    found, expected = re.search(r": (?:loss|gradient) (\S+), expected (\S+), ", first).groups()
    assert found != expected
    assert [line.split(" = ")[0].strip() for line in example] == [
        "log_probs", "rollout_log_probs", "advantages", "mask",
    ]
    assert "Layout object" not in message


def test_what_float64_agrees_to_is_no_demand_on_float32_nor_forgiven_by_it():
    right = PolicyLoss(correction=token_tis())

    def in_float32(log_probs, **tensors):
        tensors = {k: x.float() if x.is_floating_point() else x for k, x in tensors.items()}
        return right(log_probs.float(), **tensors)

    check_same_as(in_float32, right)
    assert "tolerance 1e-12" in fails(check_same_as, in_float32, right, tolerance=1e-12)
    check_same_as(lambda *a, **k: right(*a, **k).loss * (1 + 1e-4), right, tolerance=1e-3)


def test_a_message_names_three_policies_only_where_there_are_three():
    right = PolicyLoss(correction=token_tis(), objective=PPOClip())
    wrong = PolicyLoss(correction=token_tis(cap=3.0), objective=PPOClip())
    assert "old_log_probs" in fails(check_same_as, wrong, right, old=True)
    assert "old_log_probs" not in fails(check_same_as, wrong, right)
    assert "weights are others" in fails(check_weights, wrong, token_tis(), old=True)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_its_own_weights_and_pushes_the_right_way(preset):
    correction = PRESETS[preset]()
    check_weights(PolicyLoss(correction=correction), correction)
    check_sign(PolicyLoss(correction=correction))


@pytest.mark.slow
@pytest.mark.parametrize("correction", [token_is(), token_tis(), sequence_tis()])
def test_truncation_is_monotone_and_masking_is_not(correction):
    check_monotone(PolicyLoss(correction=correction))
    assert "so that every ratio is larger" in fails(
        check_monotone, PolicyLoss(correction=sequence_mis())
    )


def test_a_loss_that_narrows_its_log_probs_and_no_other_input_is_compared_as_float32():
    right = PolicyLoss(correction=token_tis())

    def narrowed(log_probs, *, rollout_log_probs, advantages, mask):
        weights = (log_probs.float() - rollout_log_probs.float()).detach().exp().clamp(max=2)
        return -(weights * log_probs.float() * advantages)[mask].mean()

    check_same_as(narrowed, right)
    assert "tolerance 1e-05" in fails(
        check_same_as, lambda *a, **k: narrowed(*a, **k) * (1 + 1e-3), right
    )


def test_the_librarys_own_losses_are_compared_as_float64():
    right = PolicyLoss(correction=sequence_tis(), objective=PPOClip())
    message = fails(check_same_as, lambda *a, **k: right(*a, **k).loss * (1 + 1e-7), right)
    assert "tolerance 1e-09" in message
