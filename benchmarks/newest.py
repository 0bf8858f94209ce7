"""The head beside torch's own on the newest torch: run it in an environment that has it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks import peers
from benchmarks.harness import Setting, Workload
from benchmarks.linear import every_peer, make

TORCHS = {name: package for name, package in peers.PACKAGES.items() if package == "torch"}


def run(setting: Setting) -> Iterator[Workload]:
    setting = replace(setting, rounds=min(setting.rounds, 5))
    n, v, d = (64, 512, 64) if setting.small else (1024, 32_768, 1024)
    for threads in (1, os.cpu_count() or 1):
        torch.set_num_threads(threads)
        setting = replace(setting, threads=threads)
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{str(dtype).removeprefix('torch.')}, {threads} thread(s)"
            yield every_peer(name, make(1, n, v=v, d=d, dtype=dtype), setting, TORCHS)
