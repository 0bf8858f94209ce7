"""What the trainers that are on no package index do around a loss, as strictly as they do it.

Each fake is written from the source at the commit it names. The contracts in contracts.py run on
the fakes in every test run, and on a checkout of the trainer with checkouts.py.
"""

import enum
import sys
import types
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.nn

COMMITS = {
    "slime": "624b824a8, 2026-08-21",
    "miles": "31f1ca961, 2026-08-21",
    "prime-rl": "559b44772, 2026-08-21",
    "NeMo-RL": "7ea279abf, 2026-08-22",
}


def module(name, **contents):
    """Put a module into ``sys.modules``, with packages above it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if path not in sys.modules:
            sys.modules[path] = types.ModuleType(path)
            sys.modules[path].__path__ = []
        if i > 1:
            setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], sys.modules[path])
    made = sys.modules[name]
    for key, value in contents.items():
        setattr(made, key, value)
    return made


class ContextParallel:
    """slime/backends/megatron_utils/cp_utils.py, miles/backends/training_utils/cp_utils.py.

    A sequence is cut into 2R chunks, of which rank r holds the r-th and the r-th last. The log-prob
    of a token lies where the token before it lies.
    """

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def _held(self, total_length, response_length, qkv_format="thd", max_seq_len=None):
        length = total_length if qkv_format == "thd" else max_seq_len
        chunk = -(-length // (2 * self.size))
        positions = torch.arange(total_length - response_length - 1, total_length - 1)
        which = positions // chunk
        return torch.minimum(which, 2 * self.size - 1 - which) == self.rank

    def slice_log_prob_with_cp(self, log_prob, *where):
        assert len(log_prob) == where[1]
        return log_prob if self.size == 1 else log_prob[self._held(*where)]

    def all_gather_with_cp(self, tensor, *where):
        """A collective, whose result requires grad whether its argument does or not."""
        if self.size == 1:
            return tensor
        held = self._held(*where)
        assert len(tensor) == held.sum()
        whole = torch.zeros(where[1], dtype=tensor.dtype, requires_grad=True)
        whole = whole.masked_scatter(held, tensor)
        return dist.nn.all_reduce(whole)


def slime(rank=0, size=1):
    helpers = ContextParallel(rank, size)
    module("megatron.core.mpu", get_context_parallel_world_size=lambda: size)
    module(
        "slime.backends.megatron_utils.cp_utils", all_gather_with_cp=helpers.all_gather_with_cp,
        slice_log_prob_with_cp=helpers.slice_log_prob_with_cp,
    )
    return SimpleNamespace(helpers=helpers, more={})


def miles(rank=0, size=1):
    helpers = ContextParallel(rank, size)
    module(
        "miles.backends.training_utils.cp_utils", all_gather_with_cp=helpers.all_gather_with_cp,
        slice_log_prob_with_cp=helpers.slice_log_prob_with_cp,
    )
    state = SimpleNamespace(cp=SimpleNamespace(size=size, rank=rank))
    return SimpleNamespace(helpers=helpers, more={"parallel_state": state, "max_seq_lens": None})


@dataclass
class LossInputs:
    """prime_rl/trainer/rl/loss.py."""

    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = field(default=None)


@dataclass
class ReplayedInputs(LossInputs):
    """The same of a later commit, of no known date."""

    trainer_mask_logprobs: torch.Tensor | None = field(default=None)
    inference_mask_logprobs: torch.Tensor | None = field(default=None)


@dataclass
class LossOutputs:
    """prime_rl/trainer/rl/loss.py."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def prime_rl():
    """Its loop over the samples of a micro-batch, and how it joins their metrics."""

    def compute_loss(current, rollout, advantages, masks, weights, loss_fn, scale):
        total, metrics = current[0].sum() * 0.0, {}
        for i, log_probs in enumerate(current):
            weight = None if weights is None else weights[i]
            mask = masks[i] if weight is None else masks[i] & (weight != 0)
            if weight is not None and not mask.any():
                continue
            out = loss_fn(LossInputs(log_probs, rollout[i], None, advantages[i], mask, weight))
            total = total + out.loss
            for name, value in out.metrics.items():
                metrics.setdefault(name, []).append(value)
        join = {name: torch.stack if x[0].ndim == 0 else torch.cat for name, x in metrics.items()}
        return total / scale, {name: join[name](x) for name, x in metrics.items()}

    module("prime_rl.trainer.rl.loss", LossInputs=LossInputs, LossOutputs=LossOutputs)

    def custom(kwargs):
        from iscorrect.adapters.prime_rl import loss

        return lambda inputs: loss(inputs, **kwargs)

    return SimpleNamespace(compute_loss=compute_loss, custom=custom, own=None)


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class MetricNormalizer(enum.Enum):
    TOKENS = "tokens"
    SEQUENCES = "sequences"
    NONE = "none"


class LossInputType(enum.Enum):
    LOGIT = "logit"
    LOGPROB = "logprob"


def nemo_rl():
    interfaces = module(
        "nemo_rl.algorithms.loss.interfaces", LossType=LossType, LossInputType=LossInputType,
        MetricNormalizer=MetricNormalizer,
    )
    return SimpleNamespace(interfaces=interfaces, own=None)
