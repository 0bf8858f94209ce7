"""Dumps into files of five formats, and from a training loop."""

from __future__ import annotations

import io
import json
import operator
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from iscorrect.dumps.dump import (
    IDS,
    LOG_PROBS,
    PER_CANDIDATE,
    PER_SEQUENCE,
    PER_TOKEN,
    REQUIRED,
    SPREAD,
    UNITS,
    LogProbDump,
    Row,
)
from iscorrect.dumps.files import add_file, replacing
from iscorrect.dumps.names import Array, numbered
from iscorrect.dumps.readers import EXPANSION, NAMES, SMALL
from iscorrect.dumps.rows import DTYPES, alike, check_log_probs, is_text, is_wrong, rows_of
from iscorrect.dumps.unpack import one_row_each
from iscorrect.errors import InputError, check_choice, describe, import_extra, input_error
from iscorrect.layout import Layout
from iscorrect.text import visible


def write_dump(
    dump: LogProbDump | Iterable[LogProbDump], path: str | os.PathLike[str]
) -> None:
    """Write a dump in the format of the suffix; the file appears whole or not at all.

    Args:
        dump: what to write, or pieces of it, of which the fields are written that all have.
            Floats are stored in float32; positions after the last counted token of a sequence are
            left out.
        path: ends in `.parquet`, `.jsonl`, `.npz`, `.safetensors`, or `.pt`.

    Raises:
        InputError: another suffix, a missing package, no sequence, or what :func:`read_dump` would
            refuse.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise input_error(
            "write_dump", "path", expected="one of " + ", ".join(WRITERS), got=visible(path),
            fix="end the name with .parquet, or with .npz where pyarrow is not installed",
        )
    if not path.parent.is_dir():
        raise input_error(
            "write_dump", "path", expected="in a directory that is there", got=visible(path),
            fix="make the directory first",
        )
    pieces = [dump] if isinstance(dump, LogProbDump) else dump
    rows = _checked_rows(pieces if isinstance(pieces, Iterable) else [pieces])
    with replacing(path) as unfinished:
        WRITERS[path.suffix](rows, unfinished)


def _checked_rows(pieces: Iterable[LogProbDump]) -> list[Row]:
    rows: list[Row] = []
    for piece in pieces:
        if not isinstance(piece, LogProbDump):
            raise input_error(
                "write_dump", "dump", expected="a LogProbDump, or several", got=describe(piece),
                fix="pass write_dump(dump, path)",
            )
        rows += rows_of(piece)
    if not rows:
        raise input_error(
            "write_dump", "dump", expected="of at least one sequence", got="none",
            fix="write batches that have rows",
        )
    for number, row in enumerate(rows):
        check_log_probs("write_dump", row, f"sequence {number}")
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return alike([{name: row[name] for name in names} for row in rows])


def _flat(rows: Sequence[Row]) -> dict[str, Array]:
    flat = {
        name: np.array([row[name] for row in rows], object if is_text(x) else np.int64)
        if name in PER_SEQUENCE
        else np.concatenate(_same_depth([row[name] for row in rows]))
        for name, x in rows[0].items()
    }
    for name in [name for name in IDS if name in flat and flat[name].dtype == object]:
        flat[name], names = numbered(flat[name])
        flat[name + NAMES] = np.frombuffer(json.dumps(names).encode(), np.uint8).copy()
    return flat | {"cu_seqlens": np.cumsum([0, *(len(row["mask"]) for row in rows)])}


def _same_depth(arrays: list[Array]) -> list[Array]:
    """Arrays "t k" with the number of candidates of the deepest; others as they are."""
    if arrays[0].ndim == 1:
        return arrays
    depth = max(x.shape[1] for x in arrays)
    fill = -np.inf if arrays[0].dtype.kind == "f" else 0
    return [
        np.pad(x, ((0, 0), (0, depth - x.shape[1])), constant_values=fill) for x in arrays
    ]


def _write_npz(rows: Sequence[Row], path: Path) -> None:
    arrays: dict[str, Any] = _flat(rows)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if _expands_too_far(unpacked, path):
        with path.open("wb") as file:
            np.savez(file, **arrays)


def _expands_too_far(unpacked: int, path: Path) -> bool:
    """Whether readers would refuse the file, as constant values compress to almost nothing."""
    return unpacked > max(SMALL, EXPANSION * path.stat().st_size)


def _write_safetensors(rows: Sequence[Row], path: Path) -> None:
    numpy = import_extra("write_dump", "safetensors.numpy", "safetensors")
    path.write_bytes(numpy.save(_flat(rows)))  # errors of the disk as Python knows them


def _write_pt(rows: Sequence[Row], path: Path) -> None:
    content = io.BytesIO()
    torch.save({name: torch.from_numpy(x) for name, x in _flat(rows).items()}, content)
    path.write_bytes(content.getbuffer())


def _write_parquet(rows: Sequence[Row], path: Path) -> None:
    parquet = import_extra("write_dump", "pyarrow.parquet", "parquet")
    pyarrow = import_extra("write_dump", "pyarrow", "parquet")
    columns = {
        name: [x.tolist() if name in PER_CANDIDATE else x for x in (row[name] for row in rows)]
        for name in rows[0]
    }
    kinds = {np.float32: pyarrow.float32(), np.bool_: pyarrow.bool_(), np.int64: pyarrow.int64()}
    types = {name: pyarrow.list_(kinds[kind]) for name, kind in PER_TOKEN.items()}
    types |= {n: pyarrow.list_(pyarrow.list_(kinds[kind])) for n, kind in PER_CANDIDATE.items()}
    types |= dict.fromkeys(PER_SEQUENCE, pyarrow.int64())
    for name in [name for name in IDS if is_text(rows[0].get(name))]:
        text = pyarrow.string()
        types[name] = text if name in PER_SEQUENCE else pyarrow.list_(text)
    schema = pyarrow.schema([(name, types[name]) for name in columns])
    table = pyarrow.table(columns, schema=schema)
    parquet.write_table(table, path)
    if _expands_too_far(table.nbytes, path):
        parquet.write_table(table, path, compression="none", use_dictionary=False)


def _write_jsonl(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            cells = (f"{json.dumps(name)}: {_json(x)}" for name, x in row.items())
            file.write("{" + ", ".join(cells) + "}\n")


# JSON has no word for what is not finite; every reader takes a number beyond its range as infinite
JSON_WORDS = {"nan": "null", "inf": "1e999", "-inf": "-1e999"}


def _json(x: Any) -> str:
    """An array as JSON, in the fewest digits that read back as the same float32."""
    if not isinstance(x, np.ndarray):
        return json.dumps(x)
    if x.ndim > 1:
        return "[" + ", ".join(map(_json, x)) + "]"
    if x.dtype != np.float32:
        return json.dumps(x.tolist())
    return "[" + ", ".join(JSON_WORDS.get(text, text) for text in x.astype(str).tolist()) + "]"


WRITERS: dict[str, Callable[[Sequence[Row], Path], None]] = {
    ".parquet": _write_parquet,
    ".jsonl": _write_jsonl,
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
    ".pt": _write_pt,
}


NEEDED = {
    ".parquet": ("pyarrow.parquet", "parquet"), ".safetensors": ("safetensors", "safetensors"),
}
"""The modules that formats need, with the extras that bring them."""


class DumpWriter:
    """Writes one file for each call, from a training loop; no call overwrites another's file.

    What a batch has that no dump can hold is left out, with a warning the first time: a field of
    another shape or dtype, and counted tokens with a finite number that is no log-prob, which are
    written as masked. Log-probs that are not finite are written as they are, for a report to count.
    One advantage, version, turn, engine or place for each sequence goes to its tokens.

    Args:
        directory: made where it does not exist.
        suffix: the format, as for :func:`write_dump`.

    Raises:
        InputError: an unknown suffix, or a missing package.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> DumpWriter(directory).write(
    ...     step=3, mask=torch.tensor([[True]]), rollout_log_probs=torch.tensor([[-1.0]]),
    ...     old_log_probs=torch.tensor([[-1.1]]),
    ... ).name
    'step_000003_rank_0.npz'
    """

    def __init__(self, directory: str | os.PathLike[str], *, suffix: str = ".npz") -> None:
        check_choice("DumpWriter", "suffix", suffix, list(WRITERS))
        if suffix in NEEDED:  # said now, not after the first step of training
            import_extra("DumpWriter", *NEEDED[suffix])
        self.directory = Path(directory)
        self.suffix = suffix
        self.directory.mkdir(parents=True, exist_ok=True)
        self._warned: set[str] = set()

    def write(
        self,
        *,
        step: int,
        mask: Tensor | Layout,
        **tensors: Tensor | Sequence[str] | str | int | None,
    ) -> Path | None:
        """Write one batch.

        Args:
            step: of the training run, as a whole number; a step that is written again, or by
                another process of the same rank, gets a file of its own.
            mask: bool "b t"; or a layout, whose packed sequences are written one by one with their
                `pack`, whose segments are written as `turn`, and whose ages as `version`, step less
                age. What is one for each sequence is then given on the sequence's tokens, "b t", or
                for each row, or for each sequence with a counted token.
            tensors: the other fields of :class:`LogProbDump`, on any device; None is left out.
                Versions, engines and groups may be text: one for all, or one for each row; and one
                number for all.

        Returns:
            The file; None where the batch has no sequence, or log-probs and mask do not fit.

        Raises:
            InputError: a name that is no field, a log-prob is not given, or ranks share sequences.
            OSError: the file cannot be written.
        """
        try:
            step = operator.index(step)
        except TypeError:
            raise input_error(
                "DumpWriter", "step", expected="a whole number", got=describe(step),
                fix="pass step=trainer.state.global_step, or a counter of your own",
            ) from None
        for name in tensors:
            check_choice("DumpWriter", "tensors", name, [n for n in DTYPES if n != "mask"])
        layout = mask if isinstance(mask, Layout) else None
        mask = mask.mask if isinstance(mask, Layout) else mask
        given: dict[str, Tensor] = {}
        names: dict[str, tuple[str, ...]] = {}
        for name, value in {**dict.fromkeys(REQUIRED), **tensors, "mask": mask}.items():
            x = _as_tensor(name, value, mask, names)
            if isinstance(x, Tensor):
                # On the host first: a tensor that carries gradient is data here.
                given[name] = _on_host(x)
            elif name in REQUIRED or x is not None:
                raise input_error(
                    "DumpWriter", name, expected="a tensor", got=describe(x),
                    fix="pass what the loss gets",
                )
        if layout is not None:
            given = one_row_each(layout, given, step=step)
        dump = self._fitting(step, given, names)
        if dump is None:
            return None
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        path = self.directory / f"step_{step:06d}_rank_{rank}{self.suffix}"
        return add_file(path, partial(WRITERS[self.suffix], list(rows_of(dump))))

    def _fitting(
        self, step: int, given: dict[str, Tensor], names: dict[str, tuple[str, ...]]
    ) -> LogProbDump | None:
        """What a dump can hold of a batch."""
        mask = given.pop("mask")
        if mask.dtype != torch.bool and bool(((mask == 0) | (mask == 1)).all()):
            mask = mask.bool()
        sides: dict[str, Any] = {name: given.pop(name) for name in REQUIRED[:2]}
        try:
            LogProbDump(mask=mask, **sides)
        except InputError as error:
            self._warn("a batch", str(error))
            return None
        if not len(mask):
            self._warn("a batch", "it has no sequence")
            return None
        for name, x in sides.items():
            bad = mask & is_wrong(x)
            if bad.any():
                mask = mask & ~bad
                self._warn(
                    f"counted tokens whose {name} is none", f"{int(bad.sum())} in step {step}, of"
                    f" {x[bad][0]:.3g}; they are written as masked",
                )
        fields: dict[str, Any] = {
            **sides, "mask": mask, "step": torch.full((len(mask),), step), "names": {},
        }
        for name, x in given.items():
            fitted = _fitted(name, x, mask)
            texts = {name: names[name]} if name in names else {}
            try:
                LogProbDump(**fields | {name: fitted, "names": texts})
            except InputError as error:
                self._warn(name, str(error))
                continue
            counted = fitted[mask] if fitted.ndim > 1 else fitted
            if name in LOG_PROBS and bool(is_wrong(counted).any()):
                self._warn(name, "not a log-prob everywhere where the mask is 1")
            elif bool((counted.float().isinf() & counted.isfinite()).any()):
                self._warn(name, "beyond what float32 holds")
            else:
                fields[name] = fitted
                fields["names"] |= texts
        return LogProbDump(**fields)

    def _warn(self, what: str, why: str) -> None:
        if what in self._warned:
            return
        self._warned.add(what)
        warnings.warn(
            f"DumpWriter left out {what}: {why}. This is said once.", stacklevel=4
        )


def _as_tensor(name: str, x: Any, mask: Any, names: dict[str, tuple[str, ...]]) -> Any:
    """Numbers for ids that are given as text or by one number; anything else as it is.

    Args:
        name: of the field.
        x: what was given.
        mask: "b t".
        names: to which the texts are added.
    """
    if name not in (*UNITS, *PER_SEQUENCE) or not isinstance(mask, Tensor):
        return x
    rows = len(mask) if mask.ndim > 1 else 1
    if isinstance(x, int) and not isinstance(x, bool):
        return torch.full((rows,), x)
    if name in IDS and isinstance(x, str):
        x = [x] * rows
    if name in IDS and isinstance(x, list | tuple) and all(isinstance(text, str) for text in x):
        numbers, names[name] = numbered(np.array(x, dtype=object))
        return torch.from_numpy(numbers)
    return x


def _on_host(x: Tensor) -> Tensor:
    x = x.detach()
    return (x if x.layout == torch.strided else x.to_dense()).cpu()


def _fitted(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """A number for each sequence in the form that a dump has for it; anything else as it is."""
    rows = (len(mask),)
    if name in SPREAD and tuple(x.shape) in (rows, (*rows, 1)):
        return x.reshape(-1, 1).expand(mask.shape)
    if name in PER_SEQUENCE and tuple(x.shape) == (*rows, 1):
        return x[:, 0]
    return x
