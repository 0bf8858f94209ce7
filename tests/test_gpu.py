"""On a real GPU: exact against float64, without waits, and the same as on a CPU.

What the rehearsal (tests/rehearsal) asks of a device that pretends, asked of one that is there.
"""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from batches import make_batch
from components import LOSSES

import iscorrect as ic
from iscorrect import (
    Layout,
    PolicyLoss,
    Support,
    fused_policy_loss,
    linear_log_probs,
    log_probs_from_logits,
    sequence_tis,
    token_tis,
)
from iscorrect.head import onepass as onepass_module, reader as reader_module

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # inductor recommends to give up digits
    pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning"),
]

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
N, V, D = 300, 5003, 256
BOUND = {BF16: 4e-3, F16: 6e-4, F32: 1e-4}


@pytest.fixture(autouse=True)
def several_blocks_and_chunks(monkeypatch):
    monkeypatch.setattr(reader_module, "GPU_ROWS", 1024)
    monkeypatch.setattr(reader_module, "GPU_TOKENS", 128)
    monkeypatch.setattr(onepass_module, "GPU_TOKENS", 128)


def make(hidden=BF16, weight=None, *, trained=True, device="cuda"):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    h, w, b = normal(1, N, D), 1.5 * normal(V, D) / D**0.5, normal(V)
    target = torch.randint(V - 1, (1, N), generator=generator)
    rollout = (h @ w.T + b).log_softmax(-1).gather(-1, target[..., None])[..., 0]
    rollout += 0.1 * normal(1, N)
    given = {
        "hidden": h.to(hidden), "weight": w.to(weight or hidden), "bias": b.to(weight or hidden),
        "target": target, "rollout_log_probs": rollout, "advantages": normal(1, N),
        "mask": torch.ones(1, N, dtype=torch.bool),
    }
    given = {name: x.to(device) for name, x in given.items()}
    given["hidden"].requires_grad_()
    for name in ("weight", "bias"):
        given[name].requires_grad_(trained)
    return given


HEAD = ("hidden", "weight", "target", "bias")
TIS = PolicyLoss(correction=token_tis())


def one_pass(given, loss_fn=TIS, **more):
    loss, _ = fused_policy_loss(loss_fn, **given, **more)
    return loss


def two_passes(given, loss_fn=TIS, **more):
    log_probs = linear_log_probs(**{name: given[name] for name in HEAD}, **more)
    loss, _ = loss_fn(
        log_probs, **{name: given[name] for name in ("rollout_log_probs", "advantages", "mask")}
    )
    return loss


def exact(given, loss_fn=TIS):
    """Loss and gradients in float64, the logits materialised."""
    wide = {k: x.detach().double() if x.is_floating_point() else x for k, x in given.items()}
    for name in ("hidden", "weight", "bias"):
        wide[name].requires_grad_(given[name].requires_grad)
    z = wide["hidden"] @ wide["weight"].T + wide["bias"]
    log_probs = z.log_softmax(-1).gather(-1, wide["target"][..., None])[..., 0]
    loss, _ = loss_fn(
        log_probs, **{name: wide[name] for name in ("rollout_log_probs", "advantages", "mask")}
    )
    loss.backward()
    return loss.detach(), grads(wide)


def grads(given):
    return [given[name].grad for name in ("hidden", "weight", "bias") if given[name].requires_grad]


def error(found, true):
    return ((found.double() - true).norm() / true.norm()).item()


ROUTES = {"one pass": one_pass, "two passes": two_passes}
PAIRS = [(BF16, BF16), (F16, F16), (F32, F32), (BF16, F32), (F16, F32)]


@pytest.mark.parametrize("compile_kernels", [False, True])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("hidden", "weight"), PAIRS)
@pytest.mark.parametrize("route", ROUTES)
def test_loss_and_gradients_are_those_of_float64(route, hidden, weight, trained, compile_kernels):
    given = make(hidden, weight, trained=trained)
    loss = ROUTES[route](given, compile_kernels=compile_kernels)
    loss.backward()
    expected, true = exact(given)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=1e-6)
    for found, of in zip(grads(given), true, strict=True):
        assert error(found, of) < BOUND[hidden]


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_gradients_are_no_less_exact_than_those_of_materialised_logits(dtype):
    given, plain = make(dtype), make(dtype)
    one_pass(given).backward()
    z = (plain["hidden"] @ plain["weight"].T + plain["bias"]).float()
    log_probs = z.log_softmax(-1).gather(-1, plain["target"][..., None])[..., 0]
    names = ("rollout_log_probs", "advantages", "mask")
    TIS(log_probs, **{k: plain[k] for k in names})[0].backward()
    _, true = exact(given)
    for found, naive, of in zip(grads(given), grads(plain), true, strict=True):
        assert error(found, of) <= 1.05 * error(naive, of)


@pytest.mark.parametrize("route", ROUTES)
def test_sequence_weights_are_those_of_float64(route):
    given, loss_fn = make(F32), PolicyLoss(correction=sequence_tis())
    ids = (torch.arange(N, device="cuda") // 7)[None]
    given["mask"] = Layout(given["mask"], sequence_ids=ids)
    ROUTES[route](given, loss_fn).backward()
    wide = make(F64)
    wide["mask"] = given["mask"]
    z = wide["hidden"] @ wide["weight"].T + wide["bias"]
    log_probs = z.log_softmax(-1).gather(-1, wide["target"][..., None])[..., 0]
    names = ("rollout_log_probs", "advantages", "mask")
    loss_fn(log_probs, **{name: wide[name] for name in names})[0].backward()
    for found, of in zip(grads(given), grads(wide), strict=True):
        assert error(found, of) < 1e-4


@contextmanager
def waits():
    """Where the host waited for the device, filled in at the end."""
    found = []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waited = [w for w in caught if "called a synchronizing" in str(w.message)]
    found += [f"{w.filename}:{w.lineno}" for w in waited]


@pytest.mark.parametrize("compile_kernels", [False, True])
@pytest.mark.parametrize("trained", [True, False])
def test_the_head_makes_nobody_wait(trained, compile_kernels):
    given = make(trained=trained)
    two_passes(given, compile_kernels=compile_kernels).backward()
    with waits() as found:
        two_passes(given, compile_kernels=compile_kernels).backward()
    assert not found


@pytest.mark.parametrize("idle", [False, True])
def test_one_pass_waits_for_counts_alone(idle):
    given = make()
    if idle:
        given["advantages"][0, ::3] = 0
    one_pass(given).backward()
    with waits() as found:
        one_pass(given).backward()
    assert len(found) == 2 + idle


def placed(device, *, packed):
    """A batch, and what tells its sequences and ages apart, on a device."""
    batch = make_batch(0, rows=4, width=12).to(F32)
    ids = torch.arange(12).expand(4, 12) // 4 if packed else None
    parts = {"sequence_ids": ids, "age": batch.ages() if packed else None}
    parts = {name: None if x is None else x.to(device) for name, x in parts.items()}
    return type(batch)(*(x.to(device) for x in batch)), parts


def evaluate(loss_fn, batch, parts):
    log_probs = batch.log_probs.clone().requires_grad_()
    loss, metrics = loss_fn(
        log_probs, rollout_log_probs=batch.rollout_log_probs, advantages=batch.advantages,
        mask=Layout(batch.mask, **parts), old_log_probs=batch.old_log_probs,
        ref_log_probs=batch.ref_log_probs if loss_fn.reference_kl else None,
    )
    loss.backward()
    return loss.detach(), log_probs.grad, metrics


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_same_as_on_a_cpu_and_makes_nobody_wait(name, packed):
    loss, grad, metrics = evaluate(LOSSES[name], *placed("cpu", packed=packed))
    there = placed("cuda", packed=packed)
    evaluate(LOSSES[name], *there)
    with waits() as found:
        loss_there, grad_there, metrics_there = evaluate(LOSSES[name], *there)
    torch.testing.assert_close(loss_there.cpu(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_there.cpu(), grad, rtol=1e-4, atol=1e-6)
    numbers = metrics_there.to_floats()
    assert numbers == pytest.approx(metrics.to_floats(), rel=1e-3, abs=1e-6, nan_ok=True)
    assert not found


@pytest.mark.parametrize("wrong", [-100, -1, V, V + 7])
def test_a_target_outside_the_vocabulary_is_nan_and_reaches_no_gradient(wrong):
    given = make()
    given["target"][0, 3] = wrong
    log_probs = linear_log_probs(**{name: given[name] for name in HEAD})
    assert log_probs.isnan().nonzero().tolist() == [[0, 3]]
    one_pass(given).backward()
    assert given["weight"].grad.isfinite().all()
    assert (given["hidden"].grad[0, 3] == 0).all()


@pytest.mark.parametrize("form", ["padded", "rows"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("compile_kernels", [False, True])
def test_options_give_what_they_give_on_a_cpu(form, softcap, compile_kernels):
    found = []
    for device in ("cpu", "cuda"):
        given = make(F32, device=device)
        kept = torch.stack([given["target"], (given["target"] + 7) % (V - 1)], -1)
        support = kept
        if form == "rows":
            offsets = torch.arange(0, 2 * N + 1, 2, device=device)
            support = Support(kept.flatten(), offsets)
        layout = given["mask"].clone()
        layout[0, ::5] = False
        out = linear_log_probs(
            **{name: given[name] for name in HEAD}, softcap=softcap, temperature=0.7,
            support=support, layout=layout, entropy=True, vocabulary_size=V - 1, chunk_size=77,
            compile_kernels=compile_kernels,
        )
        (out.log_probs * given["advantages"]).sum().backward()
        found.append(([x.detach().cpu() for x in out], [x.cpu() for x in grads(given)]))
    for cpu, gpu in zip(found[0][0] + found[0][1], found[1][0] + found[1][1], strict=True):
        assert error(gpu, cpu.double()) < 1e-4


def test_two_runs_agree_to_the_last_bit():
    found = []
    for _ in range(2):
        given = make()
        one_pass(given).backward()
        found.append(grads(given))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_log_probs_from_logits_are_those_of_float64(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    z = (3 * torch.randn(64, 30_011, device="cuda", generator=generator)).to(dtype)
    target = torch.randint(30_011, (64,), device="cuda", generator=generator)
    z.requires_grad_()
    wide = z.detach().double().requires_grad_()
    with waits() as found:
        out = log_probs_from_logits(z, target)
        out.sum().backward()
    expected = wide.log_softmax(-1).gather(-1, target[:, None])[:, 0]
    expected.sum().backward()
    assert not found
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert error(z.grad, wide.grad) < (1e-5 if dtype == F32 else 4e-3)


@pytest.mark.parametrize("route", ROUTES)
def test_a_compiled_step_is_one_graph_and_gives_the_same(route):
    given, compiled = make(), make()
    ROUTES[route](given).backward()
    torch.compile(ROUTES[route], fullgraph=True)(compiled).backward()
    for found, of in zip(grads(compiled), grads(given), strict=True):
        assert error(found, of.double()) < 4e-3


def test_a_step_of_the_head_can_be_captured_and_replayed():
    given = make()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            two_passes(given).backward()
    torch.cuda.synchronize()
    given["hidden"].grad = given["weight"].grad = given["bias"].grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        two_passes(given).backward()
    other = make()
    with torch.no_grad():
        for name in ("hidden", "advantages"):
            other[name].copy_(other[name].flip(1))
            given[name].copy_(other[name])
    graph.replay()
    _, true = exact(other)
    for found, of in zip(grads(given), true, strict=True):
        assert error(found, of) < BOUND[BF16]


def test_saved_tensors_are_offloaded():
    given, plain = make(F32), make(F32)
    two_passes(plain).backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with torch.autograd.graph.save_on_cpu():
        hidden = given["hidden"] * 2
        loss = two_passes(given | {"hidden": hidden, "weight": given["weight"] / 2})
    del hidden
    held = torch.cuda.memory_allocated() - before
    assert held < given["hidden"].numel() * 4
    loss.backward()
    for found, of in zip(grads(given)[2:], grads(plain)[2:], strict=True):
        assert error(found, of.double()) < 1e-4


def test_masters_in_float32_under_autocast():
    given = make(BF16, F32)
    with torch.autocast("cuda", dtype=BF16):
        loss = one_pass(given)
    loss.backward()
    rounded = copy.copy(given)
    rounded["weight"] = given["weight"].detach().to(BF16).requires_grad_()
    rounded["hidden"] = given["hidden"].detach().clone().requires_grad_()
    _, true = exact(rounded)
    assert given["weight"].grad.dtype == F32
    assert error(given["weight"].grad, true[1]) < BOUND[BF16]


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_stochastic_rounding_is_unbiased_and_on_the_grid(dtype):
    x = torch.full((200_000,), 1 + 0.3 * torch.finfo(dtype).eps, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    sent = ic.stochastic_round(x, dtype, generator=generator)
    assert sent.device.type == "cuda"
    assert sent.dtype == dtype
    up = (sent.float() > 1).float().mean().item()
    assert up == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("make", [
    lambda w: torch.optim.AdamW(w, lr=1e-3), lambda w: torch.optim.AdamW(w, lr=1e-3, fused=True),
])
def test_an_optimiser_steps_on_its_masters_and_leaves_what_the_engine_holds(make):
    torch.manual_seed(0)
    w, plain = (torch.nn.Parameter(0.05 * torch.randn(300, 20).cuda()) for _ in range(2))
    with torch.no_grad():
        plain.copy_(w)
    rounded, other = make([w]), make([plain])
    ic.round_after_step(rounded, BF16)
    for _ in range(4):
        w.grad = torch.randn_like(w)
        plain.grad = w.grad.clone()
        rounded.step()
        other.step()
        assert torch.equal(w + rounded.state[w]["rest"], plain)
        assert torch.equal(w.to(BF16).float(), w)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_float32_output_and_upcast_agree(dtype, monkeypatch):
    given = make(dtype)
    wide = linear_log_probs(**{name: given[name] for name in HEAD})
    monkeypatch.setattr(reader_module, "leaves_float32", lambda *_: False)
    upcast = linear_log_probs(**{name: given[name] for name in HEAD})
    torch.testing.assert_close(wide, upcast, rtol=1e-5, atol=1e-5)
