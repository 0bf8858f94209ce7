import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from iscorrect.cli.main import main
from iscorrect.dumps import LogProbDump, write_dump
from iscorrect.report.changes import Changes, page, write_changes
from iscorrect.report.gather import summarise
from tests.test_report import Page


def some_dump(seed, *, noise=0.05, sequences=60, shared=0.05, length=40):
    """Log-ratios of independent noise and of noise that a sequence's tokens share."""
    g = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(sequences, length, generator=g) * 4 - 1
    apart = noise * torch.randn(sequences, length, generator=g)
    apart = apart + shared * torch.randn(sequences, 1, generator=g)
    lengths = torch.randint(5, length + 1, (sequences, 1), generator=g)
    return LogProbDump(
        rollout_log_probs=rollout, old_log_probs=rollout + apart,
        mask=torch.arange(length) < lengths, engine=torch.arange(sequences) % 2,
    )


def compared(before, after):
    reports = [summarise([dump], corrections=["token-tis:cap=2"]) for dump in (before, after)]
    return Changes.of(*reports)


@pytest.mark.slow
def test_dumps_of_one_stack_differ_no_more_often_than_the_interval_says():
    found = [
        x.verdict != "no difference beyond chance"
        for seed in range(60) for x in compared(some_dump(seed), some_dump(1000 + seed)).metrics
        if x.name == "mismatch/kl_k1"
    ]
    assert sum(found) <= 9  # of 60 at 5 %: more with probability 0.001


def by_prompt(seed, *, groups=16, answers=16, length=64):
    """Prompts whose mismatch is of a size of their own, and several answers to each."""
    rng = np.random.default_rng(seed)
    scale = (0.03 * np.exp(0.5 * rng.standard_normal(groups))).repeat(answers)[:, None]
    shape = groups * answers, length
    rollout = -rng.exponential(size=shape) - 0.1
    old = rollout + scale * rng.standard_normal(shape)
    return LogProbDump(
        rollout_log_probs=torch.from_numpy(rollout), old_log_probs=torch.from_numpy(old),
        mask=torch.ones(shape, dtype=torch.bool),
        log_probs=torch.from_numpy(old + scale * rng.standard_normal(shape)),
        group=torch.arange(groups).repeat_interleave(answers),
    )


def test_answers_to_one_prompt_are_no_evidence_twice():
    pairs = [(by_prompt(seed), by_prompt(1000 + seed)) for seed in range(20)]
    told, without = (
        [
            x.verdict != "no difference beyond chance"
            for a, b in pairs for x in compared(replace(a, **more), replace(b, **more)).metrics
            if x.name == "mismatch/kl_k3"
        ]
        for more in ({}, {"group": None})
    )
    assert sum(told) <= 4  # of 20 at 5 %: more with probability 0.003
    assert sum(without) > 8


def test_a_group_in_several_pieces_is_one():
    dump = by_prompt(0, groups=8, answers=4)
    whole = summarise([dump], corrections=["uncorrected"])
    even = torch.arange(32) % 2 == 0
    parts = summarise([dump.rows(even), dump.rows(~even)], corrections=["uncorrected"])
    named = replace(dump, names={"group": tuple("abcdefgh")})
    texts = summarise([named.rows(even), named.rows(~even)], corrections=["uncorrected"])
    digits = replace(dump, names={"group": tuple("01234567")})
    mixed = summarise([digits.rows(even), dump.rows(~even)], corrections=["uncorrected"])
    for other in (parts, texts, mixed):
        assert other.errors == pytest.approx(whole.errors)
    d = (dump.old_log_probs - dump.rollout_log_probs).view(8, -1)
    k3 = (torch.expm1(d) - d).mean(1)
    assert whole.errors["mismatch/kl_k3"] == pytest.approx(float(k3.std() / 8**0.5))


def test_of_one_group_no_error_is_known():
    report = summarise([by_prompt(0, groups=1)], corrections=["uncorrected"])
    assert report.errors["mismatch/kl_k3"] == math.inf
    changes = Changes.of(report, report)
    assert {x.verdict for x in changes.metrics} == {"not known"}
    assert "inf" not in page(changes).to_markdown({}).split("Findings")[0]


def test_errors_that_ignored_the_sequences_would_not_cover():
    """What the clustering is for: tokens of a sequence share their noise."""
    found = []
    for seed in range(60):
        d = [
            (x.old_log_probs - x.rollout_log_probs)[x.mask].double().numpy()
            for x in (some_dump(seed), some_dump(1000 + seed))
        ]
        error = np.hypot(*(x.std() / len(x) ** 0.5 for x in d))
        found.append(abs(d[0].mean() - d[1].mean()) > 1.96 * error)
    assert sum(found) > 20


def test_a_difference_is_told_with_its_sign_and_its_interval():
    before, after = some_dump(0, noise=0.05), some_dump(1, noise=0.15)
    changes = {x.name: x for x in compared(before, after).metrics}
    k3 = changes["mismatch/kl_k3"]
    assert k3.verdict == "larger"
    d = [(x.old_log_probs - x.rollout_log_probs)[x.mask].double() for x in (before, after)]
    means = [float((torch.expm1(x) - x).mean()) for x in d]
    assert (k3.before, k3.after) == pytest.approx(means, rel=1e-4)
    assert k3.low < k3.difference < k3.high
    back = {x.name: x for x in compared(after, before).metrics}["mismatch/kl_k3"]
    assert (back.verdict, back.low) == ("smaller", pytest.approx(-k3.high))


def rescored(dump, seed, *, noise):
    """The same sequences under a trainer with other noise."""
    g = torch.Generator().manual_seed(seed)
    other = dump.old_log_probs + noise * torch.randn(dump.mask.shape, generator=g)
    return replace(dump, old_log_probs=other)


@pytest.mark.parametrize("ids", [True, False])
def test_the_same_sequences_are_compared_in_pairs_in_any_order_and_pieces(ids):
    dump = some_dump(3, shared=0.3)
    if ids:
        dump = replace(dump, token_ids=torch.randint(0, 99, dump.mask.shape))
    other = rescored(dump, 4, noise=0.02)
    changes = compared(dump, other)
    assert changes.paired
    k1 = changes.metrics[0]
    d = [torch.where(x.mask, x.rollout_log_probs - x.old_log_probs, 0).double()
         for x in (dump, other)]
    moved = d[1].sum(1) - d[0].sum(1)
    tokens = dump.mask.sum(1)
    residual = moved - moved.sum() / tokens.sum() * tokens
    error = float(residual.square().sum().sqrt() * (60 / 59) ** 0.5 / tokens.sum())
    assert k1.high - k1.low == pytest.approx(2 * 2.001 * error, rel=1e-3)
    apart = np.hypot(*(x.errors["mismatch/kl_k1"] for x in (changes.before, changes.after)))
    assert error < apart / 5
    shuffled = other.rows(torch.randperm(60))
    pieces = summarise([shuffled.rows(slice(0, 7)), shuffled.rows(slice(7, 60))], corrections=[])
    again = Changes.of(changes.before, pieces)
    assert again.paired
    assert again.metrics[0].low == pytest.approx(k1.low, rel=1e-3)


@pytest.mark.slow
def test_paired_intervals_cover_what_they_say():
    missed = 0
    for seed in range(60):
        base = some_dump(seed, shared=0.3)
        pair = (rescored(base, 2 * seed + i, noise=0.02) for i in (0, 1))
        changes = compared(*pair)
        missed += changes.paired and changes.metrics[0].verdict != "no difference beyond chance"
    assert missed <= 9


def test_other_sequences_are_not_taken_for_the_same():
    dump = some_dump(5)
    for other in (some_dump(6), dump.rows(slice(0, 59)), replace(dump, mask=dump.mask & (
        torch.arange(40) != 2
    ))):
        assert not compared(dump, other).paired


def test_places_of_both_are_compared_and_others_are_not():
    places = {x.name: x for x in compared(some_dump(0), some_dump(1, noise=0.15)).places}
    assert places["engine 1"].verdict == "larger"
    short = compared(some_dump(0), some_dump(1, length=15)).places
    assert "position 16 to 64" not in {x.name for x in short}


@pytest.mark.parametrize("sequences", [1, 2])
def test_too_few_sequences_tell_nothing(sequences):
    changes = compared(some_dump(0), some_dump(1, noise=1.0, sequences=sequences))
    assert {x.verdict for x in changes.metrics} == {"not known"}
    assert math.isnan(changes.numbers()["mismatch/kl_k3/change/low"])
    assert dict(page(changes).lines)["k3"] == "too few sequences to say whether it changed"
    json.dumps(changes.to_json(), allow_nan=False)


def test_rows_without_a_token_are_no_sequences():
    dumps = [some_dump(seed, sequences=64) for seed in (0, 1)]
    kept = torch.arange(64) < 2
    masked = [replace(dump, mask=dump.mask & kept[:, None]) for dump in dumps]
    assert {x.verdict for x in compared(*masked).metrics} == {"not known"}


def test_the_page_says_no_more_than_the_interval_and_is_well_formed(tmp_path):
    changes = compared(some_dump(0), some_dump(1000))
    lines = dict(page(changes).lines)
    assert lines["k3"].startswith("no difference beyond chance")
    html = Page(page(changes).to_html({"before/ratios": b"png"}))
    assert html.open == []
    assert all(link.startswith("data:") for link in html.links)


def test_the_page_says_pairs_or_independent_and_never_both():
    dump = some_dump(3)
    for after, paired in ((rescored(dump, 1, noise=0.1), True), (some_dump(4), False)):
        text = " ".join(" ".join(map(str, page(compared(dump, after)).blocks(10**4))).split())
        assert ("differences in pairs" in text) == paired
        assert ("As if the two dumps were independent" in text) != paired


def test_an_update_that_neither_dump_holds_was_not_measured(tmp_path, capsys):
    for name in ("a", "b"):
        write_dump(some_dump(len(name)), tmp_path / f"{name}.npz")
    words = ["report", str(tmp_path / "b.npz"), "--against", str(tmp_path / "a.npz"), "--json"]
    assert main([*words, "--fail-if", "policy/kl_k3/change/low>1e9"]) == 1
    assert "was not measured" in capsys.readouterr().err


def test_a_heavy_tail_makes_the_intervals_doubtful():
    heavy = some_dump(2)
    where = torch.rand(heavy.mask.shape, generator=torch.Generator().manual_seed(0)) < 0.02
    far = -torch.empty(heavy.mask.shape).exponential_(0.7, generator=torch.Generator())
    rollout = torch.where(where, heavy.rollout_log_probs + far, heavy.rollout_log_probs)
    heavy = LogProbDump(
        rollout_log_probs=rollout, old_log_probs=heavy.old_log_probs, mask=heavy.mask,
    )
    text = "\n".join(map(str, page(compared(some_dump(0), heavy)).blocks()))
    assert "tail of the ratios is heavy" in text
    calm = "\n".join(map(str, page(compared(some_dump(0), some_dump(1))).blocks()))
    assert "tail of the ratios is heavy" not in calm


class TestCommand:
    @pytest.fixture
    def paths(self, tmp_path):
        for name, noise in (("before", 0.05), ("after", 0.15)):
            write_dump(some_dump(len(name), noise=noise), tmp_path / f"{name}.npz")
        return [str(tmp_path / "after.npz"), "--against", str(tmp_path / "before.npz")]

    @pytest.mark.parametrize("name", ["nope", "nope.npz", "nope.csv"])
    def test_a_dump_that_is_not_there_is_said_not_to_be(self, paths, capsys, name):
        assert main(["report", paths[0], "--against", name]) == 2
        assert f"got {name}, which is not there" in capsys.readouterr().err

    def test_text_and_json_have_both_dumps_and_the_differences(self, paths, capsys):
        assert main(["report", *paths, "--json"]) == 0
        content = json.loads(capsys.readouterr().out)
        assert content["before"]["source"].endswith("before.npz")
        assert content["after"]["source"].endswith("after.npz")
        names = {x["name"] for x in content["changes"]}
        assert {"mismatch/kl_k1", "mismatch/kl_k3", "tail/outside"} <= names

    def test_a_change_beyond_chance_can_fail_a_job(self, paths):
        words = ["report", *paths, "--json", "--fail-if"]
        assert main([*words, "mismatch/kl_k3/change/low>0"]) == 1
        assert main([*words, "mismatch/kl_k3/change/high<0"]) == 0
        assert main(["report", paths[0], "--json", "--fail-if", "mismatch/kl_k3/change/low>0"]) == 2

    @pytest.mark.slow
    def test_one_page_has_the_figures_of_both(self, paths, tmp_path):
        pytest.importorskip("matplotlib")
        assert main(["report", *paths, "--out", str(tmp_path / "out")]) == 0
        out = tmp_path / "out"
        assert (out / "report.html").read_text().count("data:image/png") == 6
        for link in ("before/ratios", "after/positions"):
            assert f"figures/{link}.png" in (out / "report.md").read_text()
            assert (out / "figures" / f"{link}.png").exists()
        assert "Two dumps compared" in (out / "report.md").read_text()


def test_names_from_outside_are_escaped(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reports = [
        summarise([some_dump(seed)], corrections=["icepop"], source="<b>x|y") for seed in (0, 1)
    ]
    assert write_changes(Changes.of(*reports), tmp_path) == []
    assert "<b>x" not in (tmp_path / "report.html").read_text()
    assert r"\<b\>x\|y" in (tmp_path / "report.md").read_text()
