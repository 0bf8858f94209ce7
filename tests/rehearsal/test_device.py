"""The rehearsal device is strict where a GPU is."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from rehearsal import Rehearsal

CUDA = torch.device("cuda:0")


wide_results = pytest.mark.skipif(
    not hasattr(torch.ops.aten.addmm, "dtype_out"), reason="needs torch 2.8"
)


def narrow(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_tensors_are_on_the_device_unless_nothing_said_so():
    x = torch.ones(2)
    with Rehearsal():
        assert x.device == x.cos().device == torch.zeros(2, device="cuda").device == CUDA
        assert torch.zeros(2, device=x.device).device == x.new_zeros(3).device == CUDA
        assert torch.zeros(2).device == torch.tensor([1]).device == torch.arange(3).device
        assert torch.zeros(2).device.type == x.cpu().device.type == "cpu"
        assert torch.zeros(2).to("cuda").device == CUDA
    assert x.device.type == "cpu"


def test_a_tensor_of_the_host_does_not_meet_one_of_the_device():
    x = torch.ones(2)
    with Rehearsal():
        assert (x + torch.tensor(1.0)).device == CUDA
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            x + torch.ones(2)


@wide_results
def test_factors_of_a_product_have_one_dtype_and_leave_float32():
    a, b = narrow(4, 8), narrow(8, 3)
    exact = a.double() @ b.double()
    with Rehearsal():
        wide = torch.mm(a, b, out_dtype=torch.float32)
        total = torch.addmm(wide, a, b, out_dtype=torch.float32, out=torch.empty_like(wide))
        with pytest.raises(RuntimeError, match="factors of"):
            torch.mm(a, b.half(), out_dtype=torch.float32)
        with pytest.raises(RuntimeError, match="do not leave"):
            torch.mm(a, b, out_dtype=torch.float64)
    torch.testing.assert_close(wide.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(total.double(), 2 * exact, rtol=1e-6, atol=1e-6)
    with Rehearsal(wide_output=False), pytest.raises(NotImplementedError):
        torch.mm(a, b, out_dtype=torch.float32)


@wide_results
def test_the_ledger_counts_bytes_products_and_waits():
    a, b = narrow(4, 8), narrow(8, 3)
    with Rehearsal() as gpu:
        z = torch.mm(a, b, out_dtype=torch.float32)
        z.exp_()
        torch.mul(z, z[:, :1], out=torch.empty(4, 3, dtype=torch.bfloat16, device="cuda"))
        z.new_zeros(2)
    product, exp, mul, zeros = gpu.ledger.kernels
    assert (product.multiplications, product.operands) == (4 * 8 * 3, (torch.bfloat16,) * 2)
    assert exp.bytes == 2 * 4 * 12
    assert mul.bytes == 4 * 12 + 4 * 4 + 2 * 12
    assert zeros.bytes == 2 * 4
    assert gpu.ledger.bytes_beside_products == exp.bytes + mul.bytes + zeros.bytes
    assert not gpu.ledger.waits


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.nonzero(),
        lambda x: x[x > 0], lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x.to("cpu"),
        lambda x: torch.tensor([1.0], device=x.device), lambda x: x.new_tensor([1.0]),
        lambda x: x.repeat_interleave(x.long()), lambda x: torch.ones(3).to(x.device),
    ],
)
def test_what_makes_the_host_wait_is_counted(ask):
    x = torch.ones(3)
    with Rehearsal() as gpu:
        ask(x)
    assert sum(gpu.ledger.waits.values()) == 1


def test_backward_runs_on_the_device_too():
    x = torch.ones(3, requires_grad=True)
    with Rehearsal() as gpu:
        y = (x * x).sum()
        before = len(gpu.ledger.kernels)
        y.backward()
        assert len(gpu.ledger.kernels) > before
        assert x.grad.device == CUDA


def test_a_device_without_float64_says_so():
    x = torch.ones(3)
    with Rehearsal(float64=False), pytest.raises(TypeError, match="no float64"):
        x.double()


def test_collectives_refuse_tensors_of_the_host():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with Rehearsal():
            dist.all_reduce(torch.ones(2, device="cuda"))
            with pytest.raises(RuntimeError, match="No backend type associated with device type"):
                dist.all_reduce(torch.ones(2))
    finally:
        dist.destroy_process_group()
