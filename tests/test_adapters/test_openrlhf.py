"""OpenRLHF's own loss, training step and Ray workers, with a loss of this library in them."""

from unittest.mock import MagicMock

import pytest
import torch
from drawn import Worst, drawn, fixed, gradient_of
from hypothesis import given, strategies as st
from outcome import record, reported
from stubs import real

from iscorrect import InputError, PolicyLoss, PPOClip, ReferenceKL, token_tis
from iscorrect.adapters.openrlhf import CorrectedPolicyLoss, from_openrlhf, install
from iscorrect.dumps import DumpWriter

theirs, actor = real("openrlhf", "openrlhf.models.loss", "openrlhf.trainer.ray.ppo_actor")
pytestmark = pytest.mark.filterwarnings("ignore")

CLIP = PPOClip(low=0.8, high=1.28)
GATES = [
    ("off", "mask", "ratio", (0.5, 5.0)), ("token", "clip", "ratio", (0.5, 5.0)),
    ("token", "mask", "ratio", (0.5, 5.0)), ("token", "clip", "ratio", (0.0, 2.0)),
    ("seq", "mask", "ratio", (0.9, 1.1)), ("token", "mask", "binary_kl", (0.0, 0.01)),
    ("seq", "mask", "binary_kl", (0.0, 0.01)), ("token", "mask", "tv", (0.0, 0.05)),
    ("seq", "mask", "tv", (0.0, 0.05)),
]


def settings(gate):
    names = ("level", "mode", "gating", "threshold")
    return {f"is_correction_{name}": x for name, x in zip(names, gate, strict=True)}


def both(gate, how, counts, batch):
    given = dict(action_mask=batch.mask.double(), rollout_log_probs=batch.rollout_log_probs)
    given |= counts
    their = theirs.PolicyLoss(0.2, 0.28, token_level_loss=how == "token-mean", **settings(gate))
    our = CorrectedPolicyLoss(PolicyLoss(
        correction=from_openrlhf(**settings(gate)), objective=CLIP, aggregation=how
    ))
    for module in (our, their):
        yield module, lambda x, m=module: m(x, batch.old_log_probs, batch.advantages, **given)


@pytest.mark.parametrize("gate", GATES)
def test_the_loss_and_its_gradient_are_those_of_its_own_policy_loss(gate):
    worst = Worst()

    @given(drawn(), st.sampled_from(["token-mean", "seq-mean-token-mean"]), st.booleans())
    def agree(batch, how, globally):
        n, rows = batch.mask.sum(), batch.mask.any(-1).sum()
        if not n:
            return
        counts = dict(dp_size=2, batch_num_tokens=n + 3, global_batch_size=rows + 1)
        pairs = both(gate, how, counts if globally else {}, batch)
        ours, own = (gradient_of(lambda x, f=f: f(x)[0], batch.log_probs) for _, f in pairs)
        assert worst.add(ours, own) < 1e-7  # its sequence mean divides by the count + 1e-8

    agree()
    record(
        "OpenRLHF", f"PolicyLoss, {' '.join(map(str, gate))}", distribution="openrlhf",
        loss=worst.loss, gradient=worst.gradient,
    )


@pytest.mark.parametrize("gate", GATES[1:3])
def test_what_it_logs_is_what_its_own_policy_loss_logs(gate):
    batch = fixed(dtype=torch.float64)
    (_, our), (_, own) = both(gate, "token-mean", {}, batch)
    for mine, its in zip(our(batch.log_probs)[1:4], own(batch.log_probs)[1:4], strict=True):
        torch.testing.assert_close(mine, its)
    if gate[1] == "mask":
        torch.testing.assert_close(our(batch.log_probs)[4], own(batch.log_probs)[4])


def step(loss_fn, batch):
    """Its ``ActorPPOTrainer.training_step``, on a model that returns a batch's log-probs."""
    trainer = MagicMock()
    trainer.actor_loss_fn, trainer.aux_loss, trainer.ema_model = loss_fn, False, None
    trainer.args.algo.kl.use_loss = trainer.args.train.dynamic_batch_enable = False
    trainer.args.actor.entropy_coef = None
    log_probs = batch.log_probs.clone().requires_grad_()
    trainer.actor = MagicMock(side_effect=lambda *_, **__: (log_probs, MagicMock()))
    trainer.strategy.backward = lambda loss, *_: loss.backward()
    experience = actor.Experience(
        sequences=torch.zeros(len(batch.mask), 20).long(), action_mask=batch.mask.float(),
        action_log_probs=batch.old_log_probs, advantages=batch.advantages,
        rollout_log_probs=batch.rollout_log_probs, info={},
    )
    counts = dict(
        dp_size=1, batch_num_tokens=batch.mask.sum(), global_batch_size=len(batch.mask)
    )
    result = actor.ActorPPOTrainer.training_step(
        trainer, experience, 0.0, 0, loss_batch_info=counts
    )
    return result["metrics"], log_probs.grad


def test_its_training_step_runs_with_a_loss_of_ours_and_logs_what_it_reads():
    batch = fixed()
    own = theirs.PolicyLoss(0.2, 0.28, **settings(("token", "clip", "ratio", (0.0, 2.0))))
    our = CorrectedPolicyLoss(PolicyLoss(correction=token_tis(cap=2.0), objective=CLIP))
    expected, their_gradient = step(own, batch)
    metrics, gradient = step(our, batch)
    for name in ("policy_loss", "ppo_clip_ratio", "ppo_kl", "vllm_kl"):
        torch.testing.assert_close(metrics[name].float(), expected[name].float())
    assert metrics["is_filter_ratio"] == 0
    torch.testing.assert_close(gradient, their_gradient)
    worst = Worst()
    worst.add((metrics["policy_loss"], gradient), (expected["policy_loss"], their_gradient))
    record(
        "OpenRLHF", "ActorPPOTrainer.training_step", distribution="openrlhf", loss=worst.loss,
        gradient=worst.gradient,
    )


def test_its_steps_leave_a_dump_to_report(tmp_path):
    batch = fixed()
    dumps = DumpWriter(tmp_path / "dump")
    step(CorrectedPolicyLoss(PolicyLoss(correction=token_tis()), dumps), batch)
    reported(dumps.directory, batch)


def test_a_step_without_a_counted_token_has_loss_zero():
    batch = fixed()
    batch = batch._replace(mask=torch.zeros_like(batch.mask))
    metrics, gradient = step(CorrectedPolicyLoss(PolicyLoss()), batch)
    assert metrics["policy_loss"] == 0
    assert not gradient.any()


@pytest.fixture
def installed(monkeypatch):
    # its replay buffer names the device, and does not use it here
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(actor, "torch_dist_barrier_and_cuda_sync", lambda: None)
    monkeypatch.setattr(actor, "PolicyLoss", actor.PolicyLoss)
    install(PolicyLoss(correction=token_tis(cap=2.0), objective=CLIP))


def trainer_of(**changed):
    """Its trainer, made by its own constructor."""
    strategy = MagicMock()
    strategy.args.actor.eps_clip_low_high = (0.2, 0.28)
    strategy.args.actor.loss_agg_mode = "token-mean"
    strategy.args.actor.aux_loss_coef = 0.0
    defaults = dict(level="token", mode="mask", gating="ratio", threshold=[0.5, 5.0])
    for name, value in defaults.items():
        setattr(strategy.args.algo.advantage, f"is_correction_{name}", value)
    strategy.args.actor.policy_loss_type, strategy.args.actor.dual_clip = "ppo", None
    for name, value in changed.items():
        home = strategy.args.algo.advantage if name.startswith("is_") else strategy.args.actor
        setattr(home, name, value)
    return actor.ActorPPOTrainer(
        strategy, MagicMock(), MagicMock(), MagicMock(), MagicMock(), vllm_engines=None
    )


def test_its_trainer_builds_the_installed_loss(installed):
    loss_fn = trainer_of().actor_loss_fn
    assert isinstance(loss_fn, CorrectedPolicyLoss)
    assert loss_fn.policy_loss.correction == token_tis(cap=2.0)


@pytest.mark.parametrize(("changed", "setting"), [
    (dict(is_correction_level="off"), "--algo.advantage.is_correction_level token"),
    (dict(policy_loss_type="gspo"), "--actor.policy_loss_type"),
    (dict(dual_clip=3.0), "--actor.dual_clip"),
    (dict(loss_agg_mode="seq-mean-token-mean"), "pass aggregation='seq-mean-token-mean'"),
])
def test_settings_that_would_be_ignored_stop_its_trainer(installed, changed, setting):
    with pytest.raises(InputError, match=setting):
        trainer_of(**changed)


def test_its_aggregation_may_be_that_of_the_installed_loss(installed):
    install(PolicyLoss(aggregation="seq-mean-token-mean"))
    trainer_of(loss_agg_mode="seq-mean-token-mean")
    with pytest.raises(InputError, match="pass aggregation='token-mean'"):
        trainer_of(loss_agg_mode="token-mean")


def test_a_penalty_towards_a_reference_is_left_to_its_own(installed):
    loss_fn = PolicyLoss(reference_kl=ReferenceKL(coefficient=0.1))
    for given_to in (install, CorrectedPolicyLoss):
        with pytest.raises(InputError, match=r"--algo\.kl\.use_loss"):
            given_to(loss_fn)


def test_its_binary_kl_drops_tokens_on_which_the_policies_agree_and_ours_keeps_them():
    old = -torch.linspace(0.01, 2.0, 200)[None]
    rollout, mask = old + 1e-5, torch.ones_like(old)
    gate = ("token", "mask", "binary_kl", (0.0, 0.05))
    own = theirs.PolicyLoss(**settings(gate))(old, old, mask, mask, rollout)
    ours = CorrectedPolicyLoss(PolicyLoss(correction=from_openrlhf(**settings(gate))))(
        old, old, mask, mask, rollout
    )
    assert own[4] > 0
    assert ours[4] == 0


def test_it_is_told_how_to_get_rollout_log_probs():
    module = CorrectedPolicyLoss(PolicyLoss())
    with pytest.raises(InputError, match=r"--algo\.advantage\.is_correction_level token"):
        module(*[torch.zeros(1, 1)] * 3)
    with pytest.raises(InputError, match="aggregation='token-mean'"):
        CorrectedPolicyLoss(PolicyLoss(aggregation="sum"))


def test_ray_workers_with_the_setup_hook_have_the_installed_loss():
    ray = pytest.importorskip("ray")
    import os
    import sys
    from pathlib import Path

    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]

    def setup():
        sys.path[:0] = paths
        import stubs

        stubs.install()
        from iscorrect import PolicyLoss, token_tis
        from iscorrect.adapters.openrlhf import install

        install(PolicyLoss(correction=token_tis(cap=2.0)))

    def loss_of_a_worker():
        from openrlhf.trainer.ray import ppo_actor

        return repr(ppo_actor.PolicyLoss(is_correction_level="token").policy_loss.correction)

    ray.init(
        num_cpus=1, include_dashboard=False, log_to_driver=False,
        runtime_env={
            "worker_process_setup_hook": setup,
            "env_vars": {"PYTHONPATH": os.pathsep.join(paths)},
        },
    )
    try:
        assert ray.get(ray.remote(loss_of_a_worker).remote()) == repr(token_tis(cap=2.0))
    finally:
        ray.shutdown()
    record("OpenRLHF", "Ray worker with the setup hook", distribution="openrlhf")
