"""Log-probs of a batch and the gradients of its loss, the logits computed once.

A chunk's logits are kept until the loss has said what its derivative is. Where the loss of a
token depends on log-probs outside its chunk, two passes are needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

from iscorrect.head.inputs import Counted, Head
from iscorrect.head.reader import GPU_TOKENS, Reader, default_step
from iscorrect.head.state import Gradients
from iscorrect.layout import Layout, masked
from iscorrect.loss.aggregate import Aggregation, Normalizer
from iscorrect.loss.batch import Batch
from iscorrect.loss.correction import Correction
from iscorrect.loss.evidence import Scope
from iscorrect.loss.policy_loss import PolicyLoss
from iscorrect.loss.ratios import is_log_prob
from iscorrect.ranks import Group, first_over


@torch.no_grad()
def in_one_pass(
    loss_fn: PolicyLoss, batch: Batch, head: Head, tokens: Counted, *,
    normalizer: Normalizer | None, chunk_size: int | None, wanted: list[bool],
) -> tuple[Tensor, list[Tensor | None]] | None:
    """Log-probs "b t" and the gradients of hidden, weight, bias and extra; None if it takes two.

    Args:
        loss_fn: the loss.
        batch: what is known of each token; its log-probs are made here.
        head: the LM head.
        tokens: those that count.
        normalizer: as of the loss.
        chunk_size: tokens whose exponentials are kept at a time; None: see the default.
        wanted: which of the four gradients are asked for.
    """
    known = batch.old_log_probs is not None
    scope = _scope(loss_fn, known=known)
    shared = batch.layout.sequence_group is not None and scope == "sequence"
    if scope == "batch" or shared:  # other ranks hold tokens of these sequences
        return None
    tokens, busy = _idle_last(loss_fn, batch, tokens, scope, head.group)
    scale = _scale(loss_fn, batch, normalizer, head.wide(tokens.hidden))
    derivative = _Derivative.of(loss_fn, batch, tokens.index, scope, scale, head.group)
    if derivative.has_parameters():
        return None
    into = Gradients.of(head, tokens, hidden=wanted[0], weight=wanted[1], bias=wanted[2])
    reader, size = Reader(head, tokens), chunk_size
    if size is None:
        size = default_chunk_size(busy, tokens.index.device, weight=wanted[1])
    room = _Room(reader, into, size)
    if scope == "sequence":
        parts = _whole_sequences(batch.layout, tokens[:busy], room)
        if any(len(tokens[part]) > room.at(i) for i, part in enumerate(parts)):
            return None
    else:
        parts = room.parts(busy)
    held = parts[-1].stop if parts else 0
    log_probs = scale.new_zeros(scale.numel())
    with torch.autocast(tokens.hidden.device.type, enabled=False):
        for part in parts:
            chunk = tokens[part]
            reading = reader.read(chunk, keep=room.take(len(chunk)))
            coefficient = derivative(part, reading.log_probs)
            reader.differentiate(chunk, reading, coefficient, into)
            log_probs[chunk.index] = reading.log_probs
        if held < len(tokens):
            rest = slice(held, len(tokens))
            reading = reader.score(tokens[rest], room.step)
            log_probs[tokens[rest].index] = reading.log_probs
            coefficient = derivative(rest, reading.log_probs)
            busy_rest = reader.busy(coefficient)
            reader.differentiate_all(
                tokens[rest][busy_rest], reading[busy_rest], coefficient[busy_rest], into, room.step
            )
    if known and loss_fn.correction.scope != "token" and not bool(is_log_prob(log_probs).all()):
        # A token without a log-prob takes its sequence with it, which was not known beforehand.
        return None
    return log_probs.view(scale.shape), [*into.total(), scale if wanted[3] else None]


def _idle_last(
    loss_fn: PolicyLoss, batch: Batch, tokens: Counted, scope: Scope, group: Group
) -> tuple[Counted, int]:
    """Tokens, or sequences, without any advantage come last; how many tokens are not among them.

    They rarely have a derivative, so that their logits need not be kept.
    """
    if loss_fn.reference_kl is not None:
        return tokens, len(tokens)
    advantage = batch.advantages.abs()
    if scope == "sequence":
        advantage = batch.layout.sequence_max(advantage)
    idle = first_over(advantage.flatten()[tokens.index] == 0, group)
    count = int(idle.sum())
    if not count:
        return tokens, len(tokens)
    return tokens[idle.int().argsort(stable=True)], len(tokens) - count


def _scope(loss_fn: PolicyLoss, *, known: bool) -> Scope:
    """How far a token's loss looks at log-probs of the policy being trained.

    Weights do not depend on it where π_old is known.
    """
    return replace(loss_fn, correction=Correction()).scope if known else loss_fn.scope


def default_chunk_size(tokens: int, device: torch.device, *, weight: bool) -> int:
    """Tokens whose logits a buffer holds: one in 40, so that memory stays in the background.

    At least 80 and at most 4096; no buffer where computing logits twice is faster than reading and
    writing the gradient of the weight for fewer than 192 tokens at a time. On a GPU always 4096.

    >>> default_chunk_size(16384, torch.device("cpu"), weight=True)
    409
    """
    if device.type != "cpu":
        return min(GPU_TOKENS, max(tokens, 1))
    size = min(max(tokens // 40, 80), 4096)
    return 0 if weight and size < 192 else size


class _Room:
    """Where the logits of a chunk, or their exponentials, are kept until its derivative is known.

    On a GPU that is a buffer of ``size`` tokens, for one chunk after the other.

    On a CPU the gradient of the weight, "v d", is not needed before the first chunk is
    differentiated, so the first chunk's exponentials, "v c", lie in its memory. Later chunks use a
    buffer of ``size`` tokens; if ``size`` is 0 there are no later chunks. With two chunks:

                    gradient of the weight         buffer
        read 1      exponentials of chunk 1        –
        diff. 1     rows of the gradient, each     –
                    block of rows written after
                    its exponentials were read
        read 2      gradient of chunk 1            exponentials of chunk 2
        diff. 2     gradient of chunks 1 and 2     –
    """

    def __init__(self, reader: Reader, into: Gradients, size: int):
        self.reader, self.size = reader, size
        self.step = default_step(reader.head)
        self._shared = into.weight if reader.on_cpu else None
        self._into = into
        self._buffer: Tensor | None = None

    def at(self, i: int) -> int:
        """The largest number of tokens that the i-th chunk may have."""
        return self.size if i or self._shared is None else max(self.size, self._shared.shape[1])

    def parts(self, n: int) -> list[slice]:
        """The first n tokens in chunks, or as many of them as there is room for."""
        parts: list[slice] = []
        start = 0
        while start < n and self.at(len(parts)):
            parts.append(slice(start, min(start + self.at(len(parts)), n)))
            start = parts[-1].stop
        return parts

    def take(self, n: int) -> list[Tensor]:
        """Room for n tokens, block by block."""
        shared = self._shared
        if shared is not None and self._into.fresh and n <= shared.shape[1]:
            return self.reader.split(shared, n)
        if self._buffer is None:
            self._buffer = self.reader.room(self.size)
        return self.reader.split(self._buffer, n)


def _whole_sequences(layout: Layout, tokens: Counted, room: _Room) -> list[slice]:
    """Chunks of as many sequences as there is room for; a longer one by itself."""
    first = layout.sequence_starts().flatten()[tokens.index].nonzero().squeeze(-1).tolist()
    parts: list[slice] = []
    for start, stop in pairwise([*first, len(tokens)]):
        if parts and stop - parts[-1].start <= room.at(len(parts) - 1):
            parts[-1] = slice(parts[-1].start, stop)
        elif room.size or (not parts and stop <= room.at(0)):
            parts.append(slice(start, stop))
        else:
            break
    return parts


def _scale(
    loss_fn: PolicyLoss, batch: Batch, normalizer: Normalizer | None, dtype: torch.dtype
) -> Tensor:
    """The derivative of the loss in each per-token loss, "b t": it depends on the mask alone."""
    aggregation, layout = loss_fn.aggregation, batch.layout
    assert isinstance(aggregation, Aggregation)
    ones = torch.ones_like(layout.mask, dtype=dtype)
    coefficients = masked(ones * aggregation.coefficients(layout, dtype), layout.mask)
    return aggregation.divide(coefficients, layout, normalizer)


@dataclass(frozen=True, eq=False)
class _Derivative:
    """The derivative of the loss in log-probs of some tokens, by autograd on the loss itself.

    Attributes:
        loss_fn: the loss.
        batch: what is known of every token.
        index: int "n", positions in the batch of the tokens that count.
        scale: "n", the derivative of the loss in each per-token loss.
        weights: "n", or None where they depend on the log-probs.
        sequences: int "n", the sequence of each token, or None where no part asks.
        segments: int "n", likewise.
        age: int "n", or None where it is not known.
        group: the ranks that share the head, and have to agree to the last bit.
    """

    loss_fn: PolicyLoss
    batch: Batch
    index: Tensor
    scale: Tensor
    weights: Tensor | None
    sequences: Tensor | None
    segments: Tensor | None
    age: Tensor | None
    group: Group

    @classmethod
    def of(
        cls, loss_fn: PolicyLoss, batch: Batch, index: Tensor, scope: Scope, scale: Tensor,
        group: Group,
    ) -> _Derivative:
        """The derivative for a batch whose log-probs are not known yet."""
        def pick(x: Tensor) -> Tensor:
            return x.reshape(-1)[index]

        correction, layout, weights = loss_fn.correction, batch.layout, None
        if batch.old_log_probs is not None:
            weights = pick(correction.weigh(batch.finite().evidence).weights)
        if correction.nonfinite == "raise":
            # positions in a chunk are not the batch's, which is looked at as a whole at the end
            loss_fn = replace(loss_fn, correction=replace(correction, nonfinite="drop"))
        whole = scope == "sequence"
        return cls(
            loss_fn, batch._replace(extra=None), index, pick(scale), weights,
            pick(layout.sequence_starts()).cumsum(0) if whole else None,
            pick(layout.segment_starts()).cumsum(0) if whole else None,
            None if layout.age is None else pick(layout.age),
            group,
        )

    def has_parameters(self) -> bool:
        """Whether the loss has a gradient of its own, as one with a learned part does."""
        one = slice(0, 1)
        with torch.enable_grad():
            return self._loss(one, self.scale.new_zeros(len(self.index[one]))).requires_grad

    def __call__(self, part: slice, log_probs: Tensor) -> Tensor:
        """"n", given the log-probs of a part of the tokens."""
        leaf = log_probs.detach().requires_grad_()
        with torch.enable_grad():
            loss = self._loss(part, leaf)
        if not loss.requires_grad:  # a part of the user's has none
            return torch.zeros_like(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf, rearrange(self.scale[part], "n -> 1 n"))
        return first_over(gradient, self.group)

    def _loss(self, part: slice, log_probs: Tensor) -> Tensor:
        """The per-token loss "1 n" of a part of the tokens, packed into one row."""
        mask = torch.ones(1, len(log_probs), dtype=torch.bool, device=log_probs.device)

        def row(x: Tensor | None) -> Tensor | None:
            return None if x is None else rearrange(x[part], "n -> 1 n")

        layout = Layout(
            mask, sequence_ids=row(self.sequences), segment_ids=row(self.segments),
            age=row(self.age),
        )
        packed = rearrange(log_probs, "n -> 1 n")
        chunk = self.batch.pick(self.index[part], layout, packed).finite()
        weights = row(self.weights)
        if weights is None:
            weights = self.loss_fn.correction.weigh(chunk.evidence).weights
        return self.loss_fn.per_token(chunk, weights).loss
