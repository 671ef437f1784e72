"""The catalogue entries that a job uses: a run that goes on has to find them as they were, and no others.

A job uses the entries of models that its router, its rows, its options or its shadow calls name, those of a
pair's members among them. Of a router that does not say which models it names, and of encoders, every entry
counts that was there when the job began. An entry that came later is not routed to by default, so that it
changes nothing. Leaves out the rest of the fingerprint (`agents.batch.folder`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations, islice
from typing import Any

from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.settings import WorkflowSettings
from viaticum.agents.workflow.shadow_settings import ShadowSampling
from viaticum.budgets.records import digest
from viaticum.budgets.serialization import json_text
from viaticum.catalogue import Catalogue
from viaticum.jobs import Job
from viaticum.routers.query.restricted import RestrictedRouter
from viaticum.types import split_model

TRIED = 1 << 14  # catalogues that a job without a list of its entries may have begun with
Entries = dict[str, str | None]


def used_entries(
    tools: WorkflowResources, named: Iterable[str], shadow: ShadowSampling | None, before: Job | None
) -> Entries:
    """The entries that a job uses: a short digest by name, None for a name that is not in the catalogue.

    Args:
        tools: of the job.
        named: models that its rows name.
        shadow: its shadow sampling, or None.
        before: what an earlier run of it wrote down, or None.
    """
    catalogue = tools.catalogue
    begun = None if before is None else before.memory.get("entries")
    known = [*catalogue] if begun is None else [*begun]
    names = _routed_models(tools) | {name for name in named if name in catalogue or name in known}
    if shadow is not None:
        names |= {split_model(each)[0] for each in (shadow.model, shadow.judge) if each is not None}
    encoders = {spec.name for spec in catalogue.encoders()}
    names |= {name for name in known if name in encoders or not _names_its_models(tools)}
    members = {member for name in names if name in catalogue for member in catalogue[name].members}
    return {name: _digest_of(catalogue, name) for name in sorted(names | members)}


def catalogue_digest(tools: WorkflowResources, used: Entries, before: Job | None) -> str:
    """The digest of the entries that a job uses; that of its earlier run where these are the same."""
    catalogue = tools.catalogue
    own = digest({name: catalogue[name].identity for name in used if name in catalogue})
    earlier = None if before is None else before.fingerprint.get("catalogue")
    if before is None or earlier is None:
        return own
    known: Entries | None = before.memory.get("entries")
    if known is None:
        sure = [spec.name for spec in catalogue.models()] if _names_its_models(tools) else []
        identities = {spec.name: spec.identity for spec in catalogue.values()}
        needed = {name for name in sure if name in used}
        same = earlier in islice(_digests(identities, needed), TRIED)
    else:
        same = all(known.get(name) == entry for name, entry in used.items())
    return earlier if same else own


def without_later_entries(settings: WorkflowSettings, before: Job) -> WorkflowSettings:
    """The settings of a job that goes on: entries that came after its begin are asked by name alone."""
    known = before.memory.get("entries")
    if known is None:
        return settings
    given = settings.catalogue
    catalogue = given if isinstance(given, Catalogue) else Catalogue.load(given)
    later = [spec for spec in catalogue.values() if spec.default and spec.name not in known]
    if not later:
        return settings
    changed = (spec.model_copy(update={"default": False}) for spec in later)
    return replace(settings, catalogue=catalogue.with_models(*changed))


def _routed_models(tools: WorkflowResources) -> set[str]:
    """The models that the router is known to name."""
    router = tools.router
    names = {name for each in router.knowledge() for name in each.models}
    if isinstance(router, RestrictedRouter) and router.model is not None:
        names.add(router.model)
    return names


def _names_its_models(tools: WorkflowResources) -> bool:
    """Whether the router says which models it names."""
    router = tools.router
    if isinstance(router, RestrictedRouter) and router.model is not None:
        return True
    return all(each.models for each in router.knowledge())


def _digest_of(catalogue: Catalogue, name: str) -> str | None:
    return digest(catalogue[name].identity)[:12] if name in catalogue else None


def _digests(identities: Mapping[str, Any], needed: set[str]) -> Iterator[str]:
    """Digests of all entries together, as the first version wrote them, with more and more of them left out.

    needed: entries that are never left out.
    """
    parts = {name: f"{json_text(name)}: {json_text(identities[name])}" for name in sorted(identities)}
    others = [name for name in parts if name not in needed]
    for count in range(len(others) + 1):
        for left_out in combinations(others, count):
            text = ", ".join(part for name, part in parts.items() if name not in left_out)
            yield hashlib.sha256(f"{{{text}}}".encode()).hexdigest()
