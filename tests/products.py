"""How much is multiplied, counted where torch multiplies it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
