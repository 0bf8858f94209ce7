"""Real rollouts, every preset, a report, and what to do next."""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path

from iscorrect.cli.arguments import check_folder
from iscorrect.cli.audit import Setting
from iscorrect.cli.rollouts import MODELS, PAIRS, shipped_rollouts
from iscorrect.cli.terminal import say
from iscorrect.loss.presets import PRESETS, sequence_is, token_is
from iscorrect.report.effects import HEADER, effect_row, effects
from iscorrect.report.gather import summarise
from iscorrect.report.render import write_report
from iscorrect.text import Table, number, percent, visible

HELP = "real rollouts and every preset, in seconds"

SHORT = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}

NEXT = """\
In a training loop

    loss, metrics = iscorrect.token_tis_loss(
        log_probs, rollout_log_probs=rollout_log_probs, advantages=advantages, mask=mask
    )

In the tests of a loss of your own

    from iscorrect.testing.checks import check_same_as
    check_same_as(my_loss, iscorrect.PolicyLoss(correction=iscorrect.token_tis(cap=2.0)))

For a run of your own: write dumps with iscorrect.dumps.DumpWriter, then

    iscorrect report DUMPS"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``iscorrect demo``."""
    parser.add_argument(
        "--out", type=Path, default=Path("iscorrect-demo"), metavar="DIR",
        help="where the report on one pair goes (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """0."""
    check_folder("demo", options.out)
    say("64 sequences of 128 tokens, sampled by vLLM, scored by Hugging Face transformers.",
        "Same weights, same tokens, and yet other probabilities:")
    kl: dict[str, float] = {}
    for model in MODELS:
        rows = []
        for rollout, trainer in PAIRS:
            dump = shipped_rollouts(model, rollout, trainer)
            seen = effects([dump], {"token": token_is(), "sequence": sequence_is()}).floats()
            m = seen["token"]
            kl[f"{model} {rollout} {trainer}"] = m["mismatch/kl_k3"]
            rows.append([
                f"{SHORT[rollout]} / {SHORT[trainer]}",
                number(m["mismatch/log_prob_diff/mean"]), number(m["mismatch/log_prob_diff/max"]),
                number(math.sqrt(2 * m["mismatch/kl_k2"])), number(m["mismatch/kl_k3"]),
                number(seen["sequence"]["is/ess"]),
            ])
        say("", Table(
            f'Model "{model}": mismatch by precision of rollout / trainer (nats per token)',
            ["rollout / trainer", "mean |Δ log p|", "max", "σ", "KL (k3)", "ESS of sequences"],
            rows,
        ))

    presets = {name: preset() for name, preset in PRESETS.items()}
    dump = shipped_rollouts("sharp", "bfloat16", "bfloat16")
    seen = effects([dump], presets).floats()
    sigma = math.sqrt(2 * seen["token-is"]["mismatch/kl_k2"])
    setting = Setting.of(f"noise={sigma}", length=4, average=1)
    rows = []
    for name, correction in presets.items():
        row = effect_row(name, seen[name])
        if correction.scope == "batch":
            rows.append([*row, "–", "–"])
            continue
        found = setting.numbers(name)
        rows.append([*row, percent(found["bias"]), number(found["std"])])
    say("", Table(
        'Model "sharp", BF16 / BF16: every preset, and its gradient on a policy of 81 sequences',
        [*HEADER, "exact bias", "std"], rows,
    ), f"""
Left of the last two columns: on the rollouts above; presets that look at the advantage's sign were
given one at random for each sequence. The last two: enumerated, with the same mismatch per token
(σ = {number(sigma)}), bias and standard deviation of one sequence's gradient, relative to the true
one. None for pareto-is and m2po, which look at a whole batch.
""")
    per_token = kl["sharp bfloat16 bfloat16"]
    less = f"{per_token / kl['sharp float16 float16']:.0f} times less"
    write_report(summarise([dump], source='model "sharp", BF16 / BF16'), options.out)
    without = "" if importlib.util.find_spec("matplotlib") else "; its figures need the extra plots"
    say(f"""\
Which numbers matter
  KL (k3)            nats per token; for "sharp" {number(per_token)} in BF16, {less} in FP16.
                     Times the tokens of an answer it says how far apart answers are:
                     {1024 * per_token:.1f} nats for 1,024 tokens.
  ESS of sequences   what weights of whole sequences leave of a batch; it falls with that product.
  exact bias, std    what a correction gains and costs: sequence-is has no bias, and the largest
                     deviation as answers grow long.

To look at: {visible(options.out)}/report.html, the report on this pair{without}

{NEXT}""")
    return 0
