"""Log-probs and samples of several answers to one prompt, which is computed once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from iscorrect import linear_log_probs


class Answers(NamedTuple):
    """Answers of a group of prompts.

    Attributes:
        prompts: "g p", of one length.
        token_ids: "g n t": n answers to each prompt; anything after the end.
        mask: bool "g n t".
        log_probs: "g n t", as the sampler had them; anything outside the mask.
    """

    prompts: Tensor
    token_ids: Tensor
    mask: Tensor
    log_probs: Tensor


def log_probs(
    model: PreTrainedModel, prompts: Tensor, token_ids: Tensor,
    head_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log-probs "g n t" of answers to prompts "g p".

    A row holds a prompt and all answers to it; each answer sees the prompt and itself, at the
    positions that it would have alone.
    """
    g, n, t = token_ids.shape
    p = prompts.shape[1]
    answer = torch.arange(n).repeat_interleave(t)
    whose = torch.cat([torch.full((p,), -1), answer])  # -1: the prompt, which all see
    place = torch.cat([torch.arange(p), p + torch.arange(t).repeat(n)])
    sees = ((whose[:, None] == whose) | (whose == -1)) & (place[:, None] >= place)
    forbidden = torch.finfo(model.dtype).min
    mask = torch.where(sees, 0.0, forbidden).to(model.dtype)[None, None]
    hidden = model.model(
        torch.cat([prompts, token_ids.reshape(g, -1)], 1), attention_mask=mask.expand(g, 1, -1, -1),
        position_ids=place.expand(g, -1), use_cache=False,
    ).last_hidden_state
    last = hidden[:, p - 1 : p, None].expand(g, n, 1, hidden.shape[-1]).reshape(g, n, 1, -1)
    own = hidden[:, p:].reshape(g, n, t, -1)[:, :, :-1]
    hidden = torch.cat([last, own], 2).flatten(0, 1)
    found = linear_log_probs(
        hidden.to(head_dtype), model.lm_head.weight.to(head_dtype), token_ids.flatten(0, 1),
        head_dtype=head_dtype,
    )
    return found.reshape(g, n, t)


@torch.no_grad()
def sample(
    model: PreTrainedModel, prompts: Tensor, n: int, longest: int, end: int, *, greedy: int = 0
) -> Answers:
    """n answers to each of the prompts "g p", from the whole vocabulary at temperature 1.

    The first ``greedy`` of the n are the likeliest token by token. What all prompts begin with is
    computed once.
    """
    g, p = prompts.shape
    differ = (prompts != prompts[0]).any(0).nonzero()
    shared = min(int(differ[0]) if len(differ) else p - 1, p - 1)
    cache = None
    if shared:
        cache = model(prompts[:1, :shared], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(g)
    out = model(
        prompts[:, shared:], past_key_values=cache, use_cache=True, logits_to_keep=1,
        position_ids=torch.arange(shared, p).expand(g, -1),
    )
    cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(n, 0)
    cache.batch_repeat_interleave(n)
    likeliest = (torch.arange(n) < greedy).repeat(g)
    ids, found, masks = [], [], []
    alive = torch.ones(g * n, dtype=torch.bool)
    for i in range(longest):
        every = logits.float().log_softmax(-1)
        drawn = torch.multinomial(every.exp(), 1)[:, 0].where(~likeliest, every.argmax(-1))
        ids.append(drawn)
        found.append(every.gather(-1, drawn[:, None])[:, 0])
        masks.append(alive)
        alive = alive & (drawn != end)
        if not alive.any() or i == longest - 1:
            break
        logits = model(
            drawn[:, None], past_key_values=cache, use_cache=True,
            position_ids=torch.full((g * n, 1), p + i),
        ).logits[:, -1]
    token_ids, log_probs, mask = (torch.stack(x, 1).reshape(g, n, -1) for x in (ids, found, masks))
    return Answers(prompts, token_ids, mask, log_probs)
