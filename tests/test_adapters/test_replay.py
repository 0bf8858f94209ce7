"""An engine that cuts its distribution, and a trainer that replays what was kept."""

import pytest
import torch
from drawn import Worst
from hypothesis import given, strategies as st
from outcome import record

from iscorrect import InputError, log_probs_from_logits, token_tis
from iscorrect.adapters.replay import support_of

VOCABULARY, TOP_P, TOP_K = 12, 0.8, 6
LENGTHS = [3, 1, 5]


def rollout(seed):
    """Logits of each sample, sampled tokens, their log-probs, and the ids that were kept."""
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for length in LENGTHS:
        logits = 2 * torch.randn(length, VOCABULARY, generator=draw, dtype=torch.float64)
        kept, tokens, log_probs = [], [], []
        for p in logits.softmax(-1):
            order = p.argsort(descending=True)
            count = min(int((p[order].cumsum(0) < TOP_P).sum()) + 1, TOP_K)
            kept.append(order[:count])
            inside = p[kept[-1]] / p[kept[-1]].sum()
            place = torch.multinomial(inside, 1, generator=draw).item()
            tokens.append(kept[-1][place])
            log_probs.append(inside[place].log())
        samples.append((logits, torch.stack(tokens), torch.stack(log_probs), kept))
    return samples


def slime(samples):
    """``rollout_top_p_token_ids`` and ``rollout_top_p_token_offsets``, int32 of each sample."""
    ids = [torch.cat(kept).int() for *_, kept in samples]
    ends = [torch.tensor([0, *map(len, kept)]).cumsum(0).int() for *_, kept in samples]
    return ids, ends


def padded(samples):
    """SkyRL's ``rollout_sample_support`` and prime-rl's ``sampling_mask``: −1 where unused."""
    return [torch.stack([
        torch.nn.functional.pad(ids, (0, TOP_K - len(ids)), value=-1) for ids in kept
    ]).int() for *_, kept in samples]


FORMS = {
    "slime": lambda samples: support_of(*slime(samples)),
    "SkyRL and prime-rl": lambda samples: support_of(padded(samples)),
    "padded as it is": lambda samples: torch.cat(padded(samples)).long(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(5))
def test_with_the_kept_ids_the_trainer_is_the_engine(form, seed):
    samples = rollout(seed)
    logits, tokens, engine = (torch.cat([s[i] for s in samples]) for i in range(3))
    trainer = log_probs_from_logits(logits, tokens, support=FORMS[form](samples))
    torch.testing.assert_close(trainer, engine, rtol=0, atol=1e-12)
    mask = torch.ones(1, len(tokens), dtype=torch.bool)
    weights = token_tis()(
        old_log_probs=trainer[None], rollout_log_probs=engine[None], mask=mask
    ).weights
    torch.testing.assert_close(weights, torch.ones_like(weights))
    # over the whole vocabulary every ratio is off by the mass that was cut
    whole = log_probs_from_logits(logits, tokens)
    assert ((whole - engine) < -1e-3).any()


def test_what_is_neither_form_is_refused():
    ids, ends = slime(rollout(0))
    for arguments, message in {
        (tuple(ids),): r"`kept\[0\]` must be int `t k`",
        (tuple(ids), tuple(ends[:-1])): "3 tensors like `kept`",
        (tuple(ids), tuple(x[:-1] for x in ends)): r"`kept\[0\]` must be int `m`",
        (tuple(ids), tuple(x[1:] for x in ends)): "begin at 0 and end at m",
    }.items():
        with pytest.raises(InputError, match=message):
            support_of(*arguments)
    assert support_of([]).offsets.tolist() == [0]


def test_the_log_probs_are_those_of_skyrl():
    """``sample_support_scores`` of SkyRL 0.4, which is on the index for Python 3.12."""
    from stubs import real

    real("skyrl", "skyrl")
    replay = pytest.importorskip("skyrl.backends.skyrl_train.utils.sample_support_replay")
    worst = Worst()

    @given(st.integers(0, 2**32), st.sampled_from([torch.float32, torch.float64]))
    def agree(seed, dtype):
        samples = rollout(seed)
        tokens, kept = torch.cat([s[1] for s in samples]), torch.cat(padded(samples))
        logits = torch.cat([s[0] for s in samples]).to(dtype).requires_grad_()
        theirs = replay.sample_support_scores(
            logits, tokens, kept, vocab_start_index=0, vocab_end_index=VOCABULARY, tp_group=None
        ).logprobs
        ours = log_probs_from_logits(logits, tokens, support=support_of(padded(samples)))
        pair = [(x.detach(), torch.autograd.grad(x.sum(), logits)[0]) for x in (ours, theirs)]
        assert worst.add(*pair) < 1e-6

    agree()
    record(
        "SkyRL", "sample_support_scores of kept ids", distribution="skyrl", loss=worst.loss,
        gradient=worst.gradient,
    )
