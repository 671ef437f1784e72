"""The workflow for other people's graphs: `build_graph` to run, to nest, or to call from a node; `as_tool` for agents.

Puts together what the nodes work with: catalogue, router, models, ledger. Leaves out threads, questions and answers:
that is the SDK's (`viaticum.agents.client`).
"""

from __future__ import annotations

import threading
import uuid
import weakref
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from langchain_core.tools import BaseTool, StructuredTool
from langgraph.types import Checkpointer

from viaticum import strategies
from viaticum.agents.workflow.graph import TRIES, Graph, Workflow, WorkflowResources
from viaticum.agents.workflow.nodes import Threads
from viaticum.agents.workflow.state import Allowance
from viaticum.budgets import Ledger, default_path
from viaticum.budgets.planner import WhenShort
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import InputError, MissingExtra, UnknownName
from viaticum.models.base import Model
from viaticum.models.local import LocalModels
from viaticum.models.remote.model import RemoteModel, check_usable
from viaticum.models.remote.prices import with_litellm_prices
from viaticum.models.scripted import ScriptedModel
from viaticum.money import nanousd
from viaticum.routers.query import Policy, QueryRouter, StaticRouter, parse_policy
from viaticum.types import Pair
from viaticum.weights import locate

DEFAULT_BUDGET_USD = "0.01"
CONCURRENCY = 16
SLOTS = 4  # prompts that stay read: one a strategy of the shipped table, so that its examples are read once

Dollars = str | int | float | Decimal


def build_graph(
    budget: Dollars | None = None,
    *,
    budget_name: str | None = None,
    catalogue: Catalogue | str | Path | None = None,
    router: QueryRouter | str | Path | None = None,
    policy: str | Policy = "best",
    on_short: WhenShort = "cheaper",
    models: Mapping[str, Model] | None = None,
    folder: str | Path | None = None,
    store: str | None = None,
    ledger: Ledger | None = None,
    checkpointer: Checkpointer = None,
    timeout: float | None = None,
    tries: int = TRIES,
    concurrency: int = CONCURRENCY,
    slots: int = SLOTS,
    name: str = "viaticum",
) -> Graph:
    """A compiled LangGraph graph: {"question": ...} in, {"value": ..., "text": ..., "cost": ...} out.

    Without a checkpointer it inherits that of the graph it is a part of. Settings as of `Viaticum`; ledger: an open
    one, which stays the caller's. `context=Allowance(...)` changes budget, policy, on_short and timeout for one run. Run
    it with durability="sync": what was paid for is then never paid for again.
    """
    tools = open_tools(
        budget,
        budget_name=budget_name,
        catalogue=catalogue,
        router=router,
        policy=policy,
        on_short=on_short,
        models=models,
        ledger=ledger if ledger is not None else Ledger(ledger_address(folder, store)),
        timeout=timeout,
        tries=tries,
        concurrency=concurrency,
        slots=slots,
    )
    workflow = Workflow(tools)
    if ledger is None:  # the nodes hold the workflow: it ends when the last copy of the graph does
        weakref.finalize(workflow, tools.ledger.close)
    return workflow.build(checkpointer, name)


def as_tool(
    graph: Graph,
    *,
    name: str = "solve",
    description: str = "Answers a question that needs careful reasoning or calculation. Ask one whole question.",
    context: Allowance | None = None,
) -> BaseTool:
    """The graph as a LangChain tool: takes `question`, returns the answer, or the reason why there is none."""

    def solve(question: str) -> str:
        return _told(graph.invoke({"question": question}, context=context))

    async def asolve(question: str) -> str:
        return _told(await graph.ainvoke({"question": question}, context=context))

    return StructuredTool.from_function(solve, coroutine=asolve, name=name, description=description)


def _told(answer: Mapping[str, Any]) -> str:
    value = answer.get("value")
    return str(value) if value is not None else f"no answer: {answer.get('reason', '')}"


def open_tools(
    budget: Dollars | None,
    *,
    budget_name: str | None,
    catalogue: Catalogue | str | Path | None,
    router: QueryRouter | str | Path | None,
    policy: str | Policy,
    on_short: WhenShort,
    models: Mapping[str, Model] | None,
    ledger: Ledger,
    timeout: float | None,
    tries: int,
    concurrency: int,
    slots: int = SLOTS,
) -> WorkflowResources:
    """What the nodes work with. Raises `InputError` for a budget that is not above zero, and for wrong settings."""
    if tries < 1:
        raise InputError(f"a call is tried at least once, got tries={tries}")
    Allowance(on_short=on_short, timeout=timeout)  # checks both
    limit = nanousd(DEFAULT_BUDGET_USD if budget is None else budget)
    if limit <= 0:
        raise InputError(f"a budget is above zero dollars, got {budget}")
    loaded = catalogue if isinstance(catalogue, Catalogue) else Catalogue.load(catalogue)
    pool = _Models(loaded, dict(models or {}), slots)
    scope = budget_name or f"run-{uuid.uuid4().hex[:12]}"
    tools = WorkflowResources(
        catalogue=pool.catalogue,
        router=_open_router(router, pool.catalogue),
        policy=parse_policy(policy) if isinstance(policy, str) else policy,
        ledger=ledger,
        budget=scope,
        model=pool.model,
        usable=pool.is_usable,
        on_short=on_short,
        timeout=timeout,
        tries=tries,
        threads=Threads(concurrency),
    )
    if budget is not None or not _is_known(ledger, scope):
        ledger.create(scope, limit_nanousd=limit)
    return tools


def ledger_address(folder: str | Path | None, store: str | None) -> str | Path:
    """Where the ledger lies: at a `postgresql://` address, or in a folder, by default that of this user."""
    if store is not None:
        return store
    return home_folder(folder) / "ledger.db"


def home_folder(folder: str | Path | None) -> Path:
    return Path(folder) if folder is not None else default_path().parent


def _is_known(ledger: Ledger, budget: str) -> bool:
    try:
        ledger.budget(budget)
    except UnknownName:
        return False
    return True


class _Models:
    """Models by name: those that were given, then those of the catalogue, opened when they are first asked for."""

    def __init__(self, catalogue: Catalogue, given: dict[str, Model], slots: int) -> None:
        entries = [model.catalogue_entry() for name, model in given.items() if name not in catalogue]
        self.catalogue = with_litellm_prices(catalogue.with_models(*filter(None, entries)))
        self._models, self._lock = given, threading.Lock()
        self._local = LocalModels(self.catalogue, slots=slots)
        self._here = set(given)  # models that were given, or whose weights were found

    def model(self, name: str) -> Model:
        with self._lock:
            if name not in self._models:
                self._models[name] = self._open(self.catalogue[name])
            return self._models[name]

    def _open(self, spec: ModelSpec) -> Model:
        if spec.kind == "scripted":
            return ScriptedModel(spec.text or "", spec=spec, pause=spec.pause)
        return RemoteModel(spec) if spec.kind == "remote" else self._local.model(spec.name)

    def is_usable(self, pair: Pair) -> bool:
        """Whether the catalogue has the model. Raises `WeightsError` where its weights are not here.

        Of a remote one, `MissingExtra` without LiteLLM and `AuthenticationFailed` where the variable of its key is not set.
        """
        if pair.model in self._here:
            return True
        if pair.model not in self.catalogue:
            return False
        if self.catalogue[pair.model].kind in ("local", "pair"):
            for member in self.catalogue[pair.model].members:
                locate(self.catalogue[member])
        if self.catalogue[pair.model].kind == "remote":
            check_usable(self.catalogue[pair.model])
        self._here.add(pair.model)
        return True


def _open_router(router: QueryRouter | str | Path | None, catalogue: Catalogue) -> QueryRouter:
    if router is None:
        return StaticRouter.default()
    if isinstance(router, QueryRouter):
        return router
    try:
        from viaticum.routers.query.rtr import RTRRouter
    except ImportError as error:
        raise MissingExtra(error.name or "torch", "local") from None
    fitted = RTRRouter.load(router)
    fitted.check_fits(list(catalogue), strategies.names())
    return fitted
