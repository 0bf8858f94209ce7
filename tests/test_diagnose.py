"""Each cause is made by an exact sampler on a small Markov policy, in NumPy, and must be named."""

import ast
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from iscorrect import InputError, parse
from iscorrect.cli.rollouts import MODELS, PRECISIONS, shipped_rollouts
from iscorrect.diagnose import NOISE, Cause, Tokens, advise, causes as known, diagnose, findings
from iscorrect.diagnose.fields import HEAD
from iscorrect.diagnose.noise import HEAVY_TAIL, IDENTICAL, SCALES, UNEXPLAINED
from iscorrect.diagnose.shared import shared_error
from iscorrect.diagnose.units import OF_SEQUENCE, WITHIN
from iscorrect.diagnose.weights import OTHER_WEIGHTS, PLATEAU, WITH_AGE
from iscorrect.dumps import LogProbDump
from iscorrect.report.gather import summarise

VOCABULARY, SEQUENCES, LENGTH = 64, 64, 128


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def identity(logits, seen):
    return logits


def roll_out(
    seed=0, *, sampler=identity, report=None, trainer_temperature=1.0, noise=0.04,
    engine_shift=0.0, until=LENGTH, sequences=SEQUENCES, length=LENGTH,
):
    """Tokens of a Markov policy; the trainer's logits are the engine's and Gaussian noise.

    The engine's logits are shifted, each token's by its own amount, before the token ``until``.
    """
    rng = np.random.default_rng(seed)
    table = rng.normal(0, 2.0, (VOCABULARY, VOCABULARY))
    served = table + engine_shift * rng.normal(0, 1, VOCABULARY)
    previous = rng.integers(0, VOCABULARY, sequences)
    seen = np.zeros((sequences, VOCABULARY), bool)
    out = {name: np.zeros((sequences, length)) for name in
           ("rollout_log_probs", "old_log_probs", "token_ids", "entropy", "varentropy", "mass")}
    rows = np.arange(sequences)
    for t in range(length):
        logits = (served if t < until else table)[previous]
        drawn = log_softmax(sampler(logits, seen))
        told = log_softmax((report or sampler)(logits, seen))
        gumbel = rng.gumbel(size=drawn.shape)
        token = np.argmax(drawn + gumbel, -1)
        heard = table[previous] + noise * rng.normal(size=logits.shape)
        trainer = log_softmax(heard / trainer_temperature)
        p = np.exp(trainer)
        out["rollout_log_probs"][:, t] = told[rows, token]
        out["old_log_probs"][:, t] = trainer[rows, token]
        out["token_ids"][:, t] = token
        out["entropy"][:, t] = -(p * trainer).sum(-1)
        out["varentropy"][:, t] = (p * trainer**2).sum(-1) - out["entropy"][:, t] ** 2
        out["mass"][:, t] = np.exp(log_softmax(logits))[drawn > -np.inf].sum() / sequences
        seen[rows, token] = True
        previous = token
    return out


def dump_of(out, *names, **more):
    """A dump of the required fields and the named ones."""
    fields = {
        name: torch.from_numpy(out[name]).float()
        for name in ("rollout_log_probs", "old_log_probs", *names) if name != "token_ids"
    }
    if "token_ids" in names:
        fields["token_ids"] = torch.from_numpy(out["token_ids"]).long()
    return LogProbDump(mask=torch.ones(out["old_log_probs"].shape) > 0, **fields, **more)


def full(out, **more):
    return dump_of(out, "token_ids", "entropy", "varentropy", **more)


def causes(dump, **kwargs):
    return [finding.cause for finding in diagnose(dump, **kwargs)]


def patterns(dump, **kwargs):
    return [finding.pattern for finding in diagnose(dump, **kwargs)]


def by_place(noise, seed=0):
    """Contexts whose logits the engine has with noise of a size for each place."""
    noise = np.broadcast_to(noise, (SEQUENCES, LENGTH))[..., None]
    return of_contexts(
        lambda x, rng: x + 0.06 * noise * rng.normal(size=x.shape), seed=seed, noise=0
    )


def cut(dump, lengths):
    """The first tokens of each sequence."""
    mask = torch.arange(LENGTH) < torch.as_tensor(lengths)[:, None]
    return LogProbDump(**{**dump.given(), "mask": mask})



def of_contexts(engine, seed=0, noise=0.04, certain=0.0):
    """Tokens of contexts that are more or less certain, and never come twice.

    ``engine`` makes its logits "b t v" of the trainer's, given random numbers; ``certain`` is the
    share of contexts, of all or of each sequence "b 1", that leave no choice.
    """
    rng = np.random.default_rng(seed)
    shape = SEQUENCES, LENGTH, VOCABULARY
    logits = rng.normal(size=shape) * rng.uniform(0.5, 5, (*shape[:2], 1))
    if np.any(certain):
        logits[..., 0] += 25 * (rng.random(shape[:2]) < certain)
    told = log_softmax(engine(logits, rng))
    token = np.argmax(told + rng.gumbel(size=shape), -1)[..., None]
    trainer = log_softmax(logits + noise * rng.normal(size=shape))
    return LogProbDump(
        rollout_log_probs=torch.from_numpy(np.take_along_axis(told, token, -1)[..., 0]),
        old_log_probs=torch.from_numpy(np.take_along_axis(trainer, token, -1)[..., 0]),
        mask=torch.ones(shape[:2], dtype=torch.bool), token_ids=torch.from_numpy(token[..., 0]),
        entropy=torch.from_numpy(-(np.exp(trainer) * trainer).sum(-1)),
    )


def top_p(mass):
    def sampler(logits, seen):
        p = np.exp(log_softmax(logits))
        order = np.argsort(-p, -1)
        before = np.take_along_axis(p, order, -1).cumsum(-1) - np.take_along_axis(p, order, -1)
        cut = np.empty_like(p, bool)
        np.put_along_axis(cut, order, before > mass, -1)
        return np.where(cut, -np.inf, logits)

    return sampler


def tempered(temperature):
    return lambda logits, seen: logits / temperature


def penalised(penalty):
    return lambda logits, seen: np.where(
        seen, np.where(logits > 0, logits / penalty, logits * penalty), logits
    )


class TestClean:
    @pytest.mark.parametrize(
        ("noise", "scale"), [(1e-5, "float32"), (4e-3, "float16"), (0.05, "bfloat16")]
    )
    def test_noise_is_called_noise_with_its_scale(self, noise, scale):
        for seed in range(5):
            (finding,) = diagnose(full(roll_out(seed, noise=noise)))
            assert finding.pattern == NOISE
            assert finding.evidence.endswith(f"as between kernels that round to {scale}")

    def test_the_interval_of_the_scale_holds_that_of_a_hundred_times_the_tokens(self):
        large = diagnose(full(roll_out(9, sequences=1600)))[0].statistic
        found = [diagnose(full(roll_out(seed, sequences=16)))[0] for seed in range(20)]
        inside = [abs(f.statistic - large) < 2 * f.error for f in found]
        assert np.mean(inside) > 0.7

    def test_a_scale_between_two_formats_is_given_to_both(self):
        (finding,) = diagnose(full(roll_out(noise=0.013, sequences=8)))
        assert "float16 or bfloat16" in finding.evidence

    def test_without_optional_fields_too(self):
        assert patterns(dump_of(roll_out())) == [NOISE]

    def test_equal_log_probs_measure_nothing(self):
        (finding,) = diagnose(full(roll_out(noise=0.0)))
        assert finding.cause == "one side copied from the other"
        assert not finding.correctable

    def test_what_is_no_larger_than_the_null_is_noise_without_a_scale(self):
        out, again = roll_out(noise=0.05), roll_out(seed=1, noise=0.05)
        assert "of the null" in diagnose(full(out), null=full(again))[0].evidence
        assert "round to" not in diagnose(full(out), null=full(again))[0].evidence
        assert "round to" in diagnose(full(out), null=full(roll_out(noise=0.01)))[0].evidence

    @pytest.mark.parametrize("noise", [0.05, 1.0])
    def test_a_null_that_is_too_small_clears_nothing(self, noise):
        out = full(roll_out(noise=noise))
        for null in (roll_out(sequences=1, length=1), roll_out(sequences=7), roll_out(length=8)):
            with pytest.raises(InputError, match="`null`"):
                diagnose(out, null=full(null))
        lost = full(roll_out())
        nowhere = torch.full_like(lost.old_log_probs, -torch.inf)
        with pytest.raises(InputError, match="`null`"):
            diagnose(out, null=LogProbDump(**{**lost.given(), "old_log_probs": nowhere}))

    @pytest.mark.parametrize("share", [0.1, 0.3, 0.55, 0.75, 0.9, 0.99, 1 - 3 / 8192])
    def test_a_part_that_is_equal_to_the_bit_is_found(self, share):
        out = roll_out(noise=0.05)
        tokens = out["old_log_probs"].size
        rank = np.random.default_rng(0).permutation(tokens).reshape(out["old_log_probs"].shape)
        # the three of the last case must be tokens that can differ
        rank = np.where(np.maximum(out["old_log_probs"], out["rollout_log_probs"]) > -0.5, 0, rank)
        kept = rank < share * tokens
        out["old_log_probs"] = np.where(kept, out["rollout_log_probs"], out["old_log_probs"])
        dump = dump_of(out)
        assert patterns(dump)[0] == "a part of the log-probs is equal to the bit"
        assert "No correction" not in advise(dump, samples=64, length=128)[0].action

    def test_what_differs_amid_copies_is_no_heavy_tail(self):
        out = roll_out(noise=0.5)
        kept = np.random.default_rng(0).random(out["old_log_probs"].shape) < 0.9
        out["old_log_probs"] = np.where(kept, out["rollout_log_probs"], out["old_log_probs"])
        assert patterns(dump_of(out)) == ["a part of the log-probs is equal to the bit"]
        rollout = out["rollout_log_probs"] - 2  # far from 1, so that ratios may be of any mean
        noise = np.where(kept, 0, np.random.default_rng(1).normal(0, 0.5, rollout.shape))
        out["rollout_log_probs"], out["old_log_probs"] = rollout, rollout + noise.clip(-1.9, 1.9)
        assert patterns(dump_of(out)) == ["a part of the log-probs is equal to the bit"]

    def test_a_scale_is_that_of_the_tokens_that_differ(self):
        out = roll_out(noise=1e-4)
        kept = np.random.default_rng(0).random(out["old_log_probs"].shape) < 0.8
        out["old_log_probs"] = np.where(kept, out["rollout_log_probs"], out["old_log_probs"])
        (finding,) = diagnose(dump_of(out))
        (whole,) = diagnose(dump_of(roll_out(noise=1e-4)))
        assert finding.statistic == pytest.approx(whole.statistic, rel=0.3)
        assert "of tokens that differ at all" in finding.evidence

    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_kernels_that_round_alike_agree_to_the_bit_by_themselves(self, model, precision):
        assert patterns(shipped_rollouts(model, precision, precision)) == [NOISE]

    @pytest.mark.parametrize("also", ["bfloat16", "entropy", "stop"])
    def test_what_is_copied_is_not_measured_whatever_else_was_found(self, also):
        dump = full(roll_out(noise=0.0))
        rollout = dump.rollout_log_probs
        if also == "bfloat16":
            rollout = rollout.bfloat16().to(rollout)
        changed = {"rollout_log_probs": rollout, "old_log_probs": rollout.clone()}
        if also == "entropy":
            changed["entropy"] = torch.zeros_like(rollout)
        if also == "stop":
            changed["rollout_log_probs"] = rollout.clone()
            changed["rollout_log_probs"][:, -1] = 0
        copied = LogProbDump(**{**dump.given(), **changed})
        assert len(diagnose(copied)) > 1
        assert IDENTICAL in patterns(copied)
        (advice,) = advise(copied, samples=64, length=128)
        assert advice.action == "Nothing can be said: the mismatch was not measured"
        assert "token weights keep" not in advice.because

    def test_the_range_of_bfloat16_is_the_same_in_words_and_in_the_test(self):
        low, high = SCALES["bfloat16"]
        (finding,) = diagnose(dump_of(roll_out(noise=0.5)))
        assert finding.pattern == "larger than 16-bit rounding, without a pattern"
        assert f"{low:g} to {high:g}" in finding.evidence

    def test_what_is_nowhere_finite_is_said_to_be_so(self):
        dump = dump_of(roll_out(sequences=2, length=3))
        nowhere = torch.full_like(dump.old_log_probs, -torch.inf)
        with pytest.raises(InputError, match="6 counted tokens, none with a finite log-prob"):
            diagnose(LogProbDump(**{**dump.given(), "old_log_probs": nowhere}))

    def test_a_path_is_no_dump(self):
        for call in (diagnose, shared_error, lambda x: advise(x, samples=1, length=1)):
            with pytest.raises(InputError, match="read_dump"):
                call("x.npz")

    @pytest.mark.parametrize(
        "wrong", [{"permutations": 0}, {"permutations": 2.5}, {"most": 0}, {"seed": -1}]
    )
    def test_a_share_of_nothing_is_refused(self, wrong):
        with pytest.raises(InputError, match=f"`{next(iter(wrong))}`"):
            shared_error(dump_of(roll_out(sequences=2)), **wrong)

    def test_few_sequences_leave_a_large_mismatch_without_a_cause(self):
        out = roll_out(sampler=tempered(0.9), sequences=4)
        assert patterns(full(out)) == ["larger than 16-bit rounding, without a pattern"]

    def test_nothing_but_placeholders_is_no_error(self):
        out = roll_out(sequences=2)
        out["rollout_log_probs"][:] = 0
        out["old_log_probs"][:] = -2
        (finding,) = diagnose(full(out))
        assert finding.pattern == "one value in many places"
        assert [c.name for c in finding.causes][:2] == [
            "a sampler that keeps one token", "environment tokens in the mask",
        ]

    def test_one_token_is_no_error(self):
        out = {name: x[:1, :1] for name, x in roll_out().items()}
        assert len(causes(full(out))) == 1

    def test_no_token_is_one(self):
        dump = full(roll_out(sequences=2, length=2))
        empty = LogProbDump(**{**dump.given(), "mask": torch.zeros(2, 2) > 0})
        with pytest.raises(InputError, match="counted tokens"):
            diagnose(empty)


class TestSampling:
    @pytest.mark.parametrize("temperature", [0.8, 0.9, 1.1])
    def test_engine_tempered_alone(self, temperature):
        first = diagnose(full(roll_out(sampler=tempered(temperature))))[0]
        side = ("engine", "trainer") if temperature < 1 else ("trainer", "engine")
        assert first.cause == f"temperature: {side[0]} divides its logits, {side[1]} does not"
        assert abs(first.statistic - (1 - 1 / temperature)) < 0.02

    def test_trainer_tempered_alone(self):
        first = diagnose(full(roll_out(trainer_temperature=0.9)))[0]
        assert first.cause == "temperature: trainer divides its logits, engine does not"
        assert abs(first.statistic - 0.1) < 0.01

    def test_both_tempered_and_raw_log_probs_reported(self):
        out = roll_out(sampler=tempered(0.9), report=identity, trainer_temperature=0.9)
        assert causes(full(out)) == [
            "temperature: raw log-probs reported, tempered sampler and trainer"
        ]

    def test_both_tempered_and_told_so_is_clean(self):
        out = roll_out(sampler=tempered(0.9), trainer_temperature=0.9)
        assert patterns(full(out)) == [NOISE]

    def test_temperature_is_found_without_entropy(self):
        out = roll_out(sampler=tempered(0.8))
        assert causes(dump_of(out))[0].startswith("temperature: engine divides")

    @pytest.mark.parametrize("sampler", [tempered(0.9), top_p(0.9)])
    def test_a_sampler_that_neither_side_reports_shows_in_the_entropy_gap(self, sampler):
        dump = full(roll_out(sampler=sampler, report=identity))
        assert causes(dump) == ["raw log-probs reported by a tempered or truncated sampler"]
        ratio = (dump.old_log_probs - dump.rollout_log_probs).exp()
        assert abs(float(ratio.mean()) - 1) < 2e-3

    @pytest.mark.parametrize("mass", [0.99, 0.95, 0.8])
    def test_truncation_and_its_kept_mass(self, mass):
        out = roll_out(sampler=top_p(mass))
        first = diagnose(full(out))[0]
        assert first.cause == "top-p/top-k truncation"
        assert abs(1 + first.statistic - out["mass"].mean()) < 4 * first.error + 1e-3

    def test_a_mass_that_follows_confidence_is_no_temperature(self):
        def min_p(logits, _):
            p = np.exp(log_softmax(logits))
            return np.where(p < 0.2 * p.max(-1, keepdims=True), -np.inf, logits)

        found = {x.pattern: x.cause for x in diagnose(of_contexts(min_p))}
        assert found["mean ratio below 1"] == known.TRUNCATION.name
        assert "log ρ in proportion to log p" not in found

    def test_words_that_are_never_sampled_are_missing_mass_however_much_of_it(self):
        def banned(logits, _):
            return np.where(np.arange(VOCABULARY) < 12, -np.inf, logits)

        dump = of_contexts(banned)
        assert (dump.old_log_probs - dump.rollout_log_probs).std() > 0.5
        (finding,) = diagnose(dump)
        assert finding.pattern == "mean ratio below 1" and known.GRAMMAR in finding.causes

    @pytest.mark.parametrize("penalty", [1.03, 1.2])
    def test_repetition_penalty_needs_token_ids(self, penalty):
        out = roll_out(sampler=penalised(penalty), noise=0.02)
        assert causes(full(out)) == ["repetition penalty"]
        assert "repetition penalty" not in causes(dump_of(out, "entropy"))


class TestTokens:
    @pytest.mark.parametrize("lag", [-2, -1, 1, 2])
    def test_shifted_log_probs(self, lag):
        out = roll_out()
        out["rollout_log_probs"] = np.roll(out["rollout_log_probs"], lag, axis=1)
        first = diagnose(full(out))[0]
        assert first.cause == "log-probs shifted against each other"
        assert f"{abs(lag)} {'later' if lag > 0 else 'earlier'}" in first.evidence

    @pytest.mark.parametrize("side", ["rollout_log_probs", "old_log_probs"])
    def test_zeros_for_missing_values(self, side):
        out = roll_out()
        out[side][np.random.default_rng(1).random(out[side].shape) < 0.01] = 0
        assert causes(full(out)) == ["missing values filled with a constant"]

    def test_zeros_for_environment_tokens_come_in_runs(self):
        out = roll_out()
        out["rollout_log_probs"][::4, 40:52] = 0
        assert causes(full(out)) == ["environment tokens in the mask"]

    def test_environment_tokens_scored_alike_by_both_are_too_surprising(self):
        out = roll_out()
        for name in ("rollout_log_probs", "old_log_probs"):
            out[name][::4, 40:52] -= 8
        assert causes(full(out)) == ["environment tokens in the mask"]

    def test_one_unlikely_window_is_no_run_however_often_it_is_drawn(self):
        out = roll_out(sequences=16)
        for name in ("old_log_probs", "rollout_log_probs"):
            out[name][0, 20:29] -= 5.0
        few = dump_of(out, "entropy")
        assert patterns(few.rows(torch.tensor([0, 0, 0, 0, *range(1, 16)]))) == [NOISE]

    def test_wrong_tokens(self):
        out = roll_out()
        wrong = np.random.default_rng(1).random(out["old_log_probs"].shape) < 0.01
        out["old_log_probs"][wrong] -= 8
        assert causes(full(out)) == ["log-probs of another candidate of the position"]
        after = np.roll(wrong, 1, axis=1) | np.roll(wrong, 2, axis=1)
        out["old_log_probs"][after & ~wrong] -= 0.5
        assert causes(full(out)) == ["wrong tokens"]

    def test_a_sampler_that_keeps_one_token_reports_certainty_everywhere(self):
        out = roll_out(sampler=lambda x, seen: np.where(x == x.max(-1, keepdims=True), x, -np.inf))
        assert (out["rollout_log_probs"] == 0).all()
        assert causes(full(out))[0] == known.GREEDY.name

    def test_other_tokens_from_a_position_on(self):
        out, other = roll_out(), roll_out(seed=5)
        out["old_log_probs"][::8, 50:] = other["old_log_probs"][::8, 50:]
        first = diagnose(full(out))[0]
        assert first.cause == "different tokens from a position on"
        assert first.statistic == 1 / 8

    def test_a_wrong_prompt_spoils_the_beginning(self):
        out = roll_out()
        fading = np.exp(-np.arange(LENGTH) / 6)
        out["old_log_probs"] += np.random.default_rng(1).normal(size=out["mass"].shape) * fading
        below_0 = -1e-3 * np.random.default_rng(2).random(out["mass"].shape)
        out["old_log_probs"] = np.minimum(out["old_log_probs"], below_0)
        assert causes(dump_of(out)) == ["wrong prompt template"]


class TestWeights:
    def test_other_weights_move_the_same_token_alike(self):
        assert causes(full(roll_out(engine_shift=0.2))) == ["stale weights"]

    def test_weights_that_differ_less_are_called_quantised(self):
        rng = np.random.default_rng(3)
        out = roll_out(noise=0.1)
        own = 0.05 * rng.normal(size=VOCABULARY)[out["token_ids"].astype(int)]
        out["old_log_probs"] += own * (1 - np.exp(out["old_log_probs"]))
        assert causes(dump_of(out, "token_ids")) == ["quantised rollout"]

    def test_a_mismatch_that_grows_with_the_steps_is_a_missing_sync(self):
        parts = [roll_out(seed, noise=0.02 * (1 + seed), sequences=16) for seed in range(8)]
        out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        step = torch.arange(8).repeat_interleave(16)
        assert causes(full(out, step=step)) == ["weights never synchronised"]

    def test_one_bad_step_is_stale(self):
        parts = [roll_out(s, noise=0.2 if s == 3 else 0.02, sequences=16) for s in range(8)]
        out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        finding = diagnose(full(out, step=torch.arange(8).repeat_interleave(16)))[0]
        assert finding.cause == "stale weights"
        assert "at step 3" in finding.evidence

    def test_mismatch_that_grows_with_age_is_stale(self):
        parts = [roll_out(s, noise=0.02 * (1 + s), sequences=16) for s in range(4)]
        out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        age = torch.arange(4).repeat_interleave(16)
        dump = full(out, step=torch.full((64,), 9), policy_version=9 - age)
        assert causes(dump) == ["stale weights"]

    def test_mismatch_of_some_prompts_is_a_stale_prefix(self):
        out, worse = roll_out(noise=0.02), roll_out(noise=0.1)
        group = np.arange(SEQUENCES) // 4
        affected = group % 4 == 0
        out["old_log_probs"][affected] = worse["old_log_probs"][affected]
        out["rollout_log_probs"][affected] = worse["rollout_log_probs"][affected]
        assert causes(dump_of(out, group=torch.from_numpy(group))) == ["stale prefix cache"]

    def test_prompts_whose_answers_have_one_uncertain_token_each_are_no_error(self):
        certain = torch.arange(64) != torch.arange(256)[:, None] % 16
        rollout = torch.where(certain, -1e-6, -torch.rand(256, 64) - 0.5)
        old = torch.where(certain, -2e-6, rollout + 0.02 * torch.randn(256, 64))
        dump = LogProbDump(
            rollout_log_probs=rollout, old_log_probs=old, mask=rollout < 0,
            group=torch.arange(256) // 32,
        )
        assert "mismatch depends on the prompt" not in patterns(dump)

    def test_prompts_of_two_sizes_are_a_cache_and_prompts_of_many_are_none(self):
        group, found = torch.arange(SEQUENCES) // 4, {"two": 0, "many": 0}
        for seed in range(20):
            rng = np.random.default_rng(seed)
            sizes = {"two": np.where(rng.permutation(16) < 8, 3.0, 1.0),
                     "many": np.exp(0.5 * rng.normal(size=16))}
            for kind, size in sizes.items():
                dump = replace(by_place(0.5 * size.repeat(4)[:, None], seed), group=group)
                found[kind] += "mismatch depends on the prompt" in patterns(dump)
        assert found["two"] >= 18 and found["many"] <= 3

    def test_rare_large_errors_both_ways_are_a_heavy_tail(self):
        out = roll_out()
        rng = np.random.default_rng(1)
        flips = rng.random(out["mass"].shape) < 0.01
        out["old_log_probs"] += flips * rng.normal(size=flips.shape)
        out["old_log_probs"] = np.minimum(out["old_log_probs"], -1e-4)
        assert causes(dump_of(out)) == ["heavy tail, as from MoE routing"]


    def test_coarse_weights_that_flatten_everything_are_no_temperature(self):
        dump = of_contexts(lambda x, rng: 0.75 * x + 1.2 * rng.normal(size=x.shape))
        (finding,) = diagnose(dump)
        assert finding.pattern == UNEXPLAINED and known.QUANTISED in finding.causes

    @pytest.mark.parametrize(
        ("first", "likeliest"),
        [(2.0, known.WRONG_PROMPT), (1.2, known.QUANTISED), (0.5, known.POSITIONS)],
    )
    def test_a_tail_amid_more_than_rounding_is_not_routing_first(self, first, likeliest):
        def engine(logits, rng):
            apart = 0.25 * np.exp(1.2 * rng.normal(size=(*logits.shape[:2], 1)))
            apart[:, :4] *= first
            return logits + apart * rng.normal(size=logits.shape)

        finding, *_ = diagnose(of_contexts(engine))
        assert finding.pattern == HEAVY_TAIL and not finding.correctable
        assert finding.cause == likeliest.name and finding.causes[-1].name == known.ROUTING.name


    def test_a_tail_that_one_engine_has_is_that_engines(self):
        out = roll_out()
        rng = np.random.default_rng(1)
        engine = np.arange(SEQUENCES) % 4
        flips = (rng.random(out["mass"].shape) < 0.03) & (engine == 2)[:, None]
        out["old_log_probs"] += flips * rng.normal(size=flips.shape)
        out["old_log_probs"] = np.minimum(out["old_log_probs"], -1e-4)
        (finding,) = diagnose(dump_of(out, engine=torch.from_numpy(engine)))
        assert finding.cause == known.ONE_ENGINE.name and "of engine 2" in finding.evidence
        assert known.ROUTING.name in [c.name for c in finding.causes]

    @pytest.mark.parametrize(
        ("fall", "likeliest"), [(0.15, known.STALE_WEIGHTS), (0.3, known.WRONG_PROMPT)]
    )
    def test_a_mismatch_that_fades_is_of_contexts_and_no_rounding(self, fall, likeliest):
        finding, *_ = diagnose(by_place((1 + np.arange(LENGTH)) ** -fall))
        assert finding.pattern == "mismatch fades along answers"
        assert finding.cause == likeliest.name
        assert known.SHARED_CACHE.name in [c.name for c in finding.causes]

    @pytest.mark.parametrize("length", [2, 3, 8, 16, 48, LENGTH])
    def test_a_first_token_apart_and_a_mismatch_that_grows_are_rounding(self, length):
        first = np.ones(LENGTH)
        first[0] = 3
        for along in (first, (1 + np.arange(LENGTH)) ** 0.15):
            assert patterns(cut(by_place(along), np.full(SEQUENCES, length))) == [NOISE]

    def test_short_answers_that_differ_more_do_not_make_a_mismatch_fade(self):
        short = np.arange(SEQUENCES) % 4 > 0
        dump = by_place(np.where(short, 1.6, 1.0)[:, None] * np.ones(LENGTH))
        assert patterns(cut(dump, np.where(short, 32, LENGTH))) == [NOISE]

    def test_what_fades_no_less_than_the_null_is_noise(self):
        along = (1 + np.arange(LENGTH)) ** -0.15
        (finding,) = diagnose(by_place(along), null=by_place(along, seed=1))
        assert finding.pattern == NOISE

    def test_an_engine_a_third_further_off_is_told_and_a_turn_is_not(self):
        apart = np.where(np.arange(SEQUENCES) % 4 == 1, 1.4, 1.0)[:, None]
        dump = by_place(apart * np.ones(LENGTH))
        engine = torch.arange(SEQUENCES) % 4
        finding, *_ = diagnose(LogProbDump(**dump.given(), engine=engine))
        assert finding.pattern == "one engine apart from the rest"
        assert "engine 1" in finding.evidence
        turn = (engine == 1).long()[:, None].expand(dump.mask.shape)
        assert patterns(LogProbDump(**dump.given(), turn=turn)) == [NOISE]

    @pytest.mark.parametrize("count", [16, 32, SEQUENCES])
    def test_many_engines_with_few_sequences_each_are_not_apart_by_chance(self, count):
        rng = np.random.default_rng(count)
        levels = np.exp(0.15 * rng.normal(size=(SEQUENCES, 1)))
        dump = by_place(levels * np.ones(LENGTH))
        engine = torch.arange(SEQUENCES) % count
        assert patterns(LogProbDump(**dump.given(), engine=engine)) == [NOISE]

    @pytest.mark.parametrize("reported", [True, False])
    def test_text_that_every_answer_begins_with_was_prescribed(self, reported):
        out = roll_out()
        rng, noise = np.random.default_rng(2), out["rollout_log_probs"] - out["old_log_probs"]
        out["old_log_probs"][:, :12] = -6 - 3 * rng.random((SEQUENCES, 12))
        out["rollout_log_probs"][:, :12] = (out["old_log_probs"] + noise)[:, :12] if reported else 0
        assert causes(full(out))[0] == known.PREFILLED.name

    def test_prompts_whose_first_tokens_are_all_set_aside_say_nothing(self):
        out = roll_out()
        out["rollout_log_probs"][:, :16] = 0
        dump = dump_of(out, "token_ids", group=torch.arange(SEQUENCES) // 4)
        assert causes(dump) == ["forced or prefilled tokens in the mask"]

    def test_weights_that_are_reported_but_not_sampled_from_are_a_drafts(self):
        out, other = roll_out(), np.random.default_rng(5).normal(0, 0.3, VOCABULARY)
        out["rollout_log_probs"] += other[out["token_ids"].astype(int)]
        out["rollout_log_probs"] = np.minimum(out["rollout_log_probs"], -1e-4)
        finding, *_ = diagnose(full(out))
        assert finding.pattern == OTHER_WEIGHTS and not finding.correctable
        assert finding.cause == known.SPECULATIVE.name and "mean ratio is 1 +" in finding.evidence

    def test_stop_tokens_are_named_where_other_zeros_are_certainties(self):
        out = roll_out()
        out["rollout_log_probs"][:, -1] = 0
        for row in range(12):
            out["rollout_log_probs"][row, 5] = 0
            out["old_log_probs"][row, 5] = -1.0
        finding, *_ = diagnose(full(out))
        assert finding.cause == known.STOP_TOKEN.name

    def test_zeros_at_the_end_of_both_turns_are_the_templates(self):
        out = roll_out()
        out["rollout_log_probs"][:, [LENGTH // 2 - 1, LENGTH - 1]] = 0
        turn = (torch.arange(LENGTH) >= LENGTH // 2).long().expand(SEQUENCES, LENGTH)
        finding, *_ = diagnose(full(out, turn=turn))
        assert finding.cause == known.TURN_END.name

    def test_long_runs_of_zeros_amid_sampled_tokens_are_no_greedy_sampler(self):
        out = roll_out()
        out["rollout_log_probs"][:, 5:] = 0
        out["old_log_probs"][:, 5:] -= 3
        finding, *_ = diagnose(full(out))
        assert finding.cause == known.ENVIRONMENT.name


class TestStorage:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("side", ["rollout_log_probs", "old_log_probs"])
    def test_sixteen_bits_are_named_with_side_and_type(self, dtype, side):
        dump = full(roll_out())
        stored = getattr(dump, side).to(dtype).float()
        first = diagnose(LogProbDump(**{**dump.given(), side: stored}))[0]
        assert first.cause == "log-probs stored in 16 bits"
        assert side in first.evidence
        assert str(dtype)[6:] in first.evidence

    def test_a_rounded_head_leaves_a_lattice(self):
        rng = np.random.default_rng(0)
        logits = torch.from_numpy(rng.normal(0, 3, (SEQUENCES, LENGTH, 32))).float()
        rounded = logits.bfloat16().float().log_softmax(-1)
        chosen = torch.from_numpy(rng.integers(0, 32, (SEQUENCES, LENGTH, 1)))
        dump = LogProbDump(
            rollout_log_probs=rounded.gather(2, chosen)[..., 0],
            old_log_probs=logits.log_softmax(-1).gather(2, chosen)[..., 0],
            mask=torch.ones(SEQUENCES, LENGTH) > 0,
            top_k_log_probs=rounded.topk(4).values, top_k_ids=rounded.topk(4).indices,
        )
        assert causes(dump)[0] == "16-bit LM head in the engine"

    def test_an_exact_head_leaves_none(self):
        rng = np.random.default_rng(0)
        exact = torch.from_numpy(rng.normal(0, 3, (SEQUENCES, LENGTH, 32))).float().log_softmax(-1)
        dump = full(roll_out())
        top = exact.topk(4).values
        top = torch.maximum(top, dump.rollout_log_probs[..., None] + top - top[..., :1])
        with_top = LogProbDump(**dump.given(), top_k_log_probs=top)
        assert patterns(with_top) == [NOISE]


class TestEstimates:
    def test_the_error_of_a_mean_is_that_of_a_bootstrap_over_sequences(self):
        rng = np.random.default_rng(0)
        tokens = Tokens.of(full(roll_out()))
        x = rng.normal(size=len(tokens)) + np.repeat(rng.normal(size=SEQUENCES), LENGTH)
        estimate = tokens.mean(x)
        rows = x.reshape(SEQUENCES, LENGTH).mean(1)
        means = [rng.choice(rows, SEQUENCES).mean() for _ in range(2000)]
        assert estimate.value == pytest.approx(rows.mean())
        assert estimate.error == pytest.approx(np.std(means), rel=0.1)

    def test_the_error_of_a_slope_covers_repeated_draws(self):
        slopes, errors = [], []
        tokens = Tokens.of(full(roll_out()))
        for seed in range(200):
            rng = np.random.default_rng(seed)
            x = rng.normal(size=len(tokens))
            y = 0.5 * x + rng.normal(size=len(tokens)) * np.abs(x)
            (slope,), _ = tokens.regress(y, x)
            slopes.append(slope.value)
            errors.append(slope.error)
        assert np.mean(slopes) == pytest.approx(0.5, abs=4 * np.std(slopes) / np.sqrt(200))
        assert np.mean(errors) == pytest.approx(np.std(slopes), rel=0.15)

    def test_logit_noise_is_the_median_of_the_noise_put_in(self):
        # Δ log-odds of a token: its own noise, less that of the others, weighted by probability
        out = roll_out(noise=0.05)
        assert 0.6 * 0.05 < Tokens.of(full(out)).logit_noise() < 1.3 * 0.05


class TestCertainty:
    """A policy that is sure of most tokens, whose bits differ by next to nothing there."""

    @pytest.mark.parametrize("ends", [(0.65, 0.35), (0.35, 0.65)])
    def test_entropy_that_moves_over_the_run_is_no_growth_and_no_step_apart(self, ends):
        step = np.arange(SEQUENCES) // 8
        certain = np.interp(step, (0, 7), ends)[:, None]
        dump = of_contexts(identity, certain=certain)
        assert patterns(replace(dump, step=torch.from_numpy(step))) == [NOISE]

    def test_a_mismatch_that_grows_is_told_however_entropy_moves(self):
        step = np.arange(SEQUENCES) // 8
        noise = 0.03 * 1.4 ** step[:, None, None]
        dump = of_contexts(
            lambda x, rng: x + noise * rng.normal(size=x.shape), noise=0,
            certain=np.interp(step, (0, 7), (0.35, 0.65))[:, None],
        )
        dump = replace(dump, step=torch.from_numpy(step))
        assert causes(dump)[0] == "weights never synchronised"
        age = replace(dump, step=torch.full((SEQUENCES,), 9), policy_version=9 - dump.step)
        assert patterns(age)[0] == WITH_AGE

    def test_old_weights_that_meet_certain_tokens_only_are_no_older_for_it(self):
        step = np.arange(SEQUENCES) // 8
        dump = of_contexts(identity, certain=np.interp(step, (0, 7), (0.9, 0.3))[:, None])
        now = torch.full((SEQUENCES,), 9)
        dump = replace(dump, step=now, policy_version=9 - torch.from_numpy(step))
        assert patterns(dump) == [NOISE]

    @pytest.mark.parametrize("steps", [16, 64])
    def test_steps_of_few_uncertain_tokens_tell_nothing(self, steps):
        for seed in range(6):
            dump = cut(of_contexts(identity, seed, certain=0.95), np.full(SEQUENCES, 16))
            step = torch.arange(SEQUENCES) * steps // SEQUENCES
            assert patterns(replace(dump, step=step)) == [NOISE]

    @pytest.mark.parametrize("shape", [(2, 40), (4, 40), (8, 16)])
    @pytest.mark.parametrize("lag", [1, -1, 2])
    def test_shifted_log_probs_of_a_few_answers(self, shape, lag):
        rows, length = shape
        for seed in range(6):
            fields = of_contexts(identity, seed, certain=0.4).given()
            some = {name: x[:rows, :length] for name, x in fields.items() if name != "entropy"}
            some["rollout_log_probs"] = some["rollout_log_probs"].roll(lag, 1)
            assert causes(LogProbDump(**some)) == ["log-probs shifted against each other"]

    @pytest.mark.parametrize("lag", [1, -1, 2])
    def test_shifted_log_probs(self, lag):
        dump = of_contexts(identity, certain=0.8)
        shifted = replace(dump, entropy=None, rollout_log_probs=dump.rollout_log_probs.roll(lag, 1))
        assert causes(shifted) == ["log-probs shifted against each other"]

    @pytest.mark.parametrize("ids", [True, False])
    @pytest.mark.parametrize("seed", range(8))
    def test_prompts_whose_answers_begin_alike_have_no_cache(self, seed, ids):
        dump = of_contexts(identity, seed, certain=0.6)
        fields = dict(dump.given())
        for name in ("rollout_log_probs", "old_log_probs", "token_ids", "entropy"):
            x = fields[name].view(8, 8, LENGTH).clone()
            x[..., :12] = x[:, :1, :12]
            fields[name] = x.view(SEQUENCES, LENGTH)
        if not ids:
            del fields["token_ids"]
        group = torch.arange(SEQUENCES) // 8
        assert "mismatch depends on the prompt" not in patterns(LogProbDump(**fields, group=group))


class TestUnknownEntropy:
    """An entropy that is not finite is unknown, and the others are not."""

    @pytest.mark.parametrize("lost", [float("nan"), float("inf")])
    @pytest.mark.parametrize("change", [
        full,
        lambda out: replace(full(out), entropy=full(out).entropy / np.log(2)),
        lambda out: replace(full(out), varentropy=full(out).varentropy * 3),
        lambda out: replace(full(out), entropy=full(out).entropy.roll(1, 1)),
    ])
    @pytest.mark.parametrize("sampler", [identity, tempered(0.9)])
    def test_one_such_token_changes_no_finding(self, sampler, change, lost):
        dump = change(roll_out(sampler=sampler, report=identity))
        entropy = dump.entropy.clone()
        entropy[3, 5] = lost
        assert causes(replace(dump, entropy=entropy)) == causes(dump)

    @pytest.mark.parametrize("known", [1, 4, 10, 32, 64])
    def test_what_few_sequences_have_hides_no_temperature(self, known):
        dump = full(roll_out(sampler=tempered(0.9)))
        entropy = dump.entropy.clone()
        entropy[known:] = float("nan")
        assert causes(replace(dump, entropy=entropy))[0].startswith("temperature")

    def test_what_is_nowhere_known_is_as_if_it_were_not_there(self):
        dump = dump_of(roll_out(sampler=tempered(0.9)), "entropy", "varentropy")
        lost = replace(dump, entropy=torch.full_like(dump.entropy, float("nan")))
        without = replace(dump, entropy=None, varentropy=None)
        assert causes(lost) == causes(without)


def test_copies_of_a_batch_are_one_batch():
    """Ranks of a tensor-parallel group that all write what they hold."""
    for seed in range(6):
        dump = full(roll_out(seed, sampler=tempered(0.98), report=identity, sequences=32))
        assert patterns(dump) == [NOISE]
        assert summarise([dump] * 8).findings == summarise([dump]).findings


def test_answers_that_are_copies_say_nothing_of_the_prompt():
    torch.manual_seed(0)
    rollout = -torch.rand(32, 32) * 4
    size = torch.where(torch.arange(32)[:, None] < 16, 0.02, 0.2)
    old = (rollout + size * torch.randn(32, 32) * (1 - rollout.exp())).clamp(max=0)
    twice = [x.repeat_interleave(2, 0) for x in (rollout, old, rollout < 1)]
    found = diagnose(LogProbDump(
        rollout_log_probs=twice[0], old_log_probs=twice[1], mask=twice[2],
        group=torch.arange(64) // 2,
    ))
    assert "mismatch depends on the prompt" not in [finding.pattern for finding in found]


class TestAdvice:
    def test_small_kl_needs_no_correction(self):
        advice = advise(full(roll_out(noise=0.004)), samples=64, length=128)
        assert advice[0].action == "No correction is needed"

    def test_rounding_needs_token_weights_from_half_a_nat_and_never_those_of_sequences(self):
        dump = full(roll_out(noise=0.05))
        for length, correction in ((300, ""), (20_000, "token-tis:cap=2")):
            first, *others = advise(dump, samples=64, length=length)
            assert first.correction == correction
            assert (first.action == "No correction is needed for a stable run") == (not correction)
            assert ("would starve" in first.because) == bool(correction)
            assert not any(a.correction.startswith("sequence-") for a in others)
            assert any(a.correction.startswith("geometric-") for a in others)

    def test_other_weights_get_token_weights_and_sequence_weights_where_these_do_not_starve(self):
        dump = full(roll_out(engine_shift=0.2))
        short, long = (advise(dump, samples=64, length=length) for length in (4, 20_000))
        assert short[0].correction == long[0].correction == "token-tis:cap=2"
        assert short[1].correction.startswith("sequence-tis:cap=")
        assert not any(a.correction.startswith("sequence-") for a in long)
        assert not any(a.correction.startswith("geometric-") for a in (*short, *long))

    def test_what_the_errors_have_in_common_stands_beside_the_size(self):
        dump = full(roll_out(engine_shift=0.2))
        first = advise(dump, samples=64, length=128)[0]
        assert f"token {shared_error(dump)['token'].share:.2%} (by chance" in first.because

    def test_a_small_dump_gets_no_advice(self):
        small = full(roll_out(sequences=4))
        far = full(roll_out(sampler=tempered(0.9), sequences=4))
        assert patterns(far) == [UNEXPLAINED]
        for dump in (small, far):
            (advice,) = advise(dump, samples=64, length=128)
            assert advice.action == "The dump is too small to say anything"

    def test_what_tokens_prove_is_told_of_a_small_dump_too(self):
        small = full(roll_out(sequences=4))
        rollout = small.rollout_log_probs.clone()
        rollout[:, 20:60] = 0.0
        (advice,) = advise(replace(small, rollout_log_probs=rollout), samples=64, length=128)
        assert advice.action.startswith("Fix the cause first")

    def test_the_samples_that_weights_leave_are_those_of_the_dump(self):
        dump = full(roll_out(engine_shift=0.2))
        ratio = (dump.old_log_probs - dump.rollout_log_probs).double()
        tokens = ratio.exp().flatten()
        (told,) = {a.because.split(";")[1] for a in advise(dump, samples=64, length=LENGTH)[:1]}
        ess = tokens.sum() ** 2 / tokens.square().sum() / tokens.numel()
        assert f"token weights keep {ess:.1%}" in told
        of_sequences = float((-ratio.sum(1).var()).exp())  # of log-normal weights
        said = float(told.split()[-1].rstrip("%")) / 100
        assert said == pytest.approx(of_sequences, abs=0.01)

    def test_no_advice_says_that_nothing_is_needed_where_something_must_be_mended(self):
        dumps = [
            full(roll_out(sampler=tempered(0.9))), full(roll_out(noise=0.0)),
            full(roll_out(trainer_temperature=0.98)), full(roll_out(sampler=top_p(0.95))),
        ]
        for dump in dumps:
            assert not diagnose(dump)[0].correctable
            for advice in advise(dump, samples=64, length=16):
                assert "No correction" not in advice.action

    def test_every_correction_named_is_one(self):
        for length in (100, 1000, 100_000):
            for advice in advise(full(roll_out(noise=0.3)), samples=8, length=length):
                assert not advice.correction or parse(advice.correction)

    def test_the_geometric_band_scales_with_the_kl(self):
        def width(noise):
            advice = advise(full(roll_out(noise=noise)), samples=8, length=10_000)
            band = next(a for a in advice if a.correction.startswith("geometric"))
            bound = parse(band.correction).reject[0]
            return np.log(bound.high / bound.low)

        assert width(0.1) == pytest.approx(2 * width(0.05), rel=0.1)

    def test_a_wrong_setting_is_to_be_fixed_and_not_corrected(self):
        advice = advise(full(roll_out(sampler=tempered(0.9))), samples=64, length=128)
        assert len(advice) == 1
        assert advice[0].action.startswith("Fix the cause first: temperature")

    def test_staleness_is_corrected(self):
        advice = advise(full(roll_out(engine_shift=0.2)), samples=64, length=128)
        assert advice[0].correction

    def test_a_heavy_tail_is_bounded_even_where_the_kl_is_small(self):
        out = roll_out(noise=0.01)
        rare = np.random.default_rng(1).random(out["mass"].shape) < 0.004
        sign = np.where(np.arange(LENGTH) % 2, 0.69, -1.2)  # so that the mean ratio stays 1
        out["old_log_probs"] = np.minimum(out["old_log_probs"] + sign * rare, 0)
        advice = advise(dump_of(out), samples=64, length=16)
        assert advice[0].action.endswith("bound the token ratios")
        assert advice[0].correction == "token-tis:cap=2"

    def test_every_sentence_has_a_number_beside_it(self):
        for noise in (0.004, 0.05, 0.4):
            for advice in advise(full(roll_out(noise=noise)), samples=64, length=1000):
                assert any(c.isdigit() for c in advice.because)

    def test_nonsense_is_refused(self):
        with pytest.raises(InputError, match="`samples`"):
            advise(full(roll_out()), samples=0, length=1)
        with pytest.raises(InputError, match="`length`"):
            advise(full(roll_out()), samples=1, length=0)


class TestPage:
    PAGE = (Path(__file__).parents[1] / "docs" / "diagnosis.md").read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        "cause", [x for x in vars(known).values() if isinstance(x, Cause)], ids=lambda c: c.name
    )
    def test_every_cause_has_a_control_and_a_row(self, cause):
        assert cause.control
        rows = [line for line in self.PAGE.splitlines() if line.startswith("|")]
        assert any(cause.name in row for row in rows)

    def test_every_pattern_that_a_finding_has_is_among_them(self):
        of_sources = {
            ast.unparse(call.args[0])
            for path in Path(findings.__file__).parent.glob("*.py")
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Finding"
        }
        fixed = {ast.literal_eval(x) for x in of_sources if x.startswith("'") and " if " not in x}
        assert len(fixed) > 20
        named = {HEAD, HEAVY_TAIL, NOISE, IDENTICAL, UNEXPLAINED, OTHER_WEIGHTS, PLATEAU, WITH_AGE}
        of_parts = {f"one {name} apart from the rest" for name in WITHIN if name != "pack"}
        of_parts |= {f"some {name}s apart from the rest" for name in ("sequence", *OF_SEQUENCE)}
        place = "mismatch depends on the place in a packed row"
        assert set(findings.PATTERNS) == fixed | named | of_parts | {place}
        assert len(set(findings.PATTERNS)) == len(findings.PATTERNS)

    def test_every_field_that_a_cause_needs_is_one_of_a_dump(self):
        named = {f.name for f in fields(LogProbDump)}
        for cause in vars(known).values():
            assert not isinstance(cause, Cause) or named.issuperset(cause.needs)
