"""``python -m benchmarks kernels``: what torch.compile makes of the head's kernels for an H100.

No card is needed, only the triton package: the graphs are traced on the CPU and moved to a fake
device with the properties of the card, and the code for it is read, not run. Private parts of
torch 2.13 are used throughout.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

from iscorrect.head.block import _derivative, _total

TOKENS, ROWS = 4096, 15_232
CARD = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32,
    total_memory=80 << 30, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    regs_per_multiprocessor=65536, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, gcnArchName="",
)


def main() -> int:
    z = ((TOKENS, ROWS), (ROWS, 1), torch.float32)
    vector = ((TOKENS,), (1,), torch.float32)
    bodies: dict[str, tuple[Callable[..., object], list[object]]] = {
        "largest and sum": (lambda z, largest: _total(z, largest, 1), [z, vector]),
        "derivative": (
            lambda z, reference, factor: _derivative(z, reference, factor, 1, torch.bfloat16),
            [z, vector, vector],
        ),
    }
    with an_h100():
        for name, (body, arguments) in bodies.items():
            print(f"{name}, a block of {TOKENS} tokens × {ROWS} rows")
            for kernel, source in kernels(body, arguments):
                loads = re.findall(r"tl\.load\((\w+)", source)
                stores = re.findall(r"tl\.store\((\w+)", source)
                print(f"  {kernel}: loads {', '.join(loads)}; stores {', '.join(stores)}")
                print("    " + ptx(kernel, source))
    return 0


@contextmanager
def an_h100() -> Iterator[None]:
    """Let torch believe in one."""
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    class Driver(DriverBase):
        def __init__(self) -> None: ...

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> object:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_benchmarker(self) -> object:
            return None

    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "_lazy_init": None,
        "get_device_properties": CARD, "get_device_capability": (9, 0), "is_initialized": True,
    }
    interface = {
        "is_available": True, "get_compute_capability": 90, "get_raw_stream": 0,
        "is_bf16_supported": True, "is_triton_capable": True,
        "raise_if_triton_unavailable": None, "get_device_properties": CARD, "current_device": 0,
    }
    driver.set_active(Driver())
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, a=answer, **__: a))
        for name, answer in interface.items():
            stack.enter_context(
                patch.object(CudaInterface, name, staticmethod(lambda *_, a=answer, **__: a))
            )
        stack.enter_context(patch.object(
            CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: CARD)
        ))
        stack.enter_context(patch.object(
            CudaInterface.Worker, "current_device", staticmethod(lambda: 0)
        ))
        stack.enter_context(patch.object(torch.version, "cuda", "12.8"))
        yield


def kernels(body: Callable[..., object], arguments: list[object]) -> list[tuple[str, str]]:
    """Names and sources of the Triton kernels of a function of some tensors."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._pytree import tree_map

    def move(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    with FakeTensorMode() as fake:
        inputs = [
            torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in arguments
        ]
        graph = make_fx(body, decomposition_table=select_decomp_table())(*inputs)
        for node in graph.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = tree_map(move, node.meta["val"])
        graph.recompile()
        inputs = [move(x) for x in inputs]
    lowered = GraphLowering(graph, shape_env=None)
    with V.set_fake_mode(fake), V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()):
        lowered.run(*inputs)
        code = lowered.codegen()[0]
    text = code if isinstance(code, str) else code.value
    return re.findall(r"(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)'''", text, re.S)


def ptx(name: str, source: str) -> str:
    """How a kernel reads and writes memory, once ptxas has compiled it for the card."""
    import importlib.util
    import tempfile
    from pathlib import Path

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    head = (
        "import triton\nimport triton.language as tl\n"
        "from torch._inductor.runtime import triton_helpers\n"
        "from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.py"
        path.write_text(head + source[source.index("@triton.jit"):], encoding="utf-8")
        spec = importlib.util.spec_from_file_location("kernel", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
        signature = eval(re.search(r"'signature': (\{.*?\})", source).group(1))
        reduction = "R0_BLOCK" in function.arg_names
        constants = {"XBLOCK": 1, "R0_BLOCK": 2048} if reduction else {"XBLOCK": 1024}
        names = function.arg_names
        types = {
            key: "constexpr" if key in constants else signature.get(key, "i32") for key in names
        }
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, key in enumerate(names)
            if types[key].startswith("*") or key.endswith("numel")
        }
        made = triton.compile(
            ASTSource(
                fn=function, signature=types, attrs=aligned,
                constexprs={(names.index(key),): value for key, value in constants.items()},
            ),
            target=GPUTarget("cuda", 90, 32), options={"num_warps": 8 if reduction else 4},
        )
    text = made.asm["ptx"]
    loads = re.findall(r"ld\.global[\w.:]*?\.(v\d\.b\d+|b\d+)", text)
    stores = re.findall(r"st\.global[\w.:]*?\.(v\d\.b\d+|b\d+)", text)
    return (
        f"sm_90, {len(made.asm['cubin'])} bytes; loads {', '.join(sorted(set(loads)))};"
        f" stores {', '.join(sorted(set(stores)))}"
    )


if __name__ == "__main__":
    sys.exit(main())
