"""Whether a local model has a chat template: in its catalogue entry, or in a file with its weights.

Reads small files only, so that it can be asked before transformers is imported. Leaves out rendering
(`viaticum.models.local`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from viaticum.catalogue import ModelSpec
from viaticum.errors import InputError

# Where tokenizers of transformers keep a template: in a file of its own, or under "chat_template" in these.
_FILES = ("chat_template.jinja", "additional_chat_templates/default.jinja")
_FIELDS = ("tokenizer_config.json", "chat_template.json", "processor_config.json")


def require_template(spec: ModelSpec, folder: Path) -> None:
    """Check that a model has a chat template.

    Args:
        spec: its entry; of a pair, that of the large model.
        folder: its weights.

    Raises:
        InputError: it has none, so that it can answer no question.
    """
    if not has_template(spec, folder):
        raise InputError(
            f"{spec.name} has no chat template, so it answers no questions; give that of its instruct model "
            f"as chat_template in your catalogue or as chat_template.jinja in {folder}, or name another model"
        )


def has_template(spec: ModelSpec, folder: Path) -> bool:
    """Whether a model has a chat template, in its entry or in its folder of weights."""
    if spec.chat_template or any((folder / name).is_file() for name in _FILES):
        return True
    return any(bool(_fields(folder / name).get("chat_template")) for name in _FIELDS)


def have_same_prompts(spec: ModelSpec, folder: Path, other_spec: ModelSpec, other_folder: Path) -> bool:
    """Whether two models certainly read a chat as the same tokens: equal templates and equal tokenizers."""
    return _prompt_sources(spec, folder) == _prompt_sources(other_spec, other_folder)


def _prompt_sources(spec: ModelSpec, folder: Path) -> list[Any]:
    """All that the tokens of a chat depend on."""
    special = {
        name: value
        for name, value in _fields(folder / "tokenizer_config.json").items()
        if name.endswith("_token") or name in ("additional_special_tokens", "extra_special_tokens")
    }
    own = (
        []
        if spec.chat_template
        else [
            *((folder / name).read_bytes() for name in _FILES if (folder / name).is_file()),
            *(_fields(folder / name).get("chat_template") for name in _FIELDS),
        ]
    )
    return [spec.chat_template, own, special, (folder / "tokenizer.json").read_bytes()]


def _fields(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
