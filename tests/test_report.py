import csv
import html.parser
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from iscorrect import InputError, Layout, parse
from iscorrect.cli.main import main
from iscorrect.dumps import (
    DumpWriter,
    LogProbDump,
    Tokens,
    concatenate,
    read_dump,
    write_dump,
)
from iscorrect.loss.ratios import at_level, units
from iscorrect.report.gather import CORRECTIONS, summarise
from iscorrect.report.limits import broken, check_thresholds
from iscorrect.report.pages import plain_in_markdown
from iscorrect.report.render import blocks, headline, tables, to_html, to_markdown, write_report
from iscorrect.report.sums import SAMPLE, Sums, student


def some_dump(sequences=40, length=50, seed=0, noise=0.2):
    g = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(sequences, length, generator=g) * 4 - 0.1
    noise = noise * torch.randn(sequences, length, generator=g)
    lengths = torch.randint(10, length + 1, (sequences, 1), generator=g)
    return LogProbDump(
        rollout_log_probs=rollout, old_log_probs=(rollout + noise).clamp(max=0),
        mask=torch.arange(length) < lengths, step=torch.arange(sequences) // 10,
    )


def report_main(*argv):
    return main(["report", *map(str, argv)])


@pytest.fixture
def path(tmp_path):
    write_dump(some_dump(), tmp_path / "dump.npz")
    return tmp_path / "dump.npz"


class TestNumbers:
    def test_headline_metrics_are_those_of_numpy(self):
        dump = some_dump()
        mask = dump.mask.numpy()
        old, rollout = dump.old_log_probs.double().numpy(), dump.rollout_log_probs.double().numpy()
        d = (old - rollout)[mask]
        m = summarise([dump]).metrics
        assert m["batch/tokens"] == mask.sum()
        assert m["mismatch/kl_k1"] == pytest.approx(-d.mean(), rel=1e-5)
        assert m["mismatch/kl_k3"] == pytest.approx((np.exp(d) - 1 - d).mean(), rel=1e-5)
        assert m["mismatch/chi2/token"] == pytest.approx(((np.exp(d) - 1) ** 2).mean(), rel=1e-5)
        p, q = np.exp(rollout[mask]), np.exp(old[mask])
        assert m["mismatch/pearson"] == pytest.approx(np.corrcoef(p, q)[0, 1], rel=1e-6)
        assert m["mismatch/sequence_slope"] == pytest.approx(1000 * d.mean(), rel=1e-5)
        assert m["tail/outside"] == pytest.approx((np.abs(d) > np.log(2)).mean())

    def test_sequences_of_one_length_have_the_slope_of_their_mean(self):
        dump = some_dump()
        even = replace(dump, mask=torch.ones_like(dump.mask))
        d = (dump.old_log_probs - dump.rollout_log_probs).double()
        slope = summarise([even]).metrics["mismatch/sequence_slope"]
        assert slope == pytest.approx(1000 * float(d.mean()), rel=1e-5)

    @pytest.mark.parametrize("name", [*CORRECTIONS, "geometric-rs:low=0.9,high=1.1"])
    def test_each_correction_is_that_of_one_call_and_its_bias_mass_that_of_numpy(self, name):
        dump = some_dump()
        out = parse(name)(
            old_log_probs=dump.old_log_probs, rollout_log_probs=dump.rollout_log_probs,
            mask=dump.mask,
        )
        row = summarise([dump], corrections=[name]).corrections[name]
        for key, value in out.metrics.to_floats().items():
            if key.startswith("is/"):
                assert row[key] == pytest.approx(value, rel=1e-5), key
        layout = Layout(dump.mask)
        d = torch.where(dump.mask, dump.old_log_probs - dump.rollout_log_probs, 0)
        level = parse(name).level
        ones = units(layout, level)
        rho = at_level(d, layout, level).exp()[ones]
        assert row["is/bias_mass"] == pytest.approx(
            float((rho - out.weights[ones]).abs().mean()), rel=1e-4
        )

    def test_pieces_give_what_the_whole_gives(self):
        parts = [some_dump(seed=seed, length=20 + 10 * seed) for seed in range(4)]
        apart, together = summarise(parts), summarise([concatenate(parts)])
        assert apart.metrics == pytest.approx(together.metrics, rel=1e-5)
        for name in CORRECTIONS:
            assert apart.corrections[name] == pytest.approx(together.corrections[name], rel=1e-5)
        for a, b in zip(apart.places, together.places, strict=True):
            assert a["place"] == b["place"]
            assert a["kl_k3"] == pytest.approx(b["kl_k3"], rel=1e-5)

    def test_places_add_up_to_the_whole(self):
        report = summarise([some_dump()])
        for kind in ("position", "length", "rollout probability", "step"):
            rows = [row for row in report.places if row["place"].startswith(kind)]
            assert sum(row["tokens"] for row in rows) == pytest.approx(1)
            total = sum(row["tokens"] * row["kl_k3"] for row in rows)
            assert total == pytest.approx(report.metrics["mismatch/kl_k3"], rel=1e-4)

    def test_the_groups_that_differ_most_are_listed_first(self):
        dump = some_dump()
        group = torch.arange(40) // 4
        old = torch.where((group == 6)[:, None], dump.old_log_probs - 1, dump.old_log_probs)
        report = summarise([replace(dump, old_log_probs=old, group=group)])
        listed = [row["place"] for row in report.places if row["place"].startswith("group")]
        assert len(listed) == 5
        assert listed[0] == "group 6"

    def test_of_many_steps_the_worst_are_listed(self):
        dump = some_dump(sequences=200)
        noisy = torch.where(torch.arange(200)[:, None] == 150, dump.old_log_probs - 1, 0)
        old = torch.where(noisy != 0, noisy, dump.old_log_probs)
        report = summarise([replace(dump, old_log_probs=old, step=torch.arange(200))])
        listed = [row["place"] for row in report.places if row["place"].startswith("step")]
        assert len(listed) == 12
        assert "step 150" in listed

    def test_values_outside_the_mask_never_leak(self):
        dump = some_dump()
        old = torch.where(dump.mask, dump.old_log_probs, torch.nan)
        spoiled = replace(dump, old_log_probs=old)
        assert summarise([spoiled]).metrics == summarise([dump]).metrics


    def test_errors_are_those_of_a_bootstrap_over_sequences(self):
        g = torch.Generator().manual_seed(1)
        dump = some_dump(sequences=200)
        shift = 0.2 * torch.randn(200, 1, generator=g)  # shared by the tokens of a sequence
        dump = replace(dump, old_log_probs=(dump.old_log_probs + shift).clamp(max=0))
        d = torch.where(dump.mask, dump.old_log_probs - dump.rollout_log_probs, 0).double()
        sums, counts = d.sum(1), dump.mask.sum(1)
        drawn = torch.randint(200, (4000, 200), generator=g)
        bootstrapped = (sums[drawn].sum(1) / counts[drawn].sum(1)).std()
        errors = summarise([dump]).errors
        assert errors["mismatch/kl_k1"] == pytest.approx(float(bootstrapped), rel=0.1)
        assert errors["mismatch/sequence_slope"] == pytest.approx(1000 * errors["mismatch/kl_k1"])

    def test_the_error_of_a_place_is_that_of_its_tokens_alone(self):
        dump = some_dump()
        step = next(row for row in summarise([dump]).places if row["place"] == "step 1")
        alone = Tokens.of(dump.rows(dump.step == 1))
        expected = alone.mean(alone.k3)
        assert (step["kl_k3"], step["error"]) == pytest.approx(expected, rel=1e-9)
        ratio = np.exp(alone.d)
        assert step["ess"] == pytest.approx(ratio.mean() ** 2 / (ratio**2).mean(), rel=1e-9)
        assert step["sequences"] == 10

    def test_places_are_told_apart_by_every_unit_and_by_age(self):
        dump = some_dump()
        t = torch.arange(50).expand(40, 50)
        units = replace(
            dump, version=dump.step[:, None] - (t < 20).long(), turn=t // 30, engine=t % 2,
            pack=torch.arange(40) % 3, names={"engine": ("host-a", "host-b")},
        )
        noisy = torch.where(t < 20, units.old_log_probs - 1, units.old_log_probs)
        report = summarise([replace(units, old_log_probs=noisy)])
        places = {row["place"]: row for row in report.places}
        assert {"engine host-a", "turn 1", "pack 2", "age 0", "age 1", "version 3"} <= set(places)
        assert places["age 1"]["kl_k3"] > 5 * places["age 0"]["kl_k3"]
        ages = [row for name, row in places.items() if name.startswith("age")]
        assert sum(row["tokens"] for row in ages) == pytest.approx(1)

    def test_many_places_are_counted_in_bounded_memory(self, monkeypatch):
        dump = replace(some_dump(), version=torch.arange(2000).view(40, 50))
        one = summarise([dump])
        monkeypatch.setattr("iscorrect.report.sums.CELLS", 10)
        other = summarise([dump])
        assert [p["place"] for p in one.places] == [p["place"] for p in other.places]
        assert [p["kl_k3"] for p in one.places] == pytest.approx([p["kl_k3"] for p in other.places])

    def test_growth_is_the_factor_of_the_line_over_the_steps(self):
        g = torch.Generator().manual_seed(0)
        step = torch.arange(10).repeat_interleave(40)
        rollout = -1 - torch.rand(400, 30, generator=g)
        noise = 0.02 * 2 ** (step / 3)[:, None] * torch.randn(400, 30, generator=g)
        sums = Sums()
        sums.add(Tokens.of(LogProbDump(
            rollout_log_probs=rollout, old_log_probs=rollout + noise, mask=rollout < 0, step=step,
        )))
        growth = sums.growth()
        assert growth["mismatch/growth"] == pytest.approx(4**3, rel=0.2)
        assert growth["mismatch/growth/low"] < 4**3 < growth["mismatch/growth/high"]
        steady = Sums()
        steady.add(Tokens.of(some_dump(400)))
        assert steady.growth()["mismatch/growth/low"] < 1 < steady.growth()["mismatch/growth/high"]

    @pytest.mark.parametrize(("degrees", "table"), [(3, 3.182), (5, 2.571), (20, 2.086)])
    def test_half_an_interval_is_students(self, degrees, table):
        assert student(degrees) == pytest.approx(table, rel=0.01)

    def test_the_policy_being_trained_and_the_candidates_are_measured(self):
        dump = some_dump()
        ids = torch.zeros(40, 50, dtype=torch.long)
        listed = torch.arange(50).expand(40, 50) % 4 != 0
        report = summarise([replace(
            dump, log_probs=dump.old_log_probs - 0.5, token_ids=ids,
            top_k_ids=torch.where(listed, 0, 1)[..., None],
            top_k_log_probs=dump.rollout_log_probs[..., None],
        )])
        assert report.metrics["policy/log_prob_diff/mean"] == pytest.approx(0.5, rel=1e-5)
        share = float(listed[dump.mask].float().mean())
        assert report.metrics["candidates/listed"] == pytest.approx(share)
        assert "policy being trained" in dict(headline(report))["update"]

    def test_tokens_without_a_log_prob_are_counted_and_change_nothing_else(self):
        dump = some_dump()
        bad = dump.mask & (torch.arange(50) == 3)
        masked = summarise([replace(dump, mask=dump.mask & ~bad)])
        for value in (torch.nan, -torch.inf):
            rollout = torch.where(bad, value, dump.rollout_log_probs)
            report = summarise([replace(dump, rollout_log_probs=rollout)])
            assert report.metrics["batch/nonfinite"] == 40
            for name in ("mismatch/kl_k1", "mismatch/kl_k3", "tail/outside"):
                assert report.metrics[name] == pytest.approx(masked.metrics[name]), name
            assert "40 of them without a finite log-prob" in dict(headline(report))["dump"]


class TestSample:
    def test_a_large_dump_is_sampled_uniformly_and_in_bounded_size(self):
        def pieces():
            for step in range(40):
                ones = torch.ones(64, 1024, dtype=torch.bool)
                rollout = (-1.0 - step / 40 - torch.arange(64)[:, None] / 1e4).expand(64, 1024)
                yield LogProbDump(
                    rollout_log_probs=rollout, old_log_probs=rollout - 1e-3, mask=ones,
                    step=torch.full((64,), step),
                )

        report = summarise(pieces(), corrections=["uncorrected"])
        assert report.sequences == 40 * 64
        assert SAMPLE / 4 < len(report.sample) <= SAMPLE
        counts = np.bincount(report.sample.step, minlength=40)
        expected = counts.mean()
        assert (counts > 0).all()
        assert ((counts - expected) ** 2).sum() / expected < 80  # χ² with 39 degrees, beyond 0.9999

    def test_a_small_dump_is_kept_whole(self):
        dump = some_dump()
        assert len(summarise([dump]).sample) == dump.num_tokens


class TestEveryDump:
    def test_a_step_and_a_version_without_counted_tokens_do_no_harm(self):
        dump = some_dump()
        mask = dump.mask & (dump.step != 2)[:, None]
        report = summarise([replace(dump, mask=mask, policy_version=dump.step, group=dump.step)])
        places = [row["place"] for row in report.places]
        assert "step 1" in places
        assert "version 1" in places
        assert not {"step 2", "version 2", "group 2"} & set(places)
        assert report.sequences == 40

    @pytest.mark.parametrize("tokens", [1, 2])
    def test_what_so_few_tokens_cannot_tell_is_said_not_to_be_measured(self, tokens):
        one = -torch.rand(tokens, 1)
        report = summarise([LogProbDump(
            rollout_log_probs=one, old_log_probs=one - 0.01, mask=one < 0
        )])
        text = "\n".join(map(str, blocks(report)))
        assert "not measured: too few different ratios" in text
        assert "unreliable" not in text
        assert "nan" not in text

    def test_a_field_that_only_some_files_have_is_named(self):
        report = summarise([some_dump(), replace(some_dump(seed=1), step=None)])
        assert report.notes == ["Not in every part of the dump, and so not used for causes: step."]
        assert report.notes[0] in to_html(report, {})
        assert report.notes[0] in to_markdown(report)
        assert report.notes[0] in map(str, blocks(report))

    def test_an_entropy_that_is_not_finite_is_counted(self):
        dump = some_dump()
        entropy = torch.ones_like(dump.old_log_probs)
        entropy[3, :5] = float("nan")
        report = summarise([replace(dump, entropy=entropy)])
        assert report.notes == [
            "The entropy of 5 counted tokens is not finite; what needs it leaves them out."
        ]

    def test_copies_of_a_batch_are_named_and_count_once(self):
        dump = replace(some_dump(), step=None)
        once, copied = summarise([dump]), summarise([dump] * 4)
        assert copied.notes == [
            "Each sequence is there 4 times, to the bit, as where all ranks that hold it write it."
            " Causes and advice rest on one of each."
        ]
        assert (copied.findings, copied.advice) == (once.findings, once.advice)
        assert broken(["finding"], summarise([dump.rows(torch.arange(6))] * 4))
        for name, error in once.errors.items():
            assert copied.errors[name] == pytest.approx(error)

    def test_rollouts_of_two_steps_are_no_copies(self):
        dump = some_dump()
        later = replace(dump, step=dump.step + 9, old_log_probs=dump.old_log_probs - 0.1)
        report = summarise([dump, later])
        assert report.notes == []
        assert len(report.sample) == 2 * int(dump.mask.sum())

    def test_a_constant_side_makes_no_copies(self):
        dump = some_dump()
        same = replace(dump, rollout_log_probs=torch.zeros_like(dump.rollout_log_probs))
        assert summarise([same]).notes == []

    def test_an_update_is_of_one_step_where_steps_are_known(self):
        dump = some_dump(sequences=80, noise=0.02)
        (advice, *_) = summarise([dump]).advice
        assert "in a batch of 10" in advice.because
        assert "in a batch of 80" in summarise([replace(dump, step=None)]).advice[0].because

    def test_a_sequence_longer_than_the_sample_is_a_sample_of_its_own(self):
        one = -torch.rand(1, SAMPLE + 1) - 0.1
        longest = LogProbDump(rollout_log_probs=one, old_log_probs=one - 0.01, mask=one < 0)
        report = summarise([longest], corrections=["uncorrected"])
        assert len(report.sample) == report.metrics["batch/tokens"] == SAMPLE + 1

    @pytest.mark.slow
    def test_the_tokens_of_a_dump_are_taken_once(self, tmp_path, monkeypatch):
        taken = []
        of = Tokens.of
        monkeypatch.setattr(Tokens, "of", lambda dump: taken.append(dump) or of(dump))
        write_report(summarise([some_dump()]), tmp_path)
        assert len(taken) == 1

    def test_a_sample_of_ragged_sequences_has_the_findings_of_the_whole(self):
        dump = some_dump()
        parts = [dump.rows(slice(i, i + 1)) for i in range(40)]
        apart, together = summarise(parts), summarise([dump])
        assert apart.findings == together.findings
        assert apart.advice == together.advice


class Page(html.parser.HTMLParser):
    """Collects tags and what they refer to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


class TestForms:
    def test_every_form_holds_the_same_rows(self):
        report = summarise([some_dump()])
        markdown, page = to_markdown(report), to_html(report, {})
        for _, text in headline(report):
            assert text in markdown
        for table in tables(report):
            for row in table.rows:
                assert plain_in_markdown(row[0]) in markdown
        assert page.count("<tr>") == sum(1 + len(table.rows) for table in tables(report))

    def test_the_page_is_well_formed_and_needs_no_other_file(self):
        page = Page(to_html(summarise([some_dump()]), {"ratios": b"png"}))
        assert page.open == []
        assert all(link.startswith("data:") for link in page.links)
        assert "script" not in page.tags

    def test_names_from_outside_are_escaped(self):
        report = summarise([some_dump()], source="<script>alert(1)</script>![x](y)|`z`")
        assert "<script>" not in to_html(report, {})
        markdown = to_markdown(report)
        assert r"\<script\>alert(1)\</script\>\!\[x\](y)\|\`z\`" in markdown

    def test_names_of_engines_are_escaped_wherever_they_stand(self, tmp_path):
        torch.manual_seed(0)
        rollout = -torch.rand(64, 64) * 4 - 2
        own = (torch.arange(64) % 4 == 0)[:, None]
        name = "<img src=x>|[x](http://e)\x1b[31m\n# hi"
        path = DumpWriter(tmp_path).write(
            step=0, mask=rollout < 1, rollout_log_probs=rollout,
            old_log_probs=rollout + torch.where(own, 0.3, 0.02) * torch.randn(64, 64),
            engine=[name if odd else "plain" for odd in own[:, 0]],
        )
        report = summarise([read_dump(path)])
        text = "\n".join(map(str, blocks(report)))
        assert "\\x1b" in text
        for shown in (text, to_markdown(report), to_html(report, {})):
            assert "\x1b" not in shown and "\n# hi" not in shown
        assert not re.search(r"(?<!\\)(<img|\]\(http)", to_markdown(report))

    def test_json_has_no_nan(self):
        dump = some_dump()
        same = replace(dump, old_log_probs=dump.rollout_log_probs)
        text = json.dumps(summarise([same]).to_json(), allow_nan=False)
        assert json.loads(text)["findings"][0]["pattern"].startswith("log-probs of both sides")


class TestCommand:
    @pytest.mark.slow
    def test_it_writes_the_page_the_numbers_and_every_figure_three_times(self, path, tmp_path):
        pytest.importorskip("matplotlib")
        assert report_main(path, "--out", tmp_path / "out") == 0
        out = tmp_path / "out"
        assert {p.name for p in out.iterdir()} == {
            "report.html", "report.md", "metrics.json", "figures"
        }
        names = {p.stem for p in (out / "figures").iterdir()}
        assert len(names) == 8
        for name in names:
            assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            assert "<svg" in (out / "figures" / f"{name}.svg").read_text()
            with (out / "figures" / f"{name}.csv").open() as file:
                assert len(list(csv.reader(file))) > 1
        assert (out / "report.html").read_text().count("data:image/png") == 8
        links = re.findall(r"\]\((figures/\w+\.png)\)", (out / "report.md").read_text())
        assert len(links) == 8
        assert all((out / link).exists() for link in links)

    @pytest.mark.slow
    def test_text_goes_to_stdout_and_prose_to_stderr(self, path, tmp_path, capsys):
        report_main(path, "--out", tmp_path / "out")
        captured = capsys.readouterr()
        for word in ("mismatch", "Findings", "What each correction would do", "token-tis:cap=2"):
            assert word in captured.out
        assert "written to" in captured.err

    def test_json_on_stdout_is_metrics_json_and_writes_nothing(
        self, path, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        before = set(tmp_path.iterdir())
        assert report_main(path, "--json", "--correction", "token-tis:cap=3") == 0
        content = json.loads(capsys.readouterr().out)
        assert list(content["corrections"]) == ["token-tis:cap=3"]
        assert set(tmp_path.iterdir()) == before

    def test_a_threshold_that_breaks_exits_with_1_and_says_the_value(self, path, capsys):
        assert report_main(path, "--json", "--fail-if", "mismatch/kl_k3>0.0001") == 1
        assert "mismatch/kl_k3>0.0001 (it is 0.0" in capsys.readouterr().err
        assert report_main(path, "--json", "--fail-if", "mismatch/kl_k3>100") == 0

    @pytest.mark.parametrize(
        "condition",
        ["nonsense", "mismatch/kl_k3>many", "mismatch/kl3>1", "mismatch/kl_k3>nan"],
    )
    def test_a_threshold_that_cannot_be_read_exits_with_2(self, path, capsys, condition):
        assert report_main(path, "--json", "--fail-if", condition) == 2
        assert "Fix:" in capsys.readouterr().err

    def test_a_number_that_the_report_has_not_gets_a_condition_as_its_fix(self, path, capsys):
        assert report_main(path, "--json", "--fail-if", "mismatch/kl_k4>1") == 2
        told = capsys.readouterr().err
        assert "got 'mismatch/kl_k4>1'. Fix: did you mean 'mismatch/kl_k3'?" in told
        assert report_main(path, "--json", "--fail-if", "nosuch>1") == 2
        assert "Fix: pass --fail-if 'mismatch/kl_k3>0.01'" in capsys.readouterr().err

    def test_bad_input_exits_with_2_and_writes_nothing(self, tmp_path, capsys):
        (tmp_path / "dump.jsonl").write_text("{")
        assert report_main(tmp_path / "dump.jsonl", "--out", tmp_path / "out") == 2
        assert "line 1" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_an_unknown_correction_exits_with_2(self, path, capsys):
        assert report_main(path, "--json", "--correction", "token-tiss") == 2
        assert "did you mean 'token-tis'" in capsys.readouterr().err

    def test_nothing_counted_exits_with_2(self, tmp_path, capsys):
        dump = some_dump(2)
        write_dump(replace(dump, mask=torch.zeros_like(dump.mask)), tmp_path / "dump.npz")
        assert report_main(tmp_path / "dump.npz", "--json") == 2
        assert "counted tokens" in capsys.readouterr().err

    def test_a_null_turns_noise_into_noise(self, path, capsys):
        report_main(path, "--json", "--null", path)
        (finding,) = json.loads(capsys.readouterr().out)["findings"]
        assert finding["pattern"] == "nothing beyond numerical noise"
        assert "those of the null" in finding["evidence"]

    def test_a_null_of_one_token_exits_with_2(self, path, tmp_path, capsys):
        write_dump(some_dump(1), tmp_path / "null.npz")
        assert report_main(path, "--json", "--null", tmp_path / "null.npz") == 2
        assert "`null`" in capsys.readouterr().err

    @pytest.mark.slow
    def test_a_terminal_gets_rich_tables(self, path):
        pytest.importorskip("rich")
        pty = pytest.importorskip("pty")
        parent, child = pty.openpty()
        command = [sys.executable, "-m", "iscorrect", "report", str(path)]
        process = subprocess.Popen(command, stdout=child, env=os.environ, cwd=path.parent)
        os.close(child)
        text = b""
        try:
            while piece := os.read(parent, 65536):
                text += piece
        except OSError:  # how Linux says that the other end was closed
            pass
        os.close(parent)
        assert process.wait() == 0
        assert b"\x1b[" in text  # rich's styles
        assert b"token-tis:cap=2" in text


class TestThresholds:
    @pytest.mark.parametrize(
        ("condition", "holds"),
        [("a>1", False), ("a>=1", True), ("a<1", False), ("a<=1", True), (" a < 2 ", True)],
    )
    def test_each_comparison(self, condition, holds):
        assert bool(check_thresholds([condition], {"a": 1.0})) == holds

    def test_findings_corrections_and_growth_are_conditions(self):
        dump = some_dump(400)
        noise = 0.02 * torch.randn(400, 50) * (1 - dump.rollout_log_probs.exp())
        clean = replace(dump, old_log_probs=dump.rollout_log_probs + noise)
        report = summarise([clean], corrections=["token-tis:cap=2"])
        assert broken(["finding"], report) == []
        tempered = summarise([replace(dump, old_log_probs=1.3 * dump.old_log_probs)])
        name = tempered.findings[0].cause
        shifted = "finding:shifted"
        assert len(broken(["finding", f"finding:{name[:5].upper()}", shifted], tempered)) == 2
        ess = report.corrections["token-tis:cap=2"]["is/ess"]
        assert broken(["token-tis:cap=2/is/ess<2"], report) == [
            f"token-tis:cap=2/is/ess<2 (it is {ess:.4g})"
        ]
        assert broken(["mismatch/growth/low>1.5"], report) == []
        short = summarise([some_dump(40)])
        assert broken(["mismatch/growth>1"], short) == ["mismatch/growth>1 (it was not measured)"]

    def test_a_correction_that_a_condition_names_is_compared(self, tmp_path, capsys):
        write_dump(some_dump(), tmp_path / "dump.npz")
        condition = "sequence-tis:cap=7/is/ess<2"
        assert report_main(tmp_path / "dump.npz", "--json", "--fail-if", condition) == 1
        assert condition in capsys.readouterr().err

    @pytest.mark.parametrize("name", [
        "shared/token", "shared/context/p_value", "shared/version/null", "policy/kl_k3",
        "policy/log_prob_diff/mean", "candidates/listed", "mismatch/growth/high",
    ])
    def test_a_number_that_the_dump_lacks_the_fields_for_is_beyond_every_bound(self, name):
        report = summarise([some_dump(40)])
        assert broken([f"{name}>1e9"], report) == [f"{name}>1e9 (it was not measured)"]

    def test_every_number_of_the_page_is_measured_or_may_be_asked_for(self):
        page = (Path(__file__).parents[1] / "docs" / "diagnosis.md").read_text(encoding="utf-8")
        table = page.split("| number | meaning |")[1].split("\n\n")[0]
        named = [x for row in table.splitlines()[2:] for x in re.findall(
            r"`([a-z]+/[\w/]+)`", row.split("|")[1]
        )]
        assert len(named) > 8
        broken([f"{name}>1e9" for name in named], summarise([some_dump(40)]))

    def test_a_finding_that_cannot_be_is_refused(self):
        with pytest.raises(InputError, match="zzz"):
            broken(["finding:zzz"], summarise([some_dump(40)]))

    @pytest.mark.parametrize("condition", ["finding", "finding:stale"])
    def test_a_dump_too_small_for_findings_does_not_pass(self, condition):
        (held,) = broken([condition], summarise([some_dump(7, noise=0.01)]))
        assert "7 sequences and " in held

    def test_what_could_not_be_computed_does_not_pass(self):
        assert check_thresholds(["a>1"], {"a": float("nan")})

    def test_an_unknown_name_is_corrected(self):
        with pytest.raises(InputError, match="did you mean 'mismatch/kl_k3'"):
            check_thresholds(["mismatch/kl_k33>1"], {"mismatch/kl_k3": 1.0})


def test_convert_keeps_every_value(path, tmp_path, capsys):
    target = tmp_path / "other.jsonl"
    assert main(["convert", str(path), str(target)]) == 0
    a, b = read_dump(path), read_dump(target)
    assert torch.equal(a.old_log_probs[a.mask], b.old_log_probs[b.mask])
    assert main(["convert", str(path), str(tmp_path / "x.csv")]) == 2
    assert "Fix:" in capsys.readouterr().err


def test_env_prints_versions(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^torch +\d", out, re.MULTILINE)
    assert re.search(r"^python +3", out, re.MULTILINE)


@pytest.mark.slow
def test_figures_need_no_latex(tmp_path):
    mpl = pytest.importorskip("matplotlib")
    with mpl.rc_context({"text.usetex": True}):
        write_report(summarise([some_dump()]), tmp_path)
        assert mpl.rcParams["text.usetex"]
    assert len(list((tmp_path / "figures").glob("*.png"))) == 8


def test_figures_are_left_out_without_matplotlib(tmp_path, monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    write_report(summarise([some_dump()]), tmp_path)
    assert not (tmp_path / "figures").exists()
    for page in ("report.html", "report.md"):
        assert "data:image/png" not in (tmp_path / page).read_text()
        assert "No figures: they need matplotlib" in (tmp_path / page).read_text()


def test_a_sequence_keeps_its_number_in_the_dump():
    torch.manual_seed(0)
    rollout = -torch.rand(3000, 400) * 4 - 0.1
    old = rollout + 0.02 * torch.randn_like(rollout)
    bad = torch.arange(2000, 3000, 50)
    rollout[bad, 20] -= 45
    pieces = [
        LogProbDump(rollout_log_probs=r, old_log_probs=o, mask=r < 1)
        for r, o in zip(rollout.split(500), old.split(500), strict=True)
    ]
    report = summarise(pieces)
    assert len(report.sample) < rollout.numel()
    named = re.findall(r"in sequence (\d+)", " ".join(x.evidence for x in report.findings))
    assert named and {int(x) for x in named} <= {*bad.tolist()}


def test_turns_are_segments_and_versions_are_ages_of_a_correction():
    torch.manual_seed(0)
    rollout = -torch.rand(8, 12) * 4
    dump = LogProbDump(
        rollout_log_probs=rollout, old_log_probs=rollout + 0.1 * torch.randn(8, 12),
        mask=rollout < 1, turn=(torch.arange(12) // 4).expand(8, 12), step=torch.full((8,), 7),
        version=(7 - torch.arange(8) % 4)[:, None].expand(8, 12),
    )
    by_turn = "correction:level=segment,bound=truncate(cap=1.2)"
    by_age = "correction:reject=age-above(limit=2)"
    found = summarise([dump], corrections=[by_turn, by_age]).corrections
    layout = Layout(dump.mask, segment_ids=dump.turn, age=dump.step[:, None] - dump.version)
    for text in (by_turn, by_age):
        expected = parse(text)(
            old_log_probs=dump.old_log_probs, rollout_log_probs=dump.rollout_log_probs, mask=layout
        ).metrics.to_floats()
        assert found[text]["is/ess"] == expected["is/ess"]
    assert found[by_age]["is/rejected"] == 0.25
    whole = summarise([dump], corrections=["correction:level=segment"]).corrections
    assert whole["correction:level=segment"]["is/bias_mass"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="or a dump with step and version in numbers"):
        summarise([replace(dump, version=None)], corrections=[by_age])


def test_of_many_places_that_are_alike_a_few_are_listed():
    same = -torch.rand(200, 10)
    dump = LogProbDump(
        rollout_log_probs=same, old_log_probs=same, mask=same < 1, step=torch.arange(200) // 2
    )
    places = [row["place"] for row in summarise([dump]).places]
    assert sum(place.startswith("step") for place in places) == 12


@pytest.mark.parametrize("constant", [-0.7, -0.1, -3.0])
def test_a_side_that_is_constant_has_no_correlation(constant):
    old = -torch.rand(64, 50, generator=torch.Generator().manual_seed(0))
    flat = torch.full_like(old, constant)
    for rollout, trainer in ((flat, old), (old, flat)):
        dump = LogProbDump(rollout_log_probs=rollout, old_log_probs=trainer, mask=old < 1)
        assert np.isnan(summarise([dump]).metrics["mismatch/pearson"])
