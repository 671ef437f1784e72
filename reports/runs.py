"""A run in memory: its rows as columns, groups of rows without a right answer, and texts of several models.

Leaves out reading it (`run_reader`), the ledger (`ledger_history`) and all arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from viaticum.jobs import Job
from viaticum.types import Outcome

Array = np.ndarray[Any, Any]
PARTS = 20  # of a text, for who wrote which
PHASES = THINKING, ANSWER = ("thinking", "answer")
STATES = ("answered", "skipped", "failed")
NO_ROUTE = "(no route)"
EXAMPLES = 3
LONGEST_EXAMPLE = 240  # characters


@dataclass(frozen=True, slots=True)
class Columns:
    """Arrays [rows], in the order the rows ended; NaN where a value is not known.

    Attributes:
        text: 64-bit digest of the question, 0 where its text is not known.
        state: index in `STATES`.
        route: index in `Run.routes`.
        graded: the right answer is known.
        accuracy: predicted accuracy of the row's plan.
        cost: nano-dollars.
        tokens: output tokens of all calls of the row.
        calls: number of calls, checks of answers aside; a row with at least one was tried.
        cached: a call was answered from an earlier one.
        seen: 1 where the router was fitted on the question, 0 where it was not, -1 where that is not known.
    """

    ids: tuple[str, ...]
    text: Array
    state: Array
    route: Array
    graded: Array
    right: Array
    accuracy: Array
    cost: Array
    cost_p50: Array
    cost_p90: Array
    tokens: Array
    tokens_p50: Array
    tokens_p90: Array
    seconds: Array
    calls: Array
    cached: Array
    seen: Array

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Example:
    """A row to show; its texts are cut at `LONGEST_EXAMPLE` characters."""

    id: str
    question: str
    reason: str
    answer: str | None
    gold: str | None


@dataclass(slots=True)
class Group:
    """Rows without a right answer, for one reason.

    Attributes:
        state: failed, skipped, no answer (nothing could be read from the text) or wrong.
        reason: numbers in it are replaced by N.
    """

    state: str
    reason: str
    count: int = 0
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Written:
    """A text by several models, or one with thinking before its answer.

    Attributes:
        pieces: (model, text) in order.
        thinking: how many of the pieces, the first ones, are thinking.
    """

    id: str
    question: str
    pieces: tuple[tuple[str, str], ...]
    thinking: int = 0


@dataclass(slots=True)
class Texts:
    """Texts that several models wrote, or with thinking: a few whole, and shares by position in the text.

    Attributes:
        count: number of texts by several models.
        thought: number of texts with thinking, by one model or several.
        shown: the few that are kept.
        parts: by model, characters in each of `PARTS` equal parts of the text, summed over the texts by
            several models.
        phases: as `parts`, by (phase, model) of `PHASES`, over the texts with thinking too.
    """

    count: int = 0
    thought: int = 0
    shown: list[Written] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    phases: dict[tuple[str, str], list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """A run that was read.

    Attributes:
        job: None for an outcome table; `outcomes` holds that table.
        calls: by key of a hold, the index of the row that paid, what the row says the call cost, and what the
            provider says (nano-dollars).
        cached: keys of calls that were answered from an earlier one.
        usage: by model, [input, output] tokens as the rows tell them.
        single: the pair whose rows stand for an outcome table that holds several.
    """

    name: str
    path: str
    kind: Literal["job", "outcome table"]
    rows: Columns
    routes: tuple[str, ...]
    job: Job | None = None
    calls: dict[str, tuple[int, int, int | None]] = field(default_factory=dict)
    cached: frozenset[str] = frozenset()
    usage: dict[str, list[int]] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    texts: Texts = field(default_factory=Texts)
    outcomes: tuple[Outcome, ...] = ()
    single: str = ""
    warnings: tuple[str, ...] = ()


def text_number(question: str | None) -> int:
    """64-bit digest of a question, whatever its white space; 0 for an empty one."""
    words = " ".join((question or "").split())
    return int.from_bytes(blake2b(words.encode(), digest_size=8).digest(), "big") or 1 if words else 0


def shortened(text: str, most: int = LONGEST_EXAMPLE) -> str:
    """The text on one line, cut at `most` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
