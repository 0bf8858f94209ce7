"""Losses of five families in plain torch, the mistakes that people make in them, and the checks.

`python tests/mistakes.py` writes the table of docs/test-your-loss.md: which check finds what.
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings

import iscorrect
from iscorrect import CISPO, Layout, PolicyLoss, PPOClip, global_normalizer
from iscorrect.testing import checks

PAGE = Path(__file__).parents[1] / "docs" / "test-your-loss.md"
BEGIN, END = "<!-- planted -->", "<!-- /planted -->"
settings.register_profile(
    "planted", max_examples=60, derandomize=True, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def policy_loss(
    log_probs, *, rollout_log_probs, advantages, mask, weight, objective, total,
    old_log_probs=None, normalizer=None,
):
    """What all losses below have in common; the rest is in their parts."""
    layout = mask if isinstance(mask, Layout) else Layout(mask)
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    new, old, rollout = (
        torch.where(layout.mask, x, 0) for x in (log_probs, old, rollout_log_probs)
    )
    per_token = objective(new, old, rollout, advantages, weight(old - rollout, layout))
    return total(per_token, layout, normalizer)


def ratio(d):
    return d.clamp(max=60).exp()


# Weights, from d = log π_old − log μ.


def truncated(d, layout):
    return ratio(d).clamp(max=2)


def upside_down(d, layout):
    return ratio(-d).clamp(max=2)


def larger_of_the_two(d, layout):
    return ratio(d).clamp(min=2)


def cap_on_the_logarithm(d, layout):
    return d.clamp(max=2).exp()


def cap_on_the_inverse(d, layout):
    return 1 / ratio(-d).clamp(max=2)


def clipped_on_both_sides(d, layout):
    return ratio(d).clamp(0.5, 2)


def masked_beyond_the_cap(d, layout):
    return torch.where(ratio(d) <= 2, ratio(d), 0)


def over_its_mean(d, layout):
    w = truncated(d, layout)
    return w / layout.mean(w)


def without_bound(d, layout):
    return d.exp()


def product(d, layout):
    return ratio(layout.sequence_total(d))


def capped_product(d, layout):
    return product(d, layout).clamp(max=2)


def masked_product(d, layout):
    w = product(d, layout)
    return torch.where(w <= 3, w, 0)


def product_twice(d, layout):
    return ratio(layout.sequence_total(2 * d))


def mean_of_logs(d, layout):
    return layout.sequence_mean(d).exp()


def capped_mean_of_logs(d, layout):
    return mean_of_logs(d, layout).clamp(max=2)


def sum_of_ratios(d, layout):
    return layout.sequence_total(ratio(d)).clamp(max=2)


def product_of_capped_ratios(d, layout):
    return ratio(layout.sequence_total(ratio(d).clamp(min=1e-30, max=2).log()))


def product_of_the_prefix(d, layout):
    return ratio(layout.prefix_total(d)).clamp(max=2)


def product_of_the_row(d, layout):
    return ratio(d.sum(-1, keepdim=True)).clamp(max=2).expand(d.shape)


def tokens_masked_for_sequences(d, layout):
    return torch.where(ratio(d) <= 3, product(d, layout), 0)


def kept_by_the_geometric_mean(d, layout):
    return torch.where(mean_of_logs(d, layout) <= 3, product(d, layout), 0)


# Objectives.


def reinforce(new, old, rollout, a, w):
    return -w * a * new


def ascent_for_descent(new, old, rollout, a, w):
    return w * a * new


def size_of_the_advantage(new, old, rollout, a, w):
    return -w * a.abs() * new


def clamped_advantage(new, old, rollout, a, w):
    return -w * a.clamp(-1, 1) * new


def differentiated_truncation(new, old, rollout, a, w):
    return -ratio(new - rollout).clamp(max=2) * a


def differentiated_product(new, old, rollout, a, w):
    return -product(new - rollout, Layout(torch.ones_like(new).bool())) * a * new


def ppo(new, old, rollout, a, w):
    r = ratio(new - old)
    return -w * torch.minimum(r * a, r.clamp(0.8, 1.2) * a)


def ppo_against_itself(new, old, rollout, a, w):
    return ppo(new, new.detach(), rollout, a, w)


def larger_surrogate(new, old, rollout, a, w):
    r = ratio(new - old)
    return -w * torch.maximum(r * a, r.clamp(0.8, 1.2) * a)


def clip_without_minimum(new, old, rollout, a, w):
    return -w * ratio(new - old).clamp(0.8, 1.2) * a


def minimum_without_the_sign(new, old, rollout, a, w):
    r = ratio(new - old)
    return -w * torch.minimum(r, r.clamp(0.8, 1.2)) * a


def clip_on_the_logarithm(new, old, rollout, a, w):
    d = new - old
    return -w * torch.minimum(ratio(d) * a, d.clamp(-0.2, 0.2).exp() * a)


def clip_of_ratio_times_weight(new, old, rollout, a, w):
    r = ratio(new - old) * w
    return -torch.minimum(r * a, r.clamp(0.8, 1.2) * a)


def ratio_to_the_engine(new, old, rollout, a, w):
    return ppo(new, rollout, rollout, a, w)


def weight_of_the_new_policy(new, old, rollout, a, w):
    return ppo(new, old, rollout, a, ratio(new.detach() - rollout).clamp(max=2))


def weight_with_gradient(new, old, rollout, a, w):
    return ppo(new, old, rollout, a, ratio(new - rollout).clamp(max=2))


def old_and_rollout_swapped(new, old, rollout, a, w):
    return ppo(new, rollout, old, a, ratio(rollout - old).clamp(max=2))


def cispo(new, old, rollout, a, w):
    return -w * ratio(new - old).detach().clamp(max=5) * a * new


def cispo_with_gradient(new, old, rollout, a, w):
    return -w * ratio(new - old).clamp(max=5) * a * new


# From "b t" to a scalar.


def token_mean(x, layout, normalizer):
    total = torch.where(layout.mask, x, 0).sum()
    return total / (layout.count().clamp(min=1) if normalizer is None else normalizer)


def sequence_mean(x, layout, normalizer):
    total = torch.where(layout.mask, x, 0).sum()
    return total / (layout.num_sequences().clamp(min=1) if normalizer is None else normalizer)


def padded_width(x, layout, normalizer):
    return torch.where(layout.mask, x, 0).mean()


def tokens_kept(x, layout, normalizer):
    return torch.where(layout.mask, x, 0).sum() / (layout.mask & (x != 0)).sum().clamp(min=1)


def tokens_of_the_part(x, layout, normalizer):
    return token_mean(x, layout, None)


def mean_of_means(x, layout, normalizer):
    return sequence_mean(x / layout.sequence_count(x.dtype).clamp(min=1), layout, normalizer)


def means_times_the_width(x, layout, normalizer):
    return x.shape[-1] * mean_of_means(x, layout, normalizer)


def mean_of_columns(x, layout, normalizer):
    count = layout.mask.sum(0).clamp(min=1)
    return (torch.where(layout.mask, x, 0).sum(0) / count).mean()


def mask_forgotten(x, layout, normalizer):
    return x.sum() / (layout.count().clamp(min=1) if normalizer is None else normalizer)


# Mistakes before the loss.


def shifted_by_one(loss_fn):
    def shifted(log_probs, *, rollout_log_probs, **others):
        return loss_fn(log_probs, rollout_log_probs=rollout_log_probs.roll(1, -1), **others)

    return shifted


def in_bfloat16(loss_fn):
    def narrowed(log_probs, *, rollout_log_probs, **others):
        d = (log_probs.bfloat16() - rollout_log_probs.bfloat16()).to(log_probs)
        return loss_fn(log_probs, rollout_log_probs=(log_probs - d).detach(), **others)

    return narrowed


def masked_after_the_exponential(log_probs, *, rollout_log_probs, advantages, mask, **others):
    w = ratio((log_probs - rollout_log_probs).detach()).clamp(max=2)
    return -(w * advantages * log_probs * mask).sum() / mask.sum()


def one_advantage_for_all(loss_fn):
    def first(log_probs, *, advantages, **others):
        return loss_fn(log_probs, advantages=advantages[:1].expand(advantages.shape), **others)

    return first


@dataclass(frozen=True)
class Family:
    """A right loss, and what is known of it."""

    name: str
    weight: object
    objective: object
    total: object
    reference: PolicyLoss
    monotone: bool = True
    unbiased: bool = False

    @property
    def old(self):
        return self.objective is not reinforce

    def loss(self, **parts):
        own = {"weight": self.weight, "objective": self.objective, "total": self.total}
        return partial(policy_loss, **(own | parts))

    def normalizer(self, mask):
        if self.total is token_mean:
            return global_normalizer(mask, group=None, gradients="summed")
        return mask.any(-1).sum()


SUMS = "seq-mean-token-sum"
TOKEN = Family(
    "token-TIS", truncated, reinforce, token_mean, PolicyLoss(correction=iscorrect.token_tis())
)
SEQUENCE = Family(
    "sequence-TIS", capped_product, reinforce, sequence_mean,
    PolicyLoss(correction=iscorrect.sequence_tis(), aggregation=SUMS),
)
PLAIN = Family(
    "sequence-IS", product, reinforce, sequence_mean,
    PolicyLoss(correction=iscorrect.sequence_is(), aggregation=SUMS), unbiased=True,
)
MASKED = Family(
    "sequence-MIS", masked_product, reinforce, token_mean,
    PolicyLoss(correction=iscorrect.sequence_mis()), monotone=False,
)
PPO = Family(
    "PPO, token-TIS", truncated, ppo, token_mean,
    PolicyLoss(correction=iscorrect.token_tis(), objective=PPOClip()),
)
CISPO_ = Family(
    "CISPO, token-TIS", truncated, cispo, token_mean,
    PolicyLoss(correction=iscorrect.token_tis(), objective=CISPO()),
)
FAMILIES = (TOKEN, SEQUENCE, PLAIN, MASKED, PPO, CISPO_)

MISTAKES = [
    ("ratio upside down", TOKEN, TOKEN.loss(weight=upside_down)),
    ("maximum for minimum in the truncation", TOKEN, TOKEN.loss(weight=larger_of_the_two)),
    ("cap applied to log ρ", TOKEN, TOKEN.loss(weight=cap_on_the_logarithm)),
    ("cap applied to 1/ρ", TOKEN, TOKEN.loss(weight=cap_on_the_inverse)),
    ("clipped below as well", TOKEN, TOKEN.loss(weight=clipped_on_both_sides)),
    ("masked where it should truncate", TOKEN, TOKEN.loss(weight=masked_beyond_the_cap)),
    ("no bound", TOKEN, TOKEN.loss(weight=without_bound)),
    ("weights divided by their mean in the batch", TOKEN, TOKEN.loss(weight=over_its_mean)),
    ("gradient through min(ρ, C): capped tokens lose theirs", TOKEN,
     TOKEN.loss(objective=differentiated_truncation)),
    ("sign of the loss", TOKEN, TOKEN.loss(objective=ascent_for_descent)),
    ("absolute value of A", TOKEN, TOKEN.loss(objective=size_of_the_advantage)),
    ("first sequence's advantage for all", TOKEN, one_advantage_for_all(TOKEN.loss())),
    ("rollout log-probs shifted by one token", TOKEN, shifted_by_one(TOKEN.loss())),
    ("subtracted in bfloat16", TOKEN, in_bfloat16(TOKEN.loss())),
    ("mask multiplied after the exponential", TOKEN, masked_after_the_exponential),
    ("divided by the padded width", TOKEN, TOKEN.loss(total=padded_width)),
    ("divided by this micro-batch's tokens", TOKEN, TOKEN.loss(total=tokens_of_the_part)),
    ("mean of sequence means for token mean", TOKEN, TOKEN.loss(total=mean_of_means)),
    ("mean over columns first", TOKEN, TOKEN.loss(total=mean_of_columns)),
    ("geometric mean for product", SEQUENCE, SEQUENCE.loss(weight=capped_mean_of_logs)),
    ("sum of ratios for product", SEQUENCE, SEQUENCE.loss(weight=sum_of_ratios)),
    ("tokens capped before the product", SEQUENCE, SEQUENCE.loss(weight=product_of_capped_ratios)),
    ("product up to the token only", SEQUENCE, SEQUENCE.loss(weight=product_of_the_prefix)),
    ("product over the row, not the sequence", SEQUENCE, SEQUENCE.loss(weight=product_of_the_row)),
    ("log-ratio counted twice", PLAIN, PLAIN.loss(weight=product_twice)),
    ("geometric mean for product", PLAIN, PLAIN.loss(weight=mean_of_logs)),
    ("gradient through the weights", PLAIN, PLAIN.loss(objective=differentiated_product)),
    ("token mean for sequence mean", PLAIN, PLAIN.loss(total=token_mean)),
    ("absolute value of A", PLAIN, PLAIN.loss(objective=size_of_the_advantage)),
    ("clamped A", PLAIN, PLAIN.loss(objective=clamped_advantage)),
    ("divided by its own length, times the padded width", PLAIN,
     PLAIN.loss(total=means_times_the_width)),
    ("tokens masked, not sequences", MASKED, MASKED.loss(weight=tokens_masked_for_sequences)),
    ("geometric mean decides", MASKED, MASKED.loss(weight=kept_by_the_geometric_mean)),
    ("divided by the kept tokens", MASKED, MASKED.loss(total=tokens_kept)),
    ("ratio to its own detached log-probs: never clips", PPO,
     PPO.loss(objective=ppo_against_itself)),
    ("maximum for minimum in the clip", PPO, PPO.loss(objective=larger_surrogate)),
    ("clamp without the minimum", PPO, PPO.loss(objective=clip_without_minimum)),
    ("minimum of the ratios, whatever A's sign", PPO, PPO.loss(objective=minimum_without_the_sign)),
    ("clip applied to the log-ratio", PPO, PPO.loss(objective=clip_on_the_logarithm)),
    ("clip applied to ratio × weight", PPO, PPO.loss(objective=clip_of_ratio_times_weight)),
    ("π/μ in the clip, weights on top", PPO, PPO.loss(objective=ratio_to_the_engine)),
    ("weights from π/μ, not π_old/μ", PPO, PPO.loss(objective=weight_of_the_new_policy)),
    ("gradient through the weights", PPO, PPO.loss(objective=weight_with_gradient)),
    ("old and rollout log-probs swapped", PPO, PPO.loss(objective=old_and_rollout_swapped)),
    ("mask forgotten in the sum", PPO, PPO.loss(total=mask_forgotten)),
    ("gradient through the clipped ratio", CISPO_, CISPO_.loss(objective=cispo_with_gradient)),
]


def checks_of(family):
    """Every check that a right loss of the family passes, by its column."""
    old = family.old
    every = {
        "same as": lambda f: checks.check_same_as(f, family.reference, old=old, packed=True),
        "weights": lambda f: checks.check_weights(f, family.reference.correction, old=old),
        "sign": lambda f: checks.check_sign(f, old=old),
        "monotone": lambda f: checks.check_monotone(f, old=old),
        "identity": lambda f: checks.check_identity_when_equal(
            f, PolicyLoss(
                objective=family.reference.objective, aggregation=family.reference.aggregation,
                correction=iscorrect.uncorrected(),
            ), old=old,
        ),
        "padding": lambda f: checks.check_invariant_to_padding(f, old=old),
        "packing": lambda f: checks.check_invariant_to_packing(f, old=old),
        "micro-batches": lambda f: checks.check_invariant_to_microbatching(
            f, family.normalizer, old=old
        ),
        "outside mask": lambda f: checks.check_no_gradient_outside_mask(f, old=old),
        "finite": lambda f: checks.check_finite(f, old=old),
        "unbiased": checks.check_unbiased,
    }
    if not family.monotone:
        del every["monotone"]
    if not family.unbiased:
        del every["unbiased"]
    return every


COLUMNS = list(checks_of(PLAIN))


def caught(check, loss_fn):
    """Whether a check fails on a loss; an error of the loss itself counts."""
    try:
        check(loss_fn)
    except Exception:
        return True
    return False


def findings(family, loss_fn):
    """Column -> whether the check of that name fails on the loss."""
    return {name: caught(check, loss_fn) for name, check in checks_of(family).items()}


def table():
    """The rows of the page, and how many mistakes are caught."""
    lines = ["| mistake | in | " + " | ".join(COLUMNS) + " |"]
    lines.append("|---|---|" + "---|" * len(COLUMNS))
    found = 0
    for name, family, loss_fn in MISTAKES:
        seen = findings(family, loss_fn)
        found += any(seen.values())
        cells = ["–" if c not in seen else "●" if seen[c] else "" for c in COLUMNS]
        lines.append(f"| {name} | {family.name} | " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(
        f"{found} of {len(MISTAKES)} mistakes are caught; ● caught, – the check does not apply. No"
        f" check fails on the {len(FAMILIES)} right losses."
    )
    return "\n".join(lines)


def render(page):
    """The page with its table written anew."""
    body = f"{BEGIN}\n{table()}\n{END}"
    return re.sub(f"{BEGIN}.*?{END}", lambda _: body, page, flags=re.DOTALL)


if __name__ == "__main__":
    settings.load_profile("planted")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
