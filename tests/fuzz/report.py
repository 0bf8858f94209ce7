"""Reports of small and odd dumps: every form is made, and its numbers are those of float64."""

import io
import json
import time
import warnings

import numpy as np

from iscorrect import PRESETS, InputError
from iscorrect.dumps import concatenate
from iscorrect.report.figures import FIGURES
from iscorrect.report.gather import summarise
from iscorrect.report.limits import check_thresholds
from iscorrect.report.render import blocks, to_html, to_markdown
from tests.fuzz.samples import Failures, random_dump


def wrong_numbers(report, dump):
    """The first number of a report that is not the dump's; or None."""
    mask = dump.mask.numpy()
    old, rollout = (x.numpy().astype(float) for x in (dump.old_log_probs, dump.rollout_log_probs))
    d = old[mask] - rollout[mask]
    m = report.metrics
    expected = {
        "batch/tokens": mask.sum(), "batch/sequences": len(mask),
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


def run(seed: int, seconds: float) -> dict[str, int]:
    """Report for a while."""
    rng = np.random.default_rng(seed)
    found = Failures("report", seed)
    end = time.monotonic() + seconds
    presets = list(PRESETS)
    while time.monotonic() < end:
        case = found.counts["cases"]
        found.count("cases")
        counted = rng.random() < 0.95
        pieces = [random_dump(rng, counted=counted) for _ in range(rng.integers(1, 4))]
        whole = concatenate(pieces)
        chosen = [presets[i] for i in rng.integers(len(presets), size=3)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                report = summarise(pieces, corrections=chosen, source="a|b\\<c>")
                text = "\n".join(map(str, blocks(report)))
                json.dumps(report.to_json(), allow_nan=False)
                to_markdown(report)
                to_html(report, {})
                check_thresholds(["mismatch/kl_k3>0.01"], report.metrics)
                wrong = wrong_numbers(report, whole) or ("nan in the text" if "nan" in text else "")
                if case % 20 == 0:
                    tabulate, draw = list(FIGURES.values())[case // 20 % len(FIGURES)]
                    tabulate(report.sample)
                    draw(report.sample).figure.savefig(io.BytesIO(), format="png")
                    found.count("drawn")
        except InputError as error:
            found.count("refused")
            wrong = "" if not whole.mask.any() else f"refused: {error}"
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            found.fail(case, wrong)
    return found.counts
