"""The head on a processor without 16-bit arithmetic: torch then emulates 16-bit products.

``python -m benchmarks emulated`` says so to oneDNN before torch is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.harness import Setting, Workload
from benchmarks.linear import every_peer, make


def run(setting: Setting) -> Iterator[Workload]:
    setting = replace(setting, rounds=min(setting.rounds, 3))
    n, v, d = (16, 512, 64) if setting.small else (128, 8192, 1024)
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "the processor's")
    for threads in (1, os.cpu_count() or 1):
        torch.set_num_threads(threads)
        setting = replace(setting, threads=threads)
        for dtype in (torch.bfloat16, torch.float16):
            problem = make(1, n, v=v, d=d, dtype=dtype, device=setting.device)
            name = f"{str(dtype).removeprefix('torch.')}-emulated, {threads} thread(s)"
            workload = every_peer(name, problem, setting)
            workload.conditions += f" Instructions: {isa} (ONEDNN_MAX_CPU_ISA)."
            yield workload
