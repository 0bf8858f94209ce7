"""Figures of the chain's records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from benchmarks.lab.cells import with_error
from benchmarks.lab.chain import behind, bias
from benchmarks.lab.chain.engines import BITS
from benchmarks.lab.chain.records import curve, rows
from benchmarks.lab.chain.statistics import wilson
from benchmarks.lab.chain.tables import (
    Rows,
    by_cell,
    ends,
    fallen,
    made_kl,
    of_exact,
    outcome,
)

COLOURS = {
    "uncorrected": "#D55E00", "token-tis": "#0072B2", "icepop": "#009E73", "ppo": "#CC79A7",
    "token-tis-critic": "#222222", "uncorrected-critic": "#E8A33D", "token-tis-half": "#7F7F7F",
}
OF_RATES = ("#0072B2", "#D55E00")
"""From the lower rate."""
PANELS = {
    "activations-10": "FP16 rounding", "activations-7": "BF16 rounding",
    "weights-4": "weights of 4 bits of mantissa", "int4": "INT4 weights", "int3": "INT3 weights",
    "noise-0.3": "independent noise of 0.3", "behind-4": "4 behind", "behind-8": "8 behind",
}


def main(records: Path, folder: Path) -> None:
    """Draw every figure that there are records for."""
    if any(of_exact(records, length=256)):
        curves(records).savefig(folder / "exact-curves.png", dpi=110)
        lengths(records).savefig(folder / "exact-lengths.png", dpi=110)
        critics(records).savefig(folder / "exact-critics.png", dpi=110)
    if by_cell(records):
        by_lag(records).savefig(folder / "behind.png", dpi=110)
        by_kl(records).savefig(folder / "behind-kl.png", dpi=110)
        by_arm(records).savefig(folder / "behind-arms.png", dpi=110)
    if len(rows(records / "bias.csv")) > 1:
        kinds(records).savefig(folder / "kinds.png", dpi=110)
    plt.close("all")


def curves(records: Path) -> plt.Figure:
    """J(π) against the step, one panel an engine; no line is a mean of anything."""
    found = of_exact(records, world="chain", length=256, task=10, optimizer="adam")
    figure, panels = plt.subplots(2, 4, figsize=(13, 6), sharex=True, sharey=True,
                                  layout="constrained")
    exact = found.get(("exact", "uncorrected"))
    for ax, (engine, title) in zip(panels.flat, PANELS.items(), strict=True):
        if exact:
            ax.plot(curve(exact, "j_policy"), color="#BBBBBB", linewidth=4, label="exact engine")
        for arm in ("uncorrected", "token-tis", "icepop", "ppo"):
            if row := found.get((engine, arm)):
                ax.plot(curve(row, "j_policy"), color=COLOURS[arm], label=arm, linewidth=1.5)
        ax.set_title(title, fontsize=10)
    panels[0, 0].set_ylim(-0.03, 1.03)
    panels[-1, -1].legend(fontsize=8, frameon=False)
    for ax in panels[:, 0]:
        ax.set_ylabel("J(π)")
    for ax in panels[-1]:
        ax.set_xlabel("step")
    figure.suptitle("Ascent along the expected update, T = 256, Adam, one task, no seeds")
    return figure


def lengths(records: Path) -> plt.Figure:
    """Steps to 95 % by bits and length."""
    sizes = sorted({
        int(row["length"]) for row in rows(records / "exact.csv")
        if row["engine"].startswith(("activations", "both"))
    })
    run = {row["engine"] for row in rows(records / "exact.csv")}
    shown = [m for m in BITS if {f"activations-{m}", f"both-{m}"} & run]
    figure, panels = plt.subplots(2, 3, figsize=(11, 6.4), sharex=True, sharey=True,
                                  layout="constrained")
    pairs = [(kind, arm) for kind in ("activations", "both")
             for arm in ("uncorrected", "uncorrected-critic", "token-tis")]
    for ax, (kind, arm) in zip(panels.flat, pairs, strict=True):
        steps = np.full((len(shown), len(sizes)), np.nan)
        for i, bits in enumerate(shown):
            for j, size in enumerate(sizes):
                row = of_exact(
                    records, world="chain", length=size, task=10, optimizer="adam",
                ).get((f"{kind}-{bits}", arm))
                if row is None:
                    ax.text(j, i, "not run", ha="center", va="center", fontsize=7)
                    continue
                end, _, step = outcome(row)
                steps[i, j] = len(curve(row, "j_policy")) if step is None else step
                ax.text(j, i, f"never\n{end:.2f}" if step is None else str(step), ha="center",
                        va="center", fontsize=8, color="white" if step is None else "black")
        image = ax.imshow(steps, vmin=30, vmax=110, cmap="YlOrRd", aspect="auto")
        ax.set_title(f"{kind}, {arm}", fontsize=10)
        ax.set_xticks(range(len(sizes)), list(map(str, sizes)))
        ax.set_yticks(range(len(shown)), list(map(str, shown)))
    for ax in panels[-1]:
        ax.set_xlabel("tokens of a sequence")
    for ax in panels[:, 0]:
        ax.set_ylabel("bits of mantissa")
    figure.colorbar(image, ax=panels, label="steps to 95 %")
    return figure


def critics(records: Path) -> plt.Figure:
    """J(π) against the step, uncorrected, with and without a baseline that knows each context."""
    found = of_exact(records, world="chain", length=256, task=10, optimizer="adam")
    shown = {"int3": "INT3 weights", "noise-1": "independent noise of 1", "behind-8": "8 behind",
             "temperature-1.3": "temperature 1.3"}
    figure, panels = plt.subplots(1, 4, figsize=(13, 3.4), sharey=True, layout="constrained")
    arms = ("uncorrected", "uncorrected-critic", "token-tis", "token-tis-critic")
    for ax, (engine, title) in zip(panels, shown.items(), strict=True):
        for arm in arms:
            if row := found.get((engine, arm)):
                ax.plot(curve(row, "j_policy"), color=COLOURS[arm], label=arm, linewidth=1.6,
                        linestyle="--" if arm == "token-tis-critic" else "-")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step")
    panels[0].set_ylabel("J(π)")
    panels[0].set_ylim(-0.03, 1.03)
    panels[2].legend(fontsize=8, frameon=False, loc="lower left")
    figure.suptitle("The same mismatch with two baselines, a prompt's mean and a perfect critic's; "
                    "expected updates, no seeds", fontsize=11)
    return figure


def by_lag(records: Path) -> plt.Figure:
    """Runs that fell, with their intervals, and ends, by lag; one column a rate."""
    cells = by_cell(records)
    rates = sorted({rate for rate, lag, _ in cells if lag}, reverse=True)
    figure, panels = plt.subplots(2, len(rates), figsize=(6.5 * len(rates), 7), sharex=True,
                                  sharey="row", squeeze=False, layout="constrained")
    lags = sorted({lag for _, lag, _ in cells})
    arms = [arm for arm in behind.MAIN if any(key[2] == arm for key in cells)]
    for column, rate in zip(panels.T, rates, strict=True):
        for place, lag in enumerate(lags):
            there = [arm for arm in arms if (rate, lag, arm) in cells]
            for i, arm in enumerate(there):
                x = place + (i - (len(there) - 1) / 2) * 0.085
                point(column, x, cells[rate, lag, arm], COLOURS[arm])
        for arm in arms:
            column[0].plot([], [], "o", color=COLOURS[arm], label=arm)
        column[0].set_title(f"learning rate {rate:g}")
        column[1].set_xticks(range(len(lags)), list(map(str, lags)))
        column[1].set_xlabel("updates behind")
    panels[0, 0].set_ylabel(f"runs that fell below {behind.FELL}")
    panels[1, 0].set_ylabel("J(π) at the end: runs, means")
    for ax in panels[1]:
        ax.axhline(0.5, color="#BBBBBB", linewidth=0.8)
    panels[0, -1].legend(fontsize=8, frameon=False, loc="upper left")
    figure.suptitle("An engine behind the trainer, sampled; 95 % intervals; the start is at 0.5; "
                    "tasks " + ", ".join(map(str, behind.TASKS)))
    return figure


def by_kl(records: Path) -> plt.Figure:
    """Ends by the KL that a lag makes, a point a lag and arm; one panel a rate."""
    cells = by_cell(records)
    rates = sorted({rate for rate, lag, _ in cells if lag}, reverse=True)
    figure, panels = plt.subplots(1, len(rates), figsize=(6.5 * len(rates), 4), sharey=True,
                                  squeeze=False, layout="constrained")
    for ax, rate in zip(panels[0], rates, strict=True):
        for arm in behind.MAIN:
            lags = sorted(lag for r, lag, a in cells if (r, a) == (rate, arm) and lag)
            runs = [cells[rate, lag, arm] for lag in lags]
            means = [with_error(ends(of)) for of in runs]
            ax.errorbar([made_kl(of) for of in runs], [mean for mean, _ in means],
                        [2 * error for _, error in means], color=COLOURS[arm], label=arm,
                        marker="o", markersize=4, linewidth=1)
        ax.axhline(0.5, color="#BBBBBB", linewidth=0.8)
        ax.set_xscale("log")
        ax.set_title(f"learning rate {rate:g}")
        ax.set_xlabel("KL(μ‖π) that the lag makes, nats per sequence")
    panels[0, 0].set_ylabel("J(π) at the end")
    panels[0, -1].legend(fontsize=8, frameon=False, loc="lower left")
    lags = sorted({lag for _, lag, _ in cells if lag})
    figure.suptitle(f"Lags of {', '.join(map(str, lags))} updates along each line; ± two standard "
                    "errors", fontsize=10)
    return figure


def by_arm(records: Path) -> plt.Figure:
    """Ends and runs that fell, by lag; one panel an arm of the first plan."""
    cells = by_cell(records)
    rates = sorted({rate for rate, lag, _ in cells if lag})
    lags = sorted(behind.LAGS)
    figure, panels = plt.subplots(3, 5, figsize=(15, 8.5), sharex=True, sharey=True,
                                  layout="constrained")
    for ax, arm in zip(panels.flat, behind.FIRST, strict=False):
        for rate, colour, shift in zip(rates, OF_RATES, (-0.1, 0.1), strict=False):
            there = [(i + shift, cells[rate, lag, arm]) for i, lag in enumerate(lags)
                     if (rate, lag, arm) in cells]
            places = [place for place, _ in there]
            ax.plot(places, [with_error(ends(runs))[0] for _, runs in there], color=colour,
                    linewidth=2)
            shares = [fallen(runs) / len(runs) for _, runs in there]
            ax.plot(places, shares, "o", color=colour, markersize=5, markerfacecolor="white")
            for place, runs in there:
                ax.plot([place, place], wilson(fallen(runs), len(runs)), color=colour, linewidth=1)
        ax.axhline(0.5, color="#BBBBBB", linewidth=0.8, zorder=0)
        ax.set_title(arm, fontsize=10)
        ax.set_xticks(range(len(lags)), list(map(str, lags)))
    *_, last = panels.flat
    last.axis("off")
    for rate, colour in zip(rates, OF_RATES, strict=False):
        last.plot([], [], color=colour, linewidth=2, label=f"J(π) at the end, rate {rate:g}")
        last.plot([], [], "o", color=colour, markerfacecolor="white",
                  label=f"share of runs that fell, rate {rate:g}")
    last.legend(loc="center", frameon=False, fontsize=9)
    figure.supxlabel("updates behind")
    figure.suptitle("Arms by lag and learning rate; means of ends, and shares with 95 % intervals; "
                    "the start is at 0.5; tasks " + ", ".join(map(str, behind.TASKS)))
    return figure


def point(column: np.ndarray, x: float, runs: Rows, colour: str) -> None:
    count = fallen(runs)
    low, high = wilson(count, len(runs))
    column[0].plot([x, x], [low, high], color=colour, linewidth=1)
    column[0].plot(x, count / len(runs), "o", color=colour, markersize=5)
    each = ends(runs)
    column[1].plot([x] * len(each), each, ".", color=colour, markersize=3, alpha=0.5)
    column[1].plot(x, with_error(each)[0], "o", color=colour, markersize=6)


def kinds(records: Path) -> plt.Figure:
    """The batch from which the bias shows, against the size of the mismatch."""
    found = [row for row in rows(records / "bias.csv") if row["length"] == "256"]
    figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    ax.margins(x=0.2)
    top = 3 * max((float(row["n_star"]) for row in found if row["n_star"]), default=1.0)
    for row in found:
        kl = float(row["kl"])
        if row["n_star"]:
            ax.plot(kl, float(row["n_star"]), "o", color="#0072B2")
            ax.annotate(row["engine"], (kl, float(row["n_star"])), fontsize=8,
                        textcoords="offset points", xytext=(5, 4))
        else:
            ax.plot(kl, top, "^", color="#999999")
            ax.annotate(f"{row['engine']}: none found", (kl, top), fontsize=8,
                        textcoords="offset points", xytext=(5, 4))
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.margins(x=0.3)
    ax.set_xlabel("KL(μ‖π), nats per sequence of 256 tokens")
    ax.set_ylabel("n*, sequences in a batch")
    ax.set_title(f"Where the bias that contexts share exceeds the noise, {bias.DRAWS} draws",
                 fontsize=10)
    return figure
