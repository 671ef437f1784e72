"""`build_graph`: the workflow as a LangGraph graph, to run, to nest in another graph, or to call from a node.

Opens what the nodes use: catalogue, router, models and ledger. Leaves out threads, questions and answers,
which are the SDK's (`viaticum.agents.client`).
"""

from __future__ import annotations

import logging
import threading
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Unpack

from langgraph.types import Checkpointer

from viaticum import strategies
from viaticum.agents.workflow.graph import Graph, Workflow
from viaticum.agents.workflow.latencies import CallLatencies
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.restrictions import restricted
from viaticum.agents.workflow.settings import (
    LIVE_OUTCOMES,
    SLOTS,
    Dollars,
    SettingsKeywords,
    WorkflowSettings,
)
from viaticum.agents.workflow.soft_limits import SoftLimitWatch
from viaticum.agents.workflow.threads import ThreadPool
from viaticum.agents.workflow.watched_router import WatchedRouter
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import InputError, UnknownName, ViaticumError
from viaticum.model_prices import PRICES
from viaticum.models.base import Model
from viaticum.models.decoding_modes import in_measured_modes
from viaticum.models.local import LocalModels
from viaticum.models.remote.model import RemoteModel
from viaticum.models.remote.prices import thinks_by_default, with_litellm_prices
from viaticum.models.scripted import ScriptedModel
from viaticum.models.usable import UsableModels
from viaticum.outcomes import read_outcomes
from viaticum.residency import LOCAL, Residency
from viaticum.routers.query import QueryRouter, StaticRouter, as_policy
from viaticum.routers.query.covering import STRATEGIES, CoveringRouter
from viaticum.routers.query.folders import load_router
from viaticum.routers.query.prior import USUAL, PriorModel, default_prior
from viaticum.routers.query.restricted import RestrictedRouter
from viaticum.types import Outcome, Pair

_log = logging.getLogger(__name__)


def build_graph(
    budget: Dollars | None = None,
    *,
    ledger: Ledger | None = None,
    checkpointer: Checkpointer = None,
    name: str = "viaticum",
    **settings: Unpack[SettingsKeywords],
) -> Graph:
    """Compile a LangGraph graph: {"question": ...} in, {"value": ..., "text": ..., "cost": ...} out.

    With a checkpointer run it with durability="sync": a call that was paid for is then never paid for again.
    `context=Allowance(...)` changes budget, policy, on_short and timeout for one run.

    Args:
        budget: dollars for all questions together.
        ledger: an open ledger, which the caller closes; None to open the one that the settings name.
        checkpointer: None to inherit that of the enclosing graph.
        name: of the graph.
        settings: keywords of `WorkflowSettings`, but shadow.
    """
    checked = WorkflowSettings.from_keywords(budget, settings)
    if checked.shadow is not None:
        raise InputError("shadow sampling is of Viaticum, the server and batch jobs; leave shadow out")
    opened = ledger if ledger is not None else Ledger(checked.ledger_address)
    workflow = Workflow(open_workflow(checked, opened))
    if checked.soft_limits is not None:
        weakref.finalize(workflow, SoftLimitWatch(opened, checked.soft_limits).close)
    if ledger is None:  # the nodes hold the workflow: it ends when the last copy of the graph does
        weakref.finalize(workflow, opened.close)
    return workflow.build(checkpointer, name)


def open_workflow(settings: WorkflowSettings, ledger: Ledger) -> WorkflowResources:
    """Open what the nodes use, and create the budget in the ledger if it does not exist."""
    resources = open_resources(settings, ledger)
    if settings.budget is not None or not _is_known(ledger, resources.budget):
        ledger.create(resources.budget, limit_nanousd=settings.limit_nanousd)
    return resources


def open_resources(settings: WorkflowSettings, ledger: Ledger) -> WorkflowResources:
    """Open what the nodes use, without creating the budget.

    Raises:
        InputError: the catalogue or the router cannot be used.
    """
    catalogue = settings.catalogue
    loaded = catalogue if isinstance(catalogue, Catalogue) else Catalogue.load(catalogue)
    loaded = loaded.with_local(settings.local)
    strategies.load(*loaded.strategies, *settings.strategies)
    pool = _Models(loaded, settings)
    router = _open_router(settings, pool)
    pool.run_as_measured(router)
    if router.profiles() and not isinstance(router, WatchedRouter):
        folder = ledger.folder or (settings.home if settings.store is not None else None)
        router = WatchedRouter(router, ledger, folder)
    resources = WorkflowResources(
        catalogue=pool.catalogue,
        router=_restricted(router, settings, pool.catalogue),
        policy=as_policy(settings.policy),
        ledger=ledger,
        budget=settings.budget_name or f"run-{uuid.uuid4().hex[:12]}",
        model=pool.model,
        is_usable=lambda pair: pair.model in pool.usable,
        none_usable=pool.none_usable,
        labels=pool.labels,
        on_short=settings.on_short,
        timeout=settings.timeout,
        max_seconds=settings.max_seconds,
        latencies=CallLatencies(ledger),
        tries=settings.tries,
        threads=ThreadPool(settings.concurrency),
        settings=settings.generation,
    )
    return restricted(resources, Residency.of(settings.only))


def _restricted(router: QueryRouter, settings: WorkflowSettings, catalogue: Catalogue) -> QueryRouter:
    """The router, for the model and the strategy of the settings alone where they name any.

    Raises:
        UnknownName: no such model or strategy.
    """
    if settings.model is None and settings.strategy is None:
        return router
    if settings.strategy is not None:
        strategies.load(settings.strategy)
    models = [spec.name for spec in catalogue.models()]
    if settings.model is not None and settings.model not in models:
        raise UnknownName("model", settings.model, models)
    return RestrictedRouter(router, settings.model, settings.strategy)


def _is_known(ledger: Ledger, budget: str) -> bool:
    try:
        ledger.budget(budget)
    except UnknownName:
        return False
    return True


class _Models:
    """Models by name: the given ones, then those of the catalogue, opened on first use."""

    def __init__(self, catalogue: Catalogue, settings: WorkflowSettings) -> None:
        given = dict(settings.models or {})
        self.catalogue = with_litellm_prices(catalogue.with_models(*_given_entries(given, catalogue)))
        self._given, self._models, self._lock = given, dict(given), threading.Lock()
        self._local = LocalModels(
            self.catalogue,
            slots=settings.slots,
            max_slots=max(settings.concurrency, SLOTS),
            streams=1 if settings.concurrency == 1 else None,  # other slots hold prompts then
        )
        self.usable = UsableModels(self.catalogue, given, named=settings.model)
        self._named = settings.model

    def model(self, name: str) -> Model:
        with self._lock:
            if name not in self._models:
                self._models[name] = self._open(self.catalogue[name])
            return self._models[name]

    def run_as_measured(self, router: QueryRouter) -> None:
        """Let pairs that a fitted router knows run in the mode that its outcomes were measured in."""
        known = {model for each in router.knowledge() if each.kind == "fitted" for model in each.models}
        self.catalogue = self._local.catalogue = in_measured_modes(self.catalogue, known)

    def labels(self, name: str) -> frozenset[str]:
        """Where the data of a model goes; of one given in code, by its own entry, whatever its name says."""
        model = self._given.get(name)
        if model is None:
            return self.catalogue.labels(name)
        entry = model.catalogue_entry() or getattr(model, "spec", None)
        if isinstance(entry, ModelSpec):
            return entry.labels
        return frozenset((LOCAL,) if model.runs_here else ())

    @property
    def candidates(self) -> list[str]:
        """The models that may be routed to: the one that was named, else those that are so by default."""
        if self._named is not None:
            return [self._named]
        return [spec.name for spec in self.catalogue.models() if spec.default]

    def none_usable(self, pairs: Iterable[Pair]) -> ViaticumError:
        """The reason for one model; for several, the reasons of all that may be routed to."""
        names = dict.fromkeys(pair.model for pair in pairs)
        return self.usable.none_usable(names if len(names) == 1 else [*self.candidates, *names])

    def _open(self, spec: ModelSpec) -> Model:
        if spec.kind == "scripted":
            return ScriptedModel(spec.text or "", spec=spec, pause=spec.pause)
        return RemoteModel(spec) if spec.kind == "remote" else self._local.model(spec.name)


def prior_model(
    catalogue: Catalogue, name: str, figures: Mapping[str, float] = MappingProxyType({})
) -> PriorModel:
    """What a prior may know of a model. figures: beside the benchmarks of its entry."""
    spec = catalogue[name]
    return PriorModel(
        name,
        catalogue[spec.members[-1]].price,
        spec.description,
        {**figures, **spec.benchmarks},
        spec.thinking is True or thinks_by_default(spec),
    )


def _given_entries(given: Mapping[str, Model], catalogue: Catalogue) -> Iterator[ModelSpec]:
    """The entries of models that were passed in code, each under its own name and the one it was given.

    One in place of a local model of the catalogue brings its prices alone: pairs are made of local entries.
    """
    for name, model in given.items():
        entry = model.catalogue_entry()
        if entry is None:
            continue
        for each in dict.fromkeys((entry.name, name)):
            there = catalogue.get(each)
            kept = there if there is not None and there.kind == "local" else entry
            yield kept.model_copy(update={"name": each, **{field: getattr(entry, field) for field in PRICES}})


def _open_router(settings: WorkflowSettings, pool: _Models) -> QueryRouter:
    """The router of the settings; without one, the packaged table and a prior for all other models."""
    router = settings.router
    if isinstance(router, QueryRouter):
        return router
    if router is None:
        return _covering(StaticRouter.default(), settings, pool)
    fitted = load_router(router)
    known = {pair.strategy for pair in fitted.pairs if strategies.is_known(pair.strategy)}
    fitted.check_fits(list(pool.catalogue), sorted(known))
    return fitted


def _live_outcomes(path: Path) -> list[Outcome]:
    """What `feedback` recorded, the last of a question and pair; nothing where the file cannot be read."""
    if not path.is_file():
        return []
    try:
        return list({(row.question_id, row.pair): row for row in read_outcomes(path)}.values())
    except ViaticumError as error:
        _log.warning("the prior goes without the outcomes of feedback: %s", error)
        return []


def _covering(table: StaticRouter, settings: WorkflowSettings, pool: _Models) -> QueryRouter:
    """The table, and a prior for the usable models that it does not know; the table alone where it knows all.

    The accuracies of the packaged table are those of one kind of questions. Beside models that it does not
    know, its own are therefore placed by that figure on the prior's scale.
    """
    usual = {row.pair.model: row.accuracy for row in table.rows if row.pair.strategy == USUAL}
    unknown = [name for name in pool.candidates if name not in usual and name in pool.usable]
    if not unknown:
        return table
    figure = table.origin.dataset if table.origin is not None else ""
    return CoveringRouter(
        table,
        default_prior().with_outcomes(_live_outcomes(settings.home / LIVE_OUTCOMES)),
        [prior_model(pool.catalogue, name) for name in unknown],
        STRATEGIES if settings.strategy is None else (settings.strategy,),
        [
            prior_model(pool.catalogue, name, {figure: share})
            for name, share in usual.items()
            if name in pool.catalogue
        ],
    )
