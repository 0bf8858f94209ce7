"""The demonstration: real rollouts, every preset, and the line to write in a training loop."""

from __future__ import annotations

import math

from iscorrect.cli.rollouts import MODELS, PAIRS, shipped_rollouts
from iscorrect.loss.presets import PRESETS, sequence_is, token_is
from iscorrect.report.effects import HEADER, effect_row, effects, enumerated
from iscorrect.text import number, percent, show

SHORT = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}

LINE = """\
In a training loop:

    loss, metrics = iscorrect.token_tis_loss(
        log_probs, rollout_log_probs=rollout_log_probs, advantages=advantages, mask=mask
    )

Your own rollouts: iscorrect compare FILE --correction token-tis:cap=2 --correction sequence-mis"""


def main() -> int:
    """Print the demonstration; 0."""
    print("64 sequences of 128 tokens, sampled by vLLM, scored by Hugging Face transformers.")
    print("Same weights, same tokens, and yet other probabilities:")
    for model in MODELS:
        rows = []
        for rollout, trainer in PAIRS:
            dump = shipped_rollouts(model, rollout, trainer)
            seen = effects(dump, {"token": token_is(), "sequence": sequence_is()})
            m = seen["token"].to_floats()
            rows.append([
                f"{SHORT[rollout]} / {SHORT[trainer]}",
                number(m["mismatch/log_prob_diff/mean"]), number(m["mismatch/log_prob_diff/max"]),
                number(math.sqrt(2 * m["mismatch/kl_k2"])), number(m["mismatch/kl_k3"]),
                number(float(seen["sequence"]["is/ess"])),
            ])
        show(
            f'Model "{model}": mismatch by precision of rollout / trainer (nats per token)',
            ["rollout / trainer", "mean |Δ log p|", "max", "σ", "KL (k3)", "ESS of sequences"],
            rows,
        )

    dump = shipped_rollouts("sharp", "bfloat16", "bfloat16")
    presets = {name: preset() for name, preset in PRESETS.items()}
    seen = effects(dump, presets)
    sigma = math.sqrt(2 * float(seen["token-is"]["mismatch/kl_k2"]))
    rows = []
    for name, correction in presets.items():
        row = effect_row(name, correction, seen[name])
        if correction.scope == "batch":
            rows.append([*row, "–", "–"])
            continue
        found = enumerated(correction, sigma)
        size = math.sqrt(float(found.target.square().sum()))
        rows.append([*row, percent(found.relative_bias), number(found.std / size)])
    show(
        'Model "sharp", BF16 / BF16: every preset, and its gradient on a policy of 81 sequences',
        [*HEADER, "exact bias", "std"], rows,
    )
    print(f"""
Left of the last two columns: on the rollouts above; presets that look at the advantage's sign were
given one at random for each sequence. The last two: enumerated, with the same mismatch per token
(σ = {number(sigma)}), bias and standard deviation of one sequence's gradient, relative to the true
one. None for pareto-is, which looks at a whole batch.

{LINE}""")
    return 0
