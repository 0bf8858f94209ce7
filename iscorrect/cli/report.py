"""``iscorrect report``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from iscorrect.dumps import (
    LogProbDump,
    dump_files,
    read_dump,
    stream_dump,
)
from iscorrect.errors import InputError
from iscorrect.report.gather import CORRECTIONS, summarise
from iscorrect.report.limits import check_thresholds
from iscorrect.report.render import print_report, write_report


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``iscorrect report``."""
    parser.add_argument("dumps", nargs="+", metavar="DUMP",
                        help="file or directory: .parquet, .jsonl, .npz, .safetensors, .pt; - for"
                             " JSON lines on standard input")
    parser.add_argument("--correction", action="append", metavar="SPEC",
                        help="correction to compare, such as token-tis:cap=2; repeatable")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="where report.html, report.md, metrics.json and figures/ go"
                             " (default: iscorrect-report; with --json: nowhere)")
    parser.add_argument("--null", metavar="DUMP",
                        help="the same policy scored twice: what is no larger is noise")
    parser.add_argument("--samples", type=_positive, metavar="N",
                        help="sequences in one update (default: all of the dump's)")
    parser.add_argument("--length", type=_positive, metavar="T",
                        help="tokens in a sequence (default: the dump's mean)")
    parser.add_argument("--fail-if", action="append", default=[], metavar="CONDITION",
                        help="exit 1 where it holds, such as 'mismatch/kl_k3>0.01'; repeatable")
    parser.add_argument("--json", action="store_true", help="print metrics.json instead of text")


def run_report(args: argparse.Namespace) -> int:
    """``iscorrect report``: 0 done, 1 a --fail-if condition holds, 2 input that cannot be used."""
    try:
        report = summarise(
            _with_progress(args.dumps),
            source=", ".join(str(path) for path in args.dumps),
            corrections=tuple(args.correction or CORRECTIONS),
            null=read_dump(args.null) if args.null else None,
            samples=args.samples, length=args.length,
        )
        broken = check_thresholds(args.fail_if, report.metrics)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    directory = args.out or (None if args.json else Path("iscorrect-report"))
    if directory is not None:
        write_report(report, directory)
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        print_report(report)
        print(f"\nwritten to {directory}/report.html", file=sys.stderr)
    for condition in broken:
        print(f"fail-if: {condition}", file=sys.stderr)
    return 1 if broken else 0


def _with_progress(paths: Sequence[str]) -> Iterator[LogProbDump]:
    """The pieces of a dump, file after file, with a bar on a terminal."""
    files = dump_files(*paths)
    if not (sys.stderr.isatty() and importlib.util.find_spec("rich")):
        yield from stream_dump(*files)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=len(files))
        sequences = 0
        for file in files:
            for piece in stream_dump(file):
                sequences += len(piece)
                progress.update(task, description=f"{file.name}: {sequences:,} sequences so far")
                yield piece
            progress.advance(task)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
