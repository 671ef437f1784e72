"""`viaticum tune`: buy outcomes of (model, strategy) pairs in rounds under a hard budget, for fitting a router.

    tuning = Tuning.open(questions, "my-router", budget="5")
    tuning.forecast()  # nothing was asked so far
    bought = tuning.buy(encoder)

Questions are held out before the first call. Each outcome is a row of a batch, with a key of its own in the
ledger, and each round is written down before it is bought: a killed run goes on with the round that it was
in, and no call is paid twice. Leaves out which outcomes to buy (`routers.query.acquisition`), and fitting and
evaluating the router (`agents.batch.tune_report`).
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from viaticum.agents.batch.executor import process_rows
from viaticum.agents.batch.folder import acquire_job_lock, job_folder, parse_budget, without_password
from viaticum.agents.batch.input import BatchRow, RequestOverrides
from viaticum.agents.batch.output import RowJournal
from viaticum.agents.batch.planning import NO_FALLBACK, PlannedRow
from viaticum.agents.batch.steps import CONCURRENCY, RowTools, worst_of
from viaticum.agents.build import open_resources
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.settings import Dollars, WorkflowSettings
from viaticum.budgets import Ledger, default_path
from viaticum.budgets.records import digest
from viaticum.catalogue import Catalogue
from viaticum.errors import BudgetError, DataError, InputError, UnknownName, ViaticumError
from viaticum.files import JournalFile, atomic_write
from viaticum.generation import NO_SETTINGS
from viaticum.jobs import JobRow, read_rows
from viaticum.models.settings import prompt, resolve
from viaticum.money import NANOUSD_PER_USD, format_usd
from viaticum.questions import Question
from viaticum.routers.query import Plan, StaticRouter
from viaticum.routers.query.acquisition import (
    AcquisitionSettings,
    Hopeless,
    KnownOutcomes,
    find_hopeless,
    next_round,
)
from viaticum.routers.query.outcome_matrix import MIN_QUESTIONS, held_out, near_duplicates
from viaticum.strategies import get as get_strategy
from viaticum.strategies import load as load_strategies
from viaticum.types import Outcome, Pair

HELD_OUT = 0.3  # share of the questions
MAX_HELD_OUT = 200
LEARNING_SHARE = 0.6  # of the budget at least; the rest pays for the answers to held-out questions
STRATEGIES = ("direct", "cot")
CHARACTERS_A_TOKEN = 4.0  # of a prompt, in forecasts
SHARES = (0.3, 0.8)  # of the token limit: length of an answer, p50 and p90, where no table knows the strategy
STATE, ROUNDS = "tune.json", "rounds.jsonl"
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class PairForecast:
    """Expected dollars of an answer of a pair, before any is known."""

    pair: Pair
    p50: float
    p90: float
    worst: float


@dataclass(frozen=True)
class Forecast:
    """What a run will ask. all_p50, all_p90: dollars of every pair on every question."""

    learning: int
    held_out: int
    pairs: tuple[PairForecast, ...]
    budget: float

    @property
    def answers(self) -> int:
        return (self.learning + self.held_out) * len(self.pairs)

    @property
    def all_p50(self) -> float:
        return (self.learning + self.held_out) * sum(each.p50 for each in self.pairs)

    @property
    def all_p90(self) -> float:
        return (self.learning + self.held_out) * sum(each.p90 for each in self.pairs)


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


@dataclass
class Tuning:
    """A run of `tune`.

    Args:
        questions: those to learn from, then those that are held out.
        learning: how many of them are learned from.
        pairs: what is asked.
        out: the folder of the router; the run's own is `out` + ".job".
        limit: nano-dollars.
        ledger_address: of the ledger that pays.
        workflow: settings of the calls.
        dataset: name of the questions in the table.
        seed: of every draw.
    """

    questions: tuple[Question, ...]
    learning: int
    pairs: tuple[Pair, ...]
    out: Path
    limit: int
    ledger_address: str
    workflow: WorkflowSettings
    dataset: str
    seed: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def open(
        cls,
        questions: Sequence[Question],
        out: str | Path,
        *,
        budget: Dollars,
        dataset: str = "questions",
        models: Sequence[str] = (),
        strategies: Sequence[str] = (),
        catalogue: Catalogue | str | Path | None = None,
        ledger: str | Path | None = None,
        concurrency: int = CONCURRENCY,
        timeout: float | None = None,
        seed: int = 0,
    ) -> Tuning:
        """Choose pairs and held-out questions. Asks nothing and writes nothing.

        Args:
            questions: all with a known answer.
            out: the folder of the router.
            budget: dollars that all calls together may cost.
            dataset: name of the questions in the table.
            models: of the catalogue; by default all that can be used here.
            strategies: by default `STRATEGIES`.
            catalogue: None for the user's.
            ledger: None for the user's.
            concurrency: calls at the same time.
            timeout: seconds that a call may take.
            seed: of every draw.

        Raises:
            DataError: a question has no known answer, or there are too few.
            InputError: no model can be used.
            UnknownName: no such model or strategy.
            UnknownPrice: a model has no price.
        """
        if missing := [each.id for each in questions if each.gold is None]:
            raise DataError(
                f"{len(missing)} of {len(questions)} questions have no answer, the first is {missing[0]!r}; "
                "tune compares with known answers"
            )
        kept, aside = _split(questions, seed)
        loaded = catalogue if isinstance(catalogue, Catalogue) else Catalogue.load(catalogue)
        names = tuple(strategies) or STRATEGIES
        load_strategies(*loaded.strategies, *names)
        workflow = WorkflowSettings(
            catalogue=loaded,
            concurrency=concurrency,
            timeout=timeout,
            strategies=[each for each in names if ":" in each],
            slots="auto",
            budget_name="tune",
        )
        with Ledger("memory:") as memory:
            tools = open_resources(workflow, memory)
            chosen = _usable(tools, models)
            pairs = tuple(Pair(model, get_strategy(name).name) for model in chosen for name in names)
            for pair in pairs:
                tools.catalogue.prices(tools.catalogue[pair.model].members)
            tools.threads.close()
        address = str(default_path() if ledger is None else ledger)
        return cls(
            (*kept, *aside),
            len(kept),
            pairs,
            Path(out),
            parse_budget(budget),
            address,
            workflow,
            dataset,
            seed,
        )

    # --- before a cent is spent -------------------------------------------------------------------------

    def forecast(self) -> Forecast:
        """What will be asked and what that will cost. Calls no model, touches no ledger.

        Raises:
            BudgetError: the budget does not pay for the worst case of a call.
        """
        with Ledger("memory:") as memory:
            tools = open_resources(self.workflow, memory)
            pairs = tuple(self._pair_forecast(tools, pair) for pair in self.pairs)
            tools.threads.close()
        worst = max(pairs, key=lambda each: each.worst)
        if worst.worst * NANOUSD_PER_USD > self.limit:
            raise BudgetError(
                f"a budget of {format_usd(self.limit)} does not pay for the worst case of one call of "
                f"{worst.pair} (${worst.worst:.6f}); give more, leave that model out, or lower its "
                "max_new_tokens"
            )
        return Forecast(
            self.learning, len(self.questions) - self.learning, pairs, self.limit / NANOUSD_PER_USD
        )

    def _pair_forecast(self, tools: WorkflowResources, pair: Pair) -> PairForecast:
        strategy, spec = get_strategy(pair.strategy), tools.catalogue[pair.model]
        limit = resolve(tools.catalogue, pair.model, strategy, NO_SETTINGS).max_new_tokens
        known = [row for row in StaticRouter.default().rows if row.pair.strategy == pair.strategy]
        tokens = tuple(limit * share for share in SHARES)
        if known:
            lengths = (np.mean([row.tokens_p50 for row in known]), np.mean([row.tokens_p90 for row in known]))
            tokens = tuple(min(limit, float(each)) for each in lengths)
        read = [
            sum(len(str(message["content"])) for message in prompt(spec, strategy, each.query, NO_SETTINGS))
            / CHARACTERS_A_TOKEN
            for each in self.questions
        ]
        price = tools.catalogue.prices(spec.members)[spec.members[-1]]  # of a pair, the larger one
        p50, p90 = (
            strategy.samples * price.cost(round(amount), round(written)) / NANOUSD_PER_USD
            for amount, written in zip((np.mean(read), np.quantile(read, 0.9)), tokens, strict=True)
        )
        longest = int(np.argmax(read))
        cell = self._planned(longest * len(self.pairs) + self.pairs.index(pair))
        return PairForecast(pair, p50, p90, worst_of(tools, cell) / NANOUSD_PER_USD)

    # --- buying -----------------------------------------------------------------------------------------

    def buy(self, embeddings: np.ndarray[Any, Any], progress: Progress | None = None) -> Bought:
        """Buy outcomes in rounds, then those of the held-out questions; goes on where a killed run was.

        Args:
            embeddings: of the questions to learn from, of length 1 [learning, D].
            progress: called as answers come in.

        Raises:
            InputError: the run that was killed had other questions, pairs or settings, or `out` is there.
            ViaticumError: what concerns every call, such as `AuthenticationFailed`; what was bought stays.
        """
        prices = np.array([each.p50 for each in self.forecast().pairs])
        if self.out.exists():
            raise InputError(f"{self.out} exists; remove it, or give another --out")
        if not self.out.parent.is_dir():
            raise InputError(f"cannot write {self.out}: there is no folder {self.out.parent}; make it first")
        folder = job_folder(self.out)
        folder.mkdir(exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(acquire_job_lock(folder))
            ledger = stack.enter_context(Ledger(self.ledger_address))
            scope = self._open_budget(folder, ledger)
            tools = open_resources(self.workflow, ledger)
            stack.callback(tools.threads.close)
            tools = replace(tools, budget=scope)
            journal = RowJournal(folder, len(self.questions) * len(self.pairs))
            stack.callback(journal.close)
            rounds = JournalFile(folder / ROUNDS)
            stack.callback(rounds.close)
            rows = RowTools(
                tools, scope, concurrency=self.workflow.concurrency, keep_texts=False, stop=self.stop
            )
            return _Purchase(self, rows, journal, rounds, embeddings, prices, progress).run(folder)

    def _open_budget(self, folder: Path, ledger: Ledger) -> str:
        """The scope that pays: that of the run which goes on, or a new one."""
        print_ = self._fingerprint()
        path = folder / STATE
        if not path.exists():
            scope = f"tune-{uuid.uuid4().hex[:12]}"
            state = {
                "budget": scope,
                "ledger": without_password(self.ledger_address),
                "fingerprint": print_,
            }
            ledger.create(scope, limit_nanousd=self.limit)
            atomic_write(path, json.dumps(state))
            return scope
        state = json.loads(path.read_text())
        for name, value in print_.items():
            if state["fingerprint"].get(name) != value:
                raise InputError(
                    f"the run in {folder} began with other {name}; give what it began with, or another --out"
                )
        try:
            ledger.set_limit(state["budget"], limit_nanousd=self.limit)
        except UnknownName:
            raise InputError(
                f"this ledger has no budget {state['budget']!r}; give the ledger that the run in {folder} "
                f"began with ({state['ledger']})"
            ) from None
        return str(state["budget"])

    def _fingerprint(self) -> dict[str, str]:
        catalogue = self.workflow.catalogue
        assert isinstance(catalogue, Catalogue)
        used = sorted({pair.model for pair in self.pairs})
        return {
            "questions": digest([[each.id, each.query.text, *each.accepted] for each in self.questions]),
            "pairs": ", ".join(map(str, self.pairs)),
            "models": digest({name: catalogue[name].identity for name in used}),
            "seed": str(self.seed),
        }

    def _planned(self, number: int) -> PlannedRow:
        """The row of a cell: question and pair, as one number."""
        question, pair = self.questions[number // len(self.pairs)], self.pairs[number % len(self.pairs)]
        row = BatchRow(
            number,
            f"{question.id} {pair}",
            question.query,
            question.gold,
            question.others,
            RequestOverrides(str(pair), NO_SETTINGS, ()),
        )
        return PlannedRow(row, Plan((pair,)), NO_FALLBACK)


class _Purchase:
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
        planned = (self.tuning._planned(each) for each in wanted)
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


def _split(questions: Sequence[Question], seed: int) -> tuple[list[Question], list[Question]]:
    """Questions to learn from and held-out ones; near-duplicates are on the same side."""
    share = min(HELD_OUT, MAX_HELD_OUT / len(questions))
    groups = near_duplicates([each.query.text for each in questions])
    aside = held_out(groups, share, seed)
    kept = [each for each, taken in zip(questions, aside, strict=True) if not taken]
    if len(kept) < MIN_QUESTIONS or not aside.any():
        raise DataError(
            f"{len(questions)} questions in {groups.max() + 1} groups of near-duplicates leave {len(kept)} to "
            f"learn from and {int(aside.sum())} to evaluate on; tune needs {MIN_QUESTIONS} and 1 at least: "
            "give more questions"
        )
    return kept, [each for each, taken in zip(questions, aside, strict=True) if taken]


def _usable(tools: WorkflowResources, named: Sequence[str]) -> list[str]:
    """The named models, or all of the catalogue that can be used here; a named one that cannot is an error."""
    if named:
        models = [tools.catalogue[name].name for name in dict.fromkeys(named)]
        for name in models:
            tools.is_usable(Pair(name, "cot"))
        return models
    found, why = [], []
    for spec in tools.catalogue.models():
        try:
            if tools.is_usable(Pair(spec.name, "cot")):
                found.append(spec.name)
        except ViaticumError as error:
            why.append(f"{spec.name}: {error}")
    if not found:
        raise InputError(f"no model of the catalogue can be used here ({'; '.join(why)})")
    return found
