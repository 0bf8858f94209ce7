"""``iscorrect env``."""

from __future__ import annotations

import argparse
import platform

import torch

PACKAGES = (
    "torch", "numpy", "einops", "matplotlib", "rich", "pyarrow", "safetensors", "vllm", "sglang",
    "transformers", "trl", "verl",
)


def add_env_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``iscorrect env``: none."""


def run_env(args: argparse.Namespace) -> int:
    """``iscorrect env``: versions, for a bug report."""
    from importlib.metadata import PackageNotFoundError, version

    lines = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("iscorrect", *PACKAGES):
        try:
            lines[name] = version(name)
        except PackageNotFoundError:
            lines[name] = "not installed"
    cuda = torch.cuda.is_available()
    lines["accelerator"] = torch.cuda.get_device_name() if cuda else "none"
    for name, text in lines.items():
        print(f"{name:<13} {text}")
    return 0
