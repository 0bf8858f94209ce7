"""Matrix products whose sums are float32 or wider, of factors that may be narrower."""

from __future__ import annotations

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)


def leaves_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has products of 16-bit matrices with float32 results.

    They are as fast as products with 16-bit results, and exact but for the order of the sum. CUDA
    has them since torch 2.8, ROCm since 2.10, XPU since 2.13; bfloat16 takes tensor cores of
    compute capability 8.0.

    >>> leaves_float32(torch.device("cpu"), torch.bfloat16)
    False
    """
    if dtype not in NARROW or not hasattr(torch.ops.aten.addmm, "dtype_out"):
        return False
    version = tuple(int(x) for x in torch.__version__.split(".")[:2])
    if device.type == "xpu":
        return version >= (2, 13)
    if device.type != "cuda":
        return False
    if torch.version.hip is not None:
        return version >= (2, 10)
    major, _ = torch.cuda.get_device_capability(device)
    return major >= (8 if dtype == torch.bfloat16 else 7)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a · b; factors are of one dtype, the result's or 16 bits."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out.dtype, out=out)


def add_product(a: Tensor, b: Tensor, total: Tensor) -> None:
    """Add a · b, where the product is made."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, total.dtype, out=total)
