"""The trainers' own code on a CPU, and everything that stands in for what a CPU cannot have."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
import typing
import warnings
from unittest.mock import MagicMock

import pytest
import typing_extensions

STUBS = {
    "deepspeed": "CUDA kernels",
    "flash_attn": "CUDA kernels",
    "mcore_bridge": "Megatron",
    "megatron": "CUDA kernels",
    "mindspeed": "an accelerator",
    "ring_flash_attn": "CUDA kernels",
    "sglang": "an engine",
    "swanlab": "a service for logs",
    "tensorboardX": "a service for logs",
    "trackio": "a service for logs",
    "transformer_engine": "CUDA kernels",
    "wandb": "a service for logs",
    "vllm": "an engine",
}
"""Modules that are not installed, by what they would need. Any name in them is a mock."""


class Kind(type):
    """A class whose every attribute is a mock."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{cls.__name__}.{name}")


class Stub(types.ModuleType):
    """A module in which every name is a mock."""

    __path__: typing.ClassVar = []
    __version__ = "0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper() and not name.isupper():  # may be derived from
            return Kind(name, (MagicMock,), {})
        return MagicMock(name=f"{self.__name__}.{name}")


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stubs after everything that is installed."""

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in STUBS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


def install():
    """Let the stubs be imported, in this process."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
    # SkyRL 0.3 holds typing's own in pydantic models, which takes it from Python 3.12 on
    typing.TypedDict = typing_extensions.TypedDict


def real(distribution, *modules):
    """The trainer's own modules, where its package is installed; the test is skipped elsewhere."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed", allow_module_level=True)
    install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [importlib.import_module(name) for name in modules]
