"""The rounds of `viaticum tune`: buys the outcomes that are worth most, then those of held-out questions.

Each outcome is a row of a batch, with a key of its own in the ledger, and each round is written down before
it is bought: a killed run goes on with the rounds that it was in, and no call is paid twice. A call that
failed is made again, in a later round and by the next run. Leaves out which outcomes to buy
(`routers.query.acquisition`) and what a run is made from (`agents.batch.tune`).
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from viaticum.agents.batch.executor import process_rows
from viaticum.agents.batch.folder import acquire_job_lock
from viaticum.agents.batch.output import RowJournal
from viaticum.agents.batch.steps import RowTools
from viaticum.agents.batch.tune import Forecast, Tuning
from viaticum.agents.batch.tune_agreement import Agreement
from viaticum.agents.batch.tune_folder import open_budget, prepare_run
from viaticum.agents.batch.tune_judge import GivenAnswer, Grader, Judged, Progress, RubricJudge
from viaticum.agents.batch.tune_pairwise import PairwiseJudge
from viaticum.agents.build import open_resources
from viaticum.budgets import Ledger
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

LEARNING_SHARE = 0.6  # of the budget at least; the rest pays for the answers to held-out questions
ATTEMPTS = 2  # of a call that failed, in one run; within each the model's own retries
PROBES = 3  # failed calls that are made again of a pair that has given no outcome so far
LEARNING_TIME, BUYING_TIME = 0.6, 0.9  # of the time until learning and buying end; the rest is for fitting
GIVE_UP = 10  # calls of a pair that failed, none answered, after which the round asks it no more
ROUNDS, JUDGE = "rounds.jsonl", "judge"


@dataclass(frozen=True)
class Bought:
    """What was bought.

    outcomes: all of them. held_out: ids of the questions that were held out. dropped: pairs that were beaten
    beyond doubt, and were asked no further. left_out: pairs that were never asked, each with the pair that
    beats it by the prior. unanswered: errors of calls that gave no outcome, with how many. cost_nanousd:
    posted in the ledger. stopped: whether `stop` ended the run before it was through. late: whether the time
    was up. judged: what rests on a judge or on agreement, where something does.
    """

    outcomes: tuple[Outcome, ...]
    held_out: frozenset[str]
    pairs: tuple[Pair, ...]
    dropped: tuple[Hopeless, ...]
    left_out: tuple[tuple[Pair, Pair], ...]
    unanswered: dict[str, int]
    cost_nanousd: int
    stopped: bool = False
    late: bool = False
    judged: Judged | None = None

    @property
    def remaining(self) -> tuple[Pair, ...]:
        """Pairs to choose from: not dropped, with an outcome at least."""
        gone = {self.pairs[each.pair] for each in self.dropped}
        known = {row.pair for row in self.outcomes if row.question_id not in self.held_out}
        return tuple(pair for pair in self.pairs if pair in known and pair not in gone)


def buy(
    tuning: Tuning, forecast: Forecast, embeddings: np.ndarray[Any, Any], progress: Progress | None = None
) -> Bought:
    """Buy outcomes in rounds, then those of the held-out questions; goes on where an earlier run was.

    Args:
        tuning: what to ask.
        forecast: of that; its prices say what an outcome costs before any is known.
        embeddings: of the questions to learn from, of length 1 [learning, D].
        progress: called as answers come in.

    Raises:
        InputError: the earlier run had other questions, pairs or settings, or `out` is not its.
        ViaticumError: what concerns every call, such as `AuthenticationFailed`; what was bought stays.
    """
    folder = prepare_run(tuning)
    with ExitStack() as stack:
        stack.enter_context(acquire_job_lock(folder))
        ledger = stack.enter_context(Ledger(tuning.ledger_address))
        scope = open_budget(tuning, folder, ledger)
        tools = replace(open_resources(tuning.workflow, ledger), budget=scope)
        stack.callback(tools.threads.close)
        journal = RowJournal(folder, len(tuning.questions) * len(tuning.pairs))
        stack.callback(journal.close)
        rounds = JournalFile(folder / ROUNDS)
        stack.callback(rounds.close)
        rows = RowTools(tools, scope, concurrency=tuning.workflow.concurrency, stop=tuning.stop)
        grader = _open_grader(tuning, forecast, rows, folder)
        if grader is not None:
            stack.callback(grader.close)
        return _Purchase(tuning, rows, journal, rounds, embeddings, forecast, grader, progress).run(folder)


def _open_grader(tuning: Tuning, forecast: Forecast, rows: RowTools, folder: Path) -> Grader | None:
    if tuning.grading == "agreement":
        return Agreement(forecast.voters)
    if tuning.judge is None:
        return None
    kind = PairwiseJudge if tuning.grading == "pairwise" else RubricJudge
    return kind(tuning.judge, rows, folder / JUDGE, len(tuning.questions) * len(tuning.pairs))


class _Purchase:
    """The rounds of one run. A cell is question and pair, as one number. known: of the learning questions."""

    def __init__(
        self,
        tuning: Tuning,
        rows: RowTools,
        journal: RowJournal,
        rounds: JournalFile,
        embeddings: np.ndarray[Any, Any],
        forecast: Forecast,
        grader: Grader | None,
        progress: Progress | None,
    ) -> None:
        self.tuning, self.rows, self.journal, self.rounds = tuning, rows, journal, rounds
        self.grader, self.began, self.late = grader, time.monotonic(), False
        self.progress = progress or (lambda stage, done, total: None)
        self.pairs = len(tuning.pairs)
        empty = np.full((tuning.learning, self.pairs), np.nan)
        self.known = KnownOutcomes(embeddings, empty, empty.copy(), np.array(forecast.prices))
        self.settings = AcquisitionSettings(seed=tuning.seed)
        self.screen, self.voters = forecast.screen, [tuning.pairs.index(each) for each in forecast.voters]
        self.found: dict[int, Outcome] = {}
        self.answered: dict[int, JobRow] = {}  # to questions without a known answer
        self.graded: dict[int, JobRow] = {}  # by known answers, where there is a grader too
        self.planned: dict[int, None] = {}  # in the order in which they were planned
        self.failed: dict[int, str] = {}
        self.attempts: Counter[int] = Counter()

    def run(self, folder: Path) -> Bought:
        before = [json.loads(line)["cells"] for _, line in self.rounds.lines()]
        self.planned.update(dict.fromkeys(itertools.chain.from_iterable(before)))
        for row in read_rows(folder):
            self._add(row)
        self._grade()
        for cells in before:
            self._buy("going on", cells)
        while cells := self._again() + self._next_cells():
            self._buy_new("learning", self._with_voters(cells))
        dropped = find_hopeless(self.known, self.settings) if self.known.asked.any() else []
        self._buy_new("held out", self._with_voters(self._held_out_cells({each.pair for each in dropped})))
        while cells := self._again():
            self._buy_new("asked again", cells)
        self.journal.sync()
        budget = self.rows.resources.ledger.budget(self.rows.job)
        return Bought(
            tuple(self.found[number] for number in sorted(self.found)),
            frozenset(each.id for each in self.tuning.questions[self.tuning.learning :]),
            self.tuning.pairs,
            tuple(dropped),
            tuple((self.tuning.pairs[pair], self.tuning.pairs[by]) for pair, by in self._left_out().items()),
            dict(Counter(self.failed.values())),
            budget.posted_nanousd,
            self.tuning.stop.is_set(),
            self.late,
            self._judged(),
        )

    @property
    def _is_stopped(self) -> bool:
        """Whether to buy nothing more: the run is to end, or its judge gives no verdict."""
        return self.tuning.stop.is_set() or bool(self.grader is not None and self.grader.mute)

    def _next_cells(self) -> list[int]:
        """The next round for learning; none where the money or the questions are used up."""
        limit = self.tuning.limit / NANOUSD_PER_USD
        prices = self.known.expected_prices()
        aside = len(self.tuning.questions) - self.tuning.learning
        share = max(LEARNING_SHARE * limit, limit - 1.5 * aside * float(prices.sum()))
        left = share - self.known.spent
        if left <= 0 or self._is_stopped or self._is_late(LEARNING_TIME):
            return []
        cells = [
            cell.question * self.pairs + cell.pair
            for cell in next_round(self.known, left, self.settings, self._pairs_to_ask()).cells
        ]
        silent = self._silent_pairs()
        return [each for each in cells if each not in self.planned and each % self.pairs not in silent]

    def _pairs_to_ask(self) -> list[int]:
        """All but those that are hopeless by the prior, the most promising first."""
        left_out = self._left_out()
        return [each for each in self.screen.order() if each not in left_out]

    def _left_out(self) -> dict[int, int]:
        """Pairs that were never asked, and are hopeless by the prior and the outcomes; who beats them."""
        hopeless = self.screen.hopeless(tuple(self.found.values()))
        return {pair: by for pair, by in hopeless.items() if pair not in self._asked_pairs()}

    def _asked_pairs(self) -> set[int]:
        return {number % self.pairs for number in self.planned}

    def _with_voters(self, cells: list[int]) -> list[int]:
        """The cells, and the voters on their questions where no answer is known."""
        silent, added = self._silent_pairs(), dict[int, None]()
        for question in dict.fromkeys(each // self.pairs for each in cells) if self.voters else ():
            if self.tuning.questions[question].gold is None:
                added |= {question * self.pairs + pair: None for pair in self.voters if pair not in silent}
        there = self.planned.keys() | set(cells)
        return [*cells, *(each for each in added if each not in there)]

    def _again(self) -> list[int]:
        """Cells whose calls failed; of a pair that never gave an outcome a few, to see whether it is back."""
        if self._is_stopped or self.late:
            return []
        silent = self._silent_pairs()
        probes = Counter(number % self.pairs for number, tries in self.attempts.items() if tries > 1)
        cells = []
        for number in self.failed:
            pair = number % self.pairs
            if self.attempts[number] < ATTEMPTS and (pair not in silent or probes[pair] < PROBES):
                cells.append(number)
                probes[pair] += 1
        return cells

    def _silent_pairs(self) -> set[int]:
        """Pairs that were asked and have no outcome at all, such as those of a model that is down."""
        return self._asked_pairs() - {number % self.pairs for number in (*self.found, *self.answered)}

    def _held_out_cells(self, dropped: set[int]) -> list[int]:
        """Remaining pairs on the held-out questions, question by question, as far as the money goes."""
        if self._is_stopped:
            return []
        columns = sorted(self._asked_pairs() - dropped - self._silent_pairs())
        rows = range(self.tuning.learning, len(self.tuning.questions))
        cells = [row * self.pairs + column for row in rows for column in columns]
        return [each for each in cells if each not in self.planned]

    def _buy_new(self, stage: str, cells: list[int]) -> None:
        if new := [each for each in cells if each not in self.planned]:
            self.rounds.append({"stage": stage, "cells": new})
            self.rounds.sync()
        self._buy(stage, cells)

    def _buy(self, stage: str, cells: list[int]) -> None:
        """Buy the cells that are not done; those that the money does not reach are left out."""
        self.planned.update(dict.fromkeys(cells))
        wanted = [each for each in dict.fromkeys(cells) if not self.journal.is_done(each)]
        share = LEARNING_TIME if stage != "held out" else BUYING_TIME
        planned = (
            self.tuning.planned(each)
            for each in itertools.takewhile(lambda _: not self._is_late(share), wanted)
            if not self._is_given_up(each)
        )
        for done, (_, row) in enumerate(process_rows(planned, self.rows), 1):
            if self._add(row):
                self.journal.write(row)
            self.progress(stage, done, len(wanted))
        self._grade()

    def _is_given_up(self, number: int) -> bool:
        """Whether the first calls of its pair have all failed; it is asked once the pair has an outcome."""
        pair = number % self.pairs
        failures = sum(each % self.pairs == pair for each in self.failed)
        if self.attempts[number] or failures < GIVE_UP or pair not in self._silent_pairs():
            return False
        self.failed[number] = "not asked, as no call of its pair was answered"
        return True

    def _is_late(self, share: float) -> bool:
        """Whether so much of the time is over."""
        if self.tuning.seconds is None or time.monotonic() - self.began < share * self.tuning.seconds:
            return False
        self.late = True
        return True

    def _grade(self) -> None:
        """Have what was answered graded, and some answers whose verdict is known."""
        if self.grader is None:
            return
        rows = self.answered | {number: self.graded[number] for number in self._checked()}
        answers = {each: self._given(rows[each]) for each in self.planned if each in rows}
        self.grader.grade(answers, self.progress)
        for number, row in self.answered.items():
            verdict = self.grader.verdict(number)
            if verdict is not None:
                self._know(replace(row, correct=verdict), self.grader.cost(number))
            elif self.found.pop(number, None) is not None and number // self.pairs < self.tuning.learning:
                self.known.correct[divmod(number, self.pairs)] = np.nan

    def _checked(self) -> list[int]:
        """The answers whose verdict is known that are graded too."""
        assert self.grader is not None
        known = {each: self._given(self.graded[each]) for each in self.planned if each in self.graded}
        return list(self.grader.to_check(known))

    def _given(self, row: JobRow) -> GivenAnswer:
        pair = self.tuning.pairs[row.number % self.pairs]
        return GivenAnswer(self._question(row.number), pair, row.answer)

    def _judged(self) -> Judged | None:
        if self.grader is None:
            return None
        verdicts = [(self.graded[each].correct, self.grader.verdict(each)) for each in self._checked()]
        known = [(right, verdict) for right, verdict in verdicts if verdict is not None]
        return Judged(
            self.grader.name,
            self.grader.models,
            sum(each in self.found for each in self.answered),
            len(known),
            sum(bool(right) == verdict for right, verdict in known),
            frozenset(each.id for each in self.tuning.questions if each.gold is None),
            sum(each not in self.found for each in self.answered),
            self.grader.mute,
        )

    def _question(self, number: int) -> Question:
        return self.tuning.questions[number // self.pairs]

    def _add(self, row: JobRow) -> bool:
        """Note a row; whether it is an answer, which is paid for once."""
        self.planned[row.number] = None
        self.failed.pop(row.number, None)
        if row.state == "skipped":
            return False
        if not (row.pair and row.calls):  # the call failed: that says nothing of the answer
            self.failed[row.number] = row.reason
            self.attempts[row.number] += 1
            return False
        question, pair = divmod(row.number, self.pairs)
        if question < self.tuning.learning:
            self.known.cost[question, pair] = row.cost_nanousd / NANOUSD_PER_USD
        if self._question(row.number).gold is None:
            self.answered[row.number] = row
            return True
        if self.grader is not None:
            self.graded[row.number] = row
        self._know(row)
        return True

    def _know(self, row: JobRow, verdict_cost: int = 0) -> None:
        """The outcome of a row whose answer is graded. verdict_cost: nano-dollars that the judge took."""
        question, pair = divmod(row.number, self.pairs)
        outcome = _outcome(row, self.tuning.pairs[pair], self.tuning.dataset, self._question(row.number))
        self.found[row.number] = outcome
        if question < self.tuning.learning:
            self.known.correct[question, pair] = outcome.correct
            self.known.cost[question, pair] = (row.cost_nanousd + verdict_cost) / NANOUSD_PER_USD


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
