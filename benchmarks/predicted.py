"""What an H100 should take, from the bytes and products of a rehearsal; nothing here is measured.

The rehearsal (tests/rehearsal) takes the way of a GPU at 1/64 of each size, in the proportions of
training, and counts. Two rates turn counts into times: that of products and that of memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.harness import Setting, Workload
from benchmarks.linear import TOKEN_TIS, Problem, forget, ours, theirs
from benchmarks.peers import materialised
from benchmarks.report import ROOT
from iscorrect.gradients import scaled
from iscorrect.head import block, onepass, reader
from iscorrect.head.block import Kernels
from iscorrect.head.linear import linear_log_probs

if TYPE_CHECKING:
    from rehearsal.ledger import Ledger

SCALE = 64
V, D, ROWS, CHUNK = 151_936, 4096, 16_384, 4096
PRODUCTS, MEMORY = 728e12, 2.8e12
"""Operations and bytes a second: what was published for an H100 at 8192 tokens (TRL issue 7244),
three products in 42 ms and a materialising head in 59."""


def run(setting: Setting) -> Iterator[Workload]:
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    for tokens in (8192, 32_768):
        yield predict(tokens)


def predict(tokens: int) -> Workload:
    workload = Workload(
        f"predicted-{tokens}",
        f"Predicted, not measured: {tokens} tokens, vocabulary {V}, width {D}, bfloat16, every "
        "token counting, on an H100. Bytes per logit: of all that is no product, and of products "
        "beyond those of as many with bfloat16 results; counted at 1/64 of the sizes. The shorter "
        "time is right if products hide their own bytes, the longer if they do not. "
        f"{PRODUCTS / 1e12:.0f} TF/s, {MEMORY / 1e12} TB/s. Counted on:",
    )
    n, v, d = tokens // SCALE, V // SCALE, D // SCALE
    for provider, step in routes(n, v, d).items():
        ledger = rehearsed(step)
        beside, inside, products = count(ledger, n, v, d)
        logits = tokens * V
        bare = 2 * products * logits * D / PRODUCTS
        least, most = (bare + x * logits / MEMORY for x in (beside, beside + inside))
        best = 6 * logits * D / PRODUCTS
        workload.add(
            provider, **{
                "products": products, "bytes beside": beside, "bytes in products": inside,
                "ms": f"{1e3 * least:.0f}–{1e3 * most:.0f}",
                "of three products, %": f"{100 * best / most:.0f}–{100 * best / least:.0f}",
                "kernels": f"{len(ledger.kernels):,}",
                "waits of the host": str(ledger.waits.total()),
            },
        )
    return workload


def routes(n: int, v: int, d: int) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, n, d, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(v, d, generator=generator) / d**0.5).bfloat16().requires_grad_()
    problem = Problem(
        hidden, weight, torch.randint(v, (1, n), generator=generator), torch.full((1, n), -7.8),
        torch.randn(1, n, generator=generator), torch.ones(1, n, dtype=torch.bool),
    )

    def two_passes(weight: Tensor, **options: bool) -> Callable[[], object]:
        def step() -> None:
            forget(problem)
            log_probs = linear_log_probs(hidden, weight, problem.target, **options)
            loss, _ = TOKEN_TIS(
                log_probs, rollout_log_probs=problem.rollout_log_probs,
                advantages=problem.advantages, mask=problem.mask,
            )
            loss.backward()

        return step

    fused = {"compile_kernels": True}
    return {
        "materialised": theirs(problem, materialised, padded=True),
        "iscorrect, one pass": ours(problem),
        "iscorrect, one pass, compile_kernels": ours(problem, **fused),
        "iscorrect, two passes": two_passes(weight),
        "iscorrect, two passes, compile_kernels": two_passes(weight, **fused),
        "iscorrect, frozen head": two_passes(weight.detach()),
        "iscorrect, frozen head, compile_kernels": two_passes(weight.detach(), **fused),
    }


def rehearsed(step: Callable[[], object]) -> Ledger:
    """What a step costs a GPU, in chunks and blocks of the proportions of training."""
    from rehearsal import Rehearsal

    values = {
        (reader, "GPU_ROWS"): ROWS // SCALE, (reader, "GPU_TOKENS"): CHUNK // SCALE,
        (onepass, "GPU_TOKENS"): CHUNK // SCALE, (block, "compiled"): lambda _: ONE_KERNEL_EACH,
    }
    with ExitStack() as patched:
        for (module, name), value in values.items():
            patched.enter_context(patch.object(module, name, value))
        gpu = patched.enter_context(Rehearsal())
        step()
    ledger: Ledger = gpu.ledger
    return ledger


def count(ledger: Ledger, n: int, v: int, d: int) -> tuple[float, float, float]:
    """Bytes per logit beside products and in them, and how many products of all logits."""
    logits = n * v
    products = sum(k.multiplications for k in ledger.products) / (logits * d)
    plain = 2 * products * (logits + n * d + v * d)
    # what is per token and block weighs 64 times as much here as at full size
    large = [k.bytes for k in ledger.others if k.bytes > 32 * CHUNK // SCALE]
    inside = sum(k.bytes for k in ledger.products) - plain
    return sum(large) / logits, max(0.0, inside) / logits, products


@torch.library.custom_op("rehearsal::total", mutates_args=())
def _total(z: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """What ``python -m benchmarks kernels`` shows: one kernel that reads the logits."""
    largest = torch.maximum(largest, z.amax(1))
    return largest, (z - largest[:, None]).exp().sum(1)


@torch.library.custom_op("rehearsal::derivative", mutates_args=())
def _derivative(z: Tensor, reference: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """And one that reads them again, and writes 16 bits."""
    return ((z - reference[:, None]).exp() * factor[:, None]).to(dtype)


ONE_KERNEL_EACH = Kernels(
    lambda z, largest, axis: _total(z, largest),
    lambda z, reference, factor, axis, out: _derivative(z, reference, factor, out.dtype),
    scaled, exponentials=False,
)
