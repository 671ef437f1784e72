"""Plan the slots and the blocks of a KV cache from free memory, and recognise failed allocations.

Estimates from the shape of the KV cache and rough sizes of activations; measures nothing on a model. Needs
the standard library and torch only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from viaticum.decoders.blocks import BLOCK, blocks_of
from viaticum.errors import InputError, ModelError

MAX_SLOTS = 64  # beyond this a step is bound by arithmetic on any machine we know, and more rows only wait
RESERVE = 0.1  # of the free memory, for rounding by allocators and for other programs
MEAN_SHARE = 3 / 8  # of the context that a sequence takes on average at its end
CGROUPS, CONTROL_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
MASK_PAIRS = 1 << 24  # new tokens times keys of a long prompt in one call: bounds the memory of masks
MASK_TOKENS = 64  # new tokens that a call of a long prompt reads at least, however many keys they see
LOGITS_COPIES = 6  # of a row's logits at once: of the model, float32, softmax, sorted, drafted


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """slots: sequences at once. blocks: of the KV cache that they hold together, of `BLOCK` positions."""

    slots: int
    blocks: int


@dataclass(frozen=True, slots=True)
class CacheCost:
    """Bytes that the texts of one model take beside its weights.

    Args:
        context: maximum positions of a sequence.
        mean_length: positions that sequences have on average at their end.
        block_bytes: of keys and values in one block of `BLOCK` positions.
        row_bytes: of a sequence in a call, whatever its length.
        call_bytes: of a call, whatever its sequences.
    """

    context: int
    mean_length: int
    block_bytes: int
    row_bytes: int = 0
    call_bytes: int = 0

    @classmethod
    def of(
        cls,
        config: Any,
        context: int,
        *,
        mean_length: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        prefill_tokens: int = 1024,
    ) -> CacheCost:
        """Of a transformers model; the arguments are those of `plan_memory`."""
        mean = max(1, int(context * MEAN_SHARE)) if mean_length is None else min(mean_length, context)
        if context < 1 or mean < 1:
            raise InputError(
                f"a context and the mean of lengths have at least one position, got {context} and {mean}"
            )
        text = config.get_text_config()
        width, size = int(text.hidden_size), dtype.itemsize
        # An MLP holds three tensors of its width.
        activations = 8 * width + 3 * int(getattr(text, "intermediate_size", 4 * width))
        # A mask for each query head that shares a key/value head; a second one if some layers have a sliding
        # window.
        masks = 1 + (getattr(text, "sliding_window", None) is not None)
        mask_bytes = 3 + masks * int(text.num_attention_heads) // _kv_heads(text) * size
        return cls(
            context,
            mean,
            2 * BLOCK * _kv_heads(text) * _head_dim(text) * size * int(text.num_hidden_layers),
            LOGITS_COPIES * 4 * int(text.vocab_size),
            prefill_tokens * activations * size
            + min(prefill_tokens * context, max(MASK_PAIRS, MASK_TOKENS * context)) * mask_bytes,
        )


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
    cost = CacheCost.of(config, context, mean_length=mean_length, dtype=dtype, prefill_tokens=prefill_tokens)
    return plan_together([cost], free_bytes, slots=[slots], at_most=at_most)[0]


def plan_together(
    costs: Sequence[CacheCost], free_bytes: int, *, slots: Sequence[int | None], at_most: int = MAX_SLOTS
) -> list[MemoryPlan]:
    """As `plan_memory`, of models that read the same sequences and share a device: a pair.

    A position takes a place in the cache of each of them, so each gets as many blocks as the other.

    Args:
        costs: of each model.
        free_bytes: of the device, once the weights of all are loaded.
        slots: given number of slots of each, or None.
        at_most: upper limit of the slots that are planned.

    Raises:
        ModelError: not even one sequence fits; with the bytes needed and free.
    """
    given = [count for count in slots if count is not None]
    context = min(cost.context for cost in costs)
    whole = blocks_of(context)
    block_bytes, row_bytes = (
        sum(getattr(cost, name) for cost in costs) for name in ("block_bytes", "row_bytes")
    )
    call_bytes = max(cost.call_bytes for cost in costs)  # the models are called in turn
    usable = int(free_bytes * (1 - RESERVE)) - call_bytes
    planned = len(given) < len(slots)
    least = whole if planned else 1  # with given numbers sequences may have to stay shorter
    rows = max(given, default=1) * row_bytes
    if usable < least * block_bytes + rows:
        needed = int((least * block_bytes + rows + call_bytes) / (1 - RESERVE)) + 1
        raise ModelError(
            f"one request of {context if planned else BLOCK} tokens needs {needed:,} bytes and "
            f"{free_bytes:,} are free; give a smaller context, or a smaller model"
        )
    count = max(given, default=0)
    if planned:
        fitting = usable // (
            sum(blocks_of(cost.mean_length) * cost.block_bytes for cost in costs) + row_bytes
        )
        beside_one = (usable - whole * block_bytes) // max(1, row_bytes)  # one has its whole context
        count = max(1, min(at_most, fitting, beside_one, *given))
    blocks = (usable - max(count, *given, 1) * row_bytes) // block_bytes
    return [
        MemoryPlan(number or count, min(blocks, (number or count) * blocks_of(cost.context)))
        for number, cost in zip(slots, costs, strict=True)
    ]


def mapped_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors that lie in mapped files, 0 where the system does not tell.

    The system counts them as free, since it can read them again; each call of the model needs them.
    """
    mappings = []
    for line in _lines(Path("/proc/self/maps")):
        addresses, *_, path = line.split(None, 5) if len(line.split(None, 5)) == 6 else (line, "")
        if path.startswith("/"):
            mappings.append(tuple(int(address, 16) for address in addresses.split("-")))
    storages = {each.untyped_storage().data_ptr(): each for each in tensors if each.device.type == "cpu"}
    return sum(
        each.untyped_storage().nbytes()
        for address, each in storages.items()
        if any(begin <= address < end for begin, end in mappings)
    )


def free_bytes(device: str | torch.device = "cpu") -> int:
    """Free memory of a device in bytes; on a CPU within the limits of its control groups, if any.

    Cached files count as free, as the system counts them: it drops them when memory is wanted.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return max(0, min([free, *_free_in_groups()]))


def _free_in_groups() -> Iterator[int]:
    """Free bytes of every control group with a limit that the process is in, of version 1 and 2."""
    for line in _lines(CONTROL_GROUPS):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folder, limit_file, used_file, prefix = CGROUPS, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            folder, prefix = CGROUPS / "memory", "total_"
            limit_file, used_file = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # A container may see a path of its host, and its own group at the root.
        for name in ("", *(part for part in path.split("/") if part not in ("", ".."))):
            folder /= name
            found = [*_lines(folder / limit_file)[:1], *_lines(folder / used_file)[:1]]
            if len(found) == 2 and all(map(str.isdigit, found)):
                stat = dict(line.split()[:2] for line in _lines(folder / "memory.stat"))
                cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield int(found[0]) - int(found[1]) + cached


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation."""
    signs = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in str(error).lower() for sign in signs
    )


def out_of_memory(error: BaseException) -> str:
    """The message of an `error` that is a failed allocation; re-raises any other error."""
    message = str(error)
    if is_out_of_memory(error):
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
