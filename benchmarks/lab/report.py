"""Tables and figures from the records; nothing in them is typed by hand."""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from math import log, nan
from pathlib import Path

from benchmarks.lab import figures, published_table
from benchmarks.lab.cells import markdown, pretty, share, times, with_error
from benchmarks.lab.chain import figures as chain_figures, tables as chain
from benchmarks.lab.chain.statistics import fisher, interval
from benchmarks.lab.records import (
    CORRECTIONS,
    FELL,
    LAST,
    ZERO,
    Curves,
    axes,
    batch_kl,
    offline_rows,
    outcome,
    own_reward,
    own_rewards,
    pair,
    reached,
    runs,
)
from iscorrect.diagnose.shared import Shared, shared_error
from iscorrect.dumps import read_dump

ROOT = Path(__file__).parents[2]
PAGES = (
    Path(__file__).parent / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("fp16-or-correction", "estimators", "monitor")),
)
PICTURES = ROOT / "docs" / "lab"
MARKED = re.compile(
    r"(<!-- lab:(?P<table>\w+)(?:/(?P<folder>\w+))? -->\n).*?(<!-- /lab -->)", re.DOTALL
)
COARSEST = "int3"
AFTER = 10
"""Step after which the lowest reward of a policy is looked for."""
EXPLAINS = ("token", "pair", "position")
CLAIMED = ("fp16 / fp16", "bf16 / fp16", "fp16 / bf16", "bf16 / bf16")
"""Rollout / trainer, best first, as the claim that the lab looks into has it."""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab report", description=__doc__)
    parser.add_argument("--records", type=Path, default=Path(__file__).parent / "records")
    parser.add_argument("--pages", type=Path, nargs="*", default=PAGES)
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    given = parser.parse_args(arguments)
    write(given.records, given.pages, given.pictures)


def write(records: Path, pages: Iterable[Path], pictures: Path) -> None:
    """Rewrite the tables between markers ``<!-- lab:table/folder -->``, and draw the figures.

    The folder, where one is named, is that of other records among these.
    """
    pictures.mkdir(parents=True, exist_ok=True)
    figures.main(records, pictures)
    chain_figures.main(records, pictures)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        page.write_text(MARKED.sub(lambda m: m[1] + fill(records, m) + m[4], text), "utf-8")


def fill(records: Path, marker: re.Match[str]) -> str:
    """The table that a marker asks for."""
    return {**TABLES, **chain.TABLES}[marker["table"]](records / (marker["folder"] or ""))


def offline(records: Path) -> str:
    """Every pair of precisions: means over models and seeds, and the largest maximum."""
    rows = offline_rows(records)
    if not rows:
        return "No record of `python -m benchmarks.lab offline`.\n"
    lengths = [name for name in rows[0] if name.startswith("ess_")]
    head = ["rollout / trainer", r"mean \|Δ\|", r"max \|Δ\|", "σ", "KL", "nats per 1,000 tokens",
            "1 − Pearson", *(f"ESS at {name[4:]}" for name in lengths), "null"]
    found = []
    for name in dict.fromkeys(map(pair, rows)):
        group = [row for row in rows if pair(row) == name]

        def mean(column: str, group: list[dict[str, str]] = group) -> str:
            values = [float(row[column]) for row in group if row[column]]
            return pretty(statistics.fmean(values)) if values else ""

        largest = pretty(max(float(row["max"]) for row in group))
        apart = pretty(-statistics.fmean(float(row["pearson"]) for row in group))
        found.append([name, mean("mean"), largest, mean("sigma"), mean("kl"), mean("slope"), apart,
                      *map(mean, lengths), mean("null")])
    note = json.loads((records / "offline.json").read_text(encoding="utf-8"))
    models = sorted({row["model"] for row in rows})
    engine = rows[0]["engine"]
    return markdown(head, found) + (
        f"\n{engine}; {', '.join(models)}; {note['sequences']} sequences of {note['length']} "
        f"tokens, {len({row['seed'] for row in rows})} seeds each, temperature 1. Δ = log π − "
        "log μ in nats; KL is k3, nats per token; null: mean |Δ| between the same trainer scoring "
        f"eight sequences together and one at a time. {note['processor']}, torch "
        f"{note['torch']}, commit {note['commit']}.\n"
    )


def by_model(records: Path, column: str) -> dict[str, dict[str, list[float]]]:
    """For each model and pair of 16-bit precisions, the column's values over seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in offline_rows(records):
        if pair(row) in CLAIMED:
            found.setdefault(row["model"], {}).setdefault(pair(row), []).append(float(row[column]))
    return found


def ratios(records: Path) -> str:
    """How many times smaller the mismatch is in FP16 than in BF16, model by model."""
    rows = []
    for column, name in (("sigma", "σ(Δ)"), ("kl", "KL")):
        for model, pairs in by_model(records, column).items():
            worst, best = pairs["bf16 / bf16"], pairs["fp16 / fp16"]
            ratio, error = with_error([a / b for a, b in zip(worst, best, strict=True)])
            rows.append([model, name, pretty(statistics.fmean(worst)),
                         pretty(statistics.fmean(best)), f"{ratio:.3g} ± {pretty(error)}"])
    if not rows:
        return "No record of `python -m benchmarks.lab offline`.\n"
    head = ["model", "", "BF16 / BF16", "FP16 / FP16", "ratio ± standard error over seeds"]
    return markdown(head, rows)


def ranking(records: Path) -> str:
    """KL of each pair as a multiple of FP16 on both sides, and whether the claimed order holds."""
    models = by_model(records, "kl")
    if not models:
        return "No record of `python -m benchmarks.lab offline`.\n"
    logs: dict[str, list[float]] = {name: [] for name in CLAIMED}
    cells: dict[str, list[str]] = {name: [] for name in CLAIMED}
    for pairs in models.values():
        for name in CLAIMED:
            over = [log(a / b) for a, b in zip(pairs[name], pairs[CLAIMED[0]], strict=True)]
            logs[name].append(statistics.fmean(over))
            cells[name].append(times(over))
    measured = sorted(CLAIMED, key=lambda name: statistics.fmean(logs[name]))
    rows = []
    for name in CLAIMED:
        places = CLAIMED.index(name) + 1, measured.index(name) + 1
        rows.append([name, *map(str, places), times(logs[name]), *cells[name]])
    head = ["rollout / trainer", "claimed", "found", "KL over FP16 / FP16's, all models", *models]
    agreed = "The order agrees." if tuple(measured) == CLAIMED else "The order does not agree."
    return markdown(head, rows) + f"\n{agreed} × s^±1 is a standard error, over models or seeds.\n"


def sanity(records: Path) -> str:
    """Arm by arm: what became of the runs."""
    arms = runs(records / "sanity")
    if not arms:
        return "No record of `python -m benchmarks.lab sanity`.\n"
    head = ["arm", "reward at the end", "lowest", "π's own, fixed prompts", "steps to 95 %",
            "fell", r"KL, median", "KL of a batch, nats", r"max \|Δp\|", "ESS",
            "gradient norm, median", "CPU time, FP16 = 1"]
    parts = []
    for task in dict.fromkeys(task for task, _ in arms):
        plain = seconds(arms.get((task, "fp16"), []))
        rows = []
        for (of, arm), seeds in arms.items():
            if of != task:
                continue
            found = [outcome(run) for run in seeds]
            mean, error = with_error([run.end for run in found])
            steps = [reached(run) for run in seeds]
            known = [step for step in steps if step is not None]
            until = f"{statistics.median(known):.0f}" if known else "never"
            if known and len(known) < len(steps):
                until += f" ({len(known)} of {len(steps)})"
            cost = pretty(seconds(seeds) / plain) if plain else ""
            rows.append([
                arm, share(mean, error), f"{min(run.lowest for run in found):.0%}",
                own(seeds), until, f"{sum(run.fell for run in found)} of {len(seeds)}",
                middle(seeds, "kl"), whole_batch(seeds, answers_of(records / "sanity", task)),
                pretty(max(max(run["max_shift"]) for run in seeds)),
                middle(seeds, "ess"), middle(seeds, "gradient_norm"), cost,
            ])
        parts.append(markdown(head, rows) + "\n" + conditions(records / "sanity" / f"{task}.json"))
    return "\n".join(parts)


def several(records: Path) -> str:
    """The policy's own reward, by model, learning rate and arm."""
    rows, note = [], ""
    for folder in sorted((records / "sanity").glob("*-*/"), key=of_folder):
        for (task, arm), seeds in runs(folder).items():
            mine = [own_rewards(run) for run in seeds]
            lowest = [min((x for step, x in run if step > AFTER), default=nan) for run in mine]
            found = [outcome(run) for run in seeds]
            fell = sum(run.fell or low < FELL for run, low in zip(found, lowest, strict=True))
            note = conditions(folder / f"{task}.json")
            rows.append([
                *map(str, of_folder(folder)), arm, str(len(seeds)),
                share(*with_error([run[0][1] for run in mine])), share(min(lowest), nan, 0),
                share(*with_error([statistics.fmean(x for _, x in run[-2:]) for run in mine])),
                share(*with_error([run.end for run in found])), f"{fell} of {len(seeds)}",
                whole_batch(seeds, answers_of(folder, task)),
            ])
    if not rows:
        return "No record of `python -m benchmarks.lab sanity --models-each`.\n"
    return markdown(
        ["model", "learning rate", "arm", "runs", "π after the first step",
         f"lowest after step {AFTER}", "at the end", "engine's reward at the end", "fell",
         "KL of a batch, nats"], rows,
    ) + "\nπ on fixed prompts; the end: of π the last two looks, of the engine the last" + (
        f" {LAST} steps. Of the last model and rate: {note}")


def of_folder(folder: Path) -> tuple[int, float]:
    """Number of a trained model, and learning rate."""
    which, rate = folder.name.split("-", 1)
    return int(which), float(rate)


def own(seeds: Sequence[Curves]) -> str:
    """π's reward on fixed prompts at the end."""
    found = [value for run in seeds if (value := own_reward(run)) is not None]
    return share(*with_error(found)) if found else "not measured"


def whole_batch(seeds: Sequence[Curves], answers: int) -> str:
    """n κ T, and whether engine and trainer could be told apart by it at all."""
    nats = statistics.median(batch_kl(run, answers) for run in seeds)
    return pretty(nats) + (", cannot matter here" if nats < 1 else "")


def answers_of(folder: Path, task: str) -> int:
    """Answers of a step."""
    plan = json.loads((folder / f"{task}.json").read_text(encoding="utf-8"))["schedule"]
    return int(plan["prompts"] * plan["answers"])


def seconds(seeds: Sequence[Curves]) -> float:
    """CPU seconds of a step, median over steps and seeds."""
    parts = ("rollout_s", "train_s", "sync_s")
    every = [sum(step) for run in seeds for step in zip(*(run[p] for p in parts), strict=True)]
    return statistics.median(every) if every else 0.0


def middle(seeds: Sequence[Curves], column: str) -> str:
    return pretty(statistics.median(value for run in seeds for value in run[column]))


def conditions(path: Path) -> str:
    note = json.loads(path.read_text(encoding="utf-8"))
    plan, model = note["schedule"], note["model"]
    return (
        f"{note['engine']}; {path.stem}, a model of {model['parameters'] / 1e6:.1f} M parameters "
        f"trained until {model['solved']:.0%} were right; {note['prompts within reach']} prompts "
        f"within reach; {plan['steps']} steps of {plan['prompts']} prompts × {plan['answers']} "
        f"answers, {plan['updates']} updates each, learning rate {plan['learning_rate']:g}. "
        f"At the end: the last {LAST} steps. Fell: {LAST} steps in a row below {FELL:.0%} on "
        f"average; at zero: an end below {ZERO:.0%}. {note['processor']}, torch "
        f"{note['torch']}, commit {note['commit']}.\n"
    )


def phases(records: Path) -> str:
    """Reward at the end by mismatch, length and correction."""
    arms = runs(records / "map")
    if not arms:
        return "No record of `python -m benchmarks.lab map`.\n"
    roundings, corrections, tasks = axes(arms)
    head = ["rounding of the engine's weights", "answer", "KL at the start, nats per answer",
            "per batch", *corrections]
    rows = []
    for rounding in roundings:
        for task in tasks:
            cells = []
            for correction in corrections:
                seeds = arms.get((task, f"{rounding}-{correction}"), [])
                if not seeds:
                    cells.append("")
                    continue
                ends = [outcome(run) for run in seeds]
                fallen = sum(run.fell for run in ends)
                cells.append(share(*with_error([run.end for run in ends]), digits=0)
                             + (f", {fallen} of {len(ends)} fell" if fallen else ""))
            start = [
                run["kl"][0] * run["length"][0] for correction in corrections
                for run in arms.get((task, f"{rounding}-{correction}"), [])
            ]
            rows.append([rounding, f"{int(task.split('-')[1]) + 1} tokens",
                         pretty(statistics.fmean(start)) if start else "",
                         pretty(statistics.fmean(start) * answers_of(records / "map", task))
                         if start else "", *cells])
    notes = "\n".join(conditions(path) for path in sorted((records / "map").glob("*.json")))
    return markdown(head, rows) + "\n" + notes


def floors(records: Path) -> str:
    """Runs of the coarsest rounding, all lengths and schedules together."""
    folders = [records, *(path.parent for path in sorted(records.glob("*/map")))]
    every = [runs(folder / "map") for folder in folders]
    if not any(every):
        return "No record of `python -m benchmarks.lab map`.\n"
    found = {
        correction: [
            outcome(run) for arms in every for (_, arm), seeds in arms.items()
            if arm == f"{COARSEST}-{correction}" for run in seeds
        ]
        for correction in CORRECTIONS
    }
    plain = found["uncorrected"]
    fell = {name: sum(run.fell for run in of) for name, of in found.items()}
    rows = [
        [name, str(len(of)), interval(fell[name], len(of)),
         interval(sum(run.zero for run in of), len(of)),
         pretty(fisher(fell[name], len(of), fell["uncorrected"], len(plain)))
         if name != "uncorrected" else ""]
        for name, of in found.items() if of
    ]
    head = [f"{COARSEST}, all lengths", "runs", "fell", "at zero", "p (fell) against uncorrected"]
    return markdown(head, rows) + "\nIn brackets 95 % intervals (Wilson); p is Fisher's.\n"


def explained(records: Path) -> str:
    """What tokens, pairs and positions share of the error of the log-odds, in the kept dumps."""
    paths = [*sorted(records.glob("*-*16.npz")),
             *sorted((records / "real" / "offline").glob("bf16-bf16-[0-9].npz"))]
    if not paths:
        return "No record of `python -m benchmarks.lab offline`.\n"
    body = []
    for path in paths:
        found = shared_error(read_dump(path))
        name = path.stem if path.parent == records else f"SmolLM2-135M, {path.stem}"
        body.append([name, *(shared_cell(found.get(kind)) for kind in EXPLAINS)])
    return markdown(["rollout and trainer", *EXPLAINS], body) + (
        "\nA cell: the share of the variance that tokens of one class have in common (an unbiased "
        "estimate, which may be negative), and in brackets the 95 % quantile where classes say "
        "nothing.\n"
    )


def shared_cell(of: Shared | None) -> str:
    return f"{of.share:.4f} ({of.null:.4f})" if of else "nothing repeats"


TABLES: dict[str, Callable[[Path], str]] = {
    "offline": offline, "ratios": ratios, "ranking": ranking, "sanity": sanity,
    "several": several, "map": phases, "floors": floors, "published": published_table.table,
    "explained": explained,
}
