"""SkyRL's own registry, worker step, metrics and Ray workers, with a loss of this library."""

import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from drawn import Worst, drawn, fixed, gradient_of
from hypothesis import given
from outcome import record, reported
from stubs import real

from iscorrect import (
    Correction,
    InputError,
    PolicyLoss,
    PPOClip,
    ReferenceKL,
    pareto_is,
    token_tis,
)
from iscorrect.adapters.averages import from_averages
from iscorrect.adapters.skyrl import from_skyrl, register
from iscorrect.dumps import DumpWriter, read_dump

ppo_utils, config, worker, batches_of = real(
    "skyrl", "skyrl.backends.skyrl_train.utils.ppo_utils", "skyrl.train.config.config",
    "skyrl.backends.skyrl_train.workers.worker", "skyrl.backends.skyrl_train.training_batch",
)
pytestmark = pytest.mark.filterwarnings("ignore")

CLIP = PPOClip(low=0.8, high=1.28)
TIS = PolicyLoss(correction=token_tis(cap=1.2), objective=CLIP, aggregation="sum")
SETTINGS = [
    dict(), dict(tis_ratio_type="token"), dict(tis_ratio_type="sequence"),
    dict(sequence_mask_metric="product"), dict(sequence_mask_metric="geometric"),
    dict(tis_ratio_type="token", outlier_token_is_threshold_high=1.5),
    dict(outlier_token_is_threshold_low=0.5),
    dict(tis_ratio_type="token", token_mask_is_threshold_low=0.8, token_mask_is_threshold_high=1.3),
    dict(token_mask_is_threshold_low=0.8),
    dict(
        tis_ratio_type="sequence", sequence_mask_metric="geometric", geo_mask_low=0.8,
        token_mask_is_threshold_low=0.9, token_mask_is_threshold_high=1.1,
    ),
    dict(
        tis_ratio_type="sequence", sequence_mask_metric="product",
        token_mask_is_threshold_low=0.9, token_mask_is_threshold_high=1.1,
    ),
]


@pytest.fixture(autouse=True)
def registry():
    """Names registered in a test are forgotten after it."""
    known = dict(ppo_utils.PolicyLossRegistry._functions)
    yield ppo_utils.PolicyLossRegistry
    ppo_utils.PolicyLossRegistry._functions = known


def algorithm(name="regular", **own):
    made = config.AlgorithmConfig()
    made.policy_loss_type, made.eps_clip_low, made.eps_clip_high = name, 0.2, 0.28
    made.use_kl_loss = False
    for setting, value in own.items():
        setattr(made.off_policy_correction, setting, value)
    return made


@pytest.mark.parametrize("own", SETTINGS)
def test_the_registered_loss_and_its_gradient_are_those_of_its_own(registry, own):
    worst = Worst()
    register("ours", PolicyLoss(
        correction=from_skyrl(**own), objective=CLIP, aggregation="sum"
    ))

    @given(drawn())
    def agree(batch):
        mask = batch.mask.double()
        tensors = dict(loss_mask=mask, rollout_logprobs=batch.rollout_log_probs)

        def theirs(x):
            return ppo_utils.ppo_policy_loss(
                x, batch.old_log_probs, batch.advantages, algorithm(**own), **tensors
            )[0]

        def ours(x):
            return registry.get("ours")(
                x, batch.old_log_probs, batch.advantages, config=algorithm("ours"), **tensors
            )[0]

        pair = [gradient_of(f, batch.log_probs) for f in (ours, theirs)]
        assert worst.add(*pair) < 1e-6  # weights below e^-20

    agree()
    named = ", ".join(f"{x}" for x in own.values() if isinstance(x, str)) or (
        "token mask" if "token_mask_is_threshold_low" in own else "off" if not own else "outliers"
    )
    record(
        "SkyRL", f"ppo_policy_loss, {named}", distribution="skyrl", loss=worst.loss,
        gradient=worst.gradient,
    )


def worker_of(name, rows):
    """What its worker's methods read of it, but for the model."""
    me = MagicMock()
    me.cfg.algorithm = algorithm(name)
    me.cfg.micro_train_batch_size_per_gpu, me.cfg.max_tokens_per_microbatch = rows, 0
    me.policy_loss_fn = ppo_utils.PolicyLossRegistry.get(name)
    me.mesh_rank.dp_size = 1
    me.strategy.backward = lambda loss, *_: loss.backward()
    me.strategy.all_reduce = lambda values, **_: dict(values)
    me._forward_backward_micro = lambda *a, **k: (
        worker.PolicyWorkerBase._forward_backward_micro(me, *a, **k)
    )
    return me


def step(name, batch, rows):
    """Its worker's ``forward_backward``: micro-batches, backward, and what it logs."""
    log_probs = batch.log_probs.clone().requires_grad_()
    parts = iter(log_probs.split(rows))
    me = worker_of(name, rows)
    entropy = {"entropy": torch.zeros(rows, 40)}
    me.model = MagicMock(side_effect=lambda *_, **__: (next(parts), entropy))
    data = batches_of.TrainingInputBatch({
        "sequences": torch.zeros(len(batch.mask), 40).long(),
        "attention_mask": torch.ones(len(batch.mask), 40).long(),
        "action_log_probs": batch.old_log_probs, "advantages": batch.advantages,
        "loss_mask": batch.mask.long(), "response_mask": batch.mask.long(),
        "rollout_logprobs": batch.rollout_log_probs,
    })
    data.metadata = {"response_length": batch.mask.shape[1]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        output = worker.PolicyWorkerBase.forward_backward(me, data)
    return output.metrics, log_probs.grad


def test_its_worker_takes_steps_and_logs_what_gives_the_metrics_of_the_whole_batch():
    batch = fixed(rows=6)
    register("ours", TIS)
    own, expected = step_of_its_own(batch)
    metrics, gradient = step("ours", batch, rows=2)
    torch.testing.assert_close(gradient, expected)
    assert metrics["policy_loss"] == pytest.approx(own["policy_loss"], rel=1e-5)
    whole = TIS(
        batch.log_probs, rollout_log_probs=batch.rollout_log_probs, mask=batch.mask,
        old_log_probs=batch.old_log_probs, advantages=batch.advantages,
    ).metrics.to_floats()
    logged = from_averages(metrics, prefix="loss_metrics/")
    for name in ("batch/tokens", "batch/sequences"):
        assert logged.pop(name) == pytest.approx(whole.pop(name) / 3)
    assert logged == pytest.approx(whole, rel=1e-5)
    worst = Worst()
    worst.add((metrics["policy_loss"], gradient), (own["policy_loss"], expected))
    record(
        "SkyRL", "PolicyWorkerBase.forward_backward with metrics read back", distribution="skyrl",
        loss=worst.loss, gradient=worst.gradient,
    )


def test_what_it_logs_weighs_mini_batches_alike_whatever_their_micro_batches():
    """The trainer averages what the worker's calls, one for each mini-batch, return."""
    batch = fixed(rows=6)
    register("ours", TIS)
    halves = [batch.rows(slice(0, 3)), batch.rows(slice(3, 6))]

    def logged(rows):
        both = [step("ours", half, rows=n)[0] for half, n in zip(halves, rows, strict=True)]
        mean = {name: (both[0][name] + both[1][name]) / 2 for name in both[0]}
        return from_averages(mean, prefix="loss_metrics/")["mismatch/kl_k3"]

    whole = TIS(
        batch.log_probs, rollout_log_probs=batch.rollout_log_probs, mask=batch.mask,
        old_log_probs=batch.old_log_probs, advantages=batch.advantages,
    ).metrics.to_floats()["mismatch/kl_k3"]
    assert logged((1, 1)) == pytest.approx(whole, rel=1e-5)
    assert logged((3, 1)) != pytest.approx(whole, rel=1e-2)


def test_its_steps_leave_a_dump_to_report(tmp_path):
    batch = fixed(rows=4)
    dumps = DumpWriter(tmp_path / "dump")
    register("ours", TIS, dumps)
    step("ours", batch, rows=2)
    reported(dumps.directory, batch)


def test_three_steps_of_its_worker_with_a_model_apply_the_weights(tmp_path, monkeypatch):
    """Its wrapper of the model, ``forward_backward``, ``optim_step`` and its strategy's step.

    The engine is the model in bfloat16, whose log-probs of drawn tokens are the rollout's.
    """
    transformers = pytest.importorskip("transformers")
    wrapper, strategy, utils = real(
        "skyrl", "skyrl.backends.skyrl_train.workers.model_wrapper",
        "skyrl.backends.skyrl_train.distributed.fsdp_strategy",
        "skyrl.backends.skyrl_train.utils.torch_utils",
    )
    monkeypatch.setattr(utils, "FLASH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", False)  # a stub
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3,
    )).save_pretrained(tmp_path / "model")
    dumps = DumpWriter(tmp_path / "dump")
    loss_fn = PolicyLoss(correction=token_tis(cap=1.0), objective=CLIP, aggregation="sum")
    register("ours", loss_fn, dumps)
    me = worker_of("ours", 2)
    me.cfg.algorithm.temperature = 1.0  # as the trainer takes it from the generator
    me.model = wrapper.HFModelWrapper(str(tmp_path / "model"), bf16=False)
    engine = wrapper.HFModelWrapper(str(tmp_path / "model"), bf16=True)
    me.optimizer = torch.optim.AdamW(me.model.parameters(), lr=1e-2)
    me.scheduler = torch.optim.lr_scheduler.ConstantLR(me.optimizer, factor=1.0)
    mine = SimpleNamespace(max_norm=1.0)
    me.strategy.optimizer_step = lambda *a, **k: (
        strategy.FSDPStrategy.optimizer_step(mine, *a, **k)
    )
    apart = 0.0
    for number in range(3):
        engine.load_state_dict(me.model.state_dict())
        data, weighted, plain = drawn_rollout(me.model, engine, number)
        before = torch.nn.utils.parameters_to_vector(me.model.parameters()).clone()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "current_device", lambda: "cpu")
            metrics = worker.PolicyWorkerBase.forward_backward(me, data).metrics
        worker.PolicyWorkerBase.optim_step(me)
        after = torch.nn.utils.parameters_to_vector(me.model.parameters())
        assert not torch.equal(before, after)
        # one update for each rollout, so that the objective's own ratio is 1
        assert metrics["policy_loss"] == pytest.approx(weighted, rel=1e-4)
        assert metrics["policy_loss"] != pytest.approx(plain, rel=1e-2)
        apart = max(apart, abs(metrics["policy_loss"] - weighted))
        assert 0 < from_averages(metrics, prefix="loss_metrics/")["is/bounded"] < 1
    dump = read_dump(dumps.directory)
    assert len(dump.mask) == 18
    d = (dump.old_log_probs - dump.rollout_log_probs)[dump.mask]
    assert 1e-3 < d.abs().mean() < 0.2
    report = subprocess.run(
        [sys.executable, "-m", "iscorrect", "report", str(dumps.directory), "--out",
         str(tmp_path / "report")], capture_output=True, text=True, check=False,
    )
    assert report.returncode in (0, 1), report.stderr
    record(
        "SkyRL", "three steps of PolicyWorkerBase with its model wrapper", distribution="skyrl",
        loss=apart,
    )


def drawn_rollout(model, engine, seed, rows=6, length=12, response=8):
    """A batch as SkyRL's trainer makes it, and the loss with weights and without."""
    draw = torch.Generator().manual_seed(seed)
    sequences = torch.randint(2, 32, (rows, length), generator=draw)
    attention = torch.ones_like(sequences)
    with torch.no_grad():
        old = model(sequences, response, attention)
        rollout = engine(sequences, response, attention).float()
    mask = torch.arange(response) < torch.randint(2, response + 1, (rows, 1), generator=draw)
    advantages = torch.randn(rows, 1, generator=draw).expand(rows, response) / mask.sum()
    data = batches_of.TrainingInputBatch({
        "sequences": sequences, "attention_mask": attention, "action_log_probs": old,
        "advantages": advantages.contiguous(), "loss_mask": mask.long(),
        "response_mask": mask.long(), "rollout_logprobs": rollout,
    })
    data.metadata = {"response_length": response}
    weights = (old - rollout).double().exp().clamp(max=1.0)
    plain = (-advantages * mask).sum().item()
    return data, (-weights * advantages * mask).sum().item(), plain


def step_of_its_own(batch):
    """The same step with its own truncated weights."""
    with pytest.MonkeyPatch.context() as patch:
        own = dict(tis_ratio_type="token", token_tis_ratio_clip_high=1.2)
        plain = algorithm
        patch.setitem(globals(), "algorithm", lambda name: plain(name, **own))
        return step("regular", batch, rows=2)


def test_a_step_without_a_counted_token_changes_nothing():
    batch = fixed(rows=2)._replace(mask=torch.zeros(2, 13, dtype=torch.bool))
    register("ours", TIS)
    metrics, gradient = step("ours", batch, rows=1)
    assert metrics["policy_loss"] == 0
    assert not gradient.any()


def test_a_correction_of_its_own_that_is_left_on_is_an_error(registry):
    register("ours", TIS)
    zeros = [torch.zeros(1, 1)] * 3
    for setting in (dict(tis_ratio_type="token"), dict(sequence_mask_metric="product")):
        (name,) = setting
        with pytest.raises(InputError, match=f"set trainer.algorithm.off_policy_correction.{name}"):
            registry.get("ours")(*zeros, algorithm("ours", **setting))
    with pytest.raises(InputError, match=r"sampling_params\.logprobs=0"):
        registry.get("ours")(*zeros, algorithm("ours"))
    with pytest.raises(InputError, match="SkyRL divides the advantages"):
        register("other", PolicyLoss(aggregation="token-mean"))


@pytest.mark.parametrize(("parts", "fix"), [
    (dict(correction=pareto_is()), "use a fixed bound"),
    (dict(correction=Correction(normalize=True)), "normalize=False"),
    (dict(objective=lambda log_probs, *_: -log_probs), "scope = 'token'"),
    (dict(reference_kl=ReferenceKL(coefficient=0.1)), "trainer.algorithm.use_kl_loss=true"),
])
def test_what_its_micro_batches_cannot_give_is_refused_at_once(parts, fix):
    with pytest.raises(InputError, match=fix):
        register("ours", PolicyLoss(aggregation="sum", **parts))


def test_a_real_ray_worker_has_the_registered_loss(registry):
    ray = pytest.importorskip("ray")
    import os
    import sys
    from pathlib import Path

    paths = [str(Path(__file__).parent), *sys.path]
    batch = fixed(rows=3)
    register("ours", TIS)

    def loss_of(log_probs, old, advantages, mask, rollout):
        import stubs

        stubs.install()
        import skyrl.backends.skyrl_train.utils.ppo_utils as there
        from skyrl.train.config.config import AlgorithmConfig

        loss, _ = there.PolicyLossRegistry.get("ours")(
            log_probs, old, advantages, config=AlgorithmConfig(), loss_mask=mask,
            rollout_logprobs=rollout,
        )
        return loss.item()

    arguments = (
        batch.log_probs, batch.old_log_probs, batch.advantages, batch.mask.float(),
        batch.rollout_log_probs,
    )
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}},
    )
    try:
        ppo_utils.sync_registries()
        there = ray.get(ray.remote(loss_of).remote(*arguments))
    finally:
        ray.shutdown()
    whole = TIS(
        batch.log_probs, old_log_probs=batch.old_log_probs, advantages=batch.advantages,
        mask=batch.mask, rollout_log_probs=batch.rollout_log_probs,
    ).loss.item()
    assert there == whole
    record("SkyRL", "registry in a Ray worker", distribution="skyrl", loss=abs(there - whole))
