"""The rows that trainers write, in the terms of a dump."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from iscorrect.dumps.dump import REQUIRED, Row
from iscorrect.errors import InputError, input_error


def _prime_rl(row: Row, path: Path) -> Row:
    return {
        "rollout_log_probs": row["inference_logprobs"],
        "old_log_probs": row["trainer_logprobs"],
        "mask": row.get("loss_mask"),
        "advantages": row.get("advantages"),
        "entropy": row.get("entropy"),
        "token_ids": row.get("token_ids"),
        "step": row.get("step", step_of(path)),
    }


def _nemo_rl(row: Row, path: Path) -> Row:
    tokens = {
        "rollout_log_probs": row["generation_logprobs"],
        "old_log_probs": row["prev_logprobs"],
        "mask": row.get("token_loss_mask"),
        "advantages": row.get("advantages"),
        "token_ids": row.get("token_ids"),
    }
    # Values are batches of one, and the first token of a sequence has no log-prob.
    unwrapped = {name: only(x) for name, x in tokens.items()}
    if unwrapped["mask"] is not None and only(row.get("sample_loss_mask", 1)) == 0:
        unwrapped["mask"] = [0] * len(unwrapped["mask"])
    sliced = {name: x[1:] if isinstance(x, list) else x for name, x in unwrapped.items()}
    return sliced | {"step": step_of(path)}


def _slime(row: Row, path: Path) -> Row:
    rollout = row["rollout_log_probs"]
    response = len(rollout)
    mask = row.get("loss_mask", row.get("loss_masks"))
    tokens = row.get("tokens")
    return {
        "rollout_log_probs": rollout,
        "old_log_probs": row["log_probs"],
        "mask": [1] * response if mask is None else mask[len(mask) - response :],
        "token_ids": None if tokens is None else tokens[len(tokens) - response :],
        "advantages": row.get("advantages"),
        "group": row.get("group_index"),
        "step": step_of(path),
    }


SLIME_COLUMNS = (
    "rollout_log_probs", "log_probs", "loss_mask", "loss_masks", "tokens", "advantages",
    "group_index",
)

DIALECT_COLUMNS = (
    *SLIME_COLUMNS, "inference_logprobs", "trainer_logprobs", "entropy", "token_ids", "step",
    "generation_logprobs", "prev_logprobs", "token_loss_mask", "sample_loss_mask",
)
"""Every column that a dialect uses."""

DIALECTS: dict[str, Callable[[Row, Path], Row]] = {
    "inference_logprobs trainer_logprobs": _prime_rl,
    "generation_logprobs prev_logprobs": _nemo_rl,
    "rollout_log_probs log_probs": _slime,
}
"""By the two columns that give a dialect away. Ours has `old_log_probs` and comes first."""


def translated(raw: Row, where: str, path: Path) -> Row:
    """A row in the names of a dump, whichever trainer wrote it."""
    if all(name in raw for name in REQUIRED):
        return raw
    if "old_log_probs" not in raw:
        for columns, translate in DIALECTS.items():
            if all(raw.get(name) is not None for name in columns.split()):
                try:
                    return translate(raw, path)
                except (TypeError, ValueError, IndexError) as error:
                    raise input_error(
                        "read_dump", columns.split()[0], expected="lists, as its trainer writes",
                        got=f"{type(raw[columns.split()[0]]).__name__} in {where} ({error})",
                        fix="write one list of numbers for each sequence",
                    ) from error
    raise unknown_dialect(where, list(raw), [n for n in REQUIRED if n not in raw])


def unknown_dialect(
    where: str, got: Iterable[str], missing: Sequence[str] = REQUIRED
) -> InputError:
    """The error for columns that no known dialect has."""
    names = ", ".join(list(got)[:12]) or "nothing"
    return input_error(
        "read_dump", ", ".join(missing), expected="there, or their names in a known dialect "
        "(prime-rl token exports, NeMo-RL train_data, slime --dump-details)",
        got=f"{names} in {where}",
        fix="rename the columns, or dump both log-probs with iscorrect.dumps.DumpWriter",
    )


def step_of(path: Path) -> int | None:
    """The training step that a path names."""
    found = re.findall(r"step_?(\d+)", str(path)) or re.findall(r"^(\d+)(?:_\d+)?$", path.stem)
    return int(found[-1]) if found else None


def only(x: Any) -> Any:
    """The single item of nested lists of one; anything else as it is."""
    while isinstance(x, list) and len(x) == 1:
        x = x[0]
    return x
