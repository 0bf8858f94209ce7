"""Conditions on a report's numbers, for CI."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence

from iscorrect.errors import check_choice, input_error

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}


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
    broken = []
    for condition in conditions:
        found = re.fullmatch(r"\s*([\w/]+)\s*(>=|<=|>|<)\s*(\S+)\s*", condition)
        try:
            if found is None:
                raise ValueError
            name, comparison, limit = found[1], found[2], float(found[3])
            if math.isnan(limit):
                raise ValueError
        except ValueError:
            raise input_error(
                "report", "fail-if", expected="a name, one of > < >= <=, and a number",
                got=repr(condition), fix="pass --fail-if 'mismatch/kl_k3>0.01'",
            ) from None
        check_choice("report", "fail-if", name, sorted(metrics))
        # what cannot be computed cannot pass
        if math.isnan(metrics[name]) or COMPARISONS[comparison](metrics[name], limit):
            broken.append(f"{condition} (it is {metrics[name]:.4g})")
    return broken
