"""Log-probs from logits on a rehearsed GPU: as many bytes as the naive way, and nothing waits."""

import pytest
import torch

from iscorrect import Support, log_probs_from_logits
from rehearsal import Rehearsal

N, V = 64, 1000


def naive(logits, target):
    """What a trainer writes: float32 logits, log_softmax, gather."""
    return logits.float().log_softmax(-1).gather(-1, target[:, None])[:, 0]


def cost(function, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, V, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(V, (N,), generator=generator)
    with Rehearsal() as gpu:
        out = function(logits, target)
        out.sum().backward()
    exact = logits.detach().double().requires_grad_()
    expected = naive_in_float64(exact, target)
    expected.sum().backward()
    torch.testing.assert_close(out.detach().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    error = (logits.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < (1e-6 if dtype == torch.float32 else 3e-3)
    return gpu.ledger


def naive_in_float64(logits, target):
    return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 40.5), (torch.float32, 48.5)])
def test_bytes_per_logit(dtype, most):
    ours = cost(log_probs_from_logits, dtype)
    assert ours.bytes_beside_products / (N * V) < most
    assert not ours.waits


def test_no_more_bytes_than_the_naive_way():
    ours, plain = (cost(f, torch.bfloat16) for f in (log_probs_from_logits, naive))
    assert ours.bytes_beside_products <= plain.bytes_beside_products


@pytest.mark.parametrize("bad", [-2, -100, 5, 2**40])
@pytest.mark.parametrize("form", ["target", "padded support", "support of rows"])
def test_an_id_outside_the_vocabulary_is_nan(bad, form):
    logits, target = torch.randn(3, 5), torch.tensor([1, 2, 2])
    ids = torch.tensor([1, 0, 3, 2, 2, 4])
    if form == "target":
        support, target[1] = None, bad
    elif form == "padded support":
        ids[2] = max(bad, 5)
        support = ids.view(3, 2)
    else:
        ids[2] = bad
        support = Support(ids, torch.tensor([0, 2, 4, 6]))
    with Rehearsal() as gpu:
        out = log_probs_from_logits(logits, target, support=support)
    assert out.isnan().tolist() == [False, True, False]
    assert not gpu.ledger.waits
