"""Batches for trainers: hypothesis's, without what only this library takes."""

import dataclasses

import torch
from batches import batches, make_batch


def finite(batch):
    """Padding of zeros and ratios within e^±300: trainers multiply by masks, and exp has an end."""
    cleaned = [torch.where(batch.mask, x, 0) for x in batch[:-1]]
    log_probs, old, rollout, reference, advantages = cleaned
    old = rollout + (old - rollout).clamp(-300, 300)
    return batch._replace(
        log_probs=log_probs, old_log_probs=old, rollout_log_probs=rollout,
        ref_log_probs=reference, advantages=advantages,
    )


def drawn():
    return batches().map(finite)


def fixed(seed=0, rows=7, width=13, scale=0.7, dtype=torch.float32):
    return finite(make_batch(seed, rows=rows, width=width, scale=scale)).to(dtype)


def gradient_of(loss_of, log_probs):
    """The loss of log-probs and its gradient."""
    leaf = log_probs.clone().requires_grad_()
    loss = loss_of(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


@dataclasses.dataclass
class Worst:
    """The largest differences of a test's examples."""

    loss: float = 0.0
    gradient: float = 0.0

    def add(self, ours, theirs):
        from outcome import largest

        loss, gradient = (largest(a, b) for a, b in zip(ours, theirs, strict=True))
        self.loss, self.gradient = max(self.loss, loss), max(self.gradient, gradient)
        return max(loss, gradient)
