"""A trainer whose weights between two steps are what its engine can hold."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from iscorrect.errors import check_number, describe, input_error
from iscorrect.fp16.arrival import check_scaling
from iscorrect.fp16.sending import stochastic_round

REST = "rest"
"""Of a parameter, in its optimiser's state: the master weight less what is computed with."""


def round_after_step(
    optimizer: torch.optim.Optimizer, dtype: torch.dtype, *, seed: int = 0
) -> None:
    """Let a trainer compute with weights in its engine's format, and learn in its own.

        w  →  w + rest  →  step  →  w = stochastic_round(w', dtype),  rest = w' − w

    The step is taken on the masters w + rest, so no update is lost, and arrives on average as soon
    as it is made. Between steps w is in ``dtype``, to the bit: mixed precision, autocast, and what
    sends the weights change nothing more, so trainer and engine hold the same numbers, where
    :func:`stochastic_round_weights` at the send alone gives them to the engine only. It is for
    trainers that compute in 16 bits beside float32 masters that ``optimizer`` steps on: PyTorch's
    FSDP and DDP, autocast. Megatron and DeepSpeed keep the masters themselves.

    An entry meets the same draw after every step, and changes once as it passes its own threshold.
    Replicas draw alike. The rests are as large as the weights, and lie in the optimiser's state:
    its checkpoints hold them, and a run that goes on from one calls this again. What saves the
    model alone saves the rounded weights. Entries that are not finite in ``dtype`` stay as they
    are.

    Args:
        optimizer: PyTorch's own, of parameters in float32 or wider, sharded or not; before its
            next step. Its parameters are rounded from their next gradient on.
        dtype: of the engine: 16-bit or FP8.
        seed: of the draws, on all ranks the same.

    Raises:
        InputError: optimizer, dtype or seed is of another kind; parameters have 16 bits.

    References:
        Micikevicius et al., arXiv 1710.03740: master weights. Gupta et al., arXiv 1502.02551:
        stochastic rounding in training.

    >>> w = torch.nn.Parameter(torch.ones(1000))
    >>> optimizer = torch.optim.SGD([w], lr=2**-10)  # an eighth of a step of BF16's grid
    >>> round_after_step(optimizer, torch.bfloat16)
    >>> w.grad = -torch.ones(1000)
    >>> for _ in range(8):
    ...     optimizer.step()
    >>> (w.bfloat16() == w).all().item(), (w + optimizer.state[w]["rest"] == 1 + 2**-7).all().item()
    (True, True)
    """
    check_scaling("round_after_step", dtype, "none")
    check_number(
        "round_after_step", "seed", seed, "of the draws", whole=True,
        fix="pass seed as an int, on all ranks the same",
    )
    known = isinstance(optimizer, torch.optim.Optimizer)
    if not known or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise input_error(
            "round_after_step", "optimizer", expected="a torch.optim.Optimizer",
            got=describe(optimizer),
            fix="pass what a wrapper such as Accelerate's steps on: its .optimizer",
        )
    for w in _parameters(optimizer).values():
        if not w.is_floating_point() or w.element_size() < 4:
            raise input_error(
                "round_after_step", "optimizer", expected="parameters of float32 or wider",
                got=describe(w),
                fix="load the model in float32, and let mixed precision or autocast compute in "
                "16 bits",
            )

    @torch.no_grad()
    def to_masters(stepping: torch.optim.Optimizer, *_: object) -> None:
        for w in _parameters(stepping).values():
            if w.grad is not None and REST in stepping.state.get(w, ()):
                w.add_(stepping.state[w].pop(REST))

    @torch.no_grad()
    def to_engine(stepped: torch.optim.Optimizer, *_: object) -> None:
        for place, w in _parameters(stepped).items():
            # optimisers take a state that is not empty for their own, so theirs has to come first
            if w.grad is None or REST in stepped.state[w]:
                continue
            rest = w.detach().clone()
            draws = zlib.crc32(f"{seed} {place}".encode())
            kept, held = _local(rest), _local(w.detach())
            generator = torch.Generator(kept.device).manual_seed(draws)
            sent = stochastic_round(kept, dtype, generator=generator).to(kept.dtype)
            held.copy_(sent.where(sent.isfinite(), kept))
            kept.sub_(held)
            stepped.state[w][REST] = rest

    optimizer.register_step_pre_hook(to_masters)
    optimizer.register_step_post_hook(to_engine)


def _parameters(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """By their places in the optimiser, which are the same on all ranks."""
    return {
        f"{g} {i}": w
        for g, group in enumerate(optimizer.param_groups) for i, w in enumerate(group["params"])
    }


def _local(x: Tensor) -> Tensor:
    """What this rank holds of x."""
    return x.to_local() if hasattr(x, "to_local") else x
