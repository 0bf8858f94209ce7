"""The ids that an engine's top-p or top-k kept, as a trainer holds them, as a support."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from iscorrect.errors import describe, input_error
from iscorrect.head.support import Support


def support_of(kept: Sequence[Tensor], offsets: Sequence[Tensor] | None = None) -> Support:
    """Kept ids of all samples, for ``support=`` over their tokens one after the other.

        slime            support_of(rollout_top_p_token_ids, rollout_top_p_token_offsets)
        SkyRL, prime-rl  support_of(rollout_sample_support), support_of(sampling_mask)

    A token without kept ids, which no engine sampled, has log-prob −inf: leave it to the mask.

    Args:
        kept: int, for sample i of t_i tokens: "t_i k" with −1 in unused places; with offsets
            "m_i", the ids of its first token, then of its second, and so on.
        offsets: int "t_i+1" each, rising from 0 to m_i.

    Returns:
        ids and offsets for Σ t_i positions.

    Raises:
        InputError: a sample of another form, or lists of different lengths.

    >>> support_of([torch.tensor([7, 2, 7])], [torch.tensor([0, 2, 3])])
    Support(ids=tensor([7, 2, 7]), offsets=tensor([0, 2, 3]))
    >>> support_of([torch.tensor([[7, 2], [7, -1]])])
    Support(ids=tensor([7, 2, 7]), offsets=tensor([0, 2, 3]))
    """
    if offsets is None:
        for i, x in enumerate(kept):
            if x.ndim != 2:
                raise _refusal(i, x, "t k", "pass offsets= for rows of different lengths")
        used = [x >= 0 for x in kept]
        lengths = [mask.sum(-1) for mask in used]
        ids = [x[mask] for x, mask in zip(kept, used, strict=True)]
    else:
        if len(kept) != len(offsets):
            raise input_error(
                "support_of", "offsets", expected=f"{len(kept)} tensors like `kept`",
                got=str(len(offsets)), fix="pass the offsets of each sample",
            )
        for i, (x, ends) in enumerate(zip(kept, offsets, strict=True)):
            if x.ndim != 1 or not ends.numel() or (int(ends[0]), int(ends[-1])) != (0, len(x)):
                raise _refusal(i, x, "m", "pass offsets that begin at 0 and end at m")
        lengths, ids = [ends.diff() for ends in offsets], list(kept)
    if not kept:
        return Support(torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    counts = torch.cat(lengths).long()
    return Support(torch.cat(ids).long(), torch.nn.functional.pad(counts.cumsum(0), (1, 0)))


def _refusal(i: int, got: Tensor, shape: str, fix: str) -> Exception:
    return input_error(
        "support_of", f"kept[{i}]", expected=f"int `{shape}`", got=describe(got), fix=fix
    )
