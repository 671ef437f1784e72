"""Values that a shell completes: names of models, of encoders where a command takes them, of strategies.

Reads the catalogue that the command line names so far. A catalogue that cannot be read completes nothing: the
command itself says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten

import typer

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import ViaticumError

Completions = list[tuple[str, str]]


def complete_entry(context: typer.Context, incomplete: str) -> Completions:
    """Names of the catalogue that begin so, each with the beginning of its description."""
    return [
        (name, _brief(spec.description))
        for name, spec in _entries(context).items()
        if name.startswith(incomplete)
    ]


def complete_model(context: typer.Context, incomplete: str) -> Completions:
    """The same of what answers questions: no encoder."""
    entries = _entries(context)
    return [each for each in complete_entry(context, incomplete) if entries[each[0]].kind != "encoder"]


def _entries(context: typer.Context) -> Mapping[str, ModelSpec]:
    try:
        return Catalogue.load(context.params.get("catalogue"))
    except (ViaticumError, OSError):
        return {}


def complete_strategy(context: typer.Context, incomplete: str) -> Completions:
    """Names of strategies that begin so, each with the beginning of its description."""
    from viaticum.strategies import get, names

    return [(name, _brief(get(name).description)) for name in names() if name.startswith(incomplete)]


def _brief(text: str) -> str:
    """One line, which fish needs, and no longer than menus show."""
    return shorten(text, 60, placeholder=" ...")
