"""What a chat model's answers depend on beside its messages, in words that caches can compare.

LangChain's caches of answers compare these words alone: another router, catalogue or model under the same
name has to change them. Nothing is opened for it. Leaves out the settings of a call (`chat_model`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from viaticum.agents.client import Viaticum
from viaticum.budgets.records import digest
from viaticum.catalogue import Catalogue
from viaticum.models.base import Model
from viaticum.routers.query import QueryRouter, StaticRouter


def identity(
    client: Viaticum | None,
    catalogue: Catalogue | str | Path | None,
    router: QueryRouter | str | Path | None,
    policy: object,
    models: Mapping[str, Model] | None,
) -> dict[str, str]:
    """What is not the default, by name. Objects that cannot be compared are other ones in each process."""
    settings = ""
    if client is not None:
        catalogue, router, policy = client.catalogue, client.router, client.policy
        settings = digest(client.settings.model_dump(mode="json")) if client.settings.given else ""
    found = {
        "catalogue": _catalogue(catalogue),
        "router": _router(router),
        "policy": policy if isinstance(policy, str) else repr(policy),
        "models": ", ".join(f"{name}: {_object(model)}" for name, model in sorted((models or {}).items())),
        "settings": settings,
    }
    return {name: text for name, text in found.items() if text}


def _catalogue(given: Catalogue | str | Path | None) -> str:
    if isinstance(given, Catalogue):
        return digest({spec.name: spec.identity for spec in given.values()})
    return "" if given is None else _file(Path(given))


def _router(given: QueryRouter | str | Path | None) -> str:
    if isinstance(given, StaticRouter):
        return digest([repr(row) for row in given.rows])
    if isinstance(given, QueryRouter):
        return _object(given)
    if given is None:
        return ""
    folder = Path(given)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return digest([str(folder.absolute()), *map(_file, files)])


def _file(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return str(path.absolute())
    return f"{path.absolute()} {found.st_size} {found.st_mtime_ns}"


def _object(value: Any) -> str:
    return f"{type(value).__qualname__} {id(value):x}"
