"""Writes what verl gives the policy loss "iscorrect_ppo", and what it sends to its engine.

Imported after what registers the loss.
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
    state = engine.optimizer.state
    own = {name: w.detach().full_tensor() for name, w in engine.module.named_parameters()}
    masters = {
        name: own[name] + (state[w]["rest"].full_tensor() if "rest" in state[w] else 0)
        for name, w in engine.module.named_parameters()
    }
    found = dict.fromkeys(("entries", "off_grid", "not_own", "not_nearest"), 0) | {"farthest": 0.0}
    for name, given in weights:
        sent, master = given.float(), masters[name]
        found["entries"] += sent.numel()
        found["off_grid"] += int((sent != sent.bfloat16().float()).sum())
        found["not_own"] += int((sent != own[name]).sum())
        found["not_nearest"] += int((sent != master.bfloat16().float()).sum())
        farthest = ((sent - master).abs() / master.abs().clamp(min=1e-30)).max().item()
        found["farthest"] = max(found["farthest"], farthest)
        yield name, given
    Path(f"sent_{os.getpid()}_{next(sends):03d}.json").write_text(json.dumps(found))


def sent(self, *args, **kwargs):
    weights, adapter = send(self, *args, **kwargs)
    return compared(self, weights), adapter


FSDPEngine.get_per_tensor_param = sent
