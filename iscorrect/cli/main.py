"""The command line: each command in a few lines, what it does elsewhere."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from iscorrect.cli import demo
from iscorrect.cli.audit import add_audit_arguments, run_audit
from iscorrect.cli.convert import add_convert_arguments, run_convert
from iscorrect.cli.env import add_env_arguments, run_env
from iscorrect.cli.fp16_check import add_fp16_check_arguments, run_fp16_check
from iscorrect.cli.report import add_report_arguments, run_report
from iscorrect.dumps import read_dump
from iscorrect.errors import InputError
from iscorrect.loss.presets import PRESETS
from iscorrect.loss.specs import parse
from iscorrect.report.effects import HEADER, effect_row, effects
from iscorrect.text import number, show


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        0; 1 where a threshold was broken; 2 where the input cannot be used, with the message on
        standard error.
    """
    parser = argparse.ArgumentParser(
        prog="iscorrect", description="Corrected policy-gradient losses: what corrections do."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("demo", help="real rollouts and every preset, in seconds")
    command.set_defaults(run=lambda _: demo.main())

    command = commands.add_parser(
        "compare", help="what corrections do to your own rollouts",
        description="One row per correction. FILE holds rollout_log_probs, old_log_probs and mask.",
    )
    command.add_argument("file", nargs="+", metavar="FILE", help=".npz, .safetensors, .jsonl, …")
    command.add_argument(
        "--correction", action="append", metavar="NAME[:KEY=VALUE,…]",
        help="such as token-tis:cap=2; may be repeated; default: all presets",
    )
    command.add_argument("--json", action="store_true", help="all metrics, for machines")
    command.set_defaults(run=_compare)

    for name, purpose, add_arguments, run in (
        ("report", "how large the mismatch of a dump is, where, why, and what to do",
         add_report_arguments, run_report),
        ("convert", "a dump into another format", add_convert_arguments, run_convert),
        ("audit", "exact bias, variance and error of corrections on a small policy",
         add_audit_arguments, run_audit),
        ("fp16-check", "whether a checkpoint may switch from BF16 to FP16",
         add_fp16_check_arguments, run_fp16_check),
        ("env", "versions, for reports of bugs", add_env_arguments, run_env),
    ):
        command = commands.add_parser(name, help=purpose)
        add_arguments(command)
        command.set_defaults(run=run)

    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return code


def _compare(options: argparse.Namespace) -> int:
    dump = read_dump(*options.file)
    names = options.correction or list(PRESETS)
    corrections = {name: parse(name) for name in names}
    seen = effects(dump, corrections)
    if options.json:
        print(json.dumps({name: metrics.to_floats() for name, metrics in seen.items()}, indent=2))
        return 0
    m = next(iter(seen.values())).to_floats()
    print(
        f"{len(dump)} sequences, {dump.num_tokens} tokens;"
        f" k1 {number(m['mismatch/kl_k1'])}, k3 {number(m['mismatch/kl_k3'])} nats per token,"
        f" largest |Δ log p| {number(m['mismatch/log_prob_diff/max'])}"
    )
    if dump.advantages is None:
        print("No advantages: rules that look at their sign were given one at random a sequence.")
    rows = [effect_row(name, corrections[name], metrics) for name, metrics in seen.items()]
    show("What each correction does", HEADER, rows)
    return 0
