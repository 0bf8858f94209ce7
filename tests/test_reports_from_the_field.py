"""What users of trainers have reported, made here, and what a report has to say of it."""

import html
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_diagnose import LENGTH, SEQUENCES, dump_of, full, roll_out

from iscorrect import token_tis
from iscorrect.diagnose import NOISE, advise, diagnose
from iscorrect.dumps import read_dump
from iscorrect.report.gather import summarise
from iscorrect.report.render import blocks, to_html, to_markdown

DATA = Path(__file__).parent / "data"
CLEAN = roll_out(noise=0.02)


def first(dump):
    return diagnose(dump)[0]


def rivals(finding):
    return [cause.name for cause in finding.causes]


def spoiled(where, value, side="rollout_log_probs"):
    out = {name: x.copy() for name, x in CLEAN.items()}
    out[side][where] = value
    return full(out)


def some(share, seed=2):
    return np.random.default_rng(seed).random((SEQUENCES, LENGTH)) < share


def joined(*parts):
    """The first sequences of one rollout, the rest of another."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class TestStopTokens:
    """SkyRL 2148: the sampled stop token is cut off and put back with log-prob 0."""

    @pytest.mark.parametrize("low", [0.01, 0.55])
    @pytest.mark.parametrize("longest", [32, 128])
    def test_a_placeholder_at_the_end_is_named_by_its_place(self, low, longest):
        rng = np.random.default_rng(1)
        lengths = rng.integers(longest // 2, longest + 1, SEQUENCES)
        out = {name: x.copy() for name, x in CLEAN.items()}
        rows = np.arange(SEQUENCES)
        out["old_log_probs"][rows, lengths - 1] = np.log(low + (0.97 - low) * rng.random(SEQUENCES))
        out["rollout_log_probs"][rows, lengths - 1] = 0
        mask = torch.from_numpy(np.arange(LENGTH) < lengths[:, None])
        finding = first(replace(dump_of(out), mask=mask))
        assert finding.cause == "stop token appended, not sampled"
        assert "in 64 of 64 sequences" in finding.evidence
        assert "100% of them the last token" in finding.evidence
        assert not finding.correctable

    def test_at_the_end_of_turns_it_is_the_template(self):
        ends = np.arange(LENGTH) % 32 == 31
        turn = torch.arange(LENGTH).div(32, rounding_mode="floor").expand(SEQUENCES, LENGTH)
        dump = spoiled((slice(None), ends), 0.0)
        assert first(replace(dump, turn=turn)).cause == "end-of-turn tokens added by the template"
        assert "turn" in first(dump).evidence or rivals(first(dump))[0].startswith("missing")


class TestSentinels:
    """vLLM 11073, 4149: a number in the place of −inf or of nothing."""

    @pytest.mark.parametrize("value", [-9999.0, -100.0, -1.0, 0.2, 1.0])
    @pytest.mark.parametrize("share", [0.002, 0.01])
    def test_a_repeated_value_is_named_with_its_count(self, value, share):
        where = some(share)
        finding = first(spoiled(where, value))
        assert finding.pattern == "one value in many places"
        assert finding.cause == "a sentinel in place of −inf"
        assert f"are {value:.6g} on {where.sum()} tokens" in finding.evidence

    @pytest.mark.parametrize("side", ["rollout_log_probs", "old_log_probs"])
    def test_three_tokens_or_one_are_enough_where_the_value_is_impossible(self, side):
        for count in (1, 3):
            where = np.zeros((SEQUENCES, LENGTH), bool)
            where[5, 10 : 10 + count] = True
            finding = first(spoiled(where, -9999.0, side))
            if count == 3:
                assert "-9999 on 3 tokens" in finding.evidence
            elif side == "rollout_log_probs":
                assert finding.cause == "a sentinel in place of −inf"
                assert "in sequence 5 at token 10" in finding.evidence

    @pytest.mark.parametrize("share", [0.002, 0.01, 0.05])
    @pytest.mark.parametrize("nats", [1.0, 3.0, 8.0, 20.0])
    def test_ratios_too_high_on_some_tokens_are_never_called_noise(self, share, nats):
        by = nats * np.random.default_rng(3).uniform(0.75, 1.25, (SEQUENCES, LENGTH))
        out = {name: x.copy() for name, x in CLEAN.items()}
        out["rollout_log_probs"] -= by * some(share)
        finding = first(full(out))
        assert finding.pattern in (
            "rare large differences of one sign", "more high ratios than a probability allows",
            "mean ratio other than 1",
        )
        assert not finding.correctable

    def test_negative_log_likelihoods_are_above_0(self):
        dump = full(CLEAN)
        dump = replace(dump, rollout_log_probs=-dump.rollout_log_probs)
        assert "negative log-likelihoods in place of log-probs" in rivals(first(dump))


class TestVersions:
    """slime 2092: an answer that was aborted goes on under later weights."""

    OUT = roll_out(engine_shift=0.3, until=48, noise=0.02)

    def test_with_versions_of_tokens_it_is_staleness_by_age(self):
        version = torch.where(torch.arange(LENGTH) < 48, 2, 6).expand(SEQUENCES, LENGTH)
        finding = first(full(self.OUT, version=version, step=torch.full((SEQUENCES,), 6)))
        assert finding.cause == "stale weights"
        assert "4 steps old" in finding.evidence
        assert "several versions" in finding.evidence
        assert finding.correctable

    def test_without_them_it_is_among_the_causes_with_the_field_that_would_tell(self):
        finding = first(full(self.OUT))
        (cause,) = [c for c in finding.causes if c.name == "weight versions inside an answer"]
        assert cause.needs == ("version",)
        assert finding.cause != "wrong prompt template"

    def test_one_version_throughout_is_no_age(self):
        version = torch.full((SEQUENCES, LENGTH), 6)
        dump = full(CLEAN, version=version, step=torch.full((SEQUENCES,), 6))
        assert first(dump).pattern == NOISE


class TestPassesOfTheTrainer:
    """ROLL 284, unsloth 4502: log_probs of the update differ from the trainer's own."""

    def test_two_passes_that_disagree_are_told(self):
        rng = np.random.default_rng(0)
        dump = full(CLEAN)
        wild = dump.old_log_probs + torch.from_numpy(rng.normal(0, 0.4, dump.mask.shape)).float()
        finding = first(replace(dump, log_probs=wild.clamp(max=0)))
        assert finding.cause == "two passes of the trainer that disagree"
        assert "log_probs taken after optimizer steps" in rivals(finding)

    def test_two_passes_that_agree_are_not(self):
        dump = full(CLEAN)
        assert [f.pattern for f in diagnose(replace(dump, log_probs=dump.old_log_probs))] == [NOISE]


class TestBypass:
    """verl 7196: old_log_probs is the engine's, and every mismatch reads 0."""

    def test_nothing_was_measured_and_nothing_is_advised(self):
        dump = full(CLEAN)
        dump = replace(dump, old_log_probs=dump.rollout_log_probs)
        finding = first(dump)
        assert finding.cause == "one side copied from the other"
        assert finding.causes[0].needs == ("log_probs",)
        (advice,) = advise(dump, samples=64, length=128, findings=[finding])
        assert advice.action == "Nothing can be said: the mismatch was not measured"

    def test_the_policy_being_trained_shows_what_the_copy_hides(self):
        dump = full(roll_out(trainer_temperature=0.9))
        hidden = replace(
            dump, old_log_probs=dump.rollout_log_probs, log_probs=dump.old_log_probs
        )
        copied, shown = diagnose(hidden)
        assert copied.cause == "one side copied from the other"
        assert shown.pattern == "log ρ in proportion to log p"


class TestPartsOfTheBatch:
    """miles 1724, NeMo-RL 2100: some sequences come from an engine with other weights."""

    STALE = roll_out(engine_shift=0.3, sequences=8, noise=0.02)
    OUT = joined(STALE, roll_out(noise=0.02, sequences=SEQUENCES - 8))

    def test_sequences_that_stand_apart_are_counted(self):
        finding = first(full(self.OUT))
        assert finding.pattern == "some sequences apart from the rest"
        assert finding.evidence.startswith("8 of 64 sequences")
        assert finding.cause == "one engine or rank of many"
        assert finding.causes[0].needs == ("engine",)
        assert not finding.correctable

    def test_the_engine_is_named_where_the_dump_knows_it(self):
        engine = torch.arange(SEQUENCES) // 8
        dump = full(self.OUT, engine=engine[:, None].expand(SEQUENCES, LENGTH))
        finding = first(dump)
        assert finding.pattern == "one engine apart from the rest"
        assert finding.cause == "one engine or rank of many"
        assert "engine 0" in finding.evidence

    def test_an_engine_like_the_others_is_not(self):
        engine = (torch.arange(SEQUENCES) // 8)[:, None].expand(SEQUENCES, LENGTH)
        assert first(full(CLEAN, engine=engine)).pattern == NOISE

    @pytest.mark.parametrize("sd", [0.3, 1.0, 3.0])
    def test_so_are_sequences_with_larger_errors(self, sd):
        rng = np.random.default_rng(4)
        apart = rng.random(SEQUENCES) < 0.17
        out = {name: x.copy() for name, x in CLEAN.items()}
        old = out["old_log_probs"]
        moved = old + sd * rng.normal(size=old.shape) * (1 - np.exp(old)) * apart[:, None]
        out["old_log_probs"] = np.where(moved < 0, moved, -0.01 * rng.random(moved.shape))
        finding = first(dump_of(out, "token_ids"))
        assert not finding.correctable
        assert "sequences" in finding.evidence


class TestPlaces:
    def test_a_packed_row_that_leaks_differs_behind_its_first_sequence(self):
        out = {name: x.copy() for name, x in CLEAN.items()}
        pack = np.broadcast_to(np.arange(SEQUENCES)[:, None] % 4, out["mass"].shape)
        rng = np.random.default_rng(5)
        out["old_log_probs"] += (pack > 1) * rng.normal(0, 0.1, pack.shape) * (
            1 - np.exp(out["old_log_probs"])
        )
        dump = dump_of(out, pack=torch.from_numpy(pack.copy()))
        assert first(dump).cause == "state that leaks between neighbours of a packed row"

    def test_later_turns_that_differ_are_histories(self):
        out = {name: x.copy() for name, x in CLEAN.items()}
        turn = np.broadcast_to(np.arange(LENGTH) // 64, out["mass"].shape)
        rng = np.random.default_rng(5)
        out["old_log_probs"] += (turn > 0) * rng.normal(0, 0.1, turn.shape) * (
            1 - np.exp(out["old_log_probs"])
        )
        dump = dump_of(out, turn=torch.from_numpy(turn.copy()))
        assert first(dump).cause == "conversation histories rendered differently"
        finding = first(replace(dump, turn=None))
        assert finding.pattern == "mismatch depends on the position"
        assert "conversation histories rendered differently" in rivals(finding)

    def test_a_part_that_is_equal_to_the_bit_was_copied(self):
        same = some(0.2)
        out = {name: x.copy() for name, x in CLEAN.items()}
        out["old_log_probs"][same] = out["rollout_log_probs"][same]
        finding = first(dump_of(out))
        assert finding.pattern == "a part of the log-probs is equal to the bit"
        assert finding.cause == "one side copied from the other"


class TestFieldsAgainstEachOther:
    TOP = 8

    def with_candidates(self, change=lambda top, rollout: (top, rollout)):
        """Candidates of which the sampled token is one of the first two, or none."""
        rng = np.random.default_rng(0)
        dump = full(CLEAN)
        rollout = dump.rollout_log_probs
        best = torch.maximum(rollout, rollout * 0 - 1.0)
        listed = torch.where(rollout < -1, rollout, rollout - 1)
        top = torch.stack([best, listed], dim=-1)
        other = torch.from_numpy(rng.integers(100, 200, dump.mask.shape))
        first_is_sampled = rollout >= -1
        ids = torch.stack([
            torch.where(first_is_sampled, dump.token_ids, other),
            torch.where(first_is_sampled, other, dump.token_ids),
        ], dim=-1)
        top, rollout = change(top, rollout)
        return replace(dump, top_k_ids=ids, top_k_log_probs=top, rollout_log_probs=rollout)

    def test_candidates_that_agree_are_silent(self):
        assert [f.pattern for f in diagnose(self.with_candidates())] == [NOISE]

    def test_the_first_candidates_log_prob_is_not_the_sampled_tokens(self):
        finding = first(self.with_candidates(lambda top, rollout: (top, top[..., 0])))
        assert finding.pattern == "candidates that contradict the sampled token"
        assert finding.cause == "log-probs of another candidate of the position"

    def test_candidates_before_the_temperature_are_no_values_of_the_sampled_token(self):
        finding = first(self.with_candidates(lambda top, rollout: (top * 0.8, rollout)))
        assert finding.cause.startswith("candidates reported before temperature")

    def test_an_entropy_of_the_next_token_is_the_finding(self):
        dump = full(CLEAN)
        moved = replace(dump, entropy=dump.entropy.roll(-1, dims=1))
        assert first(moved).cause == "entropy of another position"

    @pytest.mark.parametrize("factor", [1 / np.log(2), 0.0, -1.0])
    def test_an_entropy_of_other_units_or_sign_is_the_finding(self, factor):
        dump = full(CLEAN)
        finding = first(replace(dump, entropy=dump.entropy * factor, varentropy=None))
        assert "entropy in other units or of other logits" in rivals(finding)

    def test_a_varentropy_that_is_no_such_thing_is_the_finding(self):
        dump = full(CLEAN)
        finding = first(replace(dump, varentropy=dump.varentropy.sqrt() * 0.1))
        assert finding.pattern == "varentropy that contradicts entropy and log-probs"


class TestSteps:
    @staticmethod
    def over(levels):
        parts = [roll_out(s, noise=level, sequences=16) for s, level in enumerate(levels)]
        step = torch.arange(len(levels)).repeat_interleave(16)
        return dump_of(joined(*parts), step=step)

    def test_growth_to_a_plateau_is_a_number_format_that_swallows_updates(self):
        levels = [0.02, 0.04, 0.08, 0.15, 0.2, 0.2, 0.21, 0.2, 0.2, 0.19]
        finding = first(self.over(levels))
        assert finding.cause == "updates lost in the engine's number format"
        assert "weights never synchronised" in rivals(finding)

    def test_growth_to_the_end_is_a_missing_sync(self):
        finding = first(self.over([0.02 * 1.4**k for k in range(8)]))
        assert finding.cause == "weights never synchronised"
        assert "updates lost in the engine's number format" in rivals(finding)

    def test_a_level_that_stays_is_noise(self):
        assert first(self.over([0.02] * 10)).pattern == NOISE


class TestARealLanguageModel:
    """SmolLM2-135M behind vLLM at temperature 0.9, raw log-probs; the trainer at 0.9 as well."""

    def test_the_temperature_comes_first_and_no_token_is_called_foreign(self):
        dump = read_dump(DATA / "real_llm_raw_temperature.npz")
        finding = first(dump)
        assert finding.cause == "temperature: raw log-probs reported, tempered sampler and trainer"
        assert abs(finding.statistic - 0.1) < 0.01
        assert "environment tokens in the mask" not in rivals(finding)


def test_weights_of_a_placeholder_are_why_it_has_to_be_found():
    dump = spoiled(some(0.01), -100.0)
    weights = token_tis()(
        old_log_probs=dump.old_log_probs, rollout_log_probs=dump.rollout_log_probs, mask=dump.mask
    ).weights
    assert (weights[dump.rollout_log_probs == -100] == 2).all()


class TestForms:
    """A reader sees the pattern, the numbers, and each cause with its control."""

    REPORT = summarise([full(TestPartsOfTheBatch.OUT)])

    @pytest.mark.parametrize("form", [
        lambda r: "\n".join(b for b in blocks(r, 10_000) if isinstance(b, str)),
        to_markdown, lambda r: to_html(r, {}),
    ])
    def test_every_rival_stands_there_with_its_control_and_what_the_dump_lacks(self, form):
        text = html.unescape(form(self.REPORT))
        (finding,) = self.REPORT.findings
        assert finding.pattern in text
        for number, cause in enumerate(finding.causes, 1):
            assert f"{number}. {cause.name}: {cause.control}" in text
        assert "(a dump that holds engine would decide it)" in text

    def test_json_holds_the_causes_in_order(self):
        (found,) = self.REPORT.to_json()["findings"]
        assert [c["name"] for c in found["causes"]] == rivals(self.REPORT.findings[0])
        assert found["correctable"] is False
