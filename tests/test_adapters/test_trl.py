"""Real GRPO runs of TRL on a CPU; tiny_trl.py has the model and a slightly wrong engine."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st

import iscorrect
from iscorrect import (
    InputError,
    PolicyLoss,
    PPOClip,
    ReferenceKL,
    Reinforce,
    sequence_is,
    token_tis,
    uncorrected,
)
from iscorrect.adapters.dialects import from_trl
from iscorrect.adapters.trl import CorrectedGRPO
from iscorrect.dumps import DumpWriter, read_dump

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("trl")
    from tiny_trl import (
        Plain,
        SimulatedEngine,
        arguments,
        dataset,
        reward,
        rollout,
        run,
        save_model,
    )
    from trl import GRPOTrainer

# TRL and transformers deprecate much of each other
pytestmark = pytest.mark.filterwarnings("ignore")
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class Corrected(CorrectedGRPO, SimulatedEngine, GRPOTrainer):
    pass


class WithoutVLLM(CorrectedGRPO, GRPOTrainer):
    """Rollouts of a function; its losses are collected as those of the others are."""

    losses = ()

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*self.losses, loss.item()]
        return loss


def rollout_function(prompts, trainer):
    prompt_ids = trainer.processing_class(prompts)["input_ids"]
    model = trainer.accelerator.unwrap_model(trainer.model)
    completion_ids, log_probs = rollout(model, prompt_ids)
    return dict(prompt_ids=prompt_ids, completion_ids=completion_ids, logprobs=log_probs)


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def modes(mode, clip_max, clip_min):
    return dict(
        vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=clip_max,
        vllm_importance_sampling_clip_min=clip_min,
    )


def assert_same_run(a, b):
    torch.testing.assert_close(a.losses, b.losses, rtol=1e-5, atol=1e-6)
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clip_min", [None, 0.8])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_as_plain_trl_does(path, tmp_path, mode, clip_min):
    plain = run(Plain, path, tmp_path, changes=modes(mode, 1.2, clip_min))
    ours = run(Corrected, path, tmp_path, correction=from_trl(mode, 1.2, clip_min))
    assert_same_run(ours, plain)
    log = ours.state.log_history[0]
    assert log["is/bounded"] > 0
    assert "sampling/importance_sampling_ratio/mean" not in log
    assert log["mismatch/log_prob_diff/mean"] == pytest.approx(
        plain.state.log_history[0]["sampling/sampling_logp_difference/mean"]
    )


@pytest.fixture(scope="module")
def scorer(path, tmp_path_factory):
    """A plain trainer, whose weights can be asked for."""
    return Plain(
        model=path, reward_funcs=reward, args=arguments(tmp_path_factory.mktemp("scorer")),
        train_dataset=dataset(),
    )


@given(
    st.sampled_from(MODES), st.none() | st.floats(1.0, 5.0), st.none() | st.floats(0.0, 1.0),
    st.sampled_from([1e-3, 0.3, 5.0, 200.0]), st.integers(0, 100),
)
def test_the_weights_are_those_that_trl_computes(scorer, mode, high, low, noise, shift):
    if mode.endswith("truncate") and high is None and low is None:
        reject()  # torch.clamp refuses to have no bound
    if high is None and noise > 1:
        reject()  # TRL's unbounded ratios overflow
    scorer.noise = noise
    scorer.vllm_importance_sampling_mode = mode
    scorer.vllm_importance_sampling_clip_max = high
    scorer.vllm_importance_sampling_clip_min = low
    prompts = [{"prompt": f"{shift % 9} {shift % 29 + i // 2}"} for i in range(4)]
    batch = scorer._generate_and_score_completions(prompts)
    mask = batch["completion_mask"].bool()
    ours = from_trl(mode, high, low)(
        old_log_probs=batch["old_per_token_logps"],
        rollout_log_probs=batch["sampling_per_token_logps"], mask=mask,
    ).weights
    theirs = batch["importance_sampling_ratio"].expand(mask.shape)
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-5, atol=1e-7)


LOSSES = {
    "grpo": {}, "bnpo": {}, "dr_grpo": {}, "cispo": dict(epsilon_high=5.0), "sapo": {}, "vespo": {},
    "luspo": dict(importance_sampling_level="sequence"),
}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_of_trl_takes_the_weights(path, tmp_path, loss_type):
    changes = dict(loss_type=loss_type, num_iterations=2) | LOSSES[loss_type]
    plain = run(
        Plain, path, tmp_path, changes=changes | modes("token_truncate", 1.2, None)
    )
    ours = run(
        Corrected, path, tmp_path, changes=changes, correction=from_trl("token_truncate", 1.2)
    )
    assert_same_run(ours, plain)


def test_uncorrected_trains_as_trl_with_its_correction_off(path, tmp_path):
    off = dict(vllm_importance_sampling_correction=False)
    plain = run(Plain, path, tmp_path, changes=off)
    assert_same_run(run(Corrected, path, tmp_path, correction=uncorrected()), plain)
    corrected = run(Corrected, path, tmp_path, correction=token_tis())
    assert corrected.losses != pytest.approx(plain.losses, rel=1e-3)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "sapo"])
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_weights_on_the_advantages_do_the_same_without_vllm(path, tmp_path, mode, loss_type):
    changes = dict(loss_type=loss_type, num_iterations=2)
    plain = run(Plain, path, tmp_path, changes=changes | modes(mode, 1.2, None))
    ours = run(
        WithoutVLLM, path, tmp_path, changes=changes, correction=from_trl(mode, 1.2),
        rollout_func=rollout_function,
    )
    assert_same_run(ours, plain)


@pytest.mark.parametrize(
    ("loss_type", "aggregation"), [("dapo", "token-mean"), ("grpo", "seq-mean-token-mean")]
)
def test_a_policy_loss_that_is_trls_trains_as_trl_does(path, tmp_path, loss_type, aggregation):
    changes = dict(
        loss_type=loss_type, num_iterations=2, beta=0.1, use_bias_correction_kl=False
    )
    plain = run(Plain, path, tmp_path, changes=changes | modes("token_truncate", 1.2, None))
    loss = PolicyLoss(
        correction=from_trl("token_truncate", 1.2), objective=PPOClip(low=0.8, high=1.2),
        aggregation=aggregation, reference_kl=ReferenceKL(coefficient=0.1),
    )
    ours = run(Corrected, path, tmp_path, changes=changes, policy_loss=loss)
    assert_same_run(ours, plain)
    assert {"is/ess", "policy/kl_k3", "policy/clipped"} <= set(ours.state.log_history[0])


def test_two_policies_need_no_second_scoring(path, tmp_path):
    """REINFORCE without vLLM's old log-probs is the surrogate's gradient where steps align."""
    changes = dict(vllm_importance_sampling_correction=False)
    loss = PolicyLoss(correction=token_tis(cap=1.2), objective=Reinforce())
    two = run(Corrected, path, tmp_path, changes=changes, policy_loss=loss)
    three = run(Plain, path, tmp_path, changes=modes("token_truncate", 1.2, None))
    for x, y in zip(two.model.parameters(), three.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_missing_log_prob_is_neutral_as_in_trl(path, tmp_path):
    class Forgetful(SimulatedEngine):
        def _generate_single_turn(self, *args, **kwargs):
            ids, log_probs = super()._generate_single_turn(*args, **kwargs)
            return ids, [[float("nan"), *row[1:]] for row in log_probs]

    plain = type("Plain", (Forgetful, GRPOTrainer), {})
    corrected = type("Corrected", (CorrectedGRPO, Forgetful, GRPOTrainer), {})
    ours = run(corrected, path, tmp_path, correction=from_trl("sequence_mask", 1.5))
    assert_same_run(ours, run(plain, path, tmp_path, changes=modes("sequence_mask", 1.5, None)))
    assert ours.state.log_history[0]["is/nonfinite"] > 0


def test_a_dump_of_a_run_reads_back(path, tmp_path):
    run(Corrected, path, tmp_path, correction=token_tis(), dumps=DumpWriter(tmp_path / "dump"))
    dump = read_dump(tmp_path / "dump")
    assert dump.step.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert dump.token_ids.shape == dump.advantages.shape == dump.mask.shape
    report = subprocess.run(
        [sys.executable, "-m", "iscorrect", "report", str(tmp_path / "dump")],
        cwd=tmp_path, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(Path(iscorrect.__file__).parents[1])},
    )
    assert "kl" in report.stdout.lower()


def test_evaluation_logs_the_metrics_too(path, tmp_path):
    trainer = run(Corrected, path, tmp_path, correction=token_tis(), eval_dataset=dataset())
    logged = trainer.evaluate()
    assert "eval_is/ess" in {name for log in trainer.state.log_history for name in log}
    assert logged["eval_loss"] == logged["eval_loss"]


REFUSED = {
    "neither": ({}, {}, "correction, policy_loss", "got neither"),
    "both": ({}, dict(correction=token_tis(), policy_loss=PolicyLoss()), "correction", "got both"),
    "entropy": (
        dict(entropy_coef=0.1), dict(policy_loss=PolicyLoss()), "entropy_bonus_enabled", "turn it"
    ),
    "off-policy mask": (
        dict(off_policy_mask_threshold=0.5), dict(policy_loss=PolicyLoss()),
        "off_policy_mask_threshold", "got 0.5",
    ),
    "another coefficient": (
        dict(beta=0.1), dict(policy_loss=PolicyLoss()), "beta", "ReferenceKL(coefficient=beta)"
    ),
    "a scaled penalty": (
        dict(beta=0.1), dict(policy_loss=PolicyLoss(reference_kl=ReferenceKL(coefficient=0.1))),
        "use_bias_correction_kl", "set use_bias_correction_kl=False",
    ),
    "vespo": (
        dict(loss_type="vespo"), dict(correction=sequence_is()), "loss_type", "loss_type='dapo'"
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_or_counted_twice_is_refused(path, tmp_path, name):
    changes, keywords, argument, fragment = REFUSED[name]
    with pytest.raises(InputError, match=f"CorrectedGRPO: `{argument}") as error:
        WithoutVLLM(
            model=path, reward_funcs=reward, args=arguments(tmp_path, **changes),
            train_dataset=dataset(), **keywords,
        )
    assert fragment in str(error.value)


def test_a_correction_that_trl_would_not_multiply_is_refused(path, tmp_path):
    off = dict(vllm_importance_sampling_correction=False)
    with pytest.raises(InputError, match=r"pass correction=uncorrected\(\) for weights of 1"):
        run(Corrected, path, tmp_path, changes=off, correction=token_tis())


def test_rollouts_without_log_probs_are_refused(path, tmp_path):
    with pytest.raises(InputError, match="return logprobs from rollout_func"):
        run(WithoutVLLM, path, tmp_path, correction=token_tis())


def test_sampling_from_a_cut_distribution_is_warned_of(path, tmp_path):
    with pytest.warns(UserWarning, match="cut the rollout's distribution"):
        WithoutVLLM(
            model=path, reward_funcs=reward, args=arguments(tmp_path, top_p=0.9),
            train_dataset=dataset(), correction=token_tis(),
        )


PROGRAM = """
import json, sys
from tiny_trl import GRPOTrainer, SimulatedEngine, run
from iscorrect import token_tis
from iscorrect.adapters.trl import CorrectedGRPO

class Corrected(CorrectedGRPO, SimulatedEngine, GRPOTrainer):
    pass

model, output, rows = sys.argv[1:]
changes = dict(per_device_train_batch_size=int(rows), ddp_backend="gloo")
trainer = run(Corrected, model, output, changes=changes, correction=token_tis(cap=1.2))
if trainer.accelerator.is_main_process:
    print("RESULT" + json.dumps(trainer.state.log_history[:3]))
"""


def launched(path, output, processes):
    program = output / "program.py"
    program.write_text(PROGRAM)
    paths = [str(Path(__file__).parent), str(Path(iscorrect.__file__).parents[1])]
    rows = str(8 // processes)
    arguments = ["--nproc-per-node", str(processes), str(program), path, str(output), rows]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1].splitlines()[0])


def test_two_processes_log_the_loss_and_metrics_of_one(path, tmp_path):
    one, two = launched(path, tmp_path, 1), launched(path, tmp_path, 2)
    for a, b in zip(one, two, strict=True):
        names = ["loss", *(name for name in a if name.startswith(("is/", "mismatch/", "batch/")))]
        assert len(names) > 15
        for name in names:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name
