"""Whether a local model has a chat template: in its catalogue entry, or in a file with its weights.

Reads small files only, so that it can be asked before transformers is imported. Leaves out rendering
(`viaticum.models.local`).
"""

from __future__ import annotations

import json
from pathlib import Path

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
    if spec.chat_template or any((folder / name).is_file() for name in _FILES):
        return
    if not any(_has_field(folder / name) for name in _FIELDS):
        raise InputError(
            f"{spec.name} has no chat template, so it answers no questions; give that of its instruct model "
            f"as chat_template in your catalogue or as chat_template.jinja in {folder}, or name another model"
        )


def _has_field(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False
