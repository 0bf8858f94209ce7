"""A small but whole policy-gradient trainer on FSDP2, with context parallelism for head and loss.

    torchrun --nproc-per-node 4 examples/train_fsdp2.py --cp 2 --steps 40 --checkpoint checkpoints

Parameters are sharded over all ranks. Prompts are spread over the data-parallel ranks; the ranks of
a context-parallel group run the body on the same sequences and share their tokens at the head,
where the vocabulary makes a token expensive. Losses, gradients and metrics are the same however the
ranks are arranged: one process prints the same numbers, to rounding, until a rounding changes a
sampled token. gloo on CPUs, NCCL on GPUs.

The task: write digits in rising order. The engine is the same model in BF16.
"""

import argparse
import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

import iscorrect
from iscorrect import Layout

DIGITS, START, LENGTH = 10, 10, 12


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x = x + self.attention(y, y, y, attn_mask=future, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class Policy(nn.Module):
    """A decoder-only transformer; calling it gives log-probs of some columns of the target."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(DIGITS + 1, width)
        self.position = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, DIGITS, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens: Tensor, target: Tensor, columns: slice) -> Tensor:
        hidden = self.hidden(tokens)[:, columns]
        return iscorrect.linear_log_probs(hidden, self.head.weight, target[:, columns])


@torch.no_grad()
def rollout(engine: Policy, prompts: range, group: int, step: int) -> tuple[Tensor, Tensor]:
    """What the engine samples for some prompts; random numbers belong to the prompt."""
    device = engine.head.weight.device
    samples = []
    for prompt in prompts:
        generator = torch.Generator(device).manual_seed(1000 * step + prompt)
        tokens = torch.full((group, 1), START, device=device)
        log_probs = []
        for _ in range(LENGTH):
            every = engine.head(engine.hidden(tokens)[:, -1]).float().log_softmax(-1)
            chosen = torch.multinomial(every.exp(), 1, generator=generator)
            tokens = torch.cat([tokens, chosen], 1)
            log_probs.append(every.gather(-1, chosen))
        samples.append((tokens, torch.cat(log_probs, 1)))
    tokens, log_probs = (torch.cat(x) for x in zip(*samples, strict=True))
    return tokens, log_probs


def reward(tokens: Tensor) -> Tensor:
    return (tokens.diff(dim=-1) > 0).float().mean(-1)


def train(options: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    shape = (dist.get_world_size() // options.cp, options.cp)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "cp"))
    dp, cp = mesh["dp"], mesh["cp"]

    torch.manual_seed(0)
    policy = Policy().to(device)
    engine = copy.deepcopy(policy).to(torch.bfloat16)
    everyone = mesh._flatten("all")
    for block in policy.blocks:
        fully_shard(block, mesh=everyone)
    fully_shard(policy, mesh=everyone)
    # Some gradients are zero but for rounding, which a small eps would turn into steps.
    optimizer = torch.optim.Adam(policy.parameters(), lr=options.lr, eps=1e-5)
    first = resume(policy, optimizer, options.checkpoint)

    share = options.prompts // dp.size()
    prompts = range(dp.get_local_rank() * share, (dp.get_local_rank() + 1) * share)
    group_ids = torch.arange(share, device=device).repeat_interleave(options.group)
    width = LENGTH // cp.size()
    columns = slice(cp.get_local_rank() * width, (cp.get_local_rank() + 1) * width)
    loss_fn = iscorrect.PolicyLoss(
        correction=iscorrect.sequence_tis(cap=2.0), aggregation="seq-mean-token-sum"
    )
    for step in range(first, options.steps):
        synchronise(policy, engine)
        tokens, rollout_log_probs = rollout(engine, prompts, options.group, step)
        rewards = reward(tokens[:, 1:])
        advantages = iscorrect.group_advantages(rewards, group_ids, estimator="rloo")

        log_probs = policy(tokens[:, :-1], tokens[:, 1:], columns)
        layout = Layout(
            torch.ones_like(log_probs, dtype=torch.bool),
            sequence_group=cp.get_group() if cp.size() > 1 else None,
        )
        loss, metrics = loss_fn(
            log_probs, rollout_log_probs=rollout_log_probs[:, columns], advantages=advantages,
            mask=layout, normalizer=iscorrect.global_normalizer(
                layout, "seq-mean-token-sum", group=dist.group.WORLD, gradients="averaged"
            ),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, loss, rewards, metrics)
        if (step + 1) % options.save_every == 0:
            save(policy, optimizer, step + 1, options.checkpoint)
    dist.destroy_process_group()


def synchronise(policy: nn.Module, engine: nn.Module) -> None:
    """The trainer's weights to the engine, in the engine's precision."""
    whole = StateDictOptions(full_state_dict=True)
    engine.load_state_dict(get_model_state_dict(policy, options=whole))


def report(step: int, loss: Tensor, rewards: Tensor, metrics: iscorrect.Metrics) -> None:
    """Print what all ranks together saw."""
    means = torch.stack([loss.detach(), rewards.mean()])
    dist.all_reduce(means)
    loss_mean, reward_mean = (means / dist.get_world_size()).tolist()
    m = metrics.all_reduced(dist.group.WORLD).to_floats()
    if dist.get_rank() == 0:
        print(
            f"step {step:3d}  loss {loss_mean:+.6f}  reward {reward_mean:.4f}"
            f"  KL {m['mismatch/kl_k3']:.2e}  ESS {m['is/ess']:.4f}", flush=True,
        )


def save(policy: nn.Module, optimizer: Optimizer, step: int, folder: Path | None) -> None:
    if folder is not None:
        model, optim = get_state_dict(policy, optimizer)
        dcp.save({"model": model, "optim": optim, "step": step}, checkpoint_id=folder)


def resume(policy: nn.Module, optimizer: Optimizer, folder: Path | None) -> int:
    """The step to go on with; 0 without a checkpoint."""
    if folder is None or not (folder / ".metadata").exists():
        return 0
    model, optim = get_state_dict(policy, optimizer)
    state = {"model": model, "optim": optim, "step": 0}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
    return int(state["step"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=__doc__)
    parser.add_argument("--cp", type=int, default=1, help="ranks that share a sequence")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=8, help="over all data-parallel ranks")
    parser.add_argument("--group", type=int, default=16, help="answers to a prompt")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--checkpoint", type=Path, help="folder to save to and resume from")
    parser.add_argument("--save-every", type=int, default=10)
    train(parser.parse_args())
    # FSDP2 keeps gloo's threads. One that only now lets go of its last tensor would abort an
    # interpreter that is shutting down, so there is nothing left to shut down.
    os._exit(0)
