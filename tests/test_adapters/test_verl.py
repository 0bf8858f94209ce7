"""verl itself, number for number."""

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batches import batches, make_batch
from drawn import Worst
from hypothesis import assume, example, given, reject, strategies as st
from outcome import largest, record

import iscorrect
from iscorrect import AgeAbove, Correction, Ignore, InputError, PPOClip, token_tis
from iscorrect.adapters.verl import batch_hook, from_verl, install, register_loss
from iscorrect.dumps import DumpWriter, read_dump

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")
    from tensordict import TensorDict
    from verl import DataProto
    from verl.trainer.config.algorithm import RolloutCorrectionConfig
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig

register_loss("iscorrect_ppo", PPOClip(low=0.8, high=1.28, dual=3.0))

bound = st.floats(math.log(1e-3), math.log(1e3)).map(math.exp)
bands = st.tuples(bound, bound).map(lambda ab: f"{min(ab)}_{max(ab)}")


@st.composite
def settings(draw):
    """A valid rollout_correction, with up to four of the eleven rules."""
    options = draw(st.lists(st.sampled_from(sorted(helper.SUPPORTED_ROLLOUT_RS_OPTIONS)),
                            max_size=4, unique=True))
    thresholds = [
        draw(bands if option.endswith("k1") else bound.map(str)) for option in options
    ]
    if options and draw(st.booleans()):
        thresholds = [str(draw(st.floats(1.0, 50.0)))]  # one for all, where x stands for "1/x_x"
    return dict(
        rollout_is=draw(st.sampled_from([None, "token", "sequence"])),
        rollout_is_threshold=draw(bound | bound.map(str) | bands),
        rollout_is_batch_normalize=draw(st.booleans()),
        rollout_rs=",".join(options) or None,
        rollout_rs_threshold=",".join(thresholds) or None,
    )


def finite(batch):
    """verl spreads NaN of the padding into the weights: it gets zeros there."""
    return [torch.where(batch.mask, x, 0) for x in (batch.old_log_probs, batch.rollout_log_probs)]


def verl(batch, config):
    old, rollout = finite(batch)
    weights, mask, metrics = helper.compute_rollout_correction_and_rejection_mask(
        old, rollout, batch.mask.double(), **config
    )
    weights = batch.mask.double() if weights is None else weights.batch["rollout_is_weights"]
    return weights, mask.bool(), metrics


def ours(batch, correction):
    return correction(
        old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs,
        mask=batch.mask,
    )


@given(batches(), settings())
def test_weights_and_masks_are_those_of_verl(batch, config):
    assume(batch.mask.any())
    try:
        weights, mask, _ = verl(batch, config)
    except ZeroDivisionError:  # verl's effective sample size of weights that are all 0
        reject()
    correction = from_verl(**config)
    torch.testing.assert_close(
        ours(batch, correction).weights, weights * mask, rtol=1e-6, atol=1e-8
    )
    rules = Correction(bound=Ignore(), reject=correction.reject)
    assert torch.equal(ours(batch, rules).keep, mask)


@pytest.mark.parametrize("option", sorted(helper.SUPPORTED_ROLLOUT_RS_OPTIONS))
def test_each_rule_alone_rejects_what_verl_rejects(option):
    rejected, apart = 0, 0.0
    for seed in range(40):
        batch = make_batch(seed, rows=4, width=6, scale=0.4)
        if not batch.mask.any():
            continue
        config = dict(
            rollout_rs=option, rollout_rs_threshold="0.8_1.3" if option.endswith("k1") else 0.1
        )
        _, mask, _ = verl(batch, config)
        assert torch.equal(ours(batch, from_verl(None, **config)).keep, mask)
        config |= dict(rollout_is="token", rollout_is_threshold=2.0)
        weights, mask, _ = verl(batch, config)
        apart = max(apart, largest(ours(batch, from_verl(**config)).weights, weights * mask))
        rejected += int((batch.mask & ~mask).sum())
    assert rejected > 0
    assert apart < 1e-12
    record("verl", f"weights and masks of rollout_correction, {option}", distribution="verl",
           gradient=apart)


def test_k1_bounds_of_verl_act_on_the_inverse_ratio_and_strict_ones_on_the_ratio():
    ratio = torch.tensor([[0.3, 0.6, 1.0, 1.8, 4.0]], dtype=torch.float64)
    batch = SimpleNamespace(
        old_log_probs=ratio.log(), rollout_log_probs=torch.zeros_like(ratio),
        mask=torch.ones_like(ratio, dtype=torch.bool),
    )
    config = dict(rollout_rs="token_k1", rollout_rs_threshold="0.5_5.0")
    _, mask, _ = verl(batch, config)
    assert mask.tolist() == [[True, True, True, True, False]]
    strict = ours(batch, from_verl(None, strict=True, **config)).keep
    assert strict.tolist() == [[False, True, True, True, True]]


@given(batches(), st.sampled_from(["token", "sequence"]), bound)
@example(make_batch(0, scale=1.0), "token", 1.1)
def test_no_strict_weight_exceeds_its_threshold(batch, level, cap):
    correction = from_verl(level, cap, True, strict=True)
    assert ours(batch, correction).weights.max() <= cap * (1 + 1e-12)


def test_weights_of_verl_exceed_their_threshold_after_normalisation():
    ratio = torch.tensor([[0.01, 0.01, 0.1, 9.0]], dtype=torch.float64)
    batch = SimpleNamespace(
        old_log_probs=ratio.log(), rollout_log_probs=torch.zeros_like(ratio),
        mask=torch.ones_like(ratio, dtype=torch.bool),
    )
    assert ours(batch, from_verl("token", 2.0, True)).weights.max() > 2.0


def data_proto(batch):
    old, rollout = finite(batch)
    return DataProto.from_dict(
        tensors=dict(
            old_log_probs=old, rollout_log_probs=rollout, response_mask=batch.mask.double()
        ),
        meta_info=dict(global_steps=3),
    )


OFF = dict(rollout_is=None, rollout_rs=None)


@given(batches(), settings())
def test_the_hook_changes_a_batch_as_verl_does_and_logs_what_verl_logs(batch, config):
    assume(batch.mask.any())
    try:
        theirs, their_metrics = helper.compute_rollout_correction_and_add_to_batch(
            data_proto(batch), config
        )
    except ZeroDivisionError:
        reject()
    assume(theirs.batch["response_mask"].any())
    changed, metrics = batch_hook(from_verl(**config))(data_proto(batch), OFF)
    mask = theirs.batch["response_mask"]
    assert torch.equal(changed.batch["response_mask"], mask)
    weights = theirs.batch.get("rollout_is_weights", torch.ones_like(mask))
    torch.testing.assert_close(
        changed.batch["rollout_is_weights"] * mask, weights * mask, rtol=1e-6, atol=1e-8
    )
    assert set(their_metrics) <= set(metrics)
    for name, value in their_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True), name


def test_a_batch_that_is_rejected_entirely_keeps_its_mask_and_gets_weights_of_0():
    batch = make_batch(1, rows=4, scale=1.0)
    correction = from_verl("token", 2.0, rollout_rs="token_k2", rollout_rs_threshold=1e-9)
    changed, _ = batch_hook(correction)(data_proto(batch), OFF)
    assert torch.equal(changed.batch["response_mask"].bool(), batch.mask)
    assert not changed.batch["rollout_is_weights"].any()


def test_a_dump_of_the_batch_reads_back(tmp_path):
    batch = make_batch(1, rows=4)
    hook = batch_hook(token_tis(), DumpWriter(tmp_path))
    hook(data_proto(batch), OFF)
    dump = read_dump(tmp_path)
    assert dump.step.tolist() == [3] * 4
    assert dump.num_tokens == int(batch.mask.sum())
    for _ in range(2):
        unnumbered = data_proto(batch)
        unnumbered.meta_info = {}
        hook(unnumbered, OFF)
    assert sorted(set(read_dump(tmp_path).step.tolist())) == [1, 2, 3]


@pytest.mark.parametrize("setting", ["rollout_is", "rollout_rs"])
def test_a_correction_of_verl_that_is_left_on_is_an_error(setting):
    config = OFF | {setting: "token"}
    with pytest.raises(InputError, match=f"set algorithm.rollout_correction.{setting}=null"):
        batch_hook(token_tis())(data_proto(make_batch(1)), config)


@pytest.mark.parametrize(("rows", "width"), [(3, 5), (0, 5), (2, 0)])
def test_a_batch_without_a_counted_token_has_weights_of_zero(rows, width):
    ones = -torch.ones(rows, width)
    tensors = dict(rollout_log_probs=ones, old_log_probs=ones, response_mask=0 * ones)
    batch = DataProto(batch=TensorDict(tensors, batch_size=rows))
    for correction in (token_tis(), from_verl("token", 2.0, True, "seq_max_k2", 0.1)):
        corrected, metrics = batch_hook(correction)(batch, {})
        assert not corrected.batch["rollout_is_weights"].any()
        assert metrics["batch/tokens"] == 0


MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"]


def test_a_registered_ppo_objective_gives_the_loss_and_gradient_of_verls():
    worst = Worst()

    @given(batches(), st.sampled_from(MODES), st.booleans())
    def agree(batch, mode, weighted):
        assume(batch.mask.any(-1).all())
        vanilla, ours = registered_losses(batch, mode, weighted)
        torch.testing.assert_close(ours, vanilla, rtol=1e-5, atol=1e-6)
        worst.add(ours, vanilla)

    agree()
    record(
        "verl", "registered policy loss", distribution="verl", loss=worst.loss,
        gradient=worst.gradient,
    )


def registered_losses(batch, mode, weighted):
    """Loss and gradient of verl's own loss and of the registered one."""
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, use_dynamic_bsz=False,
        clip_ratio_low=0.2, clip_ratio_high=0.28,
    )
    batch = batch.to(torch.float32)
    old, _ = finite(batch)
    results = []
    for name in ("vanilla", "iscorrect_ppo"):
        log_prob = torch.where(batch.mask, batch.log_probs, 0).requires_grad_()
        loss, metrics = core_algos.get_policy_loss_fn(name)(
            old_log_prob=old, log_prob=log_prob, response_mask=batch.mask, loss_agg_mode=mode,
            advantages=torch.where(batch.mask, batch.advantages, 0), config=config,
            rollout_is_weights=2 * batch.mask.float() if weighted else None,
        )
        loss.backward()
        assert all(isinstance(value, float) for value in metrics.values())
        results.append((loss.detach(), log_prob.grad))
    return results


@pytest.fixture
def installed(monkeypatch):
    def put(correction, dumps=None):
        for name in ("apply_bypass_mode", "compute_rollout_correction_and_add_to_batch"):
            monkeypatch.setattr(helper, name, getattr(helper, name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of modules that it imports
            install(correction, dumps)

    return put


def test_bypass_which_asks_for_no_weights_stops_the_trainer(installed):
    installed(token_tis())
    with pytest.raises(InputError, match="bypass_mode=false"):
        helper.apply_bypass_mode(batch=None, rollout_corr_config={}, policy_loss_config=None)


@pytest.mark.parametrize("versions", [[0, 5, 7], [None, None, None]])
def test_the_fully_asynchronous_trainer_tells_the_ages(installed, tmp_path, versions):
    """Its own step from a scored batch to advantages, at version 7 of the weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        separation = pytest.importorskip("verl.experimental.separation.ray_trainer")
        from verl.trainer.config import AlgoConfig
    known = None not in versions
    age = 7 - torch.tensor(versions if known else [7, 7, 7])[:, None]
    installed(Correction(reject=(AgeAbove(limit=4),) if known else ()), DumpWriter(tmp_path))
    x = make_batch(2, rows=3, width=9)
    batch = DataProto(batch=TensorDict(dict(
        old_log_probs=x.old_log_probs.float(), rollout_log_probs=x.rollout_log_probs.float(),
        response_mask=x.mask.long(),
    ), batch_size=3))
    batch.non_tensor_batch.update(
        uid=np.array(["a", "a", "a"], dtype=object),
        min_global_steps=np.array(versions, dtype=object),
    )
    me = object.__new__(separation.SeparateRayPPOTrainer)
    me.metrics, me.timing_raw, me.reward_extra_infos_dict = {}, {}, {}
    me.reward_tensor, me.global_steps, me.current_param_version = torch.ones(3, 9), 20, 7
    config = AlgoConfig(adv_estimator="grpo", rollout_correction=RolloutCorrectionConfig(
        rollout_is=None, rollout_rs=None
    ))
    me.config = SimpleNamespace(
        algorithm=config, actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(n=3))
    )
    me._fit_compute_advantage(batch)
    found = {name: v for name, v in me.metrics.items() if name.startswith("age/")}
    if not known:
        assert not found
        return
    share = x.mask.sum(-1).double() / x.mask.sum()
    assert found["age/0/tokens"] == pytest.approx(share[2].item())
    assert found["age/2-3/tokens"] == pytest.approx(share[1].item())
    assert found["age/4-7/rejected"] == 1.0
    assert not batch.batch["response_mask"][0].any()
    dump = read_dump(tmp_path)
    assert (dump.version[dump.mask] == (7 - age).expand(x.mask.shape)[x.mask]).all()
    assert set(dump.step.tolist()) == {7}


def test_a_name_of_verls_cannot_be_taken():
    with pytest.raises(InputError, match="iscorrect_vanilla"):
        register_loss("vanilla", PPOClip())


def test_verl_loads_the_example_that_installs_a_correction():
    root = Path(iscorrect.__file__).parents[1]
    program = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from verl.trainer.ppo import core_algos\n"
        "from verl.trainer.ppo.rollout_corr_helper import *\n"
        "print(compute_rollout_correction_and_add_to_batch.__module__)\n"
        "print('iscorrect_ppo' in core_algos.POLICY_LOSS_REGISTRY)\n"
    )
    environment = {
        "VERL_USE_EXTERNAL_MODULES": "verl_corrections",
        "PYTHONPATH": os.pathsep.join([str(root / "examples"), str(root)]),
    }
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env=os.environ | environment,
    )
    assert run.stdout.split() == ["iscorrect.adapters.verl", "True"]
