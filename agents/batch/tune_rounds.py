"""The rounds of `viaticum tune`: buys the outcomes that are worth most, then those of held-out questions.

Leaves out which outcomes those are (`routers.query.acquisition`) and what a run is made from
(`agents.batch.tune`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from viaticum.agents.batch.executor import process_rows
from viaticum.agents.batch.output import RowJournal
from viaticum.agents.batch.steps import RowTools
from viaticum.files import JournalFile
from viaticum.jobs import JobRow, read_rows
from viaticum.money import NANOUSD_PER_USD
from viaticum.questions import Question
from viaticum.routers.query.acquisition import (
    AcquisitionSettings,
    Hopeless,
    KnownOutcomes,
    find_hopeless,
    next_round,
)
from viaticum.types import Outcome, Pair

if TYPE_CHECKING:
    from viaticum.agents.batch.tune import Tuning

LEARNING_SHARE = 0.6  # of the budget at least; the rest pays for the answers to held-out questions
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class Bought:
    """What was bought.

    outcomes: all of them. held_out: ids of the questions that were held out. dropped: pairs that were beaten
    beyond doubt, and were asked no further. unanswered: errors of calls that gave no outcome, with how many.
    dollars: posted in the ledger. stopped: whether `stop` ended the run before it was through.
    """

    outcomes: tuple[Outcome, ...]
    held_out: frozenset[str]
    pairs: tuple[Pair, ...]
    dropped: tuple[Hopeless, ...]
    unanswered: dict[str, int]
    dollars: float
    stopped: bool = False

    @property
    def remaining(self) -> tuple[Pair, ...]:
        """Pairs to choose from: not dropped, with an outcome at least."""
        gone = {self.pairs[each.pair] for each in self.dropped}
        known = {row.pair for row in self.outcomes if row.question_id not in self.held_out}
        return tuple(pair for pair in self.pairs if pair in known and pair not in gone)


class Purchase:
    """The rounds of one run. known: of the questions to learn from."""

    def __init__(
        self,
        tuning: Tuning,
        rows: RowTools,
        journal: RowJournal,
        rounds: JournalFile,
        embeddings: np.ndarray[Any, Any],
        prices: np.ndarray[Any, Any],
        progress: Progress | None,
    ) -> None:
        self.tuning, self.rows, self.journal, self.rounds = tuning, rows, journal, rounds
        self.progress = progress or (lambda stage, done, total: None)
        self.pairs = len(tuning.pairs)
        empty = np.full((tuning.learning, self.pairs), np.nan)
        self.known = KnownOutcomes(embeddings, empty, empty.copy(), prices)
        self.settings = AcquisitionSettings(seed=tuning.seed)
        self.found: dict[int, Outcome] = {}
        self.unanswered: dict[str, int] = {}
        self.tried: set[int] = set()

    def run(self, folder: Path) -> Bought:
        for row in read_rows(folder):
            self._add(row)
        for _, line in self.rounds.lines():
            self._buy("going on", [int(each) for each in json.loads(line)["cells"]])
        while not self.tuning.stop.is_set():
            cells = self._next_cells()
            if not cells:
                break
            self._buy_new("learning", cells)
        dropped = find_hopeless(self.known, self.settings) if self.known.asked.any() else []
        if not self.tuning.stop.is_set():
            self._buy_new("held out", self._held_out_cells({each.pair for each in dropped}))
        self.journal.sync()
        budget = self.rows.resources.ledger.budget(self.rows.job)
        return Bought(
            tuple(self.found[number] for number in sorted(self.found)),
            frozenset(each.id for each in self.tuning.questions[self.tuning.learning :]),
            self.tuning.pairs,
            tuple(dropped),
            self.unanswered,
            budget.posted_nanousd / NANOUSD_PER_USD,
            self.tuning.stop.is_set(),
        )

    def _next_cells(self) -> list[int]:
        """The next round for learning; none where the money or the questions are used up."""
        limit = self.tuning.limit / NANOUSD_PER_USD
        prices = self.known.expected_prices()
        aside = len(self.tuning.questions) - self.tuning.learning
        share = max(LEARNING_SHARE * limit, limit - 1.5 * aside * float(prices.sum()))
        left = share - self.known.spent
        if left <= 0:
            return []
        cells = [
            cell.question * self.pairs + cell.pair
            for cell in next_round(self.known, left, self.settings).cells
        ]
        silent = self._silent_pairs()
        return [each for each in cells if each not in self.tried and each % self.pairs not in silent]

    def _silent_pairs(self) -> set[int]:
        """Pairs that were asked and have no outcome at all, such as those of a model that is down."""
        tried = {number % self.pairs for number in self.tried}
        return tried - {number % self.pairs for number in self.found}

    def _held_out_cells(self, dropped: set[int]) -> list[int]:
        """Remaining pairs on the held-out questions, question by question, as far as the money goes."""
        gone = dropped | self._silent_pairs()
        columns = [each for each in range(self.pairs) if each not in gone]
        rows = range(self.tuning.learning, len(self.tuning.questions))
        cells = [row * self.pairs + column for row in rows for column in columns]
        return [each for each in cells if each not in self.tried]

    def _buy_new(self, stage: str, cells: list[int]) -> None:
        self.rounds.append({"stage": stage, "cells": cells})
        self.rounds.sync()
        self._buy(stage, cells)

    def _buy(self, stage: str, cells: list[int]) -> None:
        """Buy the cells that are not done; those that the money does not reach are left out."""
        wanted = [each for each in cells if not self.journal.is_done(each)]
        planned = (self.tuning.planned(each) for each in wanted)
        for done, (_, row) in enumerate(process_rows(planned, self.rows), 1):
            if row.state != "skipped":
                self.journal.write(row)
            self._add(row)
            self.progress(stage, done, len(wanted))

    def _add(self, row: JobRow) -> None:
        question, pair = divmod(row.number, self.pairs)
        self.tried.add(row.number)
        if row.state == "skipped":
            return
        if not (row.pair and row.calls):  # the call failed: that says nothing of the answer
            self.unanswered[row.reason] = self.unanswered.get(row.reason, 0) + 1
            return
        outcome = _outcome(row, self.tuning.pairs[pair], self.tuning.dataset, self.tuning.questions[question])
        self.found[row.number] = outcome
        if question < self.tuning.learning:
            self.known.correct[question, pair] = outcome.correct
            self.known.cost[question, pair] = row.cost_nanousd / NANOUSD_PER_USD


def _outcome(row: JobRow, pair: Pair, dataset: str, question: Question) -> Outcome:
    read, written = (
        sum(counts[index] for call in row.calls for counts in call.usage.values()) for index in (0, 1)
    )
    return Outcome(
        dataset,
        question.id,
        question.query.text,
        pair.model,
        pair.strategy,
        row.answer,
        bool(row.correct),
        read,
        written,
        row.cost_nanousd,
        round(row.seconds, 3),
        row.calls[-1].finish_reason,
    )
