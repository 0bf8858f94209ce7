"""Real rollouts, every preset, and the line to write in a training loop."""

from __future__ import annotations

import argparse
import math

from iscorrect.cli.audit import Setting
from iscorrect.cli.rollouts import MODELS, PAIRS, shipped_rollouts
from iscorrect.cli.terminal import say
from iscorrect.loss.presets import PRESETS, sequence_is, token_is
from iscorrect.report.effects import HEADER, effect_row, effects
from iscorrect.text import Table, number, percent

HELP = "real rollouts and every preset, in seconds"

SHORT = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}

LINE = """\
In a training loop:

    loss, metrics = iscorrect.token_tis_loss(
        log_probs, rollout_log_probs=rollout_log_probs, advantages=advantages, mask=mask
    )

Your own rollouts: iscorrect compare FILE --correction token-tis:cap=2 --correction sequence-mis"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``iscorrect demo`` has none."""


def run(options: argparse.Namespace) -> int:
    """0."""
    say("64 sequences of 128 tokens, sampled by vLLM, scored by Hugging Face transformers.",
        "Same weights, same tokens, and yet other probabilities:")
    for model in MODELS:
        rows = []
        for rollout, trainer in PAIRS:
            dump = shipped_rollouts(model, rollout, trainer)
            seen = effects([dump], {"token": token_is(), "sequence": sequence_is()}).floats()
            m = seen["token"]
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
    seen = effects([shipped_rollouts("sharp", "bfloat16", "bfloat16")], presets).floats()
    sigma = math.sqrt(2 * seen["token-is"]["mismatch/kl_k2"])
    setting = Setting.of(f"noise={sigma}", length=4, average=1)
    rows = []
    for name, correction in presets.items():
        row = effect_row(name, correction, seen[name])
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
one. None for pareto-is, which looks at a whole batch.

{LINE}""")
    return 0
