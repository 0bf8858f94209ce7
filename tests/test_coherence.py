"""n* on gradients whose bias and noise are known, and on the lab's chain, where it is exact."""

import math

import pytest
import torch

from benchmarks.lab.chain.coherence import SHOWN, measure
from benchmarks.lab.chain.world import World
from iscorrect import GradientSketch, InputError, coherence
from iscorrect.adapters.trl import _n_star
from iscorrect.loop import coherence as module

SEQUENCES, WIDTH = 8, 400


def gradients(batches, *, shared, own, seed=0):
    """Gradients without and with weights.

    The noise of one of 8 sequences has trace 8 · 400; the bias has ``shared`` in every coordinate,
    and a part of size ``own`` that is drawn anew for every batch.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(batches, WIDTH, generator=generator, dtype=torch.float64)

    corrected = draw()
    return corrected + shared + own * draw(), corrected


def test_the_share_is_the_squared_shared_bias_over_the_noise_of_one_sequence():
    found = [
        coherence(*gradients(40, shared=0.1, own=0.3, seed=seed), sequences=SEQUENCES)
        for seed in range(100)
    ]
    # the part that is drawn anew belongs to the noise, and to no bias
    expected = WIDTH * 0.1**2 / (SEQUENCES * WIDTH * (1 + 0.3**2))
    shares = torch.tensor([x.share for x in found])
    assert shares.mean().item() == pytest.approx(expected, rel=0.02)
    errors = torch.tensor([x.error for x in found])
    assert errors.mean().item() == pytest.approx(shares.std().item(), rel=0.3)
    inside = [x.low <= 1 / expected <= x.high for x in found]
    assert sum(inside) / len(inside) > 0.88


def test_a_bias_that_no_two_batches_share_has_no_n_star_within_the_error():
    found = [
        coherence(*gradients(40, shared=0.0, own=0.3, seed=seed), sequences=SEQUENCES)
        for seed in range(40)
    ]
    assert sum(x.high == math.inf for x in found) >= 37
    assert any(x.n_star == math.inf for x in found)
    assert all(x.low > 1000 for x in found)


def test_the_jackknife_leaves_each_batch_out():
    uncorrected, corrected = gradients(12, shared=0.1, own=0.1)
    whole = coherence(uncorrected, corrected, sequences=SEQUENCES)
    each = []
    for i in range(12):
        rest = [j for j in range(12) if j != i]
        each.append(coherence(uncorrected[rest], corrected[rest], sequences=SEQUENCES).share)
    each = torch.tensor(each, dtype=torch.float64)
    error = (11 / 12 * (each - each.mean()).square().sum()).sqrt()
    assert whole.error == pytest.approx(error.item())


def alike(x):
    return x[:1].repeat(len(x), 1)


@pytest.mark.parametrize("degenerate", [
    lambda g, c: (torch.zeros_like(g), c), lambda g, c: (alike(g), c),
    lambda g, c: (alike(g), alike(c)), lambda g, c: (alike(g.float()), c.float()),
    lambda g, c: (torch.zeros_like(g), torch.zeros_like(c)),
    lambda g, c: (torch.cat([g[:1], alike(g[1:])]), c),
    lambda g, c: (torch.cat([0 * g[1:], g[:1]]), c),
])
def test_without_noise_there_is_nothing_to_measure(degenerate):
    uncorrected, corrected = degenerate(*gradients(12, shared=0.1, own=0.1))
    found = coherence(uncorrected, corrected, sequences=SEQUENCES)
    assert all(math.isnan(x) for x in found)
    pairs = [*zip(uncorrected, corrected, strict=True)]
    assert not _n_star(pairs, SEQUENCES)


def test_without_bias_no_batch_is_large_enough():
    _, corrected = gradients(12, shared=0.1, own=0.1)
    found = coherence(corrected, corrected, sequences=SEQUENCES)
    assert found == (math.inf, math.inf, math.inf, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHOWN)
def test_on_the_chain_it_is_the_exact_one_within_its_error(engine):
    world = World(length=32, prompts=2, task=3)
    kl, estimated, exact = measure(engine, world=world, batches=40)
    assert kl > 0
    assert abs(estimated.share - exact.share) < 2 * estimated.error
    assert estimated.low < exact.n_star < estimated.high
    assert exact.error < estimated.error


def test_a_sketch_keeps_inner_products_without_bias():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3000, generator=generator)
    found = [
        (sketch([a[:1000], a[1000:].view(2, 1000)]), sketch([b[:1000], b[1000:].view(2, 1000)]))
        for sketch in (GradientSketch(seed=seed, size=101) for seed in range(300))
    ]
    products = torch.stack([x @ y for x, y in found])
    spread = a.norm() * b.norm() / math.sqrt(101)
    assert products.std().item() == pytest.approx(spread.item(), rel=0.25)
    assert abs(products.mean() - a @ b).item() < 3 * spread / math.sqrt(300)


def test_a_sketch_is_the_same_in_parts_and_linear(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5000, generator=generator)
    sketch = GradientSketch(size=53)
    assert torch.allclose(sketch([a]) + 2 * sketch([b]), sketch([a + 2 * b]), atol=1e-4)
    assert torch.allclose(sketch([a, None, b]), sketch([a, 0 * a, b]), atol=1e-4)
    monkeypatch.setattr(module, "PART", 100)  # random numbers come in other portions then
    found = [GradientSketch(size=53, seed=seed)([a]) for seed in range(40)]
    lengths = torch.stack([x @ x for x in found])
    assert lengths.mean().item() == pytest.approx((a @ a).item(), rel=0.15)


def test_parts_of_a_gradient_on_several_ranks_add_up():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 20_000, generator=generator)
    halves = [
        sum(GradientSketch(seed=rank)([x[rank * 10_000 :][:10_000]]) for rank in (0, 1))
        for x in (a, b)
    ]
    assert abs(halves[0] @ halves[1] - a @ b) < 4 * a.norm() * b.norm() / math.sqrt(8191)


@pytest.mark.parametrize("shapes", [[(1024,)] * 60, [(16, 8)] * 200, [(1,), (896,)] * 48])
def test_a_gradient_of_many_small_tensors_is_kept_as_well_as_one_of_a_large(shapes):
    errors = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        a, b = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
        sketch = GradientSketch(seed=seed)
        exact = sum((x * y).sum() for x, y in zip(a, b, strict=True))
        sizes = math.prod(sum(x.square().sum() for x in g).sqrt().item() for g in (a, b))
        errors.append((sketch(a) @ sketch(b) - exact).item() / sizes)
    spread = (sum(x * x for x in errors) / len(errors)) ** 0.5
    assert spread < 1.5 / math.sqrt(8191)


def test_16_bit_gradients_are_added_up_in_float32():
    ones = torch.ones(100_000, dtype=torch.bfloat16)
    assert torch.equal(GradientSketch(size=11)([ones]), GradientSketch(size=11)([ones.float()]))


@pytest.mark.parametrize(("call", "said"), [
    (lambda g: coherence(g[:3], g[:3], sequences=8), "at least 4 batches"),
    (lambda g: coherence(g, g[:, :3], sequences=8), "`corrected` must be a tensor `i k`"),
    (lambda g: coherence(g[0], g[0], sequences=8), "`uncorrected` must be a tensor `i k`"),
    (lambda g: coherence(g, g * math.nan, sequences=8), "NaN or ±inf"),
    (lambda g: coherence(g, g, sequences=0), "the sequences of a batch"),
    (lambda g: GradientSketch()([None]), "call it after backward"),
    (lambda g: GradientSketch(size=0), "how many numbers a sketch has"),
    (lambda g: GradientSketch(size=1.5), "`size` must be a whole number >= 1, .* got 1.5"),
    (lambda g: GradientSketch(size=7.0), "`size` must be a whole number >= 1, .* got 7.0"),
    (lambda g: GradientSketch(seed="a"), "`seed` must be a whole number, .* got 'a'"),
    (lambda g: GradientSketch()([None, g.to_sparse()]), "`gradients` must be dense, got .* 1"),
])
def test_what_it_cannot_use_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call(torch.ones(5, 10))


def test_a_sketch_is_of_float32_whatever_the_default():
    g = [torch.randn(5000)]
    plain = GradientSketch(size=11)(g)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(GradientSketch(size=11)(g), plain)
    finally:
        torch.set_default_dtype(before)
