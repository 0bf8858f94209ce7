"""The lab's code for a real language model, on a tiny one; two steps with vLLM where it is."""

import contextlib
import importlib.util
import math

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.lab import products
from benchmarks.lab.policy import DTYPES, Precision
from benchmarks.lab.real import (
    coherence,
    faults,
    intervals,
    learner,
    mechanism,
    offline,
    packed,
    pairs,
    quantised,
    reinforce,
    report,
    senders,
    served,
    stacked,
    switch,
    together,
)
from iscorrect.dumps import read_dump

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and vLLM, about themselves

KINDS = ["simulated", *(["vllm"] if importlib.util.find_spec("vllm") else [])]
END = 15


class Tokens:
    """Digits and signs, a token each."""

    eos_token_id = END

    def apply_chat_template(self, conversation, **_):
        text = conversation[0]["content"]
        return [14, 13, *(int(c) if c.isdigit() else 10 + "+?.".find(c) for c in text[8:14]), 12]

    def decode(self, ids, **_):
        return "".join(f" {int(i)}" if i < 10 else "." for i in ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        max_position_embeddings=256, bos_token_id=14, eos_token_id=END, initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "bf16-grid")
    return folder


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch):
    for module in (learner, offline, pairs, quantised, switch, together):
        monkeypatch.setattr(module, "open_tokenizer", lambda _: Tokens())


def test_answers_packed_behind_their_prompt_have_the_log_probs_they_have_alone(folder):
    model = learner.open_model(folder)
    torch.manual_seed(1)
    prompts = torch.randint(0, 10, (3, 7))
    prompts[:, :4] = prompts[0, :4]
    answers = packed.sample(model, prompts, 5, 6, END)
    found = packed.log_probs(model, prompts, answers.token_ids).detach()
    assert torch.allclose(found.where(answers.mask, 0), answers.log_probs.where(answers.mask, 0),
                          atol=1e-5)
    for g in range(3):
        for n in range(5):
            ids = torch.cat([prompts[g], answers.token_ids[g, n]])[None]
            logits = model(ids[:, :-1]).logits[0, 6:]
            alone = logits.log_softmax(-1).gather(-1, ids[0, 7:, None])[:, 0]
            assert torch.allclose(alone.detach(), found[g, n], atol=1e-5)


def test_the_greedy_answer_is_that_of_generate(folder):
    model = learner.open_model(folder)
    prompts = torch.tensor([[14, 1, 2, 3], [14, 1, 4, 5]])
    answers = packed.sample(model, prompts, 2, 6, END, greedy=1)
    wanted = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
                            max_new_tokens=6, eos_token_id=END, pad_token_id=END)[:, 4:]
    for found, kept, right in zip(answers.token_ids[:, 0], answers.mask[:, 0], wanted, strict=True):
        assert torch.equal(found[kept], right[: kept.sum()])


def test_an_answer_is_right_where_its_last_number_is_the_sum():
    task = learner.Sums(Tokens(), [(1, 1), (1, 2), (2, 1), (2, 2)])
    assert task.right == [2, 3, 3, 4]
    ids = torch.tensor([[[7, 2, 11], [2, 7, 11]], [[3, END, 5], [11, 11, 11]]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 0, 2] = False
    answers = packed.Answers(task.prompts[:2], ids, mask, ids.float())
    assert task.rewards([0, 1], answers).tolist() == [[1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("bits", [7, 8, 10])
def test_fractions_are_rounded_as_the_formats_of_that_many_bits(bits):
    x = torch.randn(1000) + 3
    found = senders.fraction("w", x, bits=bits)
    if bits == 8:
        assert ((found - x).abs() <= x.abs() * 2**-9).all()
    else:
        dtype = torch.bfloat16 if bits == 7 else torch.float16
        assert torch.equal(found, x.to(dtype).float())


@pytest.fixture
def half_are_right(monkeypatch):
    """A tiny random model is never right, and would not learn."""
    monkeypatch.setattr(
        learner.Sums, "rewards", lambda self, which, answers: answers.token_ids[..., 0] % 2.0
    )


@pytest.mark.usefixtures("half_are_right")
def test_the_mechanism_has_a_row_for_every_way_to_send(folder, monkeypatch):
    monkeypatch.setattr(mechanism, "LOOKED_AT", (1, 2))
    schedule = learner.Schedule(learning_rate=1e-4)
    rows = [row for row in mechanism.follow(folder, schedule, 0) if row["kind"] == "all"]
    assert len(rows) == 2 * len(senders.senders(0))
    of = {row["format"]: row for row in rows if row["step"] == 1}
    assert of["bf16"]["share"] < of["fp16"]["share"] < 1.2
    assert of["bf16 stochastic"]["share"] == pytest.approx(1, abs=0.2)
    assert of["bf16 feedback"]["share"] == of["bf16"]["share"]


@pytest.mark.usefixtures("half_are_right")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", reinforce.ROUNDINGS)
def test_two_steps_of_an_arm(folder, tmp_path, kind, rounding):
    arm = reinforce.Arm("bf16", "token-tis:cap=2", rounding, kind)
    schedule = learner.Schedule(steps=2, judged=2)
    reinforce.main(folder, tmp_path, arm, schedule, 0)
    (record,) = tmp_path.glob("*.csv")
    assert record.name == f"{arm.name}-every1-2e-05-0.csv"
    steps = reinforce.read(record)
    assert [row["step"] for row in steps] == ["0", "1", "2"]
    # at first engine and trainer hold the same weights
    assert float(steps[0]["kl"]) < (1e-8 if kind == "simulated" else 1e-2)
    assert steps[0]["arrival"] == "" and 0 <= float(steps[1]["unchanged"]) < 1
    assert steps[1]["greedy"] == "" and 0 <= float(steps[2]["greedy"]) <= 1
    written = record.stat().st_mtime_ns
    reinforce.main(folder, tmp_path, arm, schedule, 0)
    assert record.stat().st_mtime_ns == written


def test_a_dump_for_every_pair_of_precisions(folder, tmp_path, monkeypatch):
    def drawn(folder, dtype, seeds):
        torch.manual_seed(0)
        model = learner.open_model(folder)
        answers = packed.sample(model, torch.tensor([[14, 1, 2], [14, 3, 4]]), 1, 9, END)
        return [[
            offline.Answer(p.tolist(), ids[0][kept[0]].tolist(), lp[0][kept[0]].tolist())
            for p, ids, kept, lp in zip(*answers, strict=True)
        ] for _ in seeds]

    monkeypatch.setattr(offline, "drawn_apart", drawn)
    offline.main(folder, tmp_path, [0], ["fp32"], ["fp32", "bf16"])
    dump = read_dump(tmp_path / "fp32-fp32-0.npz")
    assert torch.allclose(dump.old_log_probs, dump.rollout_log_probs, atol=1e-5)
    assert (tmp_path / "fp32-bf16-0.npz").exists()


def test_a_dump_for_every_trainer_of_the_quantised_model(folder, tmp_path, monkeypatch):
    def drawn(folder, seeds):
        torch.manual_seed(0)
        model = learner.open_model(folder)
        prompts = torch.randint(0, 10, (24, 5))
        answers = packed.sample(model, prompts, 1, 12, END)
        return [[
            quantised.Drawn(
                offline.Answer(p.tolist(), ids[0][kept[0]].tolist(), lp[0][kept[0]].tolist()),
                int(kept.sum()),
            )
            for p, ids, kept, lp in zip(*answers, strict=True)
        ] for _ in seeds]

    exact, rounded = quantised.Scored("bf16-grid", "fp32"), quantised.Scored("bf16-grid", "bf16")
    monkeypatch.setattr(quantised, "TRAINERS", {"dense-fp32": exact, "bf16-grid-bf16": rounded})
    monkeypatch.setattr(quantised, "draw", drawn)
    quantised.main(folder, tmp_path / "quantised", [0, 1])
    assert len(list((tmp_path / "quantised").glob("*.npz"))) == 8
    rows = report.quantised(tmp_path).splitlines()[2:6]
    assert [row.split(" | ")[0] for row in rows] == [
        "| dense fp32", "| dense fp32, whole answers", "| bf16 grid bf16",
        "| bf16 grid bf16, whole answers",
    ]
    assert all("of 2)" in row for row in rows)


def test_answers_of_which_a_token_is_not_listed_are_told_from_whole_ones():
    lengths, counted = (3, 5, 4), (3, 6, 4)
    drawn = [
        quantised.Drawn(offline.Answer([], [*range(n)], [-1.0] * n), tokens)
        for n, tokens in zip(lengths, counted, strict=True)
    ]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    dump = offline.LogProbDump(
        rollout_log_probs=-torch.ones(3, 5), old_log_probs=-torch.ones(3, 5), mask=mask,
        token_ids=torch.arange(5).expand(3, 5),
    )
    assert quantised.whole(dump, drawn).mask.sum(1).tolist() == [3, 4]


@pytest.mark.usefixtures("half_are_right")
def test_an_engine_that_is_sent_rounded_weights(folder, monkeypatch):
    monkeypatch.setattr(served, "LOOKED_AT", (1, 2))
    arm, schedule = reinforce.Arm("bf16", kind="simulated"), learner.Schedule(learning_rate=1e-4)
    rows = list(served.follow(folder, arm, schedule, 0))
    assert [(row["step"], row["rounding"]) for row in rows] == [
        (step, way) for step in (0, 1, 2) for way in ("nearest", "stochastic", "feedback")
    ]
    first = [row["kl"] for row in rows[:3]]
    assert max(first) < 1e-8 < min(row["kl"] for row in rows[3:])


@pytest.mark.usefixtures("half_are_right")
def test_the_report_fills_every_table(folder, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- real:{name} -->\n<!-- /real -->\n" for name in report.TABLES))
    report.main(tmp_path, [page], tmp_path)
    none = page.read_text().count("No record of `python -m benchmarks.lab.real")
    assert none == len(report.TABLES)
    monkeypatch.setattr(mechanism, "LOOKED_AT", (1, 2))
    mechanism.main(folder, tmp_path / "mechanism", learner.Schedule(learning_rate=1e-4), 0)
    arm = reinforce.Arm("bf16", kind="simulated")
    reinforce.main(folder, tmp_path / "reinforce", arm, learner.Schedule(steps=2, judged=2), 0)
    report.main(tmp_path, [page], tmp_path)
    text = page.read_text()
    assert text.count("No record") == 11 + len(report.on_a_gpu.TABLES) and text.count("|---|") == 6
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"real-arrival.png", "real-learning.png"}


@pytest.mark.usefixtures("half_are_right")
def test_coarse_and_old_weights_have_a_kl_and_exact_ones_have_none(folder, monkeypatch):
    monkeypatch.setattr(
        coherence, "open_engine", lambda folder, arm, schedule, longest: reinforce.Simulated(
            folder, schedule)
    )
    schedule = learner.Schedule(learning_rate=1e-3, prompts=2, answers=4)
    kinds = {
        "exact": coherence.Kind("fp32", updates=1),
        "int3": coherence.Kind("fp32", quantised="int3"),
        "behind": coherence.Kind("fp32", updates=1, behind=1),
    }
    rows = {name: next(coherence.measure(folder, kind, schedule, 0, batches=5))
            for name, kind in kinds.items()}
    assert abs(rows["exact"]["kl"]) < 1e-6 < min(rows["int3"]["kl"], rows["behind"]["kl"])
    assert abs(rows["exact"]["share"]) < 1e-9
    assert all(row["low"] <= row["n_star"] <= row["high"] for row in rows.values())


def test_errors_of_their_own_grow_as_a_random_walk_and_shared_ones_as_a_line():
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(400, 256, dtype=torch.bool)
    own = torch.randn(400, 256, generator=generator, dtype=torch.float64)
    assert pairs.growth(own, mask) == pytest.approx(1, abs=0.1)
    assert pairs.growth(own[:, :1].expand(-1, 256), mask) == pytest.approx(2, abs=0.01)
    assert math.isnan(pairs.growth(own[:, :16], mask[:, :16]))
    late = own.clone()
    late[:, :8] = 0  # no error yet: a power is that of what follows
    assert 1 < pairs.growth(late, mask) < 1.6


def test_planned_differences_are_paired_by_seed(tmp_path):
    folder = tmp_path / "reinforce"
    folder.mkdir()
    rights = {"bf16": (0.2, 0.4, 0.3), "bf16-stochastic": (0.5, 0.6, 0.55), "fp16": (0.5, 0.7)}
    for engine, values in rights.items():
        for seed, right in enumerate(values):
            (folder / f"vllm-{engine}-uncorrected-every1-2e-05-{seed}.csv").write_text(
                f"step,sampled,greedy,reward\n0,0.9,0.9,0.1\n4,{right},{right},0.1\n8,,,0.3\n"
                f"12,{right},{right},{right}\n"
            )
    text = report.contrasts(tmp_path)
    lines = [
        [cell.strip() for cell in line.split("|")[2:7]]
        for line in text.splitlines() if " − " in line
    ]
    assert [line[0] for line in lines] == ["3", "2", "0", "0"]
    assert lines[0][1].startswith("0.25 ±") and lines[1][1] == "0.3"
    assert lines[0][3].startswith("0.0833 ±") and lines[1][3] == "0.1"
    p, held = map(float, lines[0][4].split(", "))
    assert held == pytest.approx(4 * p, rel=0.1)


def test_seeds_that_were_known_take_no_part_in_a_later_test(tmp_path):
    folder = tmp_path / "reinforce"
    folder.mkdir()
    for seed in range(6):
        for arm, right in {"token-tis-cap=2": 0.5 + seed / 100, "uncorrected": 0.4}.items():
            (folder / f"vllm-bf16-stochastic-{arm}-every8-2e-05-{seed}.csv").write_text(
                f"step,sampled,greedy,reward\n0,0.9,0.9,0\n4,{right},{right},{right}\n"
            )
    line = next(line for line in report.aged(tmp_path).splitlines() if " − " in line)
    assert line.split("|")[2].strip() == "3" and line.split("|")[3].strip().startswith("0.14 ±")


def test_a_faulty_trainer_scores_the_engines_tokens_as_it_sees_them(folder):
    answers = [offline.Answer([14, 1, 2], [3, 4, 5, 6], [-1.0, -2.0, -3.0, -4.0]),
               offline.Answer([14, 3, 4], [7, 15], [-1.0, -2.0])]
    dump = faults.score(folder, faults.Scored(), answers)
    assert dump.mask.sum(1).tolist() == [4, 2]
    assert dump.token_ids[1, :2].tolist() == [7, 15]
    model = learner.open_model(folder, dtype=torch.bfloat16)
    every = model(torch.tensor([[14, 3, 4, 7, 15]])).logits[0, 2:4].float().log_softmax(-1)
    expected = every.gather(-1, torch.tensor([[7], [15]]))[:, 0]
    assert torch.allclose(dump.old_log_probs[1, :2], expected, atol=0.1)
    assert torch.allclose(dump.entropy[1, :2], -(every.exp() * every).sum(-1), atol=0.1)
    hot = faults.score(folder, faults.Scored(temperature=1.5), answers)
    assert (hot.entropy > dump.entropy)[dump.mask].all()
    shorter = faults.score(folder, faults.Scored(ids=lambda ids: ids[1:]), answers)
    assert shorter.mask.sum(1).tolist() == [3, 1]
    assert shorter.rollout_log_probs[0, :3].tolist() == [-1.0, -2.0, -3.0]
    other = faults.score(folder, faults.Scored(prompt=lambda ids: ids[:1]), answers)
    assert not torch.allclose(other.old_log_probs[dump.mask], dump.old_log_probs[dump.mask])


def test_each_prompt_has_an_answer_of_the_engine_that_was_not_sent_to():
    def dump(value, length):
        return offline.LogProbDump(
            rollout_log_probs=torch.full((8, length), value), old_log_probs=torch.zeros(8, length),
            mask=torch.ones(8, length, dtype=torch.bool),
        )

    both = faults.mixed(dump(-1.0, 3), dump(-2.0, 5))
    assert both.rollout_log_probs[:, 0].tolist() == [-1] * 8 + [-2] * 8
    assert both.mask.sum(1).tolist() == [3] * 8 + [5] * 8
    assert both.engine[:, 0].tolist() == [0] * 8 + [1] * 8


def test_faults_are_counted_by_how_they_are_named(folder, tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(40, 64, generator=generator) - 0.1
    clean = offline.LogProbDump(
        rollout_log_probs=old + 0.01 * torch.randn(40, 64, generator=generator), old_log_probs=old,
        mask=torch.ones(40, 64, dtype=torch.bool),
    )
    record = tmp_path / "real.csv"
    copied = "one side copied from the other"
    for i, (cause, dump) in enumerate({
        faults.CLEAN: clean, copied: faults.replace(clean, old_log_probs=clean.rollout_log_probs),
    }.items()):
        faults.count(i, cause, "planted", True, dump, record=record, whose="prompts 7")
    rows = faults.benchmark.read(record)
    assert [(row["cause"], row["first"], row["named"]) for row in rows] == [
        (faults.CLEAN, "12", "12"), (copied, "12", "12")
    ]
    table = faults.benchmark.real_table(record)
    assert "prompts 7: 1 starred faults, 100.0% of the draws right first" in table


@pytest.mark.usefixtures("half_are_right")
def test_the_report_reads_what_the_gpu_wrote(folder, tmp_path, monkeypatch):
    gpu = report.on_a_gpu
    runs = [arm._replace(seed=seed) for arm in (gpu.NEAREST, gpu.STOCHASTIC, gpu.FP32)
            for seed in range(3)]
    monkeypatch.setattr(together, "design", lambda: [runs])
    for name, few in (("STEPS", 3), ("JUDGED", 1)):
        monkeypatch.setattr(together, name, few)
    together.main(folder, tmp_path / "together.csv", share=(0, 1), seconds=1e9, device="cpu")
    assert {len(seeds) for seeds in gpu.arms(tmp_path).values()} == {3}
    assert gpu.learning(tmp_path).count("| 3 |") == 3
    table = gpu.contrasts(tmp_path)
    assert table.count("| 3 |") == 2 and "bf16, stochastic, uncorrected − fp32" in table
    gpu.figure(tmp_path).savefig(tmp_path / "learning.png")
    gpu.figure(tmp_path, gpu.SIXTEEN).savefig(tmp_path / "sixteen.png")
    assert gpu.matrix(tmp_path) == gpu.judged(tmp_path) == gpu.NONE.format("pairs")


def test_differences_that_cancel_are_zero_and_not_a_rounding_error():
    assert intervals.mean([0.1, 0.2, -0.1 - 0.2]) == "0 ± 0.66"
    assert intervals.mean([1e-3, 1e-3, 1e-3]) == "0.001 ± 0"


def test_the_order_of_pairs_is_counted_by_seed(tmp_path):
    kl = {("fp16", "fp16"): (1, 1, 1), ("bf16", "fp16"): (4, 4, 4), ("fp16", "bf16"): (5, 5, 3),
          ("bf16", "bf16"): (6, 6, 6), ("fp16", "fp32"): (1, 1, 1), ("bf16", "fp32"): (3, 3, 3),
          ("fp32", "fp32"): (0.1, 0.1, 0.1)}
    lines = ["rollout,trainer,seed,tokens,longest,mean,sigma,kl,answer,growth,drift"]
    lines += [f"{mu},{pi},{seed},9,9,1,1,{x},1,1,1" for (mu, pi), seeds in kl.items()
              for seed, x in enumerate(seeds)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    text = report.on_a_gpu.judged(tmp_path)
    assert "holds in 2 of 3 seeds" in text and "farthest in 3" in text
    assert "| bf16 / bf16 | 27 | 1 ± 0 | 1 ± 0 | 6 (6 to 6) | 6 (6 to 6) |" in text


def test_a_difference_is_of_runs_of_one_schedule(tmp_path):
    (tmp_path / "reinforce").mkdir()
    for arm, schedule, right in (
        ("a", "every1-2e-05", 0.9), ("b", "every1-2e-05", 0.5), ("a", "every4-2e-05", 0.1),
        ("b", "every1-1e-05", 0.3),
    ):
        path = tmp_path / "reinforce" / f"{arm}-{schedule}-0.csv"
        path.write_text(f"step,sampled,greedy,reward\n0,0,0,0\n8,{right},{right},{right / 2}\n")
    found = report.differences(tmp_path, "a", "b", "every1-2e-05")
    assert found == {
        "sampled": [pytest.approx(0.4)], "greedy": [pytest.approx(0.4)],
        "reward": [pytest.approx(0.2)],
    }


@pytest.fixture(scope="module")
def three():
    """Models of several runs, each alone and all together."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        initializer_range=0.2,
    )
    alone = [LlamaForCausalLM(config) for _ in range(3)]
    together_ = {
        name: torch.stack([model.get_parameter(name).detach() for model in alone]).requires_grad_()
        for name, _ in alone[0].named_parameters()
    }
    return alone, together_


def draws():
    return [torch.Generator().manual_seed(i) for i in range(3)]


def test_runs_together_have_the_log_probs_and_gradients_that_they_have_alone(three):
    alone, weights = three
    model = stacked.Model.of(stacked.Config.of(alone[0].config), weights)
    prompts = torch.randint(0, 10, (3, 4, 7), generator=torch.Generator().manual_seed(1))
    drawn = stacked.sample(model, prompts, 5, 6, END, draws())
    found = stacked.log_probs(model, prompts, drawn.token_ids)
    assert torch.allclose(found.where(drawn.mask, 0), drawn.log_probs.where(drawn.mask, 0),
                          atol=1e-5)
    gradients = torch.autograd.grad(found.where(drawn.mask, 0).sum(), [*weights.values()])
    for i, one in enumerate(alone):
        own = packed.log_probs(one, prompts[i], drawn.token_ids[i])
        assert torch.allclose(own, found[i], atol=1e-5)
        wanted = torch.autograd.grad(own.where(drawn.mask[i], 0).sum(), [*one.parameters()])
        for g, right in zip(gradients, wanted, strict=True):
            assert torch.allclose(g[i], right, atol=1e-4 * right.abs().max())


def test_padding_before_a_prompt_changes_nothing(three):
    alone, weights = three
    model = stacked.Model.of(stacked.Config.of(alone[0].config), weights)
    prompts = torch.randint(0, 10, (3, 2, 7), generator=torch.Generator().manual_seed(1))
    known = torch.tensor([[False] * 3 + [True] * 4, [True] * 7])
    drawn = stacked.sample(model, prompts, 2, 6, END, draws(), known=known)
    short = stacked.log_probs(model, prompts[:, :1, 3:], drawn.token_ids[:, :1])
    kept = drawn.mask[:, :1]
    assert torch.allclose(short.where(kept, 0), drawn.log_probs[:, :1].where(kept, 0), atol=1e-5)


@pytest.mark.usefixtures("half_are_right")
def test_a_run_among_others_is_the_run_alone(folder):
    group = [
        together.Run(engine="fp32", every=9, rate=1e-3, correction=c, baseline=b, seed=seed)
        for c, b, seed in (("uncorrected", "group", 0), (together.TIS, "group", 0),
                           (together.PPO, "group", 0), ("uncorrected", "half", 0),
                           (together.TIS, "group", 1))
    ]
    settings = {"device": "cpu", "steps": 3, "judged": 3}
    every = together.train(folder, group, **settings)
    norms = [[float(x) for x in run["gradient_norm"].split()] for run in every]
    for run, found, norm in zip(group, every, norms, strict=True):
        (alone,) = together.train(folder, [run], **settings)
        for name in ("reward", "sampled", "greedy", "length"):
            assert found[name] == alone[name]
        assert norm == pytest.approx([float(x) for x in alone["gradient_norm"].split()], rel=2e-3)
    # an engine that is behind: each correction and baseline is another update
    assert len({norm[-1] for norm in norms}) == len(group)
    assert norms[0][0] == norms[1][0] == norms[2][0]


@pytest.mark.usefixtures("half_are_right")
def test_many_runs_learn_as_the_learner_of_one_does(folder):
    schedule = learner.Schedule(learning_rate=1e-3)
    one = learner.Learner(folder, schedule, 0)
    run = together.Run(engine="fp32", rate=1e-3, correction=together.TIS)
    config = stacked.Config.of(one.model.config)
    masters = {name: w[None].clone().requires_grad_() for name, w in one.weights.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0)
    first = {name: w.clone() for name, w in one.weights.items()}
    start = stacked.Model.of(config, {name: w[None] for name, w in first.items()})
    own = [torch.Generator().manual_seed(0)]
    for step in range(2):
        which = one.draw()
        prompts = one.task.prompts[which][None]
        drawn = stacked.sample(start, prompts, schedule.answers, learner.LONGEST, END, own)
        optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1) / schedule.warmup
        (many,) = together.update(config, masters, optimizer, [run], one.task, [which], drawn)
        alone = one.update(which, together.answers_of(drawn, 0), together.TIS)
        for name, value in many.items():
            assert value == pytest.approx(alone[name], rel=1e-3, abs=1e-6), name
    assert many["ess_token"] < 1
    for name, w in one.weights.items():
        moved = (w - first[name]).norm()
        assert moved > 0 and (masters[name][0] - w).norm() < 0.01 * moved, name


@pytest.mark.usefixtures("half_are_right")
def test_runs_that_round_after_each_step_learn_on_their_masters(folder):
    kept = together.Run(engine="bf16", trainer="bf16", rounding=together.AFTER_STEP, rate=2e-5)
    assert kept.shared != kept._replace(rounding="nearest").shared
    settings = {"device": "cpu", "steps": 3, "judged": 3}
    (found,) = together.train(folder, [kept], **settings)
    (lost,) = together.train(folder, [kept._replace(rounding="nearest")], **settings)
    arrivals = [[float(x) for x in row["arrival_all"].split()] for row in (found, lost)]
    assert arrivals[0] == pytest.approx([1, 1, 1], abs=0.2)
    assert max(arrivals[1]) < 0.5
    assert max(float(x) for x in found["kl"].split()) < 0.01


def test_what_is_not_finite_is_no_update_of_its_run_alone():
    gradients = [torch.tensor([[3.0, 4], [torch.inf, 1], [0.3, 0.4]]), torch.zeros(3, 2)]
    assert together.clipped(gradients, 1.0) == pytest.approx([5, torch.inf, 0.5])
    assert torch.allclose(gradients[0], torch.tensor([[0.6, 0.8], [0, 0], [0.3, 0.4]]), atol=1e-5)


@pytest.mark.usefixtures("half_are_right")
@pytest.mark.parametrize(("engine", "trainer", "head"), [
    ("bf16", "fp32", "same"), ("bf16", "bf16", "fp32"), ("fp16", "fp16", "same"),
])
def test_what_is_sent_and_what_arrives(folder, engine, trainer, head):
    ways = ("feedback", "nearest", "stochastic")
    group = [
        together.Run(engine=engine, trainer=trainer, head=head, rounding=way, rate=1e-4)
        for way in ways
    ]
    found = together.train(folder, group, device="cpu", steps=2, judged=2)
    first = {way: float(run["arrival"].split()[0]) for way, run in zip(ways, found, strict=True)}
    assert first["nearest"] == first["feedback"] < 0.75 and 0.8 < first["stochastic"] < 1.2
    for run in found:
        assert len(run["kl"].split()) == 3 and len(run["sampled"].split()) == 2
        assert float(run["kl"].split()[0]) < 1e-2


def test_the_baseline_of_a_group():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])
    assert together.advantages(rewards, "mean").tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    assert together.advantages(rewards, "half").tolist() == [
        0.875, -0.125, -0.125, -0.125, 0.5, 0.5, 0.5, 0.5]
    group = together.advantages(rewards, "group")
    assert group[0] == pytest.approx(1.5, abs=1e-3) and group[4:].tolist() == [0, 0, 0, 0]


@pytest.mark.skipif("vllm" not in KINDS, reason="vLLM is not installed")
def test_an_engine_that_is_sent_weights_forgets_the_prefixes_of_the_weights_before(folder):
    torch.manual_seed(3)
    prompts = torch.randint(0, 10, (1, 41)).repeat(2, 1)
    first = learner.weights(learner.open_model(folder))
    changed = {
        name: (x + x.abs().mean() * torch.randn_like(x)).bfloat16().float()
        for name, x in first.items()
    }
    keeps = reinforce.open_engine(folder, reinforce.Arm(), learner.Schedule(), 53)
    keeps.load(first)
    keeps.generate(prompts, 2, END)
    keeps.load(changed)
    answers = keeps.generate(prompts, 2, END)
    keeps.close()
    model = learner.open_model(folder)
    model.load_state_dict(changed, strict=False)
    own = packed.log_probs(model, prompts, answers.token_ids).detach()
    apart = (own - answers.log_probs)[answers.mask].abs().mean()
    assert apart < 0.3  # BF16's rounding; with the prefix of the weights before, several nats


def test_runs_of_other_seeds_round_by_other_draws_and_a_run_by_its_own():
    x = torch.randn(1000)
    for way in (senders.Stochastic, senders.SameDraws):
        one, again, other = (way(torch.bfloat16, seed)("w", x) for seed in (0, 0, 1))
        assert torch.equal(one, again) and not torch.equal(one, other)
    same = senders.SameDraws(torch.bfloat16, 0)
    assert torch.equal(same("layers.11.w", x), same("layers.11.w", x))
    assert not torch.equal(same("layers.11.w", x), same("layers.20.w", x))


@pytest.mark.usefixtures("half_are_right")
def test_a_record_of_another_schedule_is_refused(folder, tmp_path):
    arm = reinforce.Arm(kind="simulated")
    short = learner.Schedule(steps=1, judged=1)
    reinforce.main(folder, tmp_path, arm, short, 0)
    reinforce.main(folder, tmp_path, arm, short, 0)
    with pytest.raises(SystemExit, match=r"steps 1.*steps 2"):
        reinforce.main(folder, tmp_path, arm, learner.Schedule(steps=2, judged=1), 0)


@pytest.mark.usefixtures("half_are_right")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("trainer", "head"), [
    ("bf16", True), ("bf16", False), ("fp16", False), ("amp-bf16", False), ("amp-bf16", True),
])
def test_a_trainer_that_computes_in_the_engines_format(folder, tmp_path, kind, trainer, head):
    dtype = trainer.removeprefix("amp-")
    arm = reinforce.Arm(dtype, kind=kind, trainer=trainer, fp32_head=head)
    reinforce.main(folder, tmp_path, arm, learner.Schedule(steps=1, judged=1), 0)
    (record,) = tmp_path.glob("*.csv")
    first, last = reinforce.read(record)
    assert 0 < float(first["kl"]) < 1e-2 and 0 < float(last["gradient_norm"]) < 100
    # the first weights are on the grid
    assert first["rounded_greedy"] == first["greedy"] and 0 <= float(last["rounded_sampled"]) <= 1
    words = [dtype, f"trained in {trainer}", *(["FP32 head"] if head else []), "uncorrected"]
    words += [] if kind == "vllm" else ["simulated"]
    assert report.named(record.stem.rsplit("-", 1)[0]) == ", ".join(words)


@pytest.mark.usefixtures("half_are_right")
def test_a_trainer_that_computes_with_what_it_sends(folder, batch):
    arm = reinforce.Arm(rounding="after-step", trainer="bf16")
    one = learner.Learner(folder, learner.Schedule(), 0, arm.precision, arm.held)
    one.update(*batch, "uncorrected")
    how = arm.send(0)
    sent = {name: how(name, w) for name, w in one.weights.items()}
    assert all(torch.equal(sent[name], w) for name, w in one.weights.items())
    assert any(not torch.equal(sent[name], w.bfloat16().float()) for name, w in one.masters.items())
    engine = learner.open_model(folder, dtype=torch.bfloat16)
    engine.load_state_dict(sent, strict=False)
    which, answers = batch
    with products.computed_in(engine, torch.bfloat16):
        own = packed.log_probs(engine, *answers[:2], torch.bfloat16).detach()
    found = one.update(which, answers._replace(log_probs=own), "uncorrected")
    assert found["max"] == 0 and 0 < found["gradient_norm"] < 100
    other = learner.Learner(folder, learner.Schedule(), 0, Precision("bf16"))
    other.update(*batch, "uncorrected")
    for name, w in other.masters.items():  # the first batch was computed with the same weights
        assert torch.equal(w, other.weights[name])
    assert other.update(which, answers._replace(log_probs=own), "uncorrected")["max"] > 0


def test_what_rounding_after_each_step_gained_is_said_once_three_seeds_have_it(tmp_path):
    rewards = {
        "vllm-fp16-trained-in-fp16-uncorrected": (0.7, 3),
        "vllm-bf16-trained-in-bf16-uncorrected": (0.5, 3),
    }

    def said():
        folder = tmp_path / "reinforce"
        folder.mkdir(exist_ok=True)
        for arm, (reward, seeds) in rewards.items():
            for seed in range(seeds):
                rows = [f"{step},{reward},0.5,0.5,0.5,0.5,0.001" for step in range(3)]
                head = "step,reward,sampled,greedy,rounded_sampled,rounded_greedy,kl"
                path = folder / f"{arm}-{report.MAIN}-{seed}.csv"
                path.write_text("\n".join([head, *rows]) + "\n")
        return report.agreeing(tmp_path)

    for seeds in (0, 2):
        rewards["vllm-bf16-trained-in-bf16-after-step-uncorrected"] = (0.8, seeds)
        assert "20 ± 0 points more" in said() and "round_after_step" not in said()
    rewards["vllm-bf16-trained-in-bf16-after-step-uncorrected"] = (0.8, 3)
    assert "and 30 ± 0 more with `iscorrect.round_after_step` than in BF16 to nearest" in said()


@pytest.mark.usefixtures("half_are_right")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainer", ["bf16", "amp-bf16"])
def test_what_such_a_trainer_made_arrives(folder, tmp_path, kind, trainer):
    for way in ("after-step", "nearest"):
        arm = reinforce.Arm(kind=kind, trainer=trainer, rounding=way)
        reinforce.main(folder, tmp_path, arm, learner.Schedule(steps=1, judged=1, warmup=1), 0)
    stepped, nearest = (
        reinforce.read(next(tmp_path.glob(f"*-{way}uncorrected-*.csv")))[-1]
        for way in ("after-step-", f"{trainer}-")
    )
    assert float(nearest["arrival"]) < 0.8 < float(stepped["arrival"]) < 1.2
    assert 0 < float(stepped["kl"]) < 1e-2
    name = f"vllm-bf16-trained-in-{trainer}-after-step-uncorrected-every1-2e-05"
    assert report.named(name) == f"bf16, trained in {trainer}, rounded after each step, uncorrected"


@pytest.fixture
def batch(folder):
    """Numbers of four prompts, and answers to them."""
    torch.manual_seed(0)
    task = learner.Learner(folder, learner.Schedule(), 0).task
    which = [0, 3, 5, 7]
    prompts = task.prompts[which]
    return which, packed.sample(learner.open_model(folder), prompts, 8, learner.LONGEST, END)


@pytest.mark.usefixtures("half_are_right")
@pytest.mark.parametrize(("dtype", "least", "most"), [("fp16", 1e-5, 1e-2), ("bf16", 1e-3, 1e-1)])
def test_16_bits_compute_float32_gradients_of_the_rounded_weights(
    folder, batch, dtype, least, most
):
    exact, rounded = (
        learner.Learner(folder, learner.Schedule(), 0, Precision(x)) for x in ("fp32", dtype)
    )
    for x in (exact, rounded):
        x.update(*batch, "uncorrected")
    for a, b in zip(exact.model.parameters(), rounded.model.parameters(), strict=True):
        assert b.dtype == b.grad.dtype == torch.float32
        assert least < (a.grad - b.grad).norm() / a.grad.norm() < most
    w = rounded.model.model.norm.weight  # which lies between two numbers of its format
    assert not torch.equal(w, w.to(DTYPES[dtype]).float())


@pytest.mark.usefixtures("half_are_right")
def test_nothing_is_learned_of_a_gradient_that_overflows(folder, batch, monkeypatch):
    monkeypatch.setattr(learner, "LOSS_SCALE", 2.0**40)
    one = learner.Learner(folder, learner.Schedule(), 0, Precision("fp16"))
    before = {name: w.clone() for name, w in one.weights.items()}
    assert not math.isfinite(one.update(*batch, "uncorrected")["gradient_norm"])
    assert all(torch.equal(w, before[name]) for name, w in one.weights.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_float32_weights_are_rounded_as_under_autocast(folder, batch, dtype):
    model = learner.open_model(folder)
    _, answers = batch

    def scored(*within):
        model.zero_grad()
        with contextlib.ExitStack() as stack:
            for context in within:
                stack.enter_context(context)
            found = packed.log_probs(model, *answers[:2], dtype if within else torch.float32)
        found[answers.mask].sum().backward()
        return found.detach()[answers.mask], model.model.layers[0].mlp.up_proj.weight.grad

    def autocast():
        return torch.autocast("cpu", dtype)

    exact, torchs = scored(), scored(autocast())
    ours = scored(autocast(), products.computed_in(model, dtype))
    for a, b, c in zip(exact, ours, torchs, strict=True):
        assert (b - c).norm() < 0.5 * (a - b).norm()
    again = scored()
    assert all(torch.equal(a, b) for a, b in zip(exact, again, strict=True))


def test_products_of_a_layer_that_learns_are_rounded_once_forward_and_backward():
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 7, bias=False).bfloat16()
    x = torch.randn(5, 64).bfloat16().requires_grad_()
    g = torch.randn(5, 7).bfloat16()
    with products.computed_in(layer, torch.bfloat16):
        found = layer(x)
    found.backward(g)
    weight = layer.weight.double()
    for rounded, exact in (
        (found, x.double() @ weight.T), (x.grad, g.double() @ weight),
        (layer.weight.grad, g.double().T @ x.double()),
    ):
        assert rounded.dtype == torch.bfloat16
        assert (rounded == exact.bfloat16()).float().mean() > 0.95


def test_a_product_of_16_bit_numbers_is_added_up_in_more_and_rounded_once():
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((5, 64), (7, 64), (7,)))
    product = products.Product()
    exact = (x.double() @ weight.double().T + bias.double()).bfloat16()
    assert (product(x, weight, bias) - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert (product(x, weight, bias) == exact).float().mean() > 0.9
    weight.mul_(2)
    product.forget()
    doubled = (x.double() @ weight.double().T).bfloat16()
    assert (product(x, weight, None) == doubled).float().mean() > 0.9


def test_a_clip_of_the_engines_ratio_lets_no_gradient_through_outside():
    own = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    sampled = torch.tensor([[-1.5, -1.05]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    learner.loss_of(learner.PPO, own, sampled, mask, torch.ones(1)).backward()
    assert own.grad[0, 0] == 0 and own.grad[0, 1] < 0


def test_the_design_has_each_run_once_and_groups_what_can_be_together():
    runs = [run for block in together.design() for run in block]
    assert len({*runs}) == len(runs) == 535
    for block in together.design():
        groups = together.groups(block)
        assert sorted(run for group in groups for run in group) == sorted(block)
        for group in groups:
            assert len(group) <= together.AT_ONCE and len({run.shared for run in group}) == 1
            assert [run.rounding for run in group] == sorted(run.rounding for run in group)


@pytest.mark.usefixtures("half_are_right")
def test_runs_on_record_are_not_run_again(folder, tmp_path, monkeypatch):
    few = [[together.Run(seed=seed) for seed in (0, 1)]]
    monkeypatch.setattr(together, "design", lambda: few)
    monkeypatch.setattr(together, "STEPS", 1)
    settings = {"share": (0, 1), "seconds": 1e9, "device": "cpu"}
    record = tmp_path / "together.csv"
    for _ in range(2):
        together.main(folder, record, **settings)
        assert len(record.read_text().splitlines()) == 3
    few[0].append(together.Run(seed=2))
    together.main(folder, record, **settings | {"seconds": -1})
    assert len(record.read_text().splitlines()) == 3


def test_every_pair_has_a_line_a_seed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "questions", lambda seed: [f"What is {i} + {seed}?" for i in "1234"])
    monkeypatch.setattr(pairs, "ROLLOUTS", (pairs.Side("fp32"), pairs.Side("bf16", "fp32")))
    monkeypatch.setattr(pairs, "TRAINERS", (
        pairs.Side("fp32"), pairs.Side("bf16", "fp32"), pairs.Side("bf16", how="autocast"),
    ))
    record = tmp_path / "pairs.csv"
    for _ in range(2):
        pairs.main(folder, record, [0, 1], device="cpu", longest=16)
    rows = report.rows_of(record)
    kl = {tuple(row[name] for name in pairs.Pair._fields): float(row["kl"]) for row in rows}
    assert len(kl) == 12
    assert kl["fp32", "fp32", "0"] < 1e-9 < kl["fp32", "bf16 fp32 head", "0"]
    assert kl["bf16 fp32 head", "bf16 autocast", "1"] > 1e-9


def test_the_switch_is_measured_on_the_model(folder, monkeypatch):
    every = switch.fp16_switch.arms()
    monkeypatch.setattr(switch.fp16_switch, "arms", lambda: every[::10])
    found = switch.measure(folder, switch.Setting(rounds=1, small=True))
    bf16, fp16 = found.rows.values()
    assert fp16["gradient error"] < bf16["gradient error"] < 0.5
    assert fp16["k3 to engine"] < bf16["k3 to engine"]
