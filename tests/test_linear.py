"""Log-probs from hidden states agree with the logits they never make."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, strategies as st
from products import Products
from torch.utils._python_dispatch import TorchDispatchMode

from iscorrect import InputError, Layout, Support, log_probs_from_logits
from iscorrect.head import reader as reader_module
from iscorrect.head.linear import linear_log_probs

B, T, D, V = 3, 7, 16, 41


def make(dtype=torch.float64, *, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(V, (B, T), generator=generator)
    b = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    return hidden, weight, b, target


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """A vocabulary of several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "CPU_ROWS", 7)
        yield


def plain(hidden, weight, bias, target, *, temperature=1.0, softcap=None, support=None):
    """The logits of every token, all at once."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return log_probs_from_logits(logits, target, temperature=temperature, support=support)


def gradients(function, *inputs, of):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    (torch.where(out.isfinite(), out, 0) * of).sum().backward()
    return out.detach(), [x.grad for x in leaves]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def supports(target):
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(V, generator=generator)[:6] for _ in range(B * T)])
    ids = ids.view(B, T, 6)
    ids[ids == target[..., None]] = -1
    ids[..., 0] = target
    ids[0, 1, 0] = -1
    ids[1, 0] = -1
    kept = ids >= 0
    offsets = torch.nn.functional.pad(kept.flatten(0, 1).sum(1).cumsum(0), (1, 0))
    return {"padded": ids, "rows": Support(ids[kept], offsets)}


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("temperature", "softcap", "bias"), [(1.0, None, False), (0.7, None, True), (1.3, 2.0, True)]
)
@pytest.mark.parametrize("support", [None, "padded", "rows"])
def test_values_and_gradients_are_those_of_the_logits(
    chunk_size, temperature, softcap, bias, support
):
    hidden, weight, b, target = make(bias=bias)
    kept = None if support is None else supports(target)[support]
    rest = {"temperature": temperature, "softcap": softcap, "support": kept}
    inputs = [hidden, weight] if b is None else [hidden, weight, b]
    of = torch.randn(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def ours(hidden, weight, bias=None):
        return linear_log_probs(hidden, weight, target, bias=bias, chunk_size=chunk_size, **rest)

    def oracle(hidden, weight, bias=None):
        return plain(hidden, weight, bias, target, **rest)

    value, grads = gradients(ours, *inputs, of=of)
    expected, expected_grads = gradients(oracle, *inputs, of=of)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-11, atol=1e-12)
    assert value.isfinite().all() == (support is None)


def test_gradcheck():
    hidden, weight, bias, target = make()
    inputs = [x.requires_grad_() for x in (hidden[:1, :3], weight[:9], bias[:9])]

    def function(hidden, weight, bias):
        return linear_log_probs(
            hidden, weight, target[:1, :3] % 9, bias=bias, softcap=3.0, temperature=0.8,
            chunk_size=2,
        )

    assert torch.autograd.gradcheck(function, inputs)


@given(st.integers(1, 50), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_the_chunk_size_changes_nothing(chunk_size, dtype):
    hidden, weight, bias, target = make(dtype)
    whole = linear_log_probs(hidden, weight, target, bias=bias, chunk_size=B * T)
    parts = linear_log_probs(hidden, weight, target, bias=bias, chunk_size=chunk_size)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-5)


@given(st.integers(0, 2**20), st.sampled_from([1.0, 10.0, 100.0]))
def test_a_log_prob_is_never_positive(seed, scale):
    hidden, weight, bias, target = make(torch.float32, seed=seed)
    assert (linear_log_probs(scale * hidden, weight, target, bias=bias) <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_less_exact_than_the_naive_path(monkeypatch, dtype):
    """Errors against float64 of the same inputs, over many tokens."""
    monkeypatch.setattr(reader_module, "CPU_ROWS", 2048)
    generator = torch.Generator().manual_seed(0)
    n, v, d = 128, 4099, 256
    hidden = torch.randn(n, d, generator=generator).to(dtype)
    weight = (torch.randn(v, d, generator=generator) / 8).to(dtype)
    target = torch.randint(v, (n,), generator=generator)
    of = torch.randn(n, generator=generator, dtype=torch.float64)
    exact, exact_grads = gradients(
        lambda h, w: plain(h, w, None, target), hidden.double(), weight.double(), of=of
    )
    ours, our_grads = gradients(
        lambda h, w: linear_log_probs(h, w, target, chunk_size=32), hidden, weight, of=of
    )
    naive, naive_grads = gradients(
        lambda h, w: (h @ w.T).float().log_softmax(-1).gather(-1, target[:, None])[:, 0],
        hidden, weight, of=of,
    )
    assert (ours - exact).square().mean() <= (naive - exact).square().mean()
    if dtype != torch.float32:
        assert (ours - exact).abs().max() < 1e-5
        assert (naive - exact).abs().max() > 1e-3
    for ours_, naive_, exact_ in zip(our_grads, naive_grads, exact_grads, strict=True):
        # in float32 both have the error of the same product, up to the luck of rounding
        assert relative(ours_, exact_) <= 1.02 * relative(naive_, exact_)


def test_the_targets_own_gradient_keeps_its_digits_where_it_is_all_but_certain():
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[18.0], [0.0]])
    linear_log_probs(hidden, weight, torch.tensor([0])).backward()
    exact = 18 * torch.sigmoid(torch.tensor(-18.0, dtype=torch.float64))
    torch.testing.assert_close(hidden.grad.double()[0, 0], exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_head_repeats_what_an_engine_with_one_computes(dtype):
    hidden, weight, _, target = make(dtype, bias=False)
    rounded = (hidden.double() @ weight.double().T).to(dtype)
    ours = linear_log_probs(hidden, weight, target, head_dtype=dtype)
    torch.testing.assert_close(
        ours, log_probs_from_logits(rounded.float(), target), rtol=0, atol=3e-2
    )
    assert not torch.equal(ours, linear_log_probs(hidden, weight, target))


def test_entropy_and_its_variance_come_from_the_same_pass():
    hidden, weight, bias, target = make()
    out = linear_log_probs(hidden, weight, target, bias=bias, entropy=True, chunk_size=4)
    log_p = (hidden @ weight.T + bias).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    variance = (log_p.exp() * log_p.square()).sum(-1) - entropy.square()
    torch.testing.assert_close(out.log_probs, plain(hidden, weight, bias, target))
    torch.testing.assert_close(out.entropy, entropy)
    torch.testing.assert_close(out.surprisal_variance, variance)


def test_entropy_of_a_support_counts_the_support_alone():
    hidden, weight, bias, target = make()
    ids = torch.stack([target, (target + 1) % V], -1)
    out = linear_log_probs(hidden, weight, target, bias=bias, entropy=True, support=ids)
    log_p = (hidden @ weight.T + bias).gather(-1, ids).log_softmax(-1)
    torch.testing.assert_close(out.entropy, -(log_p.exp() * log_p).sum(-1))


class Largest(TorchDispatchMode):
    """The largest floating tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.entries = max(self.entries, x.numel())
        return out


def test_the_logits_of_a_batch_never_exist():
    hidden, weight, bias, target = make(torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    with Largest() as largest:
        linear_log_probs(hidden, weight, target, bias=bias, chunk_size=2).sum().backward()
    assert largest.entries == V * D
    assert V * D < B * T * V


def test_what_does_not_count_is_never_computed():
    hidden, weight, bias, target = make(torch.float32)
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, :3] = mask[2, 5] = True
    hidden[~mask] = torch.nan
    target[~mask] = -100
    hidden.requires_grad_()
    weight.requires_grad_()
    with Products() as forward:
        out = linear_log_probs(hidden, weight, target, bias=bias, layout=Layout(mask), chunk_size=2)
    assert forward.tokens(weight) == 4
    assert (out[~mask] == 0).all()
    with Products() as backward:
        (out * torch.tensor([[1.0], [1.0], [0.0]])).sum().backward()
    assert backward.tokens(weight) == 3 * 3
    assert (hidden.grad[~mask] == 0).all()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_nan_under_the_mask_is_not_hidden():
    hidden, weight, bias, target = make(torch.float32)
    hidden[1, 2, 0] = torch.nan
    weight.requires_grad_()
    out = linear_log_probs(hidden, weight, target, bias=bias)
    assert out.isnan().nonzero().tolist() == [[1, 2]]
    out.sum().backward()
    assert weight.grad.isnan().any()


def test_autocast_does_not_narrow_the_head():
    hidden, weight, bias, target = make(torch.float32)
    weight.requires_grad_()
    expected = linear_log_probs(hidden, weight, target, bias=bias)
    (gradient,) = torch.autograd.grad(expected.sum(), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_log_probs(hidden, weight, target, bias=bias)
        out.sum().backward()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(weight.grad, gradient, rtol=0, atol=0)


def test_a_frozen_head_gets_no_gradient_and_computes_each_logit_once():
    hidden, weight, bias, target = make(torch.float32)
    hidden.requires_grad_()
    with Products() as products:
        linear_log_probs(hidden, weight, target, bias=bias).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    assert products.tokens(weight) == 2 * B * T


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"softcap": 2.0, "temperature": 1.3}], ids=str
)
@pytest.mark.parametrize("support", [None, "padded", "rows"])
def test_a_frozen_head_gives_hidden_states_the_gradient_of_a_trained_one(
    chunk_size, options, support
):
    hidden, weight, bias, target = make()
    kept = None if support is None else supports(target)[support]
    of = torch.randn(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def run(weight):
        h = hidden.clone().requires_grad_()
        out = linear_log_probs(
            h, weight, target, bias=bias, support=kept, chunk_size=chunk_size, entropy=True,
            **options,
        )
        torch.where(out.log_probs.isfinite(), out.log_probs, 0).backward(of)
        return *(x.detach() for x in out), h.grad

    frozen, trained = run(weight), run(weight.clone().requires_grad_())
    torch.testing.assert_close(frozen, trained, rtol=1e-11, atol=1e-12)


def test_a_frozen_head_keeps_the_digits_of_an_all_but_certain_target():
    hidden = torch.tensor([[1.0]], requires_grad=True)
    linear_log_probs(hidden, torch.tensor([[18.0], [0.0]]), torch.tensor([0])).backward()
    exact = 18 * torch.sigmoid(torch.tensor(-18.0, dtype=torch.float64))
    torch.testing.assert_close(hidden.grad.double()[0, 0], exact, rtol=1e-6, atol=0)


def test_what_is_not_finite_reaches_only_its_own_rows_of_a_frozen_head():
    hidden, weight, bias, target = make(torch.float32)
    hidden[1, 2, 0] = torch.nan
    hidden.requires_grad_()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0] = False
    out = linear_log_probs(hidden, weight, target, bias=bias, layout=mask)
    torch.where(out.isnan(), 0, out).sum().backward()
    assert hidden.grad.isfinite().all()
    assert (hidden.grad[0] == 0).all() and (hidden.grad[1, 2] == 0).all()


def held(function):
    """Whether hidden states stay in memory although hooks have taken all that is saved."""
    base = torch.randn(1, 16, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x):
        hidden = base * 1.0
        alive = weakref.ref(hidden.untyped_storage())
        out = function(hidden)
    del hidden
    gc.collect()
    freed = alive() is None
    out.sum().backward()
    assert base.grad.abs().sum() > 0
    return not freed


@pytest.mark.parametrize("trained", [False, True])
def test_what_a_gradient_needs_can_be_moved_elsewhere(trained):
    weight = torch.randn(32, 8, requires_grad=trained)
    target = torch.randint(32, (1, 16))
    assert not held(lambda hidden: hidden @ weight.T)
    assert not held(lambda hidden: linear_log_probs(hidden, weight, target))


def test_a_transposed_weight_gets_its_own_gradient():
    hidden, weight, bias, target = make()
    of = torch.ones(B, T, dtype=torch.float64)
    _, (expected,) = gradients(lambda w: plain(hidden, w, bias, target), weight, of=of)
    _, (got,) = gradients(
        lambda w: linear_log_probs(hidden, w.T, target, bias=bias), weight.T.contiguous(), of=of
    )
    torch.testing.assert_close(got.T, expected)


def test_16_bit_hidden_states_meet_float32_master_weights():
    hidden, weight, bias, target = make(torch.float32)
    narrow = hidden.to(torch.bfloat16)
    out = linear_log_probs(narrow, weight, target, bias=bias)
    torch.testing.assert_close(out, plain(narrow.float(), weight, bias, target))


def test_token_ids_may_be_narrow_integers():
    hidden, weight, bias, target = make()
    out = linear_log_probs(hidden, weight, target.int(), bias=bias)
    torch.testing.assert_close(out, plain(hidden, weight, bias, target.int()))
    torch.testing.assert_close(out, linear_log_probs(hidden, weight, target, bias=bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}], ids=str)
def test_blocks_of_the_vocabulary_make_the_whole(monkeypatch, dtype, options):
    hidden, weight, bias, target = make(dtype)
    ids = torch.stack([target, (target + 20) % V], -1)
    of = torch.randn(B, T, generator=torch.Generator().manual_seed(3))

    def run(**more):
        return gradients(
            lambda h, w, b: linear_log_probs(h, w, target, bias=b, **options, **more),
            hidden, weight, bias, of=of,
        ), linear_log_probs(hidden, weight, target, bias=bias, entropy=True, **options, **more)

    for more in ({}, {"support": ids}, {"chunk_size": 3}):
        monkeypatch.setattr(reader_module, "CPU_ROWS", V)
        whole = run(**more)
        for rows in (1, 5, V // 2):
            monkeypatch.setattr(reader_module, "CPU_ROWS", rows)
            torch.testing.assert_close(run(**more), whole)


@pytest.mark.parametrize("span", [3.0, 300.0, 3e4])
@pytest.mark.parametrize("falling", [False, True])
def test_logits_that_rise_or_fall_from_block_to_block_lose_no_digits(span, falling):
    logits = torch.linspace(-span, span, V).flip(0) if falling else torch.linspace(-span, span, V)
    weight = logits[:, None] * torch.eye(1, D)
    hidden = torch.eye(1, D).expand(V, D)
    target = torch.arange(V)
    out = linear_log_probs(hidden, weight, target, entropy=True)
    exact = linear_log_probs(hidden.double(), weight.double(), target, entropy=True)
    log_p = logits.double().log_softmax(-1)
    torch.testing.assert_close(exact.log_probs, log_p, rtol=1e-13, atol=1e-13)
    entropy = -(log_p.exp() * log_p).sum()
    torch.testing.assert_close(exact.entropy[0], entropy, rtol=1e-12, atol=1e-13)
    for x, y in zip(out, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-7)


def test_rows_that_pad_the_vocabulary_are_left_out():
    hidden, weight, bias, target = make()
    of = torch.ones(B, T, dtype=torch.float64)
    padding = torch.full((3, D), torch.nan, dtype=torch.float64)
    padded = [torch.cat([weight, padding]), torch.cat([bias, padding[:, 0]])]

    def run(w, b):
        return linear_log_probs(hidden, w, target, bias=b, vocabulary_size=V)

    value, grads = gradients(run, *padded, of=of)
    expected, expected_grads = gradients(run, weight, bias, of=of)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad[:V], expected_grad, rtol=0, atol=0)
        assert (grad[V:] == 0).all()


def test_what_is_returned_is_no_view():
    hidden, weight, _, target = make()
    for layout in (None, torch.ones(B, T, dtype=torch.bool)):
        out = linear_log_probs(hidden, weight.requires_grad_(), target, layout=layout)
        assert not out._is_view()


def test_no_tokens_give_no_log_probs_and_zero_gradients():
    weight = torch.randn(V, D, requires_grad=True)
    hidden = torch.zeros(2, 0, D, requires_grad=True)
    out = linear_log_probs(hidden, weight, torch.zeros(2, 0, dtype=torch.int64))
    assert out.shape == (2, 0)
    out.sum().backward()
    assert (weight.grad == 0).all()
    nobody = linear_log_probs(
        hidden, weight, torch.zeros(2, 0, dtype=torch.int64),
        support=torch.zeros(2, 0, 3, dtype=torch.int64),
    )
    assert nobody.shape == (2, 0)
    masked = linear_log_probs(
        torch.randn(2, 3, D), weight, torch.zeros(2, 3, dtype=torch.int64),
        layout=torch.zeros(2, 3, dtype=torch.bool),
    )
    assert (masked == 0).all()


def test_differentiating_twice_says_that_it_is_not_supported():
    hidden, weight, bias, target = make()
    hidden.requires_grad_()
    out = linear_log_probs(hidden, weight, target, bias=bias).sum()
    with pytest.raises(RuntimeError, match=r"twice .* is not supported"):
        torch.autograd.grad(out, hidden, create_graph=True)


BAD = {
    "narrow weight": ({"weight": torch.zeros(V, D + 1)}, "hidden"),
    "integer weight": ({"weight": torch.zeros(V, D, dtype=torch.int64)}, "weight"),
    "weight of three axes": ({"weight": torch.zeros(1, V, D)}, "weight"),
    "target beyond the vocabulary": ({"target": torch.full((B, T), V)}, "target"),
    "negative target": ({"target": torch.full((B, T), -100)}, "target"),
    "float target": ({"target": torch.zeros(B, T)}, "target"),
    "shifted target": ({"target": torch.zeros(B, T + 1, dtype=torch.int64)}, "target"),
    "integer hidden": ({"hidden": torch.zeros(B, T, D, dtype=torch.int64)}, "hidden"),
    "bias of another width": ({"bias": torch.zeros(V + 1)}, "bias"),
    "no temperature": ({"temperature": 0.0}, "temperature"),
    "negative softcap": ({"softcap": -1.0}, "softcap"),
    "empty chunks": ({"chunk_size": 0}, "chunk_size"),
    "a vocabulary beyond the head": ({"vocabulary_size": V + 1}, "vocabulary_size"),
    "no vocabulary": ({"vocabulary_size": 0}, "vocabulary_size"),
    "a group that is none": ({"vocabulary_group": 2}, "vocabulary_group"),
    "integer head": ({"head_dtype": torch.int8}, "head_dtype"),
    "float mask": ({"layout": torch.ones(B, T)}, "layout"),
    "mask of other tokens": ({"layout": torch.ones(B, T + 1, dtype=torch.bool)}, "layout"),
    "support of other tokens": (
        {"support": torch.zeros(B, T + 1, 2, dtype=torch.int64)}, "support",
    ),
    "support beyond the vocabulary": (
        {"support": torch.full((B, T, 2), V)}, "support",
    ),
    "offsets of other tokens": (
        {"support": Support(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2]))}, "support",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    hidden, weight, bias, target = make(torch.float32)
    given_, argument = BAD[case]
    arguments = {"hidden": hidden, "weight": weight, "target": target, "bias": bias} | given_
    with pytest.raises(InputError, match=rf"`{argument}` must be .* Fix: "):
        linear_log_probs(**arguments)


@pytest.mark.parametrize("trained", [True, False])
def test_a_target_outside_its_support_has_no_gradient(trained):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator) for n in (3, 6))
    target, support = torch.tensor([1, 2, 3]), torch.tensor([[1, 0], [4, 5], [3, 2]])
    inputs = hidden.requires_grad_(), weight.requires_grad_(trained)
    found = linear_log_probs(*inputs, target, support=support)
    assert found[1] == -torch.inf
    found.backward(torch.ones(3))
    expected = [x.detach().double().requires_grad_() for x in inputs]
    log_probs_from_logits(expected[0] @ expected[1].mT, target, support=support).backward(
        torch.ones(3, dtype=torch.float64)
    )
    for x, y in zip(inputs[: 1 + trained], expected[: 1 + trained], strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-6)
    assert not hidden.grad[1].any()
