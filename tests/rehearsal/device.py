"""A GPU that computes on the CPU.

Every tensor says that it is on ``cuda:0``, or another device, unless it was made without a device:
that one is on the host, and meeting a tensor of the device is the error that it is on a GPU. So a
program takes the way that it takes on a GPU, with true numbers. cuBLAS' rules for the dtypes of
products hold, and collectives serve the device alone, as NCCL does.

What it cannot show: times, the choice of cuBLAS' kernels, what the allocator holds, streams, graph
capture, and NCCL itself.
"""

import sys
from contextlib import ExitStack
from unittest.mock import patch

import torch
import torch.distributed.distributed_c10d as c10d
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rehearsal.ledger import Ledger

HOST = torch.device("cpu")
NARROW = (torch.bfloat16, torch.float16)
FACTORIES = {
    torch: ["arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint",
            "randn", "randperm", "tensor", "zeros",
            "empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like"],
    torch.Tensor: ["new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "to"],
}
# what a program asks of a card beside tensors; its memory is not the host's
ANSWERS = {
    "is_available": True, "is_bf16_supported": True, "synchronize": None, "empty_cache": None,
    "get_device_name": "a rehearsed GPU", "reset_peak_memory_stats": None, "memory_allocated": 0,
    "max_memory_allocated": 0,
}


class Rehearsal(TorchDispatchMode):
    """While it is entered, tensors are on a GPU.

    Attributes:
        ledger: what was asked of it.
        device: its name.
        float64: whether it has any.
        capability: as CUDA counts them; (9, 0) is an H100.
        wide_output: whether products of 16-bit matrices may leave float32 (torch 2.8).
    """

    def __init__(self, device="cuda:0", *, float64=True, capability=(9, 0), wide_output=True):
        super().__init__()
        self.ledger, self.device = Ledger(), torch.device(device)
        self.float64, self.capability, self.wide_output = float64, capability, wide_output
        self._on_host = {}
        self._asked = None
        self._patches = ExitStack()

    def __enter__(self):
        device = property(lambda x: HOST if self._is_on_host(x) else self.device)
        is_cuda = property(lambda x: x.device.type == "cuda")
        enter = self._patches.enter_context
        for name, value in {"device": device, "is_cuda": is_cuda}.items():
            setattr(torch.Tensor, name, value)
            self._patches.callback(delattr, torch.Tensor, name)
        enter(patch.object(torch.cuda, "get_device_capability", lambda _=None: self.capability))
        enter(patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        for name, answer in ANSWERS.items():
            enter(patch.object(torch.cuda, name, lambda *_, answer=answer: answer))
        for name in ("_get_object_coll_device", "_get_pg_default_device"):
            if hasattr(c10d, name):
                enter(patch.object(c10d, name, lambda *_: self.device.type))
        for name in ("tolist", "cpu", "numpy"):
            enter(patch.object(torch.Tensor, name, self._copies_to_host(name)))
        for home, names in FACTORIES.items():
            for name in names:
                enter(patch.object(home, name, self._asks_for_device(home, name)))
        return super().__enter__()

    def __exit__(self, *error):
        result = super().__exit__(*error)
        self._patches.close()
        # what a compiler has learned of torch's functions, it may have learned of the patched ones
        if "torch._dynamo.trace_rules" in sys.modules:
            sys.modules["torch._dynamo.trace_rules"].clear_lru_cache()
        return result

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if is_tensor(x)]
        host = self._place(func, name, tensors, kwargs)
        out = self._run(func, name, args, kwargs)
        made = [x for x in tree_leaves(out) if is_tensor(x)]
        if not self.float64 and not host and any(x.dtype == torch.float64 for x in made):
            raise TypeError(f"{name}: this device has no float64")
        if host:
            for x in made:
                self._put_on_host(x)
        else:
            self.ledger.record(func, args, kwargs, out)
        return out

    def _place(self, func, name, tensors, kwargs):
        """Whether the result is on the host; the device's rules for where its inputs are."""
        here = [x for x in tensors if self._is_on_host(x)]
        if func.namespace == "c10d":
            if here:
                raise RuntimeError("No backend type associated with device type cpu")
            return False
        if self._asked is not None:
            return self._asked == "cpu"
        if not tensors:
            return True
        if not here:
            return False
        if len(here) == len(tensors):
            return True
        if name == "copy_":
            self.ledger.wait("copy_ between host and device")
            return here[0] is tensors[0]
        if name in {"index", "index_put_", "index_put"} and not self._is_on_host(tensors[0]):
            self.ledger.wait(f"{name} by an index on the host")
            return False
        if any(x.ndim for x in here):
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, found {self.device}, cpu"
            )
        return False

    def _run(self, func, name, args, kwargs):
        overload = func._overloadname
        if overload not in {"dtype", "dtype_out"} or name not in {"mm", "addmm"}:
            return func(*args, **kwargs)
        *added, a, b, wide = args
        if not self.wide_output:
            raise NotImplementedError(f"aten::{name}.{overload}")
        if a.dtype != b.dtype:
            raise RuntimeError(f"{name}: factors of {a.dtype} and {b.dtype}")
        if wide != a.dtype and not (wide == torch.float32 and a.dtype in NARROW):
            raise RuntimeError(f"{name}: products of {a.dtype} do not leave {wide}")
        out = kwargs.pop("out", None)
        if out is not None and out.dtype != wide:
            raise RuntimeError(f"{name}: {wide} does not go into {out.dtype}")
        product = torch.mm(a.to(wide), b.to(wide))
        if added:
            if added[0].dtype not in (wide, a.dtype):
                raise RuntimeError(f"{name}: {added[0].dtype} is not added to {wide}")
            beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
            product = product * alpha if beta == 0 else beta * added[0] + alpha * product
        return product if out is None else out.copy_(product)

    def _is_on_host(self, x):
        return x.untyped_storage()._cdata in self._on_host

    def _put_on_host(self, x):
        # held, so that no other storage takes its address
        storage = x.untyped_storage()
        self._on_host[storage._cdata] = storage

    def _copies_to_host(self, name):
        plain = getattr(torch.Tensor, name)

        def copy(x, *args, **kwargs):
            if self._is_on_host(x):
                return plain(x, *args, **kwargs)
            self.ledger.wait(name)
            made = plain(x, *args, **kwargs)
            return self._settled(made, [made], "cpu") if name == "cpu" else made

        return copy

    def _asks_for_device(self, home, name):
        plain = getattr(home, name)

        def make(*args, **kwargs):
            asked = kwargs.get("device")
            if name == "to":
                args = list(args)
                for i, x in enumerate(args[1:2], 1):
                    if isinstance(x, (str, torch.device)):
                        asked, args[i] = x, HOST
            if asked is None and name in {"tensor", "as_tensor"} and not is_tensor(args[0]):
                asked = "cpu"
            if asked is None:
                if name == "new_tensor":
                    self.ledger.wait(f"{name} from the host")
                return plain(*args, **kwargs)
            kind = torch.device(asked).type
            if "device" in kwargs:
                kwargs["device"] = HOST
            if name in {"tensor", "as_tensor"} and kind != "cpu":
                self.ledger.wait(f"{name} from the host")
            before, self._asked = self._asked, kind
            try:
                made = plain(*args, **kwargs)
            finally:
                self._asked = before
            if name == "to" and self._is_on_host(args[0]) != (kind == "cpu"):
                self.ledger.wait("to, between host and device")
            return self._settled(made, args, kind)

        return make

    def _settled(self, made, args, kind):
        """What asks for a device gets a tensor of its own there, as between two memories."""
        if (kind == "cpu") == self._is_on_host(made):
            return made
        if any(made is x for x in args):
            made = made.clone()
        if kind == "cpu":
            self._put_on_host(made)
        else:
            self._on_host.pop(made.untyped_storage()._cdata)
        return made
