"""The exact bias, variance and error of corrections on a small policy, as a table or a figure."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import io
import json
import sys
import sysconfig
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from iscorrect.cli.arguments import comma_separated, positive, seed
from iscorrect.cli.terminal import say
from iscorrect.errors import InputError, import_extra, input_error, is_part
from iscorrect.loss.policy_loss import PolicyLoss
from iscorrect.loss.presets import PRESETS
from iscorrect.loss.specs import parse, read
from iscorrect.testing.audit import Audit, LossFn, audit
from iscorrect.testing.mismatch import parse_mismatch, token_sigma
from iscorrect.testing.tabular import TabularPolicy, chi2, kl
from iscorrect.text import Table, finite, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELP = "exact bias, variance and error of corrections on a small policy"

THRESHOLDS = ("cap", "high", "limit", "slope", "mean_k3")
HEADER = ("correction", "bias", "cosine", "std", "rmse", "mean weight", "ESS")
FACTORS = [2 ** (step / 2) for step in range(-6, 7)]
SAMPLES = 1_000
INSTALLED = [
    *(Path(sysconfig.get_paths()[x]) for x in ("stdlib", "platstdlib", "purelib", "platlib")),
    Path(torch.__file__).parent, Path(__file__).parents[1],
]
"""Where the code is that is not the user's own."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What corrections are compared on.

    Attributes:
        policy: π.
        rollout_policy: μ.
        reward: "n", also the advantage.
        average: sequences that an estimate averages over.
        losses: of one's own, by name, see :data:`iscorrect.testing.audit.LossFn`.
    """

    policy: TabularPolicy
    rollout_policy: TabularPolicy
    reward: Tensor
    average: int
    losses: Mapping[str, LossFn] = field(default_factory=dict)

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
        """The audit of a correction, given as :func:`iscorrect.parse` reads it, or of a loss.

        Corrections that look at the whole batch are sampled in batches of ``average``.

        >>> Setting.of("noise=0.1").audit("sequence-is").exact
        True
        """
        case = (self.policy, self.rollout_policy, self.reward)
        if correction in self.losses:
            return _audit_own(correction, self.losses[correction], *case)
        loss_fn = PolicyLoss(correction=parse(correction), aggregation="seq-mean-token-sum")
        if loss_fn.scope == "batch":
            return audit(loss_fn, *case, batch=self.average, samples=SAMPLES)
        return audit(loss_fn, *case)

    def numbers(self, name: str) -> dict[str, float]:
        """The row of a table in numbers, see :meth:`iscorrect.testing.Audit.relative`."""
        return self.audit(name).relative(self.average)


def sweep(correction: str, values: Sequence[float] = ()) -> list[str]:
    """A correction at several values of its threshold.

    Args:
        correction: as :func:`iscorrect.parse` reads it.
        values: of the threshold. None given: around its own, which is left in the middle; bounds
            above 1 are raised to powers from 1/8 to 8, others multiplied by them.

    Returns:
        What the preset does not refuse; a correction without a threshold alone.

    >>> sweep("token-tis:cap=4")[::6]
    ['token-tis:cap=1.18921', 'token-tis:cap=4', 'token-tis:cap=65536']
    >>> sweep("token-tis", [1, 2.5])
    ['token-tis:cap=1', 'token-tis:cap=2.5']
    >>> sweep("sequence-is")
    ['sequence-is']
    """
    key = threshold(correction)
    if key is None:
        return [correction]
    given = read("audit", correction)
    name = given.pop("name")
    default = given.pop(key, inspect.signature(PRESETS[name]).parameters[key].default)
    if not values:
        try:
            middle = float(default)
        except (TypeError, ValueError):
            return [correction]
        values = [middle**x if middle > 1 else middle * x for x in FACTORS]
    found = []
    for value in values:
        swept = given | {key: f"{value:.6g}"}
        text = f"{name}:" + ",".join(f"{k}={v}" for k, v in swept.items())
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
    name = read("audit", correction)["name"]
    parameters = inspect.signature(PRESETS[name]).parameters if name in PRESETS else {}
    return next((key for key in THRESHOLDS if key in parameters), None)


def load_loss(path: str) -> LossFn:
    """A loss of one's own.

    Args:
        path: ``module:name`` or ``file.py:name``; modules are also looked for in the folder that
            the command was started in.

    Raises:
        InputError: there is no such module or name, it fails, or what it names cannot be called.
    """
    module, _, name = path.rpartition(":")
    try:
        if module.endswith(".py"):
            found = getattr(_module_of(Path(module)), name)
        else:
            sys.path.insert(0, str(Path.cwd()))
            found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever a file of the user's does
        raise input_error(
            "audit", "--loss", expected="module:function or file.py:function that can be imported",
            got=f"{path!r} ({_raised(error)})", fix="pass --loss my_losses:token_loss",
        ) from error
    if not is_part(found):
        raise input_error(
            "audit", "--loss", expected="a function, or a loss such as a PolicyLoss",
            got=f"{path!r}, {type(found).__name__}", fix="name what is called on tensors",
        )
    loss: LossFn = found
    return loss


def _audit_own(
    name: str, loss_fn: LossFn, policy: TabularPolicy, rollout_policy: TabularPolicy,
    reward: Tensor,
) -> Audit:
    try:
        return audit(loss_fn, policy, rollout_policy, reward)
    except Exception as error:
        if isinstance(error, InputError) and not _place(error):
            raise InputError(f"{name}: {error}") from error
        raise input_error(
            "audit", "--loss", expected="a loss that can be called as loss(log_probs, *,"
            " rollout_log_probs, advantages, mask)", got=f"{name!r}, which raised {_raised(error)}",
            fix="mend it, or give its arguments these names with iscorrect.testing.renamed",
        ) from error


def _raised(error: BaseException) -> str:
    """An exception on one line, and where the user's own code raised it."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".:")
    place = _place(error)
    return f"{text}, at {place}" if place else text


def _place(error: BaseException) -> str:
    """File and line of the last of the user's own lines that an exception passed."""
    lines = [(line.filename, line.lineno) for line in traceback.extract_tb(error.__traceback__)]
    own = [f"{file}:{number}" for file, number in lines if not _is_installed(file)]
    return own[-1] if own else ""


def _is_installed(file: str) -> bool:
    return file.startswith("<") or any(Path(file).is_relative_to(x) for x in INSTALLED)


def _module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # as Python does with a file that it runs
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


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
        "--values", type=comma_separated, default=(), metavar="X,Y,…",
        help="with --sweep or --plot: these values in place of some around each threshold",
    )
    parser.add_argument(
        "--loss", action="append", default=[], metavar="MODULE:NAME",
        help="a loss of your own beside them, called as loss(log_probs, *, rollout_log_probs,"
        " advantages, mask), summing over tokens and averaging over sequences; repeatable",
    )
    form = parser.add_mutually_exclusive_group()
    for kind, purpose in FORMS.items():
        form.add_argument(
            f"--{kind}", dest="form", action="store_const", const=kind, help=purpose
        )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE",
        help="figure of bias against standard deviation over each correction's threshold",
    )


def run(arguments: Namespace) -> int:
    """0."""
    losses = {path: load_loss(path) for path in arguments.loss}
    corrections = arguments.corrections or list(PRESETS)
    setting = replace(
        Setting.of(
            arguments.mismatch, vocab=arguments.vocab, length=arguments.length,
            average=arguments.average, seed=arguments.seed,
        ),
        losses=losses,
    )
    if arguments.plot is not None:
        _check_figure(arguments.plot)
        _check_values(corrections, arguments.values)
    rows, note = corrections, ""
    if arguments.sweep is not None:
        swept = [c for c in corrections if threshold(c) == arguments.sweep]
        left = [c for c in corrections if c not in swept]
        note = f" Without the threshold {arguments.sweep}: {', '.join(left)}." if left else ""
        if not swept:
            raise input_error(
                "audit", "--sweep", expected="the threshold of one of the corrections",
                got=repr(arguments.sweep),
                fix="choose from " + ", ".join(f"{c}: {threshold(c)}" for c in corrections),
            )
        _check_values(swept, arguments.values)
        rows = [text for c in swept for text in sweep(c, arguments.values)]
    elif arguments.values and arguments.plot is None:
        raise input_error(
            "audit", "--values", expected="with --sweep or --plot", got="alone",
            fix="pass --sweep cap",
        )
    rows = [*rows, *losses]
    if arguments.form is not None:
        say(WRITERS[arguments.form]({name: setting.numbers(name) for name in rows}))
    else:
        pair = (setting.policy, setting.rollout_policy)
        title = (
            f"{arguments.mismatch}: σ {token_sigma(*pair):.3g} nats per token,"
            f" KL(μ‖π) {float(kl(*reversed(pair))):.3g}, χ²(π‖μ) {float(chi2(*pair)):.3g}"
        )
        say(Table(title, HEADER, audit_rows(setting, rows)), (
            f"\nThe gradient of {setting.average} sequences, in units of ‖∇J‖; * the least error."
            f" {arguments.vocab} tokens, {arguments.length} steps: {len(setting.reward)} sequences,"
            f" all enumerated; ± where batches were sampled.{note}"
        ), *map(partial(_multiple, setting), losses))
    if arguments.plot is not None:
        figure = frontier_figure(setting, [*corrections, *losses], arguments.values)
        figure.savefig(arguments.plot, bbox_inches="tight")
    return 0


def _multiple(setting: Setting, name: str) -> str:
    """What a loss of one's own has for a scale, which its bias contains."""
    return f"{name}: {setting.audit(name).scale:.3g} ∇J is nearest to its expected gradient."


def as_csv(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A table as comma-separated values."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["correction", *next(iter(rows.values()))])
    writer.writerows([name, *numbers.values()] for name, numbers in rows.items())
    return file.getvalue().rstrip("\n")


def as_latex(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A table for a paper, with the rules of the package booktabs."""
    columns = HEADER[1:]
    lines = [
        r"\begin{tabular}{l" + "r" * len(columns) + "}", r"\toprule",
        " & ".join(["correction", *columns]) + r" \\", r"\midrule",
    ]
    for name, numbers in rows.items():
        text = name.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")
        cells = [f"${value:.3f}$" for value in list(numbers.values())[: len(columns)]]
        lines.append(" & ".join([rf"\texttt{{{text}}}", *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


FORMS = {"json": "all numbers, for machines", "csv": "the same as a table", "latex": "for a paper"}
WRITERS = {
    "json": lambda rows: json.dumps(finite(rows), indent=2), "csv": as_csv, "latex": as_latex,
}


def _check_figure(path: Path) -> None:
    """Raise before minutes of work for a figure that cannot be saved."""
    import_extra("audit", "matplotlib.figure", "plots")
    from matplotlib.figure import Figure

    if not path.parent.is_dir():
        raise input_error(
            "audit", "--plot", expected="a file in a folder that is there", got=visible(path),
            fix="make the folder first",
        )
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise input_error(
            "audit", "--plot", expected="a file that ends in one of " + ", ".join(known),
            got=str(path), fix="pass --plot frontier.png",
        )


def _check_values(corrections: Sequence[str], values: Sequence[float]) -> None:
    """Raise for a correction that takes none of the values as its threshold."""
    for correction in corrections:
        if not sweep(correction, values):
            around = sweep(correction)
            raise input_error(
                "audit", "--values", expected=f"such that {correction} takes one of them",
                got=",".join(f"{value:g}" for value in values),
                fix=f"pass some from {around[0]} to {around[-1]}",
            )


def audit_rows(setting: Setting, corrections: Sequence[str]) -> list[list[str]]:
    """One row for each correction under :data:`HEADER`; * marks the least error.

    Args:
        setting: what they are compared on.
        corrections: as :func:`iscorrect.parse` reads them.

    >>> audit_rows(Setting.of("noise=0.2", vocab=2, length=2), ["sequence-is"])[0][:3]
    ['sequence-is', '0.000', '1.000']
    """
    audits = {name: setting.audit(name) for name in corrections}
    numbers = {name: found.relative(setting.average) for name, found in audits.items()}
    best = min(numbers, key=lambda name: numbers[name]["rmse"])
    return [
        [
            name,
            f"{row['bias']:.3f}" + ("" if audits[name].exact else f" ± {row['bias_error']:.3f}"),
            f"{row['cosine']:.3f}", f"{row['std']:.3f}",
            f"{row['rmse']:.3f}{'*' if name == best else ' '}",
            f"{row['mean_weight']:.3f}", f"{row['ess']:.3f}",
        ]
        for name, row in numbers.items()
    ]


def frontier_figure(
    setting: Setting, corrections: Sequence[str], values: Sequence[float] = ()
) -> Figure:
    """Bias against standard deviation, one curve per correction over its threshold.

    Args:
        setting: what they are compared on.
        corrections: as :func:`iscorrect.parse` reads them, and names of the setting's losses.
        values: of the thresholds, see :func:`sweep`.

    Returns:
        Axes in units of ‖∇J‖. A star marks the least root mean squared error, and the dotted circle
        all points with the same; standard deviations far above it leave the figure.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    distinct = 10 if len(corrections) <= 10 else 20
    best, where, highest = float("inf"), (0.0, 0.0, ""), 0.0
    for index, correction in enumerate(corrections):
        points = []
        own = correction in setting.losses
        for text in [correction] if own else sweep(correction, values):
            row = setting.numbers(text)
            points.append((row["bias"], row["std"]))
            if row["rmse"] < best:
                best, where = row["rmse"], (*points[-1], text)
        bias, std = zip(*points, strict=True)
        highest = max(highest, *std)
        axes.plot(
            bias, std, "D" if own else "o-", markersize=6 if own else 3, label=correction,
            color=colormaps[f"tab{distinct}"](index % distinct),
        )
    axes.plot(*where[:2], "k*", markersize=12, label=f"least error: {where[2]}")
    angle = torch.linspace(0, torch.pi / 2, 90)
    axes.plot(best * angle.cos(), best * angle.sin(), "k:", linewidth=0.8)
    axes.set(xlabel="bias / ‖∇J‖", ylabel=f"standard deviation / ‖∇J‖, {setting.average} sequences")
    axes.set_ylim(0, min(3 * where[1] + best, 1.1 * highest))
    axes.set_xlim(left=0)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure
