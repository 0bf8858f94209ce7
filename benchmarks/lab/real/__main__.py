"""``python -m benchmarks.lab.real``: the runs of PLAN.md, one command an arm."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from importlib.util import find_spec
from math import inf
from pathlib import Path

# before torch is imported: its thread pools are sized on loading
os.environ.setdefault("OMP_NUM_THREADS", "1")

if lacking := [name for name in ("transformers", "matplotlib", "scipy") if not find_spec(name)]:
    raise SystemExit(
        f"python -m benchmarks.lab.real needs {', '.join(lacking)}: "
        "pip install -c constraints.txt -e '.[plots,cli]' -r benchmarks/lab/requirements.txt"
    )

import torch

from benchmarks import harness
from benchmarks.diagnose import RECORDS
from benchmarks.lab.policy import DTYPES
from benchmarks.lab.real import (
    coherence,
    faults,
    mechanism,
    model,
    offline,
    pairs,
    quantised,
    reinforce,
    report,
    served,
    sums,
    switch,
    together,
)
from benchmarks.lab.real.learner import Schedule

LAB = Path(__file__).parents[1]


def read(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab.real", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--models", type=Path, default=LAB / "models" / "smollm2")
    common.add_argument("--records", type=Path, default=LAB / "records" / "real")
    common.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    common.add_argument("--learning-rate", type=float, default=2e-5)
    common.add_argument("--grid", choices=list(model.GRIDS), default="bf16-grid")

    made = commands.add_parser("model", help="make the checkpoints from the package")
    made.add_argument("--models", type=Path, default=LAB / "models" / "smollm2")
    commands.add_parser(
        "mechanism", parents=[common], help="what arrives of an update, and the KL it makes")

    serving = commands.add_parser(
        "served", parents=[common], help="a trajectory whose weights are sent to vLLM")
    serving.add_argument("--engine", choices=list(served.WAYS), default="bf16")
    shared = commands.add_parser(
        "coherence", parents=[common], help="from which batch on an engine's mismatch shows")
    shared.add_argument("--kinds", nargs="*", choices=list(coherence.KINDS),
                        default=list(coherence.KINDS))
    compared = commands.add_parser(
        "offline", parents=[common], help="one set of tokens in pairs of precisions")
    compared.add_argument("--rollouts", nargs="*", choices=list(DTYPES), default=["bf16", "fp16"])
    compared.add_argument("--trainers", nargs="*", choices=list(DTYPES), default=["bf16", "fp16"])

    commands.add_parser(
        "quantised", parents=[common], help="llama.cpp serves the quantised model; needs xllamacpp")
    commands.add_parser(
        "faults", parents=[common], help="is the diagnosis right on this model and vLLM")
    learning = commands.add_parser(
        "reinforce", parents=[common], help="one arm: an engine, a correction, a way to send")
    learning.add_argument("--engine", choices=list(DTYPES), default="bf16")
    learning.add_argument("--correction", default="uncorrected", help="as for iscorrect compare")
    learning.add_argument("--rounding", choices=reinforce.ROUNDINGS, default="nearest")
    learning.add_argument("--trainer", choices=reinforce.TRAINERS, default="fp32",
                          help="what it computes in, amp: under autocast; its weights are float32")
    learning.add_argument("--fp32-head", action="store_true", help="on both sides")
    learning.add_argument("--kind", choices=["vllm", "simulated"], default="vllm")
    learning.add_argument("--every", type=int, default=1, help="steps from one send to the next")
    learning.add_argument("--steps", type=int, default=24)
    learning.add_argument("--task", choices=list(sums.PAIRS), default="one digit")
    card = argparse.ArgumentParser(add_help=False)
    card.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    many = commands.add_parser(
        "together", parents=[common, card], help="on a GPU, the runs of the plan, many at once")
    many.add_argument("--seconds", type=float, default=inf, help="until no more is begun")
    many.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"),
                      help="of N processes, this one's number")
    commands.add_parser(
        "pairs", parents=[common, card], help="on a GPU, tokens in pairs of precisions")
    switched = commands.add_parser(
        "switch", parents=[common, card], help="a step in FP16 beside BF16's remedies: cost, error")
    switched.add_argument("--rounds", type=int, default=3)
    told = commands.add_parser("report", help="tables and figures from the records")
    told.add_argument("--records", type=Path, default=LAB / "records" / "real")

    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = read(arguments)
    if given.command == "model":
        model.make(given.models)
        return
    if given.command == "report":
        report.main(given.records, report.PAGES, report.PICTURES)
        return
    if given.command == "faults":
        for seed in given.seeds:
            faults.main(given.models, RECORDS / "real.csv", seed)
        return
    if given.command == "offline":
        offline.main(given.models, given.records / "offline", given.seeds, given.rollouts,
                     given.trainers)
        return
    if given.command == "quantised":
        quantised.main(given.models, given.records / "quantised", given.seeds)
        return
    if given.command == "together":
        together.main(given.models, given.records / "together.csv", share=tuple(given.share),
                      seconds=given.seconds, device=given.device)
        return
    if given.command == "pairs":
        pairs.main(given.models, given.records / "pairs.csv", given.seeds, device=given.device)
        return
    if given.command == "switch":
        setting = harness.Setting(given.device, rounds=given.rounds)
        harness.record("fp16_switch_real", [switch.measure(given.models, setting)], setting)
        return
    schedule = replace(Schedule(), learning_rate=given.learning_rate, grid=given.grid)
    for seed in given.seeds:
        if given.command == "mechanism":
            mechanism.main(given.models, given.records / "mechanism", schedule, seed)
        elif given.command == "coherence":
            for kind in given.kinds:
                coherence.main(given.models, given.records / "coherence", kind, schedule, seed)
        elif given.command == "served":
            served.main(given.models, given.records / "served", given.engine, schedule, seed)
        else:
            arm = reinforce.Arm(
                given.engine, given.correction, given.rounding, given.kind, given.trainer,
                given.fp32_head,
            )
            how = replace(schedule, steps=given.steps, every=given.every, task=given.task)
            folder = "reinforce" if given.task == "one digit" else given.task.replace(" ", "-")
            reinforce.main(given.models, given.records / folder, arm, how, seed)


if __name__ == "__main__":
    main()
