"""Nothing on the loss path synchronises, branches on values, or breaks the graph."""

import math

import numpy as np
import pytest
import torch
from batches import make_batch
from components import OBJECTIVES
from test_layout import loss_and_gradient, pack
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import iscorrect as ic
from iscorrect import PRESETS, Layout, PolicyLoss
from iscorrect.loss import divergences

BOUNDS = {
    "clip": ic.Clip(0.5, 2.0),
    "ionides": ic.Truncate(ic.IonidesCap()),
    "mse": ic.Truncate(ic.MSEOptimalCap()),
    "ess": ic.Mask(high=ic.ESSCap(0.8)),
}
CORRECTIONS = {name: preset() for name, preset in PRESETS.items()} | {
    name: ic.Correction(bound=bound, normalize=True, reject=(ic.Veto(high=10.0),))
    for name, bound in BOUNDS.items()
}

PAIRS = [
    pytest.param(
        name, objective,
        marks=() if objective == "reinforce" or name == "token-tis" else pytest.mark.slow,
    )
    for name in CORRECTIONS for objective in OBJECTIVES
]
"""All of them; every correction once and every objective once are in the fast tier."""


def inputs(batch, layout_ids=None):
    layout = Layout(batch.mask, sequence_ids=layout_ids)
    return dict(
        rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages, mask=layout,
        old_log_probs=batch.old_log_probs, ref_log_probs=batch.ref_log_probs,
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_a_loss_runs_on_fake_tensors_so_nothing_reads_a_value(name, objective, packed):
    loss_fn = PolicyLoss(
        correction=CORRECTIONS[name], objective=OBJECTIVES[objective],
        aggregation="seq-mean-token-mean", reference_kl=ic.ReferenceKL(),
    )
    batch = make_batch(0, rows=4, width=8).to(torch.float32)
    with FakeTensorMode() as mode:
        fake = type(batch)(*(mode.from_tensor(x) for x in batch))
        ids = mode.from_tensor(torch.arange(8).expand(4, 8) // 3) if packed else None
        log_probs = fake.log_probs.clone().requires_grad_()
        loss, metrics = loss_fn(log_probs, **inputs(fake, ids))
        loss.backward()
        assert loss.shape == ()
        assert all(value.shape == () for value in metrics.values())
        assert log_probs.grad.shape == log_probs.shape


COMPILED = [
    ("sequence-mis", "dual-ppo-clip", True),
    ("icepop", "gspo", True),
    ("confidence-is", "cispo", False),
    ("kpop", "prefix-ppo-clip", True),
    ("dppo", "sequence-ppo-clip", False),
    ("geometric-rs", "dual-ppo-clip", False),
    ("trust-region-mask", "reinforce", True),
    ("off-policy-negative", "dual-ppo-clip", False),
    ("topr", "reinforce", False),
    ("pareto-is", "reinforce", False),
    ("mse", "dual-ppo-clip", False),
    ("ipo", "sapo", True),
    ("flash-reinforce", "gmpo", True),
    ("m2po", "vespo", False),
    ("token-tis", "aspo", False),
    ("uncorrected", "capped-ppo-clip", False),
]


@pytest.mark.parametrize(
    ("name", "objective", "packed"),
    [
        ("token-tis", "reinforce", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in COMPILED),
    ],
)
def test_one_graph_serves_two_batch_shapes(name, objective, packed):
    loss_fn = PolicyLoss(
        correction=CORRECTIONS[name], objective=OBJECTIVES[objective],
        reference_kl=ic.ReferenceKL(),
    )
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(log_probs, batch, ids):
        return loss_fn(log_probs, **inputs(batch, ids))

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compiled_graphs = []
    for seed, (rows, width) in enumerate([(4, 8), (6, 12)]):
        batch = make_batch(seed, rows=rows, width=width)
        ids = torch.arange(width).expand(rows, width) // 3 if packed else None
        log_probs = batch.log_probs.clone().requires_grad_()
        loss, metrics = compiled(log_probs, batch, ids)
        compiled_graphs.append(counter.frame_count)
        loss.backward()
        expected, gradient, expected_metrics = loss_and_gradient(
            loss_fn, batch, Layout(batch.mask, sequence_ids=ids)
        )
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(log_probs.grad[batch.mask], gradient, rtol=1e-9, atol=1e-12)
        assert metrics.to_floats() == pytest.approx(expected_metrics, rel=1e-9, abs=1e-12)
    first, second = compiled_graphs
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_the_default_compiler_agrees_with_eager(packed):
    loss_fn = PolicyLoss(correction=ic.token_tis(), objective=ic.PPOClip())
    batch = make_batch(1, rows=4, width=8).to(torch.float32)
    ids = pack(batch)[1] if packed else None
    batch = pack(batch)[0] if packed else batch
    layout = ids or Layout(batch.mask)

    @torch.compile(fullgraph=True)
    def step(log_probs):
        return loss_fn(
            log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
            mask=layout, old_log_probs=batch.old_log_probs,
        )

    log_probs = batch.log_probs.clone().requires_grad_()
    loss, metrics = step(log_probs)
    loss.backward()
    eager = batch.log_probs.clone().requires_grad_()
    expected, expected_metrics = loss_fn(
        eager, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
        mask=layout, old_log_probs=batch.old_log_probs,
    )
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(log_probs.grad, eager.grad)
    assert metrics.to_floats() == pytest.approx(expected_metrics.to_floats(), rel=1e-5, abs=1e-6)


def head_problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    batch = make_batch(3, rows=3, width=6)
    hidden = torch.randn(*batch.mask.shape, 8, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(31, 8, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(31, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(29, batch.mask.shape, generator=generator)
    return batch, hidden, weight, bias, target


HEADS = {
    "plain": {},
    "options": {"temperature": 0.7, "softcap": 3.0, "vocabulary_size": 30, "chunk_size": 4},
}


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("support", [False, True])
def test_the_head_is_one_node_of_a_graph(options, trained, support):
    batch, hidden, weight, bias, target = head_problem()
    more = dict(HEADS[options], layout=batch.mask, entropy=True)
    if support:
        more["support"] = torch.stack([target, (target + 1) % 29, -torch.ones_like(target)], -1)
    found = []
    torch._dynamo.reset()
    for run in (
        ic.linear_log_probs,
        torch.compile(ic.linear_log_probs, fullgraph=True, backend="aot_eager"),
    ):
        leaves = [x.clone().requires_grad_(trained) for x in (hidden, weight, bias)]
        leaves[0].requires_grad_()
        out = run(leaves[0], leaves[1], target, bias=leaves[2], **more)
        (out.log_probs * batch.advantages).sum().backward()
        found.append((tuple(x.detach() for x in out), [x.grad for x in leaves]))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize(
    ("trained", "packed"),
    [(True, True), *(pytest.param(*case, marks=pytest.mark.slow)
                     for case in ((True, False), (False, True), (False, False)))],
)
def test_the_loss_of_hidden_states_is_one_graph(trained, packed):
    batch, hidden, weight, bias, target = head_problem()
    loss_fn = PolicyLoss(correction=ic.sequence_tis(), objective=ic.PPOClip())
    ids = torch.arange(6).expand(3, 6) // 3 if packed else None
    found = []
    torch._dynamo.reset()

    def step(hidden, weight, bias):
        rest = inputs(batch, ids)
        rest.pop("ref_log_probs")
        return ic.fused_policy_loss(
            loss_fn, hidden=hidden, weight=weight, bias=bias, target=target, **rest
        )

    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_(trained) for x in (hidden, weight, bias)]
        leaves[0].requires_grad_()
        loss, metrics = run(*leaves)
        loss.backward()
        found.append((loss.detach(), [x.grad for x in leaves], metrics.to_floats()))
    torch.testing.assert_close(found[1][:2], found[0][:2])
    assert found[1][2] == pytest.approx(found[0][2], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_compiler_keeps_the_digits_of_small_log_ratios(dtype):
    d = torch.logspace(-6, 1, 400, dtype=dtype)
    d = torch.cat([d, -d])

    @torch.compile(fullgraph=True)
    def compiled(d):
        return divergences.k3(d), divergences.expm1(d), ic.binary_kl(-d.abs(), -1.01 * d.abs())

    found, wide = compiled(d), d.double()
    exact = np.expm1(wide.numpy()) - wide.numpy()
    for small in (wide.abs() < 1e-2).nonzero()[:, 0].tolist():
        exact[small] = sum(wide[small].item() ** k / math.factorial(k) for k in range(2, 12))
    torch.testing.assert_close(found[0].double(), torch.from_numpy(exact), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1].double(), torch.expm1(wide), rtol=1e-6, atol=0)
    assert found[2].isfinite().all()


def test_a_compiled_loss_reports_the_k3_and_makes_the_cap_of_an_eager_one():
    generator = torch.Generator().manual_seed(0)
    rollout = -(0.5 - 0.5 * torch.rand(64, 512, generator=generator)) ** 8
    log_probs = (rollout + 2e-4 * torch.randn(64, 512, generator=generator)).clamp(max=-1e-7)
    loss_fn = PolicyLoss(correction=ic.confidence_is())
    mask = torch.ones(64, 512, dtype=torch.bool)

    @torch.compile(fullgraph=True)
    def step(log_probs):
        loss, metrics = loss_fn(
            log_probs, rollout_log_probs=rollout, advantages=torch.ones(64), mask=mask
        )
        return loss, metrics["mismatch/kl_k3"]

    d = (log_probs - rollout).double()
    exact = (torch.expm1(d) - d).mean()
    loss, k3 = step(log_probs)
    assert k3.item() == pytest.approx(exact.item(), rel=1e-5)
    expected, _ = loss_fn(
        log_probs, rollout_log_probs=rollout, advantages=torch.ones(64), mask=mask
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "objective"),
    [("token-tis", "dual-ppo-clip"), *(
        pytest.param(name, objective, marks=pytest.mark.slow)
        for name in ("uncorrected", "token-tis", "sequence-mis")
        for objective in ("reinforce", "dual-ppo-clip")
        if (name, objective) != ("token-tis", "dual-ppo-clip")
    )],
)
def test_an_exported_loss_takes_other_shapes(name, objective):
    loss_fn = PolicyLoss(
        correction=CORRECTIONS[name], objective=OBJECTIVES[objective],
        reference_kl=ic.ReferenceKL(),
    )

    class Step(torch.nn.Module):
        def forward(self, batch, log_probs):
            return loss_fn(log_probs, **inputs(batch))[0]

    def example(seed, rows, width):
        batch = make_batch(seed, rows=rows, width=width)
        return batch, batch.log_probs.clone()

    rows, width = torch.export.Dim("b", min=2, max=64), torch.export.Dim("t", min=2, max=64)
    shape = {0: rows, 1: width}
    batch, _ = arguments = example(0, 4, 8)
    exported = torch.export.export(
        Step(), arguments, dynamic_shapes=(type(batch)(*[shape] * len(batch)), shape), strict=False
    )
    other = example(1, 6, 12)
    torch.testing.assert_close(exported.module()(*other), Step()(*other), rtol=1e-14, atol=0)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="an older torch.compile does not follow how a loss is made",
)
@pytest.mark.parametrize("made", [ic.token_tis_loss, ic.masked_is_loss, ic.sequence_is_loss])
def test_a_function_that_makes_its_loss_compiles(made):
    batch = make_batch(0)
    given = inputs(batch)
    del given["ref_log_probs"]
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    expected = made(batch.log_probs, **given)
    torch.testing.assert_close(compiled(batch.log_probs, **given)[0], expected[0])


def test_a_compiled_clip_runs_where_nothing_is_trained():
    batch = make_batch(0)
    given = inputs(batch)
    del given["ref_log_probs"]
    loss_fn = PolicyLoss(correction=ic.token_tis(), objective=ic.PPOClip())
    compiled = torch.compile(
        lambda x: loss_fn(x, **given)[0], fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch.log_probs), loss_fn(batch.log_probs, **given)[0])
