"""Ids that are text, held as numbers with their texts beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


def numbered(texts: Array) -> tuple[Array, tuple[str, ...]]:
    """Numbers for texts, counted from 0 in the order in which they come.

    Args:
        texts: of str, of any shape.

    Returns:
        int64 of the same shape, and the text of each number.

    >>> numbered(np.array([["b", "a", "b"]], dtype=object))
    (array([[0, 1, 0]]), ('b', 'a'))
    """
    numbers: dict[str, int] = {}
    flat = [numbers.setdefault(text, len(numbers)) for text in texts.ravel().tolist()]
    return np.array(flat, np.int64).reshape(texts.shape), tuple(numbers)


def texts_of(numbers: Array, names: Sequence[str]) -> Array:
    """The texts of numbers; the inverse of :func:`numbered`.

    >>> texts_of(np.array([0, 1, 0]), ("b", "a"))
    array(['b', 'a', 'b'], dtype=object)
    """
    table = np.empty(len(names), dtype=object)
    table[:] = names
    return table[numbers]


def as_texts(ids: Array) -> Array:
    """Ids as texts, numbers by their digits.

    >>> as_texts(np.array([7, 7]))
    array(['7', '7'], dtype=object)
    """
    return np.array([str(x) for x in ids.ravel().tolist()] or [], object).reshape(ids.shape)


def is_unicode(text: str) -> bool:
    r"""Whether UTF-8 can hold a text.

    >>> is_unicode("høst"), is_unicode("\ud800")
    (True, False)
    """
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def common_names(
    parts: Sequence[tuple[Array, Sequence[str] | None]],
) -> tuple[list[Array], tuple[str, ...]]:
    """Ids of several parts under the same names.

    Args:
        parts: numbers and their names; without names, a number is its own.

    Returns:
        the numbers of each part, and the names of all.

    >>> common_names([(np.array([0, 0]), ["a"]), (np.array([5]), None)])
    ([array([0, 0]), array([1])], ('a', '5'))
    """
    table: dict[str, int] = {}
    renumbered = []
    for numbers, names in parts:
        index, texts = numbers, names
        if texts is None:
            values, index = np.unique(numbers, return_inverse=True)
            texts = [str(x) for x in values.tolist()]
        to = np.array([table.setdefault(text, len(table)) for text in texts], np.int64)
        renumbered.append(to[index.reshape(numbers.shape)])
    return renumbered, tuple(table)
