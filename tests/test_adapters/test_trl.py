"""Real GRPO runs of TRL on a CPU; tiny_trl.py has the model and a slightly wrong engine."""

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, reject, strategies as st
from outcome import largest, record

import iscorrect
from iscorrect import (
    GradientSketch,
    InputError,
    Monitor,
    PolicyLoss,
    PPOClip,
    ReferenceKL,
    Reinforce,
    sequence_is,
    token_tis,
    uncorrected,
    weight_arrival,
)
from iscorrect.adapters.trl import CorrectedGRPO, _add_loss, from_trl, monitor_callback
from iscorrect.dumps import DumpWriter, read_dump

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("trl")
    from accelerate.utils import DistributedType
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
    from transformers import AutoModelForCausalLM, TrainerState
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
    record(
        "TRL", f"training with GRPOTrainer and simulated rollouts, {mode} {clip_min}",
        distribution="trl", loss=largest(ours.losses, plain.losses),
    )
    log = ours.state.log_history[0]
    assert log["is/bounded"] > 0
    assert "sampling/importance_sampling_ratio/mean" not in log
    assert log["mismatch/log_prob_diff/mean"] == pytest.approx(
        plain.state.log_history[0]["sampling/sampling_logp_difference/mean"]
    )


def test_a_monitor_sees_what_the_trainer_logs(path, tmp_path):
    class Drifting(Corrected):
        def _generate_single_turn(self, *args, **kwargs):
            self.noise = 0.01 if self.state.global_step < 16 else 0.5
            return super()._generate_single_turn(*args, **kwargs)

    alarms = []
    monitor = Monitor({"mismatch/kl_k3": "rise"}, notify=[alarms.append])
    trainer = run(
        Drifting, path, tmp_path, correction=token_tis(), callbacks=[monitor_callback(monitor)],
        changes=dict(max_steps=22, steps_per_generation=2),
    )
    (alarm,) = alarms
    assert 16 <= alarm.since <= 18
    logged = {log["step"]: log["mismatch/kl_k3"] for log in trainer.state.log_history[:-1]}
    assert alarm.before < 1e-3 < alarm.now < max(logged.values())


def logged(monitor, values, callback=None, **more):
    """A callback that was shown values, as a trainer shows them; and the state of that trainer."""
    callback = callback or monitor_callback(monitor)
    state = TrainerState(**more)
    callback.on_train_begin(None, state, None)
    for value in values:
        state.global_step += 1
        logs = {"mismatch/kl_k3": value, "loss": -1.0}
        state.log_history.append({**logs, "step": state.global_step})
        callback.on_log(None, state, None, logs=logs)
    return state


def test_a_run_that_goes_on_from_a_checkpoint_is_held_against_what_it_had_logged():
    alarms = []
    before = logged(Monitor(notify=[alarms.append]), [4e-4] * 60 + [4e-3] * 60)
    assert [alarm.since for alarm in alarms] == [61]
    alarms.clear()
    go_on = dict(global_step=120, log_history=[*before.log_history])
    logged(Monitor(notify=[alarms.append]), [4e-2] * 20, **go_on)
    assert [alarm.since for alarm in alarms] == [121]  # and the old one is not told again
    assert alarms[0].before == 4e-3


def test_what_was_seen_is_not_taken_in_again_where_training_is_begun_again():
    monitor = Monitor()
    callback = monitor_callback(monitor)
    state = logged(monitor, [4e-4] * 10, callback)
    logged(monitor, [4e-4], callback, global_step=10, log_history=state.log_history)
    assert [step for step, _ in monitor._past["mismatch/kl_k3"]] == [*range(1, 12)]


def test_a_trainer_that_resumes_shows_a_new_monitor_what_it_had_logged(path, tmp_path):
    monitors = Monitor(), Monitor()
    for monitor, steps, resume in zip(monitors, (4, 6), (False, True), strict=True):
        torch.manual_seed(0)
        trainer = Corrected(
            model=path, reward_funcs=reward, train_dataset=dataset(), correction=token_tis(),
            args=arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=4),
            callbacks=[monitor_callback(monitor)],
        )
        trainer.train(resume_from_checkpoint=resume)
    before, after = (monitor._past["mismatch/kl_k3"] for monitor in monitors)
    assert [step for step, _ in after] == [1, 2, 3, 4, 5, 6]
    assert after[:4] == before


def test_a_metric_that_cannot_be_watched_is_warned_of_and_ends_nothing():
    alarms = []
    monitor = Monitor({"loss": "rise", "mismatch/kl_k3": "rise"}, notify=[alarms.append])
    with pytest.warns(UserWarning, match="loss is not watched.*never negative") as warned:
        logged(monitor, [4e-4, None] * 20 + [4e-3] * 20)
    assert len(warned) == len(alarms) == 1


class Sketched(Corrected):
    """Keeps sketches of the gradients that it learns from."""

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        if self.steps_sketched == self.state.global_step:
            self.gradients.append(GradientSketch()(p.grad for p in model.parameters()))
            self.steps_sketched += 1
        return loss

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gradients, self.steps_sketched = [], 0


@pytest.mark.parametrize("given", [
    {"correction": token_tis()}, {"policy_loss": PolicyLoss(correction=token_tis())},
])
def test_gradients_with_and_without_weights_are_compared_beside_the_training(
    path, tmp_path, given
):
    changes = dict(max_steps=9, gradient_accumulation_steps=1)
    plain = run(Corrected, path, tmp_path, changes=changes, **given)
    ours = run(Sketched, path, tmp_path, changes=changes, coherence=8, **given)
    assert ours.losses == plain.losses
    assert "gradient/n_star/low" in ours.state.log_history[7]
    assert not any("n_star" in name for log in ours.state.log_history[:7] for name in log)
    for log, expected in zip(ours.state.log_history, plain.state.log_history, strict=True):
        same = {name: x for name, x in log.items() if "n_star" not in name and "time" not in name}
        assert {name: expected[name] for name in same if "second" not in name} == pytest.approx(
            {name: x for name, x in same.items() if "second" not in name}
        )
    assert len(ours._pairs) == 8
    for (uncorrected_one, own), learnt in zip(ours._pairs, ours.gradients[1:], strict=True):
        torch.testing.assert_close(own, learnt, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(own, uncorrected_one)
    assert ours.state.log_history[7]["gradient/n_star/low"] > 1


def test_comparing_gradients_leaves_what_trl_keeps_of_the_entropy(path, tmp_path):
    changes = dict(
        max_steps=3, gradient_accumulation_steps=2, use_adaptive_entropy=True, entropy_coef=0.1,
        entropy_target=10.0, entropy_coef_delta=0.05,
    )
    plain, ours = (
        run(Corrected, path, tmp_path, changes=changes, correction=token_tis(), coherence=steps)
        for steps in (0, 8)
    )
    assert ours.losses == plain.losses
    of = [[log["entropy_coef"] for log in x.state.log_history[:-1]] for x in (plain, ours)]
    assert of[0] == of[1] and len({*of[0]}) > 1


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


FUSED = {
    "tokens": ({}, PolicyLoss(correction=token_tis(cap=1.2))),
    # A step as large as the gradient, and one alone: weights of sequences show, of parameters that
    # differ in their last digit, a thousand times that in the next loss.
    "sequences under the trained policy": (
        dict(vllm_importance_sampling_correction=False, optim="sgd", learning_rate=1.0,
             max_steps=1),
        PolicyLoss(correction=sequence_is()),
    ),
    "a reference, temperature 0.7": (
        dict(beta=0.1, use_bias_correction_kl=False, temperature=0.7, num_iterations=2),
        PolicyLoss(
            correction=token_tis(cap=1.2), objective=PPOClip(),
            aggregation="seq-mean-token-mean", reference_kl=ReferenceKL(coefficient=0.1),
        ),
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_loss_trains_as_the_loss_of_log_probs(path, tmp_path, name):
    changes, loss = FUSED[name]
    plain = run(Corrected, path, tmp_path, changes=changes, policy_loss=loss)
    fused = run(Corrected, path, tmp_path, changes=changes, policy_loss=loss, fused=True)
    assert_same_run(fused, plain)
    start = AutoModelForCausalLM.from_pretrained(path).lm_head.weight
    assert (fused.model.lm_head.weight - start).abs().max() > 1e-4
    for a, b in zip(plain.state.log_history, fused.state.log_history, strict=True):
        assert a.keys() == b.keys()


def test_a_copy_of_a_model_that_may_return_a_loss_computes_with_its_own_weights(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    _add_loss(model)
    kept, ids = copy.deepcopy(model), torch.arange(6)[None]
    expected = kept(ids).logits
    with torch.no_grad():
        for x in model.parameters():
            x.zero_()
    assert torch.equal(kept(ids).logits, expected) and expected.abs().sum() > 1
    assert torch.equal(pickle.loads(pickle.dumps(kept))(ids).logits, expected)


def test_the_fused_loss_never_asks_trl_for_log_probs_with_gradient(path, tmp_path, monkeypatch):
    asked = []
    score = GRPOTrainer._get_per_token_logps_and_entropies

    def watched(self, *args, **kwargs):
        asked.append(torch.is_grad_enabled())
        return score(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", watched)
    run(Corrected, path, tmp_path, policy_loss=PolicyLoss(correction=token_tis()), fused=True)
    assert asked and not any(asked)
    run(Corrected, path, tmp_path, policy_loss=PolicyLoss(correction=token_tis()))
    assert any(asked)


def test_a_tied_head_trains_the_same(path, tmp_path):
    class Tied(Corrected):
        def __init__(self, *args, model, **kwargs):
            model = AutoModelForCausalLM.from_pretrained(model)
            model.config.tie_word_embeddings = True
            model.tie_weights()
            super().__init__(*args, model=model, **kwargs)

    loss = PolicyLoss(correction=token_tis(cap=1.2))
    fused = run(Tied, path, tmp_path, policy_loss=loss, fused=True)
    assert fused.model.lm_head.weight is fused.model.model.embed_tokens.weight
    assert_same_run(fused, run(Tied, path, tmp_path, policy_loss=loss))


def test_a_softcap_and_a_bias_are_those_of_trl(path, tmp_path):
    class Biased(Corrected):
        def __init__(self, *args, model, **kwargs):
            model = AutoModelForCausalLM.from_pretrained(model)
            model.config.final_logit_softcapping = 2.0
            size = model.config.vocab_size
            model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, size))
            super().__init__(*args, model=model, **kwargs)

    loss = PolicyLoss(correction=token_tis(cap=1.2))
    fused = run(Biased, path, tmp_path, policy_loss=loss, fused=True)
    assert_same_run(fused, run(Biased, path, tmp_path, policy_loss=loss))
    without = run(Corrected, path, tmp_path, policy_loss=loss, fused=True)
    assert fused.losses != pytest.approx(without.losses, rel=1e-3)
    assert (fused.model.lm_head.bias - torch.linspace(-1, 1, 32)).abs().max() > 1e-4


@pytest.mark.parametrize("scored", [True, False])
def test_a_step_in_bfloat16_with_a_float32_head_is_the_same(path, tmp_path, scored):
    """A step as large as the gradient; later ones would show how bfloat16 rounds a last digit.

    So do layers far from the loss: a digit that is rounded otherwise goes down through all of them.
    """
    changes = dict(
        bf16=True, cast_lm_head_to_fp32=True, vllm_importance_sampling_correction=scored,
        optim="sgd", learning_rate=1.0, max_steps=1,
    )
    loss = PolicyLoss(correction=sequence_is())
    plain = run(Corrected, path, tmp_path, changes=changes, policy_loss=loss)
    fused = run(Corrected, path, tmp_path, changes=changes, policy_loss=loss, fused=True)
    torch.testing.assert_close(fused.losses, plain.losses, rtol=1e-5, atol=1e-6)
    start = AutoModelForCausalLM.from_pretrained(path)
    for (name, x), y, before in zip(
        fused.model.named_parameters(), plain.model.parameters(), start.parameters(), strict=True
    ):
        near = name.startswith(("lm_head", "model.norm", "model.layers.1."))
        digit = 2**-8 * (y - before).abs().max().item()
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6 if near else digit)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # elsewhere products round otherwise
        assert_same_run(fused, plain)


def test_evaluation_of_the_fused_loss_is_that_of_log_probs(path, tmp_path):
    loss = PolicyLoss(correction=token_tis(cap=1.2))
    plain, fused = (
        run(Corrected, path, tmp_path, policy_loss=loss, fused=fused, eval_dataset=dataset())
        for fused in (False, True)
    )
    expected = plain.evaluate()["eval_loss"]
    assert fused.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5, abs=1e-6)


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
    assert f"24 sequences · {dump.num_tokens} tokens" in report.stdout
    assert "nats per token" in report.stdout


class Watched(Corrected):
    """Keeps the weights as they are at every generation."""

    def _generate_and_score_completions(self, inputs):
        self.kept = [*getattr(self, "kept", []), copy.deepcopy(self.model.state_dict())]
        return super()._generate_and_score_completions(inputs)


def test_the_log_says_what_of_each_update_arrives_in_the_engines_dtype(path, tmp_path):
    trainer = run(
        Watched, path, tmp_path, changes=dict(learning_rate=1e-4, gradient_accumulation_steps=1),
        correction=uncorrected(), engine_dtype=torch.bfloat16,
    )
    found = [x for x in trainer.state.log_history if "loss" in x]
    assert "weights/arrival" not in found[0]  # nothing was updated before the first send
    whole = [weight_arrival(*pair) for pair in itertools.pairwise(trainer.kept)]
    assert len(whole) >= 2
    for logged, exact in zip(found[1:], whole, strict=True):
        assert logged["weights/arrival"] == pytest.approx(exact.share, rel=1e-4)
        assert logged["weights/unchanged"] == pytest.approx(exact.total.unchanged, rel=1e-4)
        assert 0.1 < exact.total.unchanged < 1


def test_a_dtype_that_no_engine_holds_is_refused(path, tmp_path):
    with pytest.raises(InputError, match="`dtype` must be a floating-point dtype of 8 or 16"):
        run(Watched, path, tmp_path, correction=uncorrected(), engine_dtype=torch.float32)


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
    "fused without a policy loss": (
        {}, dict(correction=token_tis(), fused=True), "fused", "pass policy_loss="
    ),
    "fused with an entropy bonus": (
        dict(entropy_coef=0.1), dict(policy_loss=PolicyLoss(), fused=True),
        "entropy_bonus_enabled", "turn it off",
    ),
    "fused with a head in 16 bits": (
        dict(bf16=True), dict(policy_loss=PolicyLoss(), fused=True), "cast_lm_head_to_fp32",
        "set cast_lm_head_to_fp32=True",
    ),
    "fused and compiled": (
        dict(torch_compile=True), dict(policy_loss=PolicyLoss(), fused=True), "torch_compile",
        "set torch_compile=False",
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


class Adapted(torch.nn.Linear):
    """What PEFT puts in the place of a head."""


def adapted(model):
    model.lm_head = Adapted(model.config.hidden_size, model.config.vocab_size, bias=False)


def with_adapters(model):
    model.peft_config = {}


def multimodal(model):
    text = model.config
    model.config = copy.copy(text)
    model.config.get_text_config = lambda *_, **__: text


def scaled(model):
    model.config.logits_scaling = 8.0


@pytest.mark.parametrize(
    ("change", "argument", "got"),
    [
        (adapted, "model", "LlamaForCausalLM with Adapted"),
        (with_adapters, "model", "LlamaForCausalLM with Linear"),
        (multimodal, "model", "LlamaForCausalLM"), (scaled, "logits_scaling", "8.0"),
    ],
)
def test_a_model_whose_head_cannot_be_fused_is_refused(path, tmp_path, change, argument, got):
    model = AutoModelForCausalLM.from_pretrained(path)
    trainer = WithoutVLLM(
        model=model, reward_funcs=reward, args=arguments(tmp_path), train_dataset=dataset(),
        policy_loss=PolicyLoss(),
    )
    trainer._check_fused()
    change(trainer.model)
    with pytest.raises(InputError, match=f"CorrectedGRPO: `{argument}.*got {got}") as error:
        trainer._check_fused()
    assert "set fused=False" in str(error.value)


@pytest.mark.parametrize(
    ("how", "gpus"), [("FSDP", 1), ("DEEPSPEED", 1), ("MEGATRON_LM", 1), ("NO", 2)]
)
def test_a_model_that_is_sharded_or_replicated_is_refused(path, tmp_path, monkeypatch, how, gpus):
    trainer = WithoutVLLM(
        model=path, reward_funcs=reward, args=arguments(tmp_path), train_dataset=dataset(),
        policy_loss=PolicyLoss(),
    )
    state = SimpleNamespace(distributed_type=DistributedType(how), mixed_precision="no")
    monkeypatch.setattr(trainer, "accelerator", state)
    monkeypatch.setattr(trainer.args, "_n_gpu", gpus)
    got = f"got .*{how} with n_gpu={gpus}"
    with pytest.raises(InputError, match=f"`distributed_type.*one process or DDP.*{got}"):
        trainer._check_fused()


def test_a_correction_that_trl_would_not_multiply_is_refused(path, tmp_path):
    off = dict(vllm_importance_sampling_correction=False)
    with pytest.raises(InputError, match=r"pass correction=uncorrected\(\) for weights of 1"):
        run(Corrected, path, tmp_path, changes=off, correction=token_tis())


@pytest.mark.parametrize(("trainer", "given", "said"), [
    (Corrected, {"correction": token_tis(), "coherence": 3}, "0, or at least 8 steps, got 3"),
    (Corrected, {"correction": token_tis(), "coherence": -1}, ">= 0, a number of steps, got -1"),
    (Corrected, {"correction": token_tis(), "coherence": 8.0}, ">= 0, a number of steps, got 8.0"),
    (WithoutVLLM, {"correction": token_tis(), "coherence": 8},
     "its weights are in the advantages, got 8"),
])
def test_gradients_that_cannot_be_compared_are_refused(path, tmp_path, trainer, given, said):
    with pytest.raises(InputError, match=f"CorrectedGRPO: `coherence` must be .*{said}"):
        run(trainer, path, tmp_path, **given)


def test_reentrant_checkpointing_cannot_be_asked_for_gradients_apart(path, tmp_path):
    changes = dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    with pytest.raises(InputError, match=r"gradient_checkpointing_kwargs.*'use_reentrant': False"):
        run(Corrected, path, tmp_path, changes=changes, correction=token_tis(), coherence=8)


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
import json, os, sys
from tiny_trl import GRPOTrainer, SimulatedEngine, run
from iscorrect import PolicyLoss, token_tis
from iscorrect.adapters.trl import CorrectedGRPO

class Corrected(CorrectedGRPO, SimulatedEngine, GRPOTrainer):
    pass

model, output, rows, loss = sys.argv[1:]
changes = dict(per_device_train_batch_size=int(rows), ddp_backend="gloo")
correction = token_tis(cap=1.2)
keywords = {
    "trl": dict(correction=correction),
    "fused": dict(policy_loss=PolicyLoss(correction=correction), fused=True),
}
trainer = run(Corrected, model, output, changes=changes, **keywords[loss])
if trainer.accelerator.is_main_process:
    print("RESULT" + json.dumps(trainer.state.log_history[:3]), flush=True)
os._exit(0)  # gloo's threads can abort an interpreter that shuts down under them
"""


def launched(path, output, processes, loss):
    program = output / "program.py"
    program.write_text(PROGRAM)
    paths = [str(Path(__file__).parent), str(Path(iscorrect.__file__).parents[1])]
    rows = str(8 // processes)
    arguments = ["--nproc-per-node", str(processes), str(program), path, str(output), rows, loss]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1].splitlines()[0])


@pytest.mark.parametrize("loss", ["trl", "fused"])
def test_two_processes_log_the_loss_and_metrics_of_one(path, tmp_path, loss):
    one, two = (launched(path, tmp_path, processes, loss) for processes in (1, 2))
    for a, b in zip(one, two, strict=True):
        names = ["loss", *(name for name in a if name.startswith(("is/", "mismatch/", "batch/")))]
        assert len(names) > 15
        for name in names:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name
