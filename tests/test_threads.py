"""Threads that share the head's blocks give what one gives."""

import os

import pytest
import torch

import iscorrect as ic
from iscorrect import PolicyLoss
from iscorrect.head import reader as reader_module
from iscorrect.head.threads import in_threads, threads_for

N, V, D = 40, 210, 16


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(reader_module, "CPU_ROWS", 16)
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def outcome(trained, dtype, *, fused=False, **options):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_(trained)
    bias = torch.randn(V, generator=generator).to(dtype).requires_grad_(trained)
    target = torch.randint(V, (2, N), generator=generator)
    advantages = torch.randn(2, N, generator=generator)
    advantages[:, ::5] = 0
    if fused:
        loss, _ = ic.fused_policy_loss(
            PolicyLoss(correction=ic.token_tis()), hidden=hidden, weight=weight, bias=bias,
            target=target, rollout_log_probs=torch.full((2, N), -6.0), advantages=advantages,
            mask=torch.ones(2, N, dtype=torch.bool), chunk_size=12, **options,
        )
        values = [loss]
    else:
        values = list(ic.linear_log_probs(
            hidden, weight, target, bias=bias, entropy=True, chunk_size=12, **options
        ))
        loss = (values[0] * advantages).sum()
    loss.backward()
    grads = [x.grad for x in (hidden, weight, bias) if x.grad is not None]
    return [x.detach() for x in values], grads


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("trained", "fused"), [(True, False), (False, False), (True, True)])
def test_threads_give_what_one_gives_and_the_same_each_time(trained, fused, dtype, options):
    shared, again = (outcome(trained, dtype, fused=fused, **options) for _ in range(2))
    torch.testing.assert_close(again, shared, rtol=0, atol=0)
    torch.set_num_threads(1)
    alone = outcome(trained, dtype, fused=fused, **options)
    torch.set_num_threads(3)
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(shared, alone, **tolerance)


def test_a_head_runs_under_inference_mode():
    with torch.inference_mode():
        out = ic.linear_log_probs(
            torch.zeros(1, N, D), torch.zeros(V, D), torch.zeros(1, N, dtype=torch.long)
        )
    torch.testing.assert_close(out, torch.full((1, N), V).float().log().neg())


def test_an_error_in_a_thread_reaches_the_caller():
    def work(part):
        if part == 1:
            raise ValueError("no memory, say")

    with pytest.raises(ValueError, match="no memory"):
        in_threads(work, [0, 1, 2])


def test_an_operation_in_a_thread_is_not_cut_further():
    assert in_threads(lambda _: torch.get_num_threads(), [0, 1, 2]) == [1, 1, 1]


def test_a_fork_makes_its_own_threads():
    in_threads(lambda x: x, [0, 1, 2])
    child = os.fork()
    if child == 0:
        os._exit(0 if in_threads(lambda x: 2 * x, [0, 1, 2]) == [0, 2, 4] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_dispatch_mode_sees_all():
    from torch.utils.flop_counter import FlopCounterMode

    assert threads_for(torch.device("cpu")) == 3
    with FlopCounterMode(display=False) as counter:
        assert threads_for(torch.device("cpu")) == 1
        outcome(True, torch.float32)
    assert counter.get_total_flops() > 0
