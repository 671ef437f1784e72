"""What the nodes of the workflow use: models, ledger, router, and terms that hold where a run says nothing.

Leaves out how they are opened (`viaticum.agents.build`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from viaticum.agents.workflow.latencies import CallLatencies
from viaticum.agents.workflow.sessions import Sessions
from viaticum.agents.workflow.settings import TRIES
from viaticum.agents.workflow.threads import ThreadPool
from viaticum.budgets import Ledger
from viaticum.budgets.planner import WhenShort
from viaticum.catalogue import Catalogue
from viaticum.errors import InputError, ViaticumError
from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.models.base import Model
from viaticum.residency import NO_RESTRICTION, Residency
from viaticum.routers.query import Plan, Policy, QueryRouter
from viaticum.routers.query.plans import BY_CHECK
from viaticum.types import Pair

BACKOFF = 0.5  # seconds before the second try, doubled before each further one


@dataclass(frozen=True)
class WorkflowResources:
    """What the nodes use. policy, on_short and timeout apply unless the run's `Allowance` says otherwise.

    Args:
        budget: the scope that pays.
        model: returns a model by its name.
        is_usable: whether a pair's model can be used here.
        none_usable: the error where no model of these pairs can be used here.
        sync: makes the checkpoints so far survive a power cut, for a checkpointer that does not wait for the
            disk itself; called before each hold.
        tries: attempts of one call whose model is unavailable.
        backoff: seconds before the second try; doubled before each further one.
        threads: where nodes run that an event loop calls.
        settings: how calls are generated, where the run's `Allowance` does not say.
        labels: returns where the data of a model's calls goes, by its name (`viaticum.residency`).
        residency: the restrictions that are in force; `viaticum.agents.workflow.restrictions` adds one.
        max_seconds: of a whole run, where its `Allowance` does not say; None for no limit.
        latencies: what calls took.
        sessions: what is remembered of conversations (see `Allowance`).
        can_restart: whether text that was streamed can be taken back. If not, a call that fails after its
            first piece of text ends the run; else another pair is asked.
    """

    catalogue: Catalogue
    router: QueryRouter
    policy: Policy
    ledger: Ledger
    budget: str
    model: Callable[[str], Model]
    is_usable: Callable[[Pair], bool]
    labels: Callable[[str], frozenset[str]]
    latencies: CallLatencies
    none_usable: Callable[[Iterable[Pair]], ViaticumError] = lambda pairs: InputError(
        "no pair is left to choose from; add a model: viaticum models add NAME"
    )
    sync: Callable[[], None] = lambda: None
    on_short: WhenShort = "cheaper"
    timeout: float | None = None
    tries: int = TRIES
    backoff: float = BACKOFF
    threads: ThreadPool = field(default_factory=lambda: ThreadPool(16))
    settings: GenerationSettings = NO_SETTINGS
    residency: Residency = NO_RESTRICTION
    max_seconds: float | None = None
    sessions: Sessions = field(default_factory=Sessions)
    can_restart: bool = True

    def is_self_check(self, plan: Plan) -> bool:
        """Whether a model would check its own answer, under another name or as a member of a pair."""
        return plan.need == BY_CHECK and self.catalogue.is_same_model(
            *(each.model for each in plan.pairs[:2])
        )

    def can_follow(self, plan: Plan) -> bool:
        """Whether all models of a plan can be used here, and none checks its own answer."""
        return all(map(self.is_usable, plan.pairs)) and not self.is_self_check(plan)
