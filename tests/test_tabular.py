"""A tabular policy against a plain-Python enumeration of its own."""

import itertools
import math

import numpy as np
import pytest
import torch

from iscorrect import InputError
from iscorrect.testing import TabularPolicy, chi2, kl, mismatch, sequences, total_variation

SHAPES = [(2, 3, None), (3, 3, None), (3, 3, 0), (2, 4, 1), (4, 1, None), (1, 3, None)]


def enumerated(vocab, length, eos):
    """Sequences by filtering all strings of up to ``length`` tokens."""
    found = []
    for size in range(1, length + 1):
        for y in itertools.product(range(vocab), repeat=size):
            ended = eos is not None and y[-1] == eos
            if (ended or size == length) and (eos is None or eos not in y[:-1]):
                found.append(y)
    return found


def table_of(policy):
    """prefix -> NumPy probabilities, contexts in the order that ``sequences`` promises."""
    contexts = [
        y for size in range(policy.length)
        for y in itertools.product(range(policy.vocab), repeat=size)
        if policy.eos is None or policy.eos not in y
    ]
    logits = policy.logits.numpy()
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return dict(zip(contexts, weights / weights.sum(-1, keepdims=True), strict=True))


def rows_of(policy):
    tokens, _, mask, _ = policy.sequences
    return [tuple(row[keep].tolist()) for row, keep in zip(tokens, mask, strict=True)]


def probability(table, y):
    return math.prod(table[y[:t]][y[t]] for t in range(len(y)))


@pytest.mark.parametrize(("vocab", "length", "eos"), SHAPES)
def test_every_sequence_occurs_once(vocab, length, eos):
    policy = TabularPolicy.random(vocab, length, eos=eos)
    assert sorted(rows_of(policy)) == sorted(enumerated(vocab, length, eos))


@pytest.mark.parametrize(("vocab", "length", "eos"), SHAPES)
def test_probabilities_are_products_of_conditionals_and_sum_to_one(vocab, length, eos):
    policy = TabularPolicy.random(vocab, length, eos=eos)
    table = table_of(policy)
    expected = [probability(table, y) for y in rows_of(policy)]
    np.testing.assert_allclose(policy.probabilities, expected, rtol=1e-13)
    assert policy.probabilities.sum().item() == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize(("vocab", "length", "eos"), SHAPES)
def test_visits_are_probabilities_of_prefixes(vocab, length, eos):
    policy = TabularPolicy.random(vocab, length, eos=eos)
    table = table_of(policy)
    expected = [probability(table, prefix) for prefix in table]
    np.testing.assert_allclose(policy.visits(), expected, rtol=1e-13)


@pytest.mark.parametrize(("vocab", "length", "eos"), SHAPES)
def test_action_values_are_conditional_expectations(vocab, length, eos):
    policy = TabularPolicy.random(vocab, length, eos=eos)
    reward = torch.rand(len(policy.probabilities)).double()
    table, rows = table_of(policy), rows_of(policy)
    values = policy.action_values(reward)
    for c, prefix in enumerate(table):
        for v in range(vocab):
            start = (*prefix, v)
            passing = [i for i, y in enumerate(rows) if y[: len(start)] == start]
            expected = sum(probability(table, rows[i]) * reward[i].item() for i in passing)
            assert values[c, v].item() == pytest.approx(expected / probability(table, start))


@pytest.mark.parametrize(("vocab", "length", "eos"), SHAPES)
def test_policy_gradient_is_the_derivative_of_the_expected_reward(vocab, length, eos):
    policy = TabularPolicy.random(vocab, length, eos=eos)
    reward = torch.rand(len(policy.probabilities)).double()
    logits = policy.logits.clone().requires_grad_()
    again = TabularPolicy(logits, length, eos)
    again.expected_reward(reward).backward()
    torch.testing.assert_close(policy.policy_gradient(reward), logits.grad, atol=1e-15, rtol=1e-12)


def test_sampling_follows_the_probabilities():
    policy = TabularPolicy.random(3, 2, eos=0)
    size = 50_000
    counts = torch.bincount(policy.sample(size), minlength=len(policy.probabilities))
    p = policy.probabilities
    standard_error = (p * (1 - p) / size).sqrt()
    assert ((counts / size - p).abs() < 5 * standard_error).all()


def test_divergences_are_the_textbook_sums():
    p, q = (TabularPolicy.random(3, 3, eos=1, seed=seed) for seed in (0, 1))
    a, b = p.probabilities.numpy(), q.probabilities.numpy()
    assert kl(p, q).item() == pytest.approx((a * np.log(a / b)).sum())
    assert chi2(p, q).item() == pytest.approx((a**2 / b).sum() - 1)
    assert total_variation(p, q).item() == pytest.approx(np.abs(a - b).sum() / 2)


def test_divergences_are_infinite_where_support_is_missing_and_finite_where_it_is_spare():
    policy = TabularPolicy.random(3, 2)
    narrow = mismatch.top_k(policy, 2)
    assert kl(policy, narrow).item() == math.inf
    assert chi2(policy, narrow).item() == math.inf
    assert kl(narrow, policy).isfinite()
    assert chi2(narrow, policy).isfinite()


def test_rounded_logits_lie_on_the_grid():
    policy = TabularPolicy.random(3, 3)
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        logits = mismatch.round_logits(policy, dtype).logits
        assert torch.equal(logits.to(dtype).double(), logits)
        assert not torch.equal(logits, policy.logits)


def test_rounded_reports_leave_sampling_alone():
    policy = TabularPolicy.random(3, 3)
    engine = mismatch.round_reports(policy, torch.bfloat16)
    assert torch.equal(engine.probabilities, policy.probabilities)
    reports = engine.reported_log_probs
    assert torch.equal(reports.bfloat16().double(), reports)
    assert not torch.equal(reports, policy.log_probs)


@pytest.mark.parametrize("freedom", [math.inf, 3.0])
@pytest.mark.parametrize("sigma", [0.0, 0.01, 0.2])
def test_noise_has_the_size_that_was_asked_for(sigma, freedom):
    policy = TabularPolicy.random(3, 4, eos=0)
    engine = mismatch.noise(policy, sigma, freedom=freedom)
    p, q = table_of(policy), table_of(engine)
    squares = tokens = 0.0
    for y in rows_of(policy):
        chance = probability(q, y)
        tokens += chance * len(y)
        squares += chance * sum(
            math.log(p[y[:t]][y[t]] / q[y[:t]][y[t]]) ** 2 for t in range(len(y))
        )
    assert math.sqrt(squares / tokens) == pytest.approx(sigma, abs=1e-12)


def test_heavy_noise_has_the_heavier_tail():
    policy = TabularPolicy.random(3, 6)
    normal, heavy = (mismatch.noise(policy, 0.05, freedom=f) for f in (math.inf, 2.0))
    largest = [(e.logits - policy.logits).abs().max() for e in (normal, heavy)]
    assert largest[1] > 2 * largest[0]


def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass():
    policy = TabularPolicy.random(5, 1)
    probabilities = policy.table.exp()[0]
    for mass in (0.3, 0.6, 0.9, 1.0):
        kept = mismatch.top_p(policy, mass).table[0].exp() > 0
        subsets = [
            set(s) for size in range(1, 6) for s in itertools.combinations(range(5), size)
            if probabilities[list(s)].sum() >= mass - 1e-12
        ]
        assert kept.sum().item() == min(map(len, subsets))
        assert set(kept.nonzero().flatten().tolist()) in subsets


def test_top_k_and_min_p_keep_what_they_say():
    policy = TabularPolicy.random(5, 2)
    for row, kept in zip(policy.table, mismatch.top_k(policy, 2).table > -torch.inf, strict=True):
        assert set(kept.nonzero().flatten().tolist()) == set(row.topk(2).indices.tolist())
    for row, kept in zip(policy.table, mismatch.min_p(policy, 0.4).table > -torch.inf, strict=True):
        assert torch.equal(kept, row.exp() >= 0.4 * row.exp().max())


@pytest.mark.parametrize(
    "make",
    [
        lambda p, report: mismatch.temperature(p, 0.5, report=report),
        lambda p, report: mismatch.top_p(p, 0.7, report=report),
        lambda p, report: mismatch.top_k(p, 2, report=report),
        lambda p, report: mismatch.min_p(p, 0.3, report=report),
        lambda p, report: mismatch.repetition_penalty(p, 1.5, report=report),
    ],
)
def test_processed_reports_are_what_is_sampled_from_and_raw_ones_are_the_model(make):
    policy = TabularPolicy.random(3, 3)
    processed, raw = make(policy, "processed"), make(policy, "raw")
    assert torch.equal(processed.probabilities, raw.probabilities)
    assert torch.equal(processed.reported_log_probs, processed.log_probs)
    assert torch.equal(raw.reported_log_probs, policy.log_probs)
    assert not torch.equal(raw.probabilities, policy.probabilities)


def test_a_repetition_penalty_touches_tokens_of_the_prefix_alone():
    policy = TabularPolicy.random(3, 2)
    change = mismatch.repetition_penalty(policy, 2.0).logits - policy.logits
    assert torch.equal(change[0], torch.zeros(3).double())
    # context 1 + v is the prefix that consists of token v
    assert torch.equal(change[1:] != 0, torch.eye(3).bool())
    seen = change[1:].diagonal()
    assert (seen < 0).all()


def test_stale_weights_earn_less_than_the_policy_that_was_updated_from_them():
    policy = TabularPolicy.random(3, 3)
    reward = torch.rand(27).double()
    before = mismatch.stale(policy, reward, step=0.1)
    assert before.expected_reward(reward) < policy.expected_reward(reward)


def test_a_fault_is_in_one_context():
    policy = TabularPolicy.random(3, 3)
    changed = mismatch.fault(policy, 2.0, context=4, token=1).table != policy.table
    assert changed.any(-1).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sequences(10, 10), ("sequences", "vocab, length", "10 ** 10")),
        (lambda: sequences(2, 2, eos=2), ("sequences", "`eos`", "got 2")),
        (lambda: TabularPolicy(torch.zeros(3, 2), 2), ("`logits`", "float64 (3, 2)", "float32")),
        (lambda: TabularPolicy(torch.zeros(6).double(), 2), ("`logits`", "`c v`", "(6,)")),
        (
            lambda: TabularPolicy(torch.zeros(3, 2).double(), 2, reported=torch.zeros(1).double()),
            ("`reported`", "(3, 2)", "(1,)"),
        ),
        (
            lambda: kl(TabularPolicy.random(2, 2), TabularPolicy.random(2, 3)),
            ("kl", "`policies`", "length=2", "length=3"),
        ),
        (
            lambda: mismatch.temperature(TabularPolicy.random(2, 2), 0.9, report="both"),
            ("`report`", "'processed', 'raw'", "'both'"),
        ),
        (lambda: mismatch.noise(TabularPolicy.random(2, 2), 5.0), ("noise", "`sigma`", "5.0")),
        (lambda: mismatch.noise(TabularPolicy.random(2, 2), -1), ("noise", "`sigma`", "-1")),
        (lambda: mismatch.parse_mismatch("bf17"), ("parse_mismatch", "bf16", "'bf17'")),
        (lambda: mismatch.parse_mismatch("top-p"), ("parse_mismatch", "top-p=NUMBER", "'top-p'")),
    ],
)
def test_messages_name_caller_argument_and_value(call, words):
    with pytest.raises(InputError) as error:
        call()
    for word in (*words, "Fix: "):
        assert word in str(error.value)


def test_parsed_mismatches_are_the_makers():
    policy = TabularPolicy.random(3, 2)
    pairs = {
        "bf16": mismatch.round_logits(policy, torch.bfloat16),
        "fp16": mismatch.round_logits(policy, torch.float16),
        "fp8": mismatch.round_logits(policy, torch.float8_e4m3fn),
        "noise=0.1": mismatch.noise(policy, 0.1),
        "heavy-noise=0.1": mismatch.noise(policy, 0.1, freedom=3.0),
        "temperature=0.9": mismatch.temperature(policy, 0.9),
        "top-p=0.9": mismatch.top_p(policy, 0.9),
        "top-k=2": mismatch.top_k(policy, 2),
        "min-p=0.2": mismatch.min_p(policy, 0.2),
        "repetition-penalty=1.2": mismatch.repetition_penalty(policy, 1.2),
        "fault=2": mismatch.fault(policy, 2.0),
    }
    for text, expected in pairs.items():
        assert torch.equal(mismatch.parse_mismatch(text)(policy).logits, expected.logits)


@pytest.mark.parametrize(
    ("maker", "value"),
    [
        (mismatch.temperature, 0), (mismatch.temperature, -1.0), (mismatch.temperature, math.nan),
        (mismatch.top_p, 0.0), (mismatch.top_p, 1.5), (mismatch.top_k, 0), (mismatch.min_p, 2.0),
        (mismatch.repetition_penalty, 0.0), (mismatch.noise, -0.1),
    ],
)
def test_a_mismatch_that_would_make_no_policy_is_refused(maker, value):
    with pytest.raises(InputError, match="Fix: pass"):
        maker(TabularPolicy.random(2, 2), value)
