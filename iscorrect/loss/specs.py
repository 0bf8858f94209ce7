"""Corrections and losses as plain data: dictionaries for YAML, and one line of text.

A part is its name with its arguments: ``{"name": "truncate", "cap": 2.0}`` in a dictionary,
``truncate(cap=2)`` in text. A string may stand for the dictionary that it says, so YAML may hold
``bound: truncate(cap=2)`` or ``bound: ignore``.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from iscorrect.errors import InputError, describe, input_error
from iscorrect.loss.aggregate import AGGREGATIONS
from iscorrect.loss.bounds import (
    ByAge,
    Clip,
    ConfidenceCap,
    Ignore,
    Mask,
    ParetoSmooth,
    SignedTruncate,
    Truncate,
)
from iscorrect.loss.caps import ESSCap, IonidesCap, MSEOptimalCap
from iscorrect.loss.correction import Correction
from iscorrect.loss.objectives import OBJECTIVES
from iscorrect.loss.policy_loss import PolicyLoss
from iscorrect.loss.presets import PRESETS
from iscorrect.loss.rules import (
    AgeAbove,
    BinaryKL,
    DivergenceAbove,
    OffPolicyNegative,
    ProbabilityShift,
    RatioOutside,
    SecondMomentAbove,
    Veto,
)
from iscorrect.loss.terms import ReferenceKL

Named = Mapping[str, Callable[..., Any]]
CorrectionConfig = str | Mapping[str, Any] | Correction
LossConfig = str | Mapping[str, Any] | PolicyLoss

BOUNDS: Named = {
    "ignore": Ignore, "truncate": Truncate, "clip": Clip, "mask": Mask,
    "confidence-cap": ConfidenceCap, "pareto-smooth": ParetoSmooth,
    "signed-truncate": SignedTruncate, "by-age": ByAge,
}
CAPS: Named = {"ionides": IonidesCap, "mse-optimal": MSEOptimalCap, "ess": ESSCap}
RULES: Named = {
    "ratio-outside": RatioOutside, "divergence-above": DivergenceAbove, "veto": Veto,
    "binary-kl": BinaryKL, "probability-shift": ProbabilityShift,
    "off-policy-negative": OffPolicyNegative, "second-moment-above": SecondMomentAbove,
    "age-above": AgeAbove,
}
CORRECTIONS: Named = {**PRESETS, "correction": Correction}
REFERENCE: Named = {"reference-kl": ReferenceKL}
INSIDE: Mapping[str, Named] = {
    "correction": CORRECTIONS, "objective": OBJECTIVES, "aggregation": AGGREGATIONS,
    "reference_kl": REFERENCE, "bound": BOUNDS, "fresh": BOUNDS, "stale": BOUNDS, "reject": RULES,
    "cap": CAPS, "high": CAPS,
}
"""Which parts an argument of that name may hold."""
OF_ANY_PRESET = ("normalize", "nonfinite")


def parse(config: CorrectionConfig) -> Correction:
    """A correction from a line of text or a dictionary.

        token-tis                                    a preset
        sequence-mis:low=0.5,high=3                  with its arguments; "none" stands for None
        token-tis:cap=ionides,nonfinite=neutral      a cap from the data; what all of them take
        correction:level=sequence,bound=truncate(cap=ess(target=0.9)),reject=veto+binary-kl

    Args:
        config: as above, or a dictionary of the same: ``{"name": "token-tis", "cap": 2}``, or
            without a name that of :func:`to_dict`.

    Raises:
        InputError: an unknown name or argument, or a value that is refused.

    >>> parse("sequence-mis:high=3").bound
    Mask(low=0.0, high=3.0)
    >>> parse({"level": "sequence", "reject": ["veto(low=1e-4)"]}).reject
    (Veto(low=0.0001, high=None),)
    """
    if isinstance(config, Correction):
        return config
    return _checked("parse", _built("parse", "correction", config), Correction)


def parse_loss(config: LossConfig) -> PolicyLoss:
    """A loss from a line of text or a dictionary.

    Args:
        config: the names of a correction, an objective and an aggregation, each with its arguments
            and any of them left out, and ``over=kept``, in any order, with white space between;
            or a dictionary with the arguments of :class:`PolicyLoss`.

    Raises:
        InputError: an unknown name or argument, or a value that is refused.

    >>> parse_loss("token-tis:cap=3 ppo-clip:high=1.28 seq-mean-token-sum over=kept").objective
    PPOClip(low=0.8, high=1.28, level='token', dual=None, cap=None)
    >>> parse_loss({"correction": "icepop", "aggregation": "sum"}) == parse_loss("icepop sum")
    True
    """
    if isinstance(config, PolicyLoss):
        return config
    given = _words_of_a_loss(config) if isinstance(config, str) else config
    if not isinstance(given, Mapping):
        raise input_error(
            "parse_loss", "config", expected="text, a dictionary, or a PolicyLoss",
            got=repr(config), fix="pass 'token-tis ppo-clip'",
        )
    given = {_snake(key): value for key, value in given.items()}
    check_keys("parse_loss", "PolicyLoss", given, inspect.signature(PolicyLoss).parameters)
    arguments: dict[str, Any] = {}
    for key, value in given.items():
        # The name of an aggregation alone: its horizon may stand beside it.
        alone = key == "aggregation" and isinstance(value, str) and value in AGGREGATIONS
        arguments[key] = value if alone else _value("parse_loss", key, value)
    if "horizon" in arguments:
        arguments["horizon"] = _whole(arguments["horizon"])
    return PolicyLoss(**{key: x for key, x in arguments.items() if x is not None})


def _words_of_a_loss(text: str) -> dict[str, str]:
    config: dict[str, str] = {}
    for word in filter(None, _split(re.sub(r"\s", " ", text), " ")):
        name = re.split(r"[:(=]", word, maxsplit=1)[0]
        parts = ("correction", "objective", "aggregation", "reference_kl")
        key = next((key for key in parts if name in INSIDE[key]), None)
        key, value = (name, word.partition("=")[2]) if key is None else (key, word)
        if key in config:
            raise input_error(
                "parse_loss", key, expected="given once", got=f"{config[key]!r} and {value!r}",
                fix="leave one of them out",
            )
        config[key] = value
    return config


def to_dict(spec: Correction | PolicyLoss) -> dict[str, Any]:
    """A correction or a loss as a dictionary of strings, numbers, lists and dictionaries.

    Args:
        spec: of the library's own parts; a callable of one's own has no name.

    Returns:
        Every argument, for :func:`parse` or :func:`parse_loss`, JSON or YAML.

    Raises:
        InputError: neither a correction nor a loss, or a part that has no name.

    >>> from iscorrect import sequence_tis
    >>> to_dict(sequence_tis())["bound"]
    {'name': 'truncate', 'cap': 2.0}
    """
    _check_spec("to_dict", spec)
    return {field.name: _plain(field.name, getattr(spec, field.name))
            for field in dataclasses.fields(spec)}


def to_text(spec: Correction | PolicyLoss) -> str:
    """A correction or a loss in one line, defaults left out.

    Args:
        spec: of the library's own parts.

    Returns:
        What :func:`parse` or :func:`parse_loss` reads back to an equal value.

    Raises:
        InputError: neither a correction nor a loss, or a part that has no name.

    >>> from iscorrect import PolicyLoss, PPOClip, token_tis
    >>> to_text(PolicyLoss(correction=token_tis(cap=3.0), objective=PPOClip(high=1.28)))
    'token-tis:cap=3 ppo-clip:high=1.28 token-mean'
    """
    _check_spec("to_text", spec)
    if isinstance(spec, Correction):
        return _outer(_correction_in_short(spec))
    words = [to_text(spec.correction), _outer(_shortened("objective", spec.objective)),
             _outer(_shortened("aggregation", spec.aggregation))]
    if spec.over != "mask":
        words.append(f"over={spec.over}")
    if spec.reference_kl is not None:
        words.append(_outer(_shortened("reference_kl", spec.reference_kl)))
    return " ".join(words)


def _check_spec(caller: str, spec: object) -> None:
    if not isinstance(spec, (Correction, PolicyLoss)):
        raise input_error(
            caller, "spec", expected="a Correction or a PolicyLoss", got=describe(spec),
            fix="pass token_tis(), or PolicyLoss(correction=token_tis())",
        )


# From plain data to parts.


def _built(caller: str, key: str, config: Any) -> Any:
    """The part that plain data names; what is a part already stays."""
    if isinstance(config, str):
        config = read(caller, config)
    if not isinstance(config, Mapping):
        return config
    table = INSIDE[key]
    arguments = {_snake(name): value for name, value in config.items()}
    unnamed = {"correction": "correction", "reference_kl": "reference-kl"}.get(key)
    name = arguments.pop("name", unnamed)
    if name not in table:
        near = difflib.get_close_matches(str(name), table, n=1)
        raise input_error(
            caller, "preset" if key == "correction" else key, expected="one of " + ", ".join(table),
            got=repr(name), fix=f"did you mean {near[0]!r}?" if near else "choose one of these",
        )
    make, everywhere = table[str(name)], {}
    if make in PRESETS.values():
        everywhere = {k: arguments.pop(k) for k in OF_ANY_PRESET if k in arguments}
    known = inspect.signature(make).parameters
    check_keys(caller, str(name), arguments, known)
    values = {key: _value(caller, key, value) for key, value in arguments.items()}
    for argument, value in values.items():
        if known[argument].annotation == "int":
            values[argument] = _whole(value)
    missing = [key for key, x in known.items() if x.default is x.empty and key not in values]
    if missing:
        raise input_error(
            caller, f"argument of {name}", expected=", ".join(missing), got="nothing",
            fix=f"pass {name}({missing[0]}=…)",
        )
    part = make(**values)
    if everywhere:
        part = dataclasses.replace(
            part, **{k: _value(caller, k, v) for k, v in everywhere.items()}
        )
    return part


def _value(caller: str, key: str, value: Any) -> Any:
    if key == "reject":
        if isinstance(value, str):
            value = _split(value, "+")
        if isinstance(value, Mapping):
            value = [value]
        return tuple(_built(caller, key, rule) for rule in value or ())
    if isinstance(value, Mapping):
        return _built(caller, key, value)
    if not isinstance(value, str):
        return value
    if value.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[value.lower()]
    try:
        return float(value)
    except ValueError:
        return _built(caller, key, value) if key in INSIDE else value


def _whole(value: Any) -> Any:
    """An int from a float that is one; all text is read as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_keys(
    caller: str, name: str, given: Mapping[str, Any], known: Mapping[str, Any]
) -> None:
    """Raise unless a part has all the arguments that it is given."""
    for key, value in given.items():
        if key not in known:
            raise input_error(
                caller, f"argument of {name}",
                expected="key=value with key one of " + (", ".join(known) or "none at all"),
                got=repr(f"{key}={value}"), fix=f"see help(iscorrect.{_snake(name)})",
            )


def _checked(caller: str, part: Any, kind: type[Correction]) -> Correction:
    if not isinstance(part, kind):
        raise input_error(
            caller, "config", expected="text, a dictionary, or a Correction", got=repr(part),
            fix="pass 'token-tis:cap=2'",
        )
    return part


# From text to plain data.


def read(caller: str, text: str) -> dict[str, str]:
    """The name of a part and its arguments, each still as text.

    Args:
        caller: what a message begins with.
        text: ``name``, ``name:key=value,…`` or ``name(key=value,…)``.

    Raises:
        InputError: it has another form.

    >>> read("parse", "token-tis:cap=ess(target=0.9)")
    {'name': 'token-tis', 'cap': 'ess(target=0.9)'}
    """
    found = re.fullmatch(r"\s*([\w-]+)\s*(?::(.*)|\((.*)\))?\s*", text, flags=re.DOTALL)
    if found is None:
        raise input_error(
            caller, "preset", expected="name, name:key=value,… or name(key=value,…)",
            got=repr(text), fix="pass 'token-tis:cap=2'",
        )
    name, outer, inner = found.groups()
    config = {"name": str(name)}
    for argument in filter(None, map(str.strip, _split(outer or inner or "", ","))):
        key, equals, value = argument.partition("=")
        if not equals:
            raise input_error(
                caller, f"argument of {name}", expected="key=value", got=repr(argument),
                fix=f"see help(iscorrect.{_snake(name)})",
            )
        if key.strip() in config:
            raise input_error(
                caller, f"argument of {name}", expected="each given once", got=repr(argument),
                fix="leave one of them out",
            )
        config[key.strip()] = value.strip()
    return config


def _split(text: str, separator: str) -> list[str]:
    """Cut where a separator stands outside all parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == separator and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _snake(name: str) -> str:
    return str(name).replace("-", "_")


# From parts to plain data, and to text.


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, float):
        return float(value)  # NumPy's are floats of another repr
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if key == "reject":
        return [_plain("rule", rule) for rule in value]
    if isinstance(value, Correction):
        return to_dict(value)
    table = RULES if key == "rule" else INSIDE.get(key, {})
    name = next((name for name, kind in table.items() if type(value) is kind), None)
    if name is None:
        raise input_error(
            "to_dict", key, expected="a part of the library, which has a name", got=repr(value),
            fix="keep a callable of your own in code: dataclasses.replace(loss, …)",
        )
    arguments = {field.name: _plain(field.name, getattr(value, field.name))
                 for field in dataclasses.fields(value)}
    return {"name": name, **arguments} if arguments else name


def _shortened(key: str, value: Any) -> Any:
    """As :func:`_plain`, without the arguments that are at their defaults."""
    if key == "reject":
        return [_shortened("rule", rule) for rule in value]
    config = _plain(key, value)
    if not isinstance(config, dict):
        return config
    changed = {
        field.name: _shortened(field.name, getattr(value, field.name))
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    }
    return {"name": config.get("name", "correction"), **changed}


def _correction_in_short(correction: Correction) -> dict[str, Any]:
    """A preset with the arguments that make it this correction, or the correction itself."""
    everywhere = {
        key: getattr(correction, key) for key in OF_ANY_PRESET
        if getattr(correction, key) != getattr(Correction(), key)
    }
    bare = dataclasses.replace(correction, normalize=False, nonfinite="drop")
    known: dict[str, Any] = {"level": correction.level}
    for part in (correction.bound, *correction.reject):
        known |= {name: getattr(part, name) for name in getattr(part, "__dataclass_fields__", ())}
    for name, preset in PRESETS.items():
        parameters = inspect.signature(preset).parameters
        arguments = {key: known[key] for key in parameters if key in known}
        try:
            same = preset(**arguments) == bare
        except InputError:
            continue
        if same:
            changed = {k: _shortened(k, v) for k, v in arguments.items()
                       if v != parameters[k].default}
            return {"name": name, **changed, **everywhere}
    found: dict[str, Any] = _shortened("correction", correction)
    return found


def _outer(config: Any) -> str:
    """A part in text, at the top: ``name:key=value``."""
    if not isinstance(config, dict):
        return _written(config)
    name, *arguments = config.items()
    return str(name[1]) + (":" + _listed(arguments) if arguments else "")


def _written(value: Any) -> str:
    if isinstance(value, dict):
        name, *arguments = value.items()
        return str(name[1]) + (f"({_listed(arguments)})" if arguments else "")
    if isinstance(value, list):
        return "+".join(map(_written, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _listed(arguments: Sequence[tuple[str, Any]]) -> str:
    return ",".join(f"{key}={_written(value)}" for key, value in arguments)
