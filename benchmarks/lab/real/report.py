"""Tables and figures of the real model's runs, from the records; nothing is typed by hand."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import inf, nan
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from scipy import stats

from benchmarks.lab.chain.statistics import holm
from benchmarks.lab.real import on_a_gpu
from benchmarks.lab.real.intervals import Row, geometric, mean, number_of, p_of, rows_of, short
from benchmarks.lab.real.pairs import of_dump
from benchmarks.lab.real.quantised import LONGEST, TRAINERS
from benchmarks.lab.report import markdown
from iscorrect.diagnose import diagnose
from iscorrect.dumps import read_dump

ROOT = Path(__file__).parents[3]
PAGES = (
    ROOT / "docs" / "lab" / "real-model.md", ROOT / "docs" / "fp16-or-correction.md",
    ROOT / "README.md",
)
PICTURES = ROOT / "docs" / "lab"
MARKED = re.compile(r"(<!-- real:(\w+) -->\n).*?(<!-- /real -->)", re.DOTALL)


def main(records: Path, pages: Iterable[Path], pictures: Path) -> None:
    """Rewrite the tables between markers ``<!-- real:table -->``, and draw the figures."""
    pictures.mkdir(parents=True, exist_ok=True)
    if looks(records):
        mechanism_figure(records).savefig(pictures / "real-arrival.png", dpi=110)
    if served_runs(records):
        serving_figure(records).savefig(pictures / "real-served.png", dpi=110)
    if runs(records):
        learning_figure(records).savefig(pictures / "real-learning.png", dpi=110)
    if any("-trained-in-" in arm for arm in runs(records)):
        sixteen_figure(records).savefig(pictures / "real-sixteen.png", dpi=110)
    if on_a_gpu.arms(records):
        on_a_gpu.figure(records).savefig(pictures / "real-gpu.png", dpi=110)
    if on_a_gpu.IN_BF16 in on_a_gpu.arms(records):
        both = on_a_gpu.figure(records, on_a_gpu.SIXTEEN)
        both.savefig(pictures / "real-gpu-sixteen.png", dpi=110)
    plt.close("all")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        page.write_text(MARKED.sub(lambda m: m[1] + TABLES[m[2]](records) + m[3], text), "utf-8")


# the mechanism


def looks(records: Path) -> dict[str, list[list[Row]]]:
    """The rows of each trajectory, by grid and learning rate, a list for each seed."""
    found: dict[str, list[list[Row]]] = {}
    for path in sorted((records / "mechanism").glob("*.csv")):
        found.setdefault(path.stem.rsplit("-", 1)[0], []).append(rows_of(path))
    return found


def over_seeds(
    seeds: Sequence[list[Row]], column: str, step: str, way: str, kind: str = "all"
) -> list[float]:
    return [
        float(row[column]) for rows in seeds for row in rows
        if (row["step"], row["format"], row["kind"]) == (step, way, kind)
    ]


def arrival(records: Path) -> str:
    """What arrives and the KL that is left, by step and format."""
    parts = []
    for setting, seeds in looks(records).items():
        steps = list(dict.fromkeys(row["step"] for row in seeds[0]))
        ways = list(dict.fromkeys(row["format"] for row in seeds[0]))
        head = ["weights are sent as", *(f"after {s}: arrives" for s in steps),
                *(f"KL after {s}" for s in steps)]
        table = [
            [way, *(mean(over_seeds(seeds, "share", s, way)) for s in steps),
             *(geometric(over_seeds(seeds, "kl", s, way)) for s in steps)]
            for way in ways
        ]
        moved = [geometric(over_seeds(seeds, "moved", s, ways[0])) for s in steps]
        table.append(["the first weights, for ever", *("0" for _ in steps), *moved])
        parts.append(markdown(head, table) + f"\n{described(setting)}; {number_of(seeds)}.\n")
    return "\n".join(parts) or "No record of `python -m benchmarks.lab.real mechanism`.\n"


def described(setting: str) -> str:
    grid = next(name for name in ("bf16-grid", "off-grid") if setting.startswith(name))
    first = {"bf16-grid": "on BF16's grid", "off-grid": "off it"}[grid]
    return f"First weights {first}, learning rate {setting.removeprefix(grid + '-')}"


def rests(records: Path) -> str:
    """The size of the rounding error beside the update, and what of it is heard in log-probs."""
    found = looks(records)
    if not found:
        return "No record of `python -m benchmarks.lab.real mechanism`.\n"
    setting, seeds = next(iter(found.items()))
    last = seeds[0][-1]["step"]
    head = ["weights are sent as", "rest / update", "entries sent as before", "arrives in weights",
            "arrives in log-probs", "KL"]
    table = [
        [way, *(mean(over_seeds(seeds, column, last, way))
                for column in ("rest", "unchanged", "share", "heard")),
         geometric(over_seeds(seeds, "kl", last, way))]
        for way in dict.fromkeys(row["format"] for row in seeds[0])
    ]
    note = f"\n{described(setting)}; after {last} updates; {number_of(seeds)}.\n"
    return markdown(head, table) + note


def factors(records: Path) -> str:
    """How many times as large the KL of one way to send is as that of another, paired by seed."""
    parts = []
    for setting, seeds in looks(records).items():
        steps = list(dict.fromkeys(row["step"] for row in seeds[0]))
        table = []
        for a, b in (("bf16", "bf16 stochastic"), ("fp16", "bf16 stochastic"), ("bf16", "fp16"),
                     ("bf16", "bf16 feedback")):
            ratios = [
                [x / y for x, y in zip(over_seeds(seeds, "kl", s, a),
                                       over_seeds(seeds, "kl", s, b), strict=True)]
                for s in steps
            ]
            table.append([f"{a} over {b}", *map(geometric, ratios)])
        head = ["KL of", *(f"after {s}" for s in steps)]
        parts.append(markdown(head, table) + f"\n{described(setting)}; {number_of(seeds)}.\n")
    return "\n".join(parts) or "No record of `python -m benchmarks.lab.real mechanism`.\n"


def kinds(records: Path) -> str:
    """What arrives of each kind of tensor."""
    found = looks(records)
    if not found:
        return "No record of `python -m benchmarks.lab.real mechanism`.\n"
    setting, seeds = next(iter(found.items()))
    steps = list(dict.fromkeys(row["step"] for row in seeds[0]))
    head = ["tensors", *(f"{way}, after {s}" for way in ("bf16", "fp16") for s in steps)]
    table = [
        [kind, *(mean(over_seeds(seeds, "share", s, way, kind))
                 for way in ("bf16", "fp16") for s in steps)]
        for kind in dict.fromkeys(row["kind"] for row in seeds[0])
    ]
    return markdown(head, table) + f"\n{described(setting)}; {number_of(seeds)}.\n"


def mechanism_figure(records: Path) -> plt.Figure:
    """Arrival and KL by step: a line a format through the mean over seeds, points for seeds."""
    (setting, seeds), *_ = looks(records).items()
    steps = list(dict.fromkeys(row["step"] for row in seeds[0]))
    ways = list(dict.fromkeys(row["format"] for row in seeds[0]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    places = list(map(int, steps))
    for way, colour in zip(ways, plt.get_cmap("tab10").colors, strict=False):
        for ax, column in ((left, "share"), (right, "kl")):
            every = [over_seeds(seeds, column, s, way) for s in steps]
            middle = statistics.fmean if ax is left else statistics.geometric_mean
            ax.plot(places, [middle(x) for x in every], color=colour, label=way, marker="o", ms=3)
            for place, values in zip(places, every, strict=True):
                ax.plot([place] * len(values), values, ".", color=colour, ms=3, alpha=0.5)
    moved = [statistics.geometric_mean(over_seeds(seeds, "moved", s, ways[0])) for s in steps]
    right.plot(places, moved, "k--", label="the first weights, for ever")
    left.set(xlabel="updates", ylabel="share of the update that arrives", ylim=(-0.05, 1.25))
    right.set(xlabel="updates", ylabel="KL(policy‖engine), nats per token", yscale="log")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(places, steps)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right", fontsize=8,
                  frameon=False)
    figure.suptitle(f"{described(setting)}; weights alone rounded, {number_of(seeds)}")
    return figure


def served_runs(records: Path) -> dict[str, list[list[Row]]]:
    """The rows of each trajectory, by engine."""
    found: dict[str, list[list[Row]]] = {}
    for path in sorted((records / "served").glob("*.csv")):
        found.setdefault(path.stem.split("-")[0], []).append(rows_of(path))
    return found


def serving_figure(records: Path) -> plt.Figure:
    """KL and ESS of a real engine: a line a trajectory and way to send."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colours = iter(plt.get_cmap("tab10").colors)
    for engine, seeds in served_runs(records).items():
        for way in dict.fromkeys(row["rounding"] for row in seeds[0]):
            colour = next(colours)
            for rows in seeds:
                of = [row for row in rows if row["rounding"] == way]
                label = f"{engine}, {way}" if rows is seeds[0] else None
                for ax, column in zip(panels, ("kl", "ess_sequence"), strict=True):
                    ax.plot([int(row["step"]) for row in of], [float(row[column]) for row in of],
                            color=colour, marker="o", ms=3, label=label)
    panels[0].set(xlabel="updates", ylabel="KL(engine‖policy), nats per token", yscale="log")
    panels[1].set(xlabel="updates", ylabel="ESS of sequence weights", ylim=(0, 1.02))
    panels[1].legend(fontsize=8, frameon=False)
    figure.suptitle("vLLM, sent float32 weights in several ways; a line a trajectory")
    return figure


def serving(records: Path) -> str:
    """KL and ESS of a real engine along a trajectory, by how weights are sent."""
    found = served_runs(records)
    if not found:
        return "No record of `python -m benchmarks.lab.real served`.\n"
    steps = list(dict.fromkeys(row["step"] for seeds in found.values() for row in seeds[0]))
    head = ["engine, weights are sent", "seeds", *(f"KL after {s}" for s in steps),
            *(f"ESS of sequences after {s}" for s in steps),
            *(f"right after {steps[-1]}: {whose}" for whose in ("engine", "policy"))]
    table = []
    for engine, seeds in found.items():
        for way in dict.fromkeys(row["rounding"] for row in seeds[0]):
            def of(column: str, step: str, seeds=seeds, way=way) -> list[float]:
                return [float(row[column]) for rows in seeds for row in rows
                        if (row["step"], row["rounding"]) == (step, way)]

            table.append([
                f"{engine}, {way}", str(len(seeds)), *(geometric(of("kl", s)) for s in steps),
                *(mean(of("ess_sequence", s)) for s in steps),
                *(mean(of(column, steps[-1])) for column in ("reward", "own_reward")),
            ])
    name = next(iter(found.values()))[0][0]["engine"]
    return markdown(head, table) + f"\n{name}; 32 answers a cell and seed.\n"


def summary(records: Path) -> str:
    """What was found, in three sentences."""
    engines = served_runs(records)
    seeds = looks(records).get("bf16-grid-2e-05")
    if not seeds or "bf16" not in engines:
        return "No record of `python -m benchmarks.lab.real mechanism` and `served`.\n"
    last = seeds[0][-1]["step"]
    arrives = {
        (way, step): mean([100 * x for x in over_seeds(seeds, "share", step, way)])
        for way in ("bf16", "fp16") for step in ("1", last)
    }

    def kl(rounding: str, step: str) -> str:
        return geometric([
            float(row["kl"]) for rows in engines["bf16"] for row in rows
            if (row["step"], row["rounding"]) == (step, rounding)
        ])

    return (
        f"Of a float32 trainer's first update {arrives['bf16', '1']} % arrives in BF16 where"
        f" weights are rounded to nearest and {arrives['fp16', '1']} % in FP16, of the first {last}"
        f" together {arrives['bf16', last]} % and {arrives['fp16', last]} %, and vLLM in BF16 is"
        f" then {kl('nearest', last)} nats a token from its policy, where {kl('nearest', '0')} is"
        f" arithmetic and {kl('stochastic', last)} what `iscorrect.stochastic_round` at the send"
        " leaves (a pretrained model of 135 M parameters stored in BF16, learning rate 2e-5,"
        f" {number_of(seeds)}). {learned(records)}{agreeing(records)}\n"
    )


def agreeing(records: Path) -> str:
    """What of that is left where trainer and engine compute in one format; "" on few seeds."""
    fp16, bf16 = BOTH
    gained = differences(records, fp16, bf16, MAIN)["reward"]
    if len(gained) < 3:
        return ""
    found = runs(records)
    most = [
        geometric([max(numbers(run, "kl")) for run in found[f"{arm}-{MAIN}"]]) for arm in BOTH
    ]
    rounded = differences(records, *AFTER_STEP, MAIN)["reward"]
    and_after = (
        f" and {mean([100 * x for x in rounded])} more with `iscorrect.round_after_step`"
    ) if len(rounded) >= 3 else ""
    return (
        " Where trainer and engine both compute in 16 bits, as under mixed precision, they are at"
        f" most {most[1]} nats a token apart in BF16 and {most[0]} in FP16, and the engine still"
        f" answers {mean([100 * x for x in gained])} points more right over the run in FP16"
        f"{and_after} than in BF16 to nearest (vLLM, 24 steps,"
        f" {number_of(gained)}{on_a_gpu.agreeing(records)})."
    )


def learned(records: Path) -> str:
    """What the planned differences between ways to send and formats say of learning."""
    found = {pair: differences(records, *pair, MAIN, seeds=SEEDS) for pair in CONTRASTS[:3]}
    if any(len(x["sampled"]) < 3 for x in found.values()):
        return "What that does to learning has not been measured on three seeds."
    stochastic, fp16, tis = (mean([100 * x for x in of["sampled"]]) for of in found.values())
    seeds = sorted({len(x["sampled"]) for x in found.values()})
    before = f"with vLLM on a CPU, 24 steps, {' to '.join(map(str, seeds))} seeds"
    if gained := on_a_gpu.learned(records):
        engine = "{}, {} and {}".format(*on_a_gpu.gained(records, "reward"))
        return (
            f"{gained} ({before}, {stochastic}, {fp16} and {tis}), and the engine, whose weights"
            f" are the policy's rounded, {engine}."
        )
    return (
        f"While it learns sums ({before}), the policy answers {stochastic} points more of them"
        f" right with stochastic than with nearest rounding to BF16, {fp16} more with FP16, and"
        f" {tis} more with nearest rounding and token-TIS (means over the run)."
    )


# pairs of precisions


def offline(records: Path) -> str:
    """Every pair: the mismatch of tokens and of answers, planned seeds and the first look apart."""
    planned: dict[bool, Pairs] = {True: {}, False: {}}
    for path in sorted((records / "offline").glob("*.npz")):
        rollout, trainer, seed = path.stem.split("-", 2)
        pair = planned[seed.isdigit()].setdefault((rollout, trainer), {})
        pair[seed] = of_dump(read_dump(path))
    parts = [pairs_table(found) for found in planned.values() if found]
    note = (
        "\nΔ = log π − log μ in nats; KL is k3, nats per token. *Growth* is the power of t with"
        " which the variance of an answer's log-ratio after t tokens grows: 1 where errors of"
        " tokens are independent, 2 where an answer shares its error. *Drift* is how much mean |Δ|"
        " rises in 1,000 tokens of an answer.\n"
    )
    if not parts:
        return "No record of `python -m benchmarks.lab.real offline`.\n"
    return "\n".join(parts) + note


Pairs = dict[tuple[str, str], dict[str, dict[str, float]]]
"""By rollout and trainer, what each seed's dump says."""


def pairs_table(found: Pairs) -> str:
    head = ["rollout / trainer", "seeds", "tokens", r"mean \|Δ\|", "σ", "KL",
            "σ of an answer's log-ratio", "growth", "drift", "KL over FP16 / FP16's"]
    least = found.get(("fp16", "fp16"), {})
    table = []
    for (rollout, trainer), of_seeds in sorted(
        found.items(), key=lambda item: statistics.fmean(x["kl"] for x in item[1].values())
    ):
        seeds = [*of_seeds.values()]
        kls = [x["kl"] for x in seeds]
        ratios = [of_seeds[s]["kl"] / least[s]["kl"] for s in of_seeds if s in least]
        ratio = geometric(ratios) if ratios else ""
        table.append([
            f"{rollout} / {trainer}", str(len(seeds)), f"{sum(x['tokens'] for x in seeds):,.0f}",
            *(mean([x[column] for x in seeds]) for column in ("mean", "sigma")), geometric(kls),
            *(mean([x[column] for x in seeds]) for column in ("answer", "growth", "drift")), ratio,
        ])
    longest = max(x["longest"] for seeds in found.values() for x in seeds.values())
    return markdown(head, table) + f"\nAnswers of up to {longest:.0f} tokens. {order(found)}\n"


def quantised(records: Path) -> str:
    """llama.cpp's quantised rollouts, by trainer, and what the diagnosis says of them."""
    rows = []
    for trainer in (f"{name}{kept}" for name in TRAINERS for kept in ("", "-whole")):
        dumps = [read_dump(path)
                 for path in sorted((records / "quantised").glob(f"{trainer}-[0-9]*.npz"))]
        found = [of_dump(dump) for dump in dumps]
        if not found:
            continue
        said = Counter(first.cause or first.pattern for first, *_ in map(diagnose, dumps))
        rows.append([
            trainer.replace("-whole", ", whole answers").replace("-", " "), str(len(found)),
            f"{sum(x['tokens'] for x in found):,.0f}",
            *(mean([x[column] for x in found]) for column in ("mean", "sigma")),
            geometric([x["kl"] for x in found]),
            *(mean([x[column] for x in found]) for column in ("answer", "growth", "drift")),
            "; ".join(f"{name} ({times} of {len(found)})" for name, times in said.most_common()),
        ])
    if not rows:
        return "No record of `python -m benchmarks.lab.real quantised`.\n"
    return markdown(
        ["trainer", "seeds", "tokens", r"mean \|Δ\|", "σ", "KL", "σ of an answer's log-ratio",
         "growth", "drift", "the diagnosis, first"], rows,
    ) + (
        f"\nAnswers of up to {LONGEST} tokens. Whole answers: those of which the server lists as"
        " many tokens as it counts.\n"
    )


def order(found: Pairs) -> str:
    """Whether the published order of the four 16-bit pairs holds, seed by seed."""
    if not set(on_a_gpu.CLAIMED) <= found.keys():
        return ""
    claimed = [found[pair] for pair in on_a_gpu.CLAIMED]
    common = sorted(set.intersection(*map(set, claimed)))
    seeds = [[of_seeds[s]["kl"] for of_seeds in claimed] for s in common]
    same = sum(list(kls) == sorted(kls) for kls in seeds)
    return (
        "The published order of the four 16-bit pairs, FP16 / FP16, BF16 / FP16, FP16 / BF16,"
        f" BF16 / BF16, holds in {same} of {number_of(seeds)}."
    )


# learning


def runs(records: Path) -> dict[str, list[list[Row]]]:
    """The steps of every complete run, by arm."""
    found: dict[str, list[list[Row]]] = {}
    for path in sorted((records / "reinforce").glob("*.csv")):
        found.setdefault(path.stem.rsplit("-", 1)[0], []).append(rows_of(path))
    return found


def learning(records: Path) -> str:
    """Every arm: how it learned, and its mismatch."""
    arms = runs(records)
    if not arms:
        return "No record of `python -m benchmarks.lab.real reinforce`.\n"
    learned, apart = [], []
    for arm, seeds in arms.items():
        learned.append([
            named(arm), str(len(seeds)), mean([area(run, "sampled") for run in seeds]),
            mean([area(run, "greedy") for run in seeds]),
            mean([numbers(run, "sampled")[-1] for run in seeds]),
            mean([lowest(run) for run in seeds]),
            ", ".join(sorted((first_at(run, 0.8) for run in seeds), key=lambda x: (x == "never",
                      len(x), x))),
            mean([area(run, "reward") for run in seeds]),
            mean([statistics.fmean(numbers(run, "reward")[-5:]) for run in seeds]),
        ])
        apart.append([
            named(arm), *(geometric([pick(numbers(run, "kl")) for run in seeds])
                          for pick in (lambda x: x[0], max, lambda x: x[-1])),
            *(mean([min(numbers(run, column)) for run in seeds])
              for column in ("ess_token", "ess_sequence")),
            *(mean([pick(numbers(run, "arrival")) for run in seeds])
              for pick in (min, lambda x: x[-1])),
            mean([numbers(run, "arrival_all")[-1] for run in seeds]),
            mean([statistics.median(numbers(run, "gradient_norm")) for run in seeds]),
            mean([statistics.median(numbers(run, "cpu_s")) for run in seeds]),
        ])
    steps = next(iter(arms.values()))[0][-1]["step"]
    notes = [json.loads(path.read_text(encoding="utf-8"))
             for path in sorted((records / "reinforce").glob("*.json"))]
    where = "; ".join(dict.fromkeys(f"{x['processor']}, torch {x['torch']}" for x in notes))
    return (
        markdown(
            ["engine, correction", "seeds", "right at T = 1, over the run", "greedily",
             "at the end", "lowest after step 8", "80 % at step", "engine's reward, over the run",
             "last 5 steps"],
            learned,
        ) + f"\nShares of right answers of the policy itself; {steps} steps.\n\n"
        + markdown(
            ["engine, correction", "KL: first", "largest", "last", "ESS of tokens, least",
             "of sequences, least", "arrives, least", "last", "of all updates together",
             "gradient norm, median", "CPU s a step"], apart,
        ) + f"\nKL is k3 of KL(μ‖π), nats per token. {where}.\n"
    )


def sixteen(records: Path) -> str:
    """Trainers that compute in 16 bits, judged by their weights and by these rounded."""
    arms = {arm: seeds for arm, seeds in runs(records).items()
            if "-trained-in-" in arm and arm.endswith(MAIN)}
    if not arms:
        return "No record of `python -m benchmarks.lab.real reinforce --trainer`.\n"
    table = []
    for arm, seeds in arms.items():
        table.append([
            named(arm), str(len(seeds)),
            *(mean([area(run, column) for run in seeds])
              for column in ("sampled", "rounded_sampled", "greedy", "rounded_greedy")),
            *(mean([numbers(run, column)[-1] for run in seeds])
              for column in ("sampled", "rounded_sampled")),
            mean([area(run, "reward") for run in seeds]),
            mean([statistics.fmean(numbers(run, "reward")[-5:]) for run in seeds]),
            *(geometric([pick(numbers(run, "kl")) for run in seeds])
              for pick in (lambda x: x[0], max)),
        ])
    return markdown(
        ["engine, correction", "seeds", "right at T = 1, over the run", "rounded", "greedily",
         "rounded", "at the end", "rounded", "engine's reward, over the run", "last 5 steps",
         "KL: first", "largest"],
        table,
    ) + (
        "\nRight: of the weights that the trainer keeps, and of these rounded to its format, to"
        " nearest, or as it rounds them after each step.\n"
    )


def numbers(run: list[Row], column: str) -> list[float]:
    """A column where it was measured."""
    return [float(row[column]) for row in run if row[column]]


def area(run: list[Row], column: str) -> float:
    """The mean over the judged steps but the first, which no update precedes."""
    return statistics.fmean(float(row[column]) for row in run if row[column] and row["step"] != "0")


def lowest(run: list[Row]) -> float:
    return min((float(row["sampled"]) for row in run if row["sampled"] and int(row["step"]) > 8),
               default=nan)


def first_at(run: list[Row], share: float) -> str:
    """The first judged step at which so many answers at T = 1 are right."""
    return next((row["step"] for row in run if row["sampled"] and float(row["sampled"]) >= share),
                "never")


ARM = re.compile(
    r"(\w+)-(\w+?)(?:-trained-in-((?:amp-)?\w+))?(-fp32-head)?"
    r"(?:-(stochastic|feedback|after-step))?-(.+)-every(\d+)-(.+)"
)


def named(arm: str) -> str:
    """An arm's file name, as words."""
    found = ARM.fullmatch(arm)
    kind, engine, trainer, head, way, correction, every, rate = found.groups()
    words = [engine]
    words += [f"trained in {'what is sent' if trainer == 'sent' else trainer}"] if trainer else []
    words += ["FP32 head"] if head else []
    words += ["rounded after each step" if way == "after-step" else way] if way else []
    words += [correction]
    words += [] if kind == "vllm" else ["simulated"]
    words += [] if every == "1" else [f"sent every {every} steps"]
    words += [] if rate == "2e-05" else [f"learning rate {rate}"]
    return ", ".join(words)


CONTRASTS = (
    ("vllm-bf16-stochastic-uncorrected", "vllm-bf16-uncorrected"),
    ("vllm-fp16-uncorrected", "vllm-bf16-uncorrected"),
    ("vllm-bf16-token-tis-cap=2", "vllm-bf16-uncorrected"),
    ("vllm-bf16-stochastic-uncorrected", "vllm-fp32-uncorrected"),
)
"""Those of the plan."""
MAIN = "every1-2e-05"
OF_AGE = tuple(
    (f"vllm-bf16-stochastic-{correction}", "vllm-bf16-stochastic-uncorrected")
    for correction in ("token-tis-cap=2", "icepop-low=0.5,high=5", "sequence-tis-cap=2", "ppo")
)
TO_NEAREST = tuple(
    (f"vllm-bf16-{correction}", "vllm-bf16-uncorrected")
    for correction in ("token-tis-cap=2", "icepop-low=0.5,high=5", "sequence-tis-cap=2", "ppo")
)
BOTH = "vllm-fp16-trained-in-fp16-uncorrected", "vllm-bf16-trained-in-bf16-uncorrected"
AFTER_STEP = "vllm-bf16-trained-in-bf16-after-step-uncorrected", BOTH[1]
SEEDS = range(5)
"""Of the plan's differences, whatever was run later."""
UNKNOWN = {8: range(3, 10), 4: range(1, 10), 1: range(5, 10)}
"""Seeds that were not known when a test was planned, by the steps from one send to the next."""
BESIDE = {
    MAIN: (
        ("vllm-bf16-trained-in-bf16-uncorrected", "vllm-bf16-uncorrected"),
        ("vllm-bf16-trained-in-amp-bf16-uncorrected", "vllm-bf16-uncorrected"),
        ("vllm-bf16-trained-in-bf16-stochastic-uncorrected",
         "vllm-bf16-trained-in-bf16-uncorrected"),
        ("vllm-bf16-trained-in-amp-bf16-stochastic-uncorrected",
         "vllm-bf16-trained-in-amp-bf16-uncorrected"),
        BOTH,
        ("vllm-bf16-trained-in-sent-stochastic-uncorrected",
         "vllm-bf16-trained-in-bf16-uncorrected"),
        *((f"vllm-bf16-trained-in-{trainer}-after-step-uncorrected",
           f"vllm-bf16-trained-in-{trainer}-uncorrected") for trainer in ("bf16", "amp-bf16")),
        ("vllm-fp16-trained-in-fp16-uncorrected", "vllm-fp16-uncorrected"),
        ("vllm-bf16-feedback-uncorrected", "vllm-bf16-uncorrected"),
        *TO_NEAREST,
        ("vllm-bf16-sequence-mis-high=2", "vllm-bf16-uncorrected"),
        ("vllm-bf16-token-mis", "vllm-bf16-uncorrected"),
        ("vllm-bf16-fp32-head-uncorrected", "vllm-bf16-uncorrected"),
        ("vllm-fp16-token-tis-cap=2", "vllm-fp16-uncorrected"),
    ),
    "every4-2e-05": (*CONTRASTS[:2], *OF_AGE), "every8-2e-05": OF_AGE,
    "every1-1e-05": CONTRASTS[:2],
}
"""Those of the arms beside, by schedule, of which no p is given."""


def beside(records: Path) -> str:
    """The other differences, paired by seed."""
    rows = []
    for schedule, pairs in BESIDE.items():
        for pair in pairs:
            of = differences(records, *pair, schedule)
            names = (named(f"{x}-{schedule}") for x in pair)
            rows.append([" − ".join(names), str(len(of["sampled"])),
                         *(mean(x) if x else "not run" for x in of.values())])
    for pair in CONTRASTS:
        of = differences(records, *pair, MAIN, "two-digits")
        rows.append(["two digits: " + " − ".join(named(f"{x}-{MAIN}") for x in pair),
                     str(len(of["sampled"])), *(mean(x) if x else "not run" for x in of.values())])
    if not any(int(row[1]) for row in rows):
        return "No record of `python -m benchmarks.lab.real reinforce`.\n"
    return markdown(
        ["difference", "seeds", "right at T = 1, over the run", "greedily", "engine's reward"], rows
    ) + "\nPaired by seed, Student's t; no interval of fewer than three.\n"


def contrasts(records: Path) -> str:
    """The planned differences between arms, paired by seed, with Holm's p over them."""
    return tested(records, CONTRASTS, MAIN, SEEDS)


def aged(records: Path, every: int = 8) -> str:
    """Corrections some steps behind, on the seeds that nobody had looked at when it was planned."""
    return tested(records, OF_AGE, f"every{every}-2e-05", UNKNOWN[every])


def to_nearest(records: Path) -> str:
    """Corrections behind an engine that is sent every step to nearest, likewise."""
    return tested(records, TO_NEAREST, MAIN, UNKNOWN[1])


def tested(
    records: Path, pairs: Sequence[tuple[str, str]], schedule: str, seeds: range
) -> str:
    """Differences between arms, paired by seed, with Holm's p over them."""
    rows, ps = [], []
    for pair in pairs:
        of = differences(records, *pair, schedule, seeds=seeds)
        ps.append(p_of(of["sampled"]))
        names = (named(f"{x}-{schedule}") for x in pair)
        rows.append([" − ".join(names), str(len(of["sampled"])),
                     *(mean(x) if x else "" for x in of.values()), ""])
    for row, p, adjusted in zip(rows, ps, holm(ps), strict=True):
        if int(row[1]) >= 3:
            row[-1] = f"{p:.2g}, {adjusted:.2g}"
    if not any(int(row[1]) for row in rows):
        return "No record of `python -m benchmarks.lab.real reinforce`.\n"
    return markdown(
        ["difference", "seeds", "right at T = 1, over the run", "greedily", "engine's reward",
         "p at T = 1; Holm's over the four"], rows,
    ) + f"\nPaired by seed, Student's t; of seeds {seeds.start} to {seeds.stop - 1}.\n"


def differences(
    records: Path, a: str, b: str, schedule: str, folder: str = "reinforce", *,
    seeds: range = range(10),
) -> dict[str, list[float]]:
    """How much more an arm got right over the run than another, by seed.

    Policies at temperature 1 and greedily, and the engine on its prompts.
    """
    arms = [
        {path.stem.rsplit("-", 1)[1]: rows_of(path)
         for path in (records / folder).glob(f"{arm}-{schedule}-*.csv")}
        for arm in (a, b)
    ]
    both = sorted(seed for seed in arms[0].keys() & arms[1].keys() if int(seed) in seeds)
    return {
        column: [area(arms[0][seed], column) - area(arms[1][seed], column) for seed in both]
        for column in ("sampled", "greedy", "reward")
    }


def shared(records: Path) -> str:
    """n* of every kind of engine."""
    found = sorted(
        ((path.stem.rsplit("-", 1)[0], row) for path in (records / "coherence").glob("*.csv")
         for row in rows_of(path)), key=lambda item: float(item[1]["kl"]),
    )
    if not found:
        return "No record of `python -m benchmarks.lab.real coherence`.\n"
    table = [
        [kind, f"{float(row['kl']):.2g}", beyond(row["n_star"]), beyond(row["low"]),
         beyond(row["high"]), f"{float(row['share']):.2g} ± {2 * float(row['error']):.1g}"]
        for kind, row in found
    ]
    first = found[0][1]
    return markdown(
        ["engine", "KL per answer", "n*", "at least", "at most", "1/n* ± 2 standard errors"], table
    ) + f"\n{first['engine']}; {first['batches']} batches of {first['sequences']} answers.\n"


def beyond(x: str) -> str:
    return "∞" if float(x) == inf else short(float(x))


def learning_figure(records: Path) -> plt.Figure:
    """KL, arrival and rewards by step, of trainers in float32."""
    arms = {arm: seeds for arm, seeds in runs(records).items()
            if arm.endswith(MAIN) and "-trained-in-" not in arm and len(seeds) >= 3}
    return curves(arms, {
        "kl": "KL(engine‖policy), nats per token", "arrival": "arrives of the last update",
        "reward": "reward of the engine", "sampled": "reward of the policy, T = 1",
    })


def sixteen_figure(records: Path) -> plt.Figure:
    """KL and rewards by step, of trainers in 16 bits."""
    arms = {arm: seeds for arm, seeds in runs(records).items()
            if arm.endswith(MAIN) and "-trained-in-" in arm and len(seeds) >= 3}
    return curves(arms, {
        "kl": "KL(engine‖policy), nats per token", "reward": "reward of the engine",
        "sampled": "reward of the float32 weights, T = 1",
        "rounded_sampled": "reward of these rounded, T = 1",
    })


def curves(arms: dict[str, list[list[Row]]], columns: dict[str, str]) -> plt.Figure:
    """Four columns by step, means over seeds; of five or more with 95 % intervals."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
    for (arm, seeds), colour in zip(arms.items(), plt.get_cmap("tab20").colors, strict=False):
        for ax, column in zip(panels.flat, columns, strict=True):
            steps = [int(row["step"]) for row in seeds[0] if row[column]]
            of = np.array([numbers(run, column) for run in seeds])
            of = np.log(of) if column == "kl" else of
            middle, back = of.mean(0), np.exp if column == "kl" else np.asarray
            planned = len(seeds) >= 5
            ax.plot(steps, back(middle), color=colour, label=named(arm),
                    **{"marker": "."} if planned else {"linestyle": ":"})
            if not planned:
                continue
            reach = stats.t.ppf(0.975, len(seeds) - 1) * stats.sem(of)
            ax.fill_between(steps, back(middle - reach), back(middle + reach), color=colour,
                            alpha=0.15, linewidth=0)
    for ax, label in zip(panels.flat, columns.values(), strict=True):
        ax.set(xlabel="step", title=label)
        if "reward" in label:
            ax.set_ylim(0, 1.05)
    panels[0, 0].set_yscale("log")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  fontsize=9, frameon=False)
    figure.suptitle("vLLM, weights sent after every step, learning rate 2e-5; means over seeds (of"
                    " KL geometric):\nlines of five and more with 95 % intervals, dots of fewer")
    return figure


TABLES: dict[str, Callable[[Path], str]] = {
    "arrival": arrival, "rests": rests, "factors": factors, "kinds": kinds, "serving": serving,
    "offline": offline, "learning": learning, "contrasts": contrasts, "beside": beside,
    "sixteen": sixteen, "to_nearest": to_nearest,
    "aged": aged, "aged_by_four": partial(aged, every=4),
    "quantised": quantised, "shared": shared, "summary": summary, **on_a_gpu.TABLES,
}
