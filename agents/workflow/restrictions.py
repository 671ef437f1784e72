"""Restrictions of where data may go, enforced twice: where a route is chosen, and where a model is opened.

Every call of a model begins with opening it by its name, so that no failover, no named model, no judge and no
later step of a plan reaches a model that is not allowed, whatever chose it. Leaves out what a restriction is
(`viaticum.residency`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.errors import ViaticumError
from viaticum.models.base import Model
from viaticum.residency import Residency
from viaticum.types import Pair


def restricted(resources: WorkflowResources, residency: Residency) -> WorkflowResources:
    """The resources under one more restriction; those that they have stay in force."""
    if not residency or resources.residency & residency == resources.residency:
        return resources

    def allows(name: str) -> bool:
        return residency.allows(resources.labels(name))

    def is_usable(pair: Pair) -> bool:
        return allows(pair.model) and resources.is_usable(pair)

    def none_usable(pairs: Iterable[Pair]) -> ViaticumError:
        given = list(pairs)
        left = [pair for pair in given if allows(pair.model)]
        if left or not given:
            return resources.none_usable(left)
        return residency.refusal({pair.model: resources.labels(pair.model) for pair in given})

    def model(name: str) -> Model:
        labels = resources.labels(name)
        if not residency.allows(labels):
            raise residency.refusal({name: labels})
        return resources.model(name)

    return replace(
        resources,
        residency=resources.residency & residency,
        is_usable=is_usable,
        none_usable=none_usable,
        model=model,
    )
