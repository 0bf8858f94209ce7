"""The lab from end to end at toy size, with transformers as the engine, and vLLM where it is."""

import importlib.util
import json
import random

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import torch

from benchmarks.lab import engines, policy, records, reinforce, report, sanity, tasks
from benchmarks.lab.__main__ import main

KINDS = ["transformers", *(["vllm"] if importlib.util.find_spec("vllm") else [])]
TASK = "sort-2"
TOY = ["--width", "64", "--layers", "1", "--solved", "0.3", "--training-steps", "600"]

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and vLLM, about themselves


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    main(["models", TASK, "sharp", *TOY, "--models", str(folder / "models")])
    return folder


def lab(folder, kind, command, *arguments):
    main([command, *arguments, *TOY, "--models", str(folder / "models"), "--engine", kind,
          "--records", str(folder / kind)])


@pytest.mark.parametrize("name", ["add-3", "sort-5", "brackets-8"])
def test_a_task_accepts_its_own_answers_and_no_changed_ones(name):
    task, generator = tasks.parse(name), random.Random(0)
    for _ in range(100):
        prompt, answer = task.problem(generator)
        assert task.solves(prompt, answer) and len(answer) <= task.longest
        assert not task.solves(prompt, answer[:-1])
        assert not task.solves(prompt, [tasks.PLUS, *answer[1:]])


def test_brackets_accept_every_word_that_closes():
    task = tasks.brackets(4)
    prompt = [tasks.START, 15, 16, 19, 15, 18, 18]
    assert task.solves(prompt, [15, 18, 17, 20, tasks.END])
    assert not task.solves(prompt, [15, 17, 18, 20, tasks.END])
    assert not task.solves(prompt, [15, 18, tasks.END])


@pytest.mark.parametrize("kind", KINDS)
def test_fp16_on_both_sides_is_closer_than_bf16(folder, kind):
    small = ["--seeds", "2", "--sequences", "32", "--length", "24"]
    with torch.compiler.set_stance("force_eager"):  # compiling takes a minute
        lab(folder, kind, "offline", TASK, "sharp", *small)
    for column in ("sigma", "kl"):
        for pairs in report.by_model(folder / kind, column).values():
            assert max(pairs["fp16 / fp16"]) < min(pairs["bf16 / bf16"])
    rows = records.offline_rows(folder / kind)
    exact = [row for row in rows if records.pair(row) == "fp32 / fp32"]
    assert len(exact) == 4 and all(float(row["max"]) < 1e-3 for row in exact)


@pytest.mark.parametrize("kind", KINDS)
def test_every_arm_runs_and_what_is_on_record_is_not_run_again(folder, kind, capsys):
    short = ["--steps", "2", "--seeds", "1", "--jobs", "1", "--prompts", "4", "--pool", "24"]
    lab(folder, kind, "sanity", TASK, *short)
    arms = [arm.name for arm in sanity.arms(8)]
    assert len(arms) == 11
    assert {arm for _, arm in records.runs(folder / kind / "sanity")} == set(arms)

    # an interrupted run leaves no record, only its beginning
    done = folder / kind / "sanity" / f"{TASK}-fp16-0.csv"
    before = done.read_text().splitlines()[1].split(",")
    done.rename(done.with_suffix(".part"))
    capsys.readouterr()
    lab(folder, kind, "sanity", TASK, *short)
    assert "10 of 11 runs are on record" in capsys.readouterr().out
    again = done.read_text().splitlines()[1].split(",")
    assert again[:4] == before[:4]  # a seed fixes what is sampled


def test_models_and_rates_have_records_apart(folder):
    short = ["--steps", "17", "--seeds", "1", "--jobs", "1", "--prompts", "4", "--pool", "24"]
    lab(folder, "transformers", "sanity", TASK, *short, "--models-each", "2", "--arms", "fp32",
        "--rates", "1e-4", "1e-3")
    apart = folder / "transformers" / "sanity"
    assert {path.name for path in apart.glob("*/")} == {
        "0-0.0001", "0-0.001", "1-0.0001", "1-0.001"}
    rows = [line.split(" | ") for line in report.several(folder / "transformers").splitlines()[2:6]]
    assert [(row[0].strip("| "), row[1]) for row in rows] == [
        ("0", "0.0001"), ("0", "0.001"), ("1", "0.0001"), ("1", "0.001")]
    assert all("%" in cell for row in rows for cell in row[4:8])


def test_the_map_has_every_rounding_and_correction(folder):
    short = ["--steps", "2", "--seeds", "1", "--jobs", "1", "--prompts", "4", "--pool", "24"]
    lab(folder, "transformers", "map", TASK, *short)
    found = records.runs(folder / "transformers" / "map")
    assert len(found) == 4 * 4
    first = {arm: runs[0]["kl"][0] for (_, arm), runs in found.items()}
    assert first["none-uncorrected"] < first["int4-uncorrected"] < first["int3-uncorrected"]


def test_the_report_fills_its_tables_and_draws_its_figures(folder):
    page = folder / "page.md"
    made = report.TABLES.keys() - {"published"}  # of others' files, which are not here
    page.write_text("".join(f"<!-- lab:{name} -->\n<!-- /lab -->\n" for name in made))
    main(["report", "--records", str(folder / "transformers"), "--pages", str(page),
          "--pictures", str(folder / "pictures")])
    text = page.read_text()
    assert "No record" not in text
    assert sum(line.startswith("|---") for line in text.splitlines()) == len(made)
    names = {path.name for path in (folder / "pictures").iterdir()}
    assert names == {"offline-sort.png", "offline-sharp.png", f"sanity-{TASK}.png", "map.png"}


class Deaf(engines.Transformers):
    def load(self, state):
        pass


class Scrambling(engines.Transformers):
    def load(self, state):
        super().load({name: x.flip(0) if x.ndim == 2 else x for name, x in state.items()})


@pytest.mark.parametrize(
    ("engine", "message"),
    [(Deaf, "holds weights whose magnitudes sum to"), (Scrambling, "nats from those of the same")],
)
def test_a_run_stops_when_the_engine_has_other_weights(folder, engine, message):
    path = folder / "models" / f"{TASK}-64x1-0"
    fp32 = policy.Precision("fp32")
    arm = reinforce.Arm("arm", fp32, sanity.arms(8)[0].loss)
    pool = policy.prompts_of(tasks.parse(TASK), 16, seed=0)
    steps = reinforce.train(
        arm, tasks.parse(TASK), pool, engine(path, fp32), path,
        reinforce.Schedule(steps=3, prompts=4), seed=0,
    )
    with pytest.raises(reinforce.NotSynchronisedError, match=message):
        for _ in steps:
            pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["sanity", "--arms", "fp17"], "no arms fp17: there are bf16, "),
     (["sanity", "brackets"], "no task 'brackets': give one of add, sort, brackets")],
)
def test_what_is_misspelt_is_named(folder, arguments, message):
    with pytest.raises(SystemExit, match=message):
        lab(folder, "transformers", *arguments)


def test_a_missing_record_is_said_to_be_missing(tmp_path):
    for name, table in report.TABLES.items():
        assert "No record of `python -m benchmarks.lab" in table(tmp_path), name


def test_the_note_of_a_model_says_how_it_was_made(folder):
    note = json.loads((folder / "models" / f"{TASK}-64x1-0" / "made.json").read_text())
    assert note["solved"] >= 0.3 and note["parameters"] > 0


def test_rounding_leaves_embeddings_and_head_alone(folder):
    model = policy.open_policy(folder / "models" / "sharp-64x1-0", policy.Precision("fp32"))
    before = model.state_dict()
    after = reinforce.ROUNDINGS["int4"](before)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= same
    assert "model.layers.0.mlp.up_proj.weight" not in same
    levels = after["model.layers.0.mlp.up_proj.weight"][0].unique()
    assert len(levels) <= 15
