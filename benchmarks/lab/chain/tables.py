"""Tables of the chain's records."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from benchmarks.lab.cells import markdown, pretty, with_error
from benchmarks.lab.chain import behind, bias, exact
from benchmarks.lab.chain.arms import ARMS
from benchmarks.lab.chain.engines import BITS, ENGINES
from benchmarks.lab.chain.records import curve, rows
from benchmarks.lab.chain.statistics import fisher, holm, interval

Rows = list[dict[str, str]]
LEVEL = 0.05
LEARNT = 0.95
"""J(π) whose first step a table gives."""


def of_exact(records: Path, **key: object) -> dict[tuple[str, str], dict[str, str]]:
    """Records of `exact` with this key, by engine and arm."""
    wanted = {name: str(value) for name, value in key.items()}
    return {
        (row["engine"], row["arm"]): row for row in rows(records / "exact.csv")
        if all(row[name] == value for name, value in wanted.items())
    }


def outcome(row: dict[str, str]) -> tuple[float, float, int | None]:
    """J(π) at the end, the lowest, and the first step at ``LEARNT``."""
    values = curve(row, "j_policy")
    reached = next((step for step, value in enumerate(values) if value >= LEARNT), None)
    return values[-1], min(values), reached


def cell(row: dict[str, str] | None) -> str:
    """The end, the lowest where it lies below the start, the first step at ``LEARNT``."""
    if row is None:
        return "not run"
    end, lowest, reached = outcome(row)
    fell = f", lowest {lowest:.3f}" if lowest < curve(row, "j_policy")[0] - 0.005 else ""
    return f"{end:.3f}{fell}, {'never' if reached is None else f'step {reached}'}"


def engines(
    records: Path, *, world: str = "chain", length: int = 256, task: int = 10,
    optimizer: str = "adam", arms: Iterable[str] = exact.CORE,
) -> str:
    """One row an engine: its KL, and what became of each arm."""
    found = of_exact(records, world=world, length=length, task=task, optimizer=optimizer)
    if not found:
        return "No record of `python -m benchmarks.lab exact`.\n"
    names = [name for name in ENGINES if any(engine == name for engine, _ in found)]
    head = ["engine", "KL per sequence: start", "highest, uncorrected", *arms]
    body = []
    for name in names:
        first = next(row for (engine, _), row in found.items() if engine == name)
        plain = found.get((name, "uncorrected"))
        highest = pretty(max(curve(plain, "kl"))) if plain else "not run"
        body.append([name, pretty(curve(first, "kl")[0]), highest,
                     *(cell(found.get((name, arm))) for arm in arms)])
    return markdown(head, body) + (
        f"\nWorld `{world}`, T = {length}, task {task}, {optimizer}; {len(found)} runs of "
        f"{next(iter(found.values()))['steps']} steps. A cell: J(π) at the end, its lowest where "
        f"it fell below the start, the first step at {LEARNT}. KL(μ‖π) in nats. "
        + note(records / "exact.json")
    )


def every_arm(records: Path) -> str:
    """One row an arm, on the engines that all arms were run with."""
    found = of_exact(records, world="chain", length=256, task=10, optimizer="adam")
    if not found:
        return "No record of `python -m benchmarks.lab exact`.\n"
    shown = ("behind-4", "behind-8", "int3")
    arms = [arm for arm in ARMS if any(a == arm for _, a in found)]
    body = [[f"`{arm}`", *(cell(found.get((name, arm))) for name in shown)] for arm in arms]
    return markdown(["arm", *shown], body) + "\n" + note(records / "exact.json")


def lengths(records: Path) -> str:
    """Steps to 95 % by bits of mantissa and length, uncorrected beside token-TIS."""
    sizes = sorted({int(row["length"]) for row in rows(records / "exact.csv")})
    if not sizes:
        return "No record of `python -m benchmarks.lab exact`.\n"
    head = ["rounded", "bits", *(f"T = {size}" for size in sizes)]
    body = []
    for kind, bits in [("nothing", None), *((k, m) for k in ("activations", "both") for m in BITS)]:
        name = "exact" if bits is None else f"{kind}-{bits}"
        cells = []
        for size in sizes:
            found = of_exact(
                records, world="chain", length=size, task=10, optimizer="adam", engine=name
            )
            cells.append(" / ".join(
                reached(found.get((name, arm))) for arm in ("uncorrected", "token-tis")))
        if any("not run" not in cell for cell in cells):
            body.append([kind, "all" if bits is None else str(bits), *cells])
    return markdown(head, body) + (
        f"\nThe first step at J(π) = {LEARNT}, uncorrected / token-TIS; where it was never "
        "reached, > and in brackets J(π) at the end. 10 bits are FP16's, 7 BF16's. "
        "\"both\": weights and activations of the engine alone. Rows of which nothing was run are "
        "left out.\n"
    )


def reached(row: dict[str, str] | None) -> str:
    if row is None:
        return "not run"
    end, _, step = outcome(row)
    return str(step) if step is not None else f"> ({end:.2f})"


def in_worlds(records: Path) -> str:
    """Where engines make uncorrected runs fall or slow, and token-TIS runs, by world."""
    found = {
        world: of_exact(records, world=world, length=256, task=10, optimizer="adam")
        for world in ("chain", "mended", "dense")
    }
    names = [
        name for name in exact.KINDS
        if sum((name, "uncorrected") in of for of in found.values()) > 1
    ]
    if not names:
        return "No record of `python -m benchmarks.lab exact`.\n"
    arms = ("uncorrected", "token-tis")
    head = ["engine", *(f"{world}: {arm}" for world in found for arm in arms)]
    body = [
        [name, *(cell(of.get((name, arm))) for of in found.values() for arm in arms)]
        for name in names
    ]
    return markdown(head, body)


def by_lag(records: Path, *, world: str = "chain", untouched: bool = False) -> str:
    """One row a rate, lag and arm: counts with their intervals, ends with their errors."""
    cells = by_cell(records, world=world, untouched=untouched)
    if not cells:
        return "No record of `python -m benchmarks.lab behind`.\n"
    order = sorted(cells, key=lambda key: (-key[0], key[1], behind.MEANT.index(key[2])))
    adjusted = against_uncorrected(cells)
    head = ["rate", "behind", "arm", "runs", "J(π) at the end", "fell", "at zero", "p (fell), Holm"]
    body = []
    for key in order:
        rate, lag, arm = key
        runs = cells[key]
        end, error = with_error([float(row["end"]) for row in runs])
        body.append([
            f"{rate:g}", str(lag), arm, str(len(runs)),
            f"{end:.3f}" + (f" ± {error:.3f}" if len(runs) > 1 else ""),
            interval(fallen(runs), len(runs)), interval(zero(runs), len(runs)),
            pretty(adjusted[key]) if key in adjusted else "",
        ])
    shown = ", ".join(sorted({row["task"] for runs in cells.values() for row in runs}))
    return markdown(head, body) + (
        f"\nWorld `{world}`, tasks {shown}; J at the end is the mean of the last {behind.LAST} "
        f"steps, ± standard error over runs. Fell: J(π) below {behind.FELL} after step "
        f"{behind.AFTER}; at zero: an end below {behind.ZERO}; in brackets 95 % intervals "
        "(Wilson). p: Fisher's test of *fell* against uncorrected at the same rate and lag, "
        "Holm's correction over the arms of the cell. " + note(records / "behind.json")
    )


def by_cell(
    records: Path, *, world: str = "chain", untouched: bool = False
) -> dict[tuple[float, int, str], Rows]:
    """Runs of each rate, lag and arm."""
    tasks = {str(behind.UNTOUCHED)} if untouched else set(map(str, behind.TASKS))
    cells: dict[tuple[float, int, str], Rows] = {}
    for row in rows(records / "behind.csv"):
        if row["world"] == world and row["task"] in tasks:
            key = float(row["rate"]), int(row["lag"]), row["arm"]
            cells.setdefault(key, []).append(row)
    return cells


def against_uncorrected(
    cells: dict[tuple[float, int, str], Rows],
) -> dict[tuple[float, int, str], float]:
    """Adjusted p of each arm that has an uncorrected one beside it."""
    found = {}
    for rate, lag in {key[:2] for key in cells}:
        plain = cells.get((rate, lag, "uncorrected"))
        others = [key for key in cells if key[:2] == (rate, lag) and key[2] != "uncorrected"]
        if not plain or not others:
            continue
        p_values = [
            fisher(fallen(plain), len(plain), fallen(cells[key]), len(cells[key]))
            for key in others
        ]
        found |= dict(zip(others, holm(p_values), strict=True))
    return found


def fallen(runs: Rows) -> int:
    return sum(float(row["lowest"]) < behind.FELL for row in runs)


def zero(runs: Rows) -> int:
    return sum(float(row["end"]) < behind.ZERO for row in runs)


def claim(records: Path) -> str:
    """The claim of the plan: token-TIS against uncorrected, 8 behind, on counts of *fell*."""
    head = ["tasks", "rate", "uncorrected fell", "token-TIS fell", "p, Holm", "as planned"]
    body = []
    for untouched in (False, True):
        cells = by_cell(records, untouched=untouched)
        adjusted = against_uncorrected(cells)
        for rate in sorted({key[0] for key in cells}, reverse=True):
            plain, mended = (cells.get((rate, 8, arm)) for arm in ("uncorrected", "token-tis"))
            if not plain or not mended:
                continue
            p = adjusted[rate, 8, "token-tis"]
            tasks = sorted({row["task"] for row in plain})
            body.append([
                ", ".join(tasks) + (" (untouched)" if untouched else ""), f"{rate:g}",
                interval(fallen(plain), len(plain)), interval(fallen(mended), len(mended)),
                pretty(p), "holds" if p < LEVEL and fallen(mended) < fallen(plain) else "not shown",
            ])
    if not body:
        return "No record of `python -m benchmarks.lab behind`.\n"
    return markdown(head, body)


def rates(records: Path) -> str:
    """What the control says of learning rates."""
    ends: dict[tuple[str, float], list[float]] = {}
    for row in rows(records / "behind.csv"):
        if row["lag"] == "0" and row["task"] == str(behind.TASKS[0]):
            ends.setdefault((row["world"], float(row["rate"])), []).append(float(row["end"]))
    if not ends:
        return "No record of `python -m benchmarks.lab behind`.\n"
    body = [
        [world, f"{rate:g}", str(len(found)), f"{statistics.fmean(found):.3f}"]
        for (world, rate), found in sorted(ends.items())
    ]
    return markdown(["world", "rate", "runs", "J(π) at the end"], body)


def biases(records: Path) -> str:
    """Bias of the expected update at the start, by length."""
    found = [row for row in rows(records / "bias.csv") if row["engine"] == bias.BY_LENGTH]
    if not found:
        return "No record of `python -m benchmarks.lab bias`.\n"
    head = ["T", "KL per sequence", *(f"`{arm}`" for arm in bias.SHOWN)]
    body = [
        [row["length"], pretty(float(row["kl"])),
         *(pretty(float(row[arm])) for arm in bias.SHOWN)]
        for row in sorted(found, key=lambda row: int(row["length"]))
    ]
    return markdown(head, body) + "\n" + note(records / "bias.json")


def shared(records: Path) -> str:
    """What of the bias the contexts share, and the batch from which it shows."""
    found = [row for row in rows(records / "bias.csv") if row["length"] == "256"]
    if not found:
        return "No record of `python -m benchmarks.lab bias`.\n"
    head = ["engine", "KL per sequence", "‖bias‖² of one draw", "shared between draws",
            "n*, sequences", "token-TIS, ‖bias‖² of one draw"]
    body = [
        [row["engine"], pretty(float(row["kl"])), pretty(float(row["uncorrected"]) ** 2),
         f"{float(row['shared']):.2g} ± {float(row['error']):.1g}",
         f"{float(row['n_star']):,.0f}" if row["n_star"] else "none found",
         pretty(float(row["token-tis"]) ** 2)]
        for row in found
    ]
    return markdown(head, body) + (
        f"\nT = 256, {bias.DRAWS} draws, in units of ‖∇J‖², uncorrected but for the last column; "
        "± by the jackknife. None found: the shared part is below two errors. "
        + note(records / "bias.json")
    )


def coherences(records: Path) -> str:
    """n* from sketches of sampled gradients beside the exact one."""
    found = rows(records / "coherence.csv")
    if not found:
        return "No record of `python -m benchmarks.lab coherence`.\n"

    def of(row: dict[str, str], name: str) -> str:
        n, low, high = (float(row[f"{name}_{field}"]) for field in ("n_star", "low", "high"))
        return f"{n:,.0f} ({low:,.0f} to {high:,.0f})"

    body = [
        [row["engine"], pretty(float(row["kl"])), of(row, "estimated"), of(row, "exact")]
        for row in found
    ]
    return markdown(["engine", "KL per sequence", "n*, estimated", "n*, exact"], body) + (
        f"\nT = {found[0]['length']}, {found[0]['batches']} batches of 64 sequences; in parentheses"
        " two standard errors. Exact but for the draws of contexts and the noise's trace.\n"
    )


def note(path: Path) -> str:
    """Under which conditions the runs were made."""
    if not path.exists():
        return ""
    said = json.loads(path.read_text(encoding="utf-8"))
    return (
        f"{said['processor']}, one thread, torch {said['torch']}, commit {said['commit']}, "
        f"{said['date']}.\n"
    )


TABLES: dict[str, Callable[[Path], str]] = {
    "exact": engines, "exact_sgd": partial(engines, optimizer="sgd"),
    "exact_arms": every_arm, "exact_lengths": lengths, "exact_worlds": in_worlds,
    "behind": by_lag, "behind_untouched": partial(by_lag, untouched=True),
    "behind_attention": partial(by_lag, world="attention"), "behind_rates": rates,
    "behind_claim": claim, "bias": biases, "bias_shared": shared, "coherence": coherences,
}
