"""Metrics that merge exactly: sums, counts and extrema, read as flat names."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from iscorrect.errors import check_mask, check_per_token, input_error
from iscorrect.layout import Layout, masked, wide
from iscorrect.loss.divergences import expm1, k3_given
from iscorrect.loss.evidence import Evidence
from iscorrect.loss.ratios import Level, saturated, units as units_of
from iscorrect.ranks import Group, accumulator, check_member, max_over, objects_over, sum_over

Totals = Mapping[str, Tensor]


class Metrics(Mapping[str, Tensor]):
    """Metrics of a batch, or of several merged: a mapping from flat names to 0-dim tensors.

    Only sums and extrema are stored; means are taken when read. So ``a + b`` is what one call on
    both batches would have given. Nothing synchronises with the device before :meth:`to_floats`.

        batch/tokens                      tokens of the mask
        batch/sequences                   sequences with at least one of them
        batch/length                      tokens of a sequence, on average
        mismatch/kl_k1, kl_k2, kl_k3      mean estimate of KL(μ‖π_old), nats per token
        mismatch/log_prob_diff/mean, max  |log π_old − log μ|, nats
        mismatch/chi2/token               mean (ρ − 1)² over tokens
        mismatch/kl/sequence              mean Σ_t k3 over sequences: KL(μ‖π_old), nats per sequence
        mismatch/chi2/sequence            mean (Π_t ρ − 1)² over sequences
        mismatch/ess/sequence             (Σ R)² / (n Σ R²), R = Π_t ρ, n sequences: the share of
                                          them that weights of whole sequences would leave
        is/ratio/mean, min, max           ρ at the correction's level, before any bound; min is at
                                          most 1, max at least 1
        is/chi2                           mean (ρ − 1)² over its units: tokens, sequences, …
        is/weight/mean, max               weights of the units that were kept
        is/kept_weight                    Σ weights / number of units; 1 is what ρ has on average
        is/ess                            (Σ w)² / (n Σ w²), n units of the mask
        is/bounded                        share of units whose ratio the bound changed; absent
                                          where there is none
        is/rejected                       share of tokens with weight 0
        is/nonfinite                      share of tokens with a log-prob that is none: NaN, ±inf,
                                          10⁴ nats and more
        policy/kl_k1, kl_k3               the same of KL(π_old‖π), where old_log_probs are given
        policy/clipped                    share of tokens that the objective clips

    Where the layout has ages, also of the tokens of each of some ages: 0, 1, 2-3, 4-7, 8-15, 16+;
    NaN where a batch has none of that age. A sequence with a token without a log-ratio has no
    ratio, and is left out of its χ² and effective sample size.

        age/2-3/tokens                    share of all tokens; 0 where there are none
        age/2-3/log_prob_diff             mean |log π_old − log μ|, nats
        age/2-3/kl_k3                     mean k3, nats per token
        age/2-3/ess                       (Σ w)² / (n Σ w²) of the tokens' weights
        age/2-3/bounded, rejected         share of its tokens

    Attributes:
        sums: 0-dim tensors that add under a merge.
        maxima: 0-dim tensors that a merge takes the maximum of.

    >>> a = policy_metrics(torch.tensor([[-0.5]]), Layout(torch.tensor([[True]])), None)
    >>> (a + a).to_floats()["policy/kl_k1"]
    0.5
    """

    __slots__ = ("_tensors", "maxima", "sums")

    def __init__(self, sums: Totals, maxima: Totals) -> None:
        self.sums = sums
        self.maxima = maxima
        self._tensors: dict[str, Tensor] | None = None

    def __add__(self, other: Metrics) -> Metrics:
        return merge([self, other]) if isinstance(other, Metrics) else NotImplemented

    def __radd__(self, other: object) -> Metrics:
        """``sum(list_of_metrics)`` begins with 0."""
        return self if other == 0 else NotImplemented

    def as_tensors(self) -> dict[str, Tensor]:
        """Every metric that the stored sums allow, by name; 0 where nothing counted."""
        if self._tensors is None:
            self._tensors = self._read()
        return self._tensors

    def _read(self) -> dict[str, Tensor]:
        s, m = _widened(self.sums), _widened(self.maxima)
        metrics: dict[str, Tensor] = {}
        if "finite" in s:
            metrics.update({
                "batch/tokens": s["tokens"],
                "batch/sequences": s["sequences"],
                "batch/length": _share(s["tokens"], s["sequences"]),
                "mismatch/kl_k1": _share(s["k1"], s["finite"]),
                "mismatch/kl_k2": _share(s["k2"], s["finite"]),
                "mismatch/kl_k3": _share(s["k3"], s["finite"]),
                "mismatch/log_prob_diff/mean": _share(s["abs"], s["finite"]),
                "mismatch/log_prob_diff/max": m["abs"],
                "mismatch/chi2/token": _share(s["chi2"], s["finite"]),
                "mismatch/kl/sequence": _share(s["k3"], s["sequences"]),
                "mismatch/chi2/sequence": _share(s["sequence_chi2"], s["whole_sequences"]),
                "mismatch/ess/sequence": _effective(
                    s["sequence_ratio"], s["sequence_ratio_squared"], s["whole_sequences"]
                ),
                "is/ratio/mean": _share(s["excess"] + s["usable"], s["usable"]),
                "is/ratio/min": torch.exp(-m["negative_log_ratio"]),
                "is/ratio/max": torch.exp(m["log_ratio"].clamp(max=700)),
                "is/chi2": _share(s["unit_chi2"], s["usable"]),
                "is/weight/mean": _share(s["weight"], s["kept_units"]),
                "is/weight/max": m["weight"],
                "is/kept_weight": _share(s["weight"], s["units"]),
                "is/ess": _effective(s["weight"], s["weight_squared"], s["units"]),
                "is/rejected": _share(s["tokens"] - s["kept_tokens"], s["tokens"]),
                "is/nonfinite": _share(s["tokens"] - s["finite"], s["tokens"]),
            })
        if "bounded" in s:
            metrics["is/bounded"] = _share(s["bounded"], s["units"])
        for age in AGES if "age/0/tokens" in s else ():
            metrics.update(_of_age(age, s))
        if "policy_tokens" in s:
            metrics.update({
                "policy/kl_k1": _share(s["policy_k1"], s["policy_tokens"]),
                "policy/kl_k3": _share(s["policy_k3"], s["policy_tokens"]),
            })
        if "clipped" in s:
            metrics["policy/clipped"] = _share(s["clipped"], s["policy_tokens"])
        return metrics

    def __getitem__(self, name: str) -> Tensor:
        return self.as_tensors()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.as_tensors())

    def __len__(self) -> int:
        return len(self.as_tensors())

    def __repr__(self) -> str:
        return f"Metrics({', '.join(self)})"

    def to_floats(self) -> dict[str, float]:
        """Every metric as a Python float, in one transfer from the device."""
        metrics = self.as_tensors()
        if not metrics:
            return {}
        values: list[float] = torch.stack(list(metrics.values())).tolist()
        return dict(zip(metrics, values, strict=True))

    def all_reduced(self, group: Group) -> Metrics:
        """The metrics of all ranks of a group.

        One collective for sums and one for extrema, after one that compares a checksum of the
        names and waits for it.

        Args:
            group: the ranks; ``torch.distributed.group.WORLD`` for all, None for this one alone.
                Every rank must hold the same names.

        Returns:
            The same on every rank.

        Raises:
            InputError: this rank is not in the group, or ranks hold different names.
        """
        check_member("Metrics.all_reduced", "group", group)
        if group is None:
            return self
        names = (*self.sums, *self.maxima)
        for rank, theirs in enumerate(self._other_names(names, group)):
            if theirs != names:
                raise input_error(
                    "Metrics.all_reduced", "self", expected="of the same names on all ranks",
                    got=f"{len(names)} sums and extrema here, {len(theirs)} on rank {rank}",
                    fix="call the same loss on every rank before, and merge all of its metrics; a"
                    " rank without tokens calls it on tensors of shape (0, t)",
                )
        return Metrics(_over(sum_over, self.sums, group), _over(max_over, self.maxima, group))

    def _other_names(self, names: tuple[str, ...], group: Group) -> list[tuple[str, ...]]:
        """The names of all ranks, where they are not the same on all."""
        held = next(iter({**self.sums, **self.maxima}.values()), torch.zeros(()))
        checksum = zlib.crc32(repr(names).encode())
        both = torch.tensor([checksum, -checksum], device=held.device)
        most, least = max_over(both, group).tolist()
        return [] if most == -least else objects_over(names, group)


def _over(
    reduce: Callable[[Tensor, Group], Tensor], totals: Totals, group: Group
) -> dict[str, Tensor]:
    if not totals:
        return {}
    reduced = reduce(torch.stack(list(_widened(totals).values())), group)
    return dict(zip(totals, reduced, strict=True))


AGES = {"0": 0, "1": 1, "2-3": 2, "4-7": 4, "8-15": 8, "16+": 16}
"""Ranges of ages by the name they have in metrics, and the least age of each."""


def _of_age(age: str, sums: Totals) -> dict[str, Tensor]:
    def held(name: str) -> Tensor:
        return sums[f"age/{age}/{name}"]

    squares = held("tokens") * held("weight_squared")
    found = {
        "log_prob_diff": held("abs") / held("finite"),
        "kl_k3": held("k3") / held("finite"),
        "ess": held("weight").square() / torch.where(squares > 0, squares, held("tokens")),
        "rejected": (held("tokens") - held("kept")) / held("tokens"),
        "tokens": _share(held("tokens"), sums["tokens"]),
    }
    if "bounded" in sums:
        found["bounded"] = held("bounded") / held("tokens")
    return {f"age/{age}/{name}": value for name, value in found.items()}


def _sums_by_age(age: Tensor, per_token: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums of "b t" over the tokens of each range of ages; one product makes all of them."""
    wide = accumulator(age.device)
    rows = torch.stack([x.flatten().to(wide) for x in per_token.values()])
    older = torch.stack([age.flatten() >= least for least in AGES.values() if least])
    which = torch.arange(len(AGES), device=age.device) == older.sum(0).unsqueeze(-1)
    names = [f"age/{bucket}/{name}" for name in per_token for bucket in AGES]
    return dict(zip(names, (rows @ which.to(wide)).flatten().unbind(), strict=True))


def merge(parts: Sequence[Metrics]) -> Metrics:
    """The metrics of several batches taken together: what one call on all of them would have given.

    >>> merge([]).to_floats()
    {}
    """
    return Metrics(
        {name: _stack(found).sum() if len(found) > 1 else found[0]
         for name, found in _by_name([part.sums for part in parts]).items()},
        {name: _stack(found).amax() if len(found) > 1 else found[0]
         for name, found in _by_name([part.maxima for part in parts]).items()},
    )


def _by_name(parts: Sequence[Totals]) -> dict[str, list[Tensor]]:
    names = {name: None for part in parts for name in part}
    return {name: [part[name] for part in parts if name in part] for name in names}


def correction_metrics(
    evidence: Evidence,
    *,
    log_ratio: Tensor,
    bounded: Tensor | None,
    weights: Tensor,
    keep: Tensor,
) -> Metrics:
    """What a correction saw and did.

    Args:
        evidence: at the correction's level, before any bound.
        log_ratio: "b t", nats, at the correction's level, before normalisation and bound.
        bounded: bool "b t", where the bound changed the ratio; None where there is no bound.
        weights: "b t", after bound and rejection.
        keep: bool "b t".

    Returns:
        `mismatch/…`, a property of the data, `is/…`, of the correction, and both by `age/…`.
    """
    d, layout, units = evidence.log_ratio, evidence.layout, evidence.units
    # d is 0 where it does not count, and so is every divergence of it.
    excess = expm1(saturated(d))
    lowest, highest = _min(d), _max(d)
    of_sequences = [layout.per_sequence(x) for x in (d, layout.mask, evidence.finite)]
    total, tokens, finite = [x.sum(dtype=x.dtype) for x in of_sequences]
    sums = {
        "tokens": tokens,
        "finite": finite,
        "kept_tokens": _count(keep),
        "k1": -total,
        "k2": _sum_of_squares(d) / 2,
        "k3": k3_given(d, excess).sum(),
        "abs": d.abs().sum(),
        "chi2": _sum_of_squares(excess),
        **_sums_of_sequences(*layout.whole_sequences(of_sequences)),
    }
    if bounded is not None:
        sums["bounded"] = _count(units & bounded)
    if evidence.level == "token":
        least, most, unit_weights = lowest, highest, weights
        of_units = {
            "units": tokens, "usable": finite, "kept_units": sums["kept_tokens"],
            "excess": excess.sum(), "unit_chi2": sums["chi2"],
        }
    else:
        all_units = units_of(layout, evidence.level)
        log_ratio = masked(log_ratio, units)
        least, most = _min(log_ratio), _max(log_ratio)
        unit_excess = expm1(saturated(log_ratio))
        unit_weights = masked(_heaviest(weights, layout, evidence.level), all_units)
        of_units = {
            "units": _count(all_units), "usable": _count(units),
            "kept_units": _count(unit_weights.bool()),
            "excess": unit_excess.sum(), "unit_chi2": _sum_of_squares(unit_excess),
        }
    sums = {
        **sums, **of_units,
        "weight": unit_weights.sum(),
        "weight_squared": _sum_of_squares(unit_weights),
    }
    if layout.age is not None:
        per_token = {
            "tokens": layout.mask, "finite": evidence.finite, "kept": keep, "abs": d.abs(),
            "k3": k3_given(d, excess), "weight": weights, "weight_squared": weights.square(),
        }
        if bounded is not None:
            per_token["bounded"] = evidence.usable & bounded
        sums = {**sums, **_sums_by_age(layout.age, per_token)}
    return Metrics(
        sums,
        {
            "abs": torch.maximum(highest, -lowest),
            "log_ratio": most.clamp(min=0),
            "negative_log_ratio": -least.clamp(max=0),
            "weight": _max(weights),
        },
    )


def _sums_of_sequences(log_ratio: Tensor, tokens: Tensor, finite: Tensor) -> dict[str, Tensor]:
    """Sums over sequences of log-ratio, counted tokens and finite tokens; "s" each."""
    dtype = accumulator(tokens.device)
    exist = (tokens > 0).to(dtype)
    whole = exist * (finite == tokens)
    ratio = whole * saturated(log_ratio.to(dtype)).exp()
    sequences, whole_sequences, total = torch.stack([exist, whole, ratio]).sum(1).unbind()
    return {
        "sequences": sequences,
        "whole_sequences": whole_sequences,
        # not from the sum of R − 1, which loses its digits where every R is near 0
        "sequence_ratio": total,
        "sequence_ratio_squared": _sum_of_squares(ratio),
        "sequence_chi2": _sum_of_squares(ratio - whole),
    }


def _heaviest(weights: Tensor, layout: Layout, level: Level) -> Tensor:
    """The largest weight of each unit, which a rule may have left to some of its tokens only."""
    if level == "prefix":
        return weights
    return layout.segment_max(weights) if level == "segment" else layout.sequence_max(weights)


def policy_metrics(log_ratio: Tensor, layout: Layout, clipped: Tensor | None) -> Metrics:
    """How far the update has moved the policy.

    Args:
        log_ratio: "b t", nats, log π − log π_old; 0 outside the mask.
        layout: which tokens count.
        clipped: bool "b t", what the objective clips; None where it clips nothing.

    Returns:
        `policy/…`.
    """
    sums = {
        "policy_tokens": _count(layout.mask),
        "policy_k1": -log_ratio.sum(),
        "policy_k3": k3_given(log_ratio, expm1(saturated(log_ratio))).sum(),
    }
    if clipped is not None:
        sums["clipped"] = _count(clipped & layout.mask)
    return Metrics(sums, {})


def effective_sample_size(weights: Tensor, mask: Tensor) -> Tensor:
    """Fraction of the sample that the weights leave effective.

        ESS = (Σ w)² / (n Σ w²)

    Args:
        weights: "b t", ≥ 0.
        mask: bool "b t"; n counts its True entries.

    Returns:
        "" in [0, 1]; 1 when all weights are equal, 0 when all are 0 or nothing counts.

    Raises:
        InputError: a mask that is none, or weights of other tokens than its.

    References:
        Kish, Survey Sampling (1965).

    >>> effective_sample_size(torch.tensor([[1.0, 1.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool))
    tensor(0.8889)
    """
    check_mask("effective_sample_size", mask)
    check_per_token("effective_sample_size", mask, gradient=("weights",), weights=weights)
    weights = wide(masked(weights, mask))
    largest = _max(weights).to(weights.dtype)
    weights = weights / torch.where(largest > 0, largest, 1)
    squares = torch.count_nonzero(mask) * weights.square().sum()
    return weights.sum().square() / torch.where(squares > 0, squares, 1)


def _count(which: Tensor) -> Tensor:
    return which.to(torch.int32).sum(dtype=torch.int32)  # half the time of count_nonzero


DOT = 2**13
"""Entries of a dot product: on a CPU a longer one loses digits, since it adds them in turn."""


def _sum_of_squares(x: Tensor) -> Tensor:
    flat = x.flatten()
    if torch.compiler.is_compiling() or x.device.type != "cpu" or len(flat) <= DOT:
        return torch.dot(flat, flat)
    return torch.stack([torch.dot(part, part) for part in torch.split(flat, DOT)]).sum()


def _stack(values: list[Tensor]) -> Tensor:
    return torch.stack(values).to(accumulator(values[0].device))


def _widened(totals: Totals) -> dict[str, Tensor]:
    """The totals in the widest type of their device; those of one dtype are converted together."""
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, value in totals.items():
        by_dtype.setdefault(value.dtype, []).append(name)
    wide: dict[str, Tensor] = {}
    for names in by_dtype.values():
        converted = _stack([totals[name] for name in names]).unbind()
        wide.update(zip(names, converted, strict=True))
    return {name: wide[name] for name in totals}


def _max(x: Tensor) -> Tensor:
    return x.amax() if x.numel() > 0 else x.sum()


def _min(x: Tensor) -> Tensor:
    return x.amin() if x.numel() > 0 else x.sum()


def _effective(total: Tensor, squares: Tensor, number: Tensor) -> Tensor:
    return total.square() / torch.where(squares > 0, number * squares, 1)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole.clamp(min=1)
