"""Figures of a dump, each with the numbers it draws.

``plot_x(dump, ax=…)`` draws what ``x(dump)`` tabulates, of a dump or of its tokens. Nothing is
shown or saved here, and no global style is touched. Colours are Okabe and Ito's, told apart by
every kind of eyesight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from iscorrect.dumps import Estimate, LogProbDump, Tokens
from iscorrect.dumps.names import Array
from iscorrect.dumps.tokens import as_tokens
from iscorrect.errors import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any

Columns: TypeAlias = dict[str, Array]
"""Columns of equal length, by name."""

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
CROWDED = 20_000
BOUNDS = (0.5, 2.0)


def probabilities(dump: LogProbDump | Tokens) -> Columns:
    """Probability of each token on both sides; at most 20,000 of them, evenly spaced."""
    tokens = as_tokens(dump)
    some = slice(None, None, -(-max(len(tokens), 1) // CROWDED))
    return {"rollout": np.exp(tokens.rollout[some]), "trainer": np.exp(tokens.old[some])}


def plot_probabilities(dump: LogProbDump | Tokens, *, ax: Axes | None = None) -> Axes:
    """Trainer against rollout probability: points, or hexagons above 20,000 tokens.

    Args:
        dump: with at least one counted token.
        ax: where to draw; None: a new figure.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    tokens = as_tokens(dump)
    x, y = np.exp(tokens.rollout), np.exp(tokens.old)
    if len(x) > CROWDED:
        drawn = ax.hexbin(x, y, gridsize=60, bins="log", mincnt=1, cmap="viridis", linewidths=0.1)
        ax.figure.colorbar(drawn, ax=ax, label="tokens")
    else:
        ax.scatter(x, y, s=4, alpha=0.35, color=BLUE, linewidths=0, rasterized=True)
    ax.plot([0, 1], [0, 1], color=RED, linewidth=1, linestyle="--", label="no mismatch")
    pearson = float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else math.nan
    ax.set(
        xlabel="rollout probability μ", ylabel="trainer probability π", xlim=(0, 1), ylim=(0, 1),
        title=f"Probability of each token (Pearson {pearson:.5f})", aspect="equal",
    )
    ax.legend(loc="upper left")
    return ax


def sequences(dump: LogProbDump | Tokens) -> Columns:
    """Length and log-ratio of each sequence."""
    tokens = as_tokens(dump)
    length = np.bincount(tokens.row, minlength=tokens.count)
    total = np.bincount(tokens.row, weights=tokens.d, minlength=tokens.count)
    return {"length": length[length > 0], "log_ratio": total[length > 0]}


def plot_sequences(
    dump: LogProbDump | Tokens, *, slope: Estimate | None = None, ax: Axes | None = None
) -> Axes:
    """Log-ratio of whole sequences against their length, with the slope that KL gives it.

    Args:
        dump: with at least one counted token.
        slope: the log-ratio of 1,000 tokens, nats; None: the dump's.
        ax: where to draw; None: a new figure.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    tokens = as_tokens(dump)
    table = sequences(tokens)
    length, total = table["length"], table["log_ratio"]
    if slope is None:
        mean = tokens.mean(tokens.d)
        slope = Estimate(1000 * mean.value, 1000 * mean.error)
    ax.scatter(length, total, s=8, alpha=0.5, color=BLUE, linewidths=0, rasterized=True)
    ends = np.array([0, length.max()])
    ax.plot(ends, slope.value / 1000 * ends, color=RED, label=f"{slope} nats per 1,000 tokens")
    if math.isfinite(slope.error):
        low, high = (slope.value / 1000 + sign * slope.error / 500 for sign in (-1, 1))
        ax.fill_between(ends, low * ends, high * ends, color=RED, alpha=0.15, linewidth=0)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set(
        xlabel="tokens in the sequence", ylabel="log-ratio of the sequence, nats",
        title="Whole sequences", xlim=(0, 1.03 * ends[1]),
    )
    ax.legend(loc="best")
    return ax


def ratios(dump: LogProbDump | Tokens) -> Columns:
    """Histogram of token log-ratios."""
    d = as_tokens(dump).d
    reach = max(1.0, min(10.0, 1.05 * float(np.abs(d).max(initial=0))))
    counts, edges = np.histogram(np.clip(d, -reach, reach), bins=120, range=(-reach, reach))
    return {"log_ratio_from": edges[:-1], "log_ratio_to": edges[1:], "tokens": counts}


def plot_ratios(
    dump: LogProbDump | Tokens, *, bounds: Sequence[float] = BOUNDS, ax: Axes | None = None
) -> Axes:
    """Histogram of token ratios on log axes, with bounds and the share of tokens beyond them."""
    ax = _axes(ax)
    table = ratios(dump)
    left, right = np.exp(table["log_ratio_from"]), np.exp(table["log_ratio_to"])
    ax.bar(left, table["tokens"], width=right - left, align="edge", color=BLUE)
    d = as_tokens(dump).d
    for bound, color in zip(bounds, (ORANGE, RED, GREEN, GREY) * len(bounds), strict=False):
        beyond = (d > math.log(bound)) if bound > 1 else (d < math.log(bound))
        ax.axvline(bound, color=color, linestyle="--",
                   label=f"{'above' if bound > 1 else 'below'} {bound:g}: {beyond.mean():.2%}")
    ax.set(
        xscale="log", yscale="log", xlabel="token ratio ρ = π/μ", ylabel="tokens",
        title="Token ratios", ylim=(0.7, None),
    )
    _plain_ticks(ax.xaxis, left[0], right[-1])
    ax.legend(loc="upper left")
    return ax


def positions(dump: LogProbDump | Tokens) -> Columns:
    """|Δ log p| by position in the answer, in bins that widen with it."""
    tokens = as_tokens(dump)
    last = int(tokens.position.max(initial=0)) + 1
    edges = np.unique(np.geomspace(1, last + 1, min(last + 1, 33)).astype(int)) - 1
    size = np.abs(tokens.d)
    rows = []
    for a, b in pairwise(edges):
        inside = size[(tokens.position >= a) & (tokens.position < b)]
        if len(inside):
            quantiles = np.quantile(inside, [0.1, 0.5, 0.9])
            rows.append([a, b, len(inside) / (b - a), inside.mean(), *quantiles])
    names = ("from", "to", "sequences", "mean", "quantile_10", "median", "quantile_90")
    return dict(zip(names, np.array(rows).T, strict=True))


def plot_positions(dump: LogProbDump | Tokens, *, ax: Axes | None = None) -> Axes:
    """|Δ log p| by position, with how many sequences are that long."""
    ax = _axes(ax)
    table = positions(dump)
    middle = (table["from"] + table["to"] + 1) / 2
    ax.fill_between(middle, table["quantile_10"], table["quantile_90"], color=BLUE, alpha=0.2,
                    linewidth=0, label="10 % to 90 %")
    ax.plot(middle, table["mean"], color=BLUE, marker="o", markersize=3, label="mean")
    ax.plot(middle, table["median"], color=GREEN, linestyle="--", label="median")
    ax.set(xscale="log", xlabel="position in the answer", ylabel="|Δ log p|, nats",
           title="Where in the answer", ylim=(0, None))
    survivors = ax.twinx()
    survivors.step(middle, table["sequences"], where="mid", color=ORANGE, linewidth=1.2)
    survivors.set_ylabel("sequences that long", color=ORANGE)
    survivors.set_ylim(0, 1.1 * table["sequences"].max())
    _plain_ticks(ax.xaxis, middle[0], middle[-1])
    ax.set_zorder(survivors.get_zorder() + 1)
    ax.patch.set_visible(False)
    ax.legend(loc="upper right")
    return ax


def weights(dump: LogProbDump | Tokens) -> Columns:
    """Share of tokens and of sequences whose ratio exceeds a value."""
    tokens = as_tokens(dump)
    values = np.concatenate([np.linspace(0, 1, 11)[1:], 1 + np.geomspace(1e-3, 1e4, 120)])
    whole = sequences(tokens)["log_ratio"]
    return {
        "ratio": values,
        "tokens": 1 - np.searchsorted(np.sort(tokens.d), np.log(values), "right") / len(tokens),
        "sequences": 1 - np.searchsorted(np.sort(whole), np.log(values), "right") / len(whole),
    }


def plot_weights(
    dump: LogProbDump | Tokens, *, caps: Sequence[float] = (2.0, 5.0), ax: Axes | None = None
) -> Axes:
    """How often ratios exceed a value: tokens and whole sequences, on log axes."""
    ax = _axes(ax)
    table = weights(dump)
    large = table["ratio"] >= 1
    for name, color in (("tokens", BLUE), ("sequences", ORANGE)):
        share = table[name][large]
        ax.plot(table["ratio"][large][share > 0], share[share > 0], color=color, label=name)
    d = as_tokens(dump).d
    for cap, style in zip(caps, (":", "--", "-.") * len(caps), strict=False):
        ax.axvline(cap, color=GREY, linestyle=style,
                   label=f"above {cap:g}: {(d > math.log(cap)).mean():.2%} of tokens")
    top = table["ratio"][large][(table["tokens"] + table["sequences"])[large] > 0]
    ax.set(xscale="log", yscale="log", xlabel="ratio before any bound", ylabel="share above it",
           title="Tail of the weights", xlim=(1, 1.5 * max([*caps, *top])),
           ylim=(0.5 / len(d), 1))
    _plain_ticks(ax.xaxis, 1, ax.get_xlim()[1])
    ax.legend(loc="upper right")
    return ax


def confidence(dump: LogProbDump | Tokens) -> Columns:
    """Noise of the log-odds by the token's probability."""
    tokens = as_tokens(dump)
    p = np.exp((tokens.old + tokens.rollout) / 2)
    odds = tokens.d / (1 - np.minimum(p, 1 - 1e-4))
    edges = np.array([0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
    rows = []
    for a, b in pairwise(edges):
        inside = odds[(p >= a) & (p < b)]
        if len(inside) >= 12:
            rows.append([a, b, len(inside), np.median(np.abs(inside)),
                         *np.quantile(inside, [0.05, 0.95])])
    names = ("p_from", "p_to", "tokens", "median_abs", "quantile_05", "quantile_95")
    return dict(zip(names, np.array(rows).reshape(-1, 6).T, strict=True))


def plot_confidence(dump: LogProbDump | Tokens, *, ax: Axes | None = None) -> Axes:
    """Noise of the log-odds by confidence: flat for kernels, not for what differs in meaning."""
    ax = _axes(ax)
    table = confidence(dump)
    x = np.arange(len(table["p_from"]))
    ax.fill_between(x, table["quantile_05"], table["quantile_95"], color=BLUE, alpha=0.2,
                    linewidth=0, label="5 % to 95 %")
    ax.plot(x, table["median_abs"], color=BLUE, marker="o", label="median of |Δ|")
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set_xticks(x, [f"{a:g}–{b:g}" for a, b in zip(table["p_from"], table["p_to"], strict=True)],
                  rotation=30)
    ax.set(xlabel="probability of the token", ylabel="Δ log-odds",
           title="Logit noise by confidence")
    ax.legend(loc="best")
    return ax


def steps(dump: LogProbDump | Tokens) -> Columns:
    """Mismatch of each training step; all of it as step 0 where steps are not known."""
    tokens = as_tokens(dump)
    of_row = np.zeros(tokens.count, int) if tokens.step is None else tokens.step
    found, member = np.unique(of_row[tokens.row], return_inverse=True)
    d, count = tokens.d, np.bincount(member)
    highest = np.full(len(found), -np.inf)
    np.maximum.at(highest, member, d)
    return {
        "step": found.astype(float), "tokens": count.astype(float),
        "k1": -np.bincount(member, weights=d) / count,
        "k3": np.bincount(member, weights=tokens.k3) / count,
        "max_ratio": np.exp(np.minimum(highest, 700)),
    }


def plot_steps(dump: LogProbDump | Tokens, *, ax: Axes | None = None) -> Axes:
    """KL estimates and the largest ratio over training steps."""
    ax = _axes(ax)
    table = steps(dump)
    style: dict[str, Any] = {"marker": "o", "markersize": 3}
    ax.plot(table["step"], np.maximum(table["k3"], 1e-12), color=BLUE, label="k3", **style)
    ax.plot(table["step"], np.maximum(np.abs(table["k1"]), 1e-12), color=GREEN, linestyle="--",
            label="|k1|", **style)
    ax.set(yscale="log", xlabel="training step", ylabel="KL, nats per token", title="Over training")
    largest = ax.twinx()
    largest.plot(table["step"], np.maximum(table["max_ratio"], 1e-12), color=ORANGE, linewidth=1,
                 linestyle=":")
    largest.set_yscale("log")
    largest.set_ylabel("largest token ratio", color=ORANGE)
    ax.legend(loc="best")
    return ax


def worst_sequence(dump: LogProbDump | Tokens) -> Columns:
    """The sequence with the largest |Δ log p|, token by token."""
    tokens = as_tokens(dump)
    worst = tokens.where(tokens.row == tokens.row[np.abs(tokens.d).argmax()])
    ids = worst.ids if worst.ids is not None else np.full(len(worst), -1)
    return {"position": worst.position, "token_id": ids, "rollout_log_prob": worst.rollout,
            "old_log_prob": worst.old, "log_ratio": worst.d}


def plot_worst_sequence(dump: LogProbDump | Tokens, *, ax: Axes | None = None) -> Axes:
    """The worst sequence: both log-probs, the gap, and where it is largest."""
    ax = _axes(ax)
    table = worst_sequence(dump)
    x, old, rollout = table["position"], table["old_log_prob"], table["rollout_log_prob"]
    at = int(np.abs(table["log_ratio"]).argmax())
    near = slice(max(0, at - 100), at + 100)
    ax.fill_between(x[near], old[near], rollout[near], color=RED, alpha=0.25, linewidth=0,
                    label="gap")
    ax.plot(x[near], rollout[near], color=BLUE, linewidth=1, label="rollout log μ")
    ax.plot(x[near], old[near], color=ORANGE, linewidth=1, linestyle="--", label="trainer log π")
    ax.scatter([x[at]], [old[at]], color=RED, zorder=3, s=28,
               label=f"Δ = {table['log_ratio'][at]:+.3g} at token {x[at]}")
    low = min(old[near].min(), rollout[near].min(), -0.1)
    ax.set(xlabel="position in the answer", ylabel="log-prob, nats", title="Worst sequence",
           ylim=(1.3 * low, -0.03 * low))
    ax.legend(loc="lower center", ncols=2)
    return ax


FIGURES: dict[str, tuple[Callable[[LogProbDump | Tokens], Columns], Callable[..., Axes]]] = {
    "probabilities": (probabilities, plot_probabilities),
    "sequences": (sequences, plot_sequences),
    "ratios": (ratios, plot_ratios),
    "weights": (weights, plot_weights),
    "positions": (positions, plot_positions),
    "confidence": (confidence, plot_confidence),
    "steps": (steps, plot_steps),
    "worst_sequence": (worst_sequence, plot_worst_sequence),
}
"""By name: what tabulates and what draws."""


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import_extra("plots", "matplotlib.figure", "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _plain_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks at round numbers written plainly, for log axes of few decades."""
    from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

    if high / max(low, 1e-12) > 1e3:
        return
    decades = [1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100, 1000, 10_000]
    ticks = [m * d for d in decades for m in (1, 2, 5) if low <= m * d <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
