"""A question that is sampled for a shadow call, and what asking it again would be.

Leaves out the calls (`viaticum.agents.workflow.shadow`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from viaticum.agents.workflow.calls import ModelCall
from viaticum.agents.workflow.estimates import estimate, output_limit
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.budgets.records import worst_costs
from viaticum.generation import GenerationSettings
from viaticum.residency import Residency
from viaticum.routers.query import Policy, choose_plan
from viaticum.shadow_samples import GivenAnswer
from viaticum.strategies import get as get_strategy
from viaticum.types import Pair, Query


@dataclass(frozen=True, slots=True)
class Sampled:
    """An answered question that is asked again.

    Args:
        id: of the request.
        live: the answer that its caller got.
        routes: the pairs that were called for it, as model+strategy.
        worst_case: of a chat, returns that of the call which gave the answer, in nano-dollars.
        residency: where its data may go: the restrictions of the answer and of the budget that paid.
        golds: accepted answers, none where they are not known.
        ask: makes the call of a chat, which no strategy reads, given the scope that pays and its ledger key;
            None for a question of the workflow.
    """

    id: str
    query: Query
    live: GivenAnswer
    routes: tuple[str, ...]
    policy: Policy
    settings: GenerationSettings
    residency: Residency
    golds: tuple[str, ...] = ()
    worst_case: Callable[[], int] = lambda: 0
    ask: Callable[[str, str], GivenAnswer] | None = None


def same_pair(sampled: Sampled, resources: WorkflowResources) -> Pair | None:
    """The pair that alone gave the answer and would again, which tells nothing and costs money."""
    limit = output_limit(resources.catalogue, sampled.settings)
    rows = estimate(resources.router, sampled.query, limit)[1]
    rows = [row for row in rows if resources.can_follow(row.plan)]
    if len(sampled.routes) != 1 or not rows:
        return None
    is_same = str(choose_plan(rows, None, sampled.policy).plan) == sampled.routes[0]
    return Pair.parse(sampled.routes[0]) if is_same else None


def worst_case_of(sampled: Sampled, pair: Pair, resources: WorkflowResources) -> int:
    """Nano-dollars that the calls of a pair need: the last one's worst case, after the others."""
    settings = sampled.settings.over(resources.settings)
    model, samples = resources.model(pair.model), get_strategy(pair.strategy).samples
    call = ModelCall.of(model, resources.catalogue, pair, sampled.query, settings)
    worst = model.worst_case_of(call.messages, call.generation)
    last = sum(worst_costs(worst, resources.catalogue.prices(worst)).values())
    return last + sampled.live.cost_nanousd * (samples - 1) // samples
