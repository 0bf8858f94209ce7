"""Dumps from files of five formats, row by row, in memory that is bounded by the file's size.

Nothing is ever unpickled, and no header is believed: what a file claims to hold is compared with
how large it is before memory is taken for it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from iscorrect.dumps.dump import (
    IDS,
    PER_CANDIDATE,
    PER_SEQUENCE,
    PER_TOKEN,
    REQUIRED,
    SPREAD,
    LogProbDump,
    Row,
    concatenate,
)
from iscorrect.dumps.names import Array, texts_of
from iscorrect.dumps.rows import DTYPES, canonical, padded, to_numpy
from iscorrect.dumps.trainers import (
    DIALECT_COLUMNS,
    SLIME_COLUMNS,
    Copies,
    OfRank,
    unknown_dialect,
    with_rollouts,
)
from iscorrect.errors import InputError, import_extra, input_error
from iscorrect.text import visible

PIECE_TOKENS = 2**20
PIECE_SEQUENCES = 2**14

PARQUET_ROWS = 16

# Log-probs hardly compress. A file that unpacks to far more than itself is damaged or made to harm.
EXPANSION = 100
SMALL = 2**26
SEQUENCES = 2**20


def read_dump(*paths: str | PathLike[str]) -> LogProbDump:
    """Read dumps into memory; see :func:`stream_dump` for what is accepted.

    Args:
        paths: files, directories of files, or "-" for JSON lines on standard input.

    Returns:
        All their sequences, with the optional fields that every file has.

    Raises:
        InputError: a file that cannot be read, or values that are not what their field says; the
            message names file, row, field and the fix.
    """
    return concatenate(list(stream_dump(*paths)))


def stream_dump(*paths: str | PathLike[str], tokens: int = PIECE_TOKENS) -> Iterator[LogProbDump]:
    """Read dumps piece by piece, in bounded memory.

    The format follows from the suffix: `.parquet`, `.jsonl`, `.npz`, `.safetensors`, or `.pt`.
    The names are those of :class:`LogProbDump`, or those of prime-rl's token exports, NeMo-RL's
    ``train_data_stepN.jsonl``, or what slime and miles write into ``--dump-details``. Arrays are
    padded "b t", or flat with ``cu_seqlens``; in files of rows, each row is a sequence and holds
    lists.

    Args:
        paths: as for :func:`read_dump`.
        tokens: about how many positions, padding included, a piece may hold.

    Yields:
        Dumps of whole sequences; at least one.

    Raises:
        InputError: as for :func:`read_dump`; there is no sequence at all; or a file unpacks to more
            than 64 MiB and a hundred times its size.
    """
    waiting: list[Row] = []
    width = 0
    some = False
    copies = Copies()
    for path in dump_files(*paths):
        for row in _read_rows(path, copies):
            some = True
            length = max(width, len(row["mask"]))
            full = length * (len(waiting) + 1) > tokens or len(waiting) >= PIECE_SEQUENCES
            if waiting and (full or row.keys() != waiting[0].keys()):
                yield padded(waiting)
                waiting, length = [], len(row["mask"])
            waiting.append(row)
            width = length
    if not some and copies.unscored:
        raise unknown_dialect(*copies.unscored, ["log_probs"])
    if not some:
        raise input_error(
            "read_dump", "path", expected="of files with at least one sequence",
            got=f"{', '.join(map(visible, paths)) or 'no path'}, which hold none",
            fix="pass a dump that something was written to",
        )
    yield padded(waiting)


def dump_files(*paths: str | PathLike[str]) -> list[Path]:
    """The files that paths stand for: themselves, or what a directory holds, in order of steps.

    Raises:
        InputError: a path does not exist, is no regular file, a directory holds no dump, or a
            suffix is unknown.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            # of slime's and miles' --dump-details, one folder has the log-probs of both sides
            place = path / "train_data" if (path / "train_data").is_dir() else path
            inside = [p for p in place.rglob("*") if p.suffix in READERS and p.is_file()]
            if not inside:
                raise input_error(
                    "read_dump", "path", expected="a directory with " + ", ".join(READERS),
                    got=f"{visible(place)}, which has none",
                    fix="pass the directory that the trainer wrote",
                )
            found += sorted(inside, key=_natural)
        else:
            _check_file(path)
            found.append(path)
    return found


def _natural(path: Path) -> list[tuple[str, int]]:
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d+|$)", str(path))]


def _check_file(path: Path) -> None:
    if str(path) == "-":
        return
    if path.suffix in (".pkl", ".pickle"):
        raise input_error(
            "read_dump", "path", expected="one of " + ", ".join(READERS),
            got=f"{visible(path)}, a pickle, which runs code when it is read",
            fix="load it where you trust it and save it with iscorrect.dumps.write_dump",
        )
    there = path.exists()
    if path.suffix not in READERS:
        raise input_error(
            "read_dump", "path", expected="a directory, or one of " + ", ".join(READERS),
            got=visible(path) if there else f"{visible(path)}, which is not there",
            fix="save it with iscorrect.dumps.write_dump" if there else "check the path",
        )
    if not path.is_file():
        raise input_error(
            "read_dump", "path", expected="a file or a directory",
            got=f"{visible(path)}, which is {'a pipe or a device' if there else 'not there'}",
            fix="write it to a file first, or pass - for standard input" if there
            else "check the path",
        )


def _read_rows(path: Path, copies: Copies) -> Iterator[Row]:
    """The sequences of one file, canonical and checked, without those that another rank wrote."""
    copies.next_file()
    reader = _jsonl_rows if str(path) == "-" else READERS[path.suffix]
    raw_rows = reader(path)
    for number in itertools.count():
        try:
            raw = next(raw_rows, None)
        except InputError:
            raise
        except OSError as error:
            raise _unreadable(path, number, error, of_system=error.errno is not None) from error
        except Exception as error:  # what the formats' libraries raise is not documented
            raise _unreadable(path, number, error, of_system=False) from error
        if raw is None:
            return
        if not isinstance(raw, Mapping):
            raise unknown_dialect(f"{visible(path)}, row {number}", [type(raw).__name__])
        if copies.again(raw, visible(path)):
            continue
        yield canonical(dict(raw), f"{visible(path)}, row {number}", path)


def _unreadable(path: Path, number: int, error: Exception, *, of_system: bool) -> InputError:
    reason = visible((str(error).strip() or type(error).__name__).splitlines()[0])
    return input_error(
        "read_dump", "path", expected=f"a whole {path.suffix or 'JSON-lines'} file",
        got=f"{visible(path)}, which cannot be read after row {number}: {reason}",
        fix="look whether the file may be read" if of_system
        else "the file is damaged, was cut short, or has another format; write it again",
    )


def check_size(path: Path, *, unpacked: int, sequences: int = 0) -> None:
    """Raise where a file claims to hold more than one of its size can.

    Args:
        path: of the file.
        unpacked: bytes that it claims to hold.
        sequences: how many it claims to hold.
    """
    size = path.stat().st_size
    for claimed, most, unit in (
        (unpacked, max(SMALL, EXPANSION * size), "bytes"),
        (sequences, max(SEQUENCES, size), "sequences"),
    ):
        if claimed > most:
            raise input_error(
                "read_dump", "path", expected=f"a file of at most {most:,} {unit} when unpacked"
                f" (it has {size:,} bytes)", got=f"{visible(path)}, which claims {claimed:,}",
                fix="the file is damaged or was made to fill the memory; write it again",
            )


def _jsonl_rows(path: Path) -> Iterator[Any]:
    if str(path) == "-":
        if sys.stdin is None:
            raise input_error(
                "read_dump", "path", expected="- only where standard input is open",
                got="a closed one", fix="pipe JSON lines into it, or pass a file",
            )
        lines: Any = contextlib.nullcontext(getattr(sys.stdin, "buffer", sys.stdin))
    else:
        lines = path.open("rb")
    with lines as opened:
        for number, line in enumerate(opened):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                place = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                reason = getattr(error, "msg", str(error))
                raise input_error(
                    "read_dump", "path", expected="one JSON object on each line",
                    got=f"{visible(path)}, line {number + 1}{place}: {reason}",
                    fix="the line is cut short or not JSON; write the file again",
                ) from error
            if not isinstance(row, dict):
                raise input_error(
                    "read_dump", "path", expected="one JSON object on each line",
                    got=f"{visible(path)}, line {number + 1}: {type(row).__name__}",
                    fix="write one sequence per line, as an object of lists",
                )
            yield row


def _parquet_rows(path: Path) -> Iterator[Row]:
    parquet = import_extra("read_dump", "pyarrow.parquet", "parquet")
    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        used = [name for name in names if name in COLUMNS]
        if not used:
            raise unknown_dialect(visible(path), names)
        check_size(path, unpacked=0, sequences=file.metadata.num_rows)
        unpacked = 0
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=used, use_threads=False):
            unpacked += batch.nbytes
            check_size(path, unpacked=unpacked)
            columns = {name: batch.column(name) for name in batch.schema.names}
            for i in range(batch.num_rows):
                yield {name: _parquet_value(column[i]) for name, column in columns.items()}


def _parquet_value(scalar: Any) -> Any:
    values = getattr(scalar, "values", None)
    if values is None or callable(values) or hasattr(values, "values"):
        return scalar.as_py()
    return values.to_numpy(zero_copy_only=False)


def _npz_rows(path: Path) -> Iterator[Row]:
    with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
        names = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        used = {name: member for name, member in names.items() if name in ARRAYS}
        check_size(path, unpacked=sum(member.file_size for member in used.values()))
        arrays = {
            name: _NpyStream(stack.enter_context(archive.open(member)), name, path,
                             member.file_size)
            for name, member in used.items()
        }
        yield from _array_rows(arrays, names, path)


class _NpyStream:
    """An array in a zip archive, read from its first row to its last without seeking."""

    def __init__(self, stream: IO[bytes], name: str, path: Path, size: int) -> None:
        version = np.lib.format.read_magic(stream)
        header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        self.shape, fortran, self.dtype = header(stream)
        kind = ""
        if self.dtype.hasobject:
            kind = "pickled objects"
        elif self.dtype.kind not in ("fiubU" if name in IDS else "fiub"):
            kind = str(self.dtype)
        elif fortran and len(self.shape) > 1:
            kind = "Fortran order"
        if kind:
            raise input_error(
                "read_dump", name, expected="an array of numbers in C order",
                got=f"{kind} in {visible(path)}",
                fix="save np.ascontiguousarray(x) of a dtype that numpy has, such as float32",
            )
        held = size - stream.tell()
        claimed = self.dtype.itemsize
        for side in self.shape:
            claimed *= side
        if claimed != held:
            raise EOFError(f"{name} claims {claimed:,} bytes and holds {held:,}")
        self.stream = stream
        self.position = 0

    def __getitem__(self, index: slice) -> Array:
        start, stop, _ = index.indices(self.shape[0])
        stop = max(start, stop)
        row = self.dtype.itemsize
        for side in self.shape[1:]:
            row *= side
        self.stream.read((start - self.position) * row)
        data = self.stream.read((stop - start) * row)
        if len(data) < (stop - start) * row:
            raise EOFError(f"the file ends inside row {start + len(data) // max(row, 1)}")
        self.position = stop
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])


def _safetensors_rows(path: Path) -> Iterator[Row]:
    safetensors = import_extra("read_dump", "safetensors", "safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        names = list(file.keys())
        arrays = {name: _TensorSlice(file.get_slice(name)) for name in names if name in ARRAYS}
        yield from _array_rows(arrays, names, path)


class _TensorSlice:
    def __init__(self, source: Any) -> None:
        self.source = source
        self.shape = tuple(source.get_shape())

    def __getitem__(self, index: slice) -> Array:
        return to_numpy(self.source[index])


def _loaded(path: Path) -> Any:
    """What torch.save wrote: tensors, numbers, lists and dicts."""
    try:
        if not zipfile.is_zipfile(path):
            raise pickle.UnpicklingError("not an archive of torch.save")
        with zipfile.ZipFile(path) as archive:
            check_size(path, unpacked=sum(member.file_size for member in archive.infolist()))
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise input_error(
            "read_dump", "path", expected="tensors, numbers, lists and dicts only",
            got=f"{visible(path)}, which holds other objects or is damaged, and is not unpickled",
            fix="save a dict of tensors, or use iscorrect.dumps.write_dump",
        ) from error


def _pt_rows(path: Path) -> Iterator[Any]:
    content = _loaded(path)
    if not isinstance(content, dict):
        raise unknown_dialect(visible(path), [type(content).__name__])
    if isinstance(content.get("samples"), list):  # slime, format 2
        yield from with_rollouts(content["samples"], lambda: _rollouts(path, content))
    elif isinstance(content.get("rollout_data"), dict):  # slime before it, and miles
        if content.get("cp_size", 1) != 1:
            raise input_error(
                "read_dump", "cp_size", expected="1: files of whole sequences",
                got=f"{content['cp_size']} in {visible(path)}, a rank's shares of sequences",
                fix="dump the steps to be reported with --context-parallel-size 1",
            )
        rows = _slime_columns(content["rollout_data"], path)
        for row in with_rollouts(rows, lambda: _rollouts(path, content)):
            yield OfRank(row, rollout_id=content.get("rollout_id"))
    else:
        tensors = {name: x for name, x in content.items() if isinstance(x, Tensor)}
        used = {name: x for name, x in tensors.items() if name in ARRAYS}
        check_size(path, unpacked=sum(x.numel() * x.element_size() for x in used.values()))
        arrays = {name: _plain(x, name, path) for name, x in used.items()}
        lists = {name: x for name in IDS if isinstance(x := content.get(name), list)}
        arrays |= {name: np.array(x, dtype=object) for name, x in lists.items()}
        yield from _array_rows(arrays, map(str, content), path)


def _rollouts(path: Path, content: dict[Any, Any]) -> list[Any]:
    """The samples of the same step in the folder of rollouts beside the trainer's."""
    beside = path.parent.parent / "rollout_data" / f"{content.get('rollout_id')}.pt"
    if path.parent.name != "train_data" or not beside.is_file():
        return []
    try:
        samples = _loaded(beside)["samples"]
    except (InputError, LookupError, TypeError):  # it may hold pictures, or objects of the user
        return []
    return samples if isinstance(samples, list) else []


def _plain(x: Tensor, name: str, path: Path) -> Array:
    try:
        return to_numpy(x)
    except (TypeError, RuntimeError) as error:
        raise input_error(
            "read_dump", name, expected="a dense tensor of numbers",
            got=f"{error} in {visible(path)}", fix="save x.to_dense(), or x.dequantize()",
        ) from error


def _slime_columns(columns: dict[Any, Any], path: Path) -> Iterator[Row]:
    used = {
        name: x for name, x in columns.items()
        if name in SLIME_COLUMNS and isinstance(x, list | tuple | Tensor)
    }
    count = len(used.get("rollout_log_probs", used.get("tokens", ())))
    for name, x in used.items():
        if len(x) != count:
            raise input_error(
                "read_dump", name, expected=f"{count} rows like the others",
                got=f"{len(x)} in {visible(path)}", fix="the file is incomplete; write it again",
            )
    for i in range(count):
        yield {name: x[i] for name, x in used.items()}


NAMES = "_names"
"""Ends the name of an array that holds an id's texts, as UTF-8 of a JSON list."""

ARRAYS = {*DTYPES, "cu_seqlens", *(name + NAMES for name in IDS)}
COLUMNS = {*DTYPES, *DIALECT_COLUMNS}


def _array_rows(arrays: Mapping[str, Any], known: Iterable[str], path: Path) -> Iterator[Row]:
    """Rows of padded arrays, or of flat ones cut at ``cu_seqlens``.

    Args:
        arrays: those of a dump; each has a shape, and slices of its first axis that move forward.
        known: all names in the file, for the message where some are missing.
        path: of the file.
    """
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        raise unknown_dialect(visible(path), known, missing)
    arrays = _with_texts(arrays, path)
    names = [name for name in arrays if name != "cu_seqlens"]
    if "cu_seqlens" in arrays:
        yield from _flat_rows(arrays, names, path)
        return
    shape = tuple(arrays["mask"].shape)
    if len(shape) != 2:
        raise _shape_error(path, "mask", "of two axes, `b t`", shape)
    _check_shapes(path, names, arrays, count=shape[0], tokens=shape)
    step = max(1, 2**16 // max(1, shape[1]))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        block = {name: arrays[name][start:stop] for name in names}
        for i in range(stop - start):
            yield {name: x[i] for name, x in block.items()}


def _with_texts(arrays: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The arrays without those of texts, ids with theirs."""
    named = {name: x for name, x in arrays.items() if not name.endswith(NAMES)}
    for name in IDS:
        raw = arrays.get(name + NAMES)
        if name in named and raw is not None:
            try:
                texts = json.loads(bytes(raw[0 : raw.shape[0]]).decode())
                if not all(isinstance(text, str) for text in texts):
                    raise TypeError("a list of other things")
            except (ValueError, TypeError, IndexError, RecursionError) as error:
                raise input_error(
                    "read_dump", name + NAMES, expected="the UTF-8 of a JSON list of texts",
                    got=f"{visible(error)} in {visible(path)}",
                    fix=f"save {name} as whole numbers, or write the file with write_dump",
                ) from error
            named[name] = _Texts(named[name], texts, name, path)
    return named


class _Texts:
    """Numbers of texts, read as the texts."""

    def __init__(self, numbers: Any, texts: list[str], name: str, path: Path) -> None:
        self.numbers, self.texts, self.name, self.path = numbers, texts, name, path
        self.shape = numbers.shape

    def __getitem__(self, index: slice) -> Array:
        numbers = np.asarray(self.numbers[index])
        whole = numbers.dtype.kind in "iu"
        if not whole or np.any((numbers < 0) | (numbers >= len(self.texts))):
            raise input_error(
                "read_dump", self.name,
                expected=f"whole numbers below {len(self.texts)}, one for each text of"
                f" {self.name}{NAMES}", got=f"others in {visible(self.path)}",
                fix=f"leave {self.name}{NAMES} out where the numbers are their own",
            )
        return texts_of(numbers, self.texts)


def _flat_rows(arrays: Mapping[str, Any], names: list[str], path: Path) -> Iterator[Row]:
    shape = tuple(arrays["mask"].shape)
    if len(shape) != 1:
        raise _shape_error(path, "mask", "flat where there are `cu_seqlens`", shape)
    ends = _boundaries(arrays["cu_seqlens"], shape[0], path)
    _check_shapes(path, names, arrays, count=len(ends) - 1, tokens=shape)
    of_rows = {n for n in names if _of_rows(n, arrays[n], count=len(ends) - 1, tokens=shape)}
    for i, (start, stop) in enumerate(itertools.pairwise(ends.tolist())):
        yield {
            name: arrays[name][i : i + 1][0] if name in of_rows else arrays[name][start:stop]
            for name in names
        }
    if np.any(arrays["mask"][int(ends[-1]) : shape[0]]):
        raise input_error(
            "read_dump", "cu_seqlens", expected="up to the last counted token",
            got=f"{ends[-1]} as the last, and counted tokens after it in {visible(path)}",
            fix="write the end of every sequence, or mask what follows the last",
        )


def _boundaries(array: Any, tokens: int, path: Path) -> Array:
    shape = tuple(array.shape)
    if len(shape) != 1:
        raise _shape_error(path, "cu_seqlens", "a flat array", shape)
    check_size(path, unpacked=0, sequences=shape[0])
    ends: Array = array[0 : shape[0]]
    whole = ends.dtype.kind in "iu" and len(ends) > 0
    if not whole or ends[0] != 0 or np.any(ends[1:] < ends[:-1]) or ends[-1] > tokens:
        raise input_error(
            "read_dump", "cu_seqlens", expected=f"whole numbers rising from 0 to at most {tokens}",
            got=f"{ends[:3].tolist()} … {ends[-1:].tolist()} in {visible(path)}",
            fix="write the cumulative lengths of the sequences, beginning with 0",
        )
    return ends


def _check_shapes(
    path: Path, names: list[str], arrays: Mapping[str, Any], *, count: int, tokens: tuple[int, ...]
) -> None:
    check_size(path, unpacked=0, sequences=count)
    for name in names:
        shape = tuple(arrays[name].shape)
        if _of_rows(name, arrays[name], count=count, tokens=tokens) and shape == (count,):
            continue
        if name in PER_SEQUENCE and shape != (count,):
            raise _shape_error(path, name, f"of shape {(count,)}", shape)
        if name in PER_TOKEN and shape != tokens:
            raise _shape_error(path, name, f"of shape {tokens} like `mask`", shape)
        if name in PER_CANDIDATE and (shape[:-1] != tokens or not shape):
            raise _shape_error(path, name, f"of shape {tokens} and an axis of candidates", shape)


def _of_rows(name: str, array: Any, *, count: int, tokens: tuple[int, ...]) -> bool:
    """Whether an array holds one value for each sequence."""
    shape = tuple(array.shape)
    return name in PER_SEQUENCE or (name in SPREAD and shape == (count,) != tokens)


def _shape_error(path: Path, name: str, expected: str, shape: tuple[int, ...]) -> InputError:
    return input_error(
        "read_dump", name, expected=expected, got=f"{shape} in {visible(path)}",
        fix="write padded `b t` arrays, or flat ones with `cu_seqlens`",
    )


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".parquet": _parquet_rows,
    ".jsonl": _jsonl_rows,
    ".npz": _npz_rows,
    ".safetensors": _safetensors_rows,
    ".pt": _pt_rows,
}
