"""What an operation costs a GPU: a kernel, bytes read and written, a wait of the host."""

import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves

import iscorrect

LIBRARY = str(Path(iscorrect.__file__).parent)

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}
NO_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_",
    "_unsafe_view", "_local_scalar_dense", "is_nonzero", "item",
}
ONLY_WRITES = {
    "copy_", "fill_", "zero_", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like",
    "full_like",
}
GATHERS = {"gather", "index", "index_select", "take"}
SCATTERS = {
    "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_",
    "index_add_", "index_copy_", "index_put", "index_put_", "_index_put_impl_", "index_fill_",
}
# A row of logits is longer than a block's shared memory, and read for its largest, for the sum
# and for the result (cunn_SoftMaxForward; the backward reads the incoming gradient twice).
PASSES = {"_softmax": 3, "_log_softmax": 3, "_softmax_backward_data": 2,
          "_log_softmax_backward_data": 2}
# their results have as many entries as their values say, so the host has to know these
WAITS = {
    "_local_scalar_dense", "is_nonzero", "item", "nonzero", "masked_select", "equal", "_unique2",
    "unique_dim", "unique_consecutive",
}


class Kernel(NamedTuple):
    """One operation.

    Attributes:
        bytes: read and written in all passes; an entry of an expanded tensor counts once.
        operands: dtypes of a product's factors, or nothing.
        multiplications: of a product.
    """

    name: str
    where: str
    bytes: int
    operands: tuple[torch.dtype, ...] = ()
    multiplications: int = 0


class Ledger:
    """Kernels in their order, and how often the host waits at which line."""

    def __init__(self):
        self.kernels: list[Kernel] = []
        self.waits: Counter[str] = Counter()

    @property
    def products(self):
        return [kernel for kernel in self.kernels if kernel.operands]

    @property
    def others(self):
        return [kernel for kernel in self.kernels if not kernel.operands]

    @property
    def bytes_beside_products(self):
        return sum(kernel.bytes for kernel in self.others)

    def multiplications(self, dtype):
        """In products of two factors of a dtype."""
        return sum(k.multiplications for k in self.products if set(k.operands) == {dtype})

    def wait(self, why):
        self.waits[f"{why} at {where()}"] += 1

    def record(self, func, args, kwargs, out):
        """Add an operation that has been run."""
        name = func.overloadpacket.__name__
        if name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.wait(name)
        given = {key: x for key, x in kwargs.items() if key != "out"}
        tensors = [x for x in tree_leaves((args, given)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if name in {"index", "index_put", "index_put_", "_index_put_impl_"} and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        ):
            self.wait(f"{name} with a bool index")
        if name in NO_KERNEL or is_view(func):
            return
        if name in PRODUCTS:
            a, b = args[-2:] if name.endswith("bmm") else args[len(args) - 2 - out_dtype(args):][:2]
            kernel = Kernel(
                name, where(), moved(name, tensors, made), (a.dtype, b.dtype),
                a.numel() * b.shape[-1],
            )
        else:
            kernel = Kernel(name, where(), moved(name, tensors, made))
        self.kernels.append(kernel)


def out_dtype(args):
    return 1 if isinstance(args[-1], torch.dtype) else 0


def is_view(func):
    returns = func._schema.returns
    return any(x.alias_info is not None and not x.alias_info.is_write for x in returns)


def moved(name, tensors, made):
    """Bytes that an operation reads from its inputs and writes to its results."""
    if name in GATHERS:
        return 2 * sum(map(size, made)) + sum(map(size, tensors[1:]))
    if name in SCATTERS:
        return 2 * sum(map(size, tensors[1:]))
    read = tensors[1:] if name in ONLY_WRITES else tensors
    again = (PASSES.get(name, 1) - 1) * size(tensors[0]) if tensors else 0
    return sum(map(size, read)) + again + sum(map(size, made))


def size(x):
    entries = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        entries *= length if stride else 1
    return entries * x.element_size()


def where():
    """File and line of the library that the operation comes from."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(LIBRARY):
            return f"{name[len(LIBRARY) + 1:]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
