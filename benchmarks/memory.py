"""Peak memory beyond inputs and gradients, each provider in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks import peers
from benchmarks.harness import Setting, Workload, extra_memory
from benchmarks.linear import forget, make, ours, theirs

OURS = {
    "iscorrect, one pass": {}, "iscorrect, one pass, chunk_size=256": {"chunk_size": 256},
}


def run(setting: Setting) -> Iterator[Workload]:
    if setting.small:
        yield measure("tokens-64", 64, 512, 64, list(OURS), setting)
        return
    every = [*OURS, *peers.PACKAGES]
    yield measure("tokens-1024", 1024, 32768, 1024, every, setting)
    yield measure("tokens-4096", 4096, 32768, 1024, every, setting)
    threads = replace(setting, threads=os.cpu_count() or 1)
    yield measure("tokens-4096-all-threads", 4096, 32768, 1024, every, threads)
    yield measure("tokens-4096-width-256", 4096, 32768, 256, every, setting)
    yield measure("tokens-8192-vocabulary-151936", 8192, 151_936, 256, list(OURS), setting)


def measure(
    name: str, n: int, v: int, d: int, providers: list[str], setting: Setting
) -> Workload:
    workload = Workload(
        name,
        f"{n} tokens, vocabulary {v}, width {d}, float32: peak resident memory of loss and "
        "backward beyond what was there before and beyond the two gradients, "
        "in units of the float32 logits "
        f"({4 * n * v / 2**20:,.0f} MiB). One process each, after a first run"
        f"{', of one thread' if setting.threads == 1 else f', of {setting.threads} threads'}.",
        threads=setting.threads,
    )
    for provider in providers:
        package = peers.PACKAGES.get(provider, "iscorrect")
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", provider,
                   *map(str, (n, v, d)), setting.device, str(setting.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        extra = json.loads(lines[-1]) if done.returncode == 0 else "fails"
        if isinstance(extra, (int, float)):
            found = {"MiB": extra / 2**20, "× float32 logits": extra / (4 * n * v)}
            workload.add(provider, package, **found)
        else:
            workload.add(provider, package, MiB=extra)
    return workload


def child(provider: str, n: int, v: int, d: int, device: str, threads: int) -> float | str:
    torch.set_num_threads(threads)
    problem = make(1, n, v=v, d=d, device=device)
    if provider in OURS:
        step = ours(problem, **OURS[provider])
    else:
        try:
            step = theirs(problem, peers.load(provider, device))
        except peers.UnavailableError as why:
            return str(why)
    step()
    forget(problem)
    extra = extra_memory(step, device)
    if isinstance(extra, str):
        return extra
    return max(0.0, extra - sum(4 * x.numel() for x in problem.inputs))


if __name__ == "__main__":
    name, *sizes = sys.argv[1:]
    tokens, vocabulary, width, where, count = sizes
    print(json.dumps(child(name, int(tokens), int(vocabulary), int(width), where, int(count))))
