"""Log-probs from logits, over the vocabulary or what the sampler kept, without spare copies."""

import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from iscorrect import InputError, Support, log_probs_from_logits
from iscorrect.head import logits as logprobs_module

N, V = 6, 13


@pytest.fixture(autouse=True)
def blocks_of_two_rows(monkeypatch):
    monkeypatch.setattr(logprobs_module, "CPU_BLOCK", 2 * V)


def make(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*shape, V, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(V, shape, generator=generator)


def by_hand(logits, target, temperature=1.0, kept=None):
    """One position after the other, from the definition."""
    out = []
    for i, (z, y) in enumerate(zip(logits.flatten(0, -2), target.flatten(), strict=True)):
        p = (z / temperature).exp()
        ids = torch.arange(V) if kept is None else kept[i]
        inside = (ids == y).any()
        out.append((p[y] / p[ids].sum()).log() if inside else torch.tensor(-torch.inf).to(z))
    return torch.stack(out).view(target.shape)


def gradient(function, logits, of):
    leaf = logits.detach().clone().requires_grad_()
    out = function(leaf)
    (torch.where(out.isfinite(), out, 0) * of).sum().backward()
    return out.detach(), leaf.grad


@pytest.mark.parametrize("shape", [(N,), (2, 3), (1, 2, 3), ()])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("inplace", [False, True])
def test_values_and_gradients_are_those_of_the_definition(shape, temperature, inplace):
    logits, target = make(*shape)
    of = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if not shape:
        logits, target, of = logits[None], target[None], of[None]
    got = gradient(
        lambda z: log_probs_from_logits(
            z.clone(), target, temperature=temperature, inplace_backward=inplace
        ), logits, of,
    )
    expected = gradient(lambda z: by_hand(z, target, temperature), logits, of)
    torch.testing.assert_close(got, expected)


def test_a_single_position_has_no_axis():
    logits, target = make(1)
    out = log_probs_from_logits(logits[0], target[0])
    assert out.shape == ()
    torch.testing.assert_close(out, by_hand(logits, target)[0])


def test_gradcheck():
    logits, target = make(N)
    assert torch.autograd.gradcheck(
        lambda z: log_probs_from_logits(z, target, temperature=0.8), logits.requires_grad_()
    )


@pytest.mark.parametrize("as_rows", [False, True])
def test_a_support_renormalises_over_what_was_kept(as_rows):
    logits, target = make(2, 3)
    kept = [
        torch.tensor([int(y), (int(y) + 1) % V, (int(y) + 4) % V]) for y in target.flatten()
    ]
    kept[1] = torch.tensor([(int(target[0, 1]) + 2) % V])
    kept[4] = torch.tensor([], dtype=torch.int64)
    if as_rows:
        lengths = torch.tensor([0] + [len(ids) for ids in kept])
        support = Support(torch.cat(kept), lengths.cumsum(0))
    else:
        support = torch.full((6, 3), -1)
        for i, ids in enumerate(kept):
            support[i, : len(ids)] = ids
        support = support.view(2, 3, 3)
    of = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got, got_grad = gradient(
        lambda z: log_probs_from_logits(z, target, temperature=0.7, support=support), logits, of
    )
    expected, expected_grad = gradient(lambda z: by_hand(z, target, 0.7, kept), logits, of)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_grad, expected_grad)
    assert got.isneginf().sum() == 2


@given(st.integers(0, 2**20), st.sampled_from([0.1, 10.0, 1000.0]))
def test_a_log_prob_is_never_positive(seed, scale):
    logits, target = make(N, dtype=torch.float32, seed=seed)
    assert (log_probs_from_logits(scale * logits, target) <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_16_bit_logits_are_upcast_before_anything_is_summed(dtype):
    logits, target = make(N, dtype=dtype)
    out = log_probs_from_logits(logits, target)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), by_hand(logits.double(), target), rtol=1e-6, atol=1e-6)
    leaf = logits.requires_grad_()
    log_probs_from_logits(leaf, target).sum().backward()
    assert leaf.grad.dtype == dtype


def test_digits_are_kept_where_a_token_is_all_but_certain():
    logits = torch.tensor([[18.0, 0.0]], requires_grad=True)
    out = log_probs_from_logits(logits, torch.tensor([0]))
    doubt = torch.exp(torch.tensor(-18.0, dtype=torch.float64))
    torch.testing.assert_close(out.double()[0], -torch.log1p(doubt), rtol=1e-6, atol=0)
    out.backward()
    torch.testing.assert_close(logits.grad.double()[0, 0], doubt / (1 + doubt), rtol=1e-6, atol=0)


class Large(TorchDispatchMode):
    """How many tensors as large as the logits operations make, views aside."""

    def __init__(self, entries):
        super().__init__()
        self.entries, self.made = entries, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.entries:
            self.made.add(out.untyped_storage().data_ptr())
        return out


@pytest.mark.parametrize(("inplace", "copies"), [(False, 1), (True, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_the_only_copy(inplace, copies, dtype):
    logits, target = make(N, dtype=dtype)
    logits.requires_grad_()
    own = logits.untyped_storage().data_ptr()
    with Large(N * V) as large:
        log_probs_from_logits(logits, target, inplace_backward=inplace).sum().backward()
    assert len(large.made - {own}) == copies


def test_a_slice_of_logits_is_not_copied():
    logits, target = make(3, 4)
    base = logits.requires_grad_()
    with Large(3 * 3 * V) as large, torch.no_grad():
        out = log_probs_from_logits(base[:, :-1], target[:, 1:])
    assert large.made <= {base.untyped_storage().data_ptr()}
    torch.testing.assert_close(out, by_hand(logits.detach()[:, :-1], target[:, 1:]))
    log_probs_from_logits(base[:, :-1], target[:, 1:]).sum().backward()
    assert (base.grad[:, -1] == 0).all()
    torch.testing.assert_close(base.grad.sum(-1), torch.zeros(3, 4, dtype=torch.float64))


def test_overwriting_logits_that_another_backward_needs_is_an_error():
    logits, target = make(N)
    capped = logits.requires_grad_().tanh()
    out = log_probs_from_logits(capped, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_no_positions_give_no_log_probs():
    logits = torch.zeros(2, 0, V, requires_grad=True)
    out = log_probs_from_logits(logits, torch.zeros(2, 0, dtype=torch.int64))
    assert out.shape == (2, 0)
    out.sum().backward()
    assert logits.grad.shape == logits.shape


def test_differentiating_twice_says_that_it_is_not_supported():
    logits, target = make(N)
    out = log_probs_from_logits(logits.requires_grad_(), target)
    with pytest.raises(RuntimeError, match=r"twice .* is not supported"):
        torch.autograd.grad(out.sum(), logits, create_graph=True)


BAD = {
    "integer logits": ({"logits": torch.zeros(N, V, dtype=torch.int64)}, "logits"),
    "float target": ({"target": torch.zeros(N)}, "target"),
    "other positions": ({"target": torch.zeros(N + 2, dtype=torch.int64)}, "target"),
    "greedy": ({"temperature": 0.0}, "temperature"),
    "support of other positions": (
        {"support": torch.zeros(N + 1, 2, dtype=torch.int64)}, "support",
    ),
    "offsets of other positions": (
        {"support": Support(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2]))}, "support",
    ),
    "an ignored label": ({"target": torch.full((N,), -100)}, "target"),
    "a token that the head lacks": ({"target": torch.full((N,), V)}, "target"),
    "a kept id that the head lacks": ({"support": torch.full((N, 2), V)}, "support"),
    "a kept id below 0 in rows": (
        {"support": Support(torch.full((N,), -1), torch.arange(N + 1))}, "support",
    ),
    "in place with a support": (
        {"support": torch.zeros(N, 2, dtype=torch.int64), "inplace_backward": True},
        "inplace_backward",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    logits, target = make(N, dtype=torch.float32)
    bad, argument = BAD[case]
    with pytest.raises(InputError, match=rf"`{argument}` must be .* Fix: "):
        log_probs_from_logits(**({"logits": logits, "target": target} | bad))


def test_a_target_that_was_not_shifted_is_recognised():
    logits, _ = make(2, 3, dtype=torch.float32)
    with pytest.raises(InputError, match=r"target\[\.\.\., 1:\]"):
        log_probs_from_logits(logits, torch.zeros(2, 4, dtype=torch.int64))


def test_targets_outside_the_mask_may_be_anything():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.tensor([[0, 4, -100], [2, -100, 999]])
    mask = (target >= 0) & (target < 5)
    found = log_probs_from_logits(logits, target, mask=mask)
    plain = log_probs_from_logits(logits, torch.where(mask, target, 0))
    assert torch.equal(found, torch.where(mask, plain, 0))
    found.sum().backward()
    assert not logits.grad[~mask].any()
    assert logits.grad[mask].abs().sum(-1).all()
    kept = torch.tensor([0, 2, 4]).expand(2, 3, 3)
    assert log_probs_from_logits(logits, target, mask=mask, support=kept)[mask].isfinite().all()
    with pytest.raises(InputError, match="like `target`"):
        log_probs_from_logits(logits, target, mask=mask[:1])


@pytest.mark.parametrize("as_rows", [False, True])
def test_a_support_is_taken_under_vmap(as_rows):
    logits, target = make(3, N, dtype=torch.float64)
    support = torch.stack([target, (target + 1) % V], -1)
    kept = [Support(x.flatten(), torch.arange(0, 2 * N + 1, 2)) for x in support]
    if as_rows:
        # offsets say how many ids there are, so that they are the same for all
        def one(z, y, ids):
            return log_probs_from_logits(z, y, support=kept[0]._replace(ids=ids))

        mapped = torch.vmap(one)(logits, target, torch.stack([x.ids for x in kept]))
    else:
        mapped = torch.vmap(lambda z, y, s: log_probs_from_logits(z, y, support=s))(
            logits, target, support
        )
    expected = log_probs_from_logits(logits, target, support=support)
    torch.testing.assert_close(mapped, expected)
