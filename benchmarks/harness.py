"""Measuring: interleaved rounds, medians, ratios within a round, records with their conditions."""

from __future__ import annotations

import csv
import ctypes
import gc
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch

import iscorrect

RECORDS = Path(__file__).parent / "records"
COLUMNS = (
    "case", "workload", "provider", "version", "metric", "value", "conditions", "processor",
    "device", "threads", "python", "torch", "iscorrect", "commit", "date",
)


@dataclass(frozen=True)
class Setting:
    """Where a case runs and how often.

    Attributes:
        device: "cpu" or "cuda".
        threads: of torch on the CPU.
        rounds: every provider runs once in each.
        small: sizes that finish in seconds, to see that a case works; never recorded.
    """

    device: str = "cpu"
    threads: int = 1
    rounds: int = 11
    small: bool = False

    @property
    def clock(self) -> str:
        """What ratios are of: the time of one thread, or the wall clock's."""
        return "cpu" if self.device == "cpu" and self.threads == 1 else "wall"


@dataclass
class Workload:
    """Measurements of several providers on the same inputs.

    Attributes:
        name: of the table.
        conditions: sizes and what is counted, printed under the table.
        rows: by provider, by metric; a text where there is nothing to measure.
        versions: of the package behind each provider.
        threads: of torch, where they are not those of the whole case.
    """

    name: str
    conditions: str
    rows: dict[str, dict[str, float | str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    threads: int | None = None

    def add(self, provider: str, package: str | None = None, **metrics: float | str) -> None:
        self.rows.setdefault(provider, {}).update(metrics)
        self.versions[provider] = version(package) if package else ""


def version(package: str) -> str:
    """Name and installed version of a distribution, or "not installed"."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def installed(package: str) -> bool:
    return version(package) != "not installed"


@dataclass(frozen=True)
class Times:
    """Seconds of each round."""

    wall: list[float]
    cpu: list[float]


def interleave(providers: Mapping[str, Callable[[], object]], setting: Setting) -> dict[str, Times]:
    """Time every provider once a round, after one run of each that is not counted.

    CPU time is the process's: with one thread it is what the work costs, however many others share
    the machine. On a GPU each is run once more before it is timed: how fast it multiplies depends
    on what it has just done.
    """
    times = {name: Times([], []) for name in providers}
    for turn in range(setting.rounds + 1):
        for name, run in providers.items():
            gc.collect()
            if setting.device == "cuda":
                run()
            synchronize(setting.device)
            cpu, wall = time.process_time(), time.perf_counter()
            result = run()
            synchronize(setting.device)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            del result
            if turn:
                times[name].wall.append(wall)
                times[name].cpu.append(cpu)
    return times


def summary(times: Times, reference: Times, clock: str) -> dict[str, float]:
    """Medians in milliseconds, and the median of the ratios to a reference in the same round.

    ``clock`` is "cpu" for the process's time, and anything else for the wall clock's.
    """
    steady = (lambda t: t.cpu) if clock == "cpu" else (lambda t: t.wall)
    ratios = [a / b for a, b in zip(steady(times), steady(reference), strict=True)]
    medians = {"wall, ms": statistics.median(times.wall) * 1e3}
    if clock == "cpu":
        medians["CPU, ms"] = statistics.median(times.cpu) * 1e3
    return medians | {"ratio": statistics.median(ratios)}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def record(case: str, workloads: list[Workload], setting: Setting) -> Path:
    """Write one row for each measurement; a case on a device has one file, and git its history."""
    common = {
        "case": case, "processor": processor(setting.device), "device": setting.device,
        "threads": setting.threads, "python": platform.python_version(),
        "torch": torch.__version__, "iscorrect": iscorrect.__version__, "commit": commit(),
        "date": date.today().isoformat(),
    }
    path = RECORDS / f"{case}-{setting.device}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for workload in workloads:
            for provider, metrics in workload.rows.items():
                for metric, value in metrics.items():
                    writer.writerow(common | {
                        "workload": workload.name, "provider": provider,
                        "threads": workload.threads or setting.threads,
                        "version": workload.versions[provider], "metric": metric,
                        "value": value if isinstance(value, str) else f"{value:.6g}",
                        "conditions": workload.conditions,
                    })
    return path


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    units = [f for f in ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile") if f in flags]
    return f"{fields.get('model name', platform.machine())} ({', '.join(units)})"


def commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent,
    )
    return found.stdout.strip()


def extra_memory(run: Callable[[], object], device: str) -> float | str:
    """Bytes that one run holds at its peak beyond what was there before; run it once beforehand."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _resident("VmRSS")
        # makes the kernel forget the highest resident size so far
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        run()
        return _resident("VmHWM") - before
    except OSError:
        return "not measured"


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
