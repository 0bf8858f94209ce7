"""A whole reinforcement-learning loop on one screen: an engine in BF16, a trainer in float32.

The task: write eight digits in rising order. Run it with `python examples/minimal_loop.py`.
"""

import argparse
import copy

import torch
from torch import Tensor, nn

import iscorrect

DIGITS, LENGTH, START = 10, 8, 10


class Policy(nn.Module):
    """A recurrent language model over digits."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(DIGITS + 1, width)
        self.cell = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, DIGITS)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden, state = self.cell(self.embed(tokens), state)
        return self.head(hidden), state


@torch.no_grad()
def rollout(engine: Policy, n: int) -> tuple[Tensor, Tensor]:
    """What an inference engine does: sample token by token, and report log-probs."""
    token, state = torch.full((n, 1), START), None
    tokens, log_probs = [], []
    for _ in range(LENGTH):
        logits, state = engine(token, state)
        every = logits[:, -1].float().log_softmax(-1)
        token = torch.multinomial(every.exp(), 1)
        tokens.append(token)
        log_probs.append(every.gather(-1, token))
    return torch.cat(tokens, 1), torch.cat(log_probs, 1)


def reward(tokens: Tensor) -> Tensor:
    return (tokens.diff(dim=-1) > 0).float().mean(-1)


def main(steps: int, prompts: int, group: int) -> list[float]:
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    loss_fn = iscorrect.PolicyLoss(
        correction=iscorrect.token_tis(cap=2.0), aggregation="seq-mean-token-sum"
    )
    rewards = []
    for step in range(steps):
        engine = copy.deepcopy(policy).to(torch.bfloat16)  # the weight synchronisation
        tokens, rollout_log_probs = rollout(engine, prompts * group)
        r = reward(tokens)
        advantages = iscorrect.group_advantages(
            r, torch.arange(prompts).repeat_interleave(group), estimator="rloo"
        )

        previous = torch.cat([torch.full_like(tokens[:, :1], START), tokens[:, :-1]], 1)
        log_probs = iscorrect.log_probs_from_logits(policy(previous)[0], tokens)
        loss, metrics = loss_fn(
            log_probs, rollout_log_probs=rollout_log_probs, advantages=advantages,
            mask=torch.ones_like(tokens, dtype=torch.bool),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        rewards.append(r.mean().item())
        if step % 20 == 0 or step == steps - 1:
            m = metrics.to_floats()
            print(
                f"step {step:3d}  reward {rewards[-1]:.3f}  KL {m['mismatch/kl_k3']:.1e}"
                f"  largest weight {m['is/weight/max']:.2f}  ESS {m['is/ess']:.3f}"
            )
    return rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=121)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=16)
    main(**vars(parser.parse_args()))
