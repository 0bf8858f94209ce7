"""Sequences of a dump one by one: from what a file holds to checked arrays, and back to a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iscorrect.dumps.dump import (
    IDS,
    LOG_PROBS,
    PER_CANDIDATE,
    PER_SEQUENCE,
    PER_TOKEN,
    REQUIRED,
    SPREAD,
    TOP,
    LogProbDump,
    Row,
)
from iscorrect.dumps.names import Array, as_texts, is_unicode, numbered, texts_of
from iscorrect.dumps.trainers import translated
from iscorrect.errors import input_error
from iscorrect.text import visible

# A 16-bit head rounds its logits after the log-sum-exp, so that log-probs may come out above 0 by
# as much as the spacing of large logits. What lies beyond is not a log-prob.
HIGHEST_LOG_PROB = 0.25

# Of a masked logit, such as -1e30 or the least float32, the log-prob is none either.
LOWEST_LOG_PROB = -1e4

DTYPES: dict[str, Any] = {
    **PER_TOKEN, **PER_CANDIDATE, **dict.fromkeys(PER_SEQUENCE, np.int64),
}


def canonical(raw: Row, where: str, path: Path) -> Row:
    """One sequence under the names of a dump, checked.

    Args:
        raw: as a reader gives it, in any dialect.
        where: file and row, for messages.
        path: of the file, which may name the step.

    Raises:
        InputError: a value is missing or is not what its field holds.
    """
    given = translated(raw, where, path)
    arrays = {
        name: values(given[name], name, where) for name in DTYPES if given.get(name) is not None
    }
    if "version" not in arrays and np.ndim(arrays.get("policy_version", 0)):
        arrays["version"] = arrays.pop("policy_version")
    for name in REQUIRED:
        if name not in arrays or arrays[name].ndim != 1:
            raise input_error(
                "read_dump", name, expected="a list of numbers, one for each token",
                got=f"{type(given.get(name)).__name__} in {where}",
                fix="write one flat list per sequence",
            )
    length = len(arrays["mask"])
    row: Row = {}
    for name, x in arrays.items():
        if name in PER_SEQUENCE:
            row[name] = _of_sequence(x, name, where)
        elif name in SPREAD and x.ndim == 0:
            row[name] = np.full(length, x)
        elif name in PER_CANDIDATE and x.shape == (0,):  # lists of candidates for no token
            row[name] = x.reshape(0, 0)
        else:
            row[name] = x
            axes = 2 if name in PER_CANDIDATE else 1
            if x.ndim != axes or len(x) != length:
                raise input_error(
                    "read_dump", name,
                    expected=f"{length} {'numbers' if axes == 1 else 'lists'} like `mask`",
                    got=f"{'×'.join(map(str, x.shape)) or 'one'} in {where}",
                    fix="write every list of a sequence over the same tokens",
                )
    check_log_probs("read_dump", row, where)
    return row


def _of_sequence(x: Array, name: str, where: str) -> int | str:
    if x.ndim:
        raise input_error(
            "read_dump", name, expected="one whole number for the sequence",
            got=f"{'×'.join(map(str, x.shape))} numbers in {where}",
            fix="write one number for each sequence",
        )
    value: int | str = x.item()
    return value


def values(x: Any, name: str, where: str) -> Array:
    """An array of the field's dtype, if that holds what was given; of texts where an id is text.

    Raises:
        InputError: text, a mask of other values than 0 and 1, a fraction or null for a whole
            number, or what the dtype cannot hold.

    >>> values([1, 0.0], "mask", "row 0"), values([None, -1.5], "old_log_probs", "row 0")
    (array([ True, False]), array([ nan, -1.5], dtype=float32))
    """
    if name in IDS and (texts := _texts(x, name, where)) is not None:
        return texts
    dtype = np.dtype(DTYPES[name])
    kinds = "fiub" if dtype.kind == "b" else "fiu"
    try:
        array = to_numpy(x) if isinstance(x, Tensor) else np.asarray(x)
        if array.dtype == object:  # null stands for NaN
            if not all(v is None or isinstance(v, int | float) for v in array.ravel()):
                raise ValueError("text, or lists of several lengths")
            array = array.astype(np.float64)
        if array.dtype.kind not in kinds and array.size:
            text = f"the text {x!r}" if isinstance(x, str) else "text"
            raise ValueError(text if array.dtype.kind in "SU" else f"{array.dtype} values")
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        what = "whole numbers" if dtype.kind == "i" else "numbers"
        raise input_error(
            "read_dump", name, expected=f"{what} in lists of equal length",
            got=f"{str(error).splitlines()[0]} in {where}",
            fix="write one number for each sequence" if name in PER_SEQUENCE
            else "write one number per token",
        ) from error
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        held = array.astype(dtype)
        if dtype.kind == "b":
            good, expected = (array == 0) | (array == 1), "0 or 1"
        elif dtype.kind == "i":
            # float64 holds every whole number up to 2**53 only
            exact = np.abs(array) <= 2**53 if array.dtype.kind == "f" else held >= 0
            good = (held == array) & (exact | (array.dtype.kind == "i"))
            expected = "whole numbers below 2**63"
        elif name in (*LOG_PROBS, TOP):
            return held  # checked where the mask is known, or -inf, which is what it amounts to
        else:
            good, expected = np.isfinite(held) | ~np.isfinite(array), "numbers that float32 holds"
    if not good.all():
        at = np.argwhere(~good)[0]
        place = f" at token {at[0]}" if len(at) else ""
        raise input_error(
            "read_dump", name, expected=expected, got=f"{array[tuple(at)]}{place} in {where}",
            fix="find out what wrote it; every value must be what its field says",
        )
    return held


def _texts(x: Any, name: str, where: str) -> Array | None:
    """Ids as an array of str; None where none of them is text."""
    if isinstance(x, Tensor) or getattr(x, "dtype", np.dtype(object)).kind not in "OU":
        return None
    array = np.asarray(x, dtype=object)
    items = array.ravel().tolist()
    if not any(isinstance(item, str) for item in items):
        return None
    for item in items:
        whole = isinstance(item, int | np.integer) and not isinstance(item, bool)
        if not whole and not (isinstance(item, str) and is_unicode(item)):
            raise input_error(
                "read_dump", name, expected="whole numbers, or text that UTF-8 can hold",
                got=f"{visible(repr(item))} in {where}", fix="write one id for each, all of a kind",
            )
    return as_texts(array)


def check_log_probs(caller: str, row: Row, where: str) -> None:
    """Raise where a counted token has a finite number that is no log-prob."""
    counted = row["mask"]
    for name in LOG_PROBS:
        if name not in row:
            continue
        x = row[name]
        bad = is_wrong(x) & counted
        if bad.any():
            t = int(np.flatnonzero(bad)[0])
            fix = "write null or NaN where a log-prob is missing, which is then counted"
            if x[t] > HIGHEST_LOG_PROB and 2 * bad.sum() >= counted.sum():
                fix = "write log-probs: negate negative log-likelihoods, and do not write logits"
            raise input_error(
                caller, name, expected="at most 0, and a log-prob where the mask is 1",
                got=f"{x[t]} at token {t} in {where}, in {bad.sum()} of its {counted.sum()} tokens",
                fix=fix,
            )


def is_wrong(x: Any) -> Any:
    """Where finite values cannot be log-probs of sampled tokens; array or tensor of bool."""
    return (abs(x) < np.inf) & ((x > HIGHEST_LOG_PROB) | (x < LOWEST_LOG_PROB))


def to_numpy(x: Tensor) -> Array:
    """A tensor on the host; what numpy has no dtype for becomes float32.

    Raises:
        TypeError: it is sparse or quantised.
    """
    if x.layout != torch.strided or x.is_quantized:
        raise TypeError("a sparse or quantised tensor")
    x = x.detach().cpu()
    wide = (torch.float64, torch.float32, torch.float16)
    array: Array = (x.float() if x.is_floating_point() and x.dtype not in wide else x).numpy()
    return array


def padded(rows: Sequence[Row]) -> LogProbDump:
    """Rows of the same fields as one batch."""
    width = max(len(row["mask"]) for row in rows)
    tensors: dict[str, Tensor] = {}
    names: dict[str, tuple[str, ...]] = {}
    rows = alike(rows)
    for name, first in rows[0].items():
        if name in PER_SEQUENCE:
            of_rows = np.array([row[name] for row in rows], object if is_text(first) else None)
            if is_text(first):
                of_rows, names[name] = numbered(of_rows)
            tensors[name] = torch.from_numpy(of_rows)
            continue
        if is_text(first):
            flat, names[name] = numbered(np.concatenate([row[name] for row in rows]))
            ends = np.cumsum([len(row[name]) for row in rows])[:-1]
            batch = np.zeros((len(rows), width), np.int64)
            for i, x in enumerate(np.split(flat, ends)):
                batch[i, : len(x)] = x
            tensors[name] = torch.from_numpy(batch)
            continue
        deep = first.shape[1:]
        if name in PER_CANDIDATE:
            deep = (max(row[name].shape[1] for row in rows),)
        batch = np.zeros((len(rows), width, *deep), first.dtype)
        if name == TOP:
            batch[:] = -np.inf
        for i, row in enumerate(rows):
            x = row[name]
            if x.ndim == 1:
                batch[i, : len(x)] = x
            else:
                batch[i, : len(x), : x.shape[1]] = x
        tensors[name] = torch.from_numpy(batch)
    return LogProbDump(**tensors, names=names)


def alike(rows: Sequence[Row]) -> list[Row]:
    """Rows in which an id that is text in one of them is text in all; numbers by their digits."""
    rows = list(rows)
    for name in IDS:
        given = [row[name] for row in rows if name in row]
        if not any(map(is_text, given)) or all(map(is_text, given)):
            continue
        for i, row in enumerate(rows):
            if name in row and not is_text(row[name]):
                of_row = as_texts(np.asarray(row[name]))
                rows[i] = row | {name: of_row if of_row.ndim else of_row.item()}
    return rows


def is_text(x: Any) -> bool:
    """Whether an id is text, or an array of texts."""
    return isinstance(x, str) or (isinstance(x, np.ndarray) and x.dtype.kind == "O")


def rows_of(dump: LogProbDump) -> Iterator[Row]:
    """The sequences of a dump, each up to its last counted token.

    Raises:
        InputError: a counted number is beyond float32.
    """
    given = {name: to_numpy(x) for name, x in dump.given().items()}
    with np.errstate(over="ignore"):
        arrays = {name: x.astype(DTYPES[name], copy=False) for name, x in given.items()}
    for name, texts in dump.names.items():
        arrays[name] = texts_of(arrays[name], texts)
    for name, x in arrays.items():
        if x.dtype.kind == "f" and np.any((np.isinf(x) & np.isfinite(given[name]))[arrays["mask"]]):
            raise input_error(
                "write_dump", name, expected="within the range of float32 where the mask is 1",
                got="larger numbers", fix="find out what made them",
            )
    for i, mask in enumerate(arrays["mask"]):
        counted = np.flatnonzero(mask)
        length = int(counted[-1]) + 1 if len(counted) else 0
        yield {
            n: x[i : i + 1].tolist()[0] if n in PER_SEQUENCE else x[i, :length]
            for n, x in arrays.items()
        }
