"""Shadow samples on disk: answers, and those that one model gave to the same questions; JSON lines.

Leaves out who asks (`viaticum.agents.workflow.shadow`) and what follows (`viaticum.reports.shadow`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from viaticum.errors import DataError, InputError
from viaticum.files import encode_json, private_file, whole_lines
from viaticum.types import AnswerKind

SHADOWS = "shadows.jsonl"


@dataclass(frozen=True, slots=True)
class GivenAnswer:
    """One of the two answers. correct: None where that is not known."""

    pair: str
    answer: str | None
    cost_nanousd: int
    seconds: float
    correct: bool | None = None


@dataclass(frozen=True, slots=True)
class ShadowSample:
    """A question that was sampled.

    id: of the request. question_id: digest of the question, whose text is not kept. live: the answer that its
    caller got. shadow: what the model gave that is always asked; None where it was not asked, or failed, and
    `reason` says why. equal: whether the answers are the same. by: who says what is correct: "gold", "judge"
    or nobody (""). at: ISO 8601. kind: of the answer that is expected.
    """

    id: str
    question_id: str
    model: str
    live: GivenAnswer
    shadow: GivenAnswer | None = None
    equal: bool | None = None
    by: str = ""
    reason: str = ""
    at: str = ""
    kind: AnswerKind = "auto"


def append_sample(path: Path, sample: ShadowSample) -> None:
    """Append a sample in one write, so that several processes can. Raises `InputError`."""
    line = (encode_json(asdict(sample)) + "\n").encode("utf-8", "replace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        private_file(path)
        with path.open("a+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def read_samples(path: str | Path) -> list[ShadowSample]:
    """Read the samples, the last of each request; lines that a kill cut off are left out.

    Raises:
        InputError: there is no such file.
        DataError: a line is no sample; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no shadow samples at {path}; they are recorded where shadow sampling is on")
    found: dict[str, ShadowSample] = {}
    for number, line in whole_lines(path):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        sample = _parse(values, f"{path}, line {number}")
        found[sample.id] = sample
    return list(found.values())


def _parse(values: Any, location: str) -> ShadowSample:
    try:
        live, shadow = _answer(values["live"]), values.get("shadow")
        known = {name: values[name] for name in ShadowSample.__slots__ if name in values}
        return ShadowSample(**{**known, "live": live, "shadow": None if shadow is None else _answer(shadow)})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{location}: not a shadow sample ({error}); the file is damaged") from None


def _answer(values: Mapping[str, Any]) -> GivenAnswer:
    return GivenAnswer(**{name: values[name] for name in GivenAnswer.__slots__ if name in values})
