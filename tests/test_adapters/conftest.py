"""Helpers that import a framework are collected only where it is installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("trl") else ["tiny_trl.py"]
