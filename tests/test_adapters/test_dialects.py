"""Each framework's formula in NumPy, one sequence at a time, against the Correction it becomes.

A formula gets the log-ratios of one sequence and returns its weights, 0 where it rejects. The
frameworks that can be installed are compared with themselves too, in the file of each.
"""

import argparse
import math

import numpy as np
import pytest
from batches import batches
from hypothesis import given, strategies as st

from iscorrect import Clip, Correction, Ignore, InputError, Mask, Truncate
from iscorrect.adapters.areal import from_areal
from iscorrect.adapters.ms_swift import from_ms_swift
from iscorrect.adapters.nemo_rl import from_nemo_rl
from iscorrect.adapters.openrlhf import from_openrlhf
from iscorrect.adapters.prime_rl import from_prime_rl
from iscorrect.adapters.skyrl import from_skyrl
from iscorrect.adapters.slime import from_slime
from iscorrect.adapters.trl import from_trl
from iscorrect.adapters.verl import from_verl

exp = np.exp
bound = st.floats(math.log(1e-3), math.log(1e3)).map(math.exp)
bands = st.tuples(bound, bound).map(sorted).map(tuple)


def assert_same(correction, batch, formula):
    """The formula on every sequence of the batch gives the correction's weights."""
    ours = correction(
        old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs,
        mask=batch.mask,
    ).weights
    assert not ours[~batch.mask].any()
    sequences = [s for s in batch.sequences() if len(s.old)]
    theirs = formula([s.old - s.rollout for s in sequences])
    got = [w[m].numpy() for w, m in zip(ours, batch.mask, strict=True) if m.any()]
    for a, b in zip(got, theirs, strict=True):
        np.testing.assert_allclose(a, np.broadcast_to(b, a.shape), rtol=1e-6, atol=1e-8)


def each(formula):
    return lambda sequences: [formula(d) for d in sequences]


def inside(x, low, high):
    return (x >= (0 if low is None else low)) & (x <= (np.inf if high is None else high))


@given(
    batches(),
    st.sampled_from(["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]),
    bands, st.booleans(),
)
def test_trl(batch, mode, band, one_sided):
    low, high = (None, band[1]) if one_sided else band

    def formula(d):
        d = np.full_like(d, d.sum()) if mode.startswith("sequence") else d
        ratio = exp(np.minimum(d, 300))
        if mode.endswith("truncate"):
            return np.clip(ratio, low, high)
        return np.where(inside(ratio, low, high), ratio, 0)

    assert_same(from_trl(mode, high, low), batch, each(formula))


def slime_arguments(**changes):
    arguments = dict(
        use_tis=True, tis_clip=2.0, tis_clip_low=0.0, custom_tis_function_path=None,
        use_rs=False, tis_level="token", tis_mode="truncate", tis_lower_bound=None,
        tis_upper_bound=2.0, tis_batch_normalize=False, rs_level="token", rs_lower_bound=None,
        rs_upper_bound=None, rs_veto_threshold=None,
    )
    return argparse.Namespace(**(arguments | changes))


@given(batches(), bands, st.booleans(), st.booleans())
def test_slime_built_in(batch, band, icepop, one_sided):
    low, high = (0.0, band[1]) if one_sided else band
    path = "slime.backends.megatron_utils.loss.icepop_function" if icepop else None
    args = slime_arguments(tis_clip_low=low, tis_clip=high, custom_tis_function_path=path)

    def formula(d):
        ratio = exp(np.minimum(d, 300))
        return np.where(inside(ratio, low, high), ratio, 0) if icepop else np.clip(ratio, low, high)

    assert_same(from_slime(args), batch, each(formula))


levels = st.sampled_from(["token", "sequence", "geometric"])


def at_level(d, level):
    held = {"token": d, "sequence": d.sum(), "geometric": d.mean()}[level]
    return exp(np.clip(np.broadcast_to(held, d.shape), -20, 20))


@given(
    batches(), levels, st.sampled_from(["truncate", "clip", "mask"]), bands, st.booleans(),
    st.none() | st.tuples(levels, bands, st.none() | bound.map(lambda x: x * 1e-3)), st.booleans(),
)
def test_slime_mis(batch, level, mode, band, one_sided, reject, normalize):
    normalize = normalize and level != "geometric"
    low, high = (None, max(band[1], 1.0)) if one_sided else band
    rs_level, (rs_low, rs_high), veto = reject or (None, (None, None), None)
    args = slime_arguments(
        custom_tis_function_path="examples.mismatch.mis.compute_mis_weights_with_cp",
        tis_level=level, tis_mode=mode, tis_lower_bound=low, tis_upper_bound=high,
        tis_batch_normalize=normalize, use_rs=reject is not None, rs_level=rs_level,
        rs_lower_bound=rs_low, rs_upper_bound=rs_high, rs_veto_threshold=veto,
    )
    low = 1 / high if low is None else low

    def formula(sequences):
        weights, keeps = [], []
        for d in sequences:
            w = at_level(d, level)
            keep = np.ones(d.shape, bool)
            if mode == "mask":
                keep &= inside(w, low, high)
            else:
                w = np.clip(w, 0 if mode == "truncate" else low, high)
            if reject:
                keep &= inside(at_level(d, rs_level), rs_low, rs_high)
            if veto:
                keep &= d.min() >= math.log(veto)
            weights.append(w)
            keeps.append(keep)
        mean = 1.0
        if normalize and sequences:
            units = weights if level == "token" else [w[:1] for w in weights]
            mean = np.concatenate(units).mean()
        return [w / (mean if mean > 1e-8 else 1) * k for w, k in zip(weights, keeps, strict=True)]

    assert_same(from_slime(args), batch, formula)


@given(
    batches(), st.sampled_from(["token", "sequence"]), st.sampled_from(["mask", "clamp"]),
    st.sampled_from(["ratio", "kl_k1", "kl_k2", "kl_k3"]), st.sampled_from(["sum", "mean", "max"]),
    bands, st.booleans(),
)
def test_areal(batch, level, action, metric, agg, band, one_sided):
    action = action if metric == "ratio" else "mask"
    low, high = (None, band[1]) if one_sided else band

    def formula(d):
        x = {"kl_k2": d**2 / 2, "kl_k3": np.expm1(np.minimum(-d, 300)) + d}.get(metric, d)
        if level == "sequence":
            x = np.full_like(d, getattr(x, agg)())
        x = exp(np.minimum(x, 300)) if metric == "ratio" else x
        keep = (x <= high) & (True if low is None else x >= low)
        geometric = level == "sequence" and metric == "ratio"
        weight = exp(np.minimum(np.full_like(d, d.mean()) if geometric else d, 300))
        if action == "mask":
            return np.where(keep, weight, 0)
        return np.where(keep, weight, np.clip(weight, low, high))

    assert_same(from_areal(level, action, metric, agg, high, low), batch, each(formula))


types = st.sampled_from(["tis", "icepop", "seq-mask-tis"])


def truncated(d, level, kind, low, high):
    ratio = exp(np.minimum(np.full_like(d, d.sum()) if level == "sequence" else d, 300))
    if kind == "tis":
        return np.clip(ratio, low, high)
    looked_at = ratio if kind == "icepop" else exp(np.minimum(d.mean(), 300))
    return np.where(inside(looked_at, low, high), ratio, 0)


@given(batches(), types, bands, st.booleans(), st.booleans(), st.booleans())
def test_nemo_rl(batch, kind, band, one_sided, bounded, sequence):
    low, high = (None, band[1]) if one_sided and kind == "tis" else band
    low, high = (low, high) if bounded else (None, None)
    sequence = sequence and not (bounded and kind == "seq-mask-tis")
    level = "sequence" if sequence else "token"
    # exp overflows float32 above its largest number, and NeMo-RL makes inf a 0
    overflow = math.log(np.finfo(np.float32).max)

    def formula(d):
        x = d.sum() if sequence else d
        weights = truncated(d, level, kind if bounded else "icepop", low, high)
        return np.where(x > overflow, 0, weights)

    correction = from_nemo_rl(True, high, low, kind if bounded else None, sequence)
    assert_same(correction, batch, each(formula))


@given(batches(), st.sampled_from(["token clip", "token mask", "seq mask"]), bands)
def test_openrlhf(batch, how, band):
    kind = {"token clip": "tis", "token mask": "icepop", "seq mask": "seq-mask-tis"}[how]
    correction = from_openrlhf(*how.split(), "ratio", band)
    assert_same(correction, batch, each(lambda d: truncated(d, "token", kind, *band)))


@given(batches(), st.sampled_from(["default", "ipo"]), st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_prime_rl(batch, kind, low, high):
    correction = from_prime_rl(kind, low, high, ipo_threshold=low)
    ours = correction(
        old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs,
        mask=batch.mask, advantages=batch.advantages,
    ).weights
    rows = [w[m].numpy() for w, m in zip(ours, batch.mask, strict=True)]
    for weights, s in zip(rows, batch.sequences(), strict=True):
        shift = exp(s.old) - exp(s.rollout)
        if kind == "ipo":
            keep = np.abs(shift) <= low
        else:
            keep = np.where(s.advantages > 0, shift <= high, shift >= -low)
        expected = np.where(keep, exp(np.minimum(s.old - s.rollout, 300)), 0)
        np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-8)


def test_settings_at_their_defaults_are_the_presets_of_the_table():
    assert from_trl("token_truncate").bound == Truncate(3.0)
    assert (from_trl().level, from_trl().bound) == ("sequence", Mask(0.0, 3.0))
    assert from_verl("token", "0.5_5.0").bound == Mask(0.5, 5.0)
    assert from_slime(slime_arguments()).bound == Truncate(2.0)
    assert from_areal(action="clamp").bound == Truncate(5.0)
    assert from_nemo_rl(True, 5.0, 0.5, "icepop").bound == Mask(0.5, 5.0)
    assert from_nemo_rl() == Correction(bound=Ignore())
    assert from_nemo_rl(sequence_level_importance_ratios=True) == Correction(bound=Ignore())
    assert from_openrlhf().bound == Ignore()
    assert from_openrlhf("token").bound == Mask(0.5, 5.0)
    assert from_openrlhf("token", "clip").bound == Clip(0.5, 5.0)
    assert from_openrlhf("token", "clip", "ratio", (2.0,)).bound == Truncate(2.0)
    assert from_skyrl().bound == Ignore()
    assert from_skyrl("sequence").bound == Truncate(5.0)
    assert from_ms_swift().bound == Truncate(2.0)


def test_only_normalised_dialects_look_across_the_batch():
    mis = dict(custom_tis_function_path="x.mis.f", tis_mode="mask", use_rs=True)
    local = [
        from_trl(), from_verl("token", 2.0, rollout_rs="seq_max_k2", rollout_rs_threshold=1.0),
        from_slime(slime_arguments(**mis)), from_areal(agg="max"),
        from_areal(action="clamp", agg="sum"), from_nemo_rl(True), from_openrlhf("seq"),
        from_openrlhf("token", "mask", "tv", (0.1,)), from_prime_rl(), from_ms_swift(),
        from_ms_swift("sequence_truncate"), from_skyrl(
            "sequence", sequence_mask_metric="product", token_mask_is_threshold_low=0.5,
            token_mask_is_threshold_high=2.0,
        ),
    ]
    assert {correction.scope for correction in local} <= {"token", "sequence"}
    assert from_verl("token", 2.0, True).scope == "batch"


REFUSED = {
    "trl mode": (lambda: from_trl("token"), "mode", "'token_truncate'"),
    "verl level": (lambda: from_verl("geometric"), "rollout_is", "'token', 'sequence'"),
    "verl negative cap": (lambda: from_verl("token", -1), "rollout_is_threshold", "got -1"),
    "verl swapped": (lambda: from_verl("token", "5_0.5"), "rollout_is_threshold", "low <= high"),
    "verl bool": (lambda: from_verl("token", True), "rollout_is_threshold", "got True"),
    "verl words": (lambda: from_verl("token", "two"), "rollout_is_threshold", "got 'two'"),
    "verl rule": (
        lambda: from_verl(rollout_rs="seq_max_k1", rollout_rs_threshold=1), "rollout_rs", "token_k1"
    ),
    "verl two bounds": (
        lambda: from_verl(rollout_rs="token_k3", rollout_rs_threshold="1_2"),
        "rollout_rs_threshold", "only the k1 rules have two bounds",
    ),
    "verl no threshold": (
        lambda: from_verl(rollout_rs="token_k3"), "rollout_rs_threshold", "got None"
    ),
    "verl three for two": (
        lambda: from_verl(rollout_rs="token_k2,token_k3", rollout_rs_threshold="1,2,3"),
        "rollout_rs_threshold", "one threshold, or 2 joined",
    ),
    "verl one bound of two": (
        lambda: from_verl(None, rollout_rs="token_k1", rollout_rs_threshold="0.5"),
        "rollout_rs_threshold", "pass '2'",
    ),
    "verl rule of no name": (
        lambda: from_verl("token", "2.0", rollout_rs=""), "rollout_rs", "pass rollout_rs=None"
    ),
    "nemo-rl ratio without a type": (
        lambda: from_nemo_rl(True, 2.0), "truncated_importance_sampling_type", "='tis'"
    ),
    "nemo-rl type": (
        lambda: from_nemo_rl(True, 2.0, None, "mask"), "truncated_importance_sampling_type",
        "'icepop'",
    ),
    "nemo-rl type without weights": (
        lambda: from_nemo_rl(False, 2.0, None, "tis"), "use_importance_sampling_correction",
        "pass use_importance_sampling_correction=True",
    ),
    "nemo-rl type without a ratio": (
        lambda: from_nemo_rl(True, None, None, "tis"), "truncated_importance_sampling_ratio",
        "got None",
    ),
    "nemo-rl icepop without a minimum": (
        lambda: from_nemo_rl(True, 2.0, None, "icepop"), "truncated_importance_sampling_ratio_min",
        "got None",
    ),
    "nemo-rl swapped": (
        lambda: from_nemo_rl(True, 0.5, 2.0, "tis"), "truncated_importance_sampling_ratio_min",
        "in [0, 0.5]",
    ),
    "nemo-rl masks sequences by tokens' weights": (
        lambda: from_nemo_rl(True, 1.2, 0.9, "seq-mask-tis", True),
        "sequence_level_importance_ratios", "'seq-mask-tis'",
    ),
    "slime's other functions": (
        lambda: from_slime(slime_arguments(custom_tis_function_path="mine.weights")),
        "custom_tis_function_path", "got 'mine.weights'",
    ),
    "slime geometric": (
        lambda: from_slime(slime_arguments(
            custom_tis_function_path="x.mis.f", tis_level="geometric", tis_batch_normalize=True
        )), "tis_batch_normalize", "tis_batch_normalize: false",
    ),
    "areal clamps a divergence": (
        lambda: from_areal(action="clamp", metric="kl_k2"), "action", "only ratios can be clamped"
    ),
    "openrlhf level": (
        lambda: from_openrlhf("mis"), "is_correction_level", "'off', 'token', 'seq'"
    ),
    "openrlhf clips a sequence": (
        lambda: from_openrlhf("seq", "clip"), "is_correction_mode", "only a token's ratio"
    ),
    "openrlhf's divergence has one bound": (
        lambda: from_openrlhf("seq", "mask", "tv"), "is_correction_threshold", "(0.5, 5.0)"
    ),
    "skyrl level": (lambda: from_skyrl("geometric"), "tis_ratio_type", "'token', 'sequence'"),
    "skyrl metric": (
        lambda: from_skyrl(sequence_mask_metric="mean"), "sequence_mask_metric", "'geometric'"
    ),
    "prime-rl type": (lambda: from_prime_rl("cispo"), "type", "'default', 'ipo'"),
    "ms-swift mode": (
        lambda: from_ms_swift("token"), "rollout_importance_sampling_mode", "'token_mask'"
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_framework_refuses_is_refused(name):
    call, argument, fragment = REFUSED[name]
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert f": `{argument}` must be " in message
    assert fragment in message
    assert ". Fix: " in message
