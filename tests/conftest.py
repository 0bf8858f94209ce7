"""Hypothesis profiles: `dev` by default, `ci` in CI, `deep` for a night."""

import os
import sys
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, settings

FRAMEWORKS = {
    "tiny_trl.py": "trl", "verl_engine.py": "transfer_queue", "verl_recorder.py": "transfer_queue",
}
# they import their framework when they are collected
collect_ignore = [
    f"test_adapters/{file}" for file, name in FRAMEWORKS.items() if find_spec(name) is None
]

slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", max_examples=20, deadline=None, suppress_health_check=slow)
settings.register_profile(
    "ci", max_examples=60, deadline=None, derandomize=True, suppress_health_check=slow
)
settings.register_profile("deep", max_examples=5000, deadline=None, suppress_health_check=slow)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_addoption(parser):
    parser.addoption(
        "--messages", metavar="FILE", help="write every message of the library that tests saw"
    )


def pytest_configure(config):
    if path := config.getoption("--messages"):
        from messages import Messages

        messages = Messages()
        messages.record()
        config.add_cleanup(lambda: messages.write(path))


@pytest.fixture
def modules():
    """Modules of trainers' fakes leave with the test."""
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in ("slime", "miles", "megatron", "prime_rl", "nemo_rl"):
            del sys.modules[name]
