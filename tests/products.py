"""How much is multiplied and allocated, counted where torch does it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MULTIPLIED = {torch.ops.aten.mm: 0, torch.ops.aten.addmm: 1, torch.ops.aten.addmm_: 1}


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    def __init__(self):
        super().__init__()
        self.multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = MULTIPLIED.get(func.overloadpacket)
        if first is not None:
            a, b = args[first : first + 2]
            self.multiplications += a.numel() * b.shape[1]
        return func(*args, **(kwargs or {}))

    def tokens(self, weight):
        """Of how many tokens with a head of that shape: one for logits, two for both gradients."""
        tokens, rest = divmod(self.multiplications, weight.numel())
        assert rest == 0
        return tokens


class Allocated(TorchDispatchMode):
    """Keeps every tensor whose memory is its own."""

    def __init__(self):
        super().__init__()
        self._kept = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs or {}))
                 if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self._kept.setdefault(x.untyped_storage().data_ptr(), x)
        return out

    def of(self, width):
        """Rows of the matrices of this width."""
        return [len(x) for x in self._kept.values() if x.dim() == 2 and x.shape[1] == width]
