"""Products of 16-bit numbers, added up in float32 and rounded once.

That is what a processor with such products does. Torch's own take ten times as long without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.lab.policy import DEVICE


def missing(dtype: torch.dtype) -> bool:
    """Whether this processor has no products of numbers of this dtype."""
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return DEVICE.type == "cpu" and dtype in native and not native[dtype]()


class Product:
    """The product of a layer that does not learn, whose weights are widened once."""

    def __init__(self) -> None:
        self._wide: Tensor | None = None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._wide is None:
            self._wide = weight.float()
        wide_bias = None if bias is None else bias.float()
        return functional.linear(x.float(), self._wide, wide_bias).to(x.dtype)

    def forget(self) -> None:
        """Read the weights again: others were loaded."""
        self._wide = None


@contextmanager
def computed_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within, linear layers without a bias round what they multiply, and the product, to a dtype.

    Gradients are rounded likewise. Under ``torch.autocast`` it does for them what that would do.
    """
    layers = [x for x in model.modules() if isinstance(x, nn.Linear) and x.bias is None]
    for layer in layers:
        layer.forward = partial(_product, layer, dtype)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _product(layer: nn.Linear, dtype: torch.dtype, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(x.to(dtype).float(), layer.weight.to(dtype).float()).to(dtype)
