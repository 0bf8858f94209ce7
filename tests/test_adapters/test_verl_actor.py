"""Three steps of a small model with verl's own hook on the driver and its actor's own loss."""

import warnings

import pytest
import torch
from drawn import Worst
from outcome import record

from iscorrect import PolicyLoss, PPOClip, token_tis, uncorrected
from iscorrect.adapters.verl import install, register_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")
    from tensordict import TensorDict
    from verl import DataProto
    from verl.trainer.ppo import core_algos
    from verl.utils import tensordict_utils
    from verl.workers.config import ActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS, PROMPT, RESPONSE, VOCABULARY = 6, 3, 8, 11
CLIP = PPOClip(low=0.8, high=1.28)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """verl's own hook comes back after the test."""
    name = "compute_rollout_correction_and_add_to_batch"
    monkeypatch.setattr(helper, name, getattr(helper, name))
    monkeypatch.setattr(
        core_algos, "POLICY_LOSS_REGISTRY", dict(core_algos.POLICY_LOSS_REGISTRY)
    )


def rollouts(step):
    """Ragged responses, left-padded as verl holds them, and an advantage each."""
    draw = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (ROWS, PROMPT + RESPONSE), generator=draw)
    lengths = torch.randint(1, RESPONSE + 1, (ROWS, 1), generator=draw)
    mask = torch.arange(RESPONSE) < lengths
    advantages = torch.randn(ROWS, 1, generator=draw).expand(ROWS, RESPONSE)
    return tokens, mask, torch.where(mask, advantages, 0)


def log_probs_of(model, tokens):
    """Log-prob of the next token at every position; "b t"."""
    return model[tokens].log_softmax(-1).gather(-1, tokens.roll(-1, 1)[..., None])[..., 0]


def actor_config():
    return ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, use_dynamic_bsz=False,
        clip_ratio_low=0.2, clip_ratio_high=0.28,
        policy_loss=PolicyLossConfig(loss_mode="iscorrect_steps"),
    )


def train(correction, steps=3):
    """Losses and metrics of verl's own functions, and losses of one PolicyLoss on the same."""
    install(correction)
    model = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(9))
    noise = 0.3 * torch.randn(model.shape, generator=torch.Generator().manual_seed(10))
    model.requires_grad_()
    losses, logged, worst = [], [], Worst()
    for step in range(steps):
        tokens, mask, advantages = rollouts(step)
        shown = slice(PROMPT - 1, PROMPT + RESPONSE - 1)
        with torch.no_grad():
            old = log_probs_of(model, tokens)[:, shown]
            rollout = log_probs_of(model + noise, tokens)[:, shown]  # the engine's other numbers
        batch = DataProto(batch=TensorDict({
            "rollout_log_probs": rollout, "old_log_probs": old, "response_mask": mask.float(),
        }, batch_size=ROWS))
        batch, metrics = helper.compute_rollout_correction_and_add_to_batch(batch, {})
        attention = torch.cat([torch.ones(ROWS, PROMPT).bool(), mask], dim=1)
        data = TensorDict({
            "prompts": tokens[:, :PROMPT], "responses": tokens[:, PROMPT:],
            "attention_mask": attention, "advantages": advantages, "old_log_probs": old,
            "response_mask": batch.batch["response_mask"],
            "rollout_is_weights": batch.batch["rollout_is_weights"],
        }, batch_size=ROWS)
        counts = dict(dp_size=1, batch_num_tokens=mask.sum().item(), global_batch_size=None)
        for name, value in counts.items():
            tensordict_utils.assign_non_tensor_data(data, name, value)
        with_gradient = log_probs_of(model, tokens)
        loss, _ = ppo_loss(actor_config(), {"log_probs": with_gradient[attention]}, data)
        (gradient,) = torch.autograd.grad(loss, model, retain_graph=True)
        ours = PolicyLoss(correction=correction, objective=CLIP)(
            with_gradient[:, shown], rollout_log_probs=rollout, old_log_probs=old,
            advantages=advantages, mask=mask,
        ).loss
        (expected,) = torch.autograd.grad(ours, model)
        worst.add((ours.detach(), expected), (loss.detach(), gradient))
        losses.append(loss.item())
        logged.append(metrics)
        with torch.no_grad():
            model -= 0.5 * gradient
    return losses, logged, worst


def test_weights_reach_the_loss_of_its_actor_and_metrics_its_log():
    register_loss("iscorrect_steps", CLIP)
    plain, *_ = train(uncorrected())
    losses, logged, worst = train(token_tis(cap=1.2))
    assert max(worst.loss, worst.gradient) < 1e-6
    assert all(abs(a - b) > 1e-3 for a, b in zip(losses, plain, strict=True))
    for metrics in logged:
        assert metrics["is/bounded"] > 0
        assert metrics["rollout_corr/rollout_is_max"] == pytest.approx(1.2)
    record(
        "verl", "three steps of its driver's hook and its actor's ppo_loss", distribution="verl",
        loss=worst.loss, gradient=worst.gradient,
    )
