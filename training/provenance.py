"""What a training folder was made from, and the check that it is continued with the same.

Leaves out where these facts are stored: `training.label_folder` and `training.policy_checkpoint`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import InputError
from viaticum.models.settings import prompt, resolve
from viaticum.strategies import Strategy
from viaticum.types import Query
from viaticum.weights import fingerprint


def versions() -> dict[str, str]:
    """Return the installed versions that results depend on, by package."""
    return {name: metadata.version(name) for name in ("viaticum", "torch", "transformers")}


def member_facts(spec: ModelSpec, catalogue: Catalogue) -> dict[str, dict[str, str]]:
    """Return name and sha256 of the weights of a pair's small and large model on this machine."""
    return {
        role: {"name": name, "sha256": fingerprint(catalogue[name])}
        for role, name in zip(("small", "large"), spec.members, strict=True)
    }


def prompt_text(catalogue: Catalogue, spec: ModelSpec, strategy: Strategy) -> str:
    """Return the prompt of a strategy for a model and its token limit as one text, to be hashed."""
    generation = resolve(catalogue, spec.name, strategy)
    facts = [prompt(spec, strategy, Query("?")), generation.max_new_tokens]
    if generation.chat_template_kwargs:
        facts.append(dict(generation.chat_template_kwargs))
    return json.dumps(facts, sort_keys=True)


def check_identity(
    folder: Path, stored: Mapping[str, Any], identity: Mapping[str, Any], *, origin: str, verb: str
) -> None:
    """Raise `InputError` where a folder was made from something else than `identity`.

    Args:
        folder: the folder that is continued.
        stored: facts of the folder.
        identity: facts of this run.
        origin: how the message says that the folder was made, e.g. "was labelled".
        verb: what the message advises to do into a new folder, e.g. "label".
    """
    for name, value in identity.items():
        if stored.get(name) != value:
            raise InputError(
                f"{folder} {origin} with another {name}: {_shorten(stored.get(name))}, now {_shorten(value)}"
                f"; {verb} into a new folder"
            )


def _shorten(value: Any) -> str:
    """A value as a message shows it: weights by their name and the beginning of their hash."""
    if isinstance(value, dict) and "sha256" in value:
        return f"{value['name']} with sha256 {value['sha256'][:12]}"
    return repr(value)[:200]
