"""The head with one thread and with all, where others use the cores and where one more does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from benchmarks import peers
from benchmarks.harness import Setting, Workload, interleave, summary
from benchmarks.linear import make, ours, theirs

PEERS = (
    "materialised", "F.linear_cross_entropy, chunks of 256", "TRL, chunked", "Liger, chunked",
    "verl, fused linear", "Apple CCE, torch.compile",
)


def run(setting: Setting) -> Iterator[Workload]:
    setting = replace(setting, rounds=min(setting.rounds, 5), threads=os.cpu_count() or 1)
    yield measure("as-it-is", setting)
    with a_busy_core():
        yield measure("one-core-more-busy", setting)


def measure(name: str, setting: Setting) -> Workload:
    n, v, d = (64, 512, 64) if setting.small else (1024, 16_384, 1024)
    load = os.getloadavg()[0]
    workload = Workload(
        name,
        f"{n} tokens, vocabulary {v}, width {d}, float32, every token counting: loss with "
        f"token-TIS weights and both gradients. {setting.threads} cores, which others use too: "
        f"{load:.1f} programs wanted to run on average when it began. Wall clock, interleaved; "
        "ratio to the materialising head with all threads in the same round.",
    )
    problem = make(1, n, v=v, d=d)
    steps, packages = {"iscorrect": ours(problem)}, {"iscorrect": "iscorrect"}
    for provider in PEERS:
        try:
            steps[provider] = theirs(problem, peers.load(provider, "cpu"))
            packages[provider] = peers.PACKAGES[provider]
        except peers.UnavailableError as why:
            workload.add(provider, peers.PACKAGES[provider], **{"wall, ms": str(why)})
    runs = {
        f"{provider}, {threads} thread(s)": with_threads(threads, step)
        for provider, step in steps.items() for threads in (1, setting.threads)
    }
    reference = f"materialised, {setting.threads} thread(s)"
    times = interleave(runs, setting)
    for provider, taken in times.items():
        values = summary(taken, times[reference], "wall")
        package = packages[provider.rsplit(", ", 1)[0]]
        workload.add(provider, package, **values)
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
