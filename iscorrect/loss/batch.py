"""The inputs of a loss, and the one place that makes them finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from iscorrect.layout import Layout, masked
from iscorrect.loss.evidence import Evidence, Given
from iscorrect.loss.ratios import is_log_prob


class Batch(NamedTuple):
    """What a loss is given of each token, "b t" each; anything outside the mask.

    Attributes:
        log_probs: log π, nats, with gradient.
        rollout_log_probs: log μ, nats.
        advantages: may be any numbers.
        layout: which tokens count.
        old_log_probs: log π_old, nats; None: π itself, without gradient.
        ref_log_probs: log π_ref, nats, or None.
        extra: a per-token loss that no weight multiplies, or None.
    """

    log_probs: Tensor
    rollout_log_probs: Tensor
    advantages: Tensor
    layout: Layout
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    extra: Tensor | None = None

    def finite(self) -> Finite:
        """The batch with finite values everywhere: the only place that scans and masks inputs."""
        mask, old = self.layout.mask, self.old_log_probs
        wide = torch.promote_types(self.log_probs.dtype, torch.float32)
        current = self.log_probs.detach()
        extra = None if self.extra is None else masked(self.extra, mask)
        with torch.no_grad():
            present = mask & is_log_prob(current)
            if old is not None:
                present = present & is_log_prob(old)
            given = Given(
                current if old is None else old, self.rollout_log_probs, self.advantages
            )
            finite = present & is_log_prob(self.rollout_log_probs)
            evidence = Evidence.of(given, self.layout, present=present, finite=finite)
            advantages = masked(self.advantages, mask)
            before = None if old is None else masked(old.to(wide), present)
            reference = None
            if self.ref_log_probs is not None:
                known = present & is_log_prob(self.ref_log_probs)
                reference = Reference(
                    masked(self.ref_log_probs.to(wide), known), self.layout.with_mask(known)
                )
        log_probs = masked(self.log_probs.to(wide), present)
        return Finite(log_probs, before, advantages, evidence, reference, extra)

    def blocks(self, tokens: int) -> Iterator[Batch]:
        """The batch a few rows at a time, about so many tokens each."""
        rows = max(1, tokens // max(1, self.layout.mask.shape[1]))
        start = 0
        given = [
            [None] * -(-len(self.layout.mask) // rows) if x is None else torch.split(x, rows)
            for x in (
                self.log_probs, self.rollout_log_probs, self.advantages, self.old_log_probs,
                self.ref_log_probs, self.extra,
            )
        ]
        for log_probs, rollout, advantages, old, ref, extra in zip(*given, strict=True):
            layout = self.layout.rows(start, start + rows)
            yield Batch(log_probs, rollout, advantages, layout, old, ref, extra)
            start += rows

    def pick(self, index: Tensor, layout: Layout, log_probs: Tensor) -> Batch:
        """Some tokens, packed into one row.

        Args:
            index: int "n", positions in the flattened batch.
            layout: of the "1 n" tokens.
            log_probs: "1 n", in the place of the batch's.
        """

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.reshape(-1)[index].view(1, -1)

        return self._replace(
            log_probs=log_probs, layout=layout, old_log_probs=cut(self.old_log_probs),
            ref_log_probs=cut(self.ref_log_probs), extra=cut(self.extra),
            rollout_log_probs=self.rollout_log_probs.reshape(-1)[index].view(1, -1),
            advantages=self.advantages.reshape(-1)[index].view(1, -1),
        )


class Finite(NamedTuple):
    """A batch of finite values, 0 where nothing counts or nothing is known; "b t" each.

    Attributes:
        log_probs: log π, nats, float32 or wider, with gradient.
        before: log π_old, nats, or None where π itself stands for it.
        advantages: 0 outside the mask.
        evidence: of the ratio π_old/μ.
        reference: π_ref, or None.
        extra: or None.
    """

    log_probs: Tensor
    before: Tensor | None
    advantages: Tensor
    evidence: Evidence
    reference: Reference | None
    extra: Tensor | None


class Reference(NamedTuple):
    """Log π_ref "b t", nats, and the layout of the tokens that have one."""

    log_probs: Tensor
    layout: Layout
