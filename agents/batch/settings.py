"""The settings of a batch: `BatchSettings`, and the keywords by which `run_batch` takes them.

Leaves out opening what the settings name (`agents.batch.run`) and the defaults of the workflow
(`agents.workflow.settings`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from viaticum.agents.batch.engines import Engine
from viaticum.agents.batch.planning import PACED
from viaticum.agents.batch.progress import EventSink
from viaticum.agents.batch.steps import CONCURRENCY, DRAIN_SECONDS
from viaticum.agents.batch.workers import Cluster
from viaticum.agents.workflow.settings import TRIES, Dollars, ModelKeywords, WorkflowSettings
from viaticum.agents.workflow.shadow_settings import ShadowSampling
from viaticum.agents.workflow.soft_limits import SoftLimits
from viaticum.budgets import default_path
from viaticum.catalogue import Catalogue
from viaticum.checks import checked_type
from viaticum.errors import InputError
from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.local_settings import NO_LOCAL_SETTINGS, LocalSettings
from viaticum.models.base import Model
from viaticum.residency import Only, checked_only
from viaticum.routers.query import QueryRouter


class BatchKeywords(ModelKeywords, total=False):
    """Keywords of `run_batch`. Meanings and defaults: `BatchSettings`."""

    budget: Dollars | None
    policy: str
    deadline: float | None
    engine: Engine
    cluster: Cluster | None
    resume: bool
    force: bool
    wait: bool
    cancel: bool
    skip_bad: bool
    skip: int
    limit: int | None
    format: str | None
    soft_limits: SoftLimits | None
    ledger: str | Path | None
    cache: str | Path | None
    keep_texts: bool
    drain_seconds: float
    stop: threading.Event | None
    tell: Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """What a job is run with; validated here, once.

    Args:
        budget: dollars for all rows together; None only to go on with a job, at its former limit.
        policy: "paced", or a policy of `Viaticum`.
        deadline: seconds after which no row is started; None for none. Where it is as long as a provider asks
            for a batch (a day), rows wait for one, at its lower price (see `agents.batch.deferral`).
        engine: "local" or "ray".
        cluster: workers of engine "ray"; None for the defaults of `Cluster`.
        resume: go on with a job that was interrupted, or that has more money now.
        force: start over, whatever results or job are there.
        wait: stay until the providers' batches have ended; False looks once, and leaves them to a later run.
        cancel: with `resume`: cancel the batches at their providers, post what they have done, and end.
        skip_bad: leave out rows that cannot be used; False refuses the file.
        skip: leave out so many first rows of the input.
        limit: take at most so many rows.
        format: of the input, where its suffix does not say: "jsonl", "openai", "csv" or "parquet".
        catalogue, router, models, timeout, tries, local, generation, strategies, model, strategy, only: as of
            `WorkflowSettings`.
        max_seconds: that one row may take, all its calls together.
        ledger: a path or a `postgresql://` address; None for the user's.
        cache: a file of answers that jobs share; None for the job's own.
        concurrency: calls at the same time, of each worker where the engine is "ray".
        slots: as of `WorkflowSettings`; by default "auto".
        keep_texts: rows keep what the models wrote.
        shadow: a share of the rows is asked again of one model, after the results are written.
        soft_limits: where word is given that the job's budget has spent a share of its limit; of one run, so
            that a job that goes on does not remember it.
        drain_seconds: how long running calls may take to end once the job is stopped.
        stop: set by the caller to end the job in order.
        tell: called with every event of the job, a plain dict.

    Raises:
        InputError: a value is out of range.
    """

    budget: Dollars | None = None
    policy: str = PACED
    deadline: float | None = None
    engine: Engine = "local"
    cluster: Cluster | None = None
    resume: bool = False
    force: bool = False
    wait: bool = True
    cancel: bool = False
    skip_bad: bool = False
    skip: int = 0
    limit: int | None = None
    format: str | None = None
    catalogue: Catalogue | str | Path | None = None
    router: QueryRouter | str | Path | None = None
    models: Mapping[str, Model] | None = None
    ledger: str | Path | None = None
    cache: str | Path | None = None
    concurrency: int = CONCURRENCY
    slots: int | Literal["auto"] = "auto"
    local: LocalSettings = NO_LOCAL_SETTINGS
    timeout: float | None = None
    max_seconds: float | None = None
    tries: int = TRIES
    keep_texts: bool = False
    drain_seconds: float = DRAIN_SECONDS
    generation: GenerationSettings = NO_SETTINGS
    strategies: Sequence[str] = ()
    model: str | None = None
    strategy: str | None = None
    only: Only | None = None
    shadow: ShadowSampling | None = None
    soft_limits: SoftLimits | None = None
    stop: threading.Event | None = None
    tell: EventSink = lambda event: None

    def __post_init__(self) -> None:
        if self.only is not None:
            object.__setattr__(self, "only", checked_only(self.only))
        if self.shadow is not None:
            checked_type("shadow", self.shadow, ShadowSampling, "ShadowSampling")
        if self.soft_limits is not None:
            checked_type("soft_limits", self.soft_limits, SoftLimits, "SoftLimits")
        if self.concurrency < 1:
            raise InputError(f"concurrency is at least 1, got {self.concurrency}")
        if self.cancel and not self.resume:
            raise InputError("cancel ends a job that was begun; give resume with it")
        if self.deadline is not None and not self.deadline > 0:
            raise InputError(f"a deadline is above zero seconds, got {self.deadline}")

    @property
    def ledger_address(self) -> str:
        return str(default_path() if self.ledger is None else self.ledger)

    @property
    def workers(self) -> int:
        """How many processes answer rows."""
        if self.engine != "ray":
            return 1
        return (self.cluster or Cluster()).workers

    def workflow(self, scope: str) -> WorkflowSettings:
        """Settings of the workflow that answers rows. scope: the budget that pays."""
        return WorkflowSettings(
            budget_name=scope,
            catalogue=self.catalogue,
            router=self.router,
            models=self.models,
            timeout=self.timeout,
            max_seconds=self.max_seconds,
            tries=self.tries,
            concurrency=self.concurrency,
            slots=self.slots,
            local=self.local,
            generation=self.generation,
            strategies=self.strategies,
            model=self.model,
            strategy=self.strategy,
            only=self.only,
        )
