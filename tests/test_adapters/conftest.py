import sys

import pytest


@pytest.fixture
def modules():
    """Modules of fakes leave with the test."""
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in ("slime", "miles", "megatron", "prime_rl", "nemo_rl"):
            del sys.modules[name]
