"""The tensors of a model, one after the other: of a module, a state dict, or files.

`.safetensors` files are read piece by piece and closed after each, since what is mapped of an open
file counts as the process's memory.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iscorrect.errors import InputError, describe, input_error

FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
PIECE = 2**23

Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]


class Stored(NamedTuple):
    """A tensor that has not been read yet."""

    name: str
    dtype: str
    pieces: Iterator[Tensor]


def stored(caller: str, source: Source) -> Iterator[Stored]:
    """The tensors of a model, in its order; a tied one once.

    Args:
        caller: what messages begin with.
        source: a module; a state dict; a `.safetensors`, `.bin` or `.pt` file; a directory with
            such files, or with an index of `.safetensors` files.

    Raises:
        InputError: what is not there, cannot be read, or holds no tensors.

    >>> [(x.name, x.dtype) for x in stored("f", nn.Linear(2, 3))]
    [('weight', 'float32'), ('bias', 'float32')]
    """
    if isinstance(source, nn.Module):
        yield from _of_state_dict(caller, source.state_dict(keep_vars=True))
    elif isinstance(source, Mapping):
        yield from _of_state_dict(caller, source)
    elif isinstance(source, str | os.PathLike):
        for path, names in _files(caller, Path(source)).items():
            reader = _of_safetensors if path.suffix == ".safetensors" else _of_torch_file
            found = set()
            for tensor in reader(caller, path):
                found.add(tensor.name)
                yield tensor
            if missing := sorted(names - found):
                raise _unreadable(caller, path, f"{missing[0]} is not in it, though the index says")
    else:
        raise input_error(
            caller, "source", expected="a module, a state dict, or a path", got=describe(source),
            fix="pass the model, model.state_dict(), or the directory of the checkpoint",
        )


def _of_state_dict(caller: str, state: Mapping[str, Any]) -> Iterator[Stored]:
    seen: set[int] = set()
    for name, x in state.items():
        if id(x) in seen:
            continue
        seen.add(id(x))
        if not isinstance(x, Tensor):
            yield Stored(name, type(x).__name__, iter(()))
            continue
        if x.is_meta:
            raise input_error(
                caller, "source", expected="a model whose weights are loaded",
                got=f"{name} on the meta device", fix="load the weights, or pass their path",
            )
        yield Stored(name, str(x.dtype).removeprefix("torch."), iter([x]))


def _files(caller: str, path: Path) -> dict[Path, set[str]]:
    """The files of a checkpoint, each with the names that an index says it holds."""
    if not path.exists():
        raise input_error(
            caller, "source", expected="a path that exists", got=str(path),
            fix="download the checkpoint first, and pass its directory",
        )
    if not path.is_dir():
        if path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
            raise input_error(
                caller, "source", expected="a directory, or a .safetensors, .bin or .pt file",
                got=str(path), fix="pass the directory of the checkpoint",
            )
        return {path: set()}
    for index in sorted(path.glob("*.safetensors.index.json")):
        return _of_index(caller, index)
    # .bin files of other names hold the trainer's state
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.pt"):
        if files := sorted(path.glob(pattern)):
            return {file: set() for file in files}
    raise input_error(
        caller, "source", expected="a directory with .safetensors files", got=f"{path} without any",
        fix="pass the directory that holds the shards themselves",
    )


def _of_index(caller: str, index: Path) -> dict[Path, set[str]]:
    try:
        files: dict[Path, set[str]] = {}
        for name, file in json.loads(index.read_text())["weight_map"].items():
            files.setdefault(index.parent / file, set()).add(name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _unreadable(caller, index, "its weight_map cannot be read") from error
    for file in files:
        if not file.exists():
            raise input_error(
                caller, "source", expected="a checkpoint with every shard of its index",
                got=f"{index} without {file.name}", fix="download the missing shard",
            )
    return files


def _of_safetensors(caller: str, path: Path) -> Iterator[Stored]:
    try:
        safetensors: Any = importlib.import_module("safetensors")
    except ImportError as error:
        raise input_error(
            caller, "source", expected="of a format whose package is installed (safetensors)",
            got=str(path), fix="pip install 'iscorrect[safetensors]'",
        ) from error

    def pieces(name: str, shape: list[int]) -> Iterator[Tensor]:
        for box in boxes(shape):
            with safetensors.safe_open(path, framework="pt") as file:
                yield file.get_slice(name)[box]

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: (x.get_dtype(), x.get_shape()) for name, x in slices.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise _unreadable(caller, path, str(error)) from error
    for name, (dtype, shape) in kinds.items():
        yield Stored(name, FLOATS.get(dtype, dtype), pieces(name, shape))


def boxes(shape: Sequence[int], entries: int = PIECE) -> Iterator[tuple[slice, ...]]:
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


def _of_torch_file(caller: str, path: Path) -> Iterator[Stored]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise _unreadable(caller, path, str(error).split("\n")[0]) from error
    if not isinstance(state, Mapping) or not any(isinstance(x, Tensor) for x in state.values()):
        raise input_error(
            caller, "source", expected="a state dict, which maps names to tensors",
            got=f"{describe(state)} in {path}", fix="save model.state_dict() in a file of its own",
        )
    yield from _of_state_dict(caller, state)


def _unreadable(caller: str, path: Path, reason: str) -> InputError:
    return input_error(
        caller, "source", expected="a checkpoint that can be read", got=f"{path} ({reason})",
        fix="download it again, or save it again",
    )
