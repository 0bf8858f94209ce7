"""What corrections do to your own rollouts, one row each.

Several files are one dump. What changed between two: iscorrect report NEW --against OLD.
"""

from __future__ import annotations

import argparse
import json

from iscorrect.cli.terminal import say
from iscorrect.dumps import stream_dump
from iscorrect.errors import input_error
from iscorrect.loss.presets import PRESETS, uncorrected
from iscorrect.loss.specs import parse
from iscorrect.report.effects import HEADER, Effects, effect_row
from iscorrect.text import Table, finite, number

HELP = "what corrections do to your own rollouts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``iscorrect compare``."""
    parser.add_argument("file", nargs="+", metavar="FILE", help="as for iscorrect report")
    parser.add_argument(
        "--correction", action="append", metavar="NAME[:KEY=VALUE,…]",
        help="such as token-tis:cap=2; may be repeated; default: all presets",
    )
    parser.add_argument("--json", action="store_true", help="all metrics, for machines")


def run(options: argparse.Namespace) -> int:
    """0."""
    corrections = {name: parse(name) for name in options.correction or PRESETS}
    whole, seen, sequences = Effects({"": uncorrected()}), Effects(corrections), 0
    for piece in stream_dump(*options.file):
        whole.add(piece)
        seen.add(piece)
        sequences += len(piece)
    values = seen.floats()
    if options.json:
        say(json.dumps(finite(values), indent=2))
        return 0
    m = whole.floats()[""]
    left_out = m["is/nonfinite"] * m["batch/tokens"]
    if left_out == m["batch/tokens"]:
        raise input_error(
            "compare", "DUMP", expected="a dump with a token whose log-probs are finite",
            got=f"none of {left_out:.0f}", fix="dump the log-probs of sampled tokens",
        )
    unknown = f", {left_out:.0f} of them without a finite log-prob" if left_out else ""
    say(
        f"{sequences} sequences, {m['batch/tokens']:.0f} tokens{unknown};"
        f" k1 {number(m['mismatch/kl_k1'])}, k3 {number(m['mismatch/kl_k3'])} nats per token,"
        f" largest |Δ log p| {number(m['mismatch/log_prob_diff/max'])}", *seen.notes(), "",
        Table("What each correction does", HEADER,
              [effect_row(name, values[name]) for name in values]),
    )
    return 0
