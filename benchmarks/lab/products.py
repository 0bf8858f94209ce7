"""Products of 16-bit numbers where a processor has none: added up in float32, rounded once.

That is what a processor with such products does. Torch's own take ten times as long without them.
"""

from __future__ import annotations

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


def widen(model: nn.Module) -> None:
    """Let the linear layers of a model that learns multiply so; in float32 nothing changes."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.bias is None:
            layer.forward = partial(_product, layer)


def _product(layer: nn.Linear, x: Tensor) -> Tensor:
    # rounded by ``to``, whose gradients are rounded so too
    return functional.linear(x.float(), layer.weight.float()).to(x.dtype)
