"""Plan the slots and the blocks of a KV cache from free memory, and recognise failed allocations.

Estimates from the shape of the KV cache and rough sizes of activations; measures nothing on a model. Needs
the standard library and torch only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from viaticum.decoders.blocks import BLOCK, blocks_of
from viaticum.errors import InputError, ModelError

MAX_SLOTS = 64  # beyond this a step is bound by arithmetic on any machine we know, and more rows only wait
RESERVE = 0.1  # of the free memory, for rounding by allocators and for other programs
MEAN_SHARE = 3 / 8  # of the context that a sequence takes on average at its end
LOGITS_COPIES = 6  # of a row's logits at once: of the model, float32, softmax, sorted, drafted


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """slots: sequences at once. blocks: of the KV cache that they hold together, of `BLOCK` positions."""

    slots: int
    blocks: int


def plan_memory(
    config: Any,
    context: int,
    free_bytes: int,
    *,
    slots: int | None = None,
    mean_length: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    prefill_tokens: int = 1024,
    at_most: int = MAX_SLOTS,
) -> MemoryPlan:
    """Slots and blocks that fit the free memory beside a model whose weights are loaded.

    As many slots as sequences of the mean length fit; one sequence of the whole context always fits. Longer
    sequences than the mean make younger ones wait (`decoders.admission`).

    Args:
        config: of the transformers model.
        context: maximum positions of a sequence.
        free_bytes: free memory of the device.
        slots: given number of slots; only their blocks are planned then, which may be too few for a whole
            context.
        mean_length: positions that sequences have on average at their end; None: `MEAN_SHARE` of the context.
        dtype: of keys and values.
        prefill_tokens: maximum new tokens of a model call.
        at_most: upper limit of the slots.

    Raises:
        InputError: `context` or `mean_length` is below 1.
        ModelError: not even one sequence fits; with the bytes needed and free.
    """
    mean = max(1, int(context * MEAN_SHARE)) if mean_length is None else min(mean_length, context)
    if context < 1 or mean < 1:
        raise InputError(
            f"a context and the mean of lengths have at least one position, got {context} and {mean}"
        )
    text = config.get_text_config()
    width, size = int(text.hidden_size), dtype.itemsize
    heads = _kv_heads(text) * _head_dim(text)
    block_bytes = 2 * BLOCK * heads * size * int(text.num_hidden_layers)
    row_bytes = LOGITS_COPIES * 4 * int(text.vocab_size)
    # An MLP holds three tensors of its width.
    activations = prefill_tokens * (8 * width + 3 * int(getattr(text, "intermediate_size", 4 * width))) * size
    # A mask for each query head that shares a key/value head; a second one if some layers have a sliding
    # window.
    masks = 1 + (getattr(text, "sliding_window", None) is not None)
    activations += (
        prefill_tokens * context * (3 + masks * int(text.num_attention_heads) // _kv_heads(text) * size)
    )
    whole = blocks_of(context)
    usable = int(free_bytes * (1 - RESERVE)) - activations
    least = whole if slots is None else 1  # with a given number sequences may have to stay shorter
    if usable < least * block_bytes + (slots or 1) * row_bytes:
        needed = int((least * block_bytes + (slots or 1) * row_bytes + activations) / (1 - RESERVE)) + 1
        raise ModelError(
            f"one request of {context if slots is None else BLOCK} tokens needs {needed:,} bytes and "
            f"{free_bytes:,} are free; give a smaller context, or a smaller model"
        )
    if slots is None:
        fitting = usable // (blocks_of(mean) * block_bytes + row_bytes)
        beside_one = (usable - whole * block_bytes) // row_bytes  # one has its whole context
        slots = max(1, min(at_most, fitting, beside_one))
    return MemoryPlan(slots, min((usable - slots * row_bytes) // block_bytes, slots * whole))


def free_bytes(device: str | torch.device = "cpu") -> int:
    """Free memory of a device in bytes; on a CPU within the limit of the control group, if any."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit = _lines(Path("/sys/fs/cgroup/memory.max"))
    if limit and limit[0].isdigit():
        used = int(_lines(Path("/sys/fs/cgroup/memory.current"))[0])
        free = min(free, max(0, int(limit[0]) - used))
    return free


def out_of_memory(error: BaseException) -> str:
    """The message of an `error` that is a failed allocation; re-raises any other error."""
    message = str(error)
    signs = ("not enough memory", "can't allocate memory", "out of memory")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in message.lower() for sign in signs
    ):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        first = message.splitlines()[0] if message else type(error).__name__
        return f"not enough memory ({first}); shorten the request, or give the runner fewer slots"
    raise error


def _kv_heads(text: Any) -> int:
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def _head_dim(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
