"""Log-probs on disk: one form in memory, five file formats, and what three trainers write.

A dump holds, for each sequence, the log-probs that the rollout engine reported and those that the
trainer gave to the same tokens. Reading streams row by row, so a dump may be larger than memory;
writing replaces whole files, so nobody ever sees half of one. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from iscorrect.dumps.dump import (
    LOG_PROBS,
    PER_CANDIDATE,
    PER_SEQUENCE,
    PER_TOKEN,
    REQUIRED,
    Array,
    LogProbDump,
    Row,
    concatenate,
)
from iscorrect.dumps.trainers import translated, unknown_dialect
from iscorrect.errors import InputError, input_error

CHUNK = 2**20

# A 16-bit head rounds its logits after the log-sum-exp, so that log-probs may come out above 0 by
# as much as the spacing of large logits. What lies beyond is not a log-prob.
HIGHEST_LOG_PROB = 0.25


def read_dump(*paths: str | os.PathLike[str]) -> LogProbDump:
    """Read dumps into memory; see :func:`stream_dump` for what is accepted.

    Args:
        paths: files, directories of files, or "-" for JSON lines on standard input.

    Returns:
        All their sequences, with the optional fields that every file has.

    Raises:
        InputError: a file that cannot be read, or values that cannot be log-probs; the message
            names file, row, field and the fix.
    """
    return concatenate(list(stream_dump(*paths)))


def stream_dump(*paths: str | os.PathLike[str], tokens: int = CHUNK) -> Iterator[LogProbDump]:
    """Read dumps piece by piece, in bounded memory.

    The format follows from the suffix: `.parquet`, `.jsonl`, `.npz`, `.safetensors`, or `.pt`.
    The names are those of :class:`LogProbDump`, or those of prime-rl's token exports, NeMo-RL's
    ``train_data_stepN.jsonl``, or slime's ``--dump-details``. Arrays are padded "b t", or flat with
    ``cu_seqlens``; in files of rows, each row is a sequence and holds lists.

    Args:
        paths: as for :func:`read_dump`.
        tokens: about how many positions, padding included, a piece may hold.

    Yields:
        Dumps of whole sequences.
    """
    waiting: list[Row] = []
    width = 0
    for path in dump_files(*paths):
        for row in read_rows(path):
            length = max(width, len(row["mask"]))
            full = len(waiting) > 0 and length * (len(waiting) + 1) > tokens
            if full or (waiting and row.keys() != waiting[0].keys()):
                yield _pad(waiting)
                waiting, length = [], len(row["mask"])
            waiting.append(row)
            width = length
    if waiting:
        yield _pad(waiting)


def dump_files(*paths: str | os.PathLike[str]) -> list[Path]:
    """The files that paths stand for: themselves, or what a directory holds, in order of steps.

    Raises:
        InputError: a path does not exist, a directory holds no dump, or a suffix is unknown.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.suffix in READERS and p.is_file()]
            if not inside:
                raise input_error(
                    "read_dump", "path", expected="a directory with " + ", ".join(READERS),
                    got=f"{path}, which has none", fix="pass the directory that the trainer wrote",
                )
            found += sorted(inside, key=_natural)
        else:
            _check_file(path)
            found.append(path)
    return found


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(s or 0), t) for t, s in re.findall(r"(\D+)(\d*)", str(path))]


def _check_file(path: Path) -> None:
    if str(path) == "-":
        return
    if path.suffix in (".pkl", ".pickle"):
        raise input_error(
            "read_dump", "path", expected="one of " + ", ".join(READERS),
            got=f"{path}, a pickle, which runs code when it is read",
            fix="load it where you trust it and save it with iscorrect.dumps.write_dump",
        )
    if path.suffix not in READERS:
        raise input_error(
            "read_dump", "path", expected="one of " + ", ".join(READERS), got=str(path),
            fix="save it with iscorrect.dumps.write_dump",
        )
    if not path.exists():
        raise input_error(
            "read_dump", "path", expected="a file or a directory",
            got=f"{path}, which is not there", fix="check the path",
        )


def read_rows(path: Path) -> Iterator[Row]:
    """The sequences of one file, canonical and checked."""
    reader = _jsonl_rows if str(path) == "-" else READERS[path.suffix]
    number = 0
    try:
        for number, raw in enumerate(reader(path)):
            yield _canonical(raw, f"{path}, row {number}", path)
    except InputError:
        raise
    except _unreadable() as error:
        first_line = str(error).strip().split("\n")[0] or type(error).__name__
        raise input_error(
            "read_dump", "path", expected=f"a whole {path.suffix or 'JSON-lines'} file",
            got=f"{path}, which cannot be read after row {number}: {first_line}",
            fix="the file is damaged or was cut short; write it again",
        ) from error


def _unreadable() -> tuple[type[Exception], ...]:
    """What the readers' libraries raise on a damaged file."""
    errors: list[type[Exception]] = [
        OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error,
        pickle.UnpicklingError,
    ]
    for module, name in (("safetensors", "SafetensorError"), ("pyarrow.lib", "ArrowException")):
        if module in sys.modules:
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with contextlib.nullcontext(sys.stdin) if str(path) == "-" else path.open() as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise input_error(
                    "read_dump", "path", expected="one JSON object on each line",
                    got=f"{path}, line {number + 1}, column {error.colno}: {error.msg}",
                    fix="the line is cut short or not JSON; write the file again",
                ) from error
            if not isinstance(row, dict):
                raise input_error(
                    "read_dump", "path", expected="one JSON object on each line",
                    got=f"{path}, line {number + 1}: {type(row).__name__}",
                    fix="write one sequence per line, as an object of lists",
                )
            yield row


def _parquet_rows(path: Path) -> Iterator[Row]:
    parquet = _needs("pyarrow.parquet", "parquet", path)
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            columns = {name: batch.column(name) for name in batch.schema.names}
            for i in range(batch.num_rows):
                yield {name: _parquet_value(column[i]) for name, column in columns.items()}


def _parquet_value(scalar: Any) -> Any:
    values = getattr(scalar, "values", None)
    if values is None:
        return scalar.as_py()
    nested = hasattr(values, "values")
    return scalar.as_py() if nested else values.to_numpy(zero_copy_only=False)


def _npz_rows(path: Path) -> Iterator[Row]:
    with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
        arrays = {}
        for member in archive.namelist():
            stream = stack.enter_context(archive.open(member))
            arrays[member.removesuffix(".npy")] = _NpyStream(stream, f"{path}, {member}")
        yield from _array_rows(arrays, path)


class _NpyStream:
    """An array in a zip archive, read from its first row to its last without seeking."""

    def __init__(self, stream: IO[bytes], where: str) -> None:
        version = np.lib.format.read_magic(stream)
        header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        self.shape, fortran, self.dtype = header(stream)
        if self.dtype.hasobject or (fortran and len(self.shape) > 1):
            raise input_error(
                "read_dump", "path", expected="arrays of numbers in C order",
                got=f"{where}: {'pickled objects' if self.dtype.hasobject else 'Fortran order'}",
                fix="save np.ascontiguousarray(x) of a numeric dtype",
            )
        self.stream = stream
        self.position = 0

    def __getitem__(self, index: slice) -> Array:
        start, stop, _ = index.indices(self.shape[0])
        row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        self.stream.read((start - self.position) * row)
        data = self.stream.read((stop - start) * row)
        if len(data) < (stop - start) * row:
            raise EOFError(f"the file ends inside row {start + len(data) // max(row, 1)}")
        self.position = stop
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])


def _safetensors_rows(path: Path) -> Iterator[Row]:
    safetensors = _needs("safetensors", "safetensors", path)
    with safetensors.safe_open(path, framework="pt") as file:
        arrays = {name: _TensorSlice(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
        yield from _array_rows(arrays, path)


class _TensorSlice:
    def __init__(self, source: Any) -> None:
        self.source = source
        self.shape = tuple(source.get_shape())

    def __getitem__(self, index: slice) -> Array:
        return _numpy(self.source[index])


def _pt_rows(path: Path) -> Iterator[Row]:
    try:
        if not zipfile.is_zipfile(path):
            raise pickle.UnpicklingError("not an archive of torch.save")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise input_error(
            "read_dump", "path", expected="tensors, numbers, lists and dicts only",
            got=f"{path}, which holds other objects or is damaged, and is not unpickled",
            fix="save a dict of tensors, or use iscorrect.dumps.write_dump",
        ) from error
    if not isinstance(content, dict):
        raise unknown_dialect(f"{path}", [type(content).__name__])
    if isinstance(content.get("samples"), list):  # slime, format 2
        yield from content["samples"]
    elif isinstance(content.get("rollout_data"), dict):  # slime before it
        columns = content["rollout_data"]
        kept = {n: x for n, x in columns.items() if isinstance(x, (list, tuple, Tensor))}
        for values in zip(*kept.values(), strict=False):
            yield dict(zip(kept, values, strict=True))
    else:
        arrays = {name: _numpy(x) for name, x in content.items() if isinstance(x, Tensor)}
        yield from _array_rows(arrays, path)


def _array_rows(arrays: Mapping[str, Any], path: Path) -> Iterator[Row]:
    """Rows of padded arrays, or of flat ones cut at ``cu_seqlens``."""
    names = [n for n in arrays if n in PER_TOKEN or n in PER_CANDIDATE or n in PER_SEQUENCE]
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise unknown_dialect(str(path), list(arrays), missing)
    if "cu_seqlens" in arrays:
        ends = arrays["cu_seqlens"][:].tolist()
        _check_cu_seqlens(path, ends, arrays["rollout_log_probs"].shape[0])
    else:
        ends = None
    count = arrays["mask"].shape[0] if ends is None else len(ends) - 1
    for name in names:
        _check_array_shape(path, name, arrays, count, flat=ends is not None)
    step = 1 if ends is not None else max(1, 2**16 // max(1, int(arrays["mask"].shape[1])))
    for start in range(0, count, step):
        stop = min(start + step, count)
        block = {}
        for name in names:
            if ends is None or name in PER_SEQUENCE:
                block[name] = arrays[name][start:stop]
            else:
                block[name] = arrays[name][ends[start] : ends[stop]][None]
        for i in range(stop - start):
            yield {name: x[i] for name, x in block.items()}


def _check_cu_seqlens(path: Path, ends: list[int], tokens: int) -> None:
    rising = all(a <= b for a, b in itertools.pairwise(ends))
    if not ends or ends[0] != 0 or not rising or ends[-1] > tokens:
        raise input_error(
            "read_dump", "cu_seqlens", expected=f"rising from 0 to at most {tokens} tokens",
            got=f"{ends[:3]} … {ends[-1:]} in {path}",
            fix="write the cumulative lengths of the sequences, beginning with 0",
        )


def _check_array_shape(
    path: Path, name: str, arrays: Mapping[str, Any], count: int, *, flat: bool
) -> None:
    shape = tuple(arrays[name].shape)
    tokens = tuple(arrays["mask"].shape[: 1 if flat else 2])
    if name in PER_SEQUENCE:
        fits, expected = shape == (count,), str((count,))
    elif name in PER_CANDIDATE:
        fits, expected = shape[:-1] == tokens, f"{tokens} and a last axis of candidates"
    else:
        fits, expected = shape == tokens and len(shape) == (1 if flat else 2), str(tokens)
    if not fits:
        raise input_error(
            "read_dump", name, expected=f"of shape {expected} like `mask`",
            got=f"{shape} in {path}",
            fix="write padded `b t` arrays, or flat ones with `cu_seqlens`",
        )


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".parquet": _parquet_rows,
    ".jsonl": _jsonl_rows,
    ".npz": _npz_rows,
    ".safetensors": _safetensors_rows,
    ".pt": _pt_rows,
}


def _canonical(raw: Row, where: str, path: Path) -> Row:
    row = translated(raw, where, path)
    canonical: Row = {}
    for name, dtype in PER_TOKEN.items():
        if row.get(name) is not None:
            canonical[name] = _values(row[name], dtype, name, where)
    for name in REQUIRED:
        if name not in canonical or canonical[name].ndim != 1:
            raise input_error(
                "read_dump", name, expected="a list of numbers, one for each token",
                got=f"{type(row.get(name)).__name__} in {where}",
                fix="write one flat list per sequence",
            )
    length = len(canonical["mask"])
    for name, x in canonical.items():
        if x.ndim == 0 and name == "advantages":
            canonical[name] = np.full(length, x)
        elif x.shape != (length,):
            raise input_error(
                "read_dump", name, expected=f"{length} numbers like `mask`",
                got=f"{'×'.join(map(str, x.shape))} in {where}",
                fix="write every list of a sequence over the same tokens",
            )
    for name, dtype in PER_CANDIDATE.items():
        if row.get(name) is not None:
            canonical[name] = _values(row[name], dtype, name, where).reshape(length, -1)
    for name in PER_SEQUENCE:
        if row.get(name) is not None:
            canonical[name] = int(row[name])
    _check_log_probs(canonical, where)
    return canonical


def _values(x: Any, dtype: Any, name: str, where: str) -> Array:
    try:
        values = _numpy(x) if isinstance(x, Tensor) else np.asarray(x)
        if values.dtype == object:  # null stands for NaN
            values = np.asarray(x, dtype=np.float64)
        if values.dtype.kind not in "fiub":
            raise ValueError(f"{values.dtype}")
    except (ValueError, TypeError) as error:
        raise input_error(
            "read_dump", name, expected="numbers in lists of equal length",
            got=f"{str(error).splitlines()[0]} in {where}", fix="write one number per token",
        ) from error
    return values.astype(dtype, copy=False)


def _check_log_probs(row: Row, where: str) -> None:
    counted = row["mask"]
    for name in LOG_PROBS[:3]:
        if name not in row:
            continue
        x = row[name]
        good = np.isfinite(x) & (x <= HIGHEST_LOG_PROB)
        if not (good | ~counted).all():
            t = int(np.flatnonzero(~good & counted)[0])
            fix = "mask the token out, and find out why it has no log-prob"
            if x[t] > HIGHEST_LOG_PROB:
                fix = "write log-probs: negate negative log-likelihoods, and do not write logits"
            raise input_error(
                "read_dump", name, expected="finite and at most 0 where the mask is 1",
                got=f"{x[t]} at token {t} in {where}", fix=fix,
            )


def _numpy(x: Tensor) -> Array:
    x = x.detach().cpu()
    array: Array = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return array


def _pad(rows: Sequence[Row]) -> LogProbDump:
    width = max(len(row["mask"]) for row in rows)
    tensors = {}
    for name, first in rows[0].items():
        if name in PER_SEQUENCE:
            tensors[name] = torch.tensor([row[name] for row in rows])
            continue
        deep = first.shape[1:]
        if name in PER_CANDIDATE:
            deep = (max(row[name].shape[1] for row in rows),)
        padded = np.zeros((len(rows), width, *deep), first.dtype)
        if name == "top_k_log_probs":
            padded[:] = -np.inf
        for i, row in enumerate(rows):
            x = row[name]
            if x.ndim == 1:
                padded[i, : len(x)] = x
            else:
                padded[i, : len(x), : x.shape[1]] = x
        tensors[name] = torch.from_numpy(padded)
    return LogProbDump(**tensors)


def write_dump(dump: LogProbDump, path: str | os.PathLike[str]) -> None:
    """Write a dump in the format of the suffix; the file appears whole or not at all.

    Args:
        dump: what to write. Log-probs are stored in float32; positions after the last counted
            token of a sequence are left out.
        path: ends in `.parquet`, `.jsonl`, `.npz`, `.safetensors`, or `.pt`.

    Raises:
        InputError: another suffix, or a missing package.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise input_error(
            "write_dump", "path", expected="one of " + ", ".join(WRITERS), got=str(path),
            fix="end the name with .parquet, or with .npz where pyarrow is not installed",
        )
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        WRITERS[path.suffix](dump, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _rows_of(dump: LogProbDump) -> Iterator[Row]:
    arrays = {name: _numpy(x) for name, x in dump.given().items()}
    arrays = {
        name: x.astype(PER_TOKEN.get(name, PER_CANDIDATE.get(name, x.dtype)), copy=False)
        for name, x in arrays.items()
    }
    for i, mask in enumerate(arrays["mask"]):
        counted = np.flatnonzero(mask)
        length = int(counted[-1]) + 1 if len(counted) else 0
        yield {n: int(x[i]) if n in PER_SEQUENCE else x[i, :length] for n, x in arrays.items()}


def _flat(dump: LogProbDump) -> dict[str, Array]:
    rows = list(_rows_of(dump))
    flat = {
        name: np.array([row[name] for row in rows], np.int64)
        if name in PER_SEQUENCE
        else np.concatenate([row[name] for row in rows])
        for name in dump.given()
    }
    return flat | {"cu_seqlens": np.cumsum([0, *(len(row["mask"]) for row in rows)])}


def _write_npz(dump: LogProbDump, path: Path) -> None:
    arrays: dict[str, Any] = _flat(dump)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _write_safetensors(dump: LogProbDump, path: Path) -> None:
    numpy = _needs("safetensors.numpy", "safetensors", path)
    numpy.save_file(_flat(dump), path)


def _write_pt(dump: LogProbDump, path: Path) -> None:
    torch.save({name: torch.from_numpy(x) for name, x in _flat(dump).items()}, path)


def _write_parquet(dump: LogProbDump, path: Path) -> None:
    parquet = _needs("pyarrow.parquet", "parquet", path)
    pyarrow = _needs("pyarrow", "parquet", path)
    rows = list(_rows_of(dump))
    columns = {
        name: [x.tolist() if x.ndim > 1 else x for x in values]
        if name not in PER_SEQUENCE
        else values
        for name in dump.given()
        if (values := [row[name] for row in rows])
    }
    kinds = {np.float32: pyarrow.float32(), np.bool_: pyarrow.bool_(), np.int64: pyarrow.int64()}
    types = {name: pyarrow.list_(kinds[kind]) for name, kind in PER_TOKEN.items()}
    types |= {n: pyarrow.list_(pyarrow.list_(kinds[kind])) for n, kind in PER_CANDIDATE.items()}
    types |= dict.fromkeys(PER_SEQUENCE, pyarrow.int64())
    schema = pyarrow.schema([(name, types[name]) for name in columns])
    parquet.write_table(pyarrow.table(columns, schema=schema), path)


def _write_jsonl(dump: LogProbDump, path: Path) -> None:
    with path.open("w") as file:
        for row in _rows_of(dump):
            file.write(json.dumps({name: _json_value(x) for name, x in row.items()}) + "\n")


def _json_value(x: Any) -> Any:
    if not isinstance(x, np.ndarray):
        return x
    if x.ndim > 1:
        return [_json_value(part) for part in x]
    if x.dtype != np.float32:
        return x.tolist()
    # the fewest digits that read back as the same float32
    return [float(text) if text not in ("nan", "inf", "-inf") else None for text in x.astype(str)]


WRITERS: dict[str, Callable[[LogProbDump, Path], None]] = {
    ".parquet": _write_parquet,
    ".jsonl": _write_jsonl,
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
    ".pt": _write_pt,
}


class DumpWriter:
    """Writes one file for each call, from a training loop; ranks never share a file.

    Args:
        directory: made where it does not exist.
        suffix: the format, as for :func:`write_dump`.

    Raises:
        InputError: an unknown suffix.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> DumpWriter(directory).write(
    ...     step=3, mask=torch.tensor([[True]]), rollout_log_probs=torch.tensor([[-1.0]]),
    ...     old_log_probs=torch.tensor([[-1.1]]),
    ... ).name
    'step_000003_rank_0.npz'
    """

    def __init__(self, directory: str | os.PathLike[str], *, suffix: str = ".npz") -> None:
        if suffix not in WRITERS:
            raise input_error(
                "DumpWriter", "suffix", expected="one of " + ", ".join(WRITERS), got=repr(suffix),
                fix="pass suffix='.npz'",
            )
        self.directory = Path(directory)
        self.suffix = suffix
        self.directory.mkdir(parents=True, exist_ok=True)

    def write(self, *, step: int, mask: Tensor, **tensors: Tensor | None) -> Path:
        """Write one batch.

        Args:
            step: of the training run; writing a step again replaces it.
            mask: bool "b t".
            tensors: the other fields of :class:`LogProbDump`, on any device; None is left out.

        Returns:
            The file.
        """
        # On the host first: a tensor that carries gradient is data here.
        detached = {n: x.detach().cpu() for n, x in tensors.items() if x is not None}
        steps = torch.full((len(mask),), step)
        dump = LogProbDump(mask=mask.cpu(), step=steps, **detached)
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        path = self.directory / f"step_{step:06d}_rank_{rank}{self.suffix}"
        write_dump(dump, path)
        return path


def _needs(module: str, extra: str, path: Path) -> Any:
    """A module of an optional package."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise input_error(
            "dumps", "path", expected=f"of a format whose package is installed ({extra})",
            got=str(path), fix=f"pip install 'iscorrect[{extra}]'",
        ) from error
