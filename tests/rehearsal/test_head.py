"""The LM head on a rehearsed GPU: every dtype runs, is exact, and costs what is stated."""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch

from iscorrect import (
    PolicyLoss,
    Support,
    fused_policy_loss,
    linear_log_probs,
    sequence_tis,
    token_tis,
)
from iscorrect.head import onepass as onepass_module, reader as reader_module
from iscorrect.head.block import EAGER, compiled
from rehearsal import Rehearsal

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
N, V, D = 48, 320, 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Five blocks of rows and three chunks of tokens, as 10 and 2 to 8 are in training."""
    monkeypatch.setattr(reader_module, "GPU_ROWS", 64)
    monkeypatch.setattr(reader_module, "GPU_TOKENS", 16)
    monkeypatch.setattr(onepass_module, "GPU_TOKENS", 16)


# before torch 2.8 products of 16-bit matrices have 16-bit results, and are made of float32 ones
wide_results = pytest.mark.skipif(
    not hasattr(torch.ops.aten.addmm, "dtype_out"), reason="needs torch 2.8"
)


@dataclass
class Problem:
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    target: torch.Tensor
    rollout: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def make(cls, hidden=BF16, weight=None, *, train=("hidden", "weight")):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        problem = cls(
            normal(1, N, D).to(hidden), (normal(V, D) / 4).to(weight or hidden),
            normal(V).to(weight or hidden), torch.randint(V, (1, N), generator=generator),
            -6.2 + 0.1 * normal(1, N), normal(1, N), torch.ones(1, N, dtype=torch.bool),
        )
        for name in train:
            getattr(problem, name).requires_grad_()
        return problem

    def leaves(self):
        every = (self.hidden, self.weight, self.bias)
        return [x for x in every if x.requires_grad]

    def exact(self, loss):
        """float64 gradients of ``loss`` of the log-probs."""
        every = [x.detach().double().requires_grad_() for x in (self.hidden, self.weight)]
        bias = self.bias.detach().double().requires_grad_() if self.bias.requires_grad else None
        z = every[0] @ every[1].T
        z = z if bias is None else z + bias
        log_probs = z.log_softmax(-1).gather(-1, self.target[..., None])[..., 0]
        value = loss(log_probs)
        value.backward()
        of = [*every, *([] if bias is None else [bias])]
        asked = [x.requires_grad for x in (self.hidden, self.weight)] + [True]
        return value.detach(), [x.grad for x, wanted in zip(of, asked, strict=False) if wanted]

    def naive(self, loss):
        """As a trainer writes it: products in the dtype of the model, float32 afterwards."""
        every = [x.detach().clone().requires_grad_() for x in (self.hidden, self.weight)]
        z = (every[0] @ every[1].T.to(every[0].dtype)).float()
        log_probs = z.log_softmax(-1).gather(-1, self.target[..., None])[..., 0]
        loss(log_probs).backward()
        asked = (self.hidden, self.weight)
        return [x.grad for x, of in zip(every, asked, strict=True) if of.requires_grad]

    def two_passes(self, **more):
        bias = self.bias if self.bias.requires_grad else None
        log_probs = linear_log_probs(self.hidden, self.weight, self.target, bias=bias, **more)
        return (log_probs * self.advantages).sum()

    def one_pass(self, loss_fn=None, **more):
        bias = self.bias if self.bias.requires_grad else None
        loss, _ = fused_policy_loss(
            loss_fn or PolicyLoss(correction=token_tis()), hidden=self.hidden, weight=self.weight,
            target=self.target, bias=bias, rollout_log_probs=self.rollout,
            **({"advantages": self.advantages, "mask": self.mask} | more),
        )
        return loss

    def score(self, log_probs):
        return (log_probs * self.advantages).sum()

    def tis(self, log_probs):
        weights = (log_probs.detach() - self.rollout).exp().clamp(max=2)
        return -(weights * self.advantages * log_probs).mean()


def run(problem, route, **more):
    """Value, gradients and the ledger of forward and backward."""
    with Rehearsal() as gpu:
        value = getattr(problem, route)(**more)
        value.backward()
    return value.detach(), [x.grad for x in problem.leaves()], gpu.ledger


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


ROUTES = {"two_passes": "score", "one_pass": "tis"}
TRAINED = [("hidden", "weight"), ("hidden",), ("weight",), ("hidden", "weight", "bias")]


@pytest.mark.parametrize("train", TRAINED, ids="+".join)
@pytest.mark.parametrize(("hidden", "weight"), [(BF16, BF16), (F16, F16), (F32, F32), (BF16, F32)])
@pytest.mark.parametrize("route", ROUTES)
def test_every_dtype_runs_and_is_exact(route, hidden, weight, train):
    problem = Problem.make(hidden, weight, train=train)
    value, grads, _ = run(problem, route)
    expected, exact = problem.exact(getattr(problem, ROUTES[route]))
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-5)
    for found, true in zip(grads, exact, strict=True):
        assert error(found, true) < {BF16: 4e-3, F16: 5e-4, F32: 1e-5}[hidden]


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("route", ROUTES)
def test_gradients_are_no_less_exact_than_the_naive_ones(route, dtype):
    problem = Problem.make(dtype)
    _, grads, _ = run(problem, route)
    _, exact = problem.exact(getattr(problem, ROUTES[route]))
    naive = problem.naive(getattr(problem, ROUTES[route]))
    for found, plain, true in zip(grads, naive, exact, strict=True):
        assert error(found, true) <= 1.05 * error(plain, true)


@wide_results
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("route", ROUTES)
def test_all_products_of_16_bit_models_are_products_of_16_bits(route, dtype):
    problem = Problem.make(dtype)
    _, _, ledger = run(problem, route)
    times = {"two_passes": 4, "one_pass": 3}[route]
    assert ledger.multiplications(dtype) == times * N * V * D
    assert all(set(kernel.operands) == {dtype} for kernel in ledger.products)


def test_float16_keeps_digits_of_coefficients_that_it_has_no_range_for():
    problem = Problem.make(F16)
    problem.advantages *= torch.logspace(-9, 9, N)
    loss_scale = 2.0**-20

    def scaled(log_probs):
        return problem.score(log_probs) * loss_scale

    with Rehearsal():
        (problem.two_passes() * loss_scale).backward()
    _, exact = problem.exact(scaled)
    assert error(problem.weight.grad, exact[1]) < 1e-3
    rows = problem.hidden.grad.double() - exact[0]
    large = exact[0].norm(dim=-1) > 1e-2
    assert (rows.norm(dim=-1) / exact[0].norm(dim=-1))[large].max() < 2e-3


@wide_results
@pytest.mark.parametrize("route", ROUTES)
def test_masters_in_float32_are_multiplied_in_16_bits_under_autocast(route):
    problem = Problem.make(BF16, F32)
    rounded = Problem.make(BF16)
    with Rehearsal() as gpu, torch.autocast("cuda", dtype=BF16):
        value = getattr(problem, route)()
        value.backward()
    assert all(set(kernel.operands) == {BF16} for kernel in gpu.ledger.products)
    assert problem.weight.grad.dtype == F32
    expected, exact = rounded.exact(getattr(rounded, ROUTES[route]))
    torch.testing.assert_close(value.detach().double(), expected, rtol=1e-6, atol=1e-5)
    assert error(problem.weight.grad, exact[1]) < 3e-3


def test_autocast_rounds_masters_alike_on_both_devices():
    values = []
    for device in ("cuda", "cpu"):
        problem = Problem.make(BF16, F32)
        if device == "cuda":
            with Rehearsal(), torch.autocast("cuda", dtype=BF16):
                values.append(problem.two_passes().detach())
        else:
            with torch.autocast("cpu", dtype=BF16):
                values.append(problem.two_passes().detach())
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("older", [{"wide_output": False}, {"capability": (7, 5)}], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_without_float32_results_the_factors_are_float32(monkeypatch, older, route):
    if "wide_output" in older:
        monkeypatch.setattr(reader_module, "leaves_float32", lambda *_: False)
    problem = Problem.make(BF16)
    with Rehearsal(**older):
        value = getattr(problem, route)()
        value.backward()
    expected, exact = problem.exact(getattr(problem, ROUTES[route]))
    torch.testing.assert_close(value.detach().double(), expected, rtol=1e-6, atol=1e-5)
    assert error(problem.weight.grad, exact[1]) < 2e-3


@pytest.mark.parametrize("wrong", [-100, -1, V, V + 7])
def test_a_target_outside_the_vocabulary_is_nan_on_a_device_that_is_not_asked(wrong):
    problem = Problem.make()
    problem.target[0, 3] = wrong
    with Rehearsal():
        log_probs = linear_log_probs(problem.hidden, problem.weight, problem.target)
        assert log_probs.isnan().nonzero().tolist() == [[0, 3]]
        loss = problem.one_pass()
        loss.backward()
    assert problem.weight.grad.isfinite().all()
    assert (problem.hidden.grad[0, 3] == 0).all()


def test_a_support_id_outside_the_vocabulary_is_nan_too():
    problem = Problem.make()
    kept = torch.stack([problem.target, (problem.target + 1) % V], -1)
    kept[0, 5, 1] = V
    rows = kept.clone().flatten()
    rows[2 * 7 + 1] = -3
    offsets = torch.arange(0, 2 * N + 1, 2)
    for support, wrong in ((kept, [5]), (Support(rows, offsets), [5, 7])):
        with Rehearsal():
            out = linear_log_probs(
                problem.hidden, problem.weight, problem.target, support=support
            )
        assert out[0].isnan().nonzero().squeeze(-1).tolist() == wrong


def test_what_is_not_finite_and_not_counted_by_the_loss_reaches_no_gradient():
    problem = Problem.make()
    with torch.no_grad():
        problem.hidden[0, 3] = torch.nan
        problem.hidden[0, 20] = torch.inf
    run(problem, "one_pass")
    assert problem.weight.grad.isfinite().all()
    assert (problem.hidden.grad[0, [3, 20]] == 0).all()


def test_the_head_makes_nobody_wait():
    problem = Problem.make()
    *_, ledger = run(problem, "two_passes")
    assert not ledger.waits
    with Rehearsal() as gpu:
        problem.two_passes(layout=problem.mask)
    assert sum(gpu.ledger.waits.values()) == 1


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("support", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_options_give_on_a_device_what_they_give_on_a_cpu(trained, support, softcap):
    found = []
    for device in (nullcontext(), Rehearsal()):
        problem = Problem.make(torch.float64, train=("hidden", "weight", "bias") if trained else (
            "hidden",
        ))
        ids = torch.stack([problem.target, (problem.target + 7) % V, -problem.mask.long()], -1)
        ids[0, 3] = -1
        layout = problem.mask.clone()
        layout[0, ::5] = False
        with device:
            out = linear_log_probs(
                problem.hidden, problem.weight, problem.target, bias=problem.bias, softcap=softcap,
                temperature=0.7, support=ids if support else None, layout=layout, entropy=True,
                vocabulary_size=V, chunk_size=11,
            )
            finite = torch.where(out.log_probs.isfinite(), out.log_probs, 0)
            (finite * problem.advantages).sum().backward()
        found.append(([x.detach() for x in out], [x.grad for x in problem.leaves()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)
    assert found[0][0][0].isfinite().all() != support


def test_a_support_is_asked_for_its_offsets_before_the_first_chunk():
    problem = Problem.make()
    ids = torch.stack([problem.target[0], (problem.target[0] + 1) % V], -1).flatten()
    support = Support(ids, torch.arange(0, 2 * N + 1, 2))

    def waits(n):
        with Rehearsal() as gpu:
            loss = linear_log_probs(
                problem.hidden, problem.weight, problem.target, support=support, chunk_size=n
            )
            loss.sum().backward()
        return sum(gpu.ledger.waits.values())

    assert waits(N) == waits(4) == 2


def large(monkeypatch, dtype=BF16, train=("hidden", "weight")):
    """Sizes in the proportions of training: d/v = 1/40, five blocks, chunks as long as d."""
    monkeypatch.setattr(reader_module, "GPU_ROWS", 1024)
    monkeypatch.setattr(reader_module, "GPU_TOKENS", 128)
    monkeypatch.setattr(onepass_module, "GPU_TOKENS", 128)
    generator = torch.Generator().manual_seed(0)
    n, v, d = 256, 5120, 128

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    problem = Problem(
        normal(1, n, d).to(dtype), (normal(v, d) / 11).to(dtype), normal(v).to(dtype),
        torch.randint(v, (1, n), generator=generator), -8.6 + 0.1 * normal(1, n), normal(1, n),
        torch.ones(1, n, dtype=torch.bool),
    )
    for name in train:
        getattr(problem, name).requires_grad_()
    return problem, n * v


FROZEN = ("hidden",)


@wide_results
@pytest.mark.parametrize(
    ("route", "dtype", "train", "most"),
    [
        ("one_pass", BF16, ("hidden", "weight"), 38), ("one_pass", F16, ("hidden", "weight"), 45),
        ("one_pass", BF16, FROZEN, 35), ("two_passes", BF16, ("hidden", "weight"), 54),
        ("two_passes", BF16, FROZEN, 38),
    ],
)
def test_bytes_per_logit_beside_the_products(monkeypatch, route, dtype, train, most):
    problem, logits = large(monkeypatch, dtype, train)
    *_, ledger = run(problem, route)
    assert most - 5 < ledger.bytes_beside_products / logits < most


def test_waits_of_the_loss_of_hidden_states(monkeypatch):
    def waits(loss_fn, **more):
        problem, _ = large(monkeypatch)
        *_, ledger = run(problem, "one_pass", loss_fn=loss_fn, **more)
        return sum(ledger.waits.values())

    idle = torch.randn(1, 256)
    idle[0, ::3] = 0
    tokens, sequences = PolicyLoss(correction=token_tis()), PolicyLoss(correction=sequence_tis())
    old = torch.full((1, 256), -8.6)
    assert waits(tokens) == 2
    assert waits(tokens, advantages=idle) == 3
    assert waits(sequences, old_log_probs=old) == 3
    assert waits(sequences) == 4
    ids = torch.zeros(512, dtype=torch.long)
    support = Support(ids, torch.arange(0, 514, 2))
    assert waits(tokens, support=support) == 2 + 2
    assert waits(tokens, support=support, advantages=idle) == 3 + 4


@wide_results
def test_kernels_of_a_chunk(monkeypatch):
    def kernels(n):
        problem, _ = large(monkeypatch)
        for name in ("hidden", "target", "rollout", "advantages", "mask"):
            setattr(problem, name, getattr(problem, name)[:, :n].detach())
        problem.hidden.requires_grad_()
        *_, ledger = run(problem, "one_pass")
        return len(ledger.products), len(ledger.others)

    (products, others), (more_products, more_others) = kernels(128), kernels(256)
    assert more_products - products == 3 * 5
    assert more_others - others < 50 * 5


@wide_results
def test_idle_tokens_cost_no_gradient(monkeypatch):
    problem, logits = large(monkeypatch)
    with torch.no_grad():
        problem.advantages[0, ::2] = 0
    *_, ledger = run(problem, "one_pass")
    assert ledger.multiplications(BF16) == 2 * logits * 128
    _, exact = problem.exact(problem.tis)
    assert error(problem.weight.grad, exact[1]) < 3e-3


@pytest.mark.parametrize(("hidden", "weight"), [(BF16, BF16), (F16, F16), (F32, F32), (BF16, F32)])
@pytest.mark.parametrize("train", [("hidden", "weight"), FROZEN])
@pytest.mark.parametrize("route", ROUTES)
def test_compiled_kernels_give_the_same(route, hidden, weight, train, monkeypatch):
    # their code without a compiler, which does not see the rehearsal
    monkeypatch.setattr(torch, "compile", lambda f: f)
    compiled.cache_clear()
    found = []
    for compile_kernels in (False, True):
        problem = Problem.make(hidden, weight, train=train)
        with torch.no_grad():
            problem.hidden[0, 5] = torch.nan
            problem.advantages[0, 5] = 0
        layout = {} if route == "one_pass" else {"layout": problem.mask.clone()}
        if layout:
            layout["layout"][0, 5] = False
        value, grads, _ = run(problem, route, compile_kernels=compile_kernels, **layout)
        found.append((value, grads))
    compiled.cache_clear()
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=1e-4)


def test_without_a_compiler_a_warning_says_that_kernels_stay_eager(monkeypatch):
    def no_compiler(function):
        def fail(*args):
            raise RuntimeError("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    compiled.cache_clear()
    problem = Problem.make()
    with pytest.warns(UserWarning, match="stay eager: no compiler"):
        value, _, _ = run(problem, "one_pass", compile_kernels=True)
    compiled.cache_clear()
    torch.testing.assert_close(value, run(Problem.make(), "one_pass")[0])


@pytest.mark.slow
def test_the_compiler_makes_kernels_that_compute_what_the_eager_ones_do():
    """Its code for a CPU stands for that of a GPU."""
    compiled.cache_clear()
    kernels = compiled(torch.device("cpu"))
    assert not kernels.exponentials
    z = 3 * torch.randn(12, 70, generator=torch.Generator().manual_seed(0))
    z[:, 4] = -torch.inf
    before, factor, out = torch.zeros(12), -torch.rand(12), torch.empty(12, 70, dtype=BF16)
    largest, total = kernels.total(z, before, 1)
    made = kernels.derivative(z, largest, factor, 1, out)
    expected = EAGER.total(z, before, 1)
    torch.testing.assert_close((largest, total), expected)
    torch.testing.assert_close(made, EAGER.derivative(z, None, factor, 1, out), rtol=8e-3, atol=0)
    third = torch.tensor(1 / 3)
    assert torch.equal(kernels.scaled(z, third, BF16), EAGER.scaled(z, third, BF16))
