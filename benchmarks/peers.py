"""Log-probs from hidden states as other packages compute them, imported and called as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import installed

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden "n d", weight "v d", target "n") -> log-probs "n", differentiable in the first two."""

PACKAGES = {
    "materialised": "torch",
    "materialised, float32 head": "torch",
    "F.linear_cross_entropy": "torch",
    "F.linear_cross_entropy, chunks of 256": "torch",
    "F.linear_cross_entropy, accurate": "torch",
    "TRL, chunked": "trl",
    "Liger, chunked": "liger-kernel",
    "verl, fused linear": "verl",
    "Apple CCE, torch.compile": "cut-cross-entropy",
    "Apple CCE, Triton": "cut-cross-entropy",
    "prime-rl, fused linear": "prime-rl",
}

GPU_ONLY = {
    "Liger, scaled cross-entropy": "liger-kernel",
    "unsloth-zoo, chunked": "unsloth-zoo",
    "QuACK, sum of cross-entropies": "quack-kernels",
}
"""More that need a GPU; QuACK's has no weights of tokens, and its sum stands for each token."""

BOUNDED = (
    "F.linear_cross_entropy, chunks of 256", "F.linear_cross_entropy, accurate", "TRL, chunked",
    "Liger, chunked", "verl, fused linear", "prime-rl, fused linear",
)
"""Those whose memory does not grow with tokens × vocabulary."""


class UnavailableError(Exception):
    """Why a peer cannot run here, in words for a table."""


def load(name: str, device: str) -> LogProbs:
    """A peer, or :class:`UnavailableError`."""
    if ("Triton" in name or name in GPU_ONLY) and device != "cuda":
        raise UnavailableError("needs a GPU")
    try:
        return LOADERS[name]()
    except ModuleNotFoundError as error:
        if installed((PACKAGES | GPU_ONLY)[name]):
            raise UnavailableError(f"needs {error.name}") from error
        raise UnavailableError("not installed") from error
    except ImportError as error:
        raise UnavailableError(str(error)) from error
    except Exception as error:  # some look for their device, or for each other, on import
        raise UnavailableError(f"{type(error).__name__} on import") from error


def materialised(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = functional.linear(hidden, weight).float()
    return logits.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)


def materialised_float32(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return materialised(hidden.float(), weight.float(), target)


def _torch(**options: object) -> LogProbs:
    if not hasattr(functional, "linear_cross_entropy"):
        raise ImportError("torch.nn.functional.linear_cross_entropy comes with torch 2.13")
    made = torch.nn.LinearCrossEntropyOptions(**options) if options else None

    def log_probs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -functional.linear_cross_entropy(
            hidden, weight, target, reduction="none", options=made
        )

    return log_probs


def _trl() -> LogProbs:
    from trl.kernels import ChunkedLogProbFunction

    def log_probs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        options = (1.0, 32768 if hidden.is_cuda else 2048, None, 1.0, ())
        return ChunkedLogProbFunction.apply(hidden, weight, None, target, *options)[0]

    return log_probs


def _liger() -> LogProbs:
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

    def log_probs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return _ChunkedSelectiveLogProbFunction.apply(hidden, weight, target, None, 1.0, 4096)

    return log_probs


def _verl() -> LogProbs:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    module = FusedLinearForPPO()
    return lambda hidden, weight, target: module(hidden, weight, target)[0]


def _cce(impl: str) -> LogProbs:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, target: -linear_cross_entropy(
        hidden, weight, target, reduction="none", impl=impl
    )


def _prime_rl() -> LogProbs:
    from prime_rl.trainer.models.layers.lm_head import FusedOutputLinear

    def log_probs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        head = FusedOutputLinear(weight.shape[1], weight.shape[0], chunk_size=2048)
        head.weight = torch.nn.Parameter(weight)
        return head(hidden[None], target[None], temperature=1.0)["logprobs"][0]

    return log_probs


def _liger_scaled() -> LogProbs:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    return lambda hidden, weight, target: -Function.apply(hidden, weight, target)


def _unsloth() -> LogProbs:
    from unsloth_zoo.rl_replacements import chunked_hidden_states_selective_log_softmax as chunked

    return lambda hidden, weight, target: chunked(hidden[None], weight, target[None])[0]


def _quack() -> LogProbs:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def log_probs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -chunked_linear_cross_entropy(hidden, weight, target, reduction="sum").expand(
            len(target)
        )

    return log_probs


LOADERS: dict[str, Callable[[], LogProbs]] = {
    "materialised": lambda: materialised,
    "materialised, float32 head": lambda: materialised_float32,
    "F.linear_cross_entropy": _torch,
    "F.linear_cross_entropy, chunks of 256": partial(
        _torch, batch_chunk_size=256, chunking_method=None, acc_policy="compact"
    ),
    "F.linear_cross_entropy, accurate": partial(
        _torch, batch_chunk_size=256, chunking_method=None, acc_policy="accurate",
        acc_dtype=torch.float32,
    ),
    "TRL, chunked": _trl,
    "Liger, chunked": _liger,
    "verl, fused linear": _verl,
    "Apple CCE, torch.compile": partial(_cce, "torch_compile"),
    "Apple CCE, Triton": partial(_cce, "cce"),
    "prime-rl, fused linear": _prime_rl,
    "Liger, scaled cross-entropy": _liger_scaled,
    "unsloth-zoo, chunked": _unsloth,
    "QuACK, sum of cross-entropies": _quack,
}
