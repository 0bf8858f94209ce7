"""``python -m benchmarks.lab``: the lab's commands, in the order in which they are needed."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

# before torch is imported: its thread pools are sized on loading
os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).parent
BY_THEMSELVES = {
    "exact": ("benchmarks.lab.chain.exact", "learning by exact expected updates, no seeds"),
    "behind": ("benchmarks.lab.chain.behind", "an engine some updates behind, with seeds"),
    "bias": ("benchmarks.lab.chain.bias", "bias by length and kind, and the batch that shows it"),
    "coherence": ("benchmarks.lab.chain.coherence", "n* from sketches of gradients, and exact"),
    "published": ("benchmarks.lab.published", "numbers of others, read by the library"),
    "report": ("benchmarks.lab.report", "tables and figures from the records"),
}
"""Commands that need no engine, by the module whose ``main`` reads their arguments."""


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in BY_THEMSELVES:
        module, _ = BY_THEMSELVES[arguments[0]]
        import_module(module).main(arguments[1:])
        return
    with_an_engine(read(arguments))


def read(arguments: list[str]) -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--models", type=Path, default=HERE / "models", help="folder of models")
    common.add_argument("--records", type=Path, default=HERE / "records")
    common.add_argument("--width", type=int, default=128, help="of the models; 768 on a GPU")
    common.add_argument("--layers", type=int, default=2)
    common.add_argument("--training-steps", type=int, default=3000, help="at most, for a model")
    common.add_argument("--solved", type=float, default=0.4,
                        help="share of right answers at which a model's training stops")
    common.add_argument("--engine", choices=["vllm", "transformers"],
                        help="vLLM where it is installed")
    common.add_argument("--seeds", type=int, default=3)

    four = ["add-3", "sort-8", "brackets-24", "sharp"]
    made = commands.add_parser("models", parents=[common], help="train the models")
    made.add_argument("names", nargs="*", default=four)

    compared = commands.add_parser(
        "offline", parents=[common], help="one set of tokens in every pair of precisions")
    compared.add_argument("names", nargs="*", default=four)
    compared.add_argument("--sequences", type=int, default=64)
    compared.add_argument("--length", type=int, default=128)

    learning = argparse.ArgumentParser(add_help=False)
    learning.add_argument("--jobs", type=int, default=2, help="runs at a time")
    learning.add_argument("--steps", type=int, default=80)
    learning.add_argument("--prompts", type=int, default=32, help="of a step")
    learning.add_argument("--pool", type=int, default=256,
                          help="prompts of which those within reach are kept")
    learning.add_argument("--arms", nargs="*", help="some of the arms")
    lengths = ["brackets-12", "brackets-24", "brackets-48"]
    for name, usual, help_ in (
        ("sanity", ["brackets-24"], "reinforcement learning in each precision and method"),
        ("map", lengths, "the same by mismatch, length and correction"),
    ):
        command = commands.add_parser(name, parents=[common, learning], help=help_)
        command.add_argument("tasks", nargs="*", default=usual)
        if name == "sanity":
            command.add_argument("--models-each", type=int, default=0, help="so many models of a "
                                 "task, each at every rate, with records apart")
            command.add_argument("--rates", type=float, nargs="*", default=[1.5e-4, 5e-4, 1.5e-3])
    for name, (_, help_) in BY_THEMSELVES.items():
        commands.add_parser(name, help=help_)

    return parser.parse_args(arguments)


def with_an_engine(given: argparse.Namespace) -> None:
    """The commands that need transformers, and vLLM where it is."""
    from benchmarks.lab import engines, models, offline, phases, sanity, tasks
    from benchmarks.lab.experiment import Run, carry_out
    from benchmarks.lab.policy import Size
    from benchmarks.lab.reinforce import Schedule

    kind = given.engine or engines.default_kind()
    size = Size(given.width, given.layers)

    def model(name: str, seed: int = 0) -> Path:
        return models.make(name, given.models, size, seed=seed, solved=given.solved,
                           steps=given.training_steps)

    if given.command == "models":
        for name in given.names:
            print(model(name))
    elif given.command == "offline":
        offline.main([model(name) for name in given.names], kind, given.records,
                     seeds=given.seeds, sequences=given.sequences, length=given.length)
    else:
        experiment = sanity if given.command == "sanity" else phases
        known = [arm.name for arm in experiment.arms(1)]
        if unknown := set(given.arms or []) - set(known):
            raise SystemExit(f"no arms {', '.join(sorted(unknown))}: there are {', '.join(known)}")
        schedule = replace(Schedule(), steps=given.steps, prompts=given.prompts)
        folder = given.records / given.command
        each = given.models_each if given.command == "sanity" else 0
        settings = [
            (which, replace(schedule, learning_rate=rate), folder / f"{which}-{rate:g}")
            for which in range(each) for rate in given.rates
        ] or [(0, schedule, folder)]
        runs = [
            Run(arm, task, model(task, which), plan, seed, kind, records)
            for seed in range(given.seeds)
            for which, plan, records in settings
            for task in given.tasks
            for arm in experiment.arms(tasks.parse(task).longest)
            if not given.arms or arm.name in given.arms
        ]
        carry_out(runs, jobs=given.jobs, pool=given.pool)


if __name__ == "__main__":
    main()
