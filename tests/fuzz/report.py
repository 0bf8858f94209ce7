"""Reports of small and odd dumps: every form is made, and its numbers are those of float64."""

import io
import json
import warnings
from functools import partial

import numpy as np

from iscorrect import PRESETS, InputError
from iscorrect.dumps import concatenate
from iscorrect.report.changes import Changes, page
from iscorrect.report.figures import FIGURES
from iscorrect.report.gather import summarise
from iscorrect.report.limits import broken
from iscorrect.report.render import blocks, to_html, to_markdown
from tests.fuzz._search import search
from tests.fuzz.samples import SEEDS, random_dump


def wrong_numbers(report, dump):
    """The first number of a report that is not the dump's; or None."""
    old, rollout = (x.numpy().astype(float) for x in (dump.old_log_probs, dump.rollout_log_probs))
    tokens = dump.mask.sum()
    mask = dump.mask.numpy() & np.isfinite(old) & np.isfinite(rollout)
    d = old[mask] - rollout[mask]
    m = report.metrics
    expected = {
        "batch/tokens": tokens, "batch/nonfinite": tokens - mask.sum(),
        "batch/sequences": len(mask),
        "batch/length": mask.sum() / mask.any(1).sum(), "mismatch/kl_k1": -d.mean(),
        "mismatch/log_prob_diff/max": np.abs(d).max(),
        "tail/outside": (np.abs(d) > np.log(2)).mean(),
    }
    for name, value in expected.items():
        if not np.isclose(m[name], value, rtol=1e-4, atol=1e-6):
            return f"{name} is {m[name]}, not {value}"
    for kind in ("position", "length", "rollout probability", "step"):
        shares = [p["tokens"] for p in report.places if p["place"].startswith(kind)]
        if kind == "step" and (dump.step is None or len(dump) > 6):
            continue  # not every piece has it, or the worst steps alone are listed
        if shares and not np.isclose(sum(shares), 1):
            return f"the places of {kind} sum to {sum(shares)}"
    for name, values in report.corrections.items():
        bad = [key for key, x in values.items() if not np.isfinite(x)]
        if bad:
            return f"{bad[0]} of {name} is {values[bad[0]]}"
    return None


def compare(report, piece):
    """Raise unless a report and one on a part of its dump are compared in every form."""
    try:
        other = summarise([piece], corrections=[])
    except InputError:  # no token counts
        return
    for changes in (Changes.of(report, other), Changes.of(other, report)):
        shown = page(changes)
        assert "nan" not in "\n".join(map(str, shown.blocks()))
        shown.to_markdown()
        shown.to_html({})
        json.dumps(changes.to_json(), allow_nan=False)
    same = Changes.of(report, report)
    assert same.paired
    assert all(x.difference == 0 for x in same.metrics)
    assert not {"larger", "smaller"} & {x.verdict for x in same.metrics}


def check(case):
    """Raise unless the report on a dump is made in every form, with the numbers of float64."""
    rng = np.random.default_rng(case["seed"])
    counted = rng.random() < 0.95
    pieces = [random_dump(rng, counted=counted) for _ in range(rng.integers(1, 4))]
    whole = concatenate(pieces)
    presets = list(PRESETS)
    chosen = [presets[i] for i in rng.integers(len(presets), size=3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            report = summarise(pieces, corrections=chosen, source="a|b\\<c>")
        except InputError:
            finite = whole.old_log_probs.isfinite() & whole.rollout_log_probs.isfinite()
            assert not (whole.mask & finite).any()
            return
        assert "nan" not in "\n".join(map(str, blocks(report)))
        json.dumps(report.to_json(), allow_nan=False)
        to_markdown(report)
        to_html(report, {})
        name = f"{chosen[0]}/is/ess"
        broken(["mismatch/kl_k3>0.01", "mismatch/growth/low>1", f"{name}<0.5", "finding"], report)
        assert not (wrong := wrong_numbers(report, whole)), wrong
        compare(report, pieces[-1])
        if rng.random() < 0.05:
            tabulate, draw = list(FIGURES.values())[rng.integers(len(FIGURES))]
            tabulate(report.sample)
            draw(report.sample).figure.savefig(io.BytesIO(), format="png")


CASES = SEEDS
run = partial(search, "report", CASES, check)
