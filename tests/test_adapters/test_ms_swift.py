"""ms-swift's own GRPO trainers, with a correction of this library in them."""

import sys
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest
import torch
from drawn import Worst, drawn, fixed
from hypothesis import given, strategies as st
from outcome import largest, record, reported
from stubs import real

from iscorrect import Correction, InputError, kpop, pareto_is, token_tis, uncorrected
from iscorrect.adapters.averages import from_averages
from iscorrect.adapters.ms_swift import from_ms_swift, install
from iscorrect.dumps import DumpWriter

hf, megatron, data = real(
    "ms-swift", "swift.rlhf_trainers.grpo_trainer", "swift.megatron.trainers.grpo_trainer",
    "swift.rl_core.data",
)
pytestmark = pytest.mark.filterwarnings("ignore")

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
TRAINERS = {"hf": hf.GRPOTrainer, "megatron": megatron.MegatronGRPOTrainer}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", TRAINERS)
def test_the_weights_are_those_of_its_own_function(mode, which):
    cls = TRAINERS[which]
    worst = Worst()

    @given(drawn(), st.sampled_from([1.1, 2.0, 5.0]))
    def agree(batch, threshold):
        me = SimpleNamespace(
            rollout_importance_sampling_mode=mode, rollout_importance_sampling_threshold=threshold,
        )
        me._compute_sequence_level_ratios = lambda *x: cls._compute_sequence_level_ratios(me, *x)
        d = batch.old_log_probs - batch.rollout_log_probs
        theirs = cls._apply_rollout_importance_sampling(me, d, batch.mask)
        ours = from_ms_swift(mode, threshold)(
            old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs,
            mask=batch.mask,
        ).weights
        # a token's own weight is held within e^±20 there
        alike = batch.mask & (torch.tensor(mode == "sequence_truncate") | (d.abs() < 20))
        theirs, ours = torch.where(alike, theirs, 0), torch.where(alike, ours, 0)
        worst.gradient = max(worst.gradient, largest(ours, theirs))
        assert worst.gradient < 1e-9

    agree()
    record(
        "ms-swift", f"{cls.__name__}._apply_rollout_importance_sampling, {mode}",
        distribution="ms-swift", gradient=worst.gradient,
    )


@pytest.fixture(params=TRAINERS)
def trainer(request):
    """A copy of a trainer's class, which is changed in place of the original."""
    original = TRAINERS[request.param]
    return type(original.__name__, (original,), dict(vars(original)))


def made(cls, batch, mode="token_truncate", **changes):
    """A trainer with what its loss reads, and no model."""
    me = MagicMock()
    me.__class__ = cls
    for name in (
        "_compute_loss_and_metrics", "_compute_rollout_offpolicy_metrics", "loss_func",
        "_get_rollout_is_correction", "_apply_rollout_importance_sampling",
        "_compute_is_correction_metrics", "_compute_sequence_level_ratios", "_update_metrics",
        "_undo_gradient_accumulation_scaling",
    ):
        if hasattr(cls, name):
            setattr(me, name, getattr(cls, name).__get__(me))
    settings = dict(
        compute_entropy=False, overlong_filter=False, beta=0.0, top_entropy_quantile=1.0,
        rollout_importance_sampling_mode=mode, rollout_importance_sampling_threshold=1.2,
        log_rollout_offpolicy_metrics=False, disable_rollout_importance_sampling=False,
        importance_sampling_level="token", loss_type="bnpo", epsilon_low=0.2, epsilon_high=0.28,
        off_policy_sequence_mask_delta=None, _has_teacher=False, sdar_loss_coef=0.0,
        chord_sft_iterator=None, _metrics=defaultdict(lambda: defaultdict(list)),
        kl_in_reward=False,
    )
    for name, value in (settings | changes).items():
        setattr(me, name, value)
    me.args.delta, me.args.overlong_filter = None, False
    me.accelerator.gather_for_metrics = lambda x: x.unsqueeze(0) if x.ndim == 0 else x
    log_probs = batch.log_probs.clone().requires_grad_()
    me._get_per_token_logps_and_entropies = lambda *_, **__: (log_probs, None)
    return me, log_probs


def batch_of(batch, **changes):
    tensors = dict(
        completion_mask=batch.mask, truncated_mask=torch.zeros(len(batch.mask)).bool(),
        seq_lengths=batch.mask.sum(-1), old_per_token_logps=batch.old_log_probs,
        rollout_per_token_logps=batch.rollout_log_probs, advantages=batch.advantages,
    )
    return data.GRPOBatch(**tensors | changes)


def step(cls, batch, **changes):
    """The trainer's own loss with what it puts into its metrics."""
    me, log_probs = made(cls, batch, **changes)
    loss, metrics = cls._compute_loss_and_metrics(me, None, {}, batch_of(batch))
    loss.backward()
    cls._update_metrics(me, metrics)
    return loss.detach(), log_probs.grad, me._metrics["train"]


def test_its_loss_takes_an_installed_correction_and_logs_its_metrics():
    batch = fixed()
    expected, their_gradient, _ = step(hf.GRPOTrainer, batch)
    cls = type("GRPOTrainer", (hf.GRPOTrainer,), dict(vars(hf.GRPOTrainer)))
    correction = token_tis(cap=1.2)
    install(correction, cls)
    install(correction, cls)  # as two plugins would
    loss, gradient, logged = step(cls, batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, their_gradient)
    whole = correction(
        old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs,
        mask=batch.mask,
    ).metrics.to_floats()
    read = from_averages(
        {name: float(x[0]) for name, x in logged.items()}, prefix="rollout_correction/"
    )
    for name in ("batch/tokens", "mismatch/kl_k3", "is/ess", "is/bounded"):
        assert read[name] == pytest.approx(whole[name], rel=1e-5)
    worst = Worst()
    worst.add((loss, gradient), (expected, their_gradient))
    record(
        "ms-swift", "GRPOTrainer._compute_loss_and_metrics with metrics read back",
        distribution="ms-swift", loss=worst.loss, gradient=worst.gradient,
    )


@pytest.fixture(autouse=True)
def ranks(monkeypatch):
    """Megatron's group of data-parallel ranks, which a test may fill; this rank alone if not."""
    asked = Mock(return_value=None)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 1)
    monkeypatch.setattr(
        sys.modules["megatron.core"], "mpu", SimpleNamespace(get_data_parallel_group=asked),
        raising=False,
    )
    return asked


def test_megatrons_metrics_are_those_of_all_data_parallel_ranks(ranks, monkeypatch):
    original = megatron.MegatronGRPOTrainer
    cls = type(original.__name__, (original,), dict(vars(original)))
    correction = token_tis(cap=1.2)
    install(correction, cls)
    batch = fixed(rows=6)
    parts = [batch.rows(slice(0, 2)), batch.rows(slice(2, 6))]

    def logged(part):
        me, _ = made(cls, part)
        me._compute_rollout_offpolicy_metrics(
            part.old_log_probs, part.rollout_log_probs, part.mask
        )
        me._apply_rollout_importance_sampling(None, part.mask)
        return me._compute_is_correction_metrics(None, None, None)

    theirs = logged(parts[1])
    ranks.return_value = "both ranks"
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
    sent = []

    def sum_over(x, group):
        sent.append(group)
        return x + torch.stack(list(theirs.values()))

    monkeypatch.setattr("iscorrect.adapters.ms_swift.sum_over", sum_over)
    read = from_averages({name: float(x) for name, x in logged(parts[0]).items()})
    whole = correction(
        old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs,
        mask=batch.mask,
    ).metrics.to_floats()
    assert sent == ["both ranks"]
    assert ranks.call_args.kwargs == {"with_context_parallel": True}
    for name in ("mismatch/kl_k3", "is/ess", "is/bounded", "is/weight/mean"):
        assert read[name] == pytest.approx(whole[name], rel=1e-5)
    assert read["batch/tokens"] == pytest.approx(whole["batch/tokens"] / 2)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "sapo"])
def test_weights_of_a_hundredth_make_the_gradient_a_hundredth(loss_type):
    gradients = []
    batch = fixed(scale=0.1)
    for correction in (token_tis(cap=0.01), uncorrected()):
        cls = type("GRPOTrainer", (hf.GRPOTrainer,), dict(vars(hf.GRPOTrainer)))
        install(correction, cls)
        gradients.append(step(cls, batch, loss_type=loss_type, tau_pos=1.0, tau_neg=1.0)[1])
    assert gradients[1].any()
    torch.testing.assert_close(gradients[0], 0.01 * gradients[1])


def test_its_losses_leave_a_dump_to_report(tmp_path):
    cls = type("GRPOTrainer", (hf.GRPOTrainer,), dict(vars(hf.GRPOTrainer)))
    dumps = DumpWriter(tmp_path / "dump")
    install(token_tis(), cls, dumps)
    batch = fixed(rows=4)
    step(cls, batch)
    reported(dumps.directory, batch)


def test_without_a_counted_token_the_loss_is_zero():
    cls = type("GRPOTrainer", (hf.GRPOTrainer,), dict(vars(hf.GRPOTrainer)))
    install(token_tis(), cls)
    batch = fixed(rows=2)._replace(mask=torch.zeros(2, 13).bool())
    loss, gradient, _ = step(cls, batch)
    assert loss == 0
    assert not gradient.any()


def test_corrections_that_look_at_probabilities_see_both_policies(trainer):
    batch = fixed(scale=1.0)
    correction = kpop(limit=0.05)
    install(correction, trainer)
    me, _ = made(trainer, batch)
    pair = (batch.old_log_probs, batch.rollout_log_probs, batch.mask)
    if hasattr(trainer, "_get_rollout_is_correction"):
        d, weights = me._get_rollout_is_correction(*pair)
        torch.testing.assert_close(d, pair[0] - pair[1])
    else:
        me._compute_rollout_offpolicy_metrics(*pair)
        weights = me._apply_rollout_importance_sampling(pair[0] - pair[1], batch.mask)
    expected = correction(old_log_probs=pair[0], rollout_log_probs=pair[1], mask=pair[2])
    torch.testing.assert_close(weights, expected.weights)
    assert 0 < (expected.weights[batch.mask] == 0).float().mean() < 1
    assert me._compute_is_correction_metrics(None, None, None)


def test_a_trainer_that_would_never_ask_for_weights_stops(trainer):
    install(token_tis(), trainer)
    prepare = getattr(trainer, "_prepare_algorithm_params", None) or trainer._init_grpo_params
    me = MagicMock()
    me.args.fipo_decay_rate = 1.0
    me.args.rollout_importance_sampling_mode = None
    with pytest.raises(InputError, match="--rollout_importance_sampling_mode token_truncate"):
        prepare(me)
    me.args.rollout_importance_sampling_mode = "token_truncate"
    prepare(me)
    me.args.loss_type = "real"
    with pytest.raises(InputError, match="another --loss_type"):
        prepare(me)


@pytest.mark.parametrize("how", ["no log-probs", "old vLLM"])
def test_a_batch_without_rollout_log_probs_stops_the_training(trainer, how):
    install(token_tis(), trainer)
    batch = fixed(rows=2)
    old = how == "old vLLM"
    me, log_probs = made(trainer, batch, disable_rollout_importance_sampling=old)
    given = batch_of(batch) if old else batch_of(batch, rollout_per_token_logps=None)
    with pytest.raises(InputError, match="use_vllm=true"):
        if hasattr(trainer, "_compute_loss_and_metrics"):
            trainer._compute_loss_and_metrics(me, None, {}, given)
        else:
            trainer.loss_func(me, log_probs, data={"grpo_batch": given})


def liger_step(cls, batch, **changes):
    """Its loss by Liger's kernel, on a kernel that returns the weights it is given."""
    me, _ = made(cls, batch)
    me.template.padding_free, me.advantage_estimator = False, "grpo"
    me.liger_grpo_loss = lambda vllm_is_ratio, **_: (vllm_is_ratio, [torch.zeros(())])
    given = batch_of(batch, **changes)
    given.logits_to_keep = batch.mask.shape[1]
    ids = {"input_ids": torch.zeros(batch.mask.shape).long()}
    return cls.compute_liger_loss(me, MagicMock(), ids, given)


def test_ligers_kernel_gets_the_weights_or_the_training_stops():
    cls = type("GRPOTrainer", (hf.GRPOTrainer,), dict(vars(hf.GRPOTrainer)))
    correction = token_tis(cap=1.2)
    install(correction, cls)
    batch = fixed(rows=2)
    expected = correction(
        old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs,
        mask=batch.mask,
    ).weights
    torch.testing.assert_close(liger_step(cls, batch), expected)
    with pytest.raises(InputError, match="use_vllm=true"):
        liger_step(cls, batch, rollout_per_token_logps=None)
    with pytest.raises(InputError, match="drop --use_liger_kernel"):
        liger_step(cls, batch, old_per_token_logps=None)


def test_a_correction_that_looks_across_the_batch_is_refused(trainer):
    for correction in (pareto_is(), Correction(normalize=True)):
        with pytest.raises(InputError, match="normalize=False"):
            install(correction, trainer)
    install(uncorrected(), trainer)
