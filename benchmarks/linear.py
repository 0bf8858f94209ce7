"""From hidden states to the gradients of hidden states and head: loss and backward, timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Setting, Workload, interleave, processor, summary
from iscorrect import PolicyLoss, sequence_is, token_tis
from iscorrect.head.fused import fused_policy_loss
from iscorrect.head.linear import linear_log_probs

CAP = 2.0
TOKEN_TIS = PolicyLoss(correction=token_tis(CAP))


@dataclass(frozen=True)
class Problem:
    """Tokens, in rows that are sequences, and a head."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    rollout_log_probs: Tensor
    advantages: Tensor
    mask: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight


def run(setting: Setting) -> Iterator[Workload]:
    setting = replace(setting, rounds=min(setting.rounds, 5))
    size = {"v": 512, "d": 64} if setting.small else {"v": 32768, "d": 1024}
    n = 64 if setting.small else 1024
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        units = processor(setting.device)
        if dtype == torch.float16 and "avx2" in units and "fp16" not in units:
            workload = Workload(
                name, "This processor emulates float16 products, for which see *emulated*."
            )
            workload.add("every provider", **{"wall, ms": "not timed on this processor"})
            yield workload
            continue
        problem = make(1, n, dtype=dtype, device=setting.device, **size)
        yield every_peer(name, problem, setting)
    yield shares(n, size, setting)
    yield realistic(size, setting)
    yield sequences(n, size, setting)


def make(
    b: int, t: int, *, v: int, d: int, dtype: torch.dtype = torch.float32, device: str = "cpu",
    idle: float = 0.0, padding: float = 0.0,
) -> Problem:
    """Random tokens; a share of the rows without advantage, a share of positions masked out."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(b, t, d, generator=generator).to(dtype).to(device)
    weight = (torch.randn(v, d, generator=generator) / d**0.5).to(dtype).to(device)
    target = torch.randint(v, (b, t), generator=generator).to(device)
    log_probs = linear_log_probs(hidden, weight, target).cpu()
    rollout = log_probs + 0.1 * torch.randn(b, t, generator=generator)
    if b > 1:
        advantages = torch.randn(b, 1, generator=generator).expand(b, t).clone()
        # rows of all lengths, so that the share is one of the tokens too
        advantages[((torch.arange(round(idle * b)) + 0.5) / max(idle, 1 / b)).long()] = 0
    else:
        advantages = torch.randn(b, t, generator=generator)
        advantages[:, : round(idle * t)] = 0
    lengths = torch.full((b, 1), t)
    if padding:
        spread = torch.linspace(-0.5, 0.5, b)[:, None]
        lengths = (t * (1 - padding) * (1 + spread)).round().clamp(1, t)
    mask = torch.arange(t) < lengths
    return Problem(
        hidden.requires_grad_(), weight.requires_grad_(), target, rollout.to(device),
        advantages.to(device), mask.to(device),
    )


def ours(
    problem: Problem, loss_fn: PolicyLoss = TOKEN_TIS, **options: object
) -> Callable[[], object]:
    def step() -> Tensor:
        forget(problem)
        loss, _ = fused_policy_loss(
            loss_fn, hidden=problem.hidden, weight=problem.weight, target=problem.target,
            rollout_log_probs=problem.rollout_log_probs, advantages=problem.advantages,
            mask=problem.mask, **options,
        )
        loss.backward()
        return loss

    return step


def two_pass(
    problem: Problem, loss_fn: PolicyLoss, **options: bool
) -> Callable[[], object]:
    def step() -> Tensor:
        forget(problem)
        log_probs = linear_log_probs(
            problem.hidden, problem.weight, problem.target, layout=problem.mask, **options
        )
        loss, _ = loss_fn(
            log_probs, rollout_log_probs=problem.rollout_log_probs,
            advantages=problem.advantages, mask=problem.mask,
        )
        loss.backward()
        return loss

    return step


def theirs(problem: Problem, log_probs: peers.LogProbs, *, padded: bool = False,
           ) -> Callable[[], object]:
    """A peer's log-probs and the loss in plain torch, without metrics."""

    def step() -> Tensor:
        forget(problem)
        keep = torch.ones_like(problem.mask) if padded else problem.mask
        mu, advantages = problem.rollout_log_probs[keep], problem.advantages[keep]
        found = log_probs(problem.hidden[keep], problem.weight, problem.target[keep])
        w = (found.detach() - mu).exp().clamp(max=CAP)
        per_token = w * advantages * found
        if padded:
            per_token = torch.where(problem.mask[keep], per_token, 0)
        loss = -per_token.sum() / problem.mask.sum()
        loss.backward()
        return loss

    return step


def forget(problem: Problem) -> None:
    problem.hidden.grad = problem.weight.grad = None


def products(problem: Problem) -> Callable[[], object]:
    """The three products that no exact implementation can do without, into buffers of float32."""
    hidden = problem.hidden.detach()[problem.mask].float()
    weight = problem.weight.detach().float()
    logits = hidden.new_empty(len(hidden), len(weight))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.T, hidden, out=grad_weight)

    return step


def every_peer(
    name: str, problem: Problem, setting: Setting,
    packages: Mapping[str, str] = peers.PACKAGES,
) -> Workload:
    n, d = problem.hidden.shape[1:]
    v, dtype = len(problem.weight), str(problem.weight.dtype).removeprefix("torch.")
    workload = Workload(
        name,
        f"{n} tokens, vocabulary {v}, width {d}, {dtype} hidden states and weights, every token "
        "counting: loss with token-TIS weights, gradients of hidden states and weights; iscorrect "
        "with all metrics, the others without. GF/s counts 6·N·V·D operations.",
        threads=setting.threads,
    )
    runs = {"iscorrect, one pass": ours(problem)}
    versions = {"iscorrect, one pass": "iscorrect"}
    missing = {}
    for provider, package in packages.items():
        try:
            step = theirs(problem, peers.load(provider, setting.device))
            agree(runs["iscorrect, one pass"], step, problem)
            runs[provider], versions[provider] = step, package
        except peers.UnavailableError as why:
            missing[provider] = str(why)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            missing[provider] = f"fails: {type(error).__name__}"
    runs["limit: the products alone, float32"] = products(problem)
    times = interleave(runs, setting)
    for provider, taken in times.items():
        values = summary(taken, times["materialised, float32 head"], setting.clock)
        rate = 6 * n * v * d / values["CPU, ms" if setting.clock == "cpu" else "wall, ms"] / 1e6
        workload.add(provider, versions.get(provider, "torch"), **values, **{"GF/s": rate})
    for provider, why in missing.items():
        workload.add(provider, peers.PACKAGES[provider], **{"wall, ms": why})
    return workload


def agree(ours: Callable[[], object], peer: Callable[[], object], problem: Problem) -> None:
    """A peer computes what it is compared on, to the digits that its dtype leaves."""
    ours()
    assert problem.weight.grad is not None
    expected = problem.weight.grad.float()
    peer()
    error = (problem.weight.grad.float() - expected).norm() / expected.norm()
    assert error < (1e-3 if problem.weight.dtype == torch.float32 else 0.1), error


def shares(n: int, size: dict[str, int], setting: Setting) -> Workload:
    workload = Workload(
        "zero-coefficients",
        f"{n} tokens, vocabulary {size['v']}, width {size['d']}, float32: the one-pass loss with a "
        "share of the tokens without advantage. Ratio to none; 1 − 2/3 of the share if all "
        "backward products of these tokens are saved.",
        threads=setting.threads,
    )
    runs = {
        f"{share:.0%} without advantage": ours(
            make(1, n, device=setting.device, idle=share, **size)
        )
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    }
    times = interleave(runs, setting)
    for provider, taken in times.items():
        values = summary(taken, times["0% without advantage"], setting.clock)
        workload.add(provider, "iscorrect", **values)
    return workload


def realistic(size: dict[str, int], setting: Setting) -> Workload:
    b, t = (10, 16) if setting.small else (10, 256)
    problem = make(b, t, device=setting.device, idle=0.4, padding=0.4, **size)
    counted = problem.mask.float().mean().item()
    workload = Workload(
        "group-batch",
        f"{b} × {t} positions in ragged rows, {counted:.0%} of them counted, 40 % of the rows "
        f"and of these tokens without advantage; vocabulary {size['v']}, width {size['d']}, "
        "float32. Padding is removed for everyone but where the name says so.",
    )
    runs = {"iscorrect, one pass": ours(problem)}
    versions, missing = {"iscorrect, one pass": "iscorrect"}, {}
    for provider in ("materialised", *peers.BOUNDED):
        try:
            step = theirs(problem, peers.load(provider, setting.device))
            agree(runs["iscorrect, one pass"], step, problem)
            runs[provider], versions[provider] = step, peers.PACKAGES[provider]
        except peers.UnavailableError as why:
            missing[provider] = str(why)
    if "TRL, chunked" in runs:
        name = "TRL, chunked, padding kept as in its trainer"
        runs[name] = theirs(problem, peers.load("TRL, chunked", setting.device), padded=True)
        versions[name] = "trl"
    times = interleave(runs, setting)
    for provider, taken in times.items():
        values = summary(taken, times["materialised"], setting.clock)
        workload.add(provider, versions[provider], **values)
    for provider, why in missing.items():
        workload.add(provider, peers.PACKAGES[provider], **{"wall, ms": why})
    return workload


def sequences(n: int, size: dict[str, int], setting: Setting) -> Workload:
    t = n + n // 2  # longer than a chunk that needs no buffer
    problem = make(2, t, device=setting.device, **size)
    loss_fn = PolicyLoss(correction=sequence_is())
    workload = Workload(
        "sequence-weights",
        f"2 sequences of {t} tokens, vocabulary {size['v']}, width {size['d']}, float32: "
        "weights of whole sequences under the policy being trained.",
    )
    runs = {
        "materialised": materialised_sequences(problem),
        "iscorrect, two passes": two_pass(problem, loss_fn),
    }
    agree(runs["iscorrect, two passes"], runs["materialised"], problem)
    times = interleave(runs, setting)
    for provider, taken in times.items():
        package = "iscorrect" if provider.startswith("iscorrect") else "torch"
        values = summary(taken, times["materialised"], setting.clock)
        workload.add(provider, package, **values)
    return workload


def materialised_sequences(problem: Problem) -> Callable[[], object]:
    def step() -> Tensor:
        forget(problem)
        logits = problem.hidden @ problem.weight.T
        found = logits.log_softmax(-1).gather(-1, problem.target[..., None]).squeeze(-1)
        w = (found.detach() - problem.rollout_log_probs).sum(-1, keepdim=True).exp()
        loss = -(w * problem.advantages * found).mean()
        loss.backward()
        return loss

    return step
