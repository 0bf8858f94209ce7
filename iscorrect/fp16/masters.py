"""A trainer whose weights between two steps are what its engine can hold."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from iscorrect.errors import check_number, describe, input_error
from iscorrect.fp16.sending import stochastic_round

REST = "rest"
"""Of a parameter, in its optimiser's state: the master weight less what is computed with."""


def round_after_step(
    optimizer: torch.optim.Optimizer, dtype: torch.dtype, *, seed: int = 0
) -> None:
    """Let a trainer compute with weights in its engine's format, and learn in its own.

        w  →  w + rest  →  step  →  w = stochastic_round(w', dtype),  rest = w' − w

    The step is taken on the masters w + rest, in BF16 to the bit, so no update is lost, and each
    arrives on average as soon as it is made. Between steps w is in ``dtype``: mixed precision or
    autocast of the same dtype, and what sends the weights, change nothing more, so trainer and
    engine hold the same numbers, where :func:`stochastic_round_weights` at the send alone gives
    them to the engine only. It is for trainers in 16 bits whose float32 parameters ``optimizer``
    steps on, as under PyTorch's FSDP and DDP and under autocast; not for Megatron and DeepSpeed,
    which keep masters of their own, nor for LoRA, whose merged weights are rounded anew.

    An entry meets the same draw after every step, and changes once as it passes its own threshold.
    Replicas draw alike. It costs a :func:`stochastic_round` of all weights a step, and memory for
    the rests, as large as the weights, in the optimiser's state. Checkpoints of it hold them (but
    for ``ZeroRedundancyOptimizer``'s); what goes on from one, or from a copy of the optimiser,
    calls this again, and after loading where the checkpoint has none. What saves the model alone
    saves the rounded weights. Weights that are loaded meanwhile are learned on, within a step of
    the grid. Entries that are not finite in ``dtype`` stay as they are.

    Args:
        optimizer: PyTorch's own, of parameters in float32 or wider, sharded or not, that is
            stepped without a closure. Its parameters are rounded from their next gradient on. What
            else hooks into its steps, such as an average of the weights, does so after this.
        dtype: of the engine, which trainers compute in: ``torch.bfloat16`` or ``torch.float16``.
        seed: of the draws, on all ranks the same; another for another optimiser of the model.

    Raises:
        InputError: optimizer, dtype or seed is of another kind; parameters have 16 bits, then or at
            a step; it rounds otherwise already; a step is given a closure.

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
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.bfloat16, torch.float16):
        raise input_error(
            "round_after_step", "dtype", expected="torch.bfloat16 or torch.float16",
            got=repr(dtype), fix="pass the dtype that the engine serves in",
        )
    check_number(
        "round_after_step", "seed", seed, "of the draws", whole=True,
        fix="pass seed as an int, on all ranks the same",
    )
    # Accelerate's wrapper is an Optimizer too, that has no hooks of its own
    known = isinstance(optimizer, torch.optim.Optimizer)
    if not known or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise input_error(
            "round_after_step", "optimizer", expected="a torch.optim.Optimizer",
            got=describe(optimizer),
            fix="pass what a wrapper such as Accelerate's steps on: its .optimizer",
        )
    _check_parameters(optimizer)
    hooks = optimizer._optimizer_step_post_hooks.values()
    before = [x for hook in hooks if isinstance(x := getattr(hook, "__self__", None), _Rounding)]
    if not before:
        rounding = _Rounding(dtype, seed)
        optimizer.register_step_pre_hook(rounding.to_masters)
        optimizer.register_step_post_hook(rounding.to_engine)
    elif (before[0].dtype, before[0].seed) != (dtype, seed):
        raise input_error(
            "round_after_step", "optimizer", expected=f"one that does not round, or to {dtype} "
            f"with seed {seed}", got=f"one that rounds to {before[0].dtype} with seed "
            f"{before[0].seed}", fix="make the optimiser anew",
        )


class _Rounding:
    """The hooks around a step."""

    def __init__(self, dtype: torch.dtype, seed: int):
        self.dtype, self.seed = dtype, seed
        self.stepped: set[nn.Parameter] = set()

    @torch.no_grad()
    def to_masters(
        self, optimizer: torch.optim.Optimizer, args: tuple[object, ...],
        kwargs: Mapping[str, object],
    ) -> None:
        if any(x is not None for x in (*args[1:], kwargs.get("closure"))):
            raise input_error(
                "round_after_step", "closure", expected="a step without one",
                got="one, which would be evaluated at weights that the engine does not have",
                fix="compute the gradients before optimizer.step()",
            )
        _check_parameters(optimizer)
        self.stepped.clear()
        for w in _parameters(optimizer).values():
            rest = optimizer.state[w].pop(REST, None) if w in optimizer.state else None
            if isinstance(rest, Tensor):
                self.stepped.add(w)
                _local(w).add_(_rest_of(_local(w), _local(rest), self.dtype))
            # a step without gradients, by which PyTorch makes room for a checkpoint, rounds nothing
            elif w.grad is not None and _local(w.grad).any():
                self.stepped.add(w)

    @torch.no_grad()
    def to_engine(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for place, w in _parameters(optimizer).items():
            # optimisers take a state that is not empty for their own, so theirs has to come first
            if w.grad is None and w not in self.stepped:
                continue
            rest = w.detach().clone()
            kept, held = _local(rest), _local(w.detach())
            if w in self.stepped:
                draws = zlib.crc32(f"{self.seed} {place} {_shard(w)}".encode())
                generator = torch.Generator(kept.device).manual_seed(draws)
                sent = stochastic_round(kept, self.dtype, generator=generator).to(kept.dtype)
                held.copy_(sent.where(sent.isfinite(), kept))
            kept.sub_(held)
            optimizer.state[w][REST] = rest
        self.stepped.clear()


def _rest_of(w: Tensor, rest: Tensor, dtype: torch.dtype) -> Tensor:
    """The rest where it is one of w, less than a step of the grid; 0 where w is of elsewhere."""
    grid = torch.finfo(dtype)
    return rest.where(rest.abs() <= w.abs().clamp(min=grid.tiny) * grid.eps, 0)


def _check_parameters(optimizer: torch.optim.Optimizer) -> None:
    for w in _parameters(optimizer).values():
        if not w.is_floating_point() or w.element_size() < 4:
            raise input_error(
                "round_after_step", "optimizer", expected="parameters of float32 or wider",
                got=describe(w),
                fix="load the model in float32, and let mixed precision or autocast compute in "
                "16 bits",
            )


def _parameters(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """By their places in the optimiser, which are the same on all ranks."""
    return {
        f"{g} {i}": w
        for g, group in enumerate(optimizer.param_groups) for i, w in enumerate(group["params"])
    }


def _local(x: Tensor) -> Tensor:
    """What this rank holds of x."""
    return x.to_local() if hasattr(x, "to_local") else x


def _shard(w: Tensor) -> list[int]:
    """Where this rank's part of a DTensor lies, the same for all that hold copies of it."""
    if not hasattr(w, "device_mesh"):
        return []
    here, placements = w.device_mesh.get_coordinate(), getattr(w, "placements", ())
    return [x for x, place in zip(here or (), placements, strict=False) if place.is_shard()]
