"""AReaL's own loss, actor and engine, with a loss of this library in them."""

import functools
import math
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from drawn import Worst, drawn, fixed, gradient_of
from hypothesis import given, strategies as st
from outcome import record, reported
from stubs import real

from iscorrect import (
    Correction,
    InputError,
    Layout,
    PolicyLoss,
    PPOClip,
    ReferenceKL,
    pareto_is,
    token_tis,
    uncorrected,
)
from iscorrect.adapters.areal import from_areal, install, loss_function
from iscorrect.adapters.averages import from_averages
from iscorrect.dumps import DumpWriter, read_dump

actor, cli, fsdp, tracker = real(
    "areal", "areal.trainer.ppo.actor", "areal.api.cli_args", "areal.engine.fsdp_engine",
    "areal.utils.stats_tracker",
)
pytestmark = pytest.mark.filterwarnings("ignore")

CLIP = PPOClip(low=0.8, high=1.28)
FILTERS = [
    (level, action, metric, agg)
    for level in ("token", "sequence") for action in ("mask", "clamp")
    for metric in ("ratio", "kl_k1", "kl_k2", "kl_k3") for agg in ("sum", "mean", "max")
    if (action == "mask" or metric == "ratio") and (level == "sequence" or agg == "mean")
]


def packed(batch):
    """A batch as AReaL's engines hold it: one row of all sequences."""
    return batch._replace(**{
        name: getattr(batch, name).reshape(-1) for name in batch._fields
    }), torch.arange(len(batch.mask) + 1).int() * batch.mask.shape[1]


def data_of(batch, lengths=None):
    data = dict(
        logprobs=batch.rollout_log_probs.float(), prox_logp=batch.old_log_probs.float(),
        advantages=batch.advantages.float(), loss_mask=batch.mask,
    )
    return data if lengths is None else data | {"cu_seqlens": lengths}


@pytest.mark.parametrize("filtered", FILTERS, ids="-".join)
def test_the_loss_and_its_gradient_are_those_of_its_own(filtered):
    worst = Worst()

    @given(drawn(), st.sampled_from([(None, 5.0), (0.5, 2.0)]), st.booleans())
    def agree(batch, band, flat):
        if not batch.mask.any():
            return
        # its statistics are float32; within e^±30 so are ours without saturating
        old = batch.rollout_log_probs + (
            batch.old_log_probs - batch.rollout_log_probs
        ).clamp(-4, 4)
        batch = batch._replace(old_log_probs=old)
        batch, lengths = packed(batch) if flat else (batch, None)
        low, high = band
        own = cli.RejectionSamplingConfig(*filtered, upper=high, lower=low)

        def theirs(x):
            return actor.grpo_loss_fn(
                x, torch.zeros_like(x), data_of(batch, lengths), eps_clip=0.2,
                eps_clip_higher=0.28, c_clip=None, rejection_sampling=own, use_decoupled_loss=True,
            )

        def ours(x):
            fn = loss_function(PolicyLoss(
                correction=from_areal(*filtered, upper=high, lower=low), objective=CLIP
            ))
            return fn(x, torch.zeros_like(x), data_of(batch, lengths), use_decoupled_loss=True)

        with tracker.scope("test"):
            pair = [gradient_of(f, batch.log_probs.float()) for f in (ours, theirs)]
        # a value within rounding of a threshold may fall on either side of it
        if near_threshold(batch, filtered, band):
            return
        assert worst.add(*pair) < 1e-5

    agree()
    tracker.export()
    record(
        "AReaL", f"grpo_loss_fn, {' '.join(filtered)}", distribution="areal", loss=worst.loss,
        gradient=worst.gradient,
    )


def near_threshold(batch, filtered, band):
    """Whether float32 and float64 put the filter's statistic on different sides of a bound."""
    keeps = []
    for dtype in (torch.float32, torch.float64):
        correction = from_areal(*filtered, upper=band[1], lower=band[0])
        part = batch.to(dtype)
        keeps.append(correction(
            old_log_probs=part.old_log_probs, rollout_log_probs=part.rollout_log_probs,
            mask=part.mask,
        ).keep)
    return not torch.equal(*keeps)


@pytest.mark.parametrize(("parts", "fix"), [
    (dict(correction=pareto_is()), "use a fixed bound"),
    (dict(correction=Correction(normalize=True)), "normalize=False"),
    (dict(objective=lambda log_probs, *_: -log_probs), "scope = 'token'"),
    (dict(reference_kl=ReferenceKL(coefficient=0.1)), "set actor.kl_ctl"),
])
def test_what_its_micro_batches_cannot_give_is_refused_at_once(parts, fix):
    own = actor.grpo_loss_fn
    for given_to in (loss_function, install):
        with pytest.raises(InputError, match=fix):
            given_to(PolicyLoss(**parts))
    assert actor.grpo_loss_fn is own


def test_the_defaults_are_its_own():
    own = cli.RejectionSamplingConfig()
    names = ("level", "action", "metric", "agg", "upper", "lower")
    assert from_areal() == from_areal(**{name: getattr(own, name) for name in names})


class Engine:
    """Takes a batch through ``FSDPEngine``'s own function from logits to the loss, and back."""

    def __init__(self):
        self.log_probs = None

    def train(self):
        pass

    def get_version(self):
        return 3

    def train_batch(self, batch, loss_fn, loss_weight_fn):
        me = MagicMock()
        me.config.is_critic = me.enable_tree_training = False
        rows = batch["row"][:, 0]
        part = self.log_probs[rows]
        extremes = (torch.zeros(part.shape), torch.zeros(part.shape))
        me._compute_logprobs_entropy = lambda *_: (part, torch.zeros(part.shape))
        me._get_vocab_min_max_logits = lambda *_: extremes
        context = SimpleNamespace(
            mb_input=batch, model_inputs=None, ulysses_pad_size=0, pad_length=0
        )
        loss = fsdp.FSDPEngine._compute_logprobs_and_loss(
            me, torch.zeros(1), context, loss_fn, loss_weight_fn, torch.tensor(self.total)
        )
        loss.backward()
        return {"loss": loss.item()}


def update(batch, minibatches=2, **changes):
    """Its ``PPOActor._ppo_update``; gradient of the log-probs, and what it exports."""
    settings = dict(
        experiment_name="e", trial_name="t", eps_clip=0.2, eps_clip_higher=0.28,
        ppo_n_minibatches=minibatches, use_decoupled_loss=True, recompute_logprob=True,
        mask_no_eos_with_zero=False, log_agent_stats=False, c_clip=None, m2_threshold=None,
        rejection_sampling=None, importance_sampling_level="token", prox_logp_method="recompute",
        use_sapo_loss=False, sapo_tau_pos=1.0, sapo_tau_neg=1.05,
    )
    engine = Engine()
    engine.log_probs, engine.total = batch.log_probs.clone().requires_grad_(), batch.mask.sum()
    me = SimpleNamespace(
        config=SimpleNamespace(**settings | changes), engine=engine, m2_threshold=None
    )
    rows = len(batch.mask)
    data = data_of(batch) | dict(
        attention_mask=torch.ones_like(batch.mask),
        row=torch.arange(rows)[:, None].expand(batch.mask.shape),
        rewards=torch.ones(rows), tot_rewards=torch.ones(batch.mask.shape),
        kl_rewards=torch.zeros(batch.mask.shape), input_ids=torch.zeros(batch.mask.shape).long(),
    )
    actor.PPOActor._ppo_update(me, data)
    return engine.log_probs.grad, tracker.export()


@pytest.fixture
def installed(monkeypatch):
    def put(policy_loss):
        monkeypatch.setattr(actor, "grpo_loss_fn", actor.grpo_loss_fn)
        install(policy_loss)

    return put


TIS = PolicyLoss(correction=token_tis(cap=1.2), objective=CLIP)


def test_its_actors_update_runs_with_an_installed_loss(installed):
    batch = fixed(rows=6)
    own = cli.RejectionSamplingConfig(action="clamp", upper=1.2)
    expected, _ = update(batch, rejection_sampling=own)
    installed(TIS)
    gradient, exported = update(batch)
    torch.testing.assert_close(gradient, expected)
    whole = TIS(
        batch.log_probs, rollout_log_probs=batch.rollout_log_probs, mask=batch.mask,
        old_log_probs=batch.old_log_probs, advantages=batch.advantages,
    ).metrics.to_floats()
    logged = from_averages(exported, prefix="update/")
    for name in ("mismatch/kl_k3", "is/ess", "is/bounded", "policy/clipped"):
        assert logged[name] == pytest.approx(whole[name], rel=1e-5)
    assert logged["batch/tokens"] == pytest.approx(whole["batch/tokens"] / 2)
    worst = Worst()
    worst.add((0.0, gradient), (0.0, expected))
    record(
        "AReaL", "PPOActor._ppo_update through FSDPEngine's loss with metrics read back",
        distribution="areal", gradient=worst.gradient,
    )


@pytest.mark.parametrize("flat", [False, True])
def test_corrections_see_how_old_each_token_is(flat):
    """A prompt of two tokens and a response that versions 1, 2 and 3 have sampled."""
    versions = torch.tensor([[-1, -1, 1, 2, 3], [-1, -1, 3, 3, 3]])
    mask = torch.tensor([[False, True, True, True, False]] * 2)  # rolled, as AReaL rolls it
    seen = []

    def remember(evidence):
        seen.append(evidence.layout.age[evidence.layout.mask])
        return evidence.layout.mask

    remember.scope = "token"
    zeros = torch.zeros(2, 5)
    data = dict(
        logprobs=zeros, prox_logp=zeros, advantages=zeros, loss_mask=mask, versions=versions
    )
    if flat:
        data = {name: x.flatten() for name, x in data.items()}
        data["cu_seqlens"] = torch.tensor([0, 5, 10])
    loss_fn = loss_function(PolicyLoss(correction=Correction(reject=(remember,))))
    current = data["logprobs"].clone()
    loss_fn(current, current, data, current_version=3)
    tracker.export()
    assert seen[0].tolist() == [2, 1, 0, 0, 0, 0]


def three_versions(batch):
    """Versions 0, 5 and 7 at AReaL's places: one position after the token's log-prob."""
    version = torch.tensor([0, 5, 7])[torch.arange(len(batch.mask)) % 3][:, None]
    version = version.repeat(1, batch.mask.shape[1])
    version[::2, 6:] = 7
    return version


@pytest.mark.parametrize("sizes", [[6], [1, 3, 2], [1] * 6])
def test_its_log_has_the_metrics_of_three_versions_however_the_batch_is_cut(sizes):
    """Averages over micro-batches and ranks, as AReaL logs them, against all tokens at once."""
    batch, loss_fn = fixed(4, rows=6), PolicyLoss(correction=token_tis(cap=1.1))
    versions = three_versions(batch)
    corrected = loss_function(loss_fn)
    parts = [data_of(batch) | {"versions": versions.roll(1, -1)}]
    parts = [
        {name: x.split(sizes)[i] for name, x in parts[0].items()} for i in range(len(sizes))
    ]
    for x, part in zip(batch.log_probs.split(sizes), parts, strict=True):
        corrected(x.float(), torch.zeros_like(x), part, current_version=7)
    found = from_averages(tracker.export())
    whole = loss_fn(
        batch.log_probs.float(), old_log_probs=batch.old_log_probs.float(),
        rollout_log_probs=batch.rollout_log_probs.float(), advantages=batch.advantages.float(),
        mask=Layout(batch.mask, age=7 - versions),
    ).metrics.to_floats()
    ages = {n: x for n, x in whole.items() if n.startswith("age/") and not math.isnan(x)}
    assert sum(x > 0 for name, x in ages.items() if name.endswith("/tokens")) == 3
    for name, value in ages.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_the_versions_of_tokens_are_in_its_dump(tmp_path):
    batch = fixed(4, rows=6)
    data = data_of(batch) | {"versions": three_versions(batch).roll(1, -1)}
    dumps = DumpWriter(tmp_path / "dump")
    zeros = torch.zeros_like(batch.log_probs)
    loss_function(TIS, dumps)(batch.log_probs, zeros, data, current_version=7)
    tracker.export()
    dump = read_dump(dumps.directory)
    assert set(dump.step.tolist()) == {7}
    expected = [v[m].tolist() for v, m in zip(three_versions(batch), batch.mask, strict=True)]
    found = [v[m].tolist() for v, m in zip(dump.version, dump.mask, strict=True)]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("flat", [False, True])
def test_its_losses_leave_a_dump_to_report(tmp_path, flat):
    whole = fixed(rows=4)
    batch, lengths = packed(whole) if flat else (whole, None)
    dumps = DumpWriter(tmp_path / "dump")
    zeros = torch.zeros_like(batch.log_probs)
    loss_function(TIS, dumps)(batch.log_probs, zeros, data_of(batch, lengths))
    tracker.export()
    reported(dumps.directory, whole)
    assert len(read_dump(dumps.directory).mask) == 4


def test_a_micro_batch_without_a_counted_token_changes_nothing():
    batch = fixed(rows=2)._replace(mask=torch.zeros(2, 13, dtype=torch.bool))
    loss, gradient = gradient_of(
        lambda x: loss_function(TIS)(x, torch.zeros_like(x), data_of(batch)), batch.log_probs
    )
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize(("changes", "setting"), [
    (dict(use_decoupled_loss=False), "actor.use_decoupled_loss=true"),
    (dict(rejection_sampling=cli.RejectionSamplingConfig()), "actor.rejection_sampling"),
    (dict(importance_sampling_level="sequence"), "actor.importance_sampling_level"),
    (dict(use_sapo_loss=True), "actor.use_sapo_loss"),
    (dict(c_clip=3.0), "actor.c_clip"),
    (dict(prox_logp_method="loglinear"), "actor.prox_logp_method=recompute"),
])
def test_settings_that_make_weights_1_or_would_be_ignored_stop_its_actor(
    installed, changes, setting
):
    installed(TIS)
    with pytest.raises(InputError, match=setting):
        update(fixed(rows=2), **changes)
    tracker.export()


def test_its_default_overwrites_the_log_probs_which_only_uncorrected_losses_may_be_given(installed):
    """Without ``use_decoupled_loss`` its advantages put one log-prob in the place of the other."""
    batch = fixed(rows=2)
    config = SimpleNamespace(
        overlong_reward_penalty=False, use_decoupled_loss=False, recompute_logprob=True
    )
    me = MagicMock()
    me.config, me.reward_bias, me.reward_scaling, me.reward_clip = config, 0.0, 1.0, 20.0
    me.reward_norm = me.adv_norm = None
    me.kl_ctl, me.discount, me.gae_lambda, me.mask_no_eos_with_zero = 0.0, 1.0, 1.0, False
    me.kl_estimator = lambda a, b: a - b
    data = data_of(batch) | dict(
        input_ids=torch.zeros(batch.mask.shape).long(), rewards=torch.ones(2),
        attention_mask=torch.ones_like(batch.mask),
    )
    scored = actor.PPOActor._compute_advantages(me, data)
    assert scored["prox_logp"] is scored["logprobs"]
    installed(PolicyLoss(correction=uncorrected(), objective=CLIP))
    update(batch, use_decoupled_loss=False)
    tracker.export()


def test_areal_weights_micro_batches_by_their_tokens():
    with pytest.raises(InputError, match="AReaL weights micro-batches"):
        loss_function(PolicyLoss(aggregation="seq-mean-token-mean"))


def test_the_expression_of_its_actor_takes_a_loss_function():
    bound = functools.partial(loss_function(TIS), eps_clip=0.2, current_version=3)
    batch = fixed(rows=2)
    assert bound(batch.log_probs, torch.zeros_like(batch.log_probs), data_of(batch)).isfinite()
