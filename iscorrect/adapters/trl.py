"""TRL: a mixin over ``GRPOTrainer`` that takes a correction or a whole loss of this library."""

from __future__ import annotations

import copy
import functools
import math
import types
import warnings
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iscorrect.adapters.bands import clamp_to
from iscorrect.dumps import DumpWriter
from iscorrect.errors import InputError, check_choice, check_flag, check_number, input_error
from iscorrect.fp16.arrival import Arrived, UpdateWatch, over_ranks
from iscorrect.head.fused import fused_policy_loss
from iscorrect.loop.coherence import GradientSketch, coherence
from iscorrect.loop.monitor import Monitor
from iscorrect.loss.aggregate import SequenceMeanTokenSum, TokenMean
from iscorrect.loss.bounds import Mask
from iscorrect.loss.correction import Correction
from iscorrect.loss.metrics import Metrics, merge
from iscorrect.loss.policy_loss import PolicyLoss
from iscorrect.loss.presets import uncorrected
from iscorrect.loss.ratios import Level
from iscorrect.loss.specs import CorrectionConfig, LossConfig, parse, parse_loss

MULTIMODAL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes",
    "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)

IDLE_IN_POLICY_LOSS = {
    "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
    "_entropy_bonus_enabled": False, "aux_loss_enabled": False,
}
"""What of TRL's own loss a PolicyLoss stands for, and the value at which it is off."""

NOTED = ("_metrics", "entropy_coef", "_last_world_entropy", "_entropy_window_stats")
"""What TRL's loss changes of the trainer."""

LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class CorrectedGRPO:
    """Mixin over ``trl.GRPOTrainer``: ``class Trainer(CorrectedGRPO, GRPOTrainer)``.

    A correction's weights multiply TRL's loss in the place of TRL's own; tokens of weight 0 stay in
    its denominators. Without vLLM, log-probs come from a ``rollout_func`` that returns them, and
    the weights multiply the advantages.

    Args:
        correction: or its text; in the place of ``vllm_importance_sampling_mode``.
        policy_loss: or its text; in the place of ``loss_type`` and everything else that TRL's loss
            is made of. Exactly one of the two.
        fused: let :func:`fused_policy_loss` make the policy_loss and its gradients in the forward
            pass. One process or DDP, a text model without adapters, a float32 head.
        dumps: writes the log-probs of every generation, a file each.
        engine_dtype: that the engine holds its weights in; the log then has ``weights/arrival``,
            the share of the updates since the last send that is left in it, and
            ``weights/unchanged``, the share of the entries that were updated and sent as before,
            both from a sample of 2²⁰ entries a rank (:func:`iscorrect.weight_arrival`).
        coherence: of how many of the last optimizer steps, at least eight, gradients without and
            with weights are compared, on the first micro-batch of a rank; 0: none. The log then has
            ``gradient/n_star``, the sequences in a batch from which on the uncorrected gradient is
            more biased than noisy (:func:`iscorrect.coherence`), where it can be told, and
            ``gradient/n_star/low``, the least that they allow. Two more forward and backward passes
            of a micro-batch a step, and 64 kB. One process or DDP; vLLM or a policy_loss.

    Raises:
        InputError: neither or both were given; a setting of TRL would be ignored or count twice.
    """

    args: Any
    accelerator: Any
    model: Any
    state: Any
    _metrics: Any

    def __init__(
        self,
        *args: Any,
        correction: CorrectionConfig | None = None,
        policy_loss: LossConfig | None = None,
        fused: bool = False,
        dumps: DumpWriter | None = None,
        engine_dtype: torch.dtype | None = None,
        coherence: int = 0,
        **kwargs: Any,
    ) -> None:
        check_flag("CorrectedGRPO", "fused", fused)
        check_number(
            "CorrectedGRPO", "coherence", coherence, "a number of steps", least=0, whole=True,
            fix="pass coherence=100, or leave it at 0",
        )
        super().__init__(*args, **kwargs)
        self.correction = None if correction is None else parse(correction)
        self.policy_loss = None if policy_loss is None else parse_loss(policy_loss)
        self.dumps = dumps
        self.fused = fused
        self._seen: dict[str, list[Metrics]] = {"train": [], "eval": []}
        self._watch = UpdateWatch(engine_dtype) if engine_dtype is not None else None
        self._arrived = Arrived("sample")
        self._pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=coherence)
        self._compared = -1
        self._check_settings()
        if coherence:
            self._check_coherence()
        if fused:
            self._check_fused()
            _add_loss(self.model)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if self._watch is not None:
            self._arrived += self._watch(p for p in self.model.parameters() if p.requires_grad)
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        rollout = batch.get("sampling_per_token_logps")
        if rollout is None:
            raise _refusal(
                "rollout_func", "given and returning logprobs where use_vllm=False", "None",
                "set use_vllm=True, or return logprobs from rollout_func",
            )
        mask, advantages = _mask(batch), batch["advantages"]
        advantages = advantages.view(len(mask), -1).expand(mask.shape)
        old = batch.get("old_per_token_logps")
        if old is None and (self.correction or self.dumps):
            with torch.no_grad():
                old = self._log_probs(self.model, batch, self.args.per_device_train_batch_size)
        if self.dumps is not None and self._mode() == "train":
            self.dumps.write(
                step=self.state.global_step, mask=mask, rollout_log_probs=rollout,
                old_log_probs=old, advantages=advantages, token_ids=batch["completion_ids"],
            )
        for statistic in ("min", "mean", "max"):  # of weights that are not applied
            self._metrics[self._mode()].pop(f"sampling/importance_sampling_ratio/{statistic}", None)
        if self.correction is not None and old is not None:
            weights, _, metrics = self.correction(
                old_log_probs=old, rollout_log_probs=rollout, mask=mask, advantages=advantages
            )
            self._seen[self._mode()].append(metrics)
            if self.args.use_vllm:
                # TRL's VESPO takes the logarithm of padding too
                batch["importance_sampling_ratio"] = torch.where(mask, weights, 1)
            else:
                batch["advantages"] = advantages * weights
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        # micro-batches of one step may hold answers to the same prompt, and are not independent
        if self._pairs.maxlen and self.model.training and self._compared != self.state.global_step:
            self._compared = self.state.global_step
            self._compare_gradients(inputs)
        if self.policy_loss is None:
            return super()._compute_loss(model, inputs)  # type: ignore[misc, no-any-return]
        batch = self._batch(inputs, self.policy_loss)
        if self.fused:
            return self._fused_loss(model, inputs, batch)
        loss, metrics = self.policy_loss(self._log_probs(model, inputs), **batch)
        self._seen[self._mode()].append(metrics)
        return loss

    def _batch(self, inputs: dict[str, Any], policy_loss: PolicyLoss) -> dict[str, Any]:
        """What a policy loss is given beside log-probs."""
        return {
            "rollout_log_probs": inputs["sampling_per_token_logps"],
            "old_log_probs": inputs.get("old_per_token_logps"), "advantages": inputs["advantages"],
            "ref_log_probs": inputs.get("ref_per_token_logps"), "mask": _mask(inputs),
            "normalizer": self._normalizer(policy_loss.aggregation, inputs),
        }

    def _compare_gradients(self, inputs: dict[str, Any]) -> None:
        """Sketch the gradients of a micro-batch without and with weights."""
        model = self.accelerator.unwrap_model(self.model)  # DDP waits for a backward
        parameters = [p for p in model.parameters() if p.requires_grad]
        sketch = GradientSketch()
        noted = {x: copy.deepcopy(getattr(self, x)) for x in NOTED if hasattr(self, x)}
        try:
            plain, corrected = (
                sketch(torch.autograd.grad(loss(model, inputs), parameters, allow_unused=True))
                .cpu() for loss in (self._plain_loss, self._own_loss)
            )
        finally:
            for name, value in noted.items():
                setattr(self, name, value)
        if bool((plain * corrected).isfinite().all()):  # one that overflowed says nothing
            self._pairs.append((plain, corrected))

    def _plain_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.policy_loss is None:
            ones = torch.ones_like(inputs["importance_sampling_ratio"])
            return super()._compute_loss(  # type: ignore[misc, no-any-return]
                model, inputs | {"importance_sampling_ratio": ones}
            )
        loss = replace(self.policy_loss, correction=uncorrected())
        return loss(self._log_probs(model, inputs), **self._batch(inputs, loss)).loss

    def _own_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.policy_loss is None:
            return super()._compute_loss(model, inputs)  # type: ignore[misc, no-any-return]
        loss = self.policy_loss
        return loss(self._log_probs(model, inputs), **self._batch(inputs, loss)).loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with the metrics of all ranks since the last one."""
        mode = self._mode()
        if self._seen[mode]:
            metrics = merge(self._seen[mode])
            if dist.is_available():
                metrics = metrics.all_reduced(dist.group.WORLD)
            prefix = "eval_" if mode == "eval" else ""
            logs.update({prefix + name: x for name, x in metrics.to_floats().items()})
            self._seen[mode].clear()
        if mode == "train" and len(self._pairs) >= FEWEST_PAIRS:
            logs.update(_n_star(self._pairs, self.args.per_device_train_batch_size))
        if self._watch is not None and mode == "train":
            found = over_ranks(self._arrived, self.accelerator.device)
            self._arrived = Arrived("sample")
            if found.moved:
                logs |= {"weights/arrival": found.share, "weights/unchanged": found.unchanged}
        super().log(logs, start_time)  # type: ignore[misc]

    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _log_probs(self, model: Any, batch: dict[str, Any], rows: int | None = None) -> Tensor:
        log_probs: Tensor = self._get_per_token_logps_and_entropies(  # type: ignore[attr-defined]
            model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1], batch_size=rows,
            **{name: batch[name] for name in MULTIMODAL if name in batch},
        )[0]
        return log_probs

    def _fused_loss(self, model: Any, inputs: dict[str, Any], batch: dict[str, Any]) -> Tensor:
        target = inputs["completion_ids"]

        def loss_of(hidden: Tensor, head: nn.Linear) -> Tensor:
            assert self.policy_loss is not None
            loss, metrics = fused_policy_loss(
                self.policy_loss, hidden=hidden[:, -target.shape[1] - 1 : -1], weight=head.weight,
                bias=head.bias, target=target, temperature=self.args.temperature,
                softcap=getattr(self.model.config, "final_logit_softcapping", None), **batch,
            )
            self._seen[self._mode()].append(metrics)
            return loss

        with self.accelerator.autocast():
            loss: Tensor = model(
                input_ids=torch.cat([inputs["prompt_ids"], target], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                loss_of=loss_of,
            )
        return loss

    def _normalizer(self, aggregation: Any, inputs: dict[str, Any]) -> Tensor | float | None:
        """The whole optimizer step's denominator; gradients are averaged over ranks."""
        if not isinstance(aggregation, (TokenMean, SequenceMeanTokenSum)):
            return None
        train = self._mode() == "train"
        steps = self.current_gradient_accumulation_steps if train else 1  # type: ignore[attr-defined]
        if not isinstance(aggregation, TokenMean):
            return float(len(inputs["completion_mask"]) * steps)
        share = int(steps) / int(self.args.steps_per_generation) if train else 1
        tokens: Tensor = inputs["num_items_in_batch"].clamp(min=1)
        return tokens / int(self.accelerator.num_processes) * share

    def _check_settings(self) -> None:
        args = self.args
        if (self.correction is None) == (self.policy_loss is None):
            raise _refusal(
                "correction, policy_loss", "exactly one of the two",
                "both" if self.correction else "neither", "pass correction=token_tis()",
            )
        if self.policy_loss is not None:
            for name, off in IDLE_IN_POLICY_LOSS.items():
                if getattr(self, name) != off:
                    raise _refusal(
                        name.strip("_"), f"{off} with a policy_loss, which does not apply it",
                        repr(getattr(self, name)), "turn it off, or pass correction= alone",
                    )
            penalty = self.policy_loss.reference_kl
            if args.beta != (penalty.coefficient if penalty else 0):
                raise _refusal(
                    "beta", "the coefficient of the policy_loss's reference_kl, 0 without one",
                    repr(args.beta), "pass reference_kl=ReferenceKL(coefficient=beta)",
                )
            if args.beta and args.use_bias_correction_kl:
                raise _refusal(
                    "use_bias_correction_kl", "False with a policy_loss, which does not apply it",
                    "True", "set use_bias_correction_kl=False",
                )
        elif args.use_vllm and not args.vllm_importance_sampling_correction:
            raise _refusal(
                "vllm_importance_sampling_correction",
                "True: TRL multiplies weights, which the correction replaces, only then", "False",
                "leave it at its default; pass correction=uncorrected() for weights of 1",
            )
        elif args.loss_type == "vespo" and not (
            args.use_vllm and self.correction is not None and self.correction.level == "token"
        ):
            raise _refusal(
                "loss_type", "another than 'vespo', which multiplies token weights by itself",
                "'vespo' with weights of another level, or without vLLM", "set loss_type='dapo'",
            )
        if self._watch is not None and hasattr(self.model, "peft_config"):
            raise _refusal(
                "engine_dtype", "None with adapters, which are merged before they are sent",
                "a dtype", "leave it out",
            )
        if args.top_p < 1 or args.top_k > 0 or args.min_p:
            warnings.warn(
                "top_p, top_k or min_p cut the rollout's distribution: every ratio is then off by"
                " the mass that was cut. Sample with top_p=1.0, top_k=0, min_p=None.",
                stacklevel=3,
            )

    def _check_coherence(self) -> None:
        """Raise where gradients without and with weights cannot be compared."""
        steps = self._pairs.maxlen or 0
        if steps < FEWEST_PAIRS:
            raise _refusal(
                "coherence", f"0, or at least {FEWEST_PAIRS} steps", str(steps),
                "pass coherence=100, which gives n* to a tenth or so",
            )
        if self.policy_loss is None and not self.args.use_vllm:
            raise _refusal(
                "coherence", "0 with a correction without vLLM: its weights are in the advantages",
                str(steps), "pass policy_loss=, or leave coherence at 0",
            )
        checkpointing = self.args.gradient_checkpointing_kwargs or {}
        if self.args.gradient_checkpointing and checkpointing.get("use_reentrant"):
            raise _refusal(
                "gradient_checkpointing_kwargs",
                "without use_reentrant=True with coherence, which asks for gradients apart",
                repr(checkpointing), "set gradient_checkpointing_kwargs={'use_reentrant': False}",
            )
        how = self.accelerator.distributed_type
        if how not in ("NO", "MULTI_CPU", "MULTI_GPU") or self.args.n_gpu > 1:
            raise _refusal(
                "distributed_type", "one process or DDP with coherence, for whole gradients",
                f"{how} with n_gpu={self.args.n_gpu}", "leave coherence at 0",
            )

    def _check_fused(self) -> None:
        """Raise where the fused loss would be another loss than TRL's log-probs give."""
        if self.policy_loss is None:
            raise _refusal(
                "fused", "False without a policy_loss: TRL's loss takes log-probs", "True",
                "pass policy_loss=, or leave fused at False",
            )
        config, head = self.model.config, self.model.get_output_embeddings()
        if hasattr(self.model, "peft_config") or type(head) is not nn.Linear:
            raise _refusal(
                "model", "one without adapters whose head is a plain Linear, with fused=True",
                f"{type(self.model).__name__} with {type(head).__name__}", "set fused=False",
            )
        if getattr(self.model.forward, "__self__", None) is not self.model:
            raise _refusal(
                "model", "one whose forward is a method of its own, with fused=True",
                f"{type(self.model).__name__} with {self.model.forward!r}", "set fused=False",
            )
        if config.get_text_config() is not config:
            raise _refusal(
                "model", "a text model with fused=True, which passes on nothing but tokens",
                type(self.model).__name__, "set fused=False",
            )
        for name in LOGIT_SCALES:
            if getattr(config, name, None) not in (None, 1):
                raise _refusal(
                    name, "1 with fused=True, which does not apply it",
                    repr(getattr(config, name)), "set fused=False",
                )
        how = self.accelerator.distributed_type
        if how not in ("NO", "MULTI_CPU", "MULTI_GPU") or self.args.n_gpu > 1:
            raise _refusal(
                "distributed_type", "one process or DDP with fused=True",
                f"{how} with n_gpu={self.args.n_gpu}", "set fused=False, or launch one per GPU",
            )
        if self.args.torch_compile:
            raise _refusal(
                "torch_compile", "False with fused=True, which runs the backbone alone", "True",
                "set torch_compile=False",
            )
        wide = self.accelerator.mixed_precision == "no" and head.weight.dtype == torch.float32
        if not (wide or self.args.cast_lm_head_to_fp32):
            raise _refusal(
                "cast_lm_head_to_fp32",
                "True with fused=True in 16 bits: its head is float32, and the old policy's is not",
                "False", "set cast_lm_head_to_fp32=True",
            )


FEWEST_PAIRS = 8
"""Steps before n* is told."""


def _n_star(pairs: Iterable[tuple[Tensor, Tensor]], sequences: int) -> dict[str, float]:
    plain, corrected = (torch.stack(each) for each in zip(*pairs, strict=True))
    found = coherence(plain, corrected, sequences=sequences)
    told = {"gradient/n_star": found.n_star, "gradient/n_star/low": found.low}
    return {name: x for name, x in told.items() if math.isfinite(x)}


def _add_loss(model: Any) -> None:
    """Let ``model(…, loss_of=f)`` return f(hidden, head).

    Whatever wraps the model, DDP above all, must see the loss as its output.
    """
    forward = model.forward.__func__

    @functools.wraps(forward)  # generate looks at the signature
    def forward_or_loss(self: Any, *args: Any, loss_of: Any = None, **kwargs: Any) -> Any:
        if loss_of is None:
            return forward(self, *args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        return loss_of(hidden, self.get_output_embeddings())

    model.forward = types.MethodType(forward_or_loss, model)  # a copy's is bound to the copy


def _mask(batch: dict[str, Any]) -> Tensor:
    mask: Tensor = batch["completion_mask"].bool()
    return mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask


def _refusal(argument: str, expected: str, got: str, fix: str) -> InputError:
    return input_error("CorrectedGRPO", argument, expected=expected, got=got, fix=fix)


def monitor_callback(monitor: Monitor) -> Any:
    """A callback for any trainer of transformers, which shows a monitor what the trainer logs.

    It sees what :class:`CorrectedGRPO` logs, of all ranks, on the first of them; a run that goes on
    from a checkpoint begins with what it had logged, without a second alarm. A watched metric that
    is not what a monitor takes is warned about once and ends nothing.

    Args:
        monitor: says what to do on an alarm.

    Returns:
        A ``transformers.TrainerCallback``: ``trainer.add_callback(monitor_callback(Monitor()))``.
    """
    from transformers import TrainerCallback

    class MonitorCallback(TrainerCallback):  # type: ignore[misc]
        seen = -1

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            notify, monitor.notify = monitor.notify, ()
            try:
                for logs in state.log_history:
                    if logs.get("step", -1) > self.seen:
                        self._show(state, logs["step"], logs)
            finally:
                monitor.notify = notify

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
        ) -> None:
            self._show(state, state.global_step, logs or {})

        def _show(self, state: Any, step: int, logs: dict[str, Any]) -> None:
            self.seen = max(self.seen, step)
            if not state.is_world_process_zero:
                return
            others = {name: x for name, x in logs.items() if name not in monitor.watch}
            for name in [name for name in monitor.watch if name in logs]:
                try:
                    monitor.update(step, others | {name: logs[name]})
                except InputError as error:
                    warnings.warn(f"{name} is not watched: {error}", stacklevel=2)
                    del monitor.watch[name]

    return MonitorCallback()


TRLMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def from_trl(
    mode: TRLMode = "sequence_mask",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
) -> Correction:
    """TRL's ``vllm_importance_sampling_mode``, ``_clip_max`` and ``_clip_min``.

    A missing log-prob has ratio 1, as in TRL.

    Args:
        mode: TRL's default is "sequence_mask".
        clip_max: None for no upper bound.
        clip_min: None for no lower bound.

    Raises:
        InputError: an unknown mode.

    >>> from_trl("token_truncate", clip_max=2.0).bound
    Truncate(cap=2.0)
    """
    check_choice("from_trl", "mode", mode, get_args(TRLMode))
    level: Level = "token" if mode.startswith("token") else "sequence"
    masks = mode.endswith("mask")
    bound = Mask(clip_min or 0.0, clip_max) if masks else clamp_to(clip_min, clip_max)
    return Correction(level=level, bound=bound, nonfinite="neutral")
