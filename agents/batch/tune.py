"""`viaticum tune`: what a run asks, and what that will cost. Asks nothing itself.

    tuning = Tuning.open(questions, "my-router", budget="5")
    forecast = tuning.forecast()
    bought = buy(tuning, forecast, embeddings)

Questions are held out before the first call. Leaves out buying (`agents.batch.tune_rounds`), the folder of a
run (`agents.batch.tune_folder`), and fitting and evaluating the router (`agents.batch.tune_report`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import numpy as np

from viaticum.agents.batch.input import BatchRow, RequestOverrides
from viaticum.agents.batch.planned_rows import NO_FALLBACK, PlannedRow
from viaticum.agents.batch.steps import CONCURRENCY, worst_of
from viaticum.agents.batch.tune_agreement import strongest_pairs
from viaticum.agents.batch.tune_judge import Grading, judge_row
from viaticum.agents.batch.tune_pairwise import PROMPT as COMPARISON
from viaticum.agents.batch.tune_pairwise import comparison_row
from viaticum.agents.build import open_resources, prior_model
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.settings import TRIES, Dollars, WorkflowSettings
from viaticum.budgets import Ledger, default_path
from viaticum.catalogue import Catalogue
from viaticum.checks import shown
from viaticum.errors import BudgetError, DataError, InputError
from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.models.base import Model
from viaticum.models.settings import judge_settings, prompt, resolve
from viaticum.money import NANOUSD_PER_USD, Price, budget_nanousd, format_usd
from viaticum.questions import Question
from viaticum.residency import Only, checked_only
from viaticum.routers.query import Plan, StaticRouter
from viaticum.routers.query.outcome_matrix import MIN_QUESTIONS, held_out, near_duplicates, split_templates
from viaticum.routers.query.prior import AbilityPrior
from viaticum.routers.query.prior_screening import PriorScreen
from viaticum.strategies import get as get_strategy
from viaticum.strategies import load as load_strategies
from viaticum.strategies.verify import PROMPT
from viaticum.types import Pair

HELD_OUT = 0.3  # share of the questions
MAX_HELD_OUT = 200
STRATEGIES = ("direct", "cot")
CHARACTERS_A_TOKEN = 4.0  # of a prompt, in forecasts
JUDGED_CHARACTERS = 40  # of an answer that is graded
JUDGED_TOKENS = (50, 120)  # of a verdict with its reason, p50 and p90
SHARES = (0.3, 0.8)  # of the token limit: length of an answer, p50 and p90, where no table knows the strategy


@dataclass(frozen=True)
class PairForecast:
    """Expected nano-dollars of an answer of a pair, before any is known."""

    pair: Pair
    cost_p50: int
    cost_p90: int
    cost_worst: int


@dataclass(frozen=True)
class Forecast:
    """What a run will ask. cost_p50, cost_p90: nano-dollars of every pair on every question.

    screen: what the prior says of the pairs. judge: of one verdict. ungraded: how many of the questions have
    no known answer. voters: pairs whose agreement says what is right, where no judge does.
    """

    learning: int
    held_out: int
    pairs: tuple[PairForecast, ...]
    budget_nanousd: int
    screen: PriorScreen
    judge: PairForecast | None = None
    ungraded: int = 0
    voters: tuple[Pair, ...] = ()

    @property
    def answers(self) -> int:
        return self.questions * len(self.pairs)

    @property
    def questions(self) -> int:
        return self.learning + self.held_out

    @property
    def cost_p50(self) -> int:
        verdicts = 0 if self.judge is None else self.ungraded * len(self.pairs) * self.judge.cost_p50
        return self.questions * sum(each.cost_p50 for each in self.pairs) + verdicts

    @property
    def cost_p90(self) -> int:
        verdicts = 0 if self.judge is None else self.ungraded * len(self.pairs) * self.judge.cost_p90
        return self.questions * sum(each.cost_p90 for each in self.pairs) + verdicts

    @property
    def prices(self) -> tuple[float, ...]:
        """Expected dollars of an outcome of each pair, its verdict included."""
        verdict = 0.0 if self.judge is None else self.judge.cost_p50 * self.ungraded / self.questions
        return tuple((each.cost_p50 + verdict) / NANOUSD_PER_USD for each in self.pairs)


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
        judge: the model that grades answers to questions without a known one.
        grading: how they are graded; None where all answers are known.
        seconds: how long buying may take; None for no limit.
        stop: set to end before it is through.
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
    judge: str | None = None
    grading: Grading | None = None
    seconds: float | None = None
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
        given: Mapping[str, Model] | None = None,
        judge: str | None = None,
        grading: Grading | None = None,
        seconds: float | None = None,
        strategies: Sequence[str] = (),
        catalogue: Catalogue | str | Path | None = None,
        ledger: str | Path | None = None,
        concurrency: int = CONCURRENCY,
        timeout: float | None = None,
        tries: int = TRIES,
        generation: GenerationSettings = NO_SETTINGS,
        only: Only | None = None,
        seed: int = 0,
    ) -> Tuning:
        """Choose pairs and held-out questions. Asks nothing and writes nothing.

        Args:
            questions: all with a known answer, unless `grading` says how the others are graded.
            out: the folder of the router.
            budget: dollars that all calls together may cost.
            dataset: name of the questions in the table.
            models: of the catalogue; by default all that can be used here.
            given: models by name, in addition to those of the catalogue.
            judge: a model that grades answers to questions without a known one.
            grading: "rubric" (the judge says of each answer whether it is right; the default with a judge),
                "pairwise" (it compares two answers at a time) or "agreement" (of the strongest pairs).
            seconds: how long buying may take.
            strategies: by default `STRATEGIES`.
            catalogue: None for the user's.
            ledger: None for the user's.
            concurrency: calls at the same time.
            timeout: seconds that a call may take.
            tries: attempts of a call whose model is unavailable.
            generation: how all answers are generated, whatever strategies and catalogue entries say.
            only: labels of models, one of which each model and the judge have to have; None for all.
            seed: of every draw.

        Raises:
            DataError: a question has no known answer, or there are too few.
            InputError: no model can be used, or the way of grading needs a judge, or a second pair.
            UnknownName: no such model or strategy.
            UnknownPrice: a model has no price.
        """
        grading = _checked_grading(questions, judge, grading)
        kept, aside = _split(questions, seed)
        loaded = catalogue if isinstance(catalogue, Catalogue) else Catalogue.load(catalogue)
        names = tuple(strategies) or STRATEGIES
        load_strategies(*loaded.strategies, *names)
        workflow = WorkflowSettings(
            catalogue=loaded,
            models=given,
            concurrency=concurrency,
            timeout=timeout,
            tries=tries,
            generation=generation,
            only=checked_only(only) or None,
            strategies=[each for each in names if ":" in each],
            slots="auto",
            budget_name="tune",
        )
        with _open_unpaid(workflow) as tools:
            chosen = _usable(tools, models)
            pairs = tuple(Pair(model, get_strategy(name).name) for model in chosen for name in names)
            if judge is not None:
                judge = _usable(tools, [judge])[0]
            for model in (*chosen, *([] if judge is None else [judge])):
                tools.catalogue.prices(tools.catalogue[model].members)
            workflow = replace(workflow, catalogue=tools.catalogue)
        if grading == "agreement" and len(pairs) < 2:
            raise InputError(f"{pairs[0]} alone agrees with itself; name more models or strategies")
        address = str(default_path() if ledger is None else ledger)
        return cls(
            (*kept, *aside),
            len(kept),
            pairs,
            Path(out),
            budget_nanousd(budget),
            address,
            workflow,
            dataset,
            seed,
            judge,
            grading,
            seconds,
        )

    # --- before a cent is spent -------------------------------------------------------------------------

    def forecast(self) -> Forecast:
        """What will be asked and what that will cost. Calls no model, touches no ledger.

        Raises:
            BudgetError: the budget does not pay for the worst case of a call.
        """
        with _open_unpaid(self.workflow) as tools:
            pairs = tuple(self._pair_forecast(tools, pair) for pair in self.pairs)
            judge = None if self.judge is None else self._judge_forecast(tools, self.judge)
        assert isinstance(self.workflow.catalogue, Catalogue)
        names = dict.fromkeys(pair.model for pair in self.pairs)
        models = [prior_model(self.workflow.catalogue, name) for name in names]
        costs = [tuple(getattr(each, name) for each in pairs) for name in ("cost_p50", "cost_p90")]
        screen = PriorScreen(AbilityPrior(), tuple(models), self.pairs, *costs)
        worst = max((*pairs, *([] if judge is None else [judge])), key=lambda each: each.cost_worst)
        if worst.cost_worst > self.limit:
            raise BudgetError(
                f"a budget of {format_usd(self.limit)} does not pay for the worst case of one call of "
                f"{worst.pair} ({format_usd(worst.cost_worst)}); give more, leave that "
                "model out, or lower its max_new_tokens"
            )
        return Forecast(
            self.learning,
            len(self.questions) - self.learning,
            pairs,
            self.limit,
            screen,
            judge,
            sum(each.gold is None for each in self.questions),
            tuple(strongest_pairs(screen)) if self.grading == "agreement" else (),
        )

    def _judge_forecast(self, tools: WorkflowResources, judge: str) -> PairForecast:
        """Of one verdict. By pairs that is none for half of the answers, and two calls for the others."""
        longest = max(self.questions, key=lambda each: len(each.query.text))
        answer, by_pairs = "0" * JUDGED_CHARACTERS, self.grading == "pairwise"
        settings = judge_settings(tools.catalogue, judge)
        row = judge_row(judge, 0, longest, answer, settings)
        if by_pairs:
            row = comparison_row(judge, 0, longest, answer, answer, settings)
        given = len(COMPARISON) + 2 * JUDGED_CHARACTERS if by_pairs else len(PROMPT) + JUDGED_CHARACTERS
        characters = np.array([given + len(each.query.text) for each in self.questions])
        price = _price_of(tools, judge)
        p50, p90 = (
            calls * price.cost(round(float(read) / CHARACTERS_A_TOKEN), written)
            for read, written, calls in zip(
                np.quantile(characters, (0.5, 0.9)), JUDGED_TOKENS, (1, 2 if by_pairs else 1), strict=True
            )
        )
        return PairForecast(Pair(judge, "judge"), p50, p90, worst_of(tools, row))

    def _pair_forecast(self, tools: WorkflowResources, pair: Pair) -> PairForecast:
        strategy, spec, settings = get_strategy(pair.strategy), tools.catalogue[pair.model], tools.settings
        limit = resolve(tools.catalogue, pair.model, strategy, settings).max_new_tokens
        known = [row for row in StaticRouter.default().rows if row.pair.strategy == pair.strategy]
        tokens = tuple(limit * share for share in SHARES)
        if known:
            lengths = (np.mean([row.tokens_p50 for row in known]), np.mean([row.tokens_p90 for row in known]))
            tokens = tuple(min(limit, float(each)) for each in lengths)
        read = [
            sum(len(str(message["content"])) for message in prompt(spec, strategy, each.query, settings))
            / CHARACTERS_A_TOKEN
            for each in self.questions
        ]
        price = _price_of(tools, pair.model)
        p50, p90 = (
            strategy.samples * price.cost(round(amount), round(written))
            for amount, written in zip((np.mean(read), np.quantile(read, 0.9)), tokens, strict=True)
        )
        longest = int(np.argmax(read))
        cell = self.planned(longest * len(self.pairs) + self.pairs.index(pair))
        return PairForecast(pair, p50, p90, worst_of(tools, cell))

    def planned(self, number: int) -> PlannedRow:
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


def _checked_grading(
    questions: Sequence[Question], judge: str | None, grading: Grading | None
) -> Grading | None:
    """How answers are graded; raises where that is not said, or needs a judge."""
    if grading not in (None, *get_args(Grading)):
        raise InputError(f"grading is {', '.join(get_args(Grading))}, got {shown(grading)}")
    if grading == "agreement" and judge is not None:
        raise InputError("agreement needs no judge; leave out the judge, or grade by rubric or pairwise")
    if grading in ("rubric", "pairwise") and judge is None:
        raise InputError(f"grading {grading} needs a judge: --judge MODEL")
    missing = [each.id for each in questions if each.gold is None]
    if missing and judge is None and grading is None:
        raise DataError(
            f"{len(missing)} of {len(questions)} questions have no answer, the first is {missing[0]!r}; "
            "add answers, name a model that grades (--judge MODEL), or take what the strongest pairs agree "
            "on for right (--grading agreement)"
        )
    return grading if judge is None else grading or "rubric"


@contextmanager
def _open_unpaid(workflow: WorkflowSettings) -> Iterator[WorkflowResources]:
    """What a workflow uses, over a ledger in memory: for looking at models and prices, not for calls."""
    with Ledger("memory:") as memory:
        tools = open_resources(workflow, memory)
        try:
            yield tools
        finally:
            tools.threads.close()


def _price_of(tools: WorkflowResources, model: str) -> Price:
    """Of a pair, that of its large model."""
    members = tools.catalogue[model].members
    return tools.catalogue.prices(members)[members[-1]]


def _split(questions: Sequence[Question], seed: int) -> tuple[list[Question], list[Question]]:
    """Questions to learn from and held-out ones; near-duplicates are on the same side."""
    if not questions:
        raise DataError(f"no questions; tune needs {MIN_QUESTIONS} to learn from, and some to evaluate on")
    share = min(HELD_OUT, MAX_HELD_OUT / len(questions))
    texts = [each.query.text for each in questions]
    groups = split_templates(near_duplicates(texts), texts)
    aside = held_out(groups, share, seed)
    kept = [each for each, taken in zip(questions, aside, strict=True) if not taken]
    if len(kept) < MIN_QUESTIONS or not aside.any():
        raise DataError(
            f"{len(questions)} questions in {groups.max() + 1} groups of near-duplicates leave {len(kept)} "
            f"to learn from and {int(aside.sum())} to evaluate on; tune needs {MIN_QUESTIONS} and 1 at "
            "least: give more questions"
        )
    return kept, [each for each, taken in zip(questions, aside, strict=True) if taken]


def _usable(tools: WorkflowResources, named: Sequence[str]) -> list[str]:
    """The named models, or all that can be used here. Raises for a named one that cannot."""
    if named:
        models = [tools.catalogue[name].name for name in dict.fromkeys(named)]
        for pair in (Pair(name, "cot") for name in models):
            if not tools.is_usable(pair):
                raise tools.none_usable([pair])
        return models
    pairs = [Pair(spec.name, "cot") for spec in tools.catalogue.models()]
    if found := [pair.model for pair in pairs if tools.is_usable(pair)]:
        return found
    raise tools.none_usable(pairs)
