"""The tensors of a model, one after the other: of a module, a state dict, or files.

`.safetensors` files are read piece by piece and closed after each, since what is mapped of an open
file counts as the process's memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import weakref
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iscorrect.errors import InputError, describe, import_extra, input_error
from iscorrect.text import visible

FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
READ_AT_ONCE = 2**23  # entries

Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]


class Stored(NamedTuple):
    """A tensor that has not been read yet."""

    name: str
    dtype: str
    pieces: Iterator[Tensor]
    first: str
    """The name itself; of a tied tensor the first of its names."""


def stored(caller: str, source: Source, argument: str = "source") -> Iterator[Stored]:
    """The tensors of a model, in its order; a tied one under each of its names.

    Args:
        caller: what messages begin with.
        source: a module; a state dict, of which DTensors are made whole one after the other, so
            that all ranks have to read it; a `.safetensors`, `.bin` or `.pt` file; a directory with
            such files, or with indices of them, of which every shard must be there.
        argument: what messages call ``source``.

    Raises:
        InputError: what is not there, cannot be read, or holds no tensors.

    >>> [(x.name, x.dtype) for x in stored("f", nn.Linear(2, 3))]
    [('weight', 'float32'), ('bias', 'float32')]
    """
    if isinstance(source, nn.Module):
        yield from _of_state_dict(caller, argument, source.state_dict(keep_vars=True))
    elif isinstance(source, Mapping):
        yield from _of_state_dict(caller, argument, source)
    elif isinstance(source, str | os.PathLike):
        everywhere: set[str] = set()
        for path, names in _files(caller, argument, Path(source)).items():
            reader = _of_safetensors if path.suffix == ".safetensors" else _of_torch_file
            # files of two checkpoints in one directory hold tensors of the same names
            again = {name: f"{path.name}: {name}" for name in everywhere}
            found = set()
            for tensor in reader(caller, argument, path):
                found.add(tensor.name)
                name, first = (again.get(x, x) for x in (tensor.name, tensor.first))
                yield tensor._replace(name=name, first=first)
            everywhere |= found
            if missing := sorted(names - found):
                reason = f"{missing[0]} is not in it, though the index says"
                raise _damaged(caller, argument, path, reason)
    else:
        raise input_error(
            caller, argument, expected="a module, a state dict, or a path", got=describe(source),
            fix="pass the model, model.state_dict(), or the directory of the checkpoint",
        )


def _of_state_dict(caller: str, argument: str, state: Mapping[str, Any]) -> Iterator[Stored]:
    firsts: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], str]] = {}
    for key, x in state.items():
        name = str(key)
        if not isinstance(x, Tensor):
            if _holds_tensors(x):
                raise input_error(
                    caller, argument, expected="a state dict, which maps names to tensors",
                    got=f"{visible(name)}, {describe(x)} with tensors of its own",
                    fix=f"pass the state dict of the weights alone, such as state[{name!r}]",
                )
            yield Stored(name, type(x).__name__, iter(()), name)
            continue
        if x.is_meta:
            raise input_error(
                caller, argument, expected="a model whose weights are loaded",
                got=f"{visible(name)} on the meta device",
                fix="load the weights, or pass their path",
            )
        # what reads tensors on demand may put the next one where the last one was
        place = _memory(x)
        kept = firsts.get(place)
        if kept is None or kept[0]() is None:
            kept = firsts[place] = weakref.ref(x), name
        yield Stored(name, str(x.dtype).removeprefix("torch."), _cut(x), kept[1])


def _memory(x: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies; that of a state dict is not the module's own, but lies where it does."""
    local = getattr(x.detach(), "to_local", x.detach)()
    if local.layout != torch.strided or not local.numel():
        return (id(x),)
    return (
        x.device, local.data_ptr(), local.shape, local.stride(), x.shape, x.dtype,
    )


def _cut(x: Tensor) -> Iterator[Tensor]:
    whole = getattr(x.detach(), "full_tensor", None)  # of a DTensor
    if whole is not None:
        x = whole()
    elif x.layout != torch.strided:
        x = x.detach().to_dense()
    for box in boxes(x.shape):
        yield x[box]


def _holds_tensors(x: Any) -> bool:
    if isinstance(x, Mapping):
        return any(isinstance(part, Tensor) or _holds_tensors(part) for part in x.values())
    if isinstance(x, list | tuple):
        return any(isinstance(part, Tensor) or _holds_tensors(part) for part in x)
    return False


def _files(caller: str, argument: str, path: Path) -> dict[Path, set[str]]:
    """The files of a checkpoint, each with the names that an index says it holds."""
    if not path.exists():
        raise input_error(
            caller, argument, expected="a path that exists", got=visible(path),
            fix="download the checkpoint first, and pass its directory",
        )
    if not path.is_dir():
        if not path.is_file() or path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
            raise input_error(
                caller, argument, expected="a directory, or a .safetensors, .bin or .pt file",
                got=visible(path), fix="pass the directory of the checkpoint",
            )
        return {path: set()}
    # .bin files of other names hold the trainer's state
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.pt"):
        if indices := sorted(path.glob(f"{pattern}.index.json")):
            shards: dict[Path, set[str]] = {}
            for index in indices:
                for file, names in _of_index(caller, argument, index).items():
                    shards[file] = shards.get(file, set()) | names
            return shards
        if files := sorted(path.glob(pattern)):
            _check_shards(caller, argument, files)
            return {file: set() for file in files}
    raise input_error(
        caller, argument, expected="a directory with .safetensors files",
        got=f"{visible(path)} without any",
        fix="pass the directory that holds the shards themselves",
    )


def _check_shards(caller: str, argument: str, files: Sequence[Path]) -> None:
    """Raise where files that count themselves, such as x-00001-of-00002, are not all there."""
    numbered = [re.fullmatch(r"(.*)-(\d+)-of-(\d+)", file.stem) for file in files]
    for model, total in {(found[1], found[3]) for found in numbered if found}:
        there = {int(f[2]) for f in numbered if f and (f[1], f[3]) == (model, total)}
        missing = sorted(set(range(1, int(total) + 1)) - there) if int(total) < 10**5 else [0]
        if missing:
            raise input_error(
                caller, argument, expected=f"all of the {total} files that the names count",
                got=f"{visible(files[0].parent)} without number {missing[0]}",
                fix="download the missing shard",
            )


def _of_index(caller: str, argument: str, index: Path) -> dict[Path, set[str]]:
    try:
        files: dict[Path, set[str]] = {}
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for name, file in weight_map.items():
            files.setdefault(index.parent / file, set()).add(name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise _damaged(caller, argument, index, "its weight_map cannot be read") from error
    if not files:
        raise _damaged(caller, argument, index, "its weight_map is empty")
    for file in files:
        if not file.is_file():
            raise input_error(
                caller, argument, expected="a checkpoint with every shard of its index",
                got=f"{visible(index)} without {visible(file.name)}",
                fix="download the missing shard",
            )
    return files


def _of_safetensors(caller: str, argument: str, path: Path) -> Iterator[Stored]:
    safetensors = import_extra(caller, "safetensors", "safetensors")

    def pieces(name: str, shape: list[int]) -> Iterator[Tensor]:
        for box in boxes(shape):
            with safetensors.safe_open(path, framework="pt") as file:
                yield file.get_slice(name)[box]

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: (x.get_dtype(), x.get_shape()) for name, x in slices.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(caller, argument, path, str(error)) from error
    for name, (dtype, shape) in kinds.items():
        yield Stored(name, FLOATS.get(dtype, dtype), pieces(name, shape), name)


def boxes(shape: Sequence[int], entries: int = READ_AT_ONCE) -> Iterator[tuple[slice, ...]]:
    """Indices that cut an array into parts of at most so many entries, in order.

    >>> list(boxes([3, 2], entries=4))
    [(slice(0, 2, None),), (slice(2, 4, None),)]
    >>> list(boxes([1, 3], entries=2))
    [(slice(0, 1, None), slice(0, 2, None)), (slice(0, 1, None), slice(2, 4, None))]
    """
    if math.prod(shape) <= entries:
        yield ()
        return
    row = math.prod(shape[1:])
    step = max(1, entries // row)
    for start in range(0, shape[0], step):
        for box in boxes(shape[1:], entries) if row > entries else [()]:
            yield (slice(start, start + step), *box)


def _of_torch_file(caller: str, argument: str, path: Path) -> Iterator[Stored]:
    try:
        mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # what it raises on damaged files is not documented
        raise _damaged(caller, argument, path, str(error).split("\n")[0]) from error
    if not isinstance(state, Mapping) or not any(isinstance(x, Tensor) for x in state.values()):
        raise input_error(
            caller, argument, expected="a state dict, which maps names to tensors",
            got=f"{describe(state)} in {visible(path)}",
            fix="save model.state_dict() in a file of its own",
        )
    yield from _of_state_dict(caller, argument, state)


def _damaged(caller: str, argument: str, path: Path, reason: str) -> InputError:
    return input_error(
        caller, argument, expected="a checkpoint that can be read",
        got=f"{visible(path)} ({visible(reason)})",
        fix="download it again, or save it again",
    )
