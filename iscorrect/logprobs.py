"""Per-token log-probs from logits, over the whole vocabulary or over what the sampler kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from iscorrect.errors import describe, input_error


class Support(NamedTuple):
    """The token ids that the sampler kept at each position, as rows of different lengths (CSR).

    Attributes:
        ids: int "m", kept ids of position 0, then of position 1, and so on.
        offsets: int "n+1", rising from 0 to m; position i kept ids[offsets[i]:offsets[i+1]].
            Positions are those of the target, flattened.
    """

    ids: Tensor
    offsets: Tensor


def log_probs_from_logits(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    support: Tensor | Support | None = None,
) -> Tensor:
    """Log-prob of each target token.

        log π(y) = z_y/τ − log Σ_{v ∈ S} exp(z_v/τ)

    With top-p, top-k or min-p sampling and processed log-probs, the engine reports probabilities
    renormalised over the set S that it kept. A trainer that normalises over the whole vocabulary
    then sees every ratio too small by the kept mass; passing S removes that bias.

    Args:
        logits: "... v".
        target: int "...", in [0, v).
        temperature: τ > 0, the sampler's.
        support: S, the kept ids: int "... k" with −1 for unused places, or a :class:`Support`.
            None: the whole vocabulary.

    Returns:
        "...", nats, float32 or wider. −inf where the target is not in its support.

    Raises:
        InputError: shapes differ, the target is not an integer, or the temperature is not positive.

    >>> log_probs_from_logits(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor([-1.3863, -1.3863])
    >>> log_probs_from_logits(torch.zeros(1, 4), torch.tensor([3]), support=torch.tensor([[3, 1]]))
    tensor([-0.6931])
    """
    _check(logits, target, temperature)
    wide = torch.promote_types(logits.dtype, torch.float32)
    index = rearrange(target, "... -> ... 1")
    chosen = rearrange(logits.gather(-1, index), "... 1 -> ...").to(wide) / temperature
    if support is None:
        return chosen - torch.logsumexp(logits.to(wide) / temperature, dim=-1)
    if isinstance(support, Support):
        normalizer, member = _over_rows(logits, target, support, wide, temperature)
    else:
        normalizer, member = _over_padded(logits, target, support, wide, temperature)
    return torch.where(member, chosen - normalizer, -torch.inf)


def _over_padded(
    logits: Tensor, target: Tensor, support: Tensor, wide: torch.dtype, temperature: float
) -> tuple[Tensor, Tensor]:
    if support.is_floating_point() or support.shape[:-1] != target.shape:
        raise input_error(
            "log_probs_from_logits", "support",
            expected=f"int {(*target.shape, 'k')}, −1 in unused places", got=describe(support),
            fix="pad the kept ids of each position with −1, or pass Support(ids, offsets)",
        )
    kept = logits.gather(-1, support.clamp(min=0)).to(wide) / temperature
    kept = torch.where(support >= 0, kept, -torch.inf)
    member = (support == rearrange(target, "... -> ... 1")).any(-1)
    # a position without any kept id has no finite normaliser, nor a gradient
    kept = torch.where(rearrange(member, "... -> ... 1"), kept, 0)
    return torch.logsumexp(kept, dim=-1), member


def _over_rows(
    logits: Tensor, target: Tensor, support: Support, wide: torch.dtype, temperature: float
) -> tuple[Tensor, Tensor]:
    ids, offsets = support
    if offsets.shape != (target.numel() + 1,) or ids.ndim != 1:
        raise input_error(
            "log_probs_from_logits", "support",
            expected=f"ids `m` and offsets `{target.numel() + 1}`",
            got=f"ids {describe(ids)}, offsets {describe(offsets)}",
            fix="give one more offset than there are target positions",
        )
    positions = torch.arange(target.numel(), device=ids.device)
    position = positions.repeat_interleave(offsets.diff(), output_size=ids.numel())
    flat = logits.reshape(-1, logits.shape[-1])
    kept = flat[position, ids].to(wide) / temperature
    with torch.no_grad():
        lowest = kept.new_full((target.numel(),), -torch.inf)
        largest = lowest.scatter_reduce(0, position, kept, "amax")
        largest = torch.where(largest.isfinite(), largest, 0)
    total = kept.new_zeros(target.numel()).scatter_add(
        0, position, (kept - largest[position]).exp()
    )
    hit = (ids == target.flatten()[position]).to(wide)
    member = kept.new_zeros(target.numel()).scatter_add(0, position, hit) > 0
    normalizer = torch.where(member, total, 1).log() + largest
    return normalizer.view(target.shape), member.view(target.shape)


def _check(logits: Tensor, target: Tensor, temperature: float) -> None:
    if not logits.is_floating_point() or logits.ndim == 0:
        raise input_error(
            "log_probs_from_logits", "logits", expected="a floating-point tensor `... v`",
            got=describe(logits), fix="pass the model's logits",
        )
    if target.is_floating_point() or target.dtype == torch.bool:
        raise input_error(
            "log_probs_from_logits", "target", expected="an integer tensor `...`",
            got=describe(target), fix="pass token ids",
        )
    if target.shape != logits.shape[:-1]:
        hint = "pass one token id per position of the logits"
        if target.ndim == logits.ndim - 1 and target.shape[-1] == logits.shape[-2] + 1:
            hint = "logits at t predict token t + 1: pass target[..., 1:]"
        raise input_error(
            "log_probs_from_logits", "target", expected=f"of shape {tuple(logits.shape[:-1])}",
            got=describe(target), fix=hint,
        )
    if not temperature > 0:
        raise input_error(
            "log_probs_from_logits", "temperature", expected="a number > 0", got=repr(temperature),
            fix="pass the sampler's temperature; greedy decoding has no log-probs to correct",
        )
