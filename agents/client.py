"""The SDK: `Viaticum(budget=...).solve("...")`, its async and streaming forms.

A thin shell around the workflow graph; what it adds is opening and closing the ledger and the checkpoints.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from langgraph.checkpoint.sqlite import SqliteSaver

from viaticum import strategies
from viaticum.agents.graph import Tools, Workflow, route_from_json
from viaticum.agents.local import LocalModels
from viaticum.agents.models import Model
from viaticum.agents.scripted import ScriptedModel
from viaticum.agents.state import State
from viaticum.budgets import Budget, Ledger, default_path
from viaticum.catalogue import Catalogue
from viaticum.errors import InputError, MissingExtra
from viaticum.money import nanousd
from viaticum.outcomes import append_outcome
from viaticum.routers.query import Policy, QueryRouter, StaticRouter, parse_policy
from viaticum.types import Answer, AnswerKind, Outcome, Pair, Query, TokenCount, Usage
from viaticum.weights import locate

DEFAULT_BUDGET_USD = "0.01"
SLOTS = 4  # prompts that stay read: one a strategy of the shipped table, so that its examples are read once
# Nodes of one run: four a call, up to a hundred calls a pair. Never reached: a run ends when its pairs are used up.
RECURSION_LIMIT = 100_000


class Viaticum:
    """Answers questions within a budget.

    budget: dollars for all questions of this object; budget_name: an existing or new budget of the ledger
    (a new name each time by default); one that exists keeps its terms where no budget is given. slots: texts that a local
    model writes at once. catalogue: a `Catalogue` or a path laid over the packaged one. router: a `QueryRouter`,
    or the folder of a fitted one; the table that ships by default. policy: "best", "cheapest:ACCURACY",
    "weighted:PER_DOLLAR" or a `Policy`. folder: where the ledger and the checkpoints lie. Raises `InputError` for a
    budget that is not above zero.
    """

    def __init__(
        self,
        budget: str | int | float | Decimal | None = None,
        *,
        budget_name: str | None = None,
        catalogue: Catalogue | str | Path | None = None,
        router: QueryRouter | str | Path | None = None,
        policy: str | Policy = "best",
        folder: str | Path | None = None,
        models: dict[str, Model] | None = None,
        slots: int = SLOTS,
    ) -> None:
        limit = nanousd(DEFAULT_BUDGET_USD if budget is None else budget)
        if limit <= 0:
            raise InputError(f"a budget is above zero dollars, got {budget}")
        loaded = catalogue if isinstance(catalogue, Catalogue) else Catalogue.load(catalogue)
        self._models: dict[str, Model] = dict(models or {})
        entries = [model.catalogue_entry() for name, model in self._models.items() if name not in loaded]
        self.catalogue = loaded.with_models(*filter(None, entries))
        self.policy = parse_policy(policy) if isinstance(policy, str) else policy
        self.router = self._router(router)
        home = self._home = Path(folder) if folder is not None else default_path().parent
        self.ledger = Ledger(home / "ledger.db")
        self.budget_name = budget_name or f"run-{uuid.uuid4().hex[:12]}"
        is_new = budget_name is None or budget_name not in {each.name for each in self.ledger.budgets()}
        if is_new or budget is not None:
            self.ledger.create(self.budget_name, limit_nanousd=limit)
        self._connection = sqlite3.connect(home / "checkpoints.db", check_same_thread=False)
        self._local = LocalModels(self.catalogue, slots=slots)
        self._here = set(self._models)  # models that were given, or whose weights were found
        self._lock = threading.Lock()
        self._tools = Tools(
            catalogue=self.catalogue,
            router=self.router,
            policy=self.policy,
            ledger=self.ledger,
            budget=self.budget_name,
            model=self._model,
            usable=self._usable,
        )
        self.graph = Workflow(self._tools).build(SqliteSaver(self._connection))

    def solve(self, question: str, *, kind: AnswerKind = "auto", thread_id: str | None = None) -> Answer:
        """Answer one question. The same thread_id again gives its answer, or goes on where a kill stopped it."""
        for event in self.stream(question, kind=kind, thread_id=thread_id):
            if isinstance(event, Answer):
                return event
        raise AssertionError("a stream ends with its answer")

    async def asolve(
        self, question: str, *, kind: AnswerKind = "auto", thread_id: str | None = None
    ) -> Answer:
        """As `solve`, without blocking the event loop."""
        return await asyncio.to_thread(self.solve, question, kind=kind, thread_id=thread_id)

    def stream(
        self, question: str, *, kind: AnswerKind = "auto", thread_id: str | None = None
    ) -> Iterator[dict[str, Any] | Answer]:
        """Events as they come ({"route": ...}, {"text": ...}, {"cost": ...}), then the `Answer`."""
        query = Query(question, kind)
        began = time.perf_counter()
        config: Any = {
            "configurable": {"thread_id": thread_id or uuid.uuid4().hex},
            "recursion_limit": RECURSION_LIMIT,
        }
        seen = self.graph.get_state(config)
        if seen.values and seen.values.get("question") != query.text:
            raise InputError(f"thread {thread_id!r} belongs to another question; use a new thread id")
        start: State | None = {"question": query.text, "kind": query.kind, "call": 0}
        if seen.values:
            start = None  # go on from the last checkpoint
        # Not `seen.next`: it leaves out a task that was killed after its writes were kept.
        if not seen.values or seen.tasks:
            yield from self.graph.stream(start, config, stream_mode="custom", durability="sync")
        yield _answer(self.graph.get_state(config).values, time.perf_counter() - began)

    async def astream(
        self, question: str, *, kind: AnswerKind = "auto", thread_id: str | None = None
    ) -> AsyncIterator[dict[str, Any] | Answer]:
        """As `stream`, without blocking the event loop."""
        events = self.stream(question, kind=kind, thread_id=thread_id)
        end = object()
        while (event := await asyncio.to_thread(next, events, end)) is not end:
            yield event  # type: ignore[misc]

    def budget(self) -> Budget:
        """Where the allowance stands."""
        return self.ledger.budget(self.budget_name)

    def close(self) -> None:
        self._connection.close()
        self.ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def feedback(self, question: str, answer: Answer, correct: bool) -> Path:
        """Tell whether an answer was right: a row for the pair that gave it is added to `outcomes.jsonl` in the folder.

        `viaticum router refit` learns from that file. An answer of several calls is kept for its last pair, without
        tokens and cost where other pairs had a part in them. Returns the file. Raises `InputError` for an answer
        that no pair gave.
        """
        if not answer.routes:
            raise InputError("no pair gave this answer, so there is nothing to learn from it")
        pair, alone = answer.routes[-1].pair, len(answer.routes) == 1
        row = Outcome(
            dataset="live",
            question_id=hashlib.sha256(question.encode()).hexdigest()[:16],
            question=question,
            model=pair.model,
            strategy=pair.strategy,
            answer=answer.value,
            correct=correct,
            input_tokens=answer.usage.input_tokens if alone else None,
            output_tokens=answer.usage.output_tokens if alone else None,
            cost_nanousd=answer.cost if alone else None,
            seconds=answer.usage.seconds if alone else None,
            finish_reason=answer.finish_reason,
        )
        append_outcome(self._home / "outcomes.jsonl", row)
        return self._home / "outcomes.jsonl"

    def _router(self, router: QueryRouter | str | Path | None) -> QueryRouter:
        if router is None:
            return StaticRouter.default()
        if isinstance(router, QueryRouter):
            return router
        try:
            from viaticum.routers.query.rtr import RTRRouter
        except ImportError as error:
            raise MissingExtra(error.name or "torch", "local") from None
        fitted = RTRRouter.load(router)
        fitted.check_fits(list(self.catalogue), strategies.names())
        return fitted

    def _model(self, name: str) -> Model:
        with self._lock:
            if name not in self._models:
                spec = self.catalogue[name]
                scripted = spec.kind == "scripted"
                self._models[name] = (
                    ScriptedModel(spec.text or "", spec=spec, pause=spec.pause)
                    if scripted
                    else self._local.model(name)
                )
            return self._models[name]

    def _usable(self, pair: Pair) -> bool:
        """Whether the catalogue has the model. Raises `WeightsError` where its weights are not here."""
        if pair.model in self._here:
            return True
        if pair.model not in self.catalogue:
            return False
        if self.catalogue[pair.model].kind in ("local", "pair"):
            for member in self.catalogue[pair.model].members:
                locate(self.catalogue[member])
        self._here.add(pair.model)
        return True


def _answer(values: dict[str, Any], seconds: float) -> Answer:
    models = {name: TokenCount(*counts) for name, counts in values.get("usage", {}).items()}
    return Answer(
        value=values.get("value"),
        text=values.get("text", ""),
        routes=tuple(route_from_json(route) for route in values.get("routes", [])),
        usage=Usage(models, values.get("seconds", 0.0)),
        cost=values.get("cost", 0),
        held=values.get("held", 0),
        finish_reason=values.get("finish_reason", ""),
        seconds=seconds,
        reason=values.get("reason", ""),
    )
