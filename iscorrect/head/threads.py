"""Blocks of the vocabulary in threads of their own.

An operation on one block that is cut over threads ends with its slowest thread, and there are
hundreds of such ends in a pass. Where other programs have a core too, each costs a turn of the
scheduler. So a thread takes whole blocks, and all wait for each other once in a chunk.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Share = TypeVar("Share")
Result = TypeVar("Result")


def threads_for(device: torch.device) -> int:
    """How many threads may share the blocks: torch's own number, on a CPU.

    One under a dispatch mode, which sees one thread alone.

    >>> threads_for(torch.device("cuda"))
    1
    """
    if device.type != "cpu" or torch._C._len_torch_dispatch_stack():
        return 1
    return torch.get_num_threads()


def in_threads(work: Callable[[Share], Result], parts: list[Share]) -> list[Result]:
    """``work`` of each part, in its thread and without gradient; of one part, in this thread.

    >>> in_threads(lambda x: 2 * x, [1, 2])
    [2, 4]
    """
    if len(parts) == 1:
        return [work(parts[0])]
    inference = torch.is_inference_mode_enabled()

    def run(part: Share) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return work(part)

    pool = _pool(os.getpid(), len(parts))
    return [future.result() for future in [pool.submit(run, part) for part in parts]]


@cache
def _pool(process: int, n: int) -> ThreadPoolExecutor:
    """Threads in each of which an operation is not cut any further; a fork makes its own."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(n, "iscorrect", _one_thread)
    together = threading.Barrier(n)
    for future in [pool.submit(together.wait) for _ in range(n)]:
        future.result()
    # torch keeps the last number for threads to come
    torch.set_num_threads(before)
    return pool


def _one_thread() -> None:
    torch.get_num_threads()  # sets the thread up, which would undo what is set before
    torch.set_num_threads(1)
