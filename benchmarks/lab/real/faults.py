"""Is the diagnosis right on a real language model behind a real engine?

vLLM samples from SmolLM2 with other sampling parameters, weights or caches than it should have, or
transformers score with another prompt, temperature, configuration or version; faults of a file are
injected into the clean dump. Trials are bootstrap samples of prompts, as those of
``benchmarks diagnose`` are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import diagnose as benchmark
from benchmarks.lab import engines
from benchmarks.lab.policy import Precision
from benchmarks.lab.real.coherence import after
from benchmarks.lab.real.learner import Learner, Schedule
from benchmarks.lab.real.model import ask, open_model, open_tokenizer, weights
from benchmarks.lab.real.offline import Answer, questions
from benchmarks.lab.rounding import ROUNDINGS
from iscorrect.diagnose import diagnose
from iscorrect.dumps import LogProbDump, read_dump, write_dump

PROMPTS, LONGEST, DRAWS = 64, 96, 12
UPDATES, RUN = 8, 24
"""Some updates, and those of a whole run, which a cache that is never reset falls behind."""
CLEAN = "numerical noise"
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Served:
    """How an engine answers.

    Attributes:
        sampling: of vLLM, besides temperature 1.
        weights: after so many updates, or a name of ``ROUNDINGS`` for the first ones.
        mode: of log-probs.
        cached: of the first weights, before the others were sent: a prefix cache that is not reset.
    """

    sampling: Mapping[str, object] = field(default_factory=dict)
    weights: int | str = 0
    mode: str = "processed_logprobs"
    cached: bool = False


@dataclass(frozen=True)
class Scored:
    """How a trainer scores.

    Attributes:
        temperature: that logits are divided by.
        weights: after so many updates.
        prompt: of the tokens of a prompt, what the trainer takes for it.
        ids: of the tokens of an answer, what it takes for them.
        config: what its configuration has otherwise.
    """

    temperature: float = 1.0
    weights: int = 0
    prompt: Callable[[list[int]], list[int]] = list
    ids: Callable[[list[int]], list[int]] = list
    config: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    cause: str
    strength: str
    served: Served = Served()
    scored: Scored = Scored()
    practical: bool = True


def faults(tokenizer) -> Iterator[Fault]:
    """What goes wrong, where, and by which name the diagnosis has it."""
    yield Fault(CLEAN, "clean")
    yield Fault(CLEAN, f"clean, after {UPDATES} updates", Served(weights=UPDATES),
                Scored(weights=UPDATES))
    honest = "temperature: engine divides its logits, trainer does not"
    yield Fault(honest, "τ = 0.9", Served({"temperature": 0.9}))
    yield Fault("temperature: trainer divides its logits, engine does not", "τ = 0.9",
                scored=Scored(0.9))
    raw = "raw_logprobs"
    yield Fault("temperature: raw log-probs reported, tempered sampler and trainer", "τ = 0.9",
                Served({"temperature": 0.9}, mode=raw), Scored(0.9))
    hidden = "raw log-probs reported by a tempered or truncated sampler"
    yield Fault(hidden, "τ = 0.9", Served({"temperature": 0.9}, mode=raw))
    yield Fault(hidden, "top-p = 0.95", Served({"top_p": 0.95}, mode=raw))
    cut = "top-p/top-k truncation"
    yield Fault(cut, "top-p = 0.95", Served({"top_p": 0.95}))
    yield Fault(cut, "top-k = 50", Served({"top_k": 50}))
    yield Fault(cut, "min-p = 0.05", Served({"min_p": 0.05}))
    yield Fault("repetition penalty", "1.1", Served({"repetition_penalty": 1.1}))
    yield Fault("repetition penalty", "presence 0.5", Served({"presence_penalty": 0.5}))
    banned = [tokenizer.encode(word)[0] for word in (" the", " a", ".", ",")]
    yield Fault("logits masked by a grammar, a bias or banned words", "four words",
                Served({"logit_bias": dict.fromkeys(banned, -100.0)}))
    for name in ("fp8", "int4"):
        yield Fault("quantised rollout", name, Served(weights=name))
    yield Fault("stale weights", f"{UPDATES} updates of 2e-5", scored=Scored(weights=UPDATES))
    cache = "a cache of the shared system prompt that outlives the weights"
    yield Fault(cache, f"{UPDATES} updates of 2e-5", Served(weights=UPDATES, cached=True),
                Scored(weights=UPDATES), practical=False)
    system = len(ask(tokenizer, "")) - len(tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n"))
    yield Fault("wrong prompt template", "no system prompt",
                scored=Scored(prompt=lambda ids: ids[system - 3:]))
    yield Fault("wrong prompt template", "no template",
                scored=Scored(prompt=lambda ids: ids[system:-5]))
    yield Fault("different tokens from a position on", "answers tokenised again",
                scored=Scored(ids=lambda ids: tokenizer.encode(tokenizer.decode(ids))))
    yield Fault("another model definition, by position", "rotary base 10,000 for 100,000",
                scored=Scored(config={"rope_parameters": {"rope_type": "default",
                                                          "rope_theta": 10_000.0}}))
    yield Fault(CLEAN, f"clean, after {RUN} updates", Served(weights=RUN), Scored(weights=RUN))
    yield Fault(cache, f"{RUN} updates of 2e-5", Served(weights=RUN, cached=True),
                Scored(weights=RUN))


def main(folder: Path, record: Path, seed: int) -> None:
    """Make the dumps of a seed's prompts that are not there, and count how each is named."""
    tokenizer = open_tokenizer(folder)
    every = list(faults(tokenizer))
    dumps = folder / f"faults-{seed}"
    dumps.mkdir(exist_ok=True)
    for fault, path in pairs(every, dumps):
        if not path.exists():
            write_dump(made(folder, fault, seed), path)
            print(path.name, flush=True)
    cases = [
        (fault.cause, fault.strength, fault.practical, read_dump(path))
        for fault, path in pairs(every, dumps)
    ]
    clean, newer = cases[0][-1], cases[1][-1]
    stale = next(dump for cause, *_, dump in cases if cause == "stale weights")
    cases.append(("one engine or rank of many", "1 of 2 by name", True, mixed(newer, stale)))
    cases += [
        (case.cause, case.strength, True, dump)
        for case in benchmark.of_the_values("real model", [grouped(clean)])
        if case.practical for dump in case.make()
    ]
    for i, case in enumerate(cases):
        count(1000 * seed + i, *case, record=record, whose=f"prompts {seed}")


def pairs(every: list[Fault], dumps: Path) -> Iterator[tuple[Fault, Path]]:
    for i, fault in enumerate(every):
        yield fault, dumps / f"{i:02}-{fault.strength.replace(' ', '-').replace('/', '-')}.npz"


def count(
    i: int, cause: str, strength: str, practical: bool, dump: LogProbDump, *, record: Path,
    whose: str,
) -> None:
    """How often a cause is named first and at all, in draws that the number i seeds."""
    firsts: Counter[str] = Counter()
    named, dump = 0, grouped(dump)
    for trial in range(DRAWS):
        found = diagnose(benchmark.resample(dump, len(dump), 1000 * i + trial))
        firsts[found[0].cause] += 1
        named += any(c.name == cause for f in found for c in f.causes)
    others = "; ".join(f"{c} ({n})" for c, n in firsts.most_common() if c != cause)
    benchmark.append(record, benchmark.FAULTS, (
        whose, cause, strength, int(practical), dump.num_tokens, DRAWS, firsts[cause], named,
        others,
    ))
    print(f"{cause}, {strength}: {firsts[cause]} first, {named} named of {DRAWS}; {others}",
          flush=True)


def grouped(dump: LogProbDump) -> LogProbDump:
    """One answer a prompt."""
    return replace(dump, group=torch.arange(len(dump)))


def mixed(newer: LogProbDump, stale: LogProbDump) -> LogProbDump:
    """Two answers to each prompt, one of an engine that has not got the updates."""
    length = max(newer.mask.shape[1], stale.mask.shape[1])

    def both(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([
            torch.nn.functional.pad(x, (0, length - x.shape[1])) for x in (a, b)
        ])

    taken = {name: both(x, getattr(stale, name)) for name, x in newer.given().items()
             if x.ndim == 2}
    return LogProbDump(**taken, engine=torch.arange(2).repeat_interleave(len(newer)))


def made(folder: Path, fault: Fault, seed: int) -> LogProbDump:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        answers = worker.submit(draw, folder, fault.served, seed).result()
    return score(folder, fault.scored, answers)


def updated(folder: Path, updates: int) -> State:
    """The weights after some updates, made once."""
    path = folder / f"after-{updates}.pt"
    if not path.exists():
        learner = Learner(folder, Schedule(), seed=0)
        torch.save(dict(after(learner, updates, 0)), path)
    return torch.load(path, mmap=True)


def state(folder: Path, which: int | str) -> State:
    if isinstance(which, int) and which:
        return updated(folder, which)
    return ROUNDINGS[which or "none"](weights(open_model(folder)))


def draw(folder: Path, served: Served, seed: int) -> list[Answer]:
    torch.set_num_threads(1)
    tokenizer = open_tokenizer(folder)
    asked = [ask(tokenizer, question) for question in questions(seed, PROMPTS)]
    engine = engines.Vllm(
        folder / "bf16-grid", Precision("bf16"), max_length=256, logprobs_mode=served.mode,
        enable_prefix_caching=served.cached, **({"block_size": 32} if served.cached else {}),
    )
    if served.cached:
        engine.generate(asked, 1, stop=None)
    engine.load(state(folder, served.weights))
    torch.manual_seed(seed)
    out = engine.generate(asked, LONGEST, stop=tokenizer.eos_token_id, **served.sampling)
    engine.close()
    return [
        Answer(prompt, ids[kept].tolist(), log_probs[kept].tolist())
        for prompt, ids, log_probs, kept in zip(asked, *out, strict=True)
    ]


@torch.no_grad()
def score(folder: Path, scored: Scored, answers: list[Answer]) -> LogProbDump:
    """The trainer in BF16, one answer at a time; its tokens, log-probs and entropies."""
    model = trainer(folder, scored)
    taken = [scored.ids(x.token_ids)[: len(x.token_ids)] for x in answers]
    shape = len(answers), max(map(len, taken))
    mask = torch.zeros(shape, dtype=torch.bool)
    token_ids = torch.zeros(shape, dtype=torch.int64)
    rollout, old, entropy = (torch.zeros(shape) for _ in range(3))
    for i, (answer, ids) in enumerate(zip(answers, taken, strict=True)):
        n = len(ids)
        mask[i, :n] = True
        token_ids[i, :n] = torch.tensor(ids)
        rollout[i, :n] = torch.tensor(answer.log_probs[:n])
        tokens = torch.tensor([scored.prompt(answer.prompt) + ids])
        logits = model(tokens[:, :-1], use_cache=False, logits_to_keep=n).logits[0].float()
        every = (logits / scored.temperature).log_softmax(-1)
        old[i, :n] = every.gather(-1, tokens[0, -n:, None])[:, 0]
        entropy[i, :n] = -(every.exp() * every).sum(-1)
    return LogProbDump(
        rollout_log_probs=rollout, old_log_probs=old, mask=mask, token_ids=token_ids,
        entropy=entropy,
    )


def trainer(folder: Path, scored: Scored) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder / "bf16-grid", dtype=torch.bfloat16, **scored.config
    ).eval()
    if scored.weights:
        model.load_state_dict(dict(updated(folder, scored.weights)), strict=False)
    return model
