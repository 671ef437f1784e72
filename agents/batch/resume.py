"""What a job remembers of how it began, so that `--resume` alone goes on, and tells a difference in words.

Leaves out the fingerprint itself (`agents.batch.folder`), which decides whether a job is the same: what is
written here explains it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from viaticum.agents.batch.entries import Entries
from viaticum.agents.batch.settings import BatchSettings
from viaticum.agents.workflow.shadow_settings import ShadowSampling
from viaticum.generation import GenerationSettings
from viaticum.jobs import Job
from viaticum.local_settings import LocalSettings
from viaticum.money import usd_digits
from viaticum.routers.query import QueryRouter

# Fields of `BatchSettings` that a job keeps. Those that concern one run alone are left out: the deadline, the
# engine with its machines, resume, force, stop and tell.
REMEMBERED = (
    *("policy", "skip", "limit", "format", "skip_bad", "keep_texts", "catalogue", "router", "model"),
    *("strategy", "strategies", "generation", "local", "timeout", "tries", "concurrency", "slots", "cache"),
    *("only", "max_seconds", "shadow"),
)
_PATHS = ("catalogue", "router", "cache")
SHOWN = 5  # names of entries in a message


def remember(settings: BatchSettings, router: QueryRouter, entries: Entries) -> dict[str, Any]:
    """The settings as JSON, without defaults and objects; what the router knows; the entries in use."""
    kept: dict[str, Any] = {}
    default = BatchSettings()
    for name in REMEMBERED:
        value = getattr(settings, name)
        if value == getattr(default, name):
            continue
        if isinstance(value, GenerationSettings | LocalSettings):
            kept[name] = value.model_dump(mode="json")
        elif isinstance(value, ShadowSampling):
            kept[name] = asdict(replace(value, budget=usd_digits(value.limit_nanousd)))
        elif name in _PATHS and isinstance(value, str | Path):
            kept[name] = str(Path(value).absolute())
        elif isinstance(value, str | int | float | None):
            kept[name] = value
        elif isinstance(value, list | tuple):
            kept[name] = list(value)
    chosen = settings.router
    given = chosen if isinstance(chosen, str | Path) or chosen is None else type(chosen).__name__
    return {
        "settings": kept,
        "entries": entries,
        "router": given if given is None else str(given),
        "knowledge": [each.to_json() for each in router.knowledge()],
    }


def recall(given: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """The keywords of a run that goes on: those that are given, then those that the job began with."""
    kept = {name: value for name, value in job.memory.get("settings", {}).items() if name in REMEMBERED}
    if "generation" in kept:
        kept["generation"] = GenerationSettings.of(**kept["generation"])
    if "local" in kept:
        kept["local"] = LocalSettings.of(**kept["local"])
    if "shadow" in kept:
        kept["shadow"] = ShadowSampling(**kept["shadow"])
    kept = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
    if "ledger" not in given:
        kept["ledger"] = job.ledger
    return {**kept, **given}


def differences(before: Job, now: Job) -> list[str]:
    """What differs between a job as it began and a run that would go on with it, one clause each."""
    clauses = []
    for name in {**before.fingerprint, **now.fingerprint}:  # what is not given any more is a difference too
        old, new = (each.fingerprint.get(name) for each in (before, now))
        if old != new:
            clauses.append(_CLAUSES.get(name, _values)(name, before, now))
    return clauses


def _values(name: str, before: Job, now: Job) -> str:
    old, new = (each.fingerprint.get(name) or "none" for each in (before, now))
    if max(len(old), len(new)) == 64:  # hashes say nothing
        return f"another {name}"
    return f"the {name} was {old}, and is {new} now"


def _input(name: str, before: Job, now: Job) -> str:
    if before.input != now.input:
        return f"the questions were those of {before.input}, and are those of {now.input} now"
    return f"{now.input} holds other questions than then"


def _rows(name: str, before: Job, now: Job) -> str:
    old, new = (_rows_text(each.fingerprint.get(name, "")) for each in (before, now))
    return f"it took {old} of the input, and would take {new} now"


def _rows_text(rows: str) -> str:
    """rows: "skip 0, limit None", as the fingerprint has it."""
    skip, _, limit = rows.removeprefix("skip ").partition(", limit ")
    if not skip.isdigit():
        return "other rows"
    first = int(skip) + 1
    if limit.isdigit():
        return f"rows {first} to {int(skip) + int(limit)}"
    return "all rows" if first == 1 else f"the rows from {first} on"


def _router(name: str, before: Job, now: Job) -> str:
    old, new = (_router_text(each) for each in (before, now))
    if old == new:
        return f"the router ({new}) has other contents than then"
    return f"the router was {old}, and is {new} now"


def _router_text(job: Job) -> str:
    if "router" not in job.memory:
        return "one that an earlier version did not note"
    return job.memory["router"] or "the packaged table"


def _catalogue(name: str, before: Job, now: Job) -> str:
    old, new = (each.memory.get("entries") for each in (before, now))
    if old is None or new is None:
        return "another catalogue: other entries, or others of their fields"
    differing = [entry for entry in new if old.get(entry) != new[entry]]
    changed = [f"{entry} {_change(old.get(entry), new[entry])}" for entry in differing]
    more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    return f"the catalogue differs: {', '.join(changed[:SHOWN])}{more}"


def _change(old: str | None, new: str | None) -> str:
    """What became of an entry, by its digests."""
    if old is None or new is None:
        return "is new" if old is None else "is missing"
    return "changed"


def _generation(name: str, before: Job, now: Job) -> str:
    old, new = (_settings_text(each) for each in (before, now))
    return f"texts were generated with {old}, and would be with {new} now"


def _settings_text(job: Job) -> str:
    if "generation" not in job.fingerprint:
        return "no settings"
    kept = job.memory.get("settings", {}).get("generation")
    return "other settings" if kept is None else ", ".join(f"{name}={kept[name]!r}" for name in kept)


def _pairs(name: str, before: Job, now: Job) -> str:
    old, new = (_pairs_text(each.fingerprint.get(name)) for each in (before, now))
    return f"{old} then, {new} now"


def _pairs_text(pairs: str | None) -> str:
    if pairs is None:
        return "rows went to any pair"
    model, _, strategy = pairs.rpartition("+")
    return f"rows went to {'any model' if model == 'any' else model} with {_named(strategy)}"


def _named(strategy: str) -> str:
    return "any strategy" if strategy == "any" else f"the strategy {strategy}"


_CLAUSES = {
    "input": _input,
    "rows": _rows,
    "router": _router,
    "catalogue": _catalogue,
    "generation": _generation,
    "pairs": _pairs,
}
