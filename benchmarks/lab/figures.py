"""Figures of the lab's records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from benchmarks.lab.records import axes, outcome, runs
from iscorrect.dumps import read_dump
from iscorrect.report.figures import plot_probabilities, plot_sequences

COLOURS = {"bf16": "#D55E00", "fp16": "#0072B2", "fp32": "#444444"}
CURVES = {
    "reward": ("reward", "linear"), "kl": ("KL, nats per token", "log"),
    "max_shift": ("max |π − μ|", "log"), "ess": ("ESS of sequence weights", "linear"),
    "gradient_norm": ("gradient norm", "log"),
}


def main(records: Path, folder: Path) -> None:
    """Draw every figure that there are records for."""
    for model in sorted({p.stem.rsplit("-", 1)[0] for p in records.glob("*.npz")}):
        offline(records, model).savefig(folder / f"offline-{model.split('-')[0]}.png", dpi=110)
    for task in sorted({task for task, _ in runs(records / "sanity")}):
        sanity(records, task).savefig(folder / f"sanity-{task}.png", dpi=110)
    if runs(records / "map"):
        phases(records).savefig(folder / "map.png", dpi=110)
    plt.close("all")


def offline(records: Path, model: str) -> plt.Figure:
    """Probabilities of tokens and log-ratios of sequences, BF16 beside FP16, on the same axes."""
    kinds = [k for k in ("bf16", "fp16") if (records / f"{model}-{k}.npz").exists()]
    figure, panels = plt.subplots(2, len(kinds), figsize=(4.5 * len(kinds), 8), squeeze=False,
                                sharey="row", layout="constrained")
    for column, kind in zip(panels.T, kinds, strict=True):
        dump = read_dump(records / f"{model}-{kind}.npz")
        plot_probabilities(dump, ax=column[0])
        plot_sequences(dump, ax=column[1])
        column[0].set_title(f"{kind.upper()} engine, {kind.upper()} trainer")
    figure.suptitle(model)
    return figure


def sanity(records: Path, task: str) -> plt.Figure:
    """A row for each kind of arm, a column for each curve: the mean over seeds, and every seed."""
    every = runs(records / "sanity")
    arms = {arm: seeds for (of, arm), seeds in every.items() if of == task}
    rows = {
        "BF16, corrected token by token": ["bf16", "bf16-token-tis", "bf16-token-mis"],
        "BF16, corrected by sequence": ["bf16", "bf16-sequence-tis", "bf16-sequence-mis"],
        "BF16, other objectives and head": ["bf16", "bf16-cispo", "bf16-gspo", "bf16-fp32-head"],
        "Other precisions": ["bf16", "fp16", "fp16-sequence-is", "fp32"],
    }
    figure, panels = plt.subplots(
        len(rows), len(CURVES), figsize=(3.4 * len(CURVES), 2.5 * len(rows)), sharex=True,
        sharey="col", layout="constrained",
    )
    shades = ["#D55E00", "#0072B2", "#009E73", "#CC79A7"]
    for line, (title, names) in zip(panels, rows.items(), strict=True):
        for name, colour in zip(names, shades, strict=False):
            for ax, (curve, (_, scale)) in zip(line, CURVES.items(), strict=True):
                drawn = [smooth(run[curve]) for run in arms.get(name, [])]
                for run in drawn:
                    ax.plot(run, color=colour, linewidth=0.5, alpha=0.3)
                if drawn:
                    ax.plot(np.mean(drawn, 0), color=colour, linewidth=1.5, label=name)
                ax.set_yscale(scale)
        line[0].set_ylabel(title, fontsize=8)
        line[0].legend(fontsize=7, frameon=False)
    for ax, (label, _) in zip(panels[0], CURVES.values(), strict=True):
        ax.set_title(label, fontsize=9)
    for ax in panels[-1]:
        ax.set_xlabel("step", fontsize=8)
    figure.suptitle(f"{task}: means over seeds of five steps' means; thin lines are seeds")
    return figure


def smooth(values: Sequence[float], width: int = 5) -> np.ndarray:
    width = min(width, len(values))
    return np.convolve(values, np.full(width, 1 / width), "valid")


def phases(records: Path) -> plt.Figure:
    """Mismatch and length against the reward at the end, one panel a correction."""
    arms = runs(records / "map")
    roundings, corrections, tasks = axes(arms)
    figure, panels = plt.subplots(1, len(corrections), figsize=(3.4 * len(corrections), 3.6),
                                sharey=True, squeeze=False, layout="constrained")
    for ax, correction in zip(panels[0], corrections, strict=True):
        end = np.full((len(roundings), len(tasks)), np.nan)
        for i, name in enumerate(roundings):
            for j, task in enumerate(tasks):
                seeds = arms.get((task, f"{name}-{correction}"), [])
                if not seeds:
                    continue
                ends = [outcome(run) for run in seeds]
                end[i, j] = statistics.fmean(run.end for run in ends)
                fallen = sum(run.fell for run in ends)
                text = f"{end[i, j]:.0%}"
                text += f"\n{fallen} of {len(ends)}\nfell" if fallen else ""
                ax.text(j, i, text, ha="center", va="center", fontsize=8,
                        color="white" if end[i, j] < 0.6 else "black")
        image = ax.imshow(end, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        ax.set_title(correction)
        ax.set_xticks(range(len(tasks)), [str(int(t.split("-")[1]) + 1) for t in tasks])
        ax.set_yticks(range(len(roundings)), roundings)
        ax.set_xlabel("tokens of an answer")
    panels[0, 0].set_ylabel("rounding of the engine's weights")
    figure.colorbar(image, ax=panels[0].tolist(), label="reward at the end")
    return figure
