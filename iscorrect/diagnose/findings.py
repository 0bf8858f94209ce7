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
