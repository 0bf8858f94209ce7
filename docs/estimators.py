"""Write the numbers of docs/estimators.md, after checking by enumeration what they stand for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from iscorrect import PRESETS, PolicyLoss, binary_kl, k2, k3, mse_optimal_cap, sequence_tis
from iscorrect.cli.audit import Setting
from iscorrect.testing import TabularPolicy, audit, chi2, kl, total_variation
from iscorrect.testing.mismatch import token_sigma

PAGE = Path(__file__).with_suffix(".md")
MISMATCHES = {"FP8 logits": "fp8", "noise of 0.2 nats": "noise=0.2", "top-p of 0.9": "top-p=0.9"}
SETTINGS = {name: Setting.of(mismatch) for name, mismatch in MISMATCHES.items()}
SLACK = 1e-9


class Exact:
    """Sums over all sequences of a setting, without a loss and without autograd."""

    def __init__(self, setting: Setting) -> None:
        self.policy, self.rollout, self.reward = (
            setting.policy, setting.rollout_policy, setting.reward
        )
        self.pi, self.mu = self.policy.probabilities, self.rollout.probabilities
        self.seen = self.mu > 0
        self.ratio = torch.where(self.seen, self.pi / self.mu, 0)
        sequences = self.policy.sequences
        self.mask = sequences.mask
        log_ratio = sequences.gather(self.policy.table - self.rollout.table)
        self.log_ratio = torch.where(self.seen[:, None], log_ratio, 0)
        self.token_ratio = self.log_ratio.exp()
        self.p, self.q = self.policy.table, self.rollout.table

    def in_logits(self, table: Tensor) -> Tensor:
        """Σ a(c, v) ∇log π(v|c) in the logits; "c v"."""
        return table - table.sum(-1, keepdim=True) * self.p.exp()

    def of_sequences(self, mass: Tensor) -> Tensor:
        """Σ_y m(y) R(y) ∇log π(y)."""
        each = repeat(mass * self.reward, "n -> n t", t=self.policy.length)
        return self.in_logits(self.policy.sequences.scatter(each))

    def of_tokens(self, mass: Tensor, reward: Tensor | None = None) -> Tensor:
        """Σ_c d_μ(c) Σ_v m(v|c) Q_μ(c, v) ∇log π(v|c), where μ may go."""
        values = self.rollout.action_values(self.reward if reward is None else reward)
        visits = rearrange(self.rollout.visits(), "c -> c 1")
        reachable = (visits > 0) & (self.q > -torch.inf)
        return self.in_logits(torch.where(reachable, visits * mass * values, 0))

    def token_gradients(self) -> Tensor:
        """R ∇log π(y_t) in the logits; "n t (c v)"."""
        sequences, p = self.policy.sequences, self.p.exp()
        n, t = self.mask.shape
        scores = torch.zeros(n, t, *p.shape, dtype=p.dtype)
        i, j = torch.meshgrid(torch.arange(n), torch.arange(t), indexing="ij")
        scores[i, j, sequences.contexts] = -p[sequences.contexts]
        scores[i, j, sequences.contexts, sequences.tokens] += 1
        return einsum(scores.flatten(2), self.reward, "n t g, n -> n t g")

    def largest(self) -> float:
        """K = max ‖R ∇log π(y)‖."""
        squares = self.policy.sequences.gather(self._score_squares()).sum(-1)
        return float((self.reward.abs() * squares.sqrt()).max())

    def largest_of_tokens(self) -> float:
        """K₁ = max ‖R ∇log π(y_t)‖."""
        squares = self.policy.sequences.gather(self._score_squares()).amax(-1)
        return float((self.reward.abs() * squares.sqrt()).max())

    def _score_squares(self) -> Tensor:
        p = self.p.exp()
        return (1 - p).square() + p.square().sum(-1, keepdim=True) - p.square()

    def missing(self) -> float:
        """P_π of what μ never draws."""
        return float(self.pi[~self.seen].sum())

    def mean(self, values: Tensor) -> float:
        """E_μ of a number for each sequence."""
        return float(self.mu @ values)

    def along(self, values: Tensor) -> float:
        """Σ_t E_μ of a number for each token."""
        return self.mean((values * self.mask).sum(-1))


def _band(x: Tensor, low: float, high: float) -> Tensor:
    return ((x >= low) & (x <= high)).double()


def _two_way_kl(e: Exact) -> Tensor:
    return torch.maximum(binary_kl(e.p, e.q), binary_kl(e.q, e.p))


def _dppo(e: Exact) -> Tensor:
    p, q = e.p.exp(), e.q.exp()
    mass, far = torch.minimum(p, 10 * q), (p - q).abs() > 0.15
    ups = torch.where(far & (p > q), 0, mass)
    downs = torch.where(far & (p < q), 0, mass)
    return e.of_tokens(ups, e.reward.clamp(min=0)) + e.of_tokens(downs, e.reward.clamp(max=0))


def _gap(e: Exact) -> Tensor:
    return (e.p.exp() - e.q.exp()).abs()


def _admitted(e: Exact) -> Tensor:
    """Sequences whose mean binary KL is at most 5e-3; bool "n"."""
    ours, theirs = (
        x.log_probs.exp().clamp(1e-6, 1 - 1e-6).log() for x in (e.policy, e.rollout)
    )
    return e.seen & (binary_kl(theirs, ours).mean(-1) <= 5e-3)


def _of_admitted(e: Exact) -> Tensor:
    """Σ_y μ(y) R(y) 1{admitted} Σ_t ρ_t ∇log π(y_t)."""
    mass = rearrange(e.mu * e.reward * _admitted(e), "n -> n 1")
    return e.in_logits(e.policy.sequences.scatter(mass * e.token_ratio))


def _capped_by_confidence(e: Exact) -> Tensor:
    p, q = e.p.exp(), e.q.exp()
    return torch.minimum(p, (1 + 2.3 * (1 - p).clamp(min=5e-3)) * q)


ESTIMANDS: dict[str, Callable[[Exact], Tensor]] = {
    "uncorrected": lambda e: e.of_sequences(e.mu),
    "token-is": lambda e: e.of_tokens(e.p.exp()),
    "token-tis": lambda e: e.of_tokens(torch.minimum(e.p.exp(), 2 * e.q.exp())),
    "token-mis": lambda e: e.of_tokens(e.p.exp() * ((e.p - e.q).exp() <= 3)),
    "icepop": lambda e: e.of_tokens(e.p.exp() * _band((e.p - e.q).exp(), 0.5, 5)),
    "confidence-is": lambda e: e.of_tokens(_capped_by_confidence(e)),
    "kpop": lambda e: e.of_tokens(torch.where(_two_way_kl(e) <= 0.1, e.p.exp(), 0)),
    "dppo": _dppo,
    "ipo": lambda e: e.of_tokens(
        torch.where(_gap(e) <= 0.3, torch.minimum(e.p.exp(), 1e4 * e.q.exp()), 0)
    ),
    "flash-reinforce": _of_admitted,
    "sequence-is": lambda e: e.of_sequences(torch.where(e.seen, e.pi, 0)),
    "sequence-tis": lambda e: e.of_sequences(torch.minimum(e.pi, 2 * e.mu)),
    "sequence-mis": lambda e: e.of_sequences(torch.where(e.seen & (e.ratio <= 3), e.pi, 0)),
    "geometric-rs": lambda e: e.of_sequences(
        e.mu * _band(e.log_ratio.mean(-1).exp(), 0.999, 1.001)
    ),
    "trust-region-mask": lambda e: e.of_sequences(
        e.mu * (k2(e.log_ratio).amax(-1) <= 0.05) * (k3(e.log_ratio).mean(-1) <= 1e-3)
    ),
    "off-policy-negative": lambda e: e.of_sequences(
        e.mu * ((e.reward >= 0) | (-e.log_ratio.mean(-1) <= 0.5))
    ),
    "topr": lambda e: e.of_sequences(
        torch.where(e.reward > 0, e.mu, torch.minimum(e.pi, e.mu))
    ),
}


def _apart(e: Exact) -> float:
    """K₁ Σ_t E_μ|W − ρ_t|: what the token level leaves of the sequence ratio."""
    gap = e.along((e.ratio[:, None] - e.token_ratio).abs())
    return e.largest_of_tokens() * (gap + e.policy.length * e.missing())


def _token_bound(weight: Callable[[Exact], Tensor]) -> Callable[[Exact], float]:
    def bound(e: Exact) -> float:
        weights = e.policy.sequences.gather(torch.where(e.q > -torch.inf, weight(e), 0))
        return _apart(e) + e.largest_of_tokens() * e.along((e.token_ratio - weights).abs())

    return bound


def _variation(e: Exact) -> float:
    return 2 * e.largest() * float(total_variation(e.policy, e.rollout))


def _truncated(e: Exact, cap: float = 2.0) -> float:
    divergence = float(chi2(e.policy, e.rollout))
    limits = (
        (1 + divergence) / (4 * cap), divergence / (4 * (cap - 1)),
        float(total_variation(e.policy, e.rollout)),
    )
    return e.largest() * min(limits)


def _masked(e: Exact, cap: float = 3.0) -> float:
    divergence = float(chi2(e.policy, e.rollout))
    rare = min((1 + divergence) / cap, cap * divergence / (cap - 1) ** 2, 1.0)
    return e.largest() * rare


def _ratio(e: Exact) -> Tensor:
    return (e.p - e.q).exp()


def _rejected(preset: str) -> Callable[[Exact], float]:
    def bound(e: Exact) -> float:
        weights = PRESETS[preset]()(
            old_log_probs=e.policy.log_probs, rollout_log_probs=e.rollout.reported_log_probs,
            mask=e.mask, advantages=e.reward[:, None].expand(e.mask.shape),
        ).weights[:, 0]
        return _variation(e) + e.largest() * e.mean(1 - weights)

    return bound


BOUNDS: dict[str, Callable[[Exact], float]] = {
    "uncorrected": _variation,
    "token-is": _apart,
    "token-tis": _token_bound(lambda e: _ratio(e).clamp(max=2)),
    "token-mis": _token_bound(lambda e: _ratio(e) * (_ratio(e) <= 3)),
    "icepop": _token_bound(lambda e: _ratio(e) * _band(_ratio(e), 0.5, 5)),
    "confidence-is": _token_bound(lambda e: _capped_by_confidence(e) / e.q.exp()),
    "kpop": _token_bound(lambda e: torch.where(_two_way_kl(e) <= 0.1, _ratio(e), 0)),
    "dppo": lambda e: _apart(e) + e.largest_of_tokens() * e.along(
        e.token_ratio * (
            (e.policy.log_probs.exp() - e.rollout.log_probs.exp()).abs() > 0.15
        ) + (e.token_ratio - 10).clamp(min=0)
    ),
    "ipo": _token_bound(lambda e: torch.where(_gap(e) <= 0.3, _ratio(e).clamp(max=1e4), 0)),
    "flash-reinforce": lambda e: _apart(e) + e.largest_of_tokens() * e.along(
        torch.where(rearrange(_admitted(e), "n -> n 1"), 0, e.token_ratio)
    ),
    "sequence-is": lambda e: e.largest() * e.missing(),
    "sequence-tis": _truncated,
    "sequence-mis": _masked,
    "geometric-rs": _rejected("geometric-rs"),
    "trust-region-mask": _rejected("trust-region-mask"),
    "off-policy-negative": _rejected("off-policy-negative"),
    "topr": _variation,
}


def spread(e: Exact, preset: str) -> float:
    """√(E_μ Σ_t (W − w_t)²) · √λ, and the like for what μ excludes; w from the preset itself."""
    theirs = torch.where(e.seen[:, None], e.rollout.reported_log_probs, e.policy.log_probs)
    weights = PRESETS[preset]()(
        old_log_probs=e.policy.log_probs, rollout_log_probs=theirs, mask=e.mask,
        advantages=e.reward[:, None].expand(e.mask.shape),
    ).weights
    error = e.ratio[:, None] - weights
    gradients = e.token_gradients()
    if (error == error[:, :1]).all():
        error, gradients = error[:, :1], gradients.sum(1, keepdim=True)
    missing = torch.where(e.seen, 0, e.pi)
    lost = missing.sum().sqrt() * _widest(missing, e.token_gradients().sum(1, keepdim=True))
    size = e.mean(error.square().sum(-1)) ** 0.5
    return size * _widest(e.mu, gradients) + float(lost)


def _widest(chances: Tensor, gradients: Tensor) -> float:
    """√λ of Σ_y p(y) Σ_t g_t g_tᵀ, from "n" and "n t g"."""
    second = einsum(chances, gradients, gradients, "n, n t g, n t h -> g h")
    return float(torch.linalg.eigvalsh(second)[-1].clamp(min=0).sqrt())


def mismatches() -> str:
    """The three engines, by their divergences."""
    rows = ["| engine | σ per token | KL(μ‖π) | χ²(π‖μ) | TV |", "|---|---|---|---|---|"]
    for name, setting in SETTINGS.items():
        pair = (setting.policy, setting.rollout_policy)
        divergences = kl(*reversed(pair)), chi2(*pair), total_variation(*pair)
        numbers = [token_sigma(*pair), *map(float, divergences)]
        rows.append(f"| {name} | " + " | ".join(f"{x:.3g}" for x in numbers) + " |")
    return "\n".join(rows)


def numbers() -> str:
    """Bias, bound and standard deviation of every preset; estimands and bounds are checked."""
    rows = [
        "| preset | " + " | ".join(f"{name}: bias | bound | std" for name in SETTINGS) + " |",
        "|---|" + "---|" * (3 * len(SETTINGS)),
    ]
    for preset in PRESETS:
        cells = []
        for name, setting in SETTINGS.items():
            found, exact = setting.audit(preset), Exact(setting)
            norm = float(found.target.norm())
            bias, bound = f"{found.relative_bias:.3f}", "–"
            if preset in ESTIMANDS:
                gap = (found.expected - ESTIMANDS[preset](exact)).norm()
                assert gap <= SLACK, f"{preset} estimates something else on {name}: {gap}"
            if preset in BOUNDS:
                limits = BOUNDS[preset](exact), spread(exact, preset)
                assert found.bias <= min(limits) + SLACK, f"a bound of {preset} fails on {name}"
                bound = f"{min(limits) / norm:.3f}"
            if not found.exact:
                bias += f" ± {found.errors['relative_bias']:.3f}"
            cells += [bias, bound, f"{found.relative(setting.average)['std']:.3f}"]
        rows.append(f"| `{preset}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def constants() -> str:
    """Published constants beside tighter ones and the quantities that they bound."""
    e = Exact(SETTINGS["noise of 0.2 nats"])
    divergence, variation = chi2(e.policy, e.rollout), total_variation(e.policy, e.rollout)
    rows = ["| quantity | exact | bound here | other bound |", "|---|---|---|---|"]
    table = [
        (
            "E_μ(W − 2)₊", e.mu @ (e.ratio - 2).clamp(min=0),
            torch.minimum((1 + divergence) / 8, divergence / 4), 2 * (1 + divergence) / 2,
        ),
        (
            "P_π(W > 3)", e.pi @ (e.ratio > 3).double(),
            torch.minimum((1 + divergence) / 3, 3 * divergence / 4), (1 + divergence) / 3,
        ),
        (
            "E_μ min(W, 2)²", e.mu @ e.ratio.clamp(max=2).square(),
            torch.minimum(torch.tensor(2.0), 1 + divergence), 2.0**2,
        ),
        ("TV(π, μ)", variation, divergence.sqrt() / 2, (divergence / 2).sqrt()),
    ]
    for name, exact, holds, published in table:
        assert exact <= holds <= published, f"{name}: {exact}, {holds}, {published}"
        rows.append(f"| {name} | {exact:.3f} | {holds:.3f} | {published:.3f} |")
    return "\n".join(rows)


def caps() -> str:
    """The cap of the least mean squared error, found by enumeration, beside rules for it."""
    setting = SETTINGS["noise of 0.2 nats"]
    divergence = chi2(setting.policy, setting.rollout_policy)
    grid = [2 ** (step / 16) for step in range(-16, 64)]
    audits = [
        audit(
            PolicyLoss(correction=sequence_tis(cap), aggregation="seq-mean-token-sum"),
            setting.policy, setting.rollout_policy, setting.reward,
        )
        for cap in grid
    ]
    rows = [
        "| n | least error | (n(1+χ²)²/8)^⅓ | √n | √(2(1+χ²)) |", "|---|---|---|---|---|",
    ]
    for n in (512, 4096, 32768, 262144):
        best = min(range(len(grid)), key=lambda i: audits[i].mse(n))
        cells = (
            grid[best], mse_optimal_cap(torch.tensor(float(n)), divergence), n**0.5,
            (2 * (1 + divergence)).sqrt(),
        )
        rows.append(f"| {n} | " + " | ".join(f"{float(x):.2f}" for x in cells) + " |")
    return "\n".join(rows)


def equal_policies() -> str:
    """What the published bound on truncation's bias says where there is no mismatch."""
    policy = TabularPolicy.random(3, 5)
    reward = SETTINGS["FP8 logits"].reward
    loss_fn = PolicyLoss(correction=sequence_tis(2.0), aggregation="seq-mean-token-sum")
    assert audit(loss_fn, policy, policy, reward).bias < SLACK
    divergence = float(chi2(policy, policy))
    return (
        f"At μ = π truncation at 2 is exact. There K χ²/(4(C − 1)) = {divergence / 4:g}, while"
        f" 2K(1 + χ²)/C = {2 * (1 + divergence) / 2:g} K."
    )


def decided() -> str:
    """What presets do where the outcome is decided, on a task that one mistake loses."""
    rows = [
        "| preset | " + " | ".join(
            f"{name}: bias | of it decided" for name in MISMATCHES if name != "top-p of 0.9"
        ) + " |",
        "|---|---|---|---|---|",
    ]
    for preset in ("uncorrected", "token-is", "token-tis", "icepop", "sequence-is"):
        cells = []
        for name in ("FP8 logits", "noise of 0.2 nats"):
            policy, rollout = SETTINGS[name].policy, SETTINGS[name].rollout_policy
            right = (policy.sequences.tokens != 0).all(-1)
            reward = right.double()
            centred = reward - rollout.expected_reward(reward)
            loss_fn = PolicyLoss(correction=PRESETS[preset](), aggregation="seq-mean-token-sum")
            found = audit(loss_fn, policy, rollout, centred)
            lost = _after_a_mistake(policy)
            there = found.expected[lost]
            _check_decided(preset, there, policy, rollout, float(centred.min()), lost)
            bias = found.expected - policy.policy_gradient(reward)
            size = float(found.target.norm())
            cells += [f"{float(bias.norm()) / size:.3f}", f"{float(there.norm()) / size:.3f}"]
        rows.append(f"| `{preset}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _after_a_mistake(policy: TabularPolicy) -> Tensor:
    """Contexts whose prefix holds token 0; bool "c"."""
    sequences = policy.sequences
    wrong = (sequences.tokens == 0).long()
    before = wrong.cumsum(-1) - wrong > 0
    found = torch.zeros(len(sequences.seen), dtype=torch.bool)
    found[sequences.contexts[before]] = True
    return found


def _check_decided(
    preset: str, there: Tensor, policy: TabularPolicy, rollout: TabularPolicy, credit: float,
    lost: Tensor,
) -> None:
    """The theorem: token and sequence ratios move nothing there, no weights (μ − π)."""
    if preset in ("token-is", "sequence-is"):
        assert there.abs().max() <= SLACK, f"{preset} moves decided contexts"
    if preset == "uncorrected":
        away = policy.table.exp() - rollout.table.exp()
        want = -credit * rearrange(rollout.visits(), "c -> c 1") * away
        assert (there - want[lost]).abs().max() <= SLACK, "uncorrected moves them otherwise"


PARTS = {
    "mismatches": mismatches, "numbers": numbers, "decided": decided, "constants": constants,
    "caps": caps, "equal policies": equal_policies,
}


def render(page: str) -> str:
    """The page with every part between its markers written anew."""
    for name, write in PARTS.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        page, count = re.subn(
            pattern, lambda _, b=begin, w=write, e=end: f"{b}\n{w()}\n{e}", page, flags=re.DOTALL
        )
        assert count == 1, f"{PAGE.name} has {count} places for {name!r}"
    return page


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
