"""Which devices and versions take products of 16-bit matrices with float32 results."""

import pytest
import torch

from iscorrect.head.products import leaves_float32

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.aten.addmm, "dtype_out"), reason="torch before 2.8 has none of them"
)
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(("version", "hip", "device", "capability", "dtype", "expected"), [
    ("2.8.0", None, "cuda", (9, 0), BF16, True),
    ("2.13.0+cu130", None, "cuda", (8, 0), BF16, True),
    ("2.13.0", None, "cuda", (7, 5), BF16, False),
    ("2.13.0", None, "cuda", (7, 5), FP16, True),
    ("2.13.0", None, "cuda", (6, 1), FP16, False),
    ("2.13.0", None, "cuda", (9, 0), torch.float32, False),
    ("2.9.1+rocm6.4", "6.4", "cuda", (9, 4), BF16, False),
    ("2.10.0+rocm7.0", "7.0", "cuda", (9, 4), BF16, True),
    ("2.10.0+rocm7.0", "7.0", "cuda", (9, 4), FP16, True),
    ("2.12.1", None, "xpu", None, BF16, False),
    ("2.13.0+xpu", None, "xpu", None, FP16, True),
    ("2.13.0", None, "cpu", None, BF16, False),
    ("2.13.0", None, "mps", None, FP16, False),
])
def test_float32_results_where_the_device_has_them(
    version, hip, device, capability, dtype, expected, monkeypatch
):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert leaves_float32(torch.device(device), dtype) is expected
