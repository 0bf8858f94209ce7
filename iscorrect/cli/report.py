"""How large the mismatch of a dump is, where, why, and what to do."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from iscorrect.cli.arguments import check_folder, positive
from iscorrect.cli.terminal import progress, say, tell
from iscorrect.dumps import LogProbDump, Tokens, stream_dump
from iscorrect.report.changes import Changes, page as compared, write_changes
from iscorrect.report.gather import CORRECTIONS, Report, summarise
from iscorrect.report.limits import broken, corrections_of
from iscorrect.report.pages import NO_FIGURES
from iscorrect.report.render import page as single, write_report
from iscorrect.text import visible

HELP = "how large the mismatch of a dump is, where, why, and what to do"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``iscorrect report``."""
    parser.add_argument("dumps", nargs="+", metavar="DUMP",
                        help="file or directory: .parquet, .jsonl, .npz, .safetensors, .pt; - for"
                             " JSON lines on standard input")
    parser.add_argument("--correction", action="append", metavar="SPEC",
                        help="correction to compare, such as token-tis:cap=2; repeatable")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="where report.html, report.md, metrics.json and figures/ go"
                             " (default: iscorrect-report; with --json: nowhere)")
    parser.add_argument("--against", metavar="DUMP",
                        help="compare with this dump: what changed since, with intervals, as one"
                             " page")
    parser.add_argument("--null", metavar="DUMP",
                        help="the same policy scored twice: what is no larger is noise")
    parser.add_argument("--samples", type=positive, metavar="N",
                        help="sequences in one update (default: those of a step, or all where no"
                             " steps are known)")
    parser.add_argument("--length", type=positive, metavar="T",
                        help="tokens in a sequence (default: the dump's mean)")
    parser.add_argument("--fail-if", action="append", default=[], metavar="CONDITION",
                        help="exit 1 where it holds: 'mismatch/kl_k3>0.01',"
                             " 'mismatch/growth/low>1', 'token-tis:cap=2/is/ess<0.5', 'finding'"
                             " (any but noise), 'finding:TEXT'; repeatable")
    parser.add_argument("--json", action="store_true", help="print metrics.json instead of text")


def run(options: argparse.Namespace) -> int:
    """0, or 1 where a --fail-if condition holds."""
    directory = options.out or (None if options.json else Path("iscorrect-report"))
    if directory is not None:
        check_folder("report", directory)
    null = None
    if options.null:
        null = Tokens.join([Tokens.of(piece) for piece in stream_dump(options.null)])

    def gathered(paths: Sequence[str]) -> Report:
        return summarise(
            _with_progress(paths), source=", ".join(map(visible, paths)),
            corrections=_corrections(options), null=null,
            samples=options.samples, length=options.length,
        )

    report, changes = gathered(options.dumps), None
    if options.against:
        changes = Changes.of(gathered([options.against]), report)
    held = broken(options.fail_if, report, changes.numbers() if changes else None)
    if options.json:
        say(json.dumps((changes or report).to_json(), indent=2))
    else:
        page = compared(changes) if changes else single(report)
        say(*page.blocks(min(shutil.get_terminal_size().columns, 100)))
    if directory is not None:
        figures = write_changes(changes, directory) if changes else write_report(report, directory)
        missing = "" if figures else f"\n{NO_FIGURES}"
        tell(f"\nwritten to {visible(directory)}/report.html{missing}")
    for condition in held:
        tell(f"fail-if: {visible(condition)}")
    return 1 if held else 0


def _corrections(options: argparse.Namespace) -> list[str]:
    """Those that were asked for, and those that conditions name."""
    shown = options.correction or CORRECTIONS
    return list(dict.fromkeys([*shown, *corrections_of(options.fail_if)]))


def _with_progress(paths: Sequence[str]) -> Iterator[LogProbDump]:
    with progress() as show:
        sequences = 0
        for piece in stream_dump(*paths):
            sequences += len(piece)
            show(0, f"{sequences:,} sequences so far")
            yield piece
