"""Plan the number of KV slots from free memory, and recognise failed allocations.

Estimates from the shape of the KV cache and rough sizes of activations; measures nothing on a model. Needs
the standard library and torch only.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from viaticum.errors import InputError, ModelError

MAX_SLOTS = 64  # beyond this a step is bound by arithmetic on any machine we know, and more rows only wait
RESERVE = 0.1  # of the free memory, for rounding by allocators and for other programs
LOGITS_COPIES = 6  # of a row's logits at once: of the model, float32, softmax, sorted, drafted


def plan_slots(
    config: Any,
    context: int,
    free_bytes: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    prefill_tokens: int = 1024,
    first_capacity: int = 512,
    at_most: int = MAX_SLOTS,
) -> int:
    """Number of sequences that fit the free memory beside a model whose weights are loaded.

    Args:
        config: of the transformers model.
        context: positions of each sequence.
        free_bytes: free memory of the device.
        dtype: of keys and values.
        prefill_tokens: maximum new tokens of a model call.
        first_capacity: positions allocated at first; the runner doubles them as needed.
        at_most: upper limit of the result.

    Raises:
        InputError: `context` is below 1.
        ModelError: not even one sequence fits; with the bytes needed and free.
    """
    if context < 1:
        raise InputError(f"a context has at least one position, got {context}")
    text = config.get_text_config()
    width, size = int(text.hidden_size), dtype.itemsize
    capacity = first_capacity
    while capacity < context:
        capacity *= 2
    layer_bytes = 2 * capacity * _kv_heads(text) * _head_dim(text) * size
    slot_bytes = layer_bytes * int(text.num_hidden_layers) + LOGITS_COPIES * 4 * int(text.vocab_size)
    # Growing copies one layer at a time, old and new side by side. An MLP holds three tensors of its width.
    growth_bytes = layer_bytes // 2
    activations = prefill_tokens * (8 * width + 3 * int(getattr(text, "intermediate_size", 4 * width))) * size
    # A mask for each query head that shares a key/value head; a second one if some layers have a sliding
    # window.
    masks = 1 + (getattr(text, "sliding_window", None) is not None)
    activations += (
        prefill_tokens * context * (3 + masks * int(text.num_attention_heads) // _kv_heads(text) * size)
    )
    usable = int(free_bytes * (1 - RESERVE))
    slots = min(at_most, (usable - activations) // (slot_bytes + growth_bytes))
    if slots < 1:
        needed = int((slot_bytes + growth_bytes + activations) / (1 - RESERVE))
        raise ModelError(
            f"one request of {context} tokens needs {needed:,} bytes and {free_bytes:,} are free; "
            "give a smaller context, or a smaller model"
        )
    return slots


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
