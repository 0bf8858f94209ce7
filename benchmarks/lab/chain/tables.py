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
from benchmarks.lab.chain.statistics import fisher, holm, interval, welch
from benchmarks.lab.chain.world import WORLDS

Rows = list[dict[str, str]]
LEVEL = 0.05
LEARNT = 0.95
"""J(π) whose first step a table gives."""
CLAIMED = 8
"""Updates behind that the claims of the plan are about."""
SANK = 0.05
PARTED = 0.1
"""Of J(π) at a step, between two processors."""
AGAIN = "again"
"""The folder of runs of `exact` that were made on another processor."""
CANDIDATES = ("token-tis-critic", "token-tis-half", "past-tis")
"""Arms that may do better than token-TIS and sequence-TIS."""


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
    every = of_exact(records, world=world, length=length, task=task, optimizer=optimizer)
    found = {key: row for key, row in every.items() if key[1] in arms}
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


def again(records: Path) -> str:
    """Runs that part from themselves when they are made again on another processor."""
    first, other = (
        {tuple(row[name] for name in exact.Run._fields): row for row in rows(path)}
        for path in (records / "exact.csv", records / AGAIN / "exact.csv")
    )
    both = [key for key in first if key in other]
    if not both:
        return f"No record of `python -m benchmarks.lab exact --records …/{AGAIN}`.\n"
    apart = {
        key: [abs(x - y) for x, y in zip(*curves, strict=True)]
        for key in both
        if (curves := [curve(of[key], "j_policy") for of in (first, other)])
    }
    body = [
        [*key[:1], *key[2:], pretty(max(apart[key])), cell(first[key]), cell(other[key])]
        for key in both if max(apart[key]) > PARTED
    ]
    alike = sum(sank(first[key]) == sank(other[key]) for key in both)
    made, remade = (note(path / "exact.json")[:-2] for path in (records, records / AGAIN))
    return markdown(
        ["world", "task", "optimizer", "engine", "arm", "apart, at most", "first", "again"], body,
    ) + (
        f"\nOf {len(both)} runs of {' and '.join(sorted({key[1] for key in both}, key=int))}"
        f" tokens {sum(max(of) == 0 for of in apart.values())} have the same J(π) at each step, to"
        f" four digits, and {sum(of[-1] < 0.02 for of in apart.values())} end within 0.02; here"
        f" are those that part by more than {PARTED} at any. {alike} sank (below the start by more"
        f" than {SANK}) in both or in neither. First: {made}. Again: {remade}.\n"
    )


def lengths(records: Path) -> str:
    """Steps to 95 % by bits of mantissa and length, uncorrected, with a critic, and token-TIS."""
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
                reached(found.get((name, arm)))
                for arm in ("uncorrected", "uncorrected-critic", "token-tis")))
        if any(part != "not run" for cell in cells for part in cell.split(" / ")):
            body.append([kind, "all" if bits is None else str(bits), *cells])
    return markdown(head, body) + (
        f"\nThe first step at J(π) = {LEARNT}, uncorrected / with a critic / token-TIS; never: "
        "> and in brackets J(π) at the end. 10 bits are FP16's, 7 BF16's. "
        "\"both\": weights and activations of the engine alone. Rows of which nothing was run are "
        "left out.\n"
    )


def reached(row: dict[str, str] | None) -> str:
    if row is None:
        return "not run"
    end, _, step = outcome(row)
    return str(step) if step is not None else f"> ({end:.2f})"


def baselines(records: Path) -> str:
    """What mismatch does to uncorrected and token-TIS runs, by what is taken from a reward."""
    arms = [f"{weights}{of}" for weights in ("uncorrected", "token-tis")
            for of in ("", "-critic", "-half")]
    found = of_exact(records, world="chain", length=256, task=10, optimizer="adam")
    names = [name for name in exact.KINDS if (name, "uncorrected-critic") in found]
    if not names:
        return "No record of `python -m benchmarks.lab exact`.\n"
    body = [[name, *(cell(found.get((name, arm))) for arm in arms)] for name in names]
    return markdown(["engine", *arms], body)


def critics_everywhere(records: Path) -> str:
    """How many runs sink below their start, without and with a critic's baseline."""
    arms = ("uncorrected", "uncorrected-critic", "token-tis", "token-tis-critic")
    body = []
    for world, task, optimizer in (
        *((world, exact.TASKS[0], "adam") for world in WORLDS), ("chain", exact.TASKS[0], "sgd"),
        *(("chain", task, "adam") for task in exact.TASKS[1:]),
    ):
        found = of_exact(records, world=world, length=256, task=task, optimizer=optimizer)
        names = [name for name in exact.KINDS if all((name, arm) in found for arm in arms)]
        if names:
            body.append([f"`{world}`, task {task}, {optimizer}", str(len(names)), *(
                str(sum(sank(found[name, arm]) for name in names)) for arm in arms)])
    if not body:
        return "No record of `python -m benchmarks.lab exact`.\n"
    return markdown(["world", "engines", *(f"`{arm}` sank" for arm in arms)], body) + (
        f"\nSank: J(π) was below its start by more than {SANK} at some step.\n"
    )


def sank(row: dict[str, str]) -> bool:
    return outcome(row)[1] < curve(row, "j_policy")[0] - SANK


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


def behind_of(records: Path, *, world: str = "chain", untouched: bool = False) -> str:
    """One row a rate and arm, 8 behind and not behind: counts with intervals, ends with errors."""
    cells = by_cell(records, world=world, untouched=untouched)
    shown = [key for key in cells if key[1] in (0, CLAIMED)]
    if not shown:
        return "No record of `python -m benchmarks.lab behind`.\n"
    order = sorted(shown, key=lambda key: (-key[0], key[1], behind.MEANT.index(key[2])))
    adjusted = against_uncorrected(cells)
    head = ["rate", "behind", "arm", "runs", "J(π) at the end", "fell", "at zero", "p (fell), Holm"]
    body = []
    for key in order:
        rate, lag, arm = key
        runs = cells[key]
        body.append([
            f"{rate:g}", str(lag), arm, str(len(runs)), mean_end(runs),
            interval(fallen(runs), len(runs)), interval(zero(runs), len(runs)),
            pretty(adjusted[key]) if key in adjusted else "",
        ])
    tasks = ", ".join(sorted({row["task"] for key in shown for row in cells[key]}))
    return markdown(head, body) + (
        f"\nWorld `{world}`, tasks {tasks}; J at the end is the mean of the last {behind.LAST} "
        f"steps, ± standard error over runs. Fell: J(π) below {behind.FELL} after step "
        f"{behind.AFTER}; at zero: an end below {behind.ZERO}; in brackets 95 % intervals "
        "(Wilson). p: Fisher's test of *fell* against uncorrected at the same rate and lag, on the "
        "tasks and seeds that both have, Holm's correction over the arms of the cell. "
        + idle(cells) + note(records / "behind.json")
    )


def idle(cells: dict[tuple[float, int, str], Rows]) -> str:
    """Which arms did nothing in how many of their runs behind: the curve is uncorrected's."""
    counts: dict[str, list[bool]] = {}
    for rate, lag, arm in sorted(cells, key=lambda cell: (-cell[0], cell[1:])):
        runs = cells[rate, lag, arm]
        plain = {
            (row["task"], row["seed"]): row["j_policy"]
            for row in cells.get((rate, lag, "uncorrected"), []) if lag
        }
        same = [plain[key] == row["j_policy"] for row in runs
                if (key := (row["task"], row["seed"])) in plain]
        if arm != "uncorrected" and any(same):
            counts.setdefault(f"{arm} at {rate:g}, {lag} behind", []).extend(same)
    if not counts:
        return ""
    said = (f"{name}: {sum(same)} of {len(same)}" for name, same in counts.items())
    return f"Runs that have uncorrected's curve, so that the arm did nothing: {'; '.join(said)}. "


def over_lags(records: Path, *, untouched: bool = False) -> str:
    """One row a rate and lag: the KL that it makes, and what became of the main arms."""
    cells = by_cell(records, untouched=untouched)
    rows_of = sorted({key[:2] for key in cells if key[1]}, key=lambda key: (-key[0], key[1]))
    if not rows_of:
        return "No record of `python -m benchmarks.lab behind`.\n"
    head = ["rate", "behind", "KL under token-TIS", *behind.MAIN]
    body = []
    for rate, lag in rows_of:
        of = {arm: cells.get((rate, lag, arm), []) for arm in behind.MAIN}
        body.append([
            f"{rate:g}", str(lag), pretty(made_kl(of["token-tis"])) if of["token-tis"] else "",
            *(f"{mean_end(runs, 2)}; {fallen(runs)}/{len(runs)}" if runs else "not run"
              for runs in of.values()),
        ])
    return markdown(head, body) + (
        "\nA cell: J(π) at the end ± standard error over runs; how many runs fell. KL(μ‖π): nats "
        "per sequence, the median over runs of the mean over steps.\n"
    )


def others_by_lag(records: Path) -> str:
    """One row a rate and arm that is not main: what became of its runs at each lag."""
    cells = by_cell(records)
    rates = sorted({rate for rate, _, _ in cells}, reverse=True)
    lags = sorted(behind.LAGS)
    body = [
        [f"{rate:g}", arm, *(
            f"{mean_end(runs, 2)}; {fallen(runs)}/{len(runs)}" if runs else "not run"
            for runs in found
        )]
        for rate in rates for arm in behind.MEANT if arm not in behind.MAIN
        if any(found := [cells.get((rate, lag, arm), []) for lag in lags])
    ]
    if not body:
        return "No record of `python -m benchmarks.lab behind`.\n"
    return markdown(["rate", "arm", *(f"{lag} behind" for lag in lags)], body) + (
        "\nA cell as above; tasks 20 to 22.\n"
    )


def mean_end(runs: Rows, digits: int = 3) -> str:
    end, error = with_error(ends(runs))
    return f"{end:.{digits}f}" + (f" ± {error:.{digits}f}" if len(runs) > 1 else "")


def made_kl(runs: Rows) -> float:
    """Nats per sequence that a lag made, the median over runs of the mean over a run."""
    return statistics.median(statistics.fmean(curve(row, "kl")) for row in runs)


def better(records: Path) -> str:
    """Whether a candidate's ends are above those of token-TIS and sequence-TIS, as planned."""
    cells, untouched = by_cell(records), by_cell(records, untouched=True)
    rates_of = sorted({key[0] for key in cells if key[1] == CLAIMED}, reverse=True)[:2]
    pairs = [(rate, other) for rate in rates_of for other in ("token-tis", "sequence-tis")]
    head = ["arm", "rate", "against", "runs of each", "difference of ends", "p, Holm",
            f"on task {behind.UNTOUCHED}"]
    body, said = [], []
    for arm in CANDIDATES:
        found = {
            (rate, other): both for rate, other in pairs
            if len((both := common(cells, (rate, CLAIMED, arm), (rate, CLAIMED, other)))[0]) > 1
        }
        differences = [welch(*both) for both in found.values()]
        adjusted = holm([difference.p for difference in differences])
        for ((rate, other), both), difference, p in zip(
            found.items(), differences, adjusted, strict=True
        ):
            there = common(untouched, (rate, CLAIMED, arm), (rate, CLAIMED, other))
            body.append([
                arm, f"{rate:g}", other, str(len(both[0])), str(difference), pretty(p),
                f"{welch(*there)}, {len(there[0])} runs" if len(there[0]) > 1 else "not run",
            ])
        holds = all(p < LEVEL and difference.mean > 0
                    for difference, p in zip(differences, adjusted, strict=True))
        said.append(f"`{arm}` " + (
            f"is not decided, {len(found)} of 4 comparisons" if len(found) < 4
            else "does better" if holds else "is not shown to do better"
        ))
    if not body:
        return "No record of `python -m benchmarks.lab behind`.\n"
    return markdown(head, body) + (
        f"\n{CLAIMED} behind, tasks {', '.join(map(str, behind.TASKS))} together, the tasks and "
        "seeds that both arms have; 95 % intervals and p of Welch's test, Holm's correction over "
        "an arm's rows and not over the arms. By the rule of the plan, against token-TIS and "
        f"sequence-TIS at both rates: {'; '.join(said)}.\n"
    )


def common(
    cells: dict[tuple[float, int, str], Rows], a: tuple[float, int, str], b: tuple[float, int, str],
    column: str = "end",
) -> tuple[list[float], list[float]]:
    """A column of two cells, of the tasks and seeds that both have."""
    one, other = (
        {(row["task"], row["seed"]): float(row[column]) for row in cells.get(key, [])}
        for key in (a, b)
    )
    both = sorted(one.keys() & other.keys())
    return [one[key] for key in both], [other[key] for key in both]


def ends(runs: Rows) -> list[float]:
    return [float(row["end"]) for row in runs]


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
    """Adjusted p of each arm, on the tasks and seeds that it and the uncorrected one have."""
    found = {}
    for rate, lag in {key[:2] for key in cells}:
        plain = cells.get((rate, lag, "uncorrected"))
        others = [key for key in cells if key[:2] == (rate, lag) and key[2] != "uncorrected"]
        if not plain or not others:
            continue
        pairs = {
            key: both for key in others
            if (both := common(cells, (rate, lag, "uncorrected"), key, "lowest"))[0]
        }
        p_values = [
            fisher(below(behind.FELL, a), len(a), below(behind.FELL, b), len(b))
            for a, b in pairs.values()
        ]
        found |= dict(zip(pairs, holm(p_values), strict=True))
    return found


def below(level: float, numbers: Iterable[float]) -> int:
    return sum(x < level for x in numbers)


def fallen(runs: Rows) -> int:
    return below(behind.FELL, [float(row["lowest"]) for row in runs])


def zero(runs: Rows) -> int:
    return below(behind.ZERO, ends(runs))


def claim(records: Path) -> str:
    """The claim of the plan: token-TIS against uncorrected, 8 behind, on counts of *fell*."""
    head = ["tasks", "rate", "uncorrected fell", "token-TIS fell", "p, Holm", "as planned"]
    body = []
    for untouched in (False, True):
        cells = by_cell(records, untouched=untouched)
        adjusted = against_uncorrected(cells)
        for rate in sorted({key[0] for key in cells}, reverse=True):
            plain, mended = (
                cells.get((rate, CLAIMED, arm)) for arm in ("uncorrected", "token-tis")
            )
            if not plain or not mended or (rate, CLAIMED, "token-tis") not in adjusted:
                continue
            p = adjusted[rate, CLAIMED, "token-tis"]
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
    body = [
        [world, f"{rate:g}", str(len(ends)), f"{statistics.fmean(ends):.3f}"]
        for world in (behind.ATTENTION, *WORLDS)
        for rate, ends in behind.control_ends(records / "behind.csv", world).items() if ends
    ]
    if not body:
        return "No record of `python -m benchmarks.lab behind`.\n"
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
    "exact_again": again, "exact_baselines": baselines, "exact_critics": critics_everywhere,
    "behind": behind_of, "behind_untouched": partial(behind_of, untouched=True),
    "behind_attention": partial(behind_of, world="attention"), "behind_rates": rates,
    "behind_lags": over_lags, "behind_lags_untouched": partial(over_lags, untouched=True),
    "behind_lags_others": others_by_lag,
    "behind_claim": claim, "behind_better": better, "bias": biases, "bias_shared": shared,
    "coherence": coherences,
}
