"""The exact bias, variance and error of corrections on a small policy, as a table or a figure."""

from __future__ import annotations

import inspect
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from iscorrect.cli.arguments import positive, seed
from iscorrect.cli.terminal import say
from iscorrect.errors import InputError, import_extra, input_error
from iscorrect.loss.policy_loss import PolicyLoss
from iscorrect.loss.presets import PRESETS
from iscorrect.loss.specs import parse
from iscorrect.testing.audit import Audit, audit
from iscorrect.testing.mismatch import parse_mismatch, token_sigma
from iscorrect.testing.tabular import TabularPolicy, chi2, kl
from iscorrect.text import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELP = "exact bias, variance and error of corrections on a small policy"

THRESHOLDS = ("cap", "high", "limit", "slope", "mean_k3")
HEADER = ("correction", "bias", "cosine", "std", "rmse", "mean weight", "ESS")
FACTORS = [2 ** (step / 2) for step in range(-6, 7)]
SAMPLES = 1_000


@dataclass(frozen=True, eq=False)
class Setting:
    """What corrections are compared on.

    Attributes:
        policy: π.
        rollout_policy: μ.
        reward: "n", also the advantage.
        average: sequences that an estimate averages over.
    """

    policy: TabularPolicy
    rollout_policy: TabularPolicy
    reward: Tensor
    average: int

    @classmethod
    def of(
        cls, mismatch: str, *, vocab: int = 3, length: int = 5, average: int = 512, seed: int = 0
    ) -> Setting:
        """A random policy, an engine that differs from it as told, and normal rewards.

        >>> len(Setting.of("noise=0.1").reward)
        243
        """
        policy = TabularPolicy.random(vocab, length, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        reward = torch.randn(len(policy.probabilities), generator=generator, dtype=torch.float64)
        return cls(policy, parse_mismatch(mismatch)(policy), reward, average)

    def audit(self, correction: str) -> Audit:
        """The audit of a correction, given as :func:`iscorrect.parse` reads it.

        Corrections that look at the whole batch are sampled in batches of ``average``.

        >>> Setting.of("noise=0.1").audit("sequence-is").exact
        True
        """
        loss_fn = PolicyLoss(correction=parse(correction), aggregation="seq-mean-token-sum")
        case = (self.policy, self.rollout_policy, self.reward)
        if loss_fn.scope == "batch":
            return audit(loss_fn, *case, batch=self.average, samples=SAMPLES)
        return audit(loss_fn, *case)

    def relative_std(self, found: Audit) -> float:
        """Standard deviation of the average, over ‖∇J‖."""
        return found.std / math.sqrt(self.average / found.batch) / float(found.target.norm())

    def relative_error(self, found: Audit) -> float:
        """Root mean squared error of the average, over ‖∇J‖."""
        return math.sqrt(found.mse(self.average)) / float(found.target.norm())


def sweep(correction: str) -> list[str]:
    """A correction at thresholds around its own, which the sweep leaves in the middle.

    Bounds above 1 are raised to powers from 1/8 to 8, others multiplied by them; what the preset
    refuses is left out. A correction without a threshold is returned alone.

    >>> sweep("token-tis:cap=4")[::6]
    ['token-tis:cap=1.18921', 'token-tis:cap=4', 'token-tis:cap=65536']
    >>> sweep("sequence-is")
    ['sequence-is']
    """
    name = threshold(correction)
    preset, _, arguments = correction.partition(":")
    given = dict(argument.split("=") for argument in arguments.split(",") if argument)
    default = given.pop(name, inspect.signature(PRESETS[preset]).parameters[name].default) if (
        name is not None
    ) else None
    if default in (None, "none"):
        return [correction]
    middle = float(default)
    found = []
    for factor in FACTORS:
        value = middle**factor if middle > 1 else middle * factor
        swept = given | {str(name): f"{value:.6g}"}
        text = f"{preset}:" + ",".join(f"{key}={value}" for key, value in swept.items())
        try:
            parse(text)
        except InputError:
            continue
        found.append(text)
    return found


def threshold(correction: str) -> str | None:
    """The name of a preset's threshold; None where it has none.

    >>> threshold("sequence-mis:low=0.5")
    'high'
    """
    parse(correction)
    parameters = inspect.signature(PRESETS[correction.partition(":")[0]]).parameters
    return next((name for name in THRESHOLDS if name in parameters), None)


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of ``iscorrect audit``."""
    parser.add_argument(
        "corrections", nargs="*", metavar="CORRECTION",
        help="presets such as token-tis or sequence-mis:high=2 (default: all)",
    )
    parser.add_argument("--vocab", type=positive, default=3, help="tokens (default: %(default)s)")
    parser.add_argument(
        "--length", type=positive, default=5, help="tokens per sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--mismatch", default="noise=0.2",
        help="how the engine differs: bf16, fp16, fp8, noise=SIGMA, heavy-noise=SIGMA,"
        " temperature=, top-p=, top-k=, min-p=, repetition-penalty=, fault="
        " (default: %(default)s, nats per token)",
    )
    parser.add_argument(
        "--average", type=positive, default=512, metavar="N",
        help="sequences that one gradient averages over (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="of the policy (default: %(default)s)"
    )
    parser.add_argument(
        "--sweep", choices=THRESHOLDS, metavar="THRESHOLD",
        help="only corrections with this threshold, each at several values: "
        + ", ".join(THRESHOLDS),
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE",
        help="figure of bias against standard deviation over each correction's threshold",
    )


def run(arguments: Namespace) -> int:
    """0."""
    corrections = arguments.corrections or list(PRESETS)
    setting = Setting.of(
        arguments.mismatch, vocab=arguments.vocab, length=arguments.length,
        average=arguments.average, seed=arguments.seed,
    )
    rows = corrections
    if arguments.sweep is not None:
        rows = [
            text for correction in corrections if threshold(correction) == arguments.sweep
            for text in sweep(correction)
        ]
    if not rows:
        raise input_error(
            "audit", "--sweep", expected="the threshold of one of the corrections",
            got=repr(arguments.sweep),
            fix="choose from " + ", ".join(f"{c}: {threshold(c)}" for c in corrections),
        )
    pair = (setting.policy, setting.rollout_policy)
    title = (
        f"{arguments.mismatch}: σ {token_sigma(*pair):.3g} nats per token,"
        f" KL(μ‖π) {float(kl(*reversed(pair))):.3g}, χ²(π‖μ) {float(chi2(*pair)):.3g}"
    )
    if arguments.plot is not None:
        _check_figure(arguments.plot)
    say(Table(title, HEADER, audit_rows(setting, rows)), (
        f"\nThe gradient of {setting.average} sequences, in units of ‖∇J‖; * the least error."
        f" {arguments.vocab} tokens, {arguments.length} steps: {len(setting.reward)} sequences,"
        " all enumerated; ± where batches were sampled."
    ))
    if arguments.plot is not None:
        frontier_figure(setting, corrections).savefig(arguments.plot, bbox_inches="tight")
    return 0


def _check_figure(path: Path) -> None:
    """Raise before minutes of work for a figure that cannot be saved."""
    import_extra("audit", "matplotlib.figure", "plots")
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise input_error(
            "audit", "--plot", expected="a file that ends in one of " + ", ".join(known),
            got=str(path), fix="pass --plot frontier.png",
        )


def audit_rows(setting: Setting, corrections: Sequence[str]) -> list[list[str]]:
    """One row for each correction under :data:`HEADER`; * marks the least error.

    Args:
        setting: what they are compared on.
        corrections: as :func:`iscorrect.parse` reads them.

    >>> audit_rows(Setting.of("noise=0.2", vocab=2, length=2), ["sequence-is"])[0][:3]
    ['sequence-is', '0.000', '1.000']
    """
    audits = [setting.audit(correction) for correction in corrections]
    best = min(audits, key=setting.relative_error)
    return [
        [
            correction,
            f"{found.relative_bias:.3f}"
            + ("" if found.exact else f" ± {found.errors['relative_bias']:.3f}"),
            f"{found.cosine:.3f}", f"{setting.relative_std(found):.3f}",
            f"{setting.relative_error(found):.3f}{'*' if found is best else ' '}",
            f"{found.mean_weight:.3f}", f"{found.ess:.3f}",
        ]
        for correction, found in zip(corrections, audits, strict=True)
    ]


def frontier_figure(setting: Setting, corrections: Sequence[str]) -> Figure:
    """Bias against standard deviation, one curve per correction over its threshold.

    Args:
        setting: what they are compared on.
        corrections: as :func:`iscorrect.parse` reads them.

    Returns:
        Axes in units of ‖∇J‖. A star marks the least root mean squared error, and the dotted circle
        all points with the same; standard deviations far above it leave the figure.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    best, where = float("inf"), (0.0, 0.0, "")
    for index, correction in enumerate(corrections):
        points = []
        for text in sweep(correction):
            found = setting.audit(text)
            points.append((found.relative_bias, setting.relative_std(found)))
            if setting.relative_error(found) < best:
                best, where = setting.relative_error(found), (*points[-1], text)
        bias, std = zip(*points, strict=True)
        axes.plot(
            bias, std, "o-", markersize=3, label=correction,
            color=colormaps["tab20"](index % 20),
        )
    axes.plot(*where[:2], "k*", markersize=12, label=f"least error: {where[2]}")
    angle = torch.linspace(0, torch.pi / 2, 90)
    axes.plot(best * angle.cos(), best * angle.sin(), "k:", linewidth=0.8)
    axes.set(xlabel="bias / ‖∇J‖", ylabel=f"standard deviation / ‖∇J‖, {setting.average} sequences")
    axes.set_ylim(0, 3 * where[1] + best)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure
