"""A runner whose calls of few tokens have static shapes, so that CUDA replays them as graphs.

A decode step of a small model launches about a thousand kernels of a few microseconds; launching them one by
one from Python takes several times as long as they run. `static_step` is one model call as a plain function
over preallocated buffers; its shape is a bucket of rows, new tokens and keys. CUDA captures it once per
bucket (CUDA graphs, one memory pool) and replays it; a CPU runs the same function eagerly. The call also
computes what a decoder needs of the logits: the argmax, the normalised entropy and whether they are finite,
so that the rule of a router is one more comparison.

The input is one upload per call from pinned memory, and nothing waits for the device; the caller reads the
results in one transfer (`Engine`). Padding tokens are written to a cache position behind the last one of
their slot, which no key bucket reaches, and their logits are ignored.

Left to the dynamic path of `TorchRunner`: prefill, calls beyond the largest bucket, and rotations that depend
on the length of the sequence ("dynamic" and "longrope" RoPE). Leaves out sampling, routers and requests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from viaticum.decoders.attention import attending
from viaticum.decoders.cache import SlotCache
from viaticum.decoders.fused_layers import fuse_layers
from viaticum.decoders.memory import out_of_memory
from viaticum.decoders.runner import RunnerOutput, concatenate, restoring_order
from viaticum.decoders.torch_runner import TorchRunner
from viaticum.decoders.vocabulary import SharedVocabulary
from viaticum.errors import ModelError
from viaticum.routers.token import entropy
from viaticum.routers.token.base import argmax_token

ROWS = (1, 2, 4, 8, 16, 32, 64)  # buckets of rows
# Buckets of new tokens of the longest row; 18: a draft of 16 and the tokens before it.
TOKENS = (1, 2, 3, 4, 6, 8, 12, 18, 24)
MAX_NEW_TOKENS = (
    256  # rows times new tokens of a static call; beyond it padding costs more than kernel launches
)
FIRST_KEYS = 128  # buckets of keys are this times 1, 1.5, 2, 3, 4, 6, ...


@dataclass(frozen=True, slots=True)
class GraphShape:
    """The shape that a graph is captured for.

    Args:
        rows: R, sequences of the call.
        tokens: T, new tokens a row.
        keys: L, cached positions that attention reads.
        by_slot: row i is slot i, so that keys and values are read in place; else they are gathered for each
            row.
        keep: last positions of a row whose logits are computed.
        vocabulary: the tokens that argmax and entropy are over.
    """

    rows: int
    tokens: int
    keys: int
    by_slot: bool
    keep: int
    vocabulary: SharedVocabulary

    @property
    def input_size(self) -> int:
        """Integers uploaded a call: slots [R]; ids, positions, cache positions [R, T]; wanted [R * keep]."""
        return self.rows * (1 + 3 * self.tokens + self.keep)


@dataclass(frozen=True, slots=True)
class StaticLayout:
    """Cache layout of a static call.

    slots: int64 [R]. cache_positions: position in its slot that each token is written to, int64 [R, T].
    keys, by_slot: see `GraphShape`.
    """

    slots: Tensor
    cache_positions: Tensor
    keys: int
    by_slot: bool


@dataclass(frozen=True, slots=True)
class Buffers:
    """Inputs and outputs of static calls on the device, M positions at most.

    A call uses the beginning of each.

    Args:
        inputs: int64, see `GraphShape.input_size`.
        logits: float32 [M, V].
        hidden: [M, D] in the model's dtype.
        tokens: int64 [M].
        finite: bool [M].
        entropy: float32 [M].
    """

    inputs: Tensor
    logits: Tensor
    hidden: Tensor
    tokens: Tensor
    finite: Tensor
    entropy: Tensor


class StaticCache(SlotCache):
    """A cache allocated in full at the start: [slots, kv_heads, capacity + 1, head_dim] a layer.

    Padding is written to the position behind the last one. Addresses never change, as graphs require.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__(slots)
        self.capacity = capacity

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        batch: Any = self.batch
        if not isinstance(batch, StaticLayout):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        while len(self.keys) <= layer_idx:
            self.keys.append(self._empty(key_states))
            self.values.append(self._empty(value_states))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        where = (batch.slots[:, None], slice(None), batch.cache_positions)
        keys[where], values[where] = key_states.transpose(1, 2), value_states.transpose(1, 2)
        rows: Any = slice(0, len(batch.slots)) if batch.by_slot else batch.slots
        return keys[rows, :, : batch.keys], values[rows, :, : batch.keys]

    def grow(self, positions: int) -> None:
        assert positions <= self.capacity, "the capacity covers the context, which `forward` checks"

    def shrink(self, capacity: int, *, complete: bool) -> None:
        """Does nothing: no memory is ever freed."""

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.slots, like.shape[1], self.capacity + 1, like.shape[-1])


def static_step(model: Any, cache: StaticCache, buffers: Buffers, shape: GraphShape) -> None:
    """Run one model call of a given shape from `buffers.inputs` to the other buffers.

    Reads nothing on the host. New tokens are right-aligned in each row. Output n belongs to position
    wanted[n] of the R * keep last ones.
    """
    rows, steps, last = shape.rows, shape.tokens, shape.rows * shape.keep
    sizes = [rows, *[rows * steps] * 3, last]
    slots, ids, positions, cache_positions, wanted = torch.split(buffers.inputs[: shape.input_size], sizes)
    positions = positions.view(rows, steps)
    layout = StaticLayout(slots, cache_positions.view(rows, steps), shape.keys, shape.by_slot)
    cache.batch = layout  # type: ignore[assignment]
    visible = torch.arange(shape.keys, device=positions.device) <= positions[:, :, None]  # [R, T, L]
    bias = torch.zeros((), dtype=model.dtype, device=visible.device).masked_fill(~visible, float("-inf"))
    states: list[Tensor] = []
    head = model.get_output_embeddings()
    with head.register_forward_pre_hook(lambda _, inputs: states.extend(inputs)), attending((), model):
        out = model(
            input_ids=ids.view(rows, steps),
            attention_mask=bias[:, None],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=shape.keep,
        )
    logits = buffers.logits[:last]
    logits.copy_(out.logits.flatten(0, 1).index_select(0, wanted))
    buffers.hidden[:last] = states[0].flatten(0, 1).index_select(0, wanted)
    buffers.tokens[:last] = argmax_token(shape.vocabulary.candidates(logits))
    buffers.finite[:last] = torch.isfinite(logits.sum(-1))  # a sum is finite only if every term is
    buffers.entropy[:last] = entropy(shape.vocabulary.cut(logits))


class GraphRunner(TorchRunner):
    """A `TorchRunner` that makes its calls of few tokens with `static_step`, on CUDA as graphs.

    The cache is allocated at the start for the whole context of every slot, rounded up to a bucket of keys. A
    graph is captured at the first call of its bucket, which takes about as long as three calls; if the memory
    is not enough for that, the bucket is left to the dynamic path. The model's layers are replaced by fused
    ones where possible (`decoders.fused_layers`). `static_calls` counts the calls in static shapes, `calls`
    all of them.

    Raises:
        ModelError: the memory is not enough for cache and buffers.
    """

    def __init__(self, model: PreTrainedModel, *, slots: int = 1, context: int | None = None) -> None:
        super().__init__(model, slots=slots, context=context)
        fuse_layers(model)
        self.static_calls = 0
        self._graphs: dict[GraphShape, Any] = {}
        self._pool: Any = None
        self._failed_shapes: set[GraphShape] = set()  # those that ran out of memory
        try:
            self._allocate()
            return
        except (MemoryError, RuntimeError) as error:
            failure = out_of_memory(error)
        raise ModelError(f"{failure}; a runner with graphs takes the memory of its whole context at once")

    @torch.inference_mode()
    def _allocate(self) -> None:
        """Allocate all buffers, and the cache by a call of padding only."""
        self._cache: StaticCache = StaticCache(self.slots, key_bucket(self.context))
        limit = min(MAX_NEW_TOKENS, _bucket(ROWS, min(self.slots, ROWS[-1])) * TOKENS[-1])
        head: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        device, cuda = self.device, self.device.type == "cuda"
        input_size = MAX_NEW_TOKENS * 5
        self._pinned = torch.zeros(input_size, dtype=torch.int64, pin_memory=cuda)
        self._uploaded = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self._buffers = Buffers(
            inputs=torch.zeros(input_size, dtype=torch.int64, device=device),
            logits=torch.zeros(limit, self.vocabulary, device=device),
            hidden=torch.zeros(limit, head.in_features, dtype=self.model.dtype, device=device),
            tokens=torch.zeros(limit, dtype=torch.int64, device=device),
            finite=torch.zeros(limit, dtype=torch.bool, device=device),
            entropy=torch.zeros(limit, device=device),
        )
        keys = min(FIRST_KEYS, self._cache.capacity)
        shape = GraphShape(1, 1, keys, False, 1, self._call_vocabulary)
        self._upload([0, 0, 0, self._cache.capacity, 0])
        static_step(self.model, self._cache, self._buffers, shape)

    def _forward_rows(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], keep: Sequence[int], hidden: bool
    ) -> RunnerOutput:
        """One static call if a shape fits; else one for the longest rows and one for the others."""
        shape = self._shape(slots, tokens, max(keep))
        if shape is not None and self._step(shape, slots, tokens, keep):
            # Copies, for the next call overwrites the buffers.
            out, count = self._buffers, sum(keep)
            return RunnerOutput(
                out.logits[:count].clone(),
                out.finite[:count].clone(),
                out.hidden[:count].clone() if hidden else None,
                out.tokens[:count].clone(),
                out.entropy[:count].clone(),
            )
        sizes = [bisect_left(TOKENS, len(new)) for new in tokens]
        if self._rope_limit is not None or min(sizes) == max(sizes):
            return super()._forward_rows(slots, tokens, keep, hidden)
        longest = [row for row, size in enumerate(sizes) if size == max(sizes)]
        others = [row for row, size in enumerate(sizes) if size < max(sizes)]
        parts = [
            self._forward_rows(
                [slots[row] for row in rows],
                [tokens[row] for row in rows],
                [keep[row] for row in rows],
                hidden,
            )
            for rows in (others, longest)
        ]
        return concatenate(parts, restoring_order([*others, *longest], keep))

    def _shape(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], keep: int) -> GraphShape | None:
        """The smallest bucket that fits a call; None if none does."""
        steps = max(map(len, tokens))
        if self._rope_limit is not None or steps > TOKENS[-1] or len(slots) > ROWS[-1]:
            return None
        rows, steps = _bucket(ROWS, len(slots)), _bucket(TOKENS, steps)
        # Idle slots between the active ones cost little, and keys need not be gathered.
        highest = max(slots) + 1
        by_slot = highest <= min(2 * rows, ROWS[-1])
        if by_slot:
            rows = min(_bucket(ROWS, highest), self.slots)
        if rows * steps > MAX_NEW_TOKENS:
            return None
        longest = max(
            len(self.cached_tokens[slot]) + len(new) for slot, new in zip(slots, tokens, strict=True)
        )
        keys = min(key_bucket(longest), self._cache.capacity)
        shape = GraphShape(rows, steps, keys, by_slot, 1 if keep == 1 else steps, self._call_vocabulary)
        return None if shape in self._failed_shapes else shape

    def _step(
        self,
        shape: GraphShape,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        keep: Sequence[int],
    ) -> bool:
        """Make a call in its bucket; False, with nothing cached, if its graph does not fit into memory."""
        self._upload(self._inputs(shape, slots, tokens, keep))
        try:
            self._replay(shape)
        except (MemoryError, RuntimeError) as error:
            out_of_memory(error)  # raises any other failure
            self._failed_shapes.add(shape)
            return False
        for slot, new in zip(slots, tokens, strict=True):
            self.cached_tokens[slot].extend(new)
        self.calls += 1
        self.static_calls += 1
        return True

    def _inputs(
        self, shape: GraphShape, slots: Sequence[int], tokens: Sequence[Sequence[int]], keep: Sequence[int]
    ) -> list[int]:
        """The integers that `static_step` reads, see `GraphShape.input_size`."""
        padding = self._cache.capacity  # the cache position of padding tokens
        size, steps = shape.rows * shape.tokens, shape.tokens
        row_slots = list(range(shape.rows)) if shape.by_slot else [slots[0]] * shape.rows
        ids, positions, cache_positions = [0] * size, [0] * size, [padding] * size
        wanted: list[int] = []
        for index, (slot, new, last) in enumerate(zip(slots, tokens, keep, strict=True)):
            row = slot if shape.by_slot else index
            row_slots[row] = slot
            end, start = (row + 1) * steps, len(self.cached_tokens[slot])
            begin = end - len(new)
            ids[begin:end] = new
            positions[begin:end] = cache_positions[begin:end] = range(start, start + len(new))
            wanted += range((row + 1) * shape.keep - last, (row + 1) * shape.keep)
        wanted += [0] * (shape.rows * shape.keep - len(wanted))
        return [*row_slots, *ids, *positions, *cache_positions, *wanted]

    def _upload(self, values: list[int]) -> None:
        """Enqueue one copy from pinned memory, after the previous copy has finished."""
        if self._uploaded is not None:
            self._uploaded.synchronize()
        self._pinned[: len(values)] = torch.tensor(values)
        self._buffers.inputs[: len(values)].copy_(self._pinned[: len(values)], non_blocking=True)
        if self._uploaded is not None:
            self._uploaded.record()

    def _replay(self, shape: GraphShape) -> None:
        if self.device.type != "cuda":
            static_step(self.model, self._cache, self._buffers, shape)
            return
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(shape)
        self._graphs[shape].replay()

    def _capture(self, shape: GraphShape) -> Any:
        """Warm up and capture on the call to be made: repeating it writes the same keys and values."""
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                static_step(self.model, self._cache, self._buffers, shape)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        with torch.cuda.device(self.device), capture:
            static_step(self.model, self._cache, self._buffers, shape)
        self._pool = graph.pool()
        return graph


def key_bucket(length: int) -> int:
    """The smallest bucket of keys that holds `length` positions: 128, 192, 256, 384, 512, ..."""
    keys = FIRST_KEYS
    while keys < length:
        if 3 * keys // 2 >= length:
            return 3 * keys // 2
        keys *= 2
    return keys


def _bucket(sizes: Sequence[int], value: int) -> int:
    return next(size for size in sizes if size >= value)
