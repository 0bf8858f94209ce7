"""Writes what verl gives the policy loss "iscorrect_ppo", and what it sends to its engine.

Imported after what registers the loss and rounds the weights.
"""

import itertools
import json
import os
from pathlib import Path

import torch
from verl.trainer.ppo import core_algos
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

ours, calls = core_algos.POLICY_LOSS_REGISTRY["iscorrect_ppo"], itertools.count()


def recorded(**given):
    names = ("response_mask", "advantages", "rollout_is_weights")
    torch.save({n: given[n] for n in names}, f"loss_{os.getpid()}_{next(calls):03d}.pt")
    return ours(**given)


core_algos.POLICY_LOSS_REGISTRY["iscorrect_ppo"] = recorded

send, sends = FSDPEngine.get_per_tensor_param, itertools.count()


def compared(engine, weights):
    """The weights, with how they differ from the trainer's written down once all have passed."""
    masters = {name: getattr(x, "full_tensor", lambda x=x: x)()
               for name, x in engine.module.state_dict().items()}
    dtypes, differ, farthest = set(), 0, 0.0
    for name, sent in weights:
        w = masters[name].detach()
        dtypes.add(str(sent.dtype))
        differ += int((sent.float() != w.bfloat16().float()).sum())
        farthest = max(farthest, ((sent.float() - w).abs() / w.abs().clamp(min=1e-30)).max().item())
        yield name, sent
    found = {"dtypes": sorted(dtypes), "differ": differ, "farthest": farthest}
    Path(f"sent_{os.getpid()}_{next(sends):03d}.json").write_text(json.dumps(found))


def sent(self, *args, **kwargs):
    weights, adapter = send(self, *args, **kwargs)
    return compared(self, weights), adapter


FSDPEngine.get_per_tensor_param = sent
