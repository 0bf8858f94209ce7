"""A trainer that computes with what its engine holds."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp, nn

from iscorrect import InputError, round_after_step, stochastic_round, weight_arrival

BF16, FP16 = torch.bfloat16, torch.float16
OPTIMIZERS = {
    "AdamW": lambda w: torch.optim.AdamW(w, lr=1e-3, weight_decay=0.1),
    "AdamW, one tensor after the other": lambda w: torch.optim.AdamW(w, lr=1e-3, foreach=False),
    "fused AdamW": lambda w: torch.optim.AdamW(w, lr=1e-3, fused=True),
    "SGD": lambda w: torch.optim.SGD(w, lr=1e-3),
    "SGD with momentum": lambda w: torch.optim.SGD(w, lr=1e-3, momentum=0.9),
    "Adafactor": lambda w: torch.optim.Adafactor(w, lr=1e-3),
    "RMSprop": lambda w: torch.optim.RMSprop(w, lr=1e-3),
    "Adagrad": lambda w: torch.optim.Adagrad(w, lr=1e-3),
}


def two(make, shapes=((30, 20), (40,))):
    """Parameters and an optimiser, and again the same."""
    torch.manual_seed(0)
    first = [nn.Parameter(torch.randn(shape) * 0.05) for shape in shapes]
    second = [nn.Parameter(w.detach().clone()) for w in first]
    return (first, make(first)), (second, make(second))


def step(optimizer, parameters, number):
    """With gradients that are the same for all parameters of a shape."""
    torch.manual_seed(100 + number)
    for w in parameters:
        w.grad = torch.randn(w.shape)
    optimizer.step()


def masters(optimizer, parameters):
    return [w.detach() + optimizer.state[w].get("rest", 0) for w in parameters]


def on_the_grid(x, dtype):
    return torch.equal(x.to(dtype).to(x.dtype), x)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_optimiser_steps_on_the_masters_to_the_bit(make):
    (w, rounded), (plain, other) = two(make)
    round_after_step(rounded, BF16)
    for number in range(5):
        step(rounded, w, number)
        step(other, plain, number)
        for x, master, expected in zip(w, masters(rounded, w), plain, strict=True):
            assert torch.equal(master, expected)
            assert on_the_grid(x.detach(), BF16) and not on_the_grid(expected.detach(), BF16)
            assert ((x - expected).abs() < expected.abs() * 2**-7).all()


def test_in_fp16_nothing_is_lost_but_float32s_own_rounding():
    (w, rounded), (plain, other) = two(OPTIMIZERS["SGD"])
    with torch.no_grad():  # far below the least that the format holds
        for x in (w[0], plain[0]):
            x[0] = 1e-12
    round_after_step(rounded, FP16)
    for number in range(5):
        step(rounded, w, number)
        step(other, plain, number)
    for x, master, expected in zip(w, masters(rounded, w), plain, strict=True):
        torch.testing.assert_close(master, expected.detach(), rtol=1e-6, atol=1e-9)
        assert on_the_grid(x.detach(), FP16)


def test_what_the_format_cannot_hold_stays_and_learns():
    w = nn.Parameter(torch.tensor([1e6, -1e6, 0.3]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    round_after_step(optimizer, FP16)
    for _ in range(3):
        w.grad = torch.full((3,), 1000.0)
        optimizer.step()
    found = masters(optimizer, [w])[0]
    assert torch.allclose(found, torch.tensor([1e6 - 3000, -1e6 - 3000, 0.3 - 3000]))
    assert w[0] == found[0] and w[1] == found[1]


def test_an_update_too_small_for_the_format_arrives():
    before = {"w": torch.full((100_000,), 1.0)}
    found = {}
    for rounds in (True, False):
        w = nn.Parameter(before["w"].clone())
        optimizer = torch.optim.SGD([w], lr=1e-4)
        if rounds:
            round_after_step(optimizer, BF16)
        w.grad = torch.full_like(w, -1)
        optimizer.step()
        found[rounds] = w.detach().bfloat16().float() - before["w"]
    assert found[False].abs().max() == 0
    assert found[True].mean().item() == pytest.approx(1e-4, rel=0.1)


def test_what_did_not_change_is_sent_as_it_was():
    w = nn.Parameter(torch.randn(1000))
    optimizer = torch.optim.SGD([w], lr=0.0)
    round_after_step(optimizer, BF16)
    step(optimizer, [w], 0)
    first = w.detach().clone()
    for number in range(3):
        step(optimizer, [w], number)
        assert torch.equal(w, first)
    draws = []
    for seed in (0, 1):
        other = nn.Parameter(first + 2**-12)
        changed = torch.optim.SGD([other], lr=0.0)
        round_after_step(changed, BF16, seed=seed)
        step(changed, [other], 0)
        draws.append(other.detach())
    assert not torch.equal(*draws)


def test_a_parameter_without_a_gradient_keeps_what_it_has():
    (w, rounded), (plain, other) = two(OPTIMIZERS["AdamW"])
    round_after_step(rounded, BF16)
    for number, which in enumerate(([0], [0, 1], [1], [0])):
        for parameters, optimizer in ((w, rounded), (plain, other)):
            optimizer.zero_grad()
            torch.manual_seed(number)
            for i in which:
                parameters[i].grad = torch.randn(parameters[i].shape)
            optimizer.step()
        if number == 0:
            assert torch.equal(w[1], plain[1]) and not on_the_grid(w[1].detach(), BF16)
    for master, expected in zip(masters(rounded, w), plain, strict=True):
        assert torch.equal(master, expected)
    assert all(on_the_grid(x.detach(), BF16) for x in w)


@pytest.mark.parametrize("called", ["before", "after"])
def test_a_run_goes_on_from_its_checkpoint(called):
    (w, rounded), (resumed, again) = two(OPTIMIZERS["AdamW"])
    round_after_step(rounded, BF16)
    for number in range(3):
        step(rounded, w, number)
    state = copy.deepcopy(rounded.state_dict())
    with torch.no_grad():
        for x, saved in zip(resumed, w, strict=True):
            x.copy_(saved)
    if called == "before":
        round_after_step(again, BF16)
    again.load_state_dict(state)
    if called == "after":
        round_after_step(again, BF16)
    for number in range(3, 6):
        step(rounded, w, number)
        step(again, resumed, number)
    for x, y in zip([*w, *masters(rounded, w)], [*resumed, *masters(again, resumed)], strict=True):
        assert torch.equal(x, y)


def test_weights_that_are_loaded_meanwhile_are_learned_on():
    for scale in (1e-4, 1.0, 1e4):
        w = nn.Parameter(torch.randn(1000))
        optimizer = torch.optim.SGD([w], lr=1e-3)
        round_after_step(optimizer, BF16)
        step(optimizer, [w], 0)
        loaded = (torch.randn(1000) * scale).bfloat16().float()
        with torch.no_grad():
            w.copy_(loaded)
        w.grad = torch.zeros(1000)
        optimizer.step()
        assert ((masters(optimizer, [w])[0] - loaded).abs() <= loaded.abs() * 2**-7).all()


def test_what_is_not_finite_stays_alone():
    w = nn.Parameter(torch.tensor([math.inf, math.nan, 1.0]))
    optimizer = torch.optim.SGD([w], lr=1e-3)
    round_after_step(optimizer, BF16)
    for _ in range(3):
        w.grad = torch.ones(3)
        optimizer.step()
    assert w[0] == math.inf and w[1].isnan()
    assert masters(optimizer, [w])[0][2].item() == pytest.approx(0.997)


def test_hooks_of_others_may_set_and_clear_gradients():
    (w, rounded), (plain, other) = two(OPTIMIZERS["AdamW"])
    given = {}
    rounded.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
    round_after_step(rounded, BF16)

    def late(*_):
        for x in w:
            x.grad = given[x]

    for number in range(4):
        if number == 2:
            rounded.register_step_pre_hook(late)
        step(other, plain, number)
        given |= {x: y.grad.clone() for x, y in zip(w, plain, strict=True)}
        for x in w:
            x.grad = given[x].clone() if number < 2 else None
        rounded.step()
        for x, master, expected in zip(w, masters(rounded, w), plain, strict=True):
            assert torch.equal(master, expected) and on_the_grid(x.detach(), BF16)


def test_a_step_without_gradients_makes_room_for_a_checkpoint_and_rounds_nothing():
    from torch.distributed.checkpoint import state_dict as dcp

    torch.manual_seed(0)
    first, second = (nn.Linear(30, 20) for _ in range(2))
    (trained, plain), (model, optimizer) = (
        (x, torch.optim.AdamW(x.parameters(), lr=1e-3)) for x in (first, second)
    )
    step(plain, [*trained.parameters()], 0)
    round_after_step(optimizer, BF16)
    weights, state = (
        copy.deepcopy(of) for of in dcp.get_state_dict(trained, plain)  # of a run without it
    )
    dcp.set_model_state_dict(model, weights)
    dcp.set_optimizer_state_dict(model, optimizer, optim_state_dict=state)
    for w, x in zip(model.parameters(), trained.parameters(), strict=True):
        assert torch.equal(w, x)
    for number in range(1, 3):
        step(plain, [*trained.parameters()], number)
        step(optimizer, [*model.parameters()], number)
    for master, x in zip(
        masters(optimizer, [*model.parameters()]), trained.parameters(), strict=True
    ):
        assert torch.equal(master, x)


def test_a_rest_that_is_no_tensor_is_none():
    w = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([w], lr=0.0)
    round_after_step(optimizer, BF16)
    optimizer.state[w]["rest"] = {}  # as a flattened checkpoint without it is loaded
    step(optimizer, [w], 0)
    assert torch.equal(optimizer.state[w]["rest"], torch.zeros(3))


def test_it_may_be_called_twice():
    (w, rounded), (plain, other) = two(OPTIMIZERS["AdamW"])
    for _ in range(2):
        round_after_step(rounded, BF16)
    for number in range(3):
        step(rounded, w, number)
        step(other, plain, number)
    for master, expected in zip(masters(rounded, w), plain, strict=True):
        assert torch.equal(master, expected)
    for given in (dict(dtype=FP16), dict(dtype=BF16, seed=1)):
        with pytest.raises(InputError, match=r"one that rounds to torch\.bfloat16 with seed 0"):
            round_after_step(rounded, **given)


def test_rows_with_a_sparse_gradient_learn():
    (w, rounded), (plain, other) = two(lambda w: torch.optim.SparseAdam(w, lr=1e-3), ((30, 20),))
    round_after_step(rounded, BF16)
    for number in range(3):
        for parameters, optimizer in ((w, rounded), (plain, other)):
            torch.manual_seed(number)
            rows = torch.randint(30, (1, 4))
            parameters[0].grad = torch.sparse_coo_tensor(
                rows, torch.randn(4, 20), (30, 20), check_invariants=True
            )
            optimizer.step()
    assert torch.equal(masters(rounded, w)[0], plain[0]) and on_the_grid(w[0].detach(), BF16)


def test_a_closure_is_refused_for_it_would_see_the_masters():
    w = nn.Parameter(torch.ones(3))
    for optimizer in (torch.optim.LBFGS([w]), torch.optim.SGD([w], lr=1.0)):
        round_after_step(optimizer, BF16)
        with pytest.raises(InputError, match="round_after_step: `closure` must be a step without"):
            optimizer.step(w.sum)
        with pytest.raises(InputError, match="round_after_step: `closure` must be a step without"):
            optimizer.step(closure=w.sum)


def test_a_parameter_in_16_bits_that_comes_later_is_named():
    w = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([w], lr=1.0)
    round_after_step(optimizer, BF16)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2).bfloat16())]})
    w.grad = torch.ones(3)
    with pytest.raises(InputError, match="round_after_step: `optimizer` must be parameters of fl"):
        optimizer.step()
    assert torch.equal(w, torch.ones(3))


def test_a_step_that_the_loss_scaler_skips_changes_nothing():
    w = nn.Parameter(torch.randn(100))
    optimizer = torch.optim.SGD([w], lr=1e-2)
    round_after_step(optimizer, FP16)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    held = []
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((w * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        held.append((w.detach().clone(), masters(optimizer, [w])[0]))
    assert torch.equal(held[0][0], held[1][0]) and torch.equal(held[0][1], held[1][1])
    assert not torch.equal(held[1][1], held[2][1])
    assert on_the_grid(w.detach(), FP16)


def test_under_autocast_the_products_are_those_of_an_engine_in_16_bits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 4, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    round_after_step(optimizer, BF16)
    x = torch.randn(8, 16)
    model(x).square().mean().backward()
    optimizer.step()
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with torch.autocast("cpu", BF16):
        own = model(x)
    assert torch.equal(own, copy.deepcopy(model).bfloat16()(x.bfloat16()))
    assert weight_arrival(before, model, BF16).total.moved == 0


def test_bad_arguments_are_named():
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(InputError, match=r"round_after_step: `optimizer` must be a torch.optim"):
        round_after_step([w], BF16)
    with pytest.raises(InputError, match="round_after_step: `optimizer` must be parameters of fl"):
        round_after_step(torch.optim.SGD([nn.Parameter(w.bfloat16())], lr=1.0), BF16)
    for dtype in (torch.float32, torch.float8_e4m3fn, "bf16", None):
        with pytest.raises(InputError, match=f"`dtype` must be torch.bfloat16 .*got {dtype!r}"):
            round_after_step(torch.optim.SGD([w], lr=1.0), dtype)
    with pytest.raises(InputError, match="round_after_step: `seed`"):
        round_after_step(torch.optim.SGD([w], lr=1.0), BF16, seed=0.5)


class Wrapped(torch.optim.Optimizer):
    """Like Accelerate's, which is an optimiser and has not been made as one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups


def test_a_wrapper_is_told_to_pass_what_it_steps_on():
    wrapped = Wrapped(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0))
    with pytest.raises(InputError, match=r"its \.optimizer"):
        round_after_step(wrapped, BF16)


def on_two_ranks(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shards_learn_as_their_whole()
    a_sharded_checkpoint_holds_the_rests()
    shards_draw_each_their_own()
    replicas_hold_the_same()
    flat_shards_are_rounded_and_saved()
    dist.destroy_process_group()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def sharded():
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    whole = model()
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(whole, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-3)
    round_after_step(optimizer, BF16)
    return whole, optimizer


def learn(module, optimizer, number):
    torch.manual_seed(number)
    module(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def shards_learn_as_their_whole():
    from torch.distributed.tensor import DTensor

    one, optimizer = sharded()
    for number in range(3):
        masters_before = [
            (w.detach() + optimizer.state[w].get("rest", 0)).full_tensor()
            for w in one.parameters()
        ]
        # what the step must make of the masters, by an optimiser that rounds nothing
        plain = [nn.Parameter(x.clone()) for x in masters_before]
        reference = torch.optim.AdamW(plain, lr=1e-3)
        torch.manual_seed(number)
        one(torch.randn(4, 6)).square().mean().backward()
        for w, x in zip(one.parameters(), plain, strict=True):
            x.grad = w.grad.full_tensor()
            kept = {k: v for k, v in optimizer.state[w].items() if k != "rest"}
            reference.state[x] = {
                k: v.full_tensor().clone() if isinstance(v, DTensor) else v.clone()
                for k, v in kept.items()
            }
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
        for w, x in zip(one.parameters(), plain, strict=True):
            rest = optimizer.state[w]["rest"]
            assert isinstance(rest, DTensor) and rest.placements == w.placements
            torch.testing.assert_close((w.detach() + rest).full_tensor(), x.detach())
            assert on_the_grid(w.detach().full_tensor(), BF16)


def a_sharded_checkpoint_holds_the_rests():
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    one, optimizer = sharded()
    for number in range(3):
        learn(one, optimizer, number)
    saved = copy.deepcopy(get_state_dict(one, optimizer))
    other, again = sharded()
    set_state_dict(other, again, model_state_dict=saved[0], optim_state_dict=saved[1])
    for number in range(3, 5):
        learn(one, optimizer, number)
        learn(other, again, number)
    for w, x in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(w.full_tensor(), x.full_tensor())
        rests = optimizer.state[w]["rest"], again.state[x]["rest"]
        assert torch.equal(*(rest.full_tensor() for rest in rests))


def shards_draw_each_their_own():
    from torch.distributed.fsdp import fully_shard

    alike = nn.Linear(64, 64, bias=False)
    nn.init.constant_(alike.weight, 1 + 2**-8)
    fully_shard(alike, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    stepped = torch.optim.SGD(alike.parameters(), lr=0.0)
    round_after_step(stepped, BF16)
    alike(torch.ones(1, 64)).sum().backward()
    stepped.step()
    top, bottom = alike.weight.detach().full_tensor().chunk(2)
    assert not torch.equal(top, bottom) and on_the_grid(top, BF16)


def replicas_hold_the_same():
    replica = nn.parallel.DistributedDataParallel(model())
    stepped = torch.optim.AdamW(replica.parameters(), lr=1e-3)
    round_after_step(stepped, BF16)
    for number in range(2):
        learn(replica, stepped, number + dist.get_rank())
    for w in replica.parameters():
        both = [torch.empty_like(w) for _ in range(2)]
        dist.all_gather(both, w.detach())
        assert torch.equal(*both) and on_the_grid(both[0], BF16)


def flat_shards_are_rounded_and_saved():
    from torch.distributed import fsdp

    def flat(original):
        torch.manual_seed(0)
        whole = fsdp.FullyShardedDataParallel(
            nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), use_orig_params=original,
            mixed_precision=fsdp.MixedPrecision(param_dtype=BF16, reduce_dtype=torch.float32),
            device_id=torch.device("cpu"),
        )
        whole.set_state_dict_type(
            whole, fsdp.StateDictType.SHARDED_STATE_DICT, fsdp.ShardedStateDictConfig()
        )
        optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-3)
        round_after_step(optimizer, BF16)
        return whole, optimizer

    for original in (False, True):
        (one, optimizer), (other, again) = flat(original), flat(original)
        for number in range(2):
            learn(one, optimizer, number)
        other.load_state_dict(copy.deepcopy(one.state_dict()))
        saved = copy.deepcopy(one.optim_state_dict(one, optimizer))
        again.load_state_dict(other.optim_state_dict_to_load(other, again, saved))
        for number in range(2, 4):
            learn(one, optimizer, number)
            learn(other, again, number)
        with one.summon_full_params(one), other.summon_full_params(other):
            for w, x in zip(one.parameters(), other.parameters(), strict=True):
                assert torch.equal(w, x) and on_the_grid(w.detach(), BF16)


@pytest.mark.slow
def test_shards_learn_as_their_whole_and_replicas_alike(tmp_path):
    # A server's child ends without shutting its interpreter down, which FSDP2 on gloo can abort.
    mp.start_processes(on_two_ranks, (tmp_path / "store",), nprocs=2, start_method="forkserver")


def test_its_draws_are_those_of_stochastic_rounding():
    w = nn.Parameter(torch.full((50_000,), 1 + 2**-9))
    optimizer = torch.optim.SGD([w], lr=0.0)
    round_after_step(optimizer, BF16)
    step(optimizer, [w], 0)
    share = (w == 1 + 2**-7).float().mean().item()
    alone = stochastic_round(torch.full((50_000,), 1 + 2**-9), BF16)
    assert share == pytest.approx(0.25, abs=0.01)
    assert (alone == 1 + 2**-7).float().mean().item() == pytest.approx(share, abs=0.02)


def test_an_optimiser_that_a_trainer_makes_by_name_rounds_from_its_first_step_on():
    page = Path(__file__).parents[1] / "docs" / "lab" / "real-model.md"
    blocks = page.read_text(encoding="utf-8").split("```")[1::2]
    (block,) = (block for block in blocks if "class RoundedAdamW" in block)
    exec(block, named := {})
    (of, optimizer), _ = two(lambda w: named["RoundedAdamW"](iter(w), lr=1e-5))
    for number in range(3):
        step(optimizer, of, number)
        assert all(torch.equal(w, w.bfloat16().float()) for w in of)
    assert all(optimizer.state[w]["rest"].any() for w in of)
