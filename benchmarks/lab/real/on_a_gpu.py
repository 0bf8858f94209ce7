"""Tables and a figure of the runs and pairs that a GPU made."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from math import inf, isnan
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from scipy import stats

from benchmarks.lab.cells import markdown
from benchmarks.lab.chain.statistics import holm
from benchmarks.lab.real.intervals import Row, geometric, mean, number_of, p_of, rows_of
from benchmarks.lab.real.learner import PPO
from benchmarks.lab.real.together import (
    AFTER_STEP,
    AT_ONCE,
    ICEPOP,
    JUDGED,
    STEPS,
    TIS,
    Run,
    design,
)

Arm = Run
"""A run whose seed says nothing."""
NEAREST, STOCHASTIC = Run(), Run(rounding="stochastic")
FP16, FP32, CORRECTED = Run(engine="fp16"), Run(engine="fp32"), Run(correction=TIS)
CONTRASTS = ((STOCHASTIC, NEAREST), (FP16, NEAREST), (CORRECTED, NEAREST), (STOCHASTIC, FP32))
"""Family (a) of the plan."""
IN_BF16, IN_FP16 = NEAREST._replace(trainer="bf16"), FP16._replace(trainer="fp16")
ROUNDED = IN_BF16._replace(rounding=AFTER_STEP)
IN_16_BITS = ((IN_FP16, IN_BF16), (ROUNDED, IN_BF16), (IN_BF16, NEAREST))
"""Family (d)."""
BEHIND = Run(rounding="stochastic", every=8)
OTHERS = ("token-mis", ICEPOP, "sequence-mis:high=2", PPO)
RATES = tuple(
    (a._replace(rate=rate), NEAREST._replace(rate=rate))
    for rate in (1e-5, 4e-5) for a in (STOCHASTIC, FP16, CORRECTED)
)
BESIDE = (
    (FP16._replace(correction=TIS), FP16), (FP32._replace(correction=TIS), FP32),
    (CORRECTED, STOCHASTIC), (FP16, FP32), (FP16, STOCHASTIC),
    *((of._replace(correction=x), of) for of in (NEAREST, FP16) for x in OTHERS),
    (NEAREST._replace(rounding="feedback"), NEAREST),
    (NEAREST._replace(rounding="feedback"), STOCHASTIC),
    (STOCHASTIC._replace(correction=TIS), STOCHASTIC),
    (NEAREST._replace(head="fp32"), NEAREST), (IN_BF16._replace(head="fp32"), IN_BF16),
    *((of._replace(correction=TIS), of) for of in (IN_BF16, IN_FP16)),
    (IN_FP16, FP16), (ROUNDED, STOCHASTIC), (ROUNDED, IN_FP16), *RATES,
    (BEHIND._replace(correction=TIS), BEHIND), (BEHIND, STOCHASTIC),
    (BEHIND._replace(correction=TIS), STOCHASTIC),
)
"""Differences of which no p is given."""
NONE = "No record of `python -m benchmarks.lab.real {}`.\n"


def arms(records: Path) -> dict[Arm, dict[int, Row]]:
    """Runs by arm and seed, in the design's order."""
    found: dict[Arm, dict[int, Row]] = {}
    path = records / "together.csv"
    for row in rows_of(path) if path.exists() else []:
        run = Run(*(
            type(usual)(row[name]) for name, usual in Run._field_defaults.items()
        ))
        found.setdefault(run._replace(seed=0), {})[run.seed] = row
    planned = [run._replace(seed=0) for block in design() for run in block]
    return {arm: found[arm] for arm in dict.fromkeys([*planned, *found]) if arm in found}


def curve(row: Row, name: str) -> list[float]:
    return [float(x) for x in row[name].split()]


def over_the_run(row: Row, name: str = "sampled") -> float:
    """The mean over the judged steps but the first, which no update precedes."""
    return statistics.fmean(curve(row, name)[1:])


def named(arm: Arm) -> str:
    """What an arm differs by from the usual run, in words."""
    words = [arm.engine] + [x for x in (arm.rounding,) if x != "nearest"] + [arm.correction]
    words += [f"sent every {arm.every} steps"] if arm.every != 1 else []
    words += [f"trainer {arm.trainer}"] if arm.trainer != "fp32" else []
    words += ["FP32 head"] if arm.head != "same" else []
    words += [f"rate {arm.rate:g}"] if arm.rate != Run().rate else []
    words += [arm.task] if arm.task != Run().task else []
    words += [f"baseline {arm.baseline}"] if arm.baseline != "group" else []
    return ", ".join(words)


def reached(row: Row, share: float = 0.8) -> float:
    """The first judged step at which so many answers are right."""
    return next((JUDGED * i for i, x in enumerate(curve(row, "sampled")) if x >= share), inf)


def at(step: float) -> str:
    return "never" if step == inf else f"{step:g}"


def learning(records: Path) -> str:
    """Every arm: how it learned, and its mismatch."""
    found = arms(records)
    if not found:
        return NONE.format("together")
    learned, apart = [], []
    for arm, seeds in found.items():
        rows = [*seeds.values()]
        steps = sorted(reached(row) for row in rows)
        ends = [statistics.fmean(curve(row, "sampled")[-3:]) for row in rows]
        learned.append([
            named(arm), str(len(rows)), mean([over_the_run(row) for row in rows]),
            mean([over_the_run(row, "greedy") for row in rows]),
            f"{mean(ends)} ({min(ends):.2f} to {max(ends):.2f})",
            mean([min(curve(row, "sampled")[3:]) for row in rows]),
            f"{at(statistics.median(steps))} ({at(steps[0])} to {at(steps[-1])})",
            *(mean([statistics.fmean(curve(row, "reward")[of]) for row in rows])
              for of in (slice(1, None), slice(-5, None))),
        ])
        apart.append([
            named(arm), *(geometric([pick(curve(row, "kl")) for row in rows])
                          for pick in (lambda x: x[0], max, lambda x: x[-1])),
            *(mean([min(curve(row, column)) for row in rows])
              for column in ("ess_token", "ess_sequence")),
            *(mean([x for row in rows if not isnan(x := curve(row, "arrival")[i])])
              for i in (0, -1)),
            mean([statistics.median(curve(row, "gradient_norm")) for row in rows]),
        ])
    note = json.loads((records / "together.json").read_text(encoding="utf-8"))
    every = [float(row["seconds"]) for seeds in found.values() for row in seeds.values()]
    return (
        markdown(
            ["engine, correction", "seeds", "right at T = 1, over the run", "greedily",
             "at the end", "lowest after step 12", "80 % at step, median",
             "engine's reward, over the run", "last 5 steps"], learned,
        ) + f"\nShares of right answers of the policy, in float32; {STEPS} steps; the end is the"
        " mean of the last three that were judged, in brackets the lowest and highest run's.\n\n"
        + markdown(
            ["engine, correction", "KL: first", "largest", "last", "ESS of tokens, least",
             "of sequences, least", "arrives of the first sending", "of the last",
             "gradient norm, median"], apart,
        ) + f"\nKL is k3 of KL(μ‖π), nats per token. {statistics.median(every):.0f} s a run,"
        f" up to {AT_ONCE} at a time, on a card that three processes used. {note['processor']},"
        f" torch {note['torch']}, commit {note['commit']}, {note['date']}.\n"
    )


def differences(found: Mapping[Arm, Mapping[int, Row]], pair: tuple[Arm, Arm], name: str):
    """How much more an arm got right over the run than another, by seed."""
    a, b = (found.get(arm, {}) for arm in pair)
    return [over_the_run(a[s], name) - over_the_run(b[s], name) for s in sorted({*a} & {*b})]


def gained(records: Path, name: str) -> list[str]:
    """By stochastic rounding, FP16 and token-TIS over BF16 to nearest, in points; [] if unknown."""
    found = arms(records)
    of = [differences(found, pair, name) for pair in CONTRASTS[:3]]
    return [mean([100 * x for x in each]) for each in of] if min(map(len, of)) >= 3 else []


def learned(records: Path) -> str:
    """What remedies gain in right answers; "" with no record."""
    if not (points := gained(records, "sampled")):
        return ""
    stochastic, fp16, corrected = points
    seeds = differences(arms(records), CONTRASTS[0], "sampled")
    return (
        f"While it learns sums on a GPU ({STEPS} steps, {number_of(seeds)}), the policy answers"
        f" {stochastic} points more of them right over the run with stochastic than with nearest"
        f" rounding to BF16, {fp16} more with FP16, and {corrected} more with nearest rounding and"
        " token-TIS"
    )


def agreeing(records: Path) -> str:
    """What two remedies gain where trainer and engine compute in 16 bits; "" on few seeds."""
    found = arms(records)
    gained = {
        name: [[100 * x for x in differences(found, pair, name)] for pair in IN_16_BITS[:2]]
        for name in ("sampled", "reward")
    }
    if any(len(of) < 3 for pairs in gained.values() for of in pairs):
        return ""
    own, engine = ([mean(of) for of in pairs] for pairs in gained.values())
    return (
        f"; on a GPU, {STEPS} steps, {number_of(gained['reward'][0])}, {' and '.join(engine)}, and"
        f" the policy {' and '.join(own)}"
    )


def contrasts(records: Path) -> str:
    """Differences paired by seed: the planned ones with Holm's p, the others with none."""
    found = arms(records)
    if not found:
        return NONE.format("together")
    families = {"(a)": CONTRASTS, "(d)": IN_16_BITS}
    told = [(pair, p) for name, pairs in families.items() for pair, p in tested(found, name, pairs)]
    rows = [
        [f"{named(pair[0])} − {named(pair[1])}", str(len(of)), mean(of),
         *(mean(differences(found, pair, name)) for name in ("greedy", "reward")), p]
        for pair, p in (*told, *((pair, "") for pair in BESIDE))
        if (of := differences(found, pair, "sampled"))
    ]
    return markdown(
        ["difference", "seeds", "right at T = 1, over the run", "greedily", "engine's reward",
         "p at T = 1; Holm's in its family"], rows,
    ) + "\nPaired by seed, Student's t, 95 % intervals.\n"


def tested(
    found: Mapping[Arm, Mapping[int, Row]], family: str, pairs: Sequence[tuple[Arm, Arm]]
) -> list[tuple[tuple[Arm, Arm], str]]:
    """Each planned pair, and what is said of its p."""
    ps = [p_of(differences(found, pair, "sampled")) for pair in pairs]
    told = [f"{p:.2g}; {held:.2g} {family}" for p, held in zip(ps, holm(ps), strict=True)]
    return [*zip(pairs, told, strict=True)]


SHOWN = {
    NEAREST: "BF16, to nearest", CORRECTED: "BF16, to nearest, token-TIS",
    STOCHASTIC: "BF16, stochastic", FP16: "FP16, to nearest", FP32: "FP32",
}
SIXTEEN = {
    IN_BF16: "BF16, to nearest", IN_BF16._replace(correction=TIS): "BF16, to nearest, token-TIS",
    ROUNDED: "BF16, rounded after each step", IN_FP16: "FP16, to nearest",
    IN_BF16._replace(head="fp32"): "BF16, to nearest, FP32 head",
}
"""Trainers in 16 bits."""


def figure(records: Path, shown: Mapping[Arm, str] = SHOWN) -> plt.Figure:
    """KL, arrival and rewards by step, means over seeds with 95 % intervals."""
    found = {arm: [*seeds.values()] for arm, seeds in arms(records).items() if arm in shown}
    columns = {"kl": "KL(engine‖policy), nats per token", "arrival": "arrives of the last update",
               "reward": "reward of the engine", "sampled": "reward of the policy, T = 1"}
    drawn, panels = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
    for (arm, label), colour in zip(shown.items(), plt.get_cmap("tab10").colors, strict=False):
        for ax, column in zip(panels.flat, columns, strict=True):
            of = np.array([curve(row, column) for row in found.get(arm, [])])
            if len(of) < 3:
                continue
            every = JUDGED if column == "sampled" else 1
            places = every * np.arange(of.shape[1]) + (column == "arrival")
            of = np.log(of) if column == "kl" else of
            back = np.exp if column == "kl" else np.asarray
            middle = np.nanmean(of, 0)
            reach = stats.t.ppf(0.975, len(of) - 1) * stats.sem(of, nan_policy="omit")
            ax.plot(places, back(middle), color=colour, label=label, linewidth=1.4)
            ax.fill_between(places, back(middle - reach), back(middle + reach), color=colour,
                            alpha=0.15, linewidth=0)
    for ax, title in zip(panels.flat, columns.values(), strict=True):
        ax.set(xlabel="step", title=title)
    panels[0, 0].set_yscale("log")
    panels[0, 1].set_ylim(-0.1, 1.4)
    for ax in panels[1]:
        ax.set_ylim(0, 1.02)
    drawn.legend(*panels[1, 1].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                 frameon=False)
    seeds = sorted({len(rows) for rows in found.values()})
    drawn.suptitle(
        f"{'Trainer and engine in 16 bits' if shown is SIXTEEN else 'An engine'} on a GPU, sent"
        " weights after every step; means over "
        f"{' to '.join(map(str, seeds))} seeds (of KL geometric), 95 % intervals"
    )
    return drawn


# pairs of precisions

Pairs = dict[tuple[str, str], dict[str, Row]]
CLAIMED = (("fp16", "fp16"), ("bf16", "fp16"), ("fp16", "bf16"), ("bf16", "bf16"))
"""Rollout and trainer, in the published order of their KL."""


def pairs_of(records: Path) -> Pairs:
    """By rollout and trainer, the seeds of a pair."""
    found: Pairs = {}
    path = records / "pairs.csv"
    for row in rows_of(path) if path.exists() else []:
        found.setdefault((row["rollout"], row["trainer"]), {})[row["seed"]] = row
    return found


def numbers(seeds: Mapping[str, Row], column: str) -> list[float]:
    return [float(seeds[seed][column]) for seed in sorted(seeds, key=int)]


def of_common_seeds(*pairs: Mapping[str, Row]) -> list[list[float]]:
    """KL of each pair, on the seeds that all have."""
    common = set.intersection(*(set(seeds) for seeds in pairs))
    return [numbers({seed: seeds[seed] for seed in common}, "kl") for seeds in pairs]


def matrix(records: Path) -> str:
    """KL of every pair."""
    found = pairs_of(records)
    if not found:
        return NONE.format("pairs")
    rollouts = list(dict.fromkeys(rollout for rollout, _ in found))
    rows = [
        [trainer, *(geometric(numbers(found[rollout, trainer], "kl"))
                    if (rollout, trainer) in found else "not run" for rollout in rollouts)]
        for trainer in dict.fromkeys(trainer for _, trainer in found)
    ]
    note = json.loads((records / "pairs.json").read_text(encoding="utf-8"))
    seeds = sorted({len(of) for of in found.values()})
    return markdown(["trainer", *(f"engine {x}" for x in rollouts)], rows) + (
        "\nKL is k3 of KL(μ‖π), nats per token: geometric means with 95 % intervals over"
        f" {' to '.join(map(str, seeds))} seeds. {note['processor']}, torch {note['torch']},"
        f" commit {note['commit']}, {note['date']}.\n"
    )


def judged(records: Path) -> str:
    """The published pairs, and float32's: errors of tokens and answers, and the order."""
    found = pairs_of(records)
    if not found:
        return NONE.format("pairs")
    rows = []
    for pair in (*CLAIMED, ("fp16", "fp32"), ("bf16", "fp32"), ("fp32", "fp32")):
        seeds = found[pair]
        kls = of_common_seeds(seeds, found["fp16", "fp16"])
        ratios = [kl / least for kl, least in zip(*kls, strict=True)]
        rows.append([
            " / ".join(pair), f"{sum(numbers(seeds, 'tokens')):,.0f}",
            *(mean(numbers(seeds, column)) for column in ("mean", "sigma")),
            geometric(numbers(seeds, "kl")), geometric(ratios),
            *(mean(numbers(seeds, column)) for column in ("answer", "growth")),
            mean([1000 * x for x in numbers(seeds, "drift")]),
        ])
    kls = [*zip(*of_common_seeds(*(found[pair] for pair in CLAIMED)), strict=True)]
    held = sum([*of] == sorted(of) for of in kls)
    ends = sum(of[0] == min(of) and of[3] == max(of) for of in kls)
    return markdown(
        ["rollout / trainer", "tokens", r"mean \|Δ\|", "σ", "KL", "KL over FP16 / FP16's",
         "σ of an answer's log-ratio", "growth", "drift, 1e-3"], rows,
    ) + (
        f"\nIntervals over {number_of(kls)}. Answers of up to"
        f" {max(x for of in found.values() for x in numbers(of, 'longest')):.0f} tokens. The"
        " published order of the four 16-bit pairs, FP16 / FP16, BF16 / FP16, FP16 / BF16, BF16 /"
        f" BF16, holds in {held} of {number_of(kls)}; FP16 on both sides is the nearest and BF16 on"
        f" both the farthest in {ends}.\n"
    )


TABLES: dict[str, Callable[[Path], str]] = {
    "gpu_learning": learning, "gpu_contrasts": contrasts, "gpu_pairs": matrix,
    "gpu_judged": judged,
}
