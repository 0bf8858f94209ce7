"""A line of text, or a dictionary, in the place of every adapter's correction or loss."""

import sys
import types

import contracts
import fakes
import pytest
import torch
from drawn import fixed

from iscorrect import InputError, PolicyLoss, PPOClip, parse_loss, to_dict, to_text, token_tis
from iscorrect.adapters import areal, ms_swift, openrlhf, tinker
from iscorrect.adapters.trl import CorrectedGRPO

pytestmark = pytest.mark.usefixtures("modules")

LOSS = PolicyLoss(correction=token_tis(cap=1.2), objective=PPOClip(high=1.28))
FORMS = {"value": LOSS, "text": to_text(LOSS), "dictionary": to_dict(LOSS)}
CORRECTIONS = {
    "value": LOSS.correction, "text": "token-tis:cap=1.2",
    "dictionary": {"name": "token-tis", "cap": 1.2},
}


def one_loss(loss_of):
    """The loss that all three forms give."""
    first, *others = [loss_of(form) for form in FORMS.values()]
    assert all(torch.equal(first, other) for other in others)
    expected = LOSS(batch().log_probs, **arguments()).loss
    torch.testing.assert_close(first, expected)


def batch():
    return fixed(3, rows=6)


def arguments():
    names = ("old_log_probs", "rollout_log_probs", "advantages", "mask")
    return {name: getattr(batch(), name) for name in names}


def test_areal_takes_text():
    one_loss(lambda form: areal.loss_function(form)(batch().log_probs, None, dict(
        loss_mask=batch().mask, logprobs=batch().rollout_log_probs,
        prox_logp=batch().old_log_probs, advantages=batch().advantages,
    )))


def test_openrlhf_takes_text():
    one_loss(lambda form: openrlhf.CorrectedPolicyLoss(form)(
        batch().log_probs, batch().old_log_probs, batch().advantages, batch().mask,
        batch().rollout_log_probs,
    )[0])


def test_nemo_rl_takes_text():
    fakes.nemo_rl()
    from iscorrect.adapters.nemo_rl import CorrectedLoss

    x, data = batch(), contracts.nemo_data(batch())
    data["sample_mask"] = torch.ones(6)
    counts = torch.tensor(6), x.mask.sum()
    one_loss(lambda form: CorrectedLoss(form)(data, *counts, next_token_logprobs=x.log_probs)[0])


def test_skyrl_takes_text(monkeypatch):
    registered = {}
    module = types.SimpleNamespace(
        register_policy_loss=lambda name: lambda function: registered.update({name: function})
    )
    monkeypatch.setitem(sys.modules, "skyrl.backends.skyrl_train.utils.ppo_utils", module)
    from iscorrect.adapters.skyrl import register

    text = "token-tis:cap=1.2 sum"
    for form in (text, {"correction": "token-tis:cap=1.2", "aggregation": "sum"}):
        register("ours", form)
        x = batch()
        loss, _ = registered["ours"](
            x.log_probs, x.old_log_probs, x.advantages, None, x.mask, x.rollout_log_probs
        )
        expected = PolicyLoss(correction=LOSS.correction, aggregation="sum")
        torch.testing.assert_close(loss, expected(x.log_probs, **arguments()).loss)


def test_tinker_takes_text():
    lists = dict(
        old_log_probs=list(batch().old_log_probs),
        rollout_log_probs=list(batch().rollout_log_probs), advantages=list(batch().advantages),
    )
    first, *others = [
        torch.cat(tinker.corrected_advantages(form, **lists)[0]) for form in CORRECTIONS.values()
    ]
    assert all(torch.equal(first, other) for other in others)
    data = [
        types.SimpleNamespace(loss_fn_inputs={
            name: types.SimpleNamespace(to_torch=lambda x=x: x) for name, x in zip(
                ("logprobs", "advantages", "mask"), rows, strict=True
            )
        }) for rows in zip(batch().rollout_log_probs, batch().advantages, batch().mask, strict=True)
    ]
    losses = [
        tinker.custom_loss(form)(data, list(batch().log_probs))[0] for form in FORMS.values()
    ]
    assert losses[0] == losses[1] == losses[2]


def test_slime_takes_text():
    lengths, totals = [9, 14], [12, 21]
    world = fakes.slime()
    results = [
        contracts.slime_call(world, form, lengths, totals)[1] for form in CORRECTIONS.values()
    ]
    counted = torch.cat(results[0][1]) == 1
    assert all(torch.equal(results[0][0][counted], other[0][counted]) for other in results[1:])


def test_prime_rl_takes_text():
    fakes.prime_rl()
    from iscorrect.adapters.prime_rl import loss

    x = batch()
    inputs = fakes.LossInputs(
        x.log_probs[0], x.rollout_log_probs[0], None, x.advantages[0], x.mask[0]
    )
    losses = [loss(inputs, correction=form).loss for form in CORRECTIONS.values()]
    assert losses[0] == losses[1] == losses[2]


def test_ms_swift_takes_text():
    class Trainer:
        def _get_rollout_is_correction(self): ...
        def _compute_loss_and_metrics(self): ...
        def compute_liger_loss(self): ...
        def _prepare_algorithm_params(self): ...

    weights = []
    for form in CORRECTIONS.values():
        ms_swift.install(form, Trainer)
        x = batch()
        weights.append(Trainer()._get_rollout_is_correction(
            x.old_log_probs, x.rollout_log_probs, x.mask
        )[1])
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", CORRECTIONS)
def test_trl_takes_text(name, monkeypatch):
    for method in ("_check_settings", "_check_fused"):
        monkeypatch.setattr(CorrectedGRPO, method, lambda self: None)
    assert CorrectedGRPO(correction=CORRECTIONS[name]).correction == LOSS.correction
    assert CorrectedGRPO(policy_loss=FORMS[name]).policy_loss == LOSS


def test_verl_takes_the_text_of_an_objective_and_of_nothing_else():
    from iscorrect.adapters.verl import _objective

    assert _objective("ppo-clip:high=1.28") == parse_loss("ppo-clip:high=1.28").objective
    assert _objective(PPOClip()) == PPOClip()
    with pytest.raises(InputError, match="an objective alone"):
        _objective("token-tis ppo-clip")
