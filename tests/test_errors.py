"""Bad input gets an error that names caller, argument, expected, got, and the fix."""

import contextlib
import pickle

import numpy as np
import pytest
import torch
from batches import make_batch
from messages import Messages, places

import iscorrect as ic
from iscorrect import InputError, Layout, PolicyLoss
from iscorrect.adapters.nemo_rl import from_nemo_rl
from iscorrect.adapters.verl import from_verl

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
                     "PolicyLoss", "horizon", "a whole number > 0"),
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


HEAD = dict(
    hidden=torch.randn(2, 4, 3), weight=torch.randn(5, 3), target=torch.ones(2, 4).long(),
    bias=None, temperature=1.0, softcap=None, chunk_size=8, head_dtype=torch.float32, support=None,
    vocabulary_group=None, vocabulary_size=None, sequence_parallel=False, compile_kernels=False,
)
LOSS = dict(
    rollout_log_probs=GOOD["rollout_log_probs"], advantages=GOOD["advantages"], mask=MASK,
    old_log_probs=None, normalizer=None,
)
WEIGHTS = {"w": torch.randn(9)}
TAKE = {
    ic.PolicyLoss(): dict(log_probs=GOOD["log_probs"], **LOSS),
    ic.token_tis(): dict(old_log_probs=GOOD["log_probs"], rollout_log_probs=GOOD["log_probs"],
                         mask=MASK, advantages=None),
    ic.token_tis_loss: dict(log_probs=GOOD["log_probs"], **LOSS, cap=2.0),
    ic.masked_is_loss: dict(log_probs=GOOD["log_probs"], **LOSS, low=0.5, high=5.0, level="token"),
    ic.fused_policy_loss: dict(loss_fn=PolicyLoss(), **HEAD, **LOSS, extra=None),
    ic.fp32_head_loss: dict(hidden=HEAD["hidden"], weight=HEAD["weight"], target=HEAD["target"],
                            **LOSS),
    ic.linear_log_probs: dict(**HEAD, entropy=False, layout=None),
    ic.log_probs_from_logits: dict(logits=torch.randn(2, 4, 5), target=HEAD["target"], mask=None,
                                   temperature=1.0, support=None, inplace_backward=False),
    ic.score_centering: dict(head_log_probs=torch.zeros(2, 4, 3), cap=2.0, advantages=MASK.float(),
                             rollout_head_log_probs=torch.zeros(2, 4, 3)),
    ic.aggregate: dict(per_token=GOOD["log_probs"], mask=MASK, how="token-mean", normalizer=2.0,
                       horizon=None),
    ic.global_normalizer: dict(mask=MASK, how="token-mean", group=None, gradients="summed"),
    ic.group_advantages: dict(rewards=torch.randn(4), group_ids=torch.tensor([0, 0, 1, 1]),
                              keep=None, estimator="grpo", eps=1e-6, batch_group=None),
    ic.log_ratio: dict(log_probs=GOOD["log_probs"], rollout_log_probs=GOOD["log_probs"],
                       layout=Layout(MASK)),
    ic.at_level: dict(log_ratio=GOOD["log_probs"], layout=Layout(MASK), level="sequence"),
    ic.effective_sample_size: dict(weights=MASK.float(), mask=MASK),
    ic.ess_cap: dict(ratio=MASK.float(), units=MASK, target=0.5, group=None),
    ic.pareto_tail: dict(log_weights=MASK.float(), units=MASK, group=None),
    ic.k1: dict(log_ratio=torch.zeros(2)), ic.k2: dict(log_ratio=torch.zeros(2)),
    ic.k3: dict(log_ratio=torch.zeros(2)), ic.ratio: dict(log_ratio=torch.zeros(2)),
    ic.Layout: dict(mask=MASK, sequence_ids=None, segment_ids=None, sequence_group=None,
                    num_ids=None, zigzag=False, batch_group=None, age=None),
    ic.pad_sequences: dict(tensors=[torch.ones(3)], value=0.0),
    ic.unpad: dict(padded=MASK.float(), mask=MASK),
    ic.audit_fp16: dict(source=WEIGHTS, underflow=0.01),
    ic.fp16_scaler: dict(device="cpu", scale=4.0, growth_interval=4, process_group=None),
    ic.weight_arrival: dict(before=WEIGHTS, after={"w": torch.randn(9)}, dtype=torch.bfloat16,
                            scaling="none"),
    ic.stochastic_round: dict(x=torch.ones(2), dtype=torch.bfloat16, generator=None),
    ic.stochastic_round_weights: dict(weights=WEIGHTS, dtype=torch.bfloat16, seed=0),
    ic.round_after_step: dict(optimizer=torch.optim.SGD([torch.ones(2)], lr=1.0),
                              dtype=torch.bfloat16, seed=0),
    ic.round_with_feedback: dict(x=torch.ones(2), dtype=torch.bfloat16, rest=None),
    ic.coherence: dict(uncorrected=torch.randn(9, 5), corrected=torch.randn(9, 5), sequences=4.0),
    ic.GradientSketch(): dict(gradients=[torch.ones(3)]),
    ic.GradientSketch: dict(seed=0, size=11, group=None),
    ic.Monitor: dict(watch={"mismatch/kl_k3": "rise"}),
    ic.PolicyLoss: dict(correction=ic.token_tis(), objective=ic.Reinforce(), over="mask",
                        aggregation="token-mean", horizon=None, reference_kl=None),
    ic.Correction: dict(level="token", bound=None, reject=(), normalize=False, nonfinite="drop"),
    ic.ByAge: dict(limit=2, fresh=ic.Truncate(), stale=ic.Mask()),
    ic.ReferenceKL: dict(coefficient=0.1, estimator="k3", corrected=False),
    ic.DivergenceAbove: dict(limit=0.1, estimator="k3", over="mean"),
    ic.to_text: dict(spec=ic.token_tis()), ic.to_dict: dict(spec=ic.token_tis()),
}
OTHERS = (
    None, 3, "text", [1.0], object(), np.zeros((2, 4)), torch.zeros(7, 3), torch.tensor(1.0),
    torch.float16, ic.Truncate,
)


@pytest.mark.parametrize("f", TAKE, ids=lambda f: getattr(f, "__name__", type(f).__name__))
def test_whatever_is_passed_in_the_place_of_an_argument_the_error_is_the_librarys_own(f):
    f(**TAKE[f])
    for argument in TAKE[f]:
        for other in OTHERS:
            with contextlib.suppress(InputError):
                f(**TAKE[f] | {argument: other})


@pytest.mark.parametrize(("f", "flag"), [
    (ic.Layout, "zigzag"), (ic.linear_log_probs, "entropy"),
    (ic.linear_log_probs, "sequence_parallel"), (ic.fused_policy_loss, "compile_kernels"),
    (ic.log_probs_from_logits, "inplace_backward"), (ic.Correction, "normalize"),
    (ic.ReferenceKL, "corrected"), (from_verl, "strict"), (from_verl, "rollout_is_batch_normalize"),
    (from_nemo_rl, "sequence_level_importance_ratios"),
])
def test_a_no_in_words_is_not_taken_for_a_yes(f, flag):
    with pytest.raises(InputError, match="True or False, got 'no'") as error:
        f(**TAKE.get(f, {}) | {flag: "no"})
    named(error, f.__name__, flag)


@pytest.mark.parametrize(("f", "argument", "value"), [
    (ic.linear_log_probs, "temperature", np.float32(0.5)),
    (ic.linear_log_probs, "softcap", np.float32(2.0)),
    (ic.linear_log_probs, "chunk_size", np.int64(8)),
    (ic.linear_log_probs, "vocabulary_size", np.int64(5)),
    (ic.fused_policy_loss, "temperature", np.float32(0.5)),
    (ic.log_probs_from_logits, "temperature", np.float32(0.5)),
    (ic.GradientSketch, "seed", np.int64(1)),
])
def test_numbers_of_numpy_are_numbers(f, argument, value):
    found, plain = (f(**TAKE[f] | {argument: x}) for x in (value, value.item()))
    if f is ic.GradientSketch:
        found, plain = found([torch.ones(30)]), plain([torch.ones(30)])
    if f is ic.fused_policy_loss:
        found, plain = found.loss, plain.loss
    assert torch.equal(found, plain)
    with pytest.raises(InputError):
        f(**TAKE[f] | {argument: True})


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
