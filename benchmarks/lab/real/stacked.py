"""The model with the weights of several runs at once, so that a GPU is not left idle by one.

Every weight has a dimension of runs, "r …", and so has everything that is computed; run i sees the
weights i alone. Written out, since neither transformers nor an engine does this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import PretrainedConfig

from benchmarks.lab.real.packed import Answers
from benchmarks.lab.real.senders import EMBEDDING

LAYERS = "model.layers."


class Config(NamedTuple):
    """Of a Llama whose head is its embedding.

    Attributes:
        layers: of the model.
        heads: of queries in a layer.
        shared: heads of keys and values.
        epsilon: of the norms.
        theta: of the rotations.
    """

    layers: int
    heads: int
    shared: int
    epsilon: float
    theta: float

    @classmethod
    def of(cls, config: PretrainedConfig) -> Config:
        assert config.tie_word_embeddings and config.model_type == "llama"
        return cls(config.num_hidden_layers, config.num_attention_heads,
                   config.num_key_value_heads, config.rms_norm_eps,
                   config.rope_parameters["rope_theta"])


class Model(NamedTuple):
    """Several runs' weights, and how they are put together.

    Attributes:
        config: of all of them.
        embedding: "r v d".
        layers: of each, its weights by the names that they have within it.
        norm: "r d".
        head: "r v d"; in the embedding's dtype, or a wider one.
    """

    config: Config
    embedding: Tensor
    layers: list[dict[str, Tensor]]
    norm: Tensor
    head: Tensor

    @classmethod
    def of(cls, config: Config, weights: Mapping[str, Tensor], head: Tensor | None = None) -> Model:
        """From weights "r …" by transformers' names; without a head it is the embedding."""
        layers: list[dict[str, Tensor]] = [{} for _ in range(config.layers)]
        for name, w in weights.items():
            if name.startswith(LAYERS):
                i, _, within = name.removeprefix(LAYERS).partition(".")
                layers[int(i)][within] = w
        embedding = weights[EMBEDDING]
        return cls(config, embedding, layers, weights["model.norm.weight"],
                   embedding if head is None else head)


class Cache:
    """Keys and values of every layer, "r b k s d", as far as they are known."""

    def __init__(self, longest: int):
        self.longest = longest
        self.filled = 0
        self._layers: list[tuple[Tensor, Tensor]] = []

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Everything up to these. Whoever has extended all layers moves ``filled``."""
        if len(self._layers) == layer:
            shape = *k.shape[:3], self.longest, k.shape[4]
            self._layers.append((k.new_empty(shape), k.new_empty(shape)))
        end = self.filled + k.shape[3]
        for store, new in zip(self._layers[layer], (k, v), strict=True):
            store[..., self.filled : end, :] = new
        keys, values = self._layers[layer]
        return keys[..., :end, :], values[..., :end, :]

    def repeat(self, n: int) -> None:
        """Every row n times, one after the other."""
        self._layers = [
            (k.repeat_interleave(n, 1), v.repeat_interleave(n, 1)) for k, v in self._layers
        ]


def hidden_states(
    model: Model, ids: Tensor, place: Tensor, sees: Tensor, cache: Cache | None = None
) -> Tensor:
    """Hidden states "r b t d" behind the last norm.

    Args:
        model: in the dtype that is computed in.
        ids: "r b t".
        place: "b t", or "1 t" for all: the position of each token.
        sees: bool "b t s", or "1 t s" for all: what each token attends to, of what the cache holds
            and of these.
        cache: of what stands before; these are added.
    """
    runs = torch.arange(len(ids), device=ids.device)[:, None, None]
    x = model.embedding[runs, ids]
    turn = rotation(model, place, x.dtype)
    mask = sees[:, None] if len(sees) == 1 else sees.repeat(len(ids), 1, 1)[:, None]
    for i, layer in enumerate(model.layers):
        normed = rms_norm(x, layer["input_layernorm.weight"], model.config.epsilon)
        x = x + attention(model.config, layer, normed, turn, mask, cache, i)
        normed = rms_norm(x, layer["post_attention_layernorm.weight"], model.config.epsilon)
        gate, up = (linear(normed, layer[f"mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        x = x + linear(silu(gate) * up, layer["mlp.down_proj.weight"])
    if cache is not None:
        cache.filled += ids.shape[2]
    return rms_norm(x, model.norm, model.config.epsilon)


def attention(
    config: Config, layer: Mapping[str, Tensor], x: Tensor, turn: tuple[Tensor, Tensor],
    mask: Tensor, cache: Cache | None, i: int,
) -> Tensor:
    q, k, v = (
        rearrange(linear(x, layer[f"self_attn.{name}_proj.weight"]),
                  "r b t (h d) -> r b h t d", h=heads)
        for name, heads in (("q", config.heads), ("k", config.shared), ("v", config.shared))
    )
    q, k = rotated(q, turn), rotated(k, turn)
    if cache is not None:
        k, v = cache.extend(i, k, v)
    k, v = (y.repeat_interleave(config.heads // config.shared, 2) for y in (k, v))
    found = scaled_dot_product_attention(*(y.flatten(0, 1) for y in (q, k, v)), attn_mask=mask)
    found = rearrange(found, "(r b) h t d -> r b t (h d)", r=len(x))
    return linear(found, layer["self_attn.o_proj.weight"])


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Of "r b t i" and "r o i"."""
    return torch.bmm(x.flatten(1, 2), weight.mT).unflatten(1, x.shape[1:3])


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight[:, None, None] * scaled.to(x.dtype)


def rotation(model: Model, place: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines "b 1 t d" of positions "b t"."""
    width = model.layers[0]["self_attn.q_proj.weight"].shape[1] // model.config.heads
    share = torch.arange(0, width, 2, device=place.device).float() / width
    angle = (place[..., None].float() / model.config.theta**share).repeat(1, 1, 2)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * turn[0] + torch.cat([-high, low], -1) * turn[1]


def logits(hidden: Tensor, head: Tensor) -> Tensor:
    """float32 "r n v" of hidden states "r n d", rounded to what the head "r v d" is held in."""
    return torch.bmm(hidden.to(head.dtype), head.mT).float()


@torch.no_grad()
def sample(
    model: Model, prompts: Tensor, n: int, longest: int, end: int,
    generators: Sequence[torch.Generator], *, greedy: int = 0, known: Tensor | None = None,
) -> Answers:
    """n answers to each prompt of each run, from the whole vocabulary at temperature 1.

    They have a dimension of runs before those that one run's have: prompts "r g p", and "r g n t".

    Args:
        model: what samples.
        prompts: "r g p".
        n: answers to each.
        longest: answer.
        end: the token after which an answer is over.
        generators: of the draws, on the device: one a run, or for equal shares of its prompts.
        greedy: so many of the n are the likeliest token by token.
        known: bool "g p", False where a prompt is padded on its left.
    """
    r, g, p = prompts.shape
    device = prompts.device
    known = torch.ones(g, p, dtype=torch.bool, device=device) if known is None else known
    cache = Cache(p + longest)
    place = (known.cumsum(1) - 1).clamp(min=0)
    seen = torch.ones(p, p, dtype=torch.bool, device=device).tril() & known[:, None]
    seen = seen | torch.eye(p, dtype=torch.bool, device=device)  # padding must see something
    hidden = hidden_states(model, prompts, place, seen, cache)[:, :, -1].repeat_interleave(n, 1)
    cache.repeat(n)
    place, known = (x.repeat_interleave(n, 0) for x in (place[:, -1:], known))
    likeliest = (torch.arange(n, device=device) < greedy).repeat(g)
    alive = torch.ones(r, g * n, dtype=torch.bool, device=device)
    ids, found, masks = [], [], []
    noise = torch.empty(r, g * n, len(model.embedding[0]), device=device)
    for i in range(longest):
        shares = noise.flatten(0, 1).chunk(len(generators))
        for share, generator in zip(shares, generators, strict=True):
            share.exponential_(generator=generator)
        if not alive.any():
            continue  # so that a run's next draws do not depend on the others' lengths
        if i:
            known = torch.cat([known, known.new_ones(len(known), 1)], 1)
            place = place + 1
            hidden = hidden_states(model, ids[-1][..., None], place, known[:, None], cache)[:, :, 0]
        every = logits(hidden, model.head).log_softmax(-1)
        drawn = (every.exp() / noise).argmax(-1)
        if greedy:
            drawn = drawn.where(~likeliest, every.argmax(-1))
        ids.append(drawn)
        found.append(every.gather(-1, drawn[..., None])[..., 0])
        masks.append(alive)
        alive = alive & (drawn != end)
    token_ids, mask, log_probs = (
        torch.stack(x, -1).unflatten(1, (g, n)) for x in (ids, masks, found)
    )
    return Answers(prompts, token_ids, mask, log_probs)


def log_probs(model: Model, prompts: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probs "r g n t" of answers to prompts "r g p", each prompt computed once.

    A row holds a prompt and all answers to it; each answer sees the prompt and itself, at the
    positions that it would have alone.
    """
    _, _, n, t = token_ids.shape
    p = prompts.shape[-1]
    whose = torch.cat([torch.full((p,), -1), torch.arange(n).repeat_interleave(t)])
    place = torch.cat([torch.arange(p), p + torch.arange(t).repeat(n)])
    sees = ((whose[:, None] == whose) | (whose == -1)) & (place[:, None] >= place)
    place, sees = place.to(prompts.device), sees.to(prompts.device)
    ids = torch.cat([prompts, token_ids.flatten(2)], 2)
    hidden = hidden_states(model, ids, place[None], sees[None])
    own = hidden[:, :, p:].unflatten(2, (n, t))[:, :, :, :-1]
    last = hidden[:, :, p - 1 : p, None].expand(-1, -1, n, -1, -1)
    every = logits(torch.cat([last, own], 3).flatten(1, 3), model.head)
    picked = every.gather(-1, token_ids.flatten(1)[..., None])[..., 0]
    return (picked - every.logsumexp(-1)).unflatten(1, token_ids.shape[1:])
