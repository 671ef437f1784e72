"""How many sequences fit the memory that is free, and what an allocator's failure means.

Knows the shape of a key/value cache and rough sizes of activations; measures nothing on a model. Standard
library and torch alone.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from viaticum.errors import InputError, ModelError

MOST_SLOTS = 64  # beyond this a step on any machine we know is bound by arithmetic, and rows only wait
SPARE = 0.1  # of the free memory: allocators round up, and other programs live here too
LOGITS_COPIES = 6  # of a row's logits at once: as the model gives them, float32, softmax, sorted, drafted


def plan_slots(
    config: Any,
    context: int,
    free_bytes: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    prefill_tokens: int = 1024,
    first_capacity: int = 512,
    at_most: int = MOST_SLOTS,
) -> int:
    """Sequences of `context` positions that fit `free_bytes` beside a model whose weights are loaded already.

    config: the model's; dtype: of keys and values; prefill_tokens and first_capacity: the runner's, which
    reads so many tokens at once and doubles its cache from there. Raises `ModelError`, with the bytes
    needed and the bytes free, where not even one fits.
    """
    if context < 1:
        raise InputError(f"a context has at least one position, got {context}")
    text = config.get_text_config()
    width, size = int(text.hidden_size), dtype.itemsize
    capacity = first_capacity
    while capacity < context:
        capacity *= 2
    layer = 2 * capacity * _heads(text) * _head_dim(text) * size
    a_slot = layer * int(text.num_hidden_layers) + LOGITS_COPIES * 4 * int(text.vocab_size)
    # Growing copies a layer at a time, old and new side by side. An MLP holds three tensors of its width.
    a_growth = layer // 2
    activations = prefill_tokens * (8 * width + 3 * int(getattr(text, "intermediate_size", 4 * width))) * size
    # Who sees what, for each query head that shares a key/value head; one more where layers see a window alone.
    masks = 1 + (getattr(text, "sliding_window", None) is not None)
    activations += (
        prefill_tokens * context * (3 + masks * int(text.num_attention_heads) // _heads(text) * size)
    )
    usable = int(free_bytes * (1 - SPARE))
    slots = min(at_most, (usable - activations) // (a_slot + a_growth))
    if slots < 1:
        needed = int((a_slot + a_growth + activations) / (1 - SPARE))
        raise ModelError(
            f"one request of {context} tokens needs {needed:,} bytes and {free_bytes:,} are free; "
            "give a smaller context, or a smaller model"
        )
    return slots


def free_bytes(device: str | torch.device = "cpu") -> int:
    """Memory that can still be taken on a device; on a CPU within the limits of the control group, if any."""
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
    """What to tell of an allocation that failed; raises `error` again where it is another failure."""
    told = str(error)
    signs = ("not enough memory", "can't allocate memory", "out of memory")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in told.lower() for sign in signs):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        first = told.splitlines()[0] if told else type(error).__name__
        return f"not enough memory ({first}); shorten the request, or give the runner fewer slots"
    raise error


def _heads(text: Any) -> int:
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def _head_dim(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
