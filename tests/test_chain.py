"""The lab's chain: its recursions against enumeration, and learning at toy size. Torch only."""

import json
from itertools import product

import pytest
import torch

from benchmarks.lab.chain import (
    attention,
    baselines,
    behind,
    bias,
    exact,
    learner,
    records,
    statistics,
    tables,
)
from benchmarks.lab.chain.arms import ARMS, SIGNED, TOKEN_LOCAL, slopes
from benchmarks.lab.chain.engines import ENGINES, Engine, plain
from benchmarks.lab.chain.policy import logits, rounded_logits, untrained, warm_start
from benchmarks.lab.chain.world import (
    WORLDS,
    World,
    credit,
    divergence,
    outlook,
    passed,
    recursion,
    sample,
)
from iscorrect.testing import TabularPolicy, audit

SMALL = {"prompts": 1, "vocab": 2, "right": 1, "kinds": 3, "nuisance": 2}


def policies(world, *, seed=0, noise=0.7):
    """log π and log μ of a random policy and a noisy engine."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*world.good.shape,)
    policy = torch.randn(shape, generator=generator, dtype=torch.float64)
    noisy = policy + noise * torch.randn(shape, generator=generator, dtype=torch.float64)
    return policy.log_softmax(-1), noisy.log_softmax(-1)


def enumerated(world):
    """Every sequence of the one prompt: where its tokens lie in a table "s p t v", its reward."""
    places, rewards = [], []
    right = world.good[:, 0].tolist()
    for tokens in product(range(world.vocab), repeat=world.length):
        state, path, earned = 0, [], 0.0
        for t, token in enumerate(tokens):
            path.append((state * world.length + t) * world.vocab + token)
            state = 0 if right[state][t][token] else 1
            earned += world.pay * (state == 0)
        places.append(path)
        rewards.append(earned if world.dense else float(state == 0))
    return torch.tensor(places), torch.tensor(rewards, dtype=torch.float64)


def expected_by_enumeration(world, arm, policy, engine):
    """Σ_y μ(y) (−∂loss/∂log π) of each table entry, with the library's loss on whole sequences."""
    places, reward = enumerated(world)
    table = policy.clone().requires_grad_()
    taken, sampled = table.reshape(-1)[places], engine.reshape(-1)[places]
    chance = sampled.sum(-1).exp()
    expected = chance @ reward
    if arm.baseline == "half":
        expected = expected / 2
    if arm.baseline == "critic":  # of the sequences through each token's context
        context = places // world.vocab
        through = torch.zeros(2, 2 * world.length, dtype=torch.float64)
        for row, of in zip(through, (chance, chance * reward), strict=True):
            row.index_add_(0, context.reshape(-1), of[:, None].expand_as(places).reshape(-1))
        expected = (through[1] / through[0])[context]
        reward, chance = reward[:, None], chance[:, None]
    advantages = chance * (reward - expected)
    old = arm.old_log_probs(policy, engine)
    loss, _ = arm.loss(
        taken, rollout_log_probs=sampled, advantages=advantages * len(places),
        mask=torch.ones_like(sampled, dtype=torch.bool),
        old_log_probs=None if old is None else old.reshape(-1)[places],
    )
    (gradient,) = torch.autograd.grad(-loss, table)
    return gradient


def by_recursion(world, arm, policy, engine):
    rewarded, punished = slopes(arm, policy, policy, engine)
    positive, negative = credit(world, engine.exp(), arm.baseline)
    return positive * rewarded + negative * punished


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("arm", [
    x if x in ("token-tis", "uncorrected-critic", "icepop-half")
    else pytest.param(x, marks=pytest.mark.slow)
    for x in TOKEN_LOCAL
])
def test_sixteen_tokens_are_as_every_sequence_of_them_says(name, arm):
    world = WORLDS[name](length=16, task=3, **SMALL)
    if world.dense and arm in SIGNED:
        pytest.skip("not exact where rewards are dense")
    policy, engine = policies(world)
    want = expected_by_enumeration(world, ARMS[arm], policy, engine)
    assert torch.allclose(by_recursion(world, ARMS[arm], policy, engine), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", WORLDS)
def test_rewards_and_divergences_are_sums_over_sequences(name):
    world = WORLDS[name](length=10, task=1, **SMALL)
    policy, engine = policies(world)
    places, reward = enumerated(world)
    p, q = (x.reshape(-1)[places].sum(-1) for x in (policy, engine))
    assert torch.allclose(outlook(world, policy.exp()).reward, p.exp() @ reward, atol=1e-12)
    assert torch.allclose(divergence(world, engine, policy), q.exp() @ (q - p), atol=1e-12)


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("arm", ["uncorrected", "token-tis", "icepop"])
def test_the_audit_finds_the_same_update_in_logits(name, arm):
    world = WORLDS[name](length=8, task=2, **SMALL)
    policy, engine = policies(world)
    prefixes = TabularPolicy.random(2, world.length).sequences
    # the row of "s t" that each prefix ends in
    row = torch.zeros(len(prefixes.seen), dtype=torch.long)
    places, reward = enumerated(world)
    row[prefixes.contexts] = places // world.vocab

    def unfolded(table):
        return TabularPolicy(table.reshape(-1, world.vocab)[row], world.length)

    baseline = outlook(world, engine.exp()).reward
    found = audit(ARMS[arm].loss, unfolded(policy), unfolded(engine), reward - baseline)
    per_context = torch.zeros(2 * world.length, world.vocab, dtype=torch.float64)
    per_context.index_add_(0, row, found.expected)
    gain = by_recursion(world, ARMS[arm], policy, engine).reshape(-1, world.vocab)
    chances = policy.exp().reshape(-1, world.vocab)
    assert torch.allclose(per_context, gain - chances * gain.sum(-1, keepdim=True), atol=1e-12)


def test_the_expected_update_of_the_policy_itself_is_the_gradient_of_its_reward():
    for name in WORLDS:
        world = WORLDS[name](length=12, task=4, prompts=2)
        table = policies(world)[0].requires_grad_()
        policy = table.log_softmax(-1)
        view = learner.View(policy, policy.detach(), policy.detach())
        got = torch.autograd.grad(
            exact.expected_gain(world, "sequence-is", view), table, retain_graph=True
        )[0]
        want = torch.autograd.grad(outlook(world, policy.exp()).reward.mean(), table)[0]
        assert torch.allclose(got, want, atol=1e-12)


def test_a_recursion_is_its_loop():
    generator = torch.Generator().manual_seed(0)
    slope, offset = torch.rand(2, 3, 37, generator=generator, dtype=torch.float64)
    x, want = torch.full((3,), 0.3, dtype=torch.float64), []
    for a, c in zip(slope.unbind(-1), offset.unbind(-1), strict=True):
        want.append(x := a * x + c)
    assert torch.allclose(recursion(slope, offset, 0.3)[:, 1:], torch.stack(want, -1))


@pytest.mark.parametrize("name", WORLDS)
def test_samples_have_the_reward_that_is_expected(name):
    world = WORLDS[name](length=20, task=5, prompts=2)
    engine = policies(world)[1]
    drawn = sample(world, engine.exp(), 20_000, torch.Generator().manual_seed(0))
    want = outlook(world, engine.exp()).reward
    error = drawn.reward.std(1) / 20_000**0.5
    assert ((drawn.reward.mean(1) - want).abs() < 4 * error + 1e-3).all()
    chances = engine.exp().reshape(-1)[drawn.places]
    assert (chances > 0).all() and drawn.places.shape == (2 * 20_000, 20)


def test_without_bits_to_lose_the_rounded_network_is_the_network():
    world = World(length=8)
    features = world.features(torch.Generator().manual_seed(0))
    weights = untrained(world)
    exact_logits = logits(weights, features)
    errors = [
        (rounded_logits(weights, features, body=bits, head=bits) - 20 - exact_logits).abs().mean()
        for bits in (None, 10, 7, 4)
    ]
    assert errors[0] < 1e-5 < errors[1] < errors[2] / 4 < errors[3] / 16


def test_one_update_on_a_recomputed_old_policy_is_plain_reinforce():
    """PPO's ratio is 1 there: its update is the uncorrected one, and with token-TIS that of it."""
    world = World(length=12, task=6)
    policy, engine = policies(world)
    for clipped, plain_arm in (("ppo", "uncorrected"), ("ppo-token-tis", "token-tis")):
        got = slopes(ARMS[clipped], policy, policy, engine)
        want = slopes(ARMS[plain_arm], policy, policy, engine)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_is_decided_leaves_token_weights_nothing_to_bias():
    """After a mistake for good the return is fixed: token-IS moves no logit, no weights do."""
    world = World(length=4, task=7)
    policy, engine = policies(world)
    moved = {}
    for name in ("token-is", "uncorrected"):
        gain = by_recursion(world, ARMS[name], policy, engine)[1]
        moved[name] = (gain - policy[1].exp() * gain.sum(-1, keepdim=True)).abs().max()
    assert moved["token-is"] < 1e-14 and moved["uncorrected"] > 1e-4


def test_a_baseline_that_knows_the_outcome_leaves_no_weights_anything_to_bias():
    """In a decided context b = q: neither 1 nor a truncated ratio moves a logit there."""
    world = World(length=4, task=7)
    policy, engine = policies(world, noise=2.0)
    for name, other in (("uncorrected-critic", "uncorrected"), ("token-tis-critic", "token-tis")):
        assert by_recursion(world, ARMS[name], policy, engine)[1].abs().max() < 1e-15
        assert by_recursion(world, ARMS[other], policy, engine)[1].abs().max() > 1e-4


def test_a_prompt_s_baseline_adds_an_ascent_of_the_kl_where_less_than_it_is_to_be_expected():
    """Without weights, from a critic's baseline to b: Σ_c d_μ (b − V_μ) ∇KL(μ‖π), in logits."""
    for name in WORLDS:
        world = WORLDS[name](length=9, task=7, prompts=2)
        policy, engine = policies(world)
        chances, own = engine.exp(), policy.exp()
        seen = outlook(world, chances)
        expected = seen.visits * (chances * seen.values).sum(-1) + seen.earned
        apart = seen.visits * seen.reward[:, None] - expected
        want = apart[..., None] * (own - chances)
        moved = {}
        for arm in ("uncorrected", "uncorrected-critic"):
            gain = by_recursion(world, ARMS[arm], policy, engine)
            moved[arm] = gain - own * gain.sum(-1, keepdim=True)
        difference = moved["uncorrected"] - moved["uncorrected-critic"]
        assert torch.allclose(difference, want, atol=1e-14)
        assert want.abs().max() > 1e-3


def test_states_by_doubling_are_those_of_a_walk():
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 7, 16):
        from_ok, from_err = torch.rand(2, 3, length, 50, generator=generator) < 0.6
        state, walked = torch.ones(3, 50, dtype=torch.bool), []
        for ok, err in zip(from_ok.unbind(1), from_err.unbind(1), strict=True):
            state = torch.where(state, ok, err)
            walked.append(state)
        assert torch.equal(passed(from_ok, from_err), torch.stack(walked, 1))


def test_a_critic_learns_what_its_contexts_lead_one_to_expect():
    generator = torch.Generator().manual_seed(0)
    of = baselines.Critic(baselines.layer(2, generator), baselines.of_layer)
    contexts = torch.eye(2)[torch.arange(200) % 2][:, None]
    rewards = (torch.arange(200) % 2).double().view(4, 50)
    first = of.beyond((contexts,), rewards)
    assert torch.equal(first, rewards.flatten()[:, None] - 0.5)
    for _ in range(100):
        last = of.beyond((contexts,), rewards)
    assert last.shape == (200, 1) and last.abs().max() < 0.05


def test_a_weight_of_the_past_is_the_ratio_of_what_came_before_and_at_most_1():
    log_ratio = torch.tensor([[0.9, -1.2, 0.1, 0.3]], dtype=torch.float64)
    rollout = torch.full_like(log_ratio, -1.5)
    found = ARMS["past-tis"].loss.correction(
        old_log_probs=rollout + log_ratio, rollout_log_probs=rollout,
        mask=torch.ones_like(log_ratio, dtype=torch.bool),
    ).weights
    past = torch.tensor([[0.0, 0.9, -0.3, -0.2]], dtype=torch.float64)
    want = log_ratio.exp().clamp(max=2) * past.exp().clamp(max=1)
    assert torch.allclose(found, want, atol=1e-12)


def test_a_start_is_half_right_at_every_length():
    for length in (16, 256):
        world = World(length=length, task=8)
        start = warm_start(world, steps=400)
        features = world.features(torch.Generator().manual_seed(9))
        chances = logits(start, features).double().softmax(-1)
        assert outlook(world, chances).reward.mean().item() == pytest.approx(0.5, abs=0.05)


def test_an_engine_behind_has_the_weights_of_then():
    world = World(length=6, task=0)
    pupil = learner.Learner(
        world, untrained(world), Engine(plain, behind=2), optimizer="sgd", rate=0.1, seed=0
    )
    weights = []
    for _ in range(4):
        view = pupil.look()
        weights.append({name: x.detach().clone() for name, x in pupil.weights.items()})
        pupil.ascend(view.policy[..., 0].mean())
    held = pupil.held[0]
    assert all(torch.equal(held[name], weights[1][name]) for name in held)
    assert torch.equal(view.rollout, view.engine) and not torch.equal(view.policy, view.engine)


def test_designs_name_known_engines_and_arms_once():
    runs = exact.design()
    assert len(runs) == len(set(runs)) and {run.engine for run in runs} == set(ENGINES)
    assert {run.arm for run in runs} == {*TOKEN_LOCAL, "sequence-is"}
    sampled = behind.design((1e-3, 3e-4))
    assert {run.arm for run in sampled} == {*behind.MEANT}
    assert len(sampled) == len(set(sampled)) and {run.arm for run in sampled} <= set(ARMS)
    assert behind.UNTOUCHED not in {run.task for run in sampled}


@pytest.mark.slow
def test_what_is_on_record_is_not_run_again(tmp_path, capsys):
    arguments = ["--records", str(tmp_path), "--length", "64", "--steps", "3",
                 "--engines", "exact", "activations-7", "--arms", "uncorrected", "token-tis"]
    exact.main(arguments)
    before = (tmp_path / "exact.csv").read_text()
    capsys.readouterr()
    exact.main(arguments)
    assert "4 of 4 runs are on record" in capsys.readouterr().out
    assert (tmp_path / "exact.csv").read_text() == before
    rows = records.rows(tmp_path / "exact.csv")
    assert {row["engine"] for row in rows} == {"exact", "activations-7"}
    assert all(len(records.curve(row, name)) == 4 for row in rows for name in learner.State._fields)


def test_a_run_on_record_with_other_steps_is_refused(tmp_path):
    run = behind.Run("chain", 20, 8, "uncorrected", 1e-3, 0)
    path = tmp_path / "behind.csv"
    records.append(path, {**run._asdict(), "j_policy": "0.1 0.2 0.3"})
    records.refuse_other_steps([run], path, 3)
    records.refuse_other_steps([run._replace(seed=1)], path, 4)
    with pytest.raises(SystemExit, match="curves of 3 points, not 4"):
        records.refuse_other_steps([run], path, 4)


def test_p_is_of_the_tasks_and_seeds_that_both_arms_have():
    def runs(arm, lows):
        return [{"task": "20", "seed": str(i), "lowest": str(low), "end": "0.5", "j_policy": arm}
                for i, low in enumerate(lows)]

    cells = {
        (1e-3, 8, "uncorrected"): runs("a", [0.1] * 4 + [0.1] * 36),
        (1e-3, 8, "token-tis"): runs("b", [0.9] * 4),
    }
    (p,) = tables.against_uncorrected(cells).values()
    assert p == pytest.approx(tables.fisher(4, 4, 0, 4))


def test_runs_in_which_an_arm_did_nothing_are_counted():
    row = {"task": "20", "seed": "0", "lowest": "0", "end": "0", "j_policy": "0.1 0.2"}
    other = row | {"j_policy": "0.1 0.3"}
    cells = {(1e-3, 8, "uncorrected"): [row], (1e-3, 8, "topr"): [row], (1e-3, 8, "ppo"): [other]}
    said = tables.idle(cells)
    assert "topr at 0.001, 8 behind: 1 of 1" in said and "ppo" not in said


@pytest.mark.slow
@pytest.mark.parametrize(("arm", "end"), [("uncorrected", 0.7764), ("token-tis", 0.8028)])
def test_ends_are_pinned_and_have_the_same_digits_again(arm, end):
    run = exact.Run("chain", 16, 10, "adam", "int3", arm)
    states = [*exact.learn(run, 30)]
    assert states == [*exact.learn(run, 30)]
    assert states[-1].j_policy == pytest.approx(end, abs=5e-3)


@pytest.mark.slow
def test_everything_runs_at_toy_size_and_is_reported(tmp_path):
    exact.main(["--records", str(tmp_path), "--length", "64", "--steps", "4",
                "--engines", "exact", "both-8", "--arms", "uncorrected", "token-tis"])
    exact.main(["--records", str(tmp_path), "--length", "256", "--steps", "2",
                "--engines", "behind-8", "temperature-1.3",
                "--arms", "uncorrected", "uncorrected-critic", "token-tis",
                "token-tis-critic"])
    runs = [
        behind.Run(world, 20, lag, arm, 1e-3, 0) for world in ("chain", "attention")
        for lag, arm in ((0, "uncorrected"), (8, "uncorrected"), (8, "token-tis"), (8, "gspo"),
                         (8, "sequence-tis"), (8, "token-tis-critic"), (8, "past-tis"))
    ]
    runs += [run._replace(seed=1) for run in runs if run.world == "chain"]
    behind.carry_out(runs, tmp_path / "behind.csv", 12, jobs=2)
    bias.main(["--records", str(tmp_path), "--lengths", "8", "--engines", "int3"])
    for name in ("exact_lengths", "exact_baselines", "exact_critics", "behind", "behind_lags",
                 "behind_better", "behind_rates", "behind_attention", "bias", "bias_shared"):
        assert "|---|" in tables.TABLES[name](tmp_path), name
    figures = pytest.importorskip("benchmarks.lab.chain.figures")
    figures.main(tmp_path, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} >= {
        "behind.png", "behind-kl.png", "exact-critics.png", "kinds.png"}


def test_runs_made_again_are_told_where_they_part(tmp_path):
    def write(path, ends):
        path.parent.mkdir(exist_ok=True)
        key = "world,length,task,optimizer,engine,arm,steps,j_policy,j_engine,kl"
        path.write_text("\n".join([key, *(
            f"chain,256,10,sgd,{engine},icepop,2,0.5 {j} {end},0.5 0.5 0.5,0 0 0"
            for engine, (j, end) in ends.items()
        )]) + "\n")
        path.with_suffix(".json").write_text(
            '{"processor": "one", "torch": "2", "commit": "a", "date": "today"}')

    write(tmp_path / "exact.csv", {
        "noise-1": ("0.3", "0"), "int3": ("0.6", "0.7"), "exact": ("0.6", "0.9"),
        "int8": ("0.6", "0.9"),
    })
    write(tmp_path / tables.AGAIN / "exact.csv", {
        "noise-1": ("0.4", "0.96"), "int3": ("0.44", "0.69"), "exact": ("0.6", "0.9"),
    })
    text = tables.again(tmp_path)
    assert "| chain | 10 | sgd | noise-1 | icepop | 0.96 | 0.000, lowest 0.000, never |" in text
    assert "| 0.960, lowest 0.400, step 2 |" in text and text.count("\n| chain") == 2
    assert "Of 3 runs of 256 tokens 1 have the same J(π) at each step, to four digits" in text
    assert "2 sank (below the start by more than 0.05) in both or in neither" in text


def test_a_missing_record_is_said_to_be_missing(tmp_path):
    for name, table in tables.TABLES.items():
        assert "No record of `python -m benchmarks.lab" in table(tmp_path), name


def test_sampled_tokens_of_attention_come_from_its_own_log_probs():
    of = attention.puzzle(0, length=6, prompts=1, kinds=3, vocab=3, right=2)
    weights = attention.untrained(of, seed=1)
    features = of.features(torch.Generator().manual_seed(2))
    n = 40_000
    drawn = attention.answers(of, weights, features, n, torch.Generator().manual_seed(3))[0]
    scored = attention.logits(weights, features, drawn[:1]).softmax(-1)[0, 0]
    counts = torch.bincount(drawn[:, 0], minlength=3) / n
    assert torch.allclose(counts, scored, atol=0.012)
    # a later position, given one prefix
    prefix = drawn[:, :3] == drawn[0, :3]
    same = drawn[prefix.all(1)]
    counts = torch.bincount(same[:, 3], minlength=3) / len(same)
    scored = attention.logits(weights, features, drawn[:1]).softmax(-1)[0, 3]
    assert torch.allclose(counts, scored, atol=4 / len(same) ** 0.5)


def test_records_say_on_what_all_of_them_were_made(tmp_path):
    path = tmp_path / "new" / "runs.csv"
    records.note(path)
    said = json.loads(path.with_suffix(".json").read_text())
    records.append(path, {"run": 1})
    path.with_suffix(".json").write_text(json.dumps(said | {"commit": "abc to def"}))
    records.note(path)
    assert json.loads(path.with_suffix(".json").read_text()) == said | {
        "commit": f"abc to {said['commit']}"}


def test_a_candidate_is_judged_by_all_four_comparisons(tmp_path):
    def ran(arm, rate, *ends):
        for seed, end in enumerate(ends):
            run = behind.Run("chain", 20, 8, arm, rate, seed)
            records.append(tmp_path / "behind.csv", {**run._asdict(), "end": end})

    for rate in behind.RATES[1:]:
        ran("token-tis-critic", rate, 0.98, 0.97, 0.99)
        ran("token-tis", rate, 0.5, 0.4, 0.45, 0.9)
    said = tables.better(tmp_path)
    assert "`token-tis-critic` is not decided, 2 of 4 comparisons" in said
    assert "| 3 | +0.530" in said  # the fourth seed is of one arm alone
    for rate in behind.RATES[1:]:
        ran("sequence-tis", rate, 0.6, 0.5, 0.4)
    assert "`token-tis-critic` does better" in tables.better(tmp_path)


def test_every_main_arm_has_a_colour():
    figures = pytest.importorskip("benchmarks.lab.chain.figures")
    assert {*behind.MAIN} <= {*figures.COLOURS}


def test_counts_have_the_intervals_and_tests_of_the_books():
    assert statistics.wilson(0, 3) == pytest.approx((0, 0.5615), abs=1e-4)
    assert statistics.fisher(14, 34, 0, 34) == pytest.approx(2.259e-5, rel=1e-3)
    assert statistics.fisher(3, 3, 1, 3) == pytest.approx(0.4)
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
