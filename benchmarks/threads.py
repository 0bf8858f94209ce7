"""With one thread and with all, on cores as they are and with one of them busy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from benchmarks import fp16_switch, linear, overhead, peers
from benchmarks.harness import Setting, Workload, installed, interleave, summary
from benchmarks.linear import Problem, make, materialised_sequences, ours, theirs, two_pass
from iscorrect import PolicyLoss, sequence_is

PEERS = (
    "materialised", "F.linear_cross_entropy, chunks of 256", "TRL, chunked", "Liger, chunked",
    "verl, fused linear", "Apple CCE, torch.compile",
)


def run(setting: Setting) -> Iterator[Workload]:
    setting = replace(setting, rounds=min(setting.rounds, 5), threads=os.cpu_count() or 1)
    yield from cases("", setting)
    with a_busy_core():
        yield from cases(", a busy core", setting)


def cases(beside: str, setting: Setting) -> Iterator[Workload]:
    v, d = (512, 64) if setting.small else (32_768, 1024)
    n, rows, t = (64, 10, 16) if setting.small else (1024, 10, 256)
    every = f"{n} tokens, every one counting"
    yield head(f"head{beside}", f"{every}, float32", make(1, n, v=v, d=d), setting)
    yield head(
        f"head, bfloat16{beside}", f"{every}, bfloat16 hidden states and weights",
        make(1, n, v=v, d=d, dtype=torch.bfloat16), setting,
    )
    yield head(
        f"group-batch{beside}",
        f"{rows} × {t} positions in ragged rows, 60 % of them counted, 40 % of the rows and of "
        "these tokens without advantage, float32",
        make(rows, t, v=v, d=d, idle=0.4, padding=0.4), setting,
    )
    torch.set_num_threads(setting.threads)
    idle = linear.shares(n, {"v": v, "d": d}, setting)
    yield replace(idle, name=f"{idle.name}{beside}")
    length = n + n // 2
    yield sequences(f"sequence-weights{beside}", make(2, length, v=v, d=d), setting)
    yield correction(f"correction{beside}", setting, old=False)
    yield correction(f"correction, ppo{beside}", setting, old=True)
    torch.set_num_threads(setting.threads)
    steps, length = (5, 16) if setting.small else (150, 64)
    yield fp16_switch.on_a_chain(f"switch{beside}", 512, length, setting, steps=steps)


def head(name: str, tokens: str, problem: Problem, setting: Setting) -> Workload:
    v, d = problem.weight.shape
    workload = Workload(
        name,
        f"{tokens}; vocabulary {v}, width {d}: loss with token-TIS weights and both gradients. "
        + around(setting, "the materialising head"),
    )
    steps, packages = {"iscorrect": ours(problem)}, {"iscorrect": "iscorrect"}
    for provider in PEERS:
        try:
            steps[provider] = theirs(problem, peers.load(provider, "cpu"))
            packages[provider] = peers.PACKAGES[provider]
        except peers.UnavailableError as why:
            workload.add(provider, peers.PACKAGES[provider], **{"wall, ms": str(why)})
    return timed(workload, steps, packages, "materialised", setting)


def sequences(name: str, problem: Problem, setting: Setting) -> Workload:
    v, d = problem.weight.shape
    workload = Workload(
        name,
        f"2 sequences of {problem.mask.shape[1]} tokens; vocabulary {v}, width {d}, float32: "
        "weights of whole sequences under the policy being trained. "
        + around(setting, "the materialising head"),
    )
    steps = {
        "materialised": materialised_sequences(problem),
        "iscorrect, two passes": two_pass(problem, PolicyLoss(correction=sequence_is())),
    }
    packages = {"materialised": "torch", "iscorrect, two passes": "iscorrect"}
    return timed(workload, steps, packages, "materialised", setting)


def correction(name: str, setting: Setting, *, old: bool) -> Workload:
    b, t = (8, 64) if setting.small else (512, 4096)
    batch = overhead.make_batch(b, t, setting.device, old=old)
    policies = "three policies, PPO clip" if old else "two policies, policy gradient"
    workload = Workload(
        name,
        f"{b} × {t} tokens in ragged rows, {policies}, token-TIS: loss, gradient of the "
        f"log-probs, all metrics as floats. {around(setting, 'straightforward torch')}",
    )
    providers = {
        "iscorrect": overhead.ours(batch), "iscorrect, torch.compile": overhead.compiled(batch),
        "straightforward torch": overhead.straightforward,
    }
    packages = {"iscorrect": "iscorrect", "iscorrect, torch.compile": "iscorrect",
                "straightforward torch": "torch", "verl": "verl"}
    if installed("verl"):
        providers["verl"] = overhead.verl(batch)
    else:
        workload.add("verl", "verl", **{"wall, ms": "not installed"})
    steps = {
        provider: partial(overhead.backward, step, batch) for provider, step in providers.items()
    }
    return timed(workload, steps, packages, "straightforward torch", setting)


def around(setting: Setting, reference: str) -> str:
    return (
        f"{setting.threads} cores, on which {os.getloadavg()[0]:.1f} programs wanted to run on "
        f"average when it began. Wall clock, interleaved; ratio to {reference} with all threads "
        "in the same round."
    )


def timed(
    workload: Workload, steps: Mapping[str, Callable[[], object]], packages: Mapping[str, str],
    reference: str, setting: Setting,
) -> Workload:
    """Every step with one thread and with all."""
    times = interleave({
        f"{provider}, {threads} thread(s)": with_threads(threads, step)
        for provider, step in steps.items() for threads in (1, setting.threads)
    }, setting)
    for name, taken in times.items():
        values = summary(taken, times[f"{reference}, {setting.threads} thread(s)"], "wall")
        workload.add(name, packages[name.rsplit(", ", 1)[0]], **values)
    return workload


def with_threads(n: int, step: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        torch.set_num_threads(n)
        return step()

    return run


@contextmanager
def a_busy_core() -> Iterator[None]:
    """Another program that wants a core all the time."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()
