"""The share of errors that tokens have in common, on dumps whose share is known."""

import numpy as np
import pytest
import torch

from iscorrect.diagnose.shared import shared_error
from iscorrect.dumps import LogProbDump, Tokens
from iscorrect.report.gather import summarise
from iscorrect.report.render import headline

ROWS, LENGTH, VOCAB = 96, 64, 12


def dump(error, *, ids=None, p=0.4, **fields):
    """A dump whose log-odds differ by ``error`` "b t"."""
    rollout = np.full((ROWS, LENGTH), np.log(p))
    return LogProbDump(
        rollout_log_probs=torch.from_numpy(rollout),
        old_log_probs=torch.from_numpy(np.minimum(rollout + error * (1 - p), 0)),
        mask=torch.ones(ROWS, LENGTH, dtype=torch.bool),
        token_ids=None if ids is None else torch.from_numpy(ids), **fields,
    )


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def noise(rng, scale=0.05):
    return scale * rng.standard_normal((ROWS, LENGTH))


def test_independent_noise_shares_nothing(rng):
    values = []
    for _ in range(12):
        ids = rng.integers(0, VOCAB, (ROWS, LENGTH))
        version = torch.arange(ROWS) // 8
        found = shared_error(dump(noise(rng), ids=ids, version=version), permutations=60)
        assert set(found) == {"token", "pair", "position", "version"}
        assert all(abs(x.share) < 0.1 for x in found.values())
        values += [x.p_value for x in found.values()]
    assert 0.3 < np.mean(values) < 0.7
    assert np.mean(np.array(values) < 0.05) < 0.15


@pytest.mark.parametrize(("share", "unit"), [
    (0.02, "token"), (0.3, "token"), (0.3, "pair"), (0.2, "position"), (0.2, "version"),
])
def test_a_common_part_is_found_where_it_is_and_as_large_as_it_is(rng, share, unit):
    ids = rng.integers(0, VOCAB, (ROWS, LENGTH))
    version = np.arange(ROWS) // 4
    before = np.roll(ids, 1, axis=1)
    label = {
        "token": ids, "pair": ids * VOCAB + before, "position": np.arange(LENGTH) + 0 * ids,
        "version": version[:, None] + 0 * ids,
    }[unit]
    common = rng.standard_normal(label.max() + 1)
    common = (common - common.mean()) / common.std()
    error = 0.05 * (np.sqrt(share) * common[label] + np.sqrt(1 - share) * noise(rng, 1.0))
    found = shared_error(dump(error, ids=ids, version=torch.from_numpy(version)))
    assert found[unit].share == pytest.approx(share, rel=0.25, abs=0.01)
    assert found[unit].share > found[unit].null
    assert found[unit].p_value < 0.01
    for other in {"token", "position", "version"} - {unit}:
        assert found[other].share < 0.02 or unit == "pair"


def test_the_error_is_that_of_the_log_odds_whatever_the_confidence(rng):
    ids = rng.integers(0, VOCAB, (ROWS, LENGTH))
    common = rng.standard_normal(VOCAB)
    error = 0.03 * (common[ids] + noise(rng, 1.0))
    shares = [shared_error(dump(error, ids=ids, p=p))["token"].share for p in (0.1, 0.5, 0.9)]
    assert shares == pytest.approx([shares[0]] * 3, rel=0.02)


def test_what_a_whole_sequence_has_in_common_is_not_the_versions(rng):
    version = torch.arange(ROWS) // 8
    off = 0.1 * rng.standard_normal((ROWS, 1))
    p_values = []
    for _ in range(20):
        off = 0.1 * rng.standard_normal((ROWS, 1))
        found = shared_error(dump(noise(rng) + off, version=version), permutations=60)
        p_values.append(found["version"].p_value)
    assert np.mean(np.array(p_values) < 0.05) <= 0.2


def test_an_engine_that_repeats_itself_shares_the_whole_error_by_context(rng):
    answers = rng.integers(0, VOCAB, (ROWS // 2, LENGTH)).repeat(2, axis=0)
    once = noise(rng)[: ROWS // 2]
    group = torch.arange(ROWS // 2).repeat_interleave(2)
    found = shared_error(dump(once.repeat(2, axis=0), ids=answers, group=group))
    assert found["context"].share > 0.99
    assert found["context"].classes == ROWS * LENGTH // 2
    anew = shared_error(dump(noise(rng), ids=answers, group=group))
    assert abs(anew["context"].share) < 0.1
    other_prompts = shared_error(
        dump(once.repeat(2, axis=0), ids=answers, group=torch.arange(ROWS))
    )
    assert "context" not in other_prompts


def test_what_is_not_known_or_does_not_repeat_is_absent(rng):
    assert set(shared_error(dump(noise(rng)))) == {"position"}
    ids = np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)
    assert set(shared_error(dump(noise(rng), ids=ids))) == {"position"}
    certain = dump(noise(rng), p=0.995)
    assert shared_error(certain) == {}


def test_a_large_dump_is_looked_at_in_whole_sequences(rng):
    ids = rng.integers(0, VOCAB, (ROWS, LENGTH))
    tokens = Tokens.of(dump(noise(rng), ids=ids))
    found = shared_error(tokens, most=ROWS * LENGTH // 4)
    assert found["position"].tokens == ROWS * LENGTH // 4
    assert found["position"].classes == LENGTH


def test_equal_errors_share_nothing_and_are_no_fault():
    found = shared_error(dump(np.zeros((ROWS, LENGTH)), ids=np.zeros((ROWS, LENGTH), dtype=int)))
    assert all(x.share == 0 and x.p_value == 1 for x in found.values())


def test_the_report_tells_it(rng):
    ids = rng.integers(0, VOCAB, (ROWS, LENGTH))
    common = rng.standard_normal(VOCAB)
    report = summarise([dump(0.03 * (common[ids] + noise(rng, 1.0)), ids=ids)])
    found = shared_error(report.sample)
    for kind in ("token", "pair", "position"):
        assert report.metrics[f"shared/{kind}"] == found[kind].share
        assert report.metrics[f"shared/{kind}/p_value"] == found[kind].p_value
    assert f"token {found['token'].share:.1%} (" in dict(headline(report))["shared"]
    assert "shared" not in dict(headline(summarise([dump(noise(rng), p=0.995)])))
