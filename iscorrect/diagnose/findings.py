"""What a diagnosis says: a pattern, and the causes that make it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """Something that makes trainer and engine disagree.

    Attributes:
        name: a plain phrase, the same for every dump.
        control: the cheapest experiment that tells it from the other causes of the same pattern.
        needs: fields of a dump that would decide it here; a finding keeps those that are missing.
    """

    name: str
    control: str
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """A pattern in a dump, and what makes such patterns.

    Attributes:
        pattern: what was seen, a phrase that is the same for every dump.
        evidence: one sentence with the numbers that speak for it, and where.
        causes: what makes the pattern, likeliest first.
        statistic: what was tested.
        error: its standard error, clustered by sequence; 0 where the evidence is a count.
        correctable: whether a correction is an answer to it: the engine samples from what it
            reports, and differs by its arithmetic, by weights of another format, or by an age that
            is meant to be. False where something has to be mended first.
    """

    pattern: str
    evidence: str
    causes: tuple[Cause, ...]
    statistic: float
    error: float = 0.0
    correctable: bool = False

    @property
    def cause(self) -> str:
        """The name of the likeliest cause."""
        return self.causes[0].name


PATTERNS = (
    "log-probs match at another position",
    "one value in many places",
    "log-probs above 0",
    "candidates that contradict the sampled token",
    "entropy that contradicts the log-probs",
    "varentropy that contradicts entropy and log-probs",
    "log_probs and old_log_probs that differ",
    "runs that surprise both sides",
    "sequences that part at a token",
    "single tokens that the trainer finds impossible",
    "mismatch grows with the steps",
    "mismatch grows over the first steps and stays",
    "mismatch grows with the age of the weights",
    "one step apart from the others",
    *(f"one {unit} apart from the rest" for unit in ("version", "engine", "turn")),
    "mismatch depends on the place in a packed row",
    "log ρ in proportion to log p",
    "rollout_log_probs that do not follow the sampled token",
    "mean ratio below 1",
    "tokens that came before are less likely to the engine",
    "mismatch depends on the prompt",
    "mismatch at the beginning of answers",
    "mismatch fades along answers",
    "mismatch depends on the position",
    *(f"some {units} apart from the rest" for units in (
        "sequences", "engines", "versions", "steps", "groups",
    )),
    "log ρ repeats with the token",
    "rare large differences",
    "rare large differences of one sign",
    "more high ratios than a probability allows",
    "mean ratio other than 1",
    "a part of the log-probs is equal to the bit",
    "tokens from a distribution that neither side reports",
    "logits on a 16-bit grid",
    "values on a 16-bit grid",
    "log-probs of both sides are the same numbers",
    "larger than 16-bit rounding, without a pattern",
    "nothing beyond numerical noise",
)
"""All that a finding may be called."""
