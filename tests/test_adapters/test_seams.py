"""Adapters against fakes of the seams they plug into.

Each fake has the signature, shapes and dtypes that the framework's source has; none of these
frameworks was run.
"""

import argparse
import enum
import sys
import types
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from iscorrect import (
    CISPO,
    InputError,
    PolicyLoss,
    PPOClip,
    ReferenceKL,
    pareto_is,
    sequence_mis,
    token_tis,
)
from iscorrect.adapters import areal, nemo_rl, openrlhf, prime_rl, skyrl, slime, tinker

LENGTHS = [3, 5, 1, 4]
TIS = token_tis(cap=1.2)


def fake(monkeypatch, name, **contents):
    """A module that can be imported."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
    module = sys.modules[name]
    for key, value in contents.items():
        setattr(module, key, value)
    return module


def samples(seed=0, dtype=torch.float32):
    """Per sample: current, old and rollout log-probs, advantages and a mask with a hole."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for n in LENGTHS:
        rollout = -torch.rand(n, generator=draw) * 3 - 0.1
        old = (rollout + 0.5 * torch.randn(n, generator=draw)).clamp(max=-1e-3)
        current = (old + 0.2 * torch.randn(n, generator=draw)).clamp(max=-1e-3)
        advantages = torch.randn((), generator=draw).expand(n).clone()
        mask = torch.ones(n, dtype=torch.bool)
        mask[1:2] = n <= 3
        rollout[~mask] = torch.nan  # an observation: nobody sampled it
        tensors = [x.to(dtype) for x in (current, old, rollout, advantages)]
        made.append(SimpleNamespace(
            current=tensors[0], old=tensors[1], rollout=tensors[2], advantages=tensors[3],
            mask=mask,
        ))
    return made


def weight(sample, log_probs=None, cap=1.2):
    """min(ρ, cap) where the mask counts, by the formula."""
    old = sample.old if log_probs is None else log_probs
    ratio = torch.exp(old.detach() - sample.rollout).clamp(max=cap)
    return torch.where(sample.mask, ratio, 0)


def padded(samples, name, value=0.0):
    rows = [getattr(s, name) for s in samples]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def tokens(samples):
    return sum(int(s.mask.sum()) for s in samples)


# slime and miles


def slime_call(function, batch, pg_loss, **changes):
    arguments = dict(
        pg_loss=pg_loss, train_log_probs=[s.old for s in batch],
        rollout_log_probs=[s.rollout for s in batch],
        loss_masks=[s.mask.int() for s in batch], total_lengths=[n + 7 for n in LENGTHS],
        response_lengths=LENGTHS, cu_seqlens=None,
    )
    args = argparse.Namespace(use_tis=True, rollout_top_p=1.0, rollout_top_k=-1)
    return function(args, **(arguments | changes))


def test_slime_gets_its_flat_loss_times_the_weights_and_its_own_masks():
    batch = samples()
    pg_loss = torch.randn(sum(LENGTHS), requires_grad=True)
    loss, masks, metrics = slime_call(slime.tis_function(TIS), batch, pg_loss)
    expected = torch.cat([weight(s) for s in batch])
    torch.testing.assert_close(loss, pg_loss * expected)
    assert [m.tolist() for m in masks] == [s.mask.int().tolist() for s in batch]
    assert all(x.shape == pg_loss.shape for x in metrics.values())
    torch.testing.assert_close(metrics["is/weight"], expected)
    loss.sum().backward()
    torch.testing.assert_close(pg_loss.grad, expected)


def test_slime_gathers_sequences_that_context_parallelism_cuts(monkeypatch):
    batch, whole = samples(), {}

    def shard(x):
        part = x[: (len(x) + 1) // 2].clone()
        whole[part.data_ptr()] = x
        return part

    fake(
        monkeypatch, "miles.backends.megatron_utils.cp_utils",
        all_gather_with_cp=lambda x, total_length, response_length: whole[x.data_ptr()],
        slice_log_prob_with_cp=lambda x, total_length, response_length: x[: (len(x) + 1) // 2],
    )
    pg_loss = torch.ones(sum((n + 1) // 2 for n in LENGTHS))
    function = slime.tis_function(sequence_mis(high=3.0), package="miles")
    loss, _, _ = slime_call(
        function, batch, pg_loss, train_log_probs=[shard(s.old) for s in batch],
        rollout_log_probs=[shard(s.rollout) for s in batch],
    )
    ratios = [torch.exp((s.old - s.rollout)[s.mask].sum()) for s in batch]
    expected = [
        torch.where(s.mask, r * (r <= 3.0), 0)[: (len(s.mask) + 1) // 2]
        for s, r in zip(batch, ratios, strict=True)
    ]
    torch.testing.assert_close(loss, torch.cat(expected))


def test_slime_is_warned_when_its_engine_samples_from_a_cut_distribution():
    args = argparse.Namespace(use_tis=True, rollout_top_p=0.9, rollout_top_k=-1)
    batch = samples()
    with pytest.warns(UserWarning, match=r"top_p=0\.9"):
        slime.tis_function(TIS)(
            args, pg_loss=torch.ones(sum(LENGTHS)), train_log_probs=[s.old for s in batch],
            rollout_log_probs=[s.rollout for s in batch],
            loss_masks=[s.mask.float() for s in batch], total_lengths=LENGTHS,
            response_lengths=LENGTHS,
        )


# prime-rl


@dataclass
class LossInputs:
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


@pytest.mark.parametrize("weighted", [False, True])
def test_prime_rl_gets_the_sum_over_a_sample(monkeypatch, weighted):
    fake(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    for s in samples():
        current = s.current.clone().requires_grad_()
        weights = torch.full_like(current, 0.5) if weighted else None
        out = prime_rl.loss(
            LossInputs(current, s.rollout, None, s.advantages, s.mask, weights),
            correction="token-tis:cap=1.2",
        )
        assert out.loss.shape == ()
        assert all(x.shape == () for x in out.metrics.values())
        out.loss.backward()
        scale = 0.5 if weighted else 1.0
        expected = -weight(s, s.current) * s.advantages * scale
        torch.testing.assert_close(current.grad, expected)


def test_prime_rl_refuses_what_needs_more_than_a_sample(monkeypatch):
    fake(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    with pytest.raises(InputError, match="one sample at a time"):
        prime_rl.loss(None, correction="pareto-is:level=token")


# NeMo-RL


class LossType(enum.Enum):
    TOKEN_LEVEL = "token"
    SEQUENCE_LEVEL = "sequence"


class LossInputType(enum.Enum):
    LOGPROB = "logprob"


def nemo_data(batch):
    def shifted(name):  # the first position predicts nothing
        return torch.nn.functional.pad(padded(batch, name), (1, 0), value=9.0)

    return dict(
        advantages=shifted("advantages"), prev_logprobs=shifted("old"),
        generation_logprobs=shifted("rollout"), reference_policy_logprobs=shifted("old"),
        token_mask=torch.nn.functional.pad(padded(batch, "mask", False).float(), (1, 0)),
        sample_mask=torch.tensor([1.0, 1.0, 0.0, 1.0])[: len(batch)],
    )


@pytest.mark.parametrize("penalty", [None, ReferenceKL(coefficient=0.1)])
@pytest.mark.parametrize("how", ["token-mean", "seq-mean-token-mean"])
def test_nemo_rls_micro_batches_add_up_to_the_batch(monkeypatch, how, penalty):
    fake(
        monkeypatch, "nemo_rl.algorithms.loss.interfaces", LossType=LossType,
        LossInputType=LossInputType,
    )
    batch = samples()
    loss_fn = nemo_rl.CorrectedLoss(PolicyLoss(
        correction=TIS, objective=PPOClip(), aggregation=how, reference_kl=penalty
    ))
    assert loss_fn.loss_type == (
        LossType.TOKEN_LEVEL if how == "token-mean" else LossType.SEQUENCE_LEVEL
    )
    data = nemo_data(batch)
    mask = data["token_mask"] * data["sample_mask"][:, None]
    counts = (data["sample_mask"].sum(), mask.sum())
    current = padded(batch, "current")
    whole, metrics = loss_fn(data, *counts, next_token_logprobs=current)
    total, logged = 0.0, dict.fromkeys(metrics, 0.0)
    for i in range(len(batch)):
        part = {name: x[i : i + 1] for name, x in data.items()}
        loss, seen = loss_fn(part, *counts, next_token_logprobs=current[i : i + 1])
        total += loss
        logged = {name: value + seen[name] for name, value in logged.items()}
    torch.testing.assert_close(total, whole)
    assert logged == pytest.approx(metrics, abs=1e-6)

    used = [s for s, m in zip(batch, data["sample_mask"], strict=True) if m]
    expected = 0.0
    for s in used:
        ratio = torch.exp(s.current - s.old)
        surrogate = torch.minimum(ratio * s.advantages, ratio.clamp(0.8, 1.2) * s.advantages)
        per_token = -weight(s) * surrogate
        if penalty is not None:
            d = s.old - s.current
            per_token = per_token + 0.1 * torch.where(s.mask, torch.exp(d) - d - 1, 0)
        by_token = how == "token-mean"
        expected += per_token.sum() / (tokens(used) if by_token else s.mask.sum() * len(used))
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-6)


def test_nemo_rl_refuses_losses_whose_micro_batches_do_not_add_up(monkeypatch):
    fake(
        monkeypatch, "nemo_rl.algorithms.loss.interfaces", LossType=LossType,
        LossInputType=LossInputType,
    )
    for loss in (PolicyLoss(aggregation="sum"), PolicyLoss(correction=pareto_is())):
        with pytest.raises(InputError, match="micro-batches add up"):
            nemo_rl.CorrectedLoss(loss)


# SkyRL


@pytest.fixture
def skyrl_registry(monkeypatch):
    registry = {}

    def register_policy_loss(name):
        return lambda function: registry.setdefault(name, function)

    fake(
        monkeypatch, "skyrl.backends.skyrl_train.utils.ppo_utils",
        register_policy_loss=register_policy_loss,
    )
    return registry


def skyrl_config(**own):
    return SimpleNamespace(off_policy_correction=SimpleNamespace(tis_ratio_type=None, **own))


def test_skyrl_gets_the_masked_sum(skyrl_registry):
    skyrl.register("mine", PolicyLoss(correction=TIS, objective=CISPO(), aggregation="sum"))
    batch = samples()
    current = padded(batch, "current").requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, metrics = skyrl_registry["mine"](
            current, padded(batch, "old"), padded(batch, "advantages"), skyrl_config(),
            loss_mask=padded(batch, "mask", False).float(),
            rollout_logprobs=padded(batch, "rollout"),
        )
    assert loss.dtype == torch.float32
    loss.backward()
    expected = [
        -weight(s) * torch.exp(s.current - s.old).clamp(max=5.0) * s.advantages for s in batch
    ]
    for row, s, x in zip(current.grad, batch, expected, strict=True):
        torch.testing.assert_close(row[: len(s.mask)], x)
    assert all(isinstance(value, float) for value in metrics.values())


def test_a_correction_of_skyrl_that_is_left_on_is_an_error(skyrl_registry):
    skyrl.register("mine", PolicyLoss(aggregation="sum"))
    config = skyrl_config(sequence_mask_metric="product")
    with pytest.raises(InputError, match=r"set trainer\.algorithm\.off_policy_correction\.seq"):
        skyrl_registry["mine"](*[torch.zeros(1, 1)] * 3, config)


def test_skyrl_without_rollout_log_probs_is_told_how_to_get_them(skyrl_registry):
    skyrl.register("mine", PolicyLoss(aggregation="sum"))
    with pytest.raises(InputError, match=r"sampling_params\.logprobs=0"):
        skyrl_registry["mine"](*[torch.zeros(1, 1)] * 3, skyrl_config())


def test_skyrl_divides_elsewhere():
    fake_free = PolicyLoss(aggregation="token-mean")
    with pytest.MonkeyPatch.context() as patch:
        fake(
            patch, "skyrl.backends.skyrl_train.utils.ppo_utils",
            register_policy_loss=lambda name: lambda function: function,
        )
        with pytest.raises(InputError, match="SkyRL divides the advantages"):
            skyrl.register("mine", fake_free)


# OpenRLHF


def test_openrlhf_gets_its_four_values_and_the_global_denominator():
    batch = samples()
    mask = padded(batch, "mask", False).float()
    module = openrlhf.CorrectedPolicyLoss(PolicyLoss(correction=TIS, objective=PPOClip()))
    loss, clip_ratio, ppo_kl, vllm_kl = module(
        padded(batch, "current"), padded(batch, "old"), padded(batch, "advantages"), mask,
        rollout_log_probs=padded(batch, "rollout"), dp_size=2, batch_num_tokens=40,
        global_batch_size=8,
    )
    n, total, clipped, updated, apart = tokens(batch), 0.0, 0.0, 0.0, 0.0
    for s in batch:
        ratio = torch.exp(s.current - s.old)
        plain, held = ratio * s.advantages, ratio.clamp(0.8, 1.2) * s.advantages
        total -= (weight(s) * torch.minimum(plain, held))[s.mask].sum()
        clipped += (held < plain)[s.mask].sum() / n
        updated += (s.old - s.current)[s.mask].sum() / n
        apart += (s.rollout - s.old)[s.mask].sum() / n
    torch.testing.assert_close(loss, total / 40 * 2)
    for got, expected in ((clip_ratio, clipped), (ppo_kl, updated), (vllm_kl, apart)):
        torch.testing.assert_close(got.float(), expected.float())


def test_openrlhf_without_rollout_log_probs_is_told_how_to_get_them():
    module = openrlhf.CorrectedPolicyLoss(PolicyLoss())
    with pytest.raises(InputError, match="--enable_vllm_is_correction"):
        module(*[torch.zeros(1, 1)] * 3)
    with pytest.raises(InputError, match="aggregation='token-mean'"):
        openrlhf.CorrectedPolicyLoss(PolicyLoss(aggregation="sum"))


# AReaL


@pytest.mark.parametrize("packed", [True, False])
def test_areal_gets_the_mean_over_the_tokens_of_a_micro_batch(packed):
    batch = samples()
    names = dict(logprobs="rollout", prox_logp="old", advantages="advantages", loss_mask="mask")
    if packed:
        data = {k: torch.cat([getattr(s, name) for s in batch]) for k, name in names.items()}
        data["cu_seqlens"] = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        current = torch.cat([s.current for s in batch])
    else:
        data = {k: padded(batch, name) for k, name in names.items()}
        current = padded(batch, "current")
    current = current.clone().requires_grad_()
    loss_fn = areal.loss_function(PolicyLoss(correction=sequence_mis(high=3.0), objective=CISPO()))
    loss_fn(current, torch.zeros_like(current), data).backward()
    rows = current.grad.split(LENGTHS) if packed else current.grad
    for row, s in zip(rows, batch, strict=True):
        ratio = torch.exp((s.old - s.rollout)[s.mask].sum())
        scale = ratio * (ratio <= 3.0) / tokens(batch)
        expected = -scale * torch.exp(s.current - s.old).clamp(max=5.0) * s.advantages * s.mask
        torch.testing.assert_close(row[: len(s.mask)], expected)


def test_areal_weights_micro_batches_by_their_tokens():
    with pytest.raises(InputError, match="AReaL weights micro-batches"):
        areal.loss_function(PolicyLoss(aggregation="seq-mean-token-mean"))


# tinker


@dataclass
class TensorData:
    values: torch.Tensor

    def to_torch(self):
        return self.values


@dataclass
class Datum:
    loss_fn_inputs: dict[str, TensorData] = field(default_factory=dict)


def test_tinker_gets_a_loss_of_its_log_probs():
    batch = samples()
    data = [
        Datum({
            "logprobs": TensorData(s.rollout), "advantages": TensorData(s.advantages),
            "mask": TensorData(s.mask.float()),
        })
        for s in batch
    ]
    logprobs = [s.current.clone().requires_grad_() for s in batch]
    loss, metrics = tinker.custom_loss(PolicyLoss(correction=TIS, aggregation="sum"))(
        data, logprobs
    )
    loss.backward()
    for x, s in zip(logprobs, batch, strict=True):
        torch.testing.assert_close(x.grad, -weight(s, s.current) * s.advantages)
    assert metrics["batch/tokens"] == tokens(batch)


def test_weights_on_the_advantages_give_the_gradient_of_the_weighted_loss():
    batch = samples()
    ready, metrics = tinker.corrected_advantages(
        TIS, old_log_probs=[s.old for s in batch], rollout_log_probs=[s.rollout for s in batch],
        advantages=[s.advantages for s in batch], masks=[s.mask for s in batch],
    )
    for x, s in zip(ready, batch, strict=True):
        torch.testing.assert_close(x, weight(s) * s.advantages)
    assert metrics["batch/tokens"] == tokens(batch)
