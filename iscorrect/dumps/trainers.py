"""The rows that trainers write, in the terms of a dump."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

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
        "pack": row.get("micro_sequence_idx"),
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
    old = row["log_probs"]
    lengths = (row.get(name) for name in ("response_length", "response_lengths"))
    response = int(next((x for x in lengths if x is not None), len(old)))
    rollout = row.get("rollout_log_probs")
    mask = row.get("loss_mask", row.get("loss_masks"))
    tokens = row.get("tokens")
    return {
        # a request that failed has none, which the report counts
        "rollout_log_probs": [math.nan] * response if rollout is None else rollout,
        "old_log_probs": old,
        "mask": [1] * response if mask is None else mask,
        "token_ids": None if tokens is None else tokens[len(tokens) - response :],
        "advantages": row.get("advantages"),
        "entropy": row.get("entropy"),
        "group": row.get("group_index"),
        "policy_version": _one_version(row.get("weight_versions")),
        "step": step_of(Path(path.name)),  # a folder may name the step of a checkpoint
    }


def _one_version(versions: Any) -> Any:
    """What is known of a sample's version: where several sampled it, that they did."""
    different = list(dict.fromkeys(map(str, versions or [])))
    if len(different) != 1:
        return ", ".join(different) or None
    whole = re.fullmatch(r"[0-9]{1,18}", different[0])
    return int(different[0]) if whole else different[0]


SLIME_COLUMNS = (
    "rollout_log_probs", "log_probs", "loss_mask", "loss_masks", "tokens", "advantages",
    "group_index", "response_length", "response_lengths", "entropy", "weight_versions",
    "sample_indices",
)

DIALECT_COLUMNS = (
    *SLIME_COLUMNS, "inference_logprobs", "trainer_logprobs", "entropy", "token_ids", "step",
    "micro_sequence_idx", "generation_logprobs", "prev_logprobs", "token_loss_mask",
    "sample_loss_mask",
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
            if all(name in raw for name in columns.split()) and raw[columns.split()[1]] is not None:
                try:
                    return translate(raw, path)
                except (TypeError, ValueError, IndexError) as error:
                    raise input_error(
                        "read_dump", columns.split()[0], expected="lists, as its trainer writes",
                        got=f"{type(raw[columns.split()[0]]).__name__} in {where} ({error})",
                        fix="write one list of numbers for each sequence",
                    ) from error
    scored = raw.get("log_probs") is not None or "old_log_probs" in raw
    if "rollout_log_probs" in raw and "response_length" in raw and not scored:
        raise input_error(
            "read_dump", "path", expected="of what the trainer wrote",
            got=f"a rollout without the trainer's log-probs, in {where}",
            fix="pass the directory of --dump-details, or train_data in it",
        )
    raise unknown_dialect(where, list(raw), [n for n in REQUIRED if n not in raw])


class OfRank(dict[Any, Any]):
    """A row of a file that one rank wrote; tensor-parallel ranks write the same."""


class Copies:
    """Which samples of a step another rank's file held."""

    def __init__(self) -> None:
        self.before: set[bytes] = set()
        self.here: set[bytes] = set()
        self.unscored: tuple[str, list[str]] | None = None

    def next_file(self) -> None:
        """What is read from here on is in another file."""
        self.before |= self.here
        self.here = set()

    def again(self, row: Mapping[Any, Any], where: str) -> bool:
        """Whether another rank's file had this sample, or this rank's has not its log-probs.

        Of a pipeline, the last stage alone has them.
        """
        if not isinstance(row, OfRank):
            return False
        if "log_probs" not in row:
            self.unscored = where, [str(name) for name in row]
            return True
        digest = hashlib.sha256()
        for name in ("rollout_id", "sample_indices", "tokens", "rollout_log_probs"):
            x = row.get(name)
            digest.update(repr(x.tolist() if isinstance(x, Tensor) else x).encode())
        self.here.add(digest.digest())
        return digest.digest() in self.before


def with_rollouts(rows: Iterable[Any], rollouts: Callable[[], list[Any]]) -> Iterator[Any]:
    """Rows of slime's trainer with the group and versions that their rollouts have.

    Args:
        rows: what the trainer wrote.
        rollouts: gives the samples of the step, in their order; or none.
    """
    samples: list[Any] | None = None
    by_index: dict[Any, Any] = {}
    for row in rows:
        if not isinstance(row, dict) or "group_index" in row or row.get("log_probs") is None:
            yield row
            continue
        if samples is None:
            samples = [sample for sample in rollouts() if isinstance(sample, dict)]
            by_index = {sample.get("index"): sample for sample in samples}
        place = row.get("rollout_position")
        if isinstance(place, int) and 0 <= place < len(samples):
            sample = samples[place]
        else:
            sample = by_index.get(row.get("sample_index", row.get("sample_indices")), {})
        yield {name: sample.get(name) for name in ("group_index", "weight_versions")} | row


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
