"""The examples run."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_minimal_loop_learns():
    main = runpy.run_path(str(EXAMPLES / "minimal_loop.py"))["main"]
    rewards = main(steps=60, prompts=8, group=16)
    assert rewards[-1] > rewards[0] + 0.2
