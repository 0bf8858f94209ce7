"""Methods of trainers' classes, with something before and after."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def around(
    trainer: Any,
    name: str,
    before: Callable[..., None] | None = None,
    after: Callable[[Any], None] | None = None,
) -> None:
    """Call one function before or after a method of a class, once however often it is asked.

    Args:
        trainer: the class.
        name: of the method.
        before: called with what the method is called with, its object first.
        after: called with the object.

    >>> class Trainer:
    ...     def step(self, x):
    ...         print("step", x)
    >>> around(Trainer, "step", before=lambda self, x: print("before", x))
    >>> around(Trainer, "step", before=lambda self, x: print("instead", x))
    >>> Trainer().step(1)
    instead 1
    step 1
    """
    method = getattr(trainer, name)
    method = getattr(method, "_iscorrect_original", method)

    @functools.wraps(method)
    def wrapped(self: Any, *arguments: Any, **named: Any) -> Any:
        if before is not None:
            before(self, *arguments, **named)
        result = method(self, *arguments, **named)
        if after is not None:
            after(self)
        return result

    wrapped._iscorrect_original = method  # type: ignore[attr-defined]
    setattr(trainer, name, wrapped)
