"""The contracts on fakes of the trainers that are on no package index."""

import contracts
import fakes
import pytest
import torch
from outcome import record

from iscorrect import InputError, PolicyLoss, pareto_is
from iscorrect.adapters.prime_rl import loss as prime_rl_loss
from iscorrect.dumps import read_dump

pytestmark = pytest.mark.usefixtures("modules")


def load_slime(path, **ranks):
    return fakes.slime(**ranks)


def load_miles(path, **ranks):
    return fakes.miles(**ranks)


LOADERS = {"slime": load_slime, "miles": load_miles}


def contract_of(framework, what, **numbers):
    version = f"contract of {fakes.COMMITS[framework]}"
    record(framework, what, version=version, **numbers)


@pytest.mark.slow
@pytest.mark.parametrize("framework", LOADERS)
def test_context_parallel_ranks_give_the_number_of_one_process(framework):
    for case, apart in contracts.slime_context_parallel(LOADERS[framework]).items():
        contract_of(framework, f"context parallel 2, {case}", loss=apart)


@pytest.mark.parametrize("framework", LOADERS)
def test_settings_decide_what_is_applied_and_odd_lists_are_refused(framework):
    contracts.slime_switches(LOADERS[framework](None))
    contract_of(framework, "settings and ragged or empty lists")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_dump_of_miles_is_read_where_it_holds_whole_sequences(tmp_path, ranks):
    """miles/utils/train_dump_utils.py: a file for each rank, with the rank's shares."""
    totals, lengths = contracts.CUTS["mixed"]
    old, rollout, masks, _ = contracts.samples(lengths)
    for rank in range(ranks):
        world = fakes.miles(rank, ranks)

        def share(rows, world=world):
            where = zip(rows, totals, lengths, strict=True)
            return [world.helpers.slice_log_prob_with_cp(x.nan_to_num(), *n) for x, *n in where]

        columns = dict(
            log_probs=share(old), rollout_log_probs=share(rollout), loss_masks=masks,
            response_lengths=lengths, total_lengths=totals,
        )
        torch.save({
            "rollout_id": 0, "rank": rank, "rollout_data": columns, "cp_rank": rank,
            "cp_size": ranks, "qkv_format": "thd",
        }, tmp_path / f"0_{rank}.pt")
    if ranks == 1:
        assert read_dump(tmp_path).mask.sum() == sum(int(mask.sum()) for mask in masks)
        contract_of("miles", "dump of whole sequences read back")
    else:
        with pytest.raises(InputError, match="--context-parallel-size 1"):
            read_dump(tmp_path)


def test_slime_is_warned_when_its_engine_samples_from_a_cut_distribution():
    args = contracts.slime_args(rollout_top_p=0.9)
    with pytest.warns(UserWarning, match=r"top_p=0\.9"):
        contracts.slime_call(fakes.slime(), contracts.token_tis(), [3], [5], args)


def test_prime_rl_gets_sums_over_samples_and_values_of_tokens():
    worst = contracts.prime_rl(fakes.prime_rl())
    contract_of("prime-rl", "custom loss", loss=worst.loss, gradient=worst.gradient)


def test_prime_rl_refuses_what_needs_more_than_a_sample():
    fakes.prime_rl()
    with pytest.raises(InputError, match="one sample at a time"):
        prime_rl_loss(None, correction="pareto-is:level=token")


CAP = 1.3


def replayed(logits, sampler, tokens, advantages, extra=0):
    """What a prime-rl that replays kept ids passes, for one sampled token in each of its rows.

    With ``extra`` unused places, and a last row that is not replayed.
    """
    log_probs = logits.log_softmax(-1)
    pad = torch.nn.functional.pad
    return fakes.ReplayedInputs(
        pad(log_probs.gather(-1, tokens[:, None])[:, 0], (0, 1)),
        pad(sampler.gather(-1, tokens[:, None])[:, 0], (0, 1), value=-0.3), None,
        pad(advantages, (0, 1), value=2.0), torch.tensor([True] * len(tokens) + [False]), None,
        pad(log_probs, (0, extra, 0, 1)), pad(sampler, (0, extra, 0, 1), value=-torch.inf),
    )


@pytest.mark.parametrize("extra", [0, 2])
def test_prime_rls_centered_gradient_is_a_covariance(extra):
    """By enumeration of every token that the engine may sample, its kept ids as the vocabulary."""
    fakes.prime_rl()
    draw = torch.Generator().manual_seed(extra)
    rows, kept = 4, 5
    logits = torch.randn(rows, kept, generator=draw, dtype=torch.float64).requires_grad_()
    sampler = torch.randn(rows, kept, generator=draw, dtype=torch.float64).log_softmax(-1)
    rewards = torch.randn(kept, generator=draw, dtype=torch.float64)

    def mean_gradient(advantages, **settings):
        total = torch.zeros_like(logits)
        for v in range(kept):
            tokens = torch.full((rows,), v)
            inputs = replayed(logits, sampler, tokens, advantages[v].expand(rows), extra)
            out = prime_rl_loss(inputs, correction=f"token-tis:cap={CAP}", **settings)
            (gradient,) = torch.autograd.grad(out.loss, logits)
            total += sampler[:, v, None].exp() * gradient
        return total

    ones = torch.ones(kept, dtype=torch.float64)
    assert mean_gradient(ones).abs().max() > 0.01
    assert mean_gradient(ones, score_centering=True).abs().max() < 1e-9
    # −Cov_q(A, w ∇log p), of logits: ∇log p_v = e_v − p
    p, q = logits.detach().softmax(-1), sampler.exp()
    w = (p / q).clamp(max=CAP)
    scores = torch.eye(kept, dtype=torch.float64) - p[:, None]
    spread = rewards - (q * rewards).sum(-1, keepdim=True)
    expected = -torch.einsum("bv,bv,bvu->bu", q * spread, w, scores)
    torch.testing.assert_close(
        mean_gradient(rewards, score_centering=True), expected, rtol=1e-6, atol=1e-9
    )


def test_prime_rls_log_says_which_tokens_were_centered():
    fakes.prime_rl()
    logits = torch.zeros(3, 4, requires_grad=True)
    sampler, tokens = torch.zeros(3, 4).log_softmax(-1), torch.zeros(3).long()
    inputs = replayed(logits, sampler, tokens, torch.ones(3))
    out = prime_rl_loss(inputs, score_centering=True)
    assert out.metrics["is/centered"].tolist() == [1.0] * 3
    inputs.trainer_mask_logprobs = inputs.inference_mask_logprobs = None
    out = prime_rl_loss(inputs, score_centering=True)
    assert out.metrics["is/centered"].tolist() == [0.0] * 3
    assert out.loss == prime_rl_loss(inputs).loss


@pytest.mark.parametrize(("correction", "kind", "message"), [
    ("icepop", fakes.ReplayedInputs, "fixed cap"),
    ("token-tis:cap=ionides", fakes.ReplayedInputs, "fixed cap|one sample"),
    ("token-tis", fakes.LossInputs, "trainer_mask_logprobs"),
])
def test_prime_rl_centers_what_it_can_and_refuses_the_rest(correction, kind, message):
    fakes.prime_rl()
    x = torch.zeros(3)
    with pytest.raises(InputError, match=message):
        prime_rl_loss(
            kind(x, x, None, x, x == 0), correction=correction, score_centering=True
        )


def test_nemo_rls_micro_batches_add_up_and_its_step_finds_its_metrics():
    contracts.nemo_rl(fakes.nemo_rl())
    contract_of("NeMo-RL", "LossFunction with the metrics that its step reads and its split API")


def test_nemo_rl_refuses_losses_whose_micro_batches_do_not_add_up():
    fakes.nemo_rl()
    from iscorrect.adapters.nemo_rl import CorrectedLoss

    with pytest.raises(InputError, match="micro-batches add up"):
        CorrectedLoss(PolicyLoss(aggregation="sum"))
    with pytest.raises(InputError, match="a batch of which a micro-batch is shown"):
        CorrectedLoss(PolicyLoss(correction=pareto_is()))
