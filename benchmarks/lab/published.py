"""Public numbers of others, read by the library's monitor and metrics, beside the lab's."""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import log, nan, sqrt
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.lab.records import offline_rows, pair, runs
from iscorrect import Monitor, token_is
from iscorrect.dumps import read_dump
from iscorrect.errors import input_error
from iscorrect.report.sums import growth

RECORDS = Path(__file__).parent / "records"
READ = "2026-11-26"
FLASH = "zdhNarsil/flash-rl-plot"
NIXL = "PrimeIntellect-ai/prime-rl"
KERNEL = "RL-Align/RL-Kernel"
FAST = "ServiceNow/Fast-LLM, pull request 525"
TRL = "huggingface/trl, pull request 7269"
MINIMAX = "MiniMax-M1, arXiv:2506.13585, figure 3"
SLIDES = "docs.google.com/presentation/d/1bc0CLd05GCTgPFiEcG8zHhJD7LV9OaP6bLOBTTu414U"
LOGS = "reports/archive/experiments/dense/pr396_rocm_s1234_g10_g11_200"


class Source(NamedTuple):
    """Where a file of the folder comes from."""

    repository: str
    path: str
    commit: str


CURVES = {
    name: Source(FLASH, f"data/{file}.csv", "1f45409bbe1c59affb056ebfd25e34f79b99a554")
    for name, file in {
        "DAPO, BF16": "flash-baseline-T1-cleanedX",
        "DAPO, BF16, asynchronous": "flash-bf16-all-async-nclip2-sHack-T1-cleanedX",
        "DAPO, BF16, FP32 head, asynchronous": "flash-bf16-fp32head-async-T1.0-cleanedX",
        "GSM8K, BF16, asynchronous": "gsm8k-bf16-async",
        "GSM8K, BF16": "gsm8k-bf16-sync",
        "GSM8K, W8A8, asynchronous": "gsm8k-w8a8-async",
        "GSM8K, W8A8": "gsm8k-w8a8-sync",
    }.items()
}
NOTEBOOK = Source(
    NIXL, "docs/nixl-kl-investigation.md", "94b6ad6812ac45e800fbd201a9c8f2dbdd5b0796"
)
ROUNDS = Source(KERNEL, f"{LOGS}/rounds.csv", "da6c7dab5f2054bd3694f0edfb2da791982a6be1")
FILES = [*CURVES.values(), NOTEBOOK, ROUNDS]

ERRORS = {
    "Fast-LLM": (1.048, 0.753, 0.136), "DeepSpeed": (1.075, 0.830, 0.132),
    "vLLM": (1.053, 0.794, 0.146),
}
"""Quoted from ``FAST``: error of log-probs on text against float32, per cent, root mean square, of
BF16, BF16 with an FP32 head, FP16."""

KEPT = {
    "top_p=0.8, top_k=1024": (0.895, 0.896), "top_k=20": (0.965, 0.965),
    "top_k=1024": (0.994, 0.995),
}
"""Quoted from ``TRL``: the mass that a truncated sampler keeps, and the mean ratio it causes."""

PEARSON = (0.987319, 0.997135)
"""Quoted from ``MINIMAX``: correlation of probabilities before and with an FP32 head."""

MEAN_DIFFERENCE = 0.04904696856625378
"""Quoted from ``summary.json`` beside ``ROUNDS``: mean |Δ| of the native run over 200 steps."""

ROUNDING = 1e-3
"""Of two numbers with three digits each."""

Curve = dict[int, float]


class Finding(NamedTuple):
    """What one number of others became.

    Attributes:
        source: who published it.
        quantity: what is looked at; findings of one quantity share a row of the table.
        run: which of theirs.
        given: "raw", computed from their files, or "quoted", from a text.
        kind: "curve", "ratio" or "identity".
        said: what they say, empty if nothing; of a ratio, theirs.
        value: the number that is judged; of a curve, the factor that it grows by.
        low: the least that agrees; of a curve, the lower end of the growth's 95 % interval.
        high: the most, and the upper end.
        steps: of a curve, logged points.
        first: of a curve, the mean of its first fifth.
        last: of its last.
        highest: of a curve, its largest value.
        alarm: of a curve, the step of the monitor's first alarm; empty if there is none.
        agreed: "yes" or "no", empty where they say nothing.
    """

    source: str
    quantity: str
    run: str
    given: str
    kind: str
    said: str
    value: float
    low: float
    high: float
    steps: str = ""
    first: str = ""
    last: str = ""
    highest: str = ""
    alarm: str = ""
    agreed: str = ""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab published", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public files")
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args(arguments)
    write(given.data, given.records, given.records)


def write(data: Path, lab: Path, records: Path) -> None:
    """Replay the files of a folder and leave ``published.csv`` and ``published.json``."""
    found = [*curves(data), *identities(data), *ratios(data, lab)]
    with (records / "published.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Finding._fields)
        writer.writerows([f"{x:.5g}" if isinstance(x, float) else x for x in row] for row in found)
    said = {
        "read": READ, "files": [source._asdict() for source in FILES],
        "quoted": [FAST, TRL, MINIMAX, f"{KERNEL}, {LOGS}/summary.json", SLIDES],
    }
    (records / "published.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def text_of(data: Path, source: Source) -> str:
    """A file of the folder, under the last part of its path."""
    path = data / Path(source.path).name
    if not path.is_file():
        raise input_error(
            "published", "data", expected=f"a folder with {path.name}", got=f"none in {data}",
            fix=f"put there {source.path} of github.com/{source.repository} at {source.commit}",
        )
    return path.read_text(encoding="utf-8")


def column(data: Path, source: Source, name: str, step: str) -> Curve:
    """By step, the column whose name ends with this."""
    rows = list(csv.DictReader(text_of(data, source).splitlines()))
    found = [full for full in rows[0] if full.endswith(name)] if rows else []
    if len(found) != 1 or step not in rows[0]:
        raise input_error(
            "published", "data",
            expected=f"{Path(source.path).name} with a column {step} and one that ends with {name}",
            got=f"the columns {', '.join(rows[0]) if rows else 'of an empty file'}",
            fix=f"take the file of github.com/{source.repository} at {source.commit}",
        )
    return {int(row[step]): float(row[found[0]]) for row in rows}


def notebook(text: str) -> dict[str, Curve]:
    """The KL by step under each heading: of a table of Step and KL, or a list of five and more."""
    found: dict[str, Curve] = {}
    for section in re.split(r"^#{2,3} ", text.replace("**", ""), flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        curve: Curve = {}
        inside = False
        for line in body.splitlines():
            cells = [cell.strip() for cell in line.strip("| ").split("|") if cell.strip()]
            if "Step" in cells:
                inside = bool(cells[1].endswith("KL"))
            elif inside and len(cells) % 2 == 0 and cells and cells[0].isdigit():
                pairs = zip(cells[::2], cells[1::2], strict=True)
                curve |= {int(step): float(kl) for step, kl in pairs}
            elif not line.startswith("|"):
                inside = False
        listed = re.search(r"(?:0\.\d{4},\s+){4,}0\.\d{4}", body)
        if not curve and listed:
            curve = dict(enumerate(map(float, re.findall(r"0\.\d{4}", listed[0]))))
        if curve:
            found[title] = dict(sorted(curve.items()))
    return found


def fifths(curve: Curve) -> tuple[float, float]:
    """The means of the first and the last fifth."""
    values = [curve[step] for step in sorted(curve)]
    width = max(len(values) // 5, 1)
    return statistics.fmean(values[:width]), statistics.fmean(values[-width:])


def replay(source: str, quantity: str, run: str, said: str, curve: Curve) -> Finding:
    """A curve through the monitor, and through the growth that a report has."""
    monitor = Monitor({"published": "rise"})
    alarms = [
        alarm.step for step in sorted(curve)
        for alarm in monitor.update(step, {"published": curve[step]})
    ]
    first, last = fifths(curve)
    value, low, high = growth(curve).values() or (nan, nan, nan)
    agreed = {"": "", "drifts": "yes" if alarms else "no", "bounded": "no" if alarms else "yes"}
    return Finding(
        source, quantity, run, "raw", "curve", said, value, low, high, str(len(curve)),
        f"{first:.5g}", f"{last:.5g}", f"{max(curve.values()):.5g}",
        str(alarms[0]) if alarms else "", agreed[said],
    )


def curves(data: Path) -> Iterator[Finding]:
    for run, source in CURVES.items():
        kl = column(data, source, "vllm_kl", "_step")
        yield replay(FLASH, f"KL: {run}", run, "", kl)
    for title, kl in notebook(text_of(data, NOTEBOOK)).items():
        bounded = "NCCL" in title and "NIXL" not in title
        transport, said = ("NCCL", "bounded") if bounded else ("NIXL", "drifts")
        yield replay(NIXL, f"KL: weights sent by {transport}",
                     title.partition(" — ")[0], said, kl)
    mean = column(data, ROUNDS, "g10_mean_logp_diff", "step")
    yield replay(KERNEL, "mean |Δ|: Qwen3-8B, native kernels", "native", "", mean)


def identities(data: Path) -> Iterator[Finding]:
    """Numbers that others of theirs decide."""
    mean = statistics.fmean(column(data, ROUNDS, "g10_mean_logp_diff", "step").values())
    quantity = "mean |Δ| of all steps"
    yield within(KERNEL, quantity, "native", "raw", mean, MEAN_DIFFERENCE, 1e-6)
    for run, (mass, ratio) in KEPT.items():
        yield within(TRL, "mean ratio of a truncated sampler; here, of the mass that it keeps", run,
                     "quoted", constant_ratio(mass), ratio, ROUNDING + 1e-9)
    for run, source in CURVES.items():
        if run.startswith("DAPO"):
            sides = (column(data, source, f"probs_diff_{side}", "_step") for side in ("max", "min"))
            largest = max(abs(x) for side in sides for x in side.values())
            yield within(FLASH, "largest |Δp| of a run", run, "raw", largest, 1.0, 0.05)


def constant_ratio(mass: float) -> float:
    """The metric of tokens that a sampler reports among those it keeps, the trainer among all."""
    log_probs = torch.full((4, 8), -1.0, dtype=torch.float64)
    metrics = token_is()(
        old_log_probs=log_probs + log(mass), rollout_log_probs=log_probs,
        mask=torch.ones(4, 8, dtype=torch.bool),
    ).metrics
    return float(metrics["is/ratio/mean"])


def within(
    source: str, quantity: str, run: str, given: str, value: float, want: float, by: float
) -> Finding:
    agreed = "yes" if abs(value - want) <= by else "no"
    return Finding(source, quantity, run, given, "identity", f"{want:.5g}", value, want - by,
                   want + by, agreed=agreed)


def ratios(data: Path, lab: Path) -> Iterator[Finding]:
    """Ratios of theirs beside the lab's, over all its models."""

    def one(
        source: str, quantity: str, run: str, given: str, value: float, ours: tuple[float, float]
    ) -> Finding:
        agreed = "yes" if ours[0] <= value <= ours[1] else "no"
        return Finding(source, quantity, run, given, "ratio", f"{value:.3g}", value, *ours,
                       agreed=agreed)

    heads = "bf16, FP32 head"
    for engine, (bf16, head, fp16) in ERRORS.items():
        yield one(FAST, "σ of BF16 over FP16, against float32", engine, "quoted", bf16 / fp16,
                  of_lab(lab, "sigma", "bf16 / fp32", "fp16 / fp32"))
        yield one(FAST, "σ of BF16 without an FP32 head over with one", engine, "quoted",
                  bf16 / head, of_lab(lab, "sigma", "bf16 / fp32", f"{heads} / fp32"))
    apart, head_apart = (1 - r for r in PEARSON)
    yield one(MINIMAX, "1 − Pearson of BF16 without an FP32 head over with one", "", "quoted",
              apart / head_apart,
              of_lab(lab, "pearson", "bf16 / bf16", f"{heads} / {heads}"))
    kl = {run: column(data, source, "vllm_kl", "_step") for run, source in CURVES.items()}
    with_head, plain = (kl[f"DAPO, BF16{and_}, asynchronous"] for and_ in (", FP32 head", ""))
    yield one(FLASH, "KL of BF16 without an FP32 head over with one", "DAPO, the same steps", "raw",
              mean_of(plain, with_head) / mean_of(with_head, with_head),
              of_lab(lab, "kl", "bf16 / bf16", f"{heads} / {heads}"))
    for run in ("GSM8K, {}", "GSM8K, {}, asynchronous"):
        value = fifths(kl[run.format("W8A8")])[0] / fifths(kl[run.format("BF16")])[0]
        for kind in ("fp8", "int4"):
            yield one(FLASH, f"KL of W8A8 over BF16; ours: {kind.upper()} weights",
                      run.format("W8A8"), "raw", value, rounded(lab, kind))


def mean_of(curve: Curve, steps: Iterable[int]) -> float:
    return statistics.fmean(curve[step] for step in steps)


def of_lab(lab: Path, name: str, above: str, below: str) -> tuple[float, float]:
    """A column of one pair over another's: from the lowest model to the highest, ± two errors."""
    found: dict[str, list[float]] = {}
    rows = offline_rows(lab)
    for model in {row["model"] for row in rows}:
        a, b = ([abs(float(row[name])) for row in rows if row["model"] == model
                 and pair(row) == of] for of in (above, below))
        found[model] = [x / y for x, y in zip(a, b, strict=True)]
    dumps = [lab / "real" / "offline" / f"{of.replace(' / ', '-')}-first.npz"
             for of in (above, below)]
    if name == "sigma" and all(path.exists() for path in dumps):
        found["pretrained"] = [pretrained(dumps[0]) / pretrained(dumps[1])]
    return spread(found)


def spread(found: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """The lowest mean less two standard errors, and the highest and two; of one value, itself."""
    ends = []
    for values in found.values():
        error = statistics.stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
        ends.append((statistics.fmean(values) - 2 * error, statistics.fmean(values) + 2 * error))
    return min(low for low, _ in ends), max(high for _, high in ends)


def pretrained(path: Path) -> float:
    """σ(Δ) of the pretrained model's tokens, one seed."""
    dump = read_dump(path)
    difference = (dump.old_log_probs - dump.rollout_log_probs)[dump.mask.bool()]
    return float(difference.double().std())


def rounded(lab: Path, kind: str) -> tuple[float, float]:
    """KL at the start with the engine's weights rounded so, over that of BF16 alone."""
    arms = runs(lab / "map")
    start = {
        rounding: {
            task: statistics.fmean(
                run["kl"][0] for (of, arm), seeds in arms.items()
                if of == task and arm.startswith(f"{rounding}-") for run in seeds
            ) for task in {task for task, _ in arms}
        } for rounding in (kind, "none")
    }
    found = {task: [kl / start["none"][task]] for task, kl in start[kind].items()}
    first = {}
    for name in (kind, "bf16"):
        path = lab / "real" / "coherence" / f"{name}-0.csv"
        with path.open(newline="", encoding="utf-8") as file:
            first[name] = float(next(csv.DictReader(file))["kl"])
    return spread({**found, "pretrained": [first[kind] / first["bf16"]]})
