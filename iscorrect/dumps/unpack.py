"""Batches of packed rows as one row for each sequence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from iscorrect.dumps.dump import PER_SEQUENCE, TOP
from iscorrect.errors import input_error
from iscorrect.layout import Layout


def one_row_each(layout: Layout, tensors: Mapping[str, Tensor], *, step: int) -> dict[str, Tensor]:
    """A batch with each sequence that has a counted token in a row of its own.

    Args:
        layout: which sequences and turns there are, and the ages of their tokens.
        tensors: fields of a dump, "b t …" or "b", with the mask.
        step: the version of the trainer's weights, from which ages count.

    Returns:
        the same fields, with `pack` where rows held several sequences, `turn` where the layout has
        segments, and `version` where it has ages.

    Raises:
        InputError: ranks share the sequences.

    >>> mask = torch.ones(1, 5, dtype=torch.bool)
    >>> layout = Layout.from_cu_seqlens(mask, torch.tensor([0, 2, 5]))
    >>> fields = {"mask": mask, "token_ids": torch.arange(5)[None]}
    >>> one_row_each(layout, fields, step=0)["token_ids"]
    tensor([[0, 1, 0],
            [2, 3, 4]])
    """
    if layout.sequence_group is not None:
        raise input_error(
            "DumpWriter", "mask", expected="of whole sequences",
            got="a layout whose sequences are shared by ranks",
            fix="gather the tokens of each sequence, and write them on one rank",
        )
    shape, segment = layout.mask.shape, layout.segment_numbers()
    fields = dict(tensors)
    if layout.age is not None:
        fields.setdefault("version", step - layout.age.cpu())
    if segment is not None:
        fields.setdefault("turn", segment.cpu())
    if len(shape) == 1:  # one packed row
        fields = {n: x[None] if x.shape[:1] == shape else x for n, x in fields.items()}
    if layout.is_packed():
        fields = _split(layout.sequence_numbers().cpu(), fields)
    if "turn" in fields and "turn" not in tensors:
        fields["turn"] = fields["turn"] - fields["turn"][:, :1]
    return fields


def _split(sequence: Tensor, fields: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fields cut at the ends of sequences, those without a counted token left out."""
    mask = fields["mask"]
    rows, width = mask.shape
    if not mask.any():
        return {name: x[:0] for name, x in fields.items()}
    lengths = torch.unique_consecutive(sequence.flatten(), return_counts=True)[1]
    first = lengths.cumsum(0) - lengths
    counted = [bool(x.any()) for x in torch.split(mask.flatten(), lengths.tolist())]
    keep = [i for i, some in enumerate(counted) if some]
    split: dict[str, Tensor] = {}
    for name, given in fields.items():
        of_rows = tuple(given.shape) in ((rows,), (rows, 1))
        x = given.reshape(-1, 1).expand(rows, width) if of_rows else given
        if x.shape[:2] != mask.shape:  # one for each sequence, or what the writer will leave out
            split[name] = x
            continue
        flat = x.flatten(0, 1)
        if name in PER_SEQUENCE:
            split[name] = flat[first[keep]]
            continue
        parts = torch.split(flat, lengths.tolist())
        fill = -torch.inf if name == TOP else 0
        split[name] = pad_sequence([parts[i] for i in keep], batch_first=True, padding_value=fill)
    row = first[keep] // width
    split["pack"] = torch.arange(len(row)) - torch.searchsorted(row, row)
    return split
