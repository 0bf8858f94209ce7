"""The LM head and the tokens it is asked about, checked, whole or shared among ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from iscorrect.errors import InputError, check_flag, check_number, describe, input_error
from iscorrect.head.support import KeptIds, Support, as_rows, check_ids, check_target
from iscorrect.layout import Layout, as_layout
from iscorrect.ranks import Group, agree, check_member, sum_over


@dataclass(frozen=True, eq=False)
class Head:
    """The LM head, or this rank's rows of it, and what happens to the logits.

    Attributes:
        weight: "v d".
        bias: "v", or None.
        group: the ranks that hold the other rows; None: nobody does.
        start: which row of the whole head is the first one here.
        vocabulary: how many rows the whole head has, padding left out.
        rounded_to: what products take the weight in; None: as it is.
        compile_kernels: whether torch.compile fuses what happens to the logits, on a GPU.
    """

    weight: Tensor
    bias: Tensor | None = None
    temperature: float = 1.0
    softcap: float | None = None
    head_dtype: torch.dtype = torch.float32
    group: Group = None
    start: int = 0
    vocabulary: int = 0
    rounded_to: torch.dtype | None = None
    compile_kernels: bool = False

    def wide(self, hidden: Tensor) -> torch.dtype:
        """What logits, sums and gradients are held in: float32 or wider."""
        dtype = torch.promote_types(hidden.dtype, self.weight.dtype)
        return torch.promote_types(torch.promote_types(dtype, self.head_dtype), torch.float32)

    def slope(self, logits: Tensor) -> Tensor:
        """Derivative of the soft cap, 1 − tanh², from the capped logits."""
        assert self.softcap is not None
        tanh = logits * (self.temperature / self.softcap)
        # −inf stands for what has underflowed
        return 1 - tanh.clamp_(min=-1).square_()

    def placed(self, start: int, vocabulary: int) -> Head:
        """These rows as those of the whole head from ``start`` on, padding left out."""
        kept = max(0, min(len(self.weight), vocabulary - start))
        head = replace(self, start=start, vocabulary=vocabulary)
        if kept == len(self.weight):
            return head
        bias = None if self.bias is None else self.bias[:kept]
        return replace(head, weight=self.weight[:kept], bias=bias)

    def check(self, caller: str) -> None:
        """Raise unless weights, bias and numbers can be used."""
        if self.weight.ndim != 2 or not self.weight.is_floating_point():
            raise input_error(
                caller, "weight", expected="a floating-point matrix `v d`",
                got=describe(self.weight), fix="pass lm_head.weight",
            )
        vocabulary = len(self.weight)
        fits = isinstance(self.bias, Tensor) and self.bias.shape == (vocabulary,)
        if self.bias is not None and not fits:
            raise input_error(
                caller, "bias", expected=f"a tensor of shape ({vocabulary},), or None",
                got=describe(self.bias), fix="pass lm_head.bias, or None where there is none",
            )
        check_number(
            caller, "temperature", self.temperature, "the sampler's", above=0,
            fix="pass the sampler's temperature; greedy decoding has no log-probs to correct",
        )
        check_number(
            caller, "softcap", self.softcap, "the model's", above=0, optional=True,
            fix="pass final_logit_softcapping of the model's config",
        )
        floating = isinstance(self.head_dtype, torch.dtype) and self.head_dtype.is_floating_point
        if not floating:
            raise input_error(
                caller, "head_dtype", expected="a floating-point dtype", got=repr(self.head_dtype),
                fix="pass torch.float32",
            )


@dataclass(frozen=True, eq=False)
class Counted:
    """The tokens that count, one after the other.

    Attributes:
        hidden: "m d", of every token, counted or not, or of the part of them that is here.
        shape: of the target, "...".
        index: int "n", which of the target's positions count.
        target: int "n".
        support: what each may be, or None.
        part: which hidden states are here; None: all.
        start: the first row, where these tokens' hidden states lie in consecutive rows, or None.
    """

    hidden: Tensor
    shape: torch.Size
    index: Tensor
    target: Tensor
    support: KeptIds | None = None
    part: Part | None = None
    start: int | None = None

    @classmethod
    def of(
        cls, caller: str, *, hidden: Tensor, target: Tensor, mask: Tensor | None,
        support: Tensor | Support | None, part: Part | None,
    ) -> Counted:
        """Pick what counts; asks a GPU once how many tokens that is."""
        flat = target.flatten().long()
        if mask is None:
            index = torch.arange(flat.numel(), device=flat.device)
        else:
            index = mask.flatten().nonzero().squeeze(-1)
        kept = None
        if support is not None:
            kept = KeptIds.of(as_rows(caller, support, target)).select(index)
        states = hidden.reshape(-1, hidden.shape[-1])
        start = 0 if part is None and len(index) == len(flat) else None
        return cls(states, target.shape, index, flat[index], kept, part, start)

    def check(self, caller: str, vocabulary: int) -> None:
        """Raise on a token id that the vocabulary does not have, where a look costs nothing."""
        check_ids(caller, "target", self.target, vocabulary)
        if self.support is not None:
            check_ids(caller, "support", self.support.ids, vocabulary)

    def in_shape(self, values: Tensor) -> Tensor:
        """Values "n" at the target's positions, and 0 where nothing counts."""
        x = values.new_zeros(self.shape)
        x.view(-1).index_copy_(0, self.index, values)
        return x

    def outside(self, vocabulary: int) -> Tensor:
        """Bool "n", targets that the vocabulary does not have."""
        return (self.target < 0) | (self.target >= vocabulary)

    def places(self) -> slice | Tensor:
        """In which rows the hidden states are; one row behind the last for those elsewhere."""
        if self.part is not None:
            return self.part.find(self.index, len(self.hidden))
        if self.start is not None:
            return slice(self.start, self.start + len(self))
        return self.index

    def states(self) -> Tensor:
        """"n d", the hidden states, from the ranks that hold them."""
        places = self.places()
        if self.part is None or isinstance(places, slice):
            return self.hidden[places]
        nothing = self.hidden.new_zeros(1, self.hidden.shape[1])
        return sum_over(torch.cat([self.hidden, nothing])[places], self.part.group)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, part: slice | Tensor) -> Counted:
        support, start = self.support, None
        if support is not None:
            support = support.cut(part) if isinstance(part, slice) else support.select(part)
        if isinstance(part, slice) and self.start is not None:
            start = self.start + part.indices(len(self))[0]
        return replace(
            self, index=self.index[part], target=self.target[part], support=support, start=start
        )


class Part(NamedTuple):
    """Sequence parallelism: some of the columns of "... t", whose hidden states are here.

    Attributes:
        group: the ranks that hold the others.
        start: the first of these columns.
        width: how many.
        columns: t, of all ranks.
    """

    group: Group
    start: int
    width: int
    columns: int

    def find(self, index: Tensor, elsewhere: int) -> Tensor:
        """In which rows of the hidden states some positions are, or ``elsewhere``."""
        column = index % self.columns - self.start
        here = (column >= 0) & (column < self.width)
        return torch.where(here, index // self.columns * self.width + column, elsewhere)


def prepare(
    caller: str, *, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    temperature: float, softcap: float | None, chunk_size: int | None, head_dtype: torch.dtype,
    support: Tensor | Support | None, layout: Tensor | Layout | None, vocabulary_group: Group,
    vocabulary_size: int | None, sequence_parallel: bool, compile_kernels: bool,
    facts: Mapping[str, object] | InputError,
) -> tuple[Head, Counted]:
    """The head and the tokens that count, once all inputs are checked.

    The arguments are those of the caller. Where ranks share the head, ``facts`` are what else has
    to be the same on all, or what the caller's own checks found wrong on this one.
    """
    for name, x in {"hidden": hidden, "weight": weight}.items():
        if not isinstance(x, Tensor) or x.ndim == 0:
            raise input_error(
                caller, name, expected="a floating-point tensor `... d`", got=describe(x),
                fix="pass the last hidden states and lm_head.weight as torch tensors",
            )
    weight, bias, group = _as_shard(caller, weight, bias, vocabulary_group)
    head = Head(
        weight, bias, temperature, softcap, head_dtype, group,
        rounded_to=autocast_to(hidden, weight), compile_kernels=compile_kernels,
    )
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    tokens, checksum = None, torch.zeros((), dtype=torch.int64, device=hidden.device)
    if not isinstance(facts, InputError):
        try:
            head.check(caller)
            counts = {"chunk_size": chunk_size, "vocabulary_size": vocabulary_size}
            for name, count in counts.items():
                check_number(
                    caller, name, count, "how many", above=0, whole=True, optional=True,
                    fix=f"leave {name} out, or pass {name}=4096",
                )
            check_flag(caller, "sequence_parallel", sequence_parallel)
            check_flag(caller, "compile_kernels", compile_kernels)
            mask = None if layout is None else as_layout(caller, layout, "layout").mask
            cut = ranks if sequence_parallel else 1
            _check_tokens(caller, head, hidden, target, mask, cut)
            part = None
            if cut > 1:
                width = hidden.shape[-2]
                part = Part(group, rank * width, width, ranks * width)
            tokens = Counted.of(
                caller, hidden=hidden, target=target, mask=mask, support=support, part=part
            )
            checksum = ((tokens.target + 1) * (tokens.index + 1)).sum()
            wanted = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
            facts = {
                **facts, "target": f"{tuple(target.shape)}, {len(tokens)} of them counted",
                "hidden": describe(hidden), "weight": f"{weight.dtype}, {weight.shape[1]} wide",
                "bias": bias is not None, "requires_grad": torch.is_grad_enabled() and wanted,
                "temperature": temperature, "softcap": softcap, "head_dtype": head_dtype,
                "chunk_size": chunk_size,
                "support": tokens.support and f"{len(tokens.support.ids)} ids",
                "vocabulary_size": vocabulary_size, "sequence_parallel": sequence_parallel,
            }
        except InputError as error:
            facts = error
    rows = agree(
        caller, group, facts, argument="vocabulary_group", each=len(weight),
        checksums={"target": checksum},
    )
    assert tokens is not None
    vocabulary = sum(rows) if vocabulary_size is None else vocabulary_size
    if vocabulary > sum(rows):
        raise input_error(
            caller, "vocabulary_size", expected=f"at most {sum(rows)}, the rows of the head",
            got=str(vocabulary), fix="pass the size of the tokenizer's vocabulary",
        )
    tokens.check(caller, vocabulary)
    return head.placed(sum(rows[:rank]), vocabulary), tokens


def autocast_to(hidden: Tensor, weight: Tensor) -> torch.dtype | None:
    """What autocast rounds a wider weight to, where hidden states come rounded to the same."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return None
    narrow = torch.get_autocast_dtype(device)
    wider = weight.is_floating_point() and weight.dtype.itemsize > narrow.itemsize
    return narrow if wider and hidden.dtype == narrow else None


def _check_tokens(
    caller: str, head: Head, hidden: Tensor, target: Tensor, mask: Tensor | None, cut: int
) -> None:
    width = head.weight.shape[1]
    if hasattr(hidden, "placements"):
        raise input_error(
            caller, "hidden", expected="a plain tensor", got=f"a DTensor {hidden.placements}",
            fix="pass hidden.to_local(), with sequence_parallel=True where tokens are sharded",
        )
    if not hidden.is_floating_point() or hidden.ndim < 2 or hidden.shape[-1] != width:
        raise input_error(
            caller, "hidden", expected=f"a floating-point tensor `... {width}`, wide as `weight`",
            got=describe(hidden), fix="pass the last hidden states, after the final norm",
        )
    *rows, columns = hidden.shape[:-1]
    hint = None
    if cut > 1:
        hint = f"pass the targets of all {cut} ranks, padded so that each holds as many"
    elif head.group is not None and isinstance(target, Tensor) and (
        target.shape[:-1] == hidden.shape[:-2]
    ):
        hint = "pass sequence_parallel=True where ranks hold the hidden states of some tokens"
    check_target(caller, target, (*rows, cut * columns), of="hidden states", hint=hint)
    if mask is not None and mask.shape != target.shape:
        raise input_error(
            caller, "layout", expected=f"of shape {tuple(target.shape)} like `target`",
            got=describe(mask), fix="pass the mask of the same tokens",
        )
    for name, x in {"weight": head.weight, "target": target, "bias": head.bias}.items():
        if x is not None and x.device != hidden.device:
            raise input_error(
                caller, name, expected=f"on {hidden.device} like `hidden`", got=str(x.device),
                fix=f"pass {name}.to(hidden.device)",
            )


def _as_shard(
    caller: str, weight: Any, bias: Any, group: Group
) -> tuple[Tensor, Tensor | None, Group]:
    """A rank's rows as plain tensors, and the group that holds the others, if any does."""
    check_member(caller, "vocabulary_group", group)
    if hasattr(weight, "placements"):
        mesh, placements = weight.device_mesh, weight.placements
        if mesh.ndim != 1 or not placements[0].is_shard(0):
            raise input_error(
                caller, "weight", expected="whole, or a DTensor with Shard(0) on a 1-D mesh",
                got=f"a DTensor with {placements} on {mesh}",
                fix="shard lm_head.weight over the tensor-parallel mesh alone; under FSDP make this"
                " call inside forward, where data-parallel shards are gathered",
            )
        if group is not None:
            raise input_error(
                caller, "vocabulary_group", expected="None where `weight` is a DTensor",
                got="a process group", fix="leave it out: the group is that of the DTensor's mesh",
            )
        group, weight = mesh.get_group(), weight.to_local()
        if hasattr(bias, "placements"):
            if (bias.device_mesh, bias.placements) != (mesh, placements):
                raise input_error(
                    caller, "bias", expected="sharded like `weight`",
                    got=f"a DTensor with {bias.placements} on {bias.device_mesh}",
                    fix="shard lm_head.bias with Shard(0) on the same mesh",
                )
            bias = bias.to_local()
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    return weight, bias, group
