"""Bad input gets an error that names caller, argument, expected, got, and the fix."""

import pickle

import pytest
import torch
from batches import make_batch
from messages import Messages, places

import iscorrect as ic
from iscorrect import InputError, Layout, PolicyLoss

MASK = torch.ones(2, 4, dtype=torch.bool)
GOOD = dict(
    log_probs=torch.full((2, 4), -1.0), rollout_log_probs=torch.full((2, 4), -1.0),
    advantages=torch.ones(2, 4), mask=MASK,
)


def call(**changes):
    arguments = GOOD | changes
    return PolicyLoss()(arguments.pop("log_probs"), **arguments)


def call_of(**parts):
    arguments = dict(GOOD)
    return PolicyLoss(**parts)(arguments.pop("log_probs"), **arguments)


def named(error, caller, argument, *fragments):
    message = str(error.value)
    assert message.startswith(f"{caller}: `{argument}` must be ")
    assert ", got " in message
    assert ". Fix: " in message
    for fragment in fragments:
        assert fragment in message


CALLS = {
    "integer mask": (dict(mask=MASK.int()), "mask", "int32 (2, 4)", "mask.bool()"),
    "no mask": (dict(mask=[True]), "mask", "a bool tensor or a Layout", "got list"),
    "scalar mask": (dict(mask=torch.tensor(True)), "mask", "at least one-dimensional"),
    "one token too few": (
        dict(rollout_log_probs=torch.zeros(2, 3)), "rollout_log_probs",
        "of shape (2, 4) like `mask`", "float32 (2, 3)", "one token too many or too few",
    ),
    "axes swapped": (
        dict(rollout_log_probs=torch.zeros(4, 2)), "rollout_log_probs", "pass `b t`, not `t b`",
    ),
    "prompt included": (
        dict(old_log_probs=torch.zeros(2, 9)), "old_log_probs", "over the same tokens",
    ),
    "another rank": (dict(advantages=torch.ones(1, 2, 4)), "advantages", "as `b t`"),
    "integer log-probs": (
        dict(rollout_log_probs=torch.zeros(2, 4, dtype=torch.long)), "rollout_log_probs",
        "a floating-point tensor", "int64 (2, 4)",
    ),
    "swapped policies": (
        dict(rollout_log_probs=torch.zeros(2, 4, requires_grad=True)), "rollout_log_probs",
        "without gradient", ".detach()", "swapped with `log_probs`",
    ),
    "gradient through the old policy": (
        dict(old_log_probs=torch.zeros(2, 4, requires_grad=True)), "old_log_probs", ".detach()",
    ),
    "another device": (
        dict(advantages=torch.ones(2, 4, device="meta")), "advantages", "on cpu like `mask`",
        "meta",
    ),
    "a reference without a penalty": (
        dict(ref_log_probs=torch.zeros(2, 4)), "ref_log_probs", "exactly where there is a",
    ),
    "a normalizer of zero": (dict(normalizer=0), "normalizer", "> 0", "global_normalizer"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_loss_refuses_what_it_cannot_use(name):
    changes, argument, *fragments = CALLS[name]
    with pytest.raises(InputError) as error:
        call(**changes)
    named(error, "PolicyLoss", argument, *fragments)


def test_a_rule_that_needs_advantages_says_so():
    batch = make_batch(0)
    for preset, rule in (("dppo", "ProbabilityShift"), ("off-policy-negative", "OffPolicyNegative"),
                         ("topr", "SignedTruncate")):
        with pytest.raises(InputError) as error:
            ic.PRESETS[preset]()(
                old_log_probs=batch.old_log_probs, rollout_log_probs=batch.rollout_log_probs,
                mask=batch.mask,
            )
        named(error, rule, "advantages", "got None", "pass advantages= to the correction")


SPECS = {
    "negative cap": (lambda: ic.Truncate(-1.0), "Truncate", "cap", "a number > 0", "got -1.0"),
    "cap as text": (lambda: ic.Truncate("2"), "Truncate", "cap", "got '2'"),
    "low above high": (lambda: ic.Mask(5.0, 0.5), "Mask", "low", "at most high=0.5", "swap"),
    "negative low": (lambda: ic.Clip(-1.0, 2.0), "Clip", "low", "a bound on the ratio itself"),
    "limit in words": (lambda: ic.DivergenceAbove(limit="x"), "DivergenceAbove", "limit",
                       "in nats"),
    "negative nats": (lambda: ic.OffPolicyNegative(limit=-3), "OffPolicyNegative", "limit", "nats"),
    "nats, no ratio": (lambda: ic.BinaryKL(limit=-0.1), "BinaryKL", "limit",
                       "Fix: pass limit as a divergence in nats"),
    "a factor, no ratio": (lambda: ic.ReferenceKL(coefficient="1"), "ReferenceKL", "coefficient",
                           "a factor"),
    "no centering": (lambda: ic.score_centering(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2),
                                                torch.ones(1, 1), cap=0), "score_centering", "cap"),
    "parsed word": (lambda: ic.parse("icepop:low=abc"), "Mask", "low", "got 'abc'"),
    "parsed none": (lambda: ic.parse("icepop:low=none"), "Mask", "low", "got None"),
    "parsed limit": (lambda: ic.parse("dppo:limit=abc"), "ProbabilityShift", "limit", "got 'abc'"),
    "a class as objective": (lambda: PolicyLoss(objective=ic.Reinforce), "PolicyLoss", "objective",
                             "parentheses"),
    "a class as aggregation": (lambda: PolicyLoss(aggregation=ic.TokenMean), "PolicyLoss",
                               "aggregation"),
    "cap of a log": (lambda: ic.SignedTruncate(0.0), "SignedTruncate", "cap", "not on its log"),
    "negative slope": (lambda: ic.ConfidenceCap(-1.0), "ConfidenceCap", "slope"),
    "negative floor": (lambda: ic.ConfidenceCap(1.0, -1.0), "ConfidenceCap", "floor"),
    "infinite bound": (lambda: ic.Mask(high=0.0), "Mask", "high"),
    "veto": (lambda: ic.Veto(low=2.0, high=1.0), "Veto", "low"),
    "rule level": (lambda: ic.RatioOutside(level="product"), "RatioOutside", "level", "'sequence'"),
    "estimator": (lambda: ic.DivergenceAbove(limit=1, estimator="k4"), "DivergenceAbove",
                  "estimator", "got 'k4'"),
    "over": (lambda: ic.DivergenceAbove(limit=1, over="median"), "DivergenceAbove", "over"),
    "binary limit": (lambda: ic.BinaryKL(limit=-1), "BinaryKL", "limit"),
    "divergence": (lambda: ic.ProbabilityShift(divergence="js"), "ProbabilityShift", "divergence"),
    "clip range for bound": (lambda: ic.PPOClip(low=0.2, high=0.28), "PPOClip", "high",
                             "pass high=1.28"),
    "low above one": (lambda: ic.PPOClip(low=1.2), "PPOClip", "low", "at most 1"),
    "dual below high": (lambda: ic.PPOClip(dual=1.1), "PPOClip", "dual", "at least high=1.2"),
    "cispo without an upper bound": (lambda: ic.CISPO(high=None), "CISPO", "high", "got None"),
    "cispo": (lambda: ic.CISPO(high=0.2), "CISPO", "high"),
    "objective level": (lambda: ic.PPOClip(level="turn"), "PPOClip", "level"),
    "kl": (lambda: ic.ReferenceKL(coefficient=-1.0), "ReferenceKL", "coefficient"),
    "level": (lambda: ic.Correction(level="seq"), "Correction", "level", "got 'seq'"),
    "nonfinite": (lambda: ic.Correction(nonfinite="zero"), "Correction", "nonfinite"),
    "bound": (lambda: ic.Correction(bound=2.0), "Correction", "bound", "Truncate(cap=2.0)"),
    "rule without comma": (lambda: ic.Correction(reject=(ic.Veto())), "Correction", "reject",
                           "with its comma"),
    "preset without call": (lambda: PolicyLoss(correction=ic.token_tis), "PolicyLoss",
                            "correction", "parentheses"),
    "objective": (lambda: PolicyLoss(objective="ppo"), "PolicyLoss", "objective"),
    "aggregation": (lambda: PolicyLoss(aggregation="mean"), "PolicyLoss", "aggregation",
                    "got 'mean'"),
    "aggregation without call": (lambda: PolicyLoss(aggregation=ic.TokenMean), "PolicyLoss",
                                 "aggregation", "got TokenMean", "parentheses"),
    "keep as numbers": (lambda: ic.group_advantages(torch.ones(2), torch.ones(2).long(),
                                                    torch.ones(2)),
                        "group_advantages", "keep", "a bool tensor, got", "keep.bool()"),
    "denominator": (lambda: PolicyLoss(over="all"), "PolicyLoss", "over"),
    "horizon missing": (lambda: PolicyLoss(aggregation="seq-mean-token-sum-norm"), "PolicyLoss",
                        "horizon", "max_new_tokens"),
    "half a token": (lambda: PolicyLoss(aggregation="seq-mean-token-sum-norm", horizon=1.5),
                     "PolicyLoss", "horizon", "an int > 0"),
    "horizon idle": (lambda: PolicyLoss(horizon=5), "PolicyLoss", "horizon", "got 5"),
    "sum with normalizer": (lambda: ic.aggregate(torch.ones(1, 1), MASK[:1, :1], "sum",
                                                 normalizer=3), "aggregate", "normalizer"),
    "global sum": (lambda: ic.global_normalizer(MASK, "sum", group=None, gradients="summed"),
                   "global_normalizer", "how"),
    "global gradients": (lambda: ic.global_normalizer(MASK, group=None, gradients="mean"),
                         "global_normalizer", "gradients"),
    "misspelt preset": (lambda: ic.parse("token-tsi"), "parse", "preset", "'token-tis'?"),
    "unknown preset": (lambda: ic.parse("magic"), "parse", "preset", "uncorrected, token-is"),
    "unknown argument": (lambda: ic.parse("token-tis:max=2"), "parse", "argument of token-tis",
                         "key one of cap", "got 'max=2'"),
    "bare argument": (lambda: ic.parse("token-tis:2"), "parse", "argument of token-tis"),
    "refused value": (lambda: ic.parse("token-tis:cap=-2"), "Truncate", "cap"),
    "float ids": (lambda: Layout(MASK, sequence_ids=MASK.float()), "Layout", "sequence_ids"),
    "ids of another shape": (lambda: Layout(MASK, segment_ids=torch.zeros(2, 3).long()), "Layout",
                             "segment_ids"),
    "two packed rows": (lambda: Layout.from_cu_seqlens(MASK, torch.tensor([0, 4])),
                        "Layout.from_cu_seqlens", "mask", "one packed row"),
    "padding a matrix": (lambda: ic.pad_sequences([torch.ones(1, 2)]), "pad_sequences",
                         "tensors[0]"),
    "integer rewards": (lambda: ic.group_advantages(torch.ones(2).long(), torch.ones(2).long()),
                        "group_advantages", "rewards"),
    "float groups": (lambda: ic.group_advantages(torch.ones(2), torch.ones(2)),
                     "group_advantages", "group_ids"),
    "kept tokens": (lambda: ic.group_advantages(torch.ones(2), torch.ones(2).long(), MASK),
                    "group_advantages", "keep", ".any(-1)"),
    "unknown baseline": (lambda: ic.group_advantages(torch.ones(2), torch.ones(2).long(),
                                                     estimator="ppo"),
                         "group_advantages", "estimator"),
    "heads of another size": (lambda: ic.score_centering(torch.ones(1, 2, 3), torch.ones(1, 2, 4),
                                                         torch.ones(1, 2)),
                              "score_centering", "rollout_head_log_probs"),
    "a loss of other rows": (lambda: ic.aggregate(torch.ones(2, 1), MASK), "aggregate", "per_token",
                             "of shape (2, 4) like `mask`"),
    "a temperature that would learn": (
        lambda: ic.log_probs_from_logits(torch.ones(2, 3), torch.ones(2, dtype=torch.long),
                                         temperature=torch.tensor(0.7, requires_grad=True)),
        "log_probs_from_logits", "temperature", "a number > 0"),
    "targets in a list": (lambda: ic.log_probs_from_logits(torch.ones(2, 3), [0, 1]),
                          "log_probs_from_logits", "target", "an integer tensor", "got list"),
    "a support in a list": (
        lambda: ic.log_probs_from_logits(torch.ones(2, 3), torch.ones(2, dtype=torch.long),
                                         support=[[0], [1]]),
        "log_probs_from_logits", "support", "got list"),
    "a dtype by name": (
        lambda: ic.linear_log_probs(torch.ones(2, 3), torch.ones(4, 3),
                                    torch.ones(2, dtype=torch.long), head_dtype="bfloat16"),
        "linear_log_probs", "head_dtype", "a floating-point dtype", "got 'bfloat16'"),
    "lengths in a list": (lambda: Layout.from_cu_seqlens(MASK[0], [0, 4]),
                          "Layout.from_cu_seqlens", "cu_seqlens", "an integer tensor"),
    "a loss of nothing": (lambda: ic.parse_loss(None), "parse_loss", "config", "got None"),
    "an argument twice": (lambda: ic.parse("token-tis:cap=2,cap=3"), "parse",
                          "argument of token-tis", "each given once", "got 'cap=3'"),
    "a penalty of one's own": (lambda: PolicyLoss(reference_kl=lambda a, b, c: a - b),
                               "PolicyLoss", "reference_kl", "a ReferenceKL, or None"),
    "a bound that is a mask": (
        lambda: call_of(correction=ic.Correction(bound=lambda r, e: r < 2)), "Correction", "bound",
        "to return weights", "got bool (2, 4)"),
    "a rule of floats": (
        lambda: call_of(correction=ic.Correction(reject=(lambda e: e.log_ratio.exp(),))),
        "Correction", "reject", "to return bool", "got float32 (2, 4)"),
    "an objective's tuple": (
        lambda: call_of(objective=lambda p, old, a, layout: (-a * p, None)), "PolicyLoss",
        "objective", "to return the loss", "got tuple"),
    "one advantage a head": (lambda: ic.score_centering(torch.ones(1, 2, 3), torch.ones(1, 2, 3),
                                                        torch.ones(1, 3)),
                             "score_centering", "advantages"),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_refuses_what_it_cannot_mean(name):
    make, caller, argument, *fragments = SPECS[name]
    with pytest.raises(InputError) as error:
        make()
    named(error, caller, argument, *fragments)


def test_a_callable_aggregation_takes_no_normalizer():
    loss_fn = PolicyLoss(aggregation=lambda per_token, layout: per_token.sum())
    with pytest.raises(InputError, match="divide inside the callable"):
        loss_fn(**GOOD, normalizer=3)


def test_the_error_is_a_value_error_and_survives_pickling():
    with pytest.raises(ValueError, match="mask") as error:
        call(mask=MASK.int())
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_messages_are_written_beside_the_places_that_no_test_saw(tmp_path):
    messages = Messages()
    (file, line, _), *_ = places()
    messages.seen[str(file), line] = "Truncate: `cap` must be a number > 0"
    messages.write(tmp_path / "messages.txt")
    written = (tmp_path / "messages.txt").read_text(encoding="utf-8")
    assert f"{file}:{line}\n    Truncate: `cap`" in written
    assert written.count("(no test saw this one)") == len(list(places())) - 1
