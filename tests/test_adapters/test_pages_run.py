"""The code of the pages runs as it is written, in the trainer that the page is about."""

import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from stubs import real

import iscorrect
from iscorrect.dumps import DumpWriter

pytestmark = pytest.mark.filterwarnings("ignore")
PAGES = Path(iscorrect.__file__).parents[1] / "docs" / "trainers"


def code(page):
    """The blocks of Python of a page, one after the other."""
    return re.findall(r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text(), flags=re.S)


@pytest.fixture(autouse=True)
def dumps(monkeypatch, tmp_path):
    """Dumps go where the test may write."""
    monkeypatch.setattr("iscorrect.dumps.DumpWriter", lambda _: DumpWriter(tmp_path / "dump"))


def test_openrlhf(monkeypatch):
    (actor,) = real("openrlhf", "openrlhf.trainer.ray.ppo_actor")
    ray = pytest.importorskip("ray")
    own = environment_of_its_own(ray)
    monkeypatch.setattr(actor, "PolicyLoss", actor.PolicyLoss)
    started = {}
    monkeypatch.setattr(ray, "init", lambda **options: started.update(options))
    monkeypatch.setattr("runpy.run_module", lambda name, **_: started.update(module=name))
    exec(code("openrlhf")[0], {})
    assert started["module"] == "openrlhf.cli.train_ppo_ray"
    assert started["runtime_env"]["env_vars"] == own
    started["runtime_env"]["worker_process_setup_hook"]()
    assert actor.PolicyLoss(is_correction_level="token").dumps is not None


def environment_of_its_own(ray):
    """The variables that OpenRLHF sets in its workers where it starts Ray itself."""
    (cli,) = real("openrlhf", "openrlhf.cli.train_ppo_ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: False)
        patch.setattr(ray, "init", Mock(side_effect=StopIteration))
        with pytest.raises(StopIteration):
            cli.train(None)
        return ray.init.call_args.kwargs["runtime_env"]["env_vars"]


def test_skyrl(monkeypatch):
    ppo_utils, entry = real(
        "skyrl", "skyrl.backends.skyrl_train.utils.ppo_utils",
        "skyrl.train.entrypoints.main_base",
    )
    called = []
    monkeypatch.setattr(entry, "main", lambda: called.append(True))
    known = dict(ppo_utils.PolicyLossRegistry._functions)
    first, second = code("skyrl")
    try:
        exec(first, {})
        assert called
        assert callable(ppo_utils.PolicyLossRegistry.get("iscorrect"))
    finally:
        ppo_utils.PolicyLossRegistry._functions = known
    exec(second, {"logged": {}})


def test_areal(monkeypatch):
    (actor,) = real("areal", "areal.trainer.ppo.actor")
    own = actor.grpo_loss_fn
    monkeypatch.setattr(actor, "grpo_loss_fn", own)
    exec(code("areal")[0], {})
    assert actor.grpo_loss_fn is not own


def test_ms_swift(monkeypatch, tmp_path):
    hf, arguments = real(
        "ms-swift", "swift.rlhf_trainers.grpo_trainer", "swift.arguments.base_args.base_args"
    )
    own = hf.GRPOTrainer
    monkeypatch.setattr(hf, "GRPOTrainer", type("GRPOTrainer", (own,), dict(vars(own))))
    plugin = tmp_path / "my_corrections.py"
    plugin.write_text(code("ms_swift")[0])
    given = SimpleNamespace(external_plugins=[str(plugin)], custom_register_path=[])
    arguments.BaseArguments._import_external_plugins(given)
    assert hf.GRPOTrainer._get_rollout_is_correction is not own._get_rollout_is_correction


def test_tinker():
    real("tinker", "tinker")
    sent = []
    client = SimpleNamespace(forward_backward_custom=lambda data, loss_fn: sent.append(loss_fn))
    ones = [torch.ones(2)]
    first, second = code("tinker")
    exec(first, {"training_client": client, "data": []})
    assert callable(sent[0])
    values = {"trainers": ones, "samplers": ones, "advantages": ones}
    exec(second, values)
    assert values["ready"][0].tolist() == [1, 1]
