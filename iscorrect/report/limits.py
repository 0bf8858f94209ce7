"""Conditions on a report, for CI."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from iscorrect.diagnose import NOISE, Cause, Finding, causes
from iscorrect.diagnose.findings import PATTERNS
from iscorrect.diagnose.scale import few
from iscorrect.diagnose.shared import KINDS
from iscorrect.errors import input_error
from iscorrect.report.gather import Report
from iscorrect.report.sums import CANDIDATES, GROWTH, UPDATE

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}

FINDING = r"\s*finding(?::(.*\S))?\s*"

COMPARISON = r"\s*(\S(?:.*?\S)?)\s*(>=|<=|>|<)\s*(\S+)\s*"

OPTIONAL = (
    *GROWTH, *UPDATE, *CANDIDATES,
    *(f"shared/{kind}{of}" for kind in KINDS for of in ("", "/null", "/p_value")),
)
"""Numbers that a report has only of dumps that hold what they need."""

CORRECTION = r"(.+?)/((?:is|mismatch|batch)/.+)"


def corrections_of(conditions: Sequence[str]) -> list[str]:
    """The corrections that conditions name, to be compared.

    >>> corrections_of(["token-tis:cap=2/is/ess<0.5", "mismatch/kl_k3>0.01", "finding"])
    ['token-tis:cap=2']
    """
    named = [found[1] for text in conditions if (found := re.fullmatch(COMPARISON, text))]
    return [found[1] for name in named if (found := re.fullmatch(CORRECTION, name))]


def broken(
    conditions: Sequence[str], report: Report, more: Mapping[str, float] | None = None
) -> list[str]:
    """The conditions that hold for a report, each with what it found.

    Args:
        conditions: such as "mismatch/kl_k3>0.01", "mismatch/growth/low>1" (k3 grows over the
            steps), "token-tis:cap=2/is/ess<0.5", "finding" (any but noise), or "finding:stale"
            (one whose pattern or one of whose causes has this text).
        report: which has these corrections.
        more: numbers beside the report's, by flat name.

    Raises:
        InputError: a condition that cannot be read, an unknown name, or a text that is in no
            pattern's or cause's name.
    """
    numbers = dict.fromkeys(OPTIONAL, math.nan) | report.metrics | dict(more or {})
    for name, values in report.corrections.items():
        numbers |= {f"{name}/{metric}": x for metric, x in values.items()}
    held = []
    for condition in conditions:
        if found := re.fullmatch(FINDING, condition):
            text = found[1] or ""
            _check_text(text)
            named = list(_named(report.findings, text)) or [few(report.sample)]
            held += [f"{condition} ({name})" for name in named if name]
        else:
            held += check_thresholds([condition], numbers)
    return held


def _check_text(text: str) -> None:
    """Raise unless some finding may have a text in its pattern or in a cause."""
    names = [*PATTERNS, *(x.name for x in vars(causes).values() if isinstance(x, Cause))]
    if not any(text.lower() in name.lower() for name in names):
        raise input_error(
            "report", "fail-if", expected="finding:TEXT with a part of a pattern's or cause's name",
            got=repr(text), fix="pass --fail-if finding:stale, or see docs/diagnosis.md for names",
        )


def _named(findings: Sequence[Finding], text: str) -> Iterator[str]:
    """Findings other than noise in whose names a text stands."""
    for finding in findings:
        if not finding.pattern.startswith(NOISE):
            names = [finding.pattern, *(cause.name for cause in finding.causes)]
            yield from [name for name in names if text.lower() in name.lower()][:1]


def check_thresholds(conditions: Sequence[str], metrics: dict[str, float]) -> list[str]:
    """The conditions that hold, each with the value.

    Args:
        conditions: such as "mismatch/kl_k3>0.01".
        metrics: by flat name.

    Raises:
        InputError: a condition that cannot be read, or an unknown name.

    >>> check_thresholds(["mismatch/kl_k3>0.01"], {"mismatch/kl_k3": 0.5})
    ['mismatch/kl_k3>0.01 (it is 0.5)']
    """
    held = []
    for condition in conditions:
        found = re.fullmatch(COMPARISON, condition)
        try:
            if found is None:
                raise ValueError
            name, comparison, limit = found[1], found[2], float(found[3])
            if math.isnan(limit):
                raise ValueError
        except ValueError:
            raise input_error(
                "report", "fail-if",
                expected="a name, one of > < >= <=, and a number; or finding, or finding:TEXT",
                got=repr(condition), fix="pass --fail-if 'mismatch/kl_k3>0.01'",
            ) from None
        if name not in metrics:
            near = difflib.get_close_matches(name, metrics, n=1)
            raise input_error(
                "report", "fail-if", expected="about a number that the report has",
                got=repr(condition), fix=f"did you mean {near[0]!r}?" if near
                else "pass --fail-if 'mismatch/kl_k3>0.01', or see metrics.json for other names",
            )
        # what cannot be computed cannot pass
        if math.isnan(metrics[name]) or COMPARISONS[comparison](metrics[name], limit):
            value = metrics[name]
            known = "was not measured" if math.isnan(value) else f"is {value:.4g}"
            held.append(f"{condition} (it {known})")
    return held


