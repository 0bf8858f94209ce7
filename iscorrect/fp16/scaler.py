"""Dynamic loss scaling for FP16 training."""

from __future__ import annotations

import torch
import torch.distributed as dist

from iscorrect.errors import check_number, input_error


def fp16_scaler(
    device: str | torch.device = "cuda", *, scale: float = 2.0**16, growth_interval: int = 400,
    process_group: dist.ProcessGroup | None = None,
) -> torch.amp.GradScaler:
    """Dynamic loss scaling as the FP16 runs of reinforcement learning had it.

    A step whose gradients are not finite is skipped and the scale halved; after
    ``growth_interval`` steps without one it doubles. Use with

    * weights and gradients in float32 and FP16 in the computation only (autocast, or FSDP's
      mixed-precision policy with ``param_dtype=torch.float16, reduce_dtype=torch.float32``): the
      scaler refuses FP16 gradients;
    * ``AdamW(eps=1e-15)``: gradients are divided by the scale before the step, and the default eps
      of 1e-8 would outweigh the small ones;
    * ``scaler.unscale_(optimizer)`` before clipping the norm of the gradient.

    Args:
        device: of the gradients.
        scale: the first one.
        growth_interval: steps; torch's own default is 2000.
        process_group: the ranks of FSDP1, whose gradients are plain shards: all of them skip a
            step that one must skip. DDP and FSDP2 (DTensor) need no group, for their
            gradients are reduced, or say of themselves on which ranks they lie.

    Returns:
        torch's own scaler.

    Raises:
        InputError: a scale that is not above 0; CUDA is not there, where torch would switch scaling
            off.

    References:
        Qi et al., arXiv 2510.26788: the growth interval of 400 and the eps of 1e-15.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.AdamW([weight], eps=1e-15)
    >>> scaler = fp16_scaler("cpu", scale=1024.0)
    >>> scaler.scale(weight.sum() * torch.inf).backward()
    >>> _ = scaler.step(optimizer); scaler.update()
    >>> weight.tolist(), scaler.get_scale()
    ([1.0, 1.0], 512.0)
    """
    check_number("fp16_scaler", "scale", scale, "what losses are multiplied by", above=0)
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise input_error(
            "fp16_scaler", "device", expected="a torch device", got=repr(device),
            fix="pass device='cuda', or 'cpu'",
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise input_error(
            "fp16_scaler", "device", expected="one that is there", got=f"{device} without CUDA",
            fix="pass device='cpu', or install torch with CUDA",
        )
    if process_group is None:
        return torch.amp.GradScaler(kind, init_scale=scale, growth_interval=growth_interval)
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    return ShardedGradScaler(
        kind, init_scale=scale, growth_interval=growth_interval, process_group=process_group
    )
