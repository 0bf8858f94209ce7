"""Parts of a dump that differ from the rest: prompts, sequences, engines, turns, places."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from iscorrect.diagnose import causes
from iscorrect.diagnose.findings import Cause, Finding
from iscorrect.diagnose.noise import heavy_tail
from iscorrect.diagnose.scale import doubtless, levels, of_token
from iscorrect.diagnose.shared import contexts
from iscorrect.dumps import Estimate, Tokens
from iscorrect.dumps.names import Array

TWICE = math.log(2)
ENGINES = math.log(1.2)
"""How far an engine is from the rest, log |Δ|. Engines get the same kinds of prompts; versions,
turns and places in a row do not: what is usual of them is no finding below a factor of two."""
FEW = 16  # tokens from which a level of a sequence is read

OF_SEQUENCE: dict[str, tuple[Cause, ...]] = {
    "engine": (causes.ONE_ENGINE, causes.DEFINITION, causes.QUANTISED),
    "version": (causes.STALE_WEIGHTS, causes.ONE_ENGINE),
    "step": (causes.BAD_BATCH, causes.STALE_WEIGHTS),
    "group": (causes.STALE_CACHE, causes.HISTORY, causes.ROUTING, causes.ONE_ENGINE),
}

WITHIN: dict[str, tuple[Cause, ...]] = {
    "version": (causes.STALE_WEIGHTS, causes.VERSIONS_INSIDE),
    "engine": (causes.ONE_ENGINE, causes.PREEMPTED),
    "turn": (causes.HISTORY, causes.WRONG_PROMPT, causes.VERSIONS_INSIDE),
    "pack": (causes.PACK_LEAK, causes.TWO_PASSES),
}


def prompt_dependent(tokens: Tokens) -> Finding | None:
    """Groups whose first tokens differ several times as much as those of others."""
    group = tokens.group
    if group is None:
        return None
    early = tokens.where(tokens.position < 16)  # where the prompt matters most
    if len(early) < FEW:  # they may all have been set aside
        return None
    seen, x = levels(early.where(_once(early, group)))
    groups, answers = np.unique(group[np.unique(seen.row)], return_counts=True)
    count = np.bincount(np.searchsorted(groups, group[seen.row]), minlength=len(groups))
    some = groups[(answers >= 2) & (count >= FEW)]
    if len(some) < 8:
        return None
    kept = np.isin(group[seen.row], some)
    seen, x = seen.where(kept), x[kept]
    rows, answer, size = np.unique(seen.row, return_inverse=True, return_counts=True)
    groups, member = np.unique(group[rows], return_inverse=True)
    level = np.bincount(answer, weights=x) / size
    n = np.bincount(member, weights=size)
    center = np.bincount(member, weights=size * level) / n
    within = max(
        float(size @ np.square(level - center[member])) / (len(rows) - len(groups)),
        float(np.square(x - level[answer]).sum()) / max(len(x) - len(rows), 1),
    )
    usual = float(n @ center) / float(n.sum())
    between = float(n @ np.square(center - usual)) / (len(groups) - 1)
    ordered = np.sort(center)
    jump = float(np.diff(ordered).max())
    cut = int(np.diff(ordered).argmax()) + 1
    affected = 1 - cut / len(groups)
    if between < 8 * within or jump < math.log(1.3) or not 0.05 < affected < 0.95:
        return None
    apart = float(ordered[cut:].mean() - ordered[:cut].mean())
    # prompts may be of many kinds; those that a cache spoils are one of two
    if apart < TWICE or affected * (1 - affected) * apart**2 < 0.8 * float(center.var()):
        return None
    # Routing that flips on a prompt's token marks that prompt's answers too.
    affected_groups = groups[center >= ordered[cut]]
    if heavy_tail(tokens.where(~np.isin(group[tokens.row], affected_groups))):
        return None
    return Finding(
        "mismatch depends on the prompt",
        f"{affected:.0%} of the groups differ"
        f" {math.exp(apart):.1f} times as much as the others"
        f" (variance between groups {between / within:.0f} times that within), among them group"
        f" {tokens.label('group', int(groups[int(center.argmax())]))}",
        OF_SEQUENCE["group"], between / within,
    )


def _once(tokens: Tokens, group: Array) -> Array:
    """Whether no other answer to the prompt has the token after the same tokens; bool "n".

    Answers that begin alike share their noise; the first of them stands for all.
    """
    what = tokens.rollout.view(np.int64) if tokens.ids is None else tokens.ids
    once = np.zeros(len(tokens), dtype=bool)
    once[np.unique(contexts(what, tokens.position, group[tokens.row]), return_index=True)[1]] = True
    return once


def some_sequences(tokens: Tokens) -> Finding | None:
    """Sequences whose tokens all differ several times as much as those of the others."""
    seen, x = levels(tokens)
    count = np.bincount(seen.row, minlength=tokens.count)
    rows = np.flatnonzero(count >= FEW)
    if len(rows) < 8:
        return None
    level = np.bincount(seen.row, weights=x, minlength=tokens.count)[rows] / count[rows]
    apart = _apart(level)
    if apart is None:
        return None
    # Routing that flips often marks the sequences in which it flips early.
    if heavy_tail(tokens.where(~np.isin(tokens.row, rows[apart]))):
        return None
    high = level[apart].mean() - level[~apart].mean()
    bad_rows = np.isin(seen.row, rows[apart])
    begins = bad_rows & (seen.position < np.quantile(seen.position, 0.15))
    inside = begins.sum() >= FEW and x[begins].mean() - x[~bad_rows].mean() < 0.5 * high
    what, among = "sequences", f"{int(apart.sum())} of {len(rows)} sequences"
    found: tuple[Cause, ...] = (causes.ONE_ENGINE, causes.BAD_BATCH, causes.VERSIONS_INSIDE,
                                causes.STALE_CACHE, causes.HISTORY, causes.ROUTING)
    if inside:
        among += ", from some token of theirs on,"
        found = (causes.ROUTING, causes.VERSIONS_INSIDE, causes.PREEMPTED, causes.ONE_ENGINE)
    for name, likeliest in OF_SEQUENCE.items():
        label = of_token(seen, name)
        if label is None:
            continue
        of_row = np.full(tokens.count, -1)
        of_row[seen.row] = label
        units, member = np.unique(of_row[rows], return_inverse=True)
        if 1 < len(units) <= len(rows) // 2 and _explains(apart, member) > 0.7:
            share = np.bincount(member, weights=apart) / np.bincount(member)
            what, found = f"{name}s", likeliest
            bad = units[share > 0.5]
            called = ", ".join(tokens.label(name, int(unit)) for unit in bad[:5])
            among = f"{len(bad)} of {len(units)} {name}s ({called}{' …' if len(bad) > 5 else ''})"
            break
    return Finding(
        f"some {what} apart from the rest",
        f"{among} differ {math.exp(high):.1f} times as much as the rest; the farthest is sequence"
        f" {tokens.sequence(int(rows[level.argmax()]))}",
        found, float(apart.mean()),
    )


def _apart(level: Array) -> Array | None:
    """Which of the levels "s" lie apart from the others, beyond chance and by a factor of two."""
    median = float(np.median(level))
    ordered = np.sort(level)
    lower = np.arange(1, len(level))
    total = np.cumsum(ordered)[:-1]
    gap = (ordered.sum() - total) / (len(level) - lower) - total / lower
    split = lower * (len(level) - lower) * np.square(gap)
    best = int(split.argmax())
    part = float(split[best]) / len(level) ** 2 / max(float(level.var()), 1e-30)
    # A normal sample split in its middle has 0.64 of its variance between the halves.
    if part > 0.85 and gap[best] > TWICE and min(best + 1, len(level) - best - 1) >= 2:
        upper: Array = level > ordered[best]
        return upper
    spread = 1.4826 * float(np.median(np.abs(level - median)))
    far: Array = level > median + max(7 * spread, TWICE)
    return far if 2 <= int(far.sum()) <= len(level) // 2 else None


def _explains(apart: Array, member: Array) -> float:
    """The share of the variance of a bool "s" that lies between units, less that of chance."""
    n = np.bincount(member)
    mean = np.bincount(member, weights=apart) / n
    x = apart.astype(float)
    within = float(np.square(x - mean[member]).sum()) / max(len(x) - len(n), 1)
    return 1 - within / max(float(x.var(ddof=1)), 1e-30)


def some_places(tokens: Tokens) -> Finding | None:
    """Versions, engines, turns or places in a packed row whose tokens differ from the rest."""
    seen, x = levels(tokens)
    for name, likeliest in WITHIN.items():
        label = of_token(seen, name)
        if label is None:
            continue
        for called, here in _parts(tokens, name, label, x):
            effect, usual = _contrast(seen, x, here)
            apart = effect.value > TWICE and doubtless(effect, seen)
            if name == "engine" and effect.value > ENGINES:
                apart = apart or doubtless(effect, _smaller(seen, here))
            if apart:
                return Finding(
                    f"one {name} apart from the rest" if name != "pack"
                    else "mismatch depends on the place in a packed row",
                    f"tokens of {name} {called} ({here.mean():.0%}) differ"
                    f" {math.exp(effect.value):.1f} times as much as the rest (log {effect},"
                    f" median |Δ log p| there {usual:.2g})",
                    likeliest, effect.value, effect.error, correctable=name == "version",
                )
    return None


def _parts(tokens: Tokens, name: str, label: Array, x: Array) -> Iterator[tuple[str, Array]]:
    """The parts of the tokens that a field makes, the ones that differ most first, by name."""
    units, member = np.unique(label, return_inverse=True)
    if len(units) < 2:
        return
    if name in ("turn", "pack"):  # whatever was before the first of them is on both sides
        yield "1 and later" if units[0] == 0 else f"after {units[0]}", label > units[0]
    count = np.bincount(member)
    ranked = np.argsort(-np.bincount(member, weights=x) / count)
    for unit in ranked[np.minimum(count, len(x) - count)[ranked] >= 32][:8]:
        if name != "pack" or unit > 0:
            yield tokens.label(name, int(units[unit])), member == unit


def _smaller(tokens: Tokens, here: Array) -> Tokens:
    """The part, or the rest where that has fewer sequences: its number says what an error is."""
    part, rest = tokens.where(here), tokens.where(~here)
    return part if part.sequences < rest.sequences else rest


def _contrast(tokens: Tokens, x: Array, here: Array) -> tuple[Estimate, float]:
    (effect,), _ = tokens.regress(x, here.astype(float))
    return effect, float(np.median(np.abs(tokens.d[here])))


def by_position(tokens: Tokens) -> Finding | None:
    """A mismatch several times larger at the beginning or from a position on."""
    size = np.abs(tokens.d)
    early, late = tokens.position < 4, tokens.position >= 16
    if early.sum() < 32 or late.sum() < 32:
        return None
    first, rest = float(np.median(size[early])), float(np.median(size[late]))
    if first < 0.15 or first < 2.5 * rest:
        return _steps_of_position(tokens)
    next_to = (tokens.position >= 8) & (tokens.position < 16)
    fades = not next_to.any() or float(np.median(size[next_to])) < 0.7 * first
    prompt = (causes.WRONG_PROMPT, causes.VERSIONS_INSIDE, causes.SHARED_CACHE)
    return Finding(
        "mismatch at the beginning of answers",
        f"median |Δ log p| is {first:.2g} nats on the first four tokens of an answer and {rest:.2g}"
        " from the 17th on; "
        + ("it fades, as the prompt's share in what they condition on does" if fades
           else "it does not fade, but ends"),
        prompt if fades else (causes.VERSIONS_INSIDE, causes.WRONG_PROMPT, causes.POSITIONS),
        first / max(rest, 1e-12),
    )


def _steps_of_position(tokens: Tokens) -> Finding | None:
    seen, x = levels(tokens)
    best: tuple[Estimate, int] | None = None
    for cut in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768):
        after = seen.position >= cut
        if min(int(after.sum()), int((~after).sum())) < 256:
            continue
        (effect,), _ = seen.regress(x, after.astype(float))
        if best is None or abs(effect.value) > abs(best[0].value):
            best = effect, cut
    if best is None or not doubtless(best[0], seen) or abs(best[0].value) < TWICE:
        return None
    effect, cut = best
    later = effect.value > 0
    return Finding(
        "mismatch depends on the position",
        f"tokens {'from' if later else 'before'} position {cut} {'on ' if later else ''}differ"
        f" {math.exp(abs(effect.value)):.1f} times as much as the others (log {effect})",
        (causes.POSITIONS, causes.HISTORY, causes.QUANTISED) if later
        else (causes.VERSIONS_INSIDE, causes.WRONG_PROMPT, causes.POSITIONS),
        effect.value, effect.error,
    )

