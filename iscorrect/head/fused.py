"""From hidden states to the loss, its metrics and its gradients in one pass over the vocabulary.

In a corrected policy-gradient loss the derivative in a token's log-prob is known as soon as that
log-prob is: weights carry no gradient, and denominators count the mask. So the gradients of hidden
states and weights can be made while a chunk's logits are still there.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from iscorrect.errors import InputError, input_error
from iscorrect.gradients import giving_gradients_away
from iscorrect.head.block import kernels_for
from iscorrect.head.inputs import prepare
from iscorrect.head.linear import log_probs_of
from iscorrect.head.onepass import in_one_pass
from iscorrect.head.reader import default_step
from iscorrect.head.support import Support
from iscorrect.layout import Layout, as_layout
from iscorrect.loss.aggregate import Aggregation, Name, Normalizer
from iscorrect.loss.batch import Batch
from iscorrect.loss.correction import Correction
from iscorrect.loss.objectives import CISPO, Objective
from iscorrect.loss.policy_loss import LossOutput, PolicyLoss, per_token_advantages
from iscorrect.loss.presets import uncorrected
from iscorrect.ranks import Group


def fused_policy_loss(
    loss_fn: PolicyLoss,
    *,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rollout_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | Layout,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    extra: Tensor | None = None,
    normalizer: Normalizer | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    head_dtype: torch.dtype = torch.float32,
    support: Tensor | Support | None = None,
    vocabulary_group: Group = None,
    vocabulary_size: int | None = None,
    sequence_parallel: bool = False,
    compile_kernels: bool = False,
) -> LossOutput:
    """A policy loss of a linear head's log-probs, its gradients made in the forward pass.

        loss_fn(linear_log_probs(hidden, weight, target), …)

    One pass over the vocabulary makes log-probs and gradients, 6 n v d operations instead of 8.
    A chunk's logits are kept until its derivative is known: in a buffer, and on a CPU those of the
    first d tokens in the memory of the gradient of ``weight``, which is not needed before. Logits
    for which there is no room are computed twice. Where the loss of a token depends on log-probs
    outside its chunk (a correction of whole sequences under the policy being trained, a batch-wide
    bound), and under ``torch.compile``, a second pass recomputes them, but with a frozen head,
    which takes one pass for every loss.

    Tokens outside the mask cost nothing, and tokens without an advantage no gradient. On a CPU
    neither do others whose derivative is 0; on a GPU they do, for the host would have to wait for
    their number in every chunk. It waits twice a call, for how many tokens count and how many of
    them have an advantage, once more where some have none, once or twice more for weights of
    whole sequences, and two or three times for a support.

    Args:
        loss_fn: the loss.
        hidden: "b t d", with gradient; t predicts ``target`` at t.
        weight: "v d", with gradient.
        target: int "b t".
        rollout_log_probs: "b t", log μ, nats, as the engine reported.
        advantages: "b t", or "b" for one per row.
        mask: bool "b t", or a layout.
        old_log_probs: "b t", log π_old. None: π itself, without gradient.
        ref_log_probs: "b t", log π_ref, where the loss has a ``reference_kl``.
        extra: "b t", a per-token loss that no weight multiplies; may carry gradient.
        normalizer: the whole batch's count, where this is a micro-batch.
        bias: "v", with gradient.
        temperature: τ > 0, the sampler's.
        softcap: c > 0, as in Gemma's final logits; None for none.
        chunk_size: tokens the buffer is for, v float32 numbers each. None: on a GPU 4096; on a CPU
            one in 40, and no buffer where these are fewer than 192 and ``weight`` is trained.
        head_dtype: what the head's output is rounded to; see :func:`linear_log_probs`.
        support: the kept ids, as in :func:`log_probs_from_logits`.
        vocabulary_group: the ranks that hold the other rows of the head (tensor parallelism), as in
            :func:`linear_log_probs`; groups of ``mask`` leave them out. All get the same loss.
        vocabulary_size: v, where the rows of the head are padded to more.
        sequence_parallel: ``hidden`` is "b t/R d", this rank's part of the tokens.
        compile_kernels: as in :func:`linear_log_probs`.

    Returns:
        loss "" and metrics. The gradients are kept once: backward runs once.

    Raises:
        InputError: see :class:`PolicyLoss` and :func:`linear_log_probs`.
        RuntimeError: a second backward through the same loss.

    >>> from iscorrect.loss.presets import token_tis
    >>> hidden = torch.zeros(1, 2, 8, requires_grad=True)
    >>> weight = torch.ones(4, 8, requires_grad=True)
    >>> loss, metrics = fused_policy_loss(
    ...     PolicyLoss(correction=token_tis()), hidden=hidden, weight=weight,
    ...     target=torch.tensor([[0, 1]]), rollout_log_probs=torch.full((1, 2), -1.4),
    ...     advantages=torch.ones(1), mask=torch.tensor([[True, True]]),
    ... )
    >>> loss.backward()
    >>> weight.grad.shape
    torch.Size([4, 8])
    """
    layout = as_layout("fused_policy_loss", mask)
    if not isinstance(loss_fn, PolicyLoss):
        raise input_error(
            "fused_policy_loss", "loss_fn", expected="a PolicyLoss", got=repr(loss_fn),
            fix="pass PolicyLoss(correction=token_tis())",
        )
    unknown = torch.zeros((), device=layout.mask.device).expand(layout.mask.shape)
    batch = Batch(
        unknown, rollout_log_probs, per_token_advantages(advantages, layout), layout,
        old_log_probs, ref_log_probs, extra,
    )
    if torch.compiler.is_compiling() and vocabulary_group is None:
        # custom operators import sympy, a second that nobody else should wait for
        from iscorrect.head.node import Settings, log_probs_in_graph

        loss_fn.check("fused_policy_loss", batch, normalizer, gradient=("extra",))
        settings = Settings(
            temperature, softcap, None, head_dtype, vocabulary_size, compile_kernels
        )
        (log_probs,) = log_probs_in_graph(
            hidden, weight, bias, target, layout.mask, support, settings, spread=False
        )
        batch = Batch(
            log_probs, rollout_log_probs, batch.advantages, layout, old_log_probs, ref_log_probs,
            extra,
        )
        return loss_fn.evaluate(batch, normalizer)
    facts: dict[str, object] | InputError = {
        "old_log_probs": old_log_probs is not None,
        "loss_fn": re.sub(" at 0x[0-9a-f]+", "", repr(loss_fn)),  # functions print where they lie
    }
    try:
        loss_fn.check("fused_policy_loss", batch, normalizer, gradient=("extra",))
    except InputError as error:
        facts = error
    head, tokens = prepare(
        "fused_policy_loss", hidden=hidden, weight=weight, target=target, bias=bias,
        temperature=temperature, softcap=softcap, chunk_size=chunk_size, head_dtype=head_dtype,
        support=support, layout=layout, vocabulary_group=vocabulary_group,
        vocabulary_size=vocabulary_size, sequence_parallel=sequence_parallel,
        compile_kernels=compile_kernels, facts=facts,
    )
    inputs = (hidden, head.weight, head.bias, extra)
    wanted = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs]
    if any(wanted[:3]):
        made = in_one_pass(
            loss_fn, batch, head, tokens, normalizer=normalizer, chunk_size=chunk_size,
            wanted=wanted,
        )
        if made is not None:
            log_probs, ready = made
            constant = None if extra is None else extra.detach()
            loss, metrics = loss_fn.evaluate(
                batch._replace(log_probs=log_probs, extra=constant), normalizer
            )
            loss = giving_gradients_away(
                "fused_policy_loss", loss, *zip(inputs, ready, strict=True),
                scaled=kernels_for(head, head.wide(hidden)).scaled,
            )
            return LossOutput(loss, metrics)
    (log_probs,) = log_probs_of(head, tokens, default_step(head))
    return loss_fn.evaluate(batch._replace(log_probs=log_probs), normalizer)


def fp32_head_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    rollout_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | Layout,
    old_log_probs: Tensor | None = None,
    correction: Correction = uncorrected(),
    objective: Objective = CISPO(),
    aggregation: Name | Aggregation = "token-mean",
    normalizer: Normalizer | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocabulary_group: Group = None,
    vocabulary_size: int | None = None,
    sequence_parallel: bool = False,
) -> LossOutput:
    """Policy-gradient loss of log-probs from an LM head in float32, the rest staying in 16 bits.

        loss = aggregate(w · objective(log π)),  log π from z = h Wᵀ in float32

    A 16-bit head rounds each logit to 8 or 11 bits, which is most of what a 16-bit trainer and
    engine differ by. Its products are exact in float32, so nothing but the output need be wider.
    The engine's head has to be in float32 as well. Weights are 1 unless a correction is given for
    what the other layers leave.

    Args:
        hidden: "b t d", with gradient; t predicts ``target`` at t.
        weight: "v d", with gradient; tied to the embedding or not.
        target: int "b t".
        rollout_log_probs: "b t", log μ, nats, as the engine reported.
        advantages: "b t", or "b" for one per row.
        mask: bool "b t", or a layout.
        old_log_probs: "b t", log π_old, from a float32 head too. None: π itself.
        correction: gives w from π_old/μ.
        objective: callable (log_probs, old_log_probs, advantages, layout) -> loss "b t".
        aggregation: see :func:`aggregate`.
        normalizer: the whole batch's count, where this is a micro-batch.
        bias: "v", with gradient.
        temperature: τ > 0, the sampler's.
        softcap: c > 0, as in Gemma's final logits; None for none.
        vocabulary_group: the ranks that hold the other rows of the head (tensor parallelism).
        vocabulary_size: v, where the rows of the head are padded to more.
        sequence_parallel: ``hidden`` is "b t/R d", this rank's part of the tokens.

    Returns:
        loss "" and metrics; `mismatch/…` tells what is left.

    Raises:
        InputError: see :func:`fused_policy_loss`.

    References:
        MiniMax-M1 (arXiv 2506.13585, §3.2), whose objective is CISPO.

    >>> hidden = torch.zeros(1, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    >>> loss, metrics = fp32_head_loss(
    ...     hidden, torch.zeros(4, 8, dtype=torch.bfloat16), torch.tensor([[0, 1]]),
    ...     rollout_log_probs=torch.full((1, 2), -1.4), advantages=torch.ones(1),
    ...     mask=torch.tensor([[True, True]]),
    ... )
    >>> loss
    tensor(1.3863, grad_fn=<_GivingAwayBackward>)
    """
    loss_fn = PolicyLoss(correction=correction, objective=objective, aggregation=aggregation)
    return fused_policy_loss(
        loss_fn, hidden=hidden, weight=weight, target=target, rollout_log_probs=rollout_log_probs,
        advantages=advantages, mask=mask, old_log_probs=old_log_probs, normalizer=normalizer,
        bias=bias, temperature=temperature, softcap=softcap, head_dtype=torch.float32,
        vocabulary_group=vocabulary_group, vocabulary_size=vocabulary_size,
        sequence_parallel=sequence_parallel,
    )
