"""For mkdocstrings: :class:`Name` and its kin in docstrings become links into the API reference."""

import re

import griffe

import iscorrect

ROLE = re.compile(r":(?:func|class|meth|attr|data|mod):`~?\.?([\w.]+)`")


def linked(match):
    """A reference to a public name as a link, any other name as code."""
    name = match.group(1)
    short = name.rpartition(".")[2]
    if short in iscorrect.__all__:
        return f"[`{short}`][iscorrect.{short}]"
    return f"[`{short}`][{name}]" if name.startswith("iscorrect.") else f"`{name}`"


class Roles(griffe.Extension):
    """Rewrites docstrings as they are read."""

    def on_instance(self, *, obj, **_):
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(linked, obj.docstring.value)
