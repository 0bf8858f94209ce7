"""Everything that a GPU has to show, within minutes: exactness first, then times and memory.

``python -m benchmarks gpu`` records each table as soon as it is measured; run again, it goes on
after the last one, unless code or card have changed. It needs nothing from the network.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import fp16_switch, harness, head, overhead, peers
from benchmarks.harness import Setting, Workload, extra_memory, interleave, record, summary
from benchmarks.linear import TOKEN_TIS, Problem, ours, theirs, two_pass
from benchmarks.screen import show
from iscorrect import (
    Layout,
    PolicyLoss,
    global_normalizer,
    log_probs_from_logits,
    pareto_is,
    sequence_tis,
)

Run = Callable[[], object]
FROZEN = "iscorrect, frozen head"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8, help="no table is begun after these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="toy sizes, printed and not recorded")
    given = parser.parse_args(arguments)
    setting = Setting("cuda", torch.get_num_threads(), given.rounds, given.small)
    if not torch.cuda.is_available():
        print("there is no GPU here")
        return 1
    done = [] if given.small else recorded(setting)
    for workload in run(setting, done, until=time.monotonic() + 60 * given.minutes):
        show(workload)
        done.append(workload)
        if not given.small:
            print(f"recorded in {record('gpu', done, setting)}", flush=True)
    left = [name for name in tables(setting) if name not in {w.name for w in done}]
    if left:
        print(f"left for another run: {', '.join(left)}")
    return 0


def run(setting: Setting, done: list[Workload], *, until: float) -> Iterator[Workload]:
    """The tables that are not done, while there is time."""
    names = {workload.name for workload in done}
    for name, measure in tables(setting).items():
        if name in names:
            continue
        if time.monotonic() > until:
            return
        try:
            yield replace(measure(), name=name)
        except Exception as error:  # the tables after it are still worth having
            failed = Workload(name, "This table could not be measured.")
            failed.add("the table", outcome=f"fails: {type(error).__name__}: {error}"[:200])
            yield failed


def recorded(setting: Setting) -> list[Workload]:
    """What the record holds of this commit on this card."""
    path = harness.RECORDS / f"gpu-{setting.device}.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    here = (harness.commit(), harness.processor(setting.device), torch.__version__)
    found = []
    for name, group in groupby(rows, key=lambda row: row["workload"]):
        mine = [r for r in group if (r["commit"], r["processor"], r["torch"]) == here]
        workload = Workload(name, mine[0]["conditions"] if mine else "")
        for row in mine:
            workload.rows.setdefault(row["provider"], {})[row["metric"]] = row["value"]
            workload.versions[row["provider"]] = row["version"]
        found += [workload] if mine else []
    return found


def tables(setting: Setting) -> Mapping[str, Callable[[], Workload]]:
    """Every table, the most telling first and the longest last."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    exact = (32, 509, 64) if setting.small else (128, 4099, 256)
    size = (64, 512, 64) if setting.small else (8192, 151_936, 4096)
    long = (128, 512, 64) if setting.small else (32_768, 151_936, 4096)
    rows, columns = (8, 64) if setting.small else (512, 4096)
    switch = {"vocabulary": 256, "length": 16, "steps": 5} if setting.small else {
        "vocabulary": 32_768, "length": 64, "steps": 60,
    }
    return {
        **{
            f"exactness-{name(dtype)}": partial(head.measure, dtype, *exact, setting)
            for dtype in (bf16, fp16, fp32)
        },
        "collectives": partial(collectives, setting),
        **{
            f"head-{size[0]}-{name(dtype)}": partial(heads, *size, dtype, setting)
            for dtype in (bf16, fp16)
        },
        "logits": partial(logits, 2048 if not setting.small else 16, size[1], setting),
        "overhead": lambda: overhead.measure(
            "overhead", overhead.make_batch(rows, columns, setting.device, old=False), setting
        ),
        "switch": partial(fp16_switch.on_a_chain, "switch", setting=setting, **switch),
        f"head-{long[0]}-bfloat16": partial(
            heads, *long, bf16, replace(setting, rounds=min(setting.rounds, 2))
        ),
    }


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make(n: int, v: int, d: int, dtype: torch.dtype, device: str) -> Problem:
    """Random tokens and a head, made on the device."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    weight = normal(v, d).mul_(d**-0.5)
    ones = torch.ones(1, n, device=device)
    return Problem(
        normal(1, n, d).requires_grad_(), weight.requires_grad_(),
        torch.randint(v, (1, n), device=device), -math.log(v) * ones,
        torch.randn(1, n, device=device), ones.bool(),
    )


def heads(n: int, v: int, d: int, dtype: torch.dtype, setting: Setting) -> Workload:
    """Times, rates and memory of every head that runs here."""
    workload = Workload(
        "", f"{n} tokens, vocabulary {v}, width {d}, {name(dtype)}, every token counting: loss "
        "with token-TIS weights, gradients of hidden states and weights; iscorrect with all "
        "metrics, the others without. Of the products: the time of the three products over the "
        "time, with a frozen head that of the two that it takes. Memory at the peak beyond "
        "inputs and gradients.",
    )
    problem = make(n, v, d, dtype, setting.device)
    frozen = replace(problem, weight=problem.weight.detach())
    runs: dict[str, Run] = {}
    for end, options in {"": {}, ", compile_kernels": {"compile_kernels": True}}.items():
        runs[f"iscorrect, one pass{end}"] = ours(problem, **options)
        runs[f"iscorrect, two passes{end}"] = two_pass(problem, TOKEN_TIS, **options)
        runs[f"{FROZEN}{end}"] = two_pass(frozen, TOKEN_TIS, **options)
    longer = min(8192, n)
    runs[f"iscorrect, one pass, compile_kernels, chunks of {longer}"] = ours(
        problem, compile_kernels=True, chunk_size=longer
    )
    packages = {}
    for peer, package in {**peers.PACKAGES, **peers.GPU_ONLY}.items():
        packages[peer] = package
        try:
            runs[peer] = theirs(problem, peers.load(peer, setting.device))
        except peers.UnavailableError as why:
            workload.add(peer, package, **{"wall, ms": str(why)})
    memory = {}
    for provider, step in list(runs.items()):
        try:
            step()
            problem.weight.grad = problem.hidden.grad = None
            memory[provider] = extra_memory(step, setting.device)
        except Exception as error:  # whatever a peer raises is what there is to tell
            del runs[provider]
            package = packages.get(provider, "iscorrect")
            workload.add(provider, package, **{"wall, ms": f"fails: {error!r}"[:80]})
        problem.weight.grad = problem.hidden.grad = None
    limit, without = "limit: the products alone", "limit: two products, of a frozen head"
    runs |= {limit: products(problem), without: products(problem, trained=False)}
    times = interleave(runs, setting)
    sizes = [x.numel() * x.element_size() for x in problem.inputs]
    for provider, taken in times.items():
        two = provider.startswith(FROZEN) or provider == without
        values = summary(taken, times[without if two else limit], setting.clock)
        rate = (4 if two else 6) * n * v * d / values["wall, ms"] / 1e9
        made = memory.get(provider, "")
        gradients = sizes[0] if two else sum(sizes)
        held = {"GiB": (made - gradients) / 2**30} if isinstance(made, int) else {}
        workload.add(
            provider, packages.get(provider, "iscorrect" if provider in memory else "torch"),
            **{"wall, ms": values["wall, ms"], "of the products": 1 / values["ratio"],
               "TF/s": rate}, **held,
        )
    return workload


def products(problem: Problem, *, trained: bool = True) -> Run:
    """The products that no exact implementation can do without: three, two with a frozen head."""
    hidden, weight = problem.hidden.detach()[0], problem.weight.detach()
    step = min(4096, len(hidden))
    logits = hidden.new_empty(step, len(weight))

    def run() -> None:
        for start in range(0, len(hidden), step):
            part = hidden[start : start + step]
            torch.mm(part, weight.T, out=logits[: len(part)])
            torch.mm(logits[: len(part)], weight)
            if trained:
                torch.mm(logits[: len(part)].T, part)

    return run


def logits(n: int, v: int, setting: Setting) -> Workload:
    """From logits: forward and backward beside plain torch."""
    workload = Workload(
        "", f"{n} × {v} bfloat16 logits: log-probs of the targets and the gradient of the logits."
    )
    torch.manual_seed(0)
    z = torch.randn(n, v, device=setting.device, dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(v, (n,), device=setting.device)

    def step(log_probs: Callable[[Tensor, Tensor], Tensor]) -> Run:
        def run() -> None:
            z.grad = None
            log_probs(z, target).sum().backward()

        return run

    def plain(z: Tensor, target: Tensor) -> Tensor:
        return z.float().log_softmax(-1).gather(-1, target[:, None])[:, 0]

    runs = {"iscorrect": step(log_probs_from_logits), "log_softmax, gather": step(plain)}
    for provider, taken in interleave(runs, setting).items():
        values = summary(taken, taken, setting.clock)
        workload.add(provider, "torch", **{"wall, ms": values["wall, ms"]})
    return workload


def collectives(setting: Setting) -> Workload:
    """Groups of one rank: whether NCCL takes what is sent."""
    workload = Workload("", "Losses over groups of one rank on one card, with NCCL.")
    mine = not dist.is_initialized()
    with tempfile.TemporaryDirectory() as folder:
        if mine:
            dist.init_process_group(
                "gloo" if setting.small else "nccl", init_method=f"file://{folder}/store",
                rank=0, world_size=1,
            )
        group = dist.group.WORLD
        x = torch.randn(4, 16, device=setting.device)
        mask = torch.ones_like(x, dtype=torch.bool)
        losses = {
            "sequences over ranks": (sequence_tis(), Layout(mask, sequence_group=group)),
            "Pareto over ranks": (pareto_is(), Layout(mask, batch_group=group)),
        }
        for provider, (correction, layout) in losses.items():
            _, metrics = PolicyLoss(correction=correction)(
                x - 3, rollout_log_probs=0.9 * x - 3, advantages=x, mask=layout
            )
            metrics.all_reduced(group).to_floats()
            workload.add(provider, "iscorrect", outcome="runs")
        global_normalizer(mask, group=group, gradients="averaged")
        workload.add("global_normalizer", "iscorrect", outcome="runs")
        if mine:
            dist.destroy_process_group()
    return workload
