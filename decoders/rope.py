"""RoPE whose frequencies depend on the longest sequence of a call ("dynamic" and "longrope").

Keys computed for one call length are then not valid for another, which limits batching and prefix reuse in
`decoders.runner`. Leaves out the rotation itself, which transformers computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def rope_varies_beyond(config: Any) -> int | None:
    """Sequence length beyond which the rotation depends on a call's longest sequence; None if it never does.

    config: of a transformers model.
    """
    text = config.get_text_config()

    def limits(value: Any) -> Iterator[int]:
        if not isinstance(value, dict):
            return
        if value.get("rope_type") in ("dynamic", "longrope"):
            yield int(value.get("original_max_position_embeddings") or text.max_position_embeddings)
        for each in value.values():
            yield from limits(each)

    return min(limits(getattr(text, "rope_parameters", None)), default=None)


def reset_rope_lengths(model: torch.nn.Module) -> None:
    """Make the next call rotate by its own length; transformers otherwise keeps the longest it has seen."""
    for module in model.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, 0)
