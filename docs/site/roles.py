"""For mkdocstrings: :class:`Name` and its kin in docstrings become links, examples become code."""

import re

import griffe

import iscorrect

ROLE = re.compile(r":(?:func|class|meth|attr|data|mod):`~?\.?([\w.]+)`")
EXAMPLE = re.compile(r"^>>> .*\n?(?:.+\n?)*", re.MULTILINE)


def linked(match):
    """A reference to a public name as a link, any other name as code."""
    name = match.group(1)
    short = name.rpartition(".")[2]
    if short in iscorrect.__all__:
        return f"[`{short}`][iscorrect.{short}]"
    return f"[`{short}`][{name}]" if name.startswith("iscorrect.") else f"`{name}`"


def fenced(match):
    """An example, up to the next empty line, as a block of code."""
    return f"```pycon\n{match.group().rstrip()}\n```\n"


class Roles(griffe.Extension):
    """Rewrites docstrings as they are read."""

    def on_instance(self, *, obj, **_):
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            text = EXAMPLE.sub(fenced, obj.docstring.value)
            obj.docstring.value = ROLE.sub(linked, text)
