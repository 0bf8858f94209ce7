"""Versions, for reports of bugs."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from iscorrect.cli.terminal import say

HELP = "versions, for reports of bugs"

PACKAGES = (
    "iscorrect", "torch", "numpy", "einops", "matplotlib", "rich", "pyarrow", "safetensors", "vllm",
    "sglang", "transformers", "trl", "verl",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``iscorrect env`` has none."""


def run(options: argparse.Namespace) -> int:
    """0."""
    lines = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            lines[name] = version(name)
        except PackageNotFoundError:
            lines[name] = "not installed"
    cuda = torch.cuda.is_available()
    lines["accelerator"] = torch.cuda.get_device_name() if cuda else "none"
    say(*(f"{name:<13} {text}" for name, text in lines.items()))
    return 0
