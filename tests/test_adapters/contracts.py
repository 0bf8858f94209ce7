"""What an adapter owes a trainer that is on no package index, said once for fake and checkout."""

import argparse
import dataclasses
import datetime
import json
import re
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from drawn import Worst, fixed, gradient_of
from outcome import largest

from iscorrect import (
    InputError,
    PolicyLoss,
    PPOClip,
    ReferenceKL,
    sequence_mis,
    token_tis,
    uncorrected,
)
from iscorrect.adapters.slime import tis_function

TIMEOUT = datetime.timedelta(seconds=20)
CUTS = {
    # rank 0 holds all four tokens of the response, rank 1 none
    "response of 4 after 36": ([40], [4]),
    "mixed": ([12, 21, 30], [9, 14, 25]),
}


def samples(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    old = [-torch.rand(n, generator=draw) * 2 for n in lengths]
    rollout = [x + 0.5 * torch.randn(len(x), generator=draw) for x in old]
    masks = [(torch.rand(n, generator=draw) > 0.2).int() for n in lengths]
    pg_loss = [torch.randn(n, generator=draw) for n in lengths]
    for rows in (rollout, pg_loss):
        for x, mask in zip(rows, masks, strict=True):
            x[mask == 0] = torch.nan  # what nobody sampled
    return old, rollout, masks, pg_loss


def slime_args(**changes):
    given = dict(
        use_tis=True, get_mismatch_metrics=False, use_rollout_logprobs=False, rollout_top_p=1.0,
        rollout_top_k=-1, qkv_format="thd",
    )
    return argparse.Namespace(**given | changes)


def slime_call(world, correction, lengths, totals, args=None, **changes):
    """The hook as slime calls it, with this rank's share of every list but the masks."""
    old, rollout, masks, pg_loss = samples(lengths)

    def share(rows):
        pairs = zip(rows, totals, lengths, strict=True)
        return [world.helpers.slice_log_prob_with_cp(x, *n) for x, *n in pairs]

    arguments = dict(
        pg_loss=torch.cat(share(pg_loss)), train_log_probs=share(old),
        rollout_log_probs=share(rollout), loss_masks=masks, total_lengths=totals,
        response_lengths=lengths, **world.more,
    )
    return share, tis_function(correction)(args or slime_args(), **arguments | changes)


def _rank(rank, load, path, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=TIMEOUT
    )
    world = load(path, rank=rank, size=2)
    found = [_apart(world, totals, lengths) for totals, lengths in CUTS.values()]
    Path(folder, str(rank)).write_text(json.dumps(found))
    dist.destroy_process_group()


def _apart(world, totals, lengths):
    share, (loss, _, metrics) = slime_call(world, sequence_mis(high=3.0), lengths, totals)
    expected = []
    for a, b, mask, x in zip(*samples(lengths), strict=True):
        ratio = torch.exp((a - b)[mask == 1].sum())
        expected.append(torch.where(mask == 1, x * ratio * (ratio <= 3.0), 0))
    assert not loss.requires_grad
    assert all(x.shape == loss.shape and x.isfinite().all() for x in metrics.values())
    return largest(loss, torch.cat([loss.new_zeros(0), *share(expected)]))


def slime_context_parallel(load, path=None):
    """Two ranks give the single process's number and none waits; the largest difference of each."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (load, path, folder), nprocs=2)
        ranks = [json.loads(Path(folder, str(rank)).read_text()) for rank in (0, 1)]
    worst = dict(zip(CUTS, map(max, zip(*ranks, strict=True)), strict=True))
    assert max(worst.values()) < 1e-6, worst
    return worst


def slime_switches(world):
    """What the hook makes of slime's settings, and of lists that do not fit."""
    totals, lengths = [12, 21], [9, 14]
    _, rollout, _, pg_loss = samples(lengths)
    _, (loss, masks, metrics) = slime_call(world, token_tis(cap=1.2), lengths, totals)
    counted = torch.cat(masks) == 1
    assert not torch.equal(loss[counted], torch.cat(pg_loss)[counted])
    assert all(x.isfinite().all() for x in metrics.values())

    only_metrics = slime_args(use_tis=False, get_mismatch_metrics=True)
    for engines in (False, True):  # π/μ as the loss's own ratio: its weight would count twice
        only_metrics.use_rollout_logprobs = engines
        _, (loss, _, same) = slime_call(
            world, token_tis(cap=1.2), lengths, totals, only_metrics
        )
        assert torch.equal(loss[counted], torch.cat(pg_loss)[counted])
        assert same.keys() == metrics.keys()

    short = [rollout[0], rollout[1][:-1]]
    refused = {
        r"`rollout_log_probs\[1\]` must be 14 tokens long": dict(rollout_log_probs=short),
        "drop --use-rollout-logprobs": dict(train_log_probs=None),
        "return log-probs with its samples": dict(rollout_log_probs=None),
    }
    twice = slime_args(use_rollout_logprobs=True)
    for message, changes in refused.items():
        _refused(message, lambda c=changes: slime_call(world, uncorrected(), lengths, totals, **c))
    _refused(
        "--use-rollout-logprobs", lambda: slime_call(world, uncorrected(), lengths, totals, twice)
    )

    nothing = torch.zeros(0, requires_grad=True)
    lists = ("train_log_probs", "rollout_log_probs", "loss_masks", "total_lengths")
    empty = {name: [] for name in (*lists, "response_lengths")} | {"pg_loss": nothing}
    _, (loss, _, metrics) = slime_call(world, token_tis(), [9], [12], **empty)
    assert loss.shape == (0,)
    assert loss.requires_grad
    assert all(x.shape == (0,) for x in metrics.values())


def _refused(message, call):
    try:
        call()
    except InputError as error:
        assert re.search(message, str(error)), str(error)
    else:
        raise AssertionError(f"not refused: {message}")


def prime_rl(world):
    """Gradients of the formula, metrics of all tokens, whatever the samples; the largest apart."""
    worst = Worst()
    for seed in range(5):
        batch = fixed(seed, dtype=torch.float32)
        for weighted in (False, True):
            masks, advantages = list(batch.mask), list(batch.advantages)
            rollout = list(batch.rollout_log_probs)
            weights = None
            if weighted:
                weights = [torch.rand(len(x)) * (i != 1) for i, x in enumerate(rollout)]
            count = max(int(batch.mask.sum()), 1)

            def loss_of(x, masks=masks, rollout=rollout, advantages=advantages, weights=weights,
                        count=count):
                loss_fn = world.custom({"correction": "token-tis:cap=2"})
                loss, loss_of.metrics = world.compute_loss(
                    list(x), rollout, advantages, masks, weights, loss_fn, count
                )
                return loss

            loss, gradient = gradient_of(loss_of, batch.log_probs)
            ratio = (batch.log_probs - batch.rollout_log_probs).exp().clamp(max=2.0)
            scale = 1 if weights is None else torch.stack(weights)
            a = torch.where(batch.mask, ratio * batch.advantages * scale / count, 0)
            assert worst.add((loss, gradient), (-(a * batch.log_probs).sum(), -a)) < 1e-6
            counted = batch.mask if weights is None else batch.mask & (torch.stack(weights) != 0)
            metrics = loss_of.metrics
            assert all(x.shape == (counted.sum(),) for x in metrics.values())
            torch.testing.assert_close(metrics["is/weight"].sum(), ratio[counted].sum())
    nothing = [torch.zeros(3, dtype=torch.bool)]
    zeros = [torch.zeros(3)]
    loss, _ = world.compute_loss(
        [torch.zeros(3, requires_grad=True)], zeros, zeros, nothing, None,
        world.custom({"correction": "uncorrected"}), 1,
    )
    assert loss == 0
    assert loss.requires_grad
    return worst


def nemo_data(batch):
    def shifted(x):  # the first position predicts nothing
        return torch.nn.functional.pad(x, (1, 0), value=9.0)

    sample_mask = torch.ones(len(batch.mask))
    sample_mask[2] = 0
    return dict(
        input_ids=torch.zeros(len(batch.mask), batch.mask.shape[1] + 1).long(),
        advantages=shifted(batch.advantages), prev_logprobs=shifted(batch.old_log_probs),
        generation_logprobs=shifted(batch.rollout_log_probs),
        reference_policy_logprobs=shifted(batch.ref_log_probs),
        token_mask=torch.nn.functional.pad(batch.mask.float(), (1, 0)), sample_mask=sample_mask,
    )


def nemo_rl(world):
    """Micro-batches add up, and the step finds every metric that it reads; the largest apart."""
    from iscorrect.adapters.nemo_rl import CorrectedLoss

    kinds, worst = world.interfaces, Worst()
    for how in ("token-mean", "seq-mean-token-mean"):
        batch = fixed(1, rows=6)
        data = nemo_data(batch)
        loss_fn = CorrectedLoss(PolicyLoss(
            correction=token_tis(cap=1.2), objective=PPOClip(), aggregation=how
        ))
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        counts = ((data["sample_mask"] * mask.any(-1)).sum(), mask.sum())
        whole, gradient = gradient_of(
            lambda x, f=loss_fn, d=data, c=counts: f(d, *c, next_token_logprobs=x)[0],
            batch.log_probs,
        )
        total, logged, split = 0.0, {}, {}
        for i in range(6):
            part = {name: x[i : i + 1] for name, x in data.items()}
            row = batch.log_probs[i : i + 1]
            loss, metrics = loss_fn(part, *counts, next_token_logprobs=row)
            total += loss
            one = torch.tensor(1.0)
            raw = loss_fn(part, one, one, next_token_logprobs=row)[1]
            for name in metrics:
                logged[name] = logged.get(name, 0.0) + metrics[name]
                split[name] = split.get(name, 0.0) + raw[name]
        torch.testing.assert_close(total, whole)
        # what grpo.py and grpo_sync.py read, and the worker
        d = (batch.old_log_probs - batch.rollout_log_probs)[mask.bool()]
        expected = {
            "token_mult_prob_error": d.abs().exp().mean(), "gen_kl_error": (d.expm1() - d).mean(),
            "num_valid_samples": data["sample_mask"].sum(), "loss": whole,
        }
        for name, value in expected.items():
            torch.testing.assert_close(torch.tensor(logged[name]), value, rtol=1e-4, atol=1e-6)
        # the split API collects with counts of 1 and divides afterwards
        normalizers = kinds.MetricNormalizer
        by = {
            normalizers.TOKENS: counts[1], normalizers.SEQUENCES: counts[0], normalizers.NONE: 1.0
        }
        for name, value in split.items():
            kind = loss_fn.metric_normalizations[name]
            assert abs(value / float(by[kind]) - logged[name]) < 1e-5, name
        assert loss_fn.use_fused_linear_logprobs is False
        if world.own is not None:
            own = world.own(
                token_level_loss=how == "token-mean", use_importance_sampling_correction=True,
                truncated_importance_sampling_type="tis", truncated_importance_sampling_ratio=1.2,
            )
            theirs = gradient_of(
                lambda x, f=own, d=data, c=counts: f(x, d, *c)[0], batch.log_probs
            )
            assert worst.add((whole, gradient), theirs) < 1e-5
            their_metrics = own(batch.log_probs, data, *counts)[1]
            for name in ("token_mult_prob_error", "gen_kl_error", "num_valid_samples", "loss"):
                assert abs(their_metrics[name] - logged[name]) < 1e-5, name
        penalised = CorrectedLoss(dataclasses.replace(
            loss_fn.policy_loss, reference_kl=ReferenceKL(coefficient=0.1)
        ))
        parts = [{name: x[i : i + 1] for name, x in data.items()} for i in range(6)]
        share = sum(
            penalised(part, *counts, next_token_logprobs=x)[0]
            for part, x in zip(parts, batch.log_probs.split(1), strict=True)
        )
        all_of_it, _ = penalised(data, *counts, next_token_logprobs=batch.log_probs)
        torch.testing.assert_close(share, all_of_it)
        assert all_of_it > whole
        _refuses_unscored_references(penalised, data, counts, batch.log_probs)
        unscored = data | {"prev_logprobs": 0 * data["prev_logprobs"]}
        _refused("loss_fn.force_on_policy_ratio=false", lambda d=unscored, f=loss_fn: f(
            d, *counts, next_token_logprobs=batch.log_probs  # noqa: B023
        ))
        empty = data | {"sample_mask": torch.zeros(6)}
        zero = torch.tensor(0.0)
        loss, metrics = loss_fn(empty, zero, zero, next_token_logprobs=batch.log_probs)
        assert loss == 0
        assert metrics["gen_kl_error"] == 0
    CorrectedLoss(PolicyLoss(), use_fused_linear_logprobs=True)
    return worst


def _refuses_unscored_references(loss_fn, data, counts, log_probs):
    name = "reference_policy_logprobs"
    without = {key: x for key, x in data.items() if key != name}
    for unscored in (without, without | {name: 0 * data[name]}):
        _refused(
            "reference_policy_kl_penalty above 0",
            lambda d=unscored: loss_fn(d, *counts, next_token_logprobs=log_probs),
        )
