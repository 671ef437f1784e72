"""A runner whose calls of few tokens have static shapes, so that CUDA replays them as graphs.

A decoding step of a small model is some thousand kernels of a few microseconds: started one by one from Python they
take several times as long as they run. `static_step` is one model call as a plain function over preallocated
buffers; its shape is a bucket of rows, new tokens and keys. CUDA captures it once a bucket (CUDA graphs, one memory
pool) and replays it; a CPU runs the very same function eagerly. What a decoder wants of the logits is inside too:
the likeliest token, the normalised entropy, whether they are finite. Rules of a router are then one comparison.

What goes in is one upload a call from pinned memory, and nothing waits for the device: who reads the results does
so in one transfer (`Engine`). Tokens that only fill a bucket are written to a place behind the last position of
their slot that no key bucket reaches, and what they say is not looked at.

Left to the dynamic path of `Runner`: prefill, calls beyond the largest bucket, rotations that depend on the length
of the text ("dynamic" and "longrope" RoPE). Knows nothing of sampling, routers or requests.
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
from viaticum.decoders.fused_layers import fused_layers
from viaticum.decoders.memory import out_of_memory
from viaticum.decoders.runner import Runner, RunnerOutput, SlotCache, in_order, joined
from viaticum.errors import ModelError
from viaticum.routers.token import entropy
from viaticum.routers.token.base import likeliest

ROWS = (1, 2, 4, 8, 16, 32, 64)
# New tokens of the longest row; 18: a draft of 16, and what is before it.
TOKENS = (1, 2, 3, 4, 6, 8, 12, 18, 24)
MOST_NEW = 256  # rows times new tokens of one static call: beyond it padding costs more than starting kernels
FIRST_KEYS = 128  # key lengths are this, doubled and doubled, and the points halfway


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph is captured for. by_slot: row i is slot i, so that keys and values are read where they lie;
    else they are gathered for each row."""

    rows: int
    tokens: int
    keys: int
    by_slot: bool
    keep: int  # the last positions of a row whose logits are computed

    @property
    def staged(self) -> int:
        """Numbers that a call uploads: slots [R], token ids, positions and places [R, T] each, wanted [R * keep]."""
        return self.rows * (1 + 3 * self.tokens + self.keep)


@dataclass(frozen=True, slots=True)
class StaticBatch:
    """Where the rows of a static call live: slots [R]; places [R, T], where in its slot each token is written."""

    slots: Tensor
    places: Tensor
    keys: int
    by_slot: bool


@dataclass(frozen=True, slots=True)
class Buffers:
    """All that goes into a static call and comes out of it, on the device; a call uses the beginning of each.

    staged: int64, see `Shape`; logits: float32 [M, V]; hidden: [M, D]; tokens: int64 [M]; finite: bool [M];
    entropy: float32 [M].
    """

    staged: Tensor
    logits: Tensor
    hidden: Tensor
    tokens: Tensor
    finite: Tensor
    entropy: Tensor


class StaticCache(SlotCache):
    """A cache that has all its memory from the start: [slots, kv_heads, capacity + 1, head_dim] a layer.

    The position behind the last is where padding is written. Addresses never change, as graphs demand.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__(slots)
        self.capacity = capacity

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        batch: Any = self.batch
        if not isinstance(batch, StaticBatch):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        while len(self.keys) <= layer_idx:
            self.keys.append(self._empty(key_states))
            self.values.append(self._empty(value_states))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        where = (batch.slots[:, None], slice(None), batch.places)
        keys[where], values[where] = key_states.transpose(1, 2), value_states.transpose(1, 2)
        of_rows: Any = slice(0, len(batch.slots)) if batch.by_slot else batch.slots
        return keys[of_rows, :, : batch.keys], values[of_rows, :, : batch.keys]

    def grow(self, positions: int) -> None:
        assert positions <= self.capacity, "the capacity covers the context, which `read` checks"

    def shrink(self, capacity: int, *, whole: bool) -> None:
        """Nothing is ever given back."""

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.slots, like.shape[1], self.capacity + 1, like.shape[-1])


def static_step(model: Any, cache: StaticCache, buffers: Buffers, shape: Shape) -> None:
    """One model call of a given shape, from `buffers.staged` to the other buffers; reads nothing on the host.

    New tokens stand at the right of each row. Output n is about position wanted[n] of the R * keep last ones.
    """
    rows, steps, last = shape.rows, shape.tokens, shape.rows * shape.keep
    sizes = [rows, *[rows * steps] * 3, last]
    slots, ids, positions, places, wanted = torch.split(buffers.staged[: shape.staged], sizes)
    positions = positions.view(rows, steps)
    cache.batch = StaticBatch(slots, places.view(rows, steps), shape.keys, shape.by_slot)  # type: ignore[assignment]
    seen = torch.arange(shape.keys, device=positions.device) <= positions[:, :, None]  # [R, T, L]
    bias = torch.zeros((), dtype=model.dtype, device=seen.device).masked_fill(~seen, float("-inf"))
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
    buffers.tokens[:last] = likeliest(logits)
    buffers.finite[:last] = torch.isfinite(logits.sum(-1))  # a sum is finite only if every term is
    buffers.entropy[:last] = entropy(logits)


class GraphRunner(Runner):
    """A `Runner` that makes its calls of few tokens with `static_step`, on CUDA as graphs.

    The cache has memory for the whole context of every slot from the start, rounded up to a bucket of keys; raises
    `ModelError` where there is not enough. A graph is captured when its bucket is first met, which takes about
    as long as three calls; where memory is short for that, the bucket is left to the dynamic path. The layers of
    the model are replaced by leaner ones where that is possible (`decoders.fused_layers`).

    static_calls counts the calls that were made in static shapes, `calls` all of them.
    """

    def __init__(self, model: PreTrainedModel, *, slots: int = 1, context: int | None = None) -> None:
        super().__init__(model, slots=slots, context=context)
        fused_layers(model)
        self.static_calls = 0
        self._graphs: dict[Shape, Any] = {}
        self._pool: Any = None
        self._refused: set[Shape] = set()
        try:
            self._allocate()
            return
        except (MemoryError, RuntimeError) as error:
            failure = out_of_memory(error)
        raise ModelError(f"{failure}; a runner with graphs takes the memory of its whole context at once")

    @torch.inference_mode()
    def _allocate(self) -> None:
        """All buffers, and the cache by a call that has padding alone."""
        self._cache: StaticCache = StaticCache(self.slots, bucket_of_keys(self.context))
        most = min(MOST_NEW, _bucket(ROWS, min(self.slots, ROWS[-1])) * TOKENS[-1])
        head: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        device, cuda = self.device, self.device.type == "cuda"
        staged = MOST_NEW * 5
        self._pinned = torch.zeros(staged, dtype=torch.int64, pin_memory=cuda)
        self._uploaded = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self._buffers = Buffers(
            staged=torch.zeros(staged, dtype=torch.int64, device=device),
            logits=torch.zeros(most, self.vocabulary, device=device),
            hidden=torch.zeros(most, head.in_features, dtype=self.model.dtype, device=device),
            tokens=torch.zeros(most, dtype=torch.int64, device=device),
            finite=torch.zeros(most, dtype=torch.bool, device=device),
            entropy=torch.zeros(most, device=device),
        )
        shape = Shape(1, 1, min(FIRST_KEYS, self._cache.capacity), False, 1)
        self._upload([0, 0, 0, self._cache.capacity, 0])
        static_step(self.model, self._cache, self._buffers, shape)

    def _read(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], keep: Sequence[int], hidden: bool
    ) -> RunnerOutput:
        """In one static shape where there is one; else rows of about one length apart from the others, in one each."""
        shape = self._shape(slots, tokens, max(keep))
        if shape is not None and self._step(shape, slots, tokens, keep):
            # Copies: the buffers are the next call's.
            out, count = self._buffers, sum(keep)
            return RunnerOutput(
                out.logits[:count].clone(),
                out.finite[:count].clone(),
                out.hidden[:count].clone() if hidden else None,
                out.tokens[:count].clone(),
                out.entropy[:count].clone(),
            )
        sizes = [bisect_left(TOKENS, len(new)) for new in tokens]
        if self._varies_beyond is not None or min(sizes) == max(sizes):
            return super()._read(slots, tokens, keep, hidden)
        longest = [row for row, size in enumerate(sizes) if size == max(sizes)]
        others = [row for row, size in enumerate(sizes) if size < max(sizes)]
        parts = [
            self._read(
                [slots[row] for row in rows],
                [tokens[row] for row in rows],
                [keep[row] for row in rows],
                hidden,
            )
            for rows in (others, longest)
        ]
        return joined(parts, in_order([*others, *longest], keep))

    def _shape(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], keep: int) -> Shape | None:
        """The smallest bucket that a call fits; None where there is none."""
        steps = max(map(len, tokens))
        if self._varies_beyond is not None or steps > TOKENS[-1] or len(slots) > ROWS[-1]:
            return None
        rows, steps = _bucket(ROWS, len(slots)), _bucket(TOKENS, steps)
        # Idle slots between those that are read cost little, and keys need not be gathered.
        highest = max(slots) + 1
        by_slot = highest <= min(2 * rows, ROWS[-1])
        if by_slot:
            rows = min(_bucket(ROWS, highest), self.slots)
        if rows * steps > MOST_NEW:
            return None
        longest = max(len(self.held[slot]) + len(new) for slot, new in zip(slots, tokens, strict=True))
        keys = min(bucket_of_keys(longest), self._cache.capacity)
        shape = Shape(rows, steps, keys, by_slot, 1 if keep == 1 else steps)
        return None if shape in self._refused else shape

    def _step(
        self,
        shape: Shape,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        keep: Sequence[int],
    ) -> bool:
        """Make a call in its bucket; False, with nothing read, where the memory for its graph is short."""
        self._upload(self._stage(shape, slots, tokens, keep))
        try:
            self._replay(shape)
        except (MemoryError, RuntimeError) as error:
            out_of_memory(error)  # raises what is another failure
            self._refused.add(shape)
            return False
        for slot, new in zip(slots, tokens, strict=True):
            self.held[slot].extend(new)
        self.calls += 1
        self.static_calls += 1
        return True

    def _stage(
        self, shape: Shape, slots: Sequence[int], tokens: Sequence[Sequence[int]], keep: Sequence[int]
    ) -> list[int]:
        """The numbers that `static_step` reads, see `Shape.staged`."""
        nowhere = self._cache.capacity
        size, steps = shape.rows * shape.tokens, shape.tokens
        of_slots = list(range(shape.rows)) if shape.by_slot else [slots[0]] * shape.rows
        ids, positions, places = [0] * size, [0] * size, [nowhere] * size
        wanted: list[int] = []
        for number, (slot, new, last) in enumerate(zip(slots, tokens, keep, strict=True)):
            row = slot if shape.by_slot else number
            of_slots[row] = slot
            end, start = (row + 1) * steps, len(self.held[slot])
            begin = end - len(new)
            ids[begin:end] = new
            positions[begin:end] = places[begin:end] = range(start, start + len(new))
            wanted += range((row + 1) * shape.keep - last, (row + 1) * shape.keep)
        wanted += [0] * (shape.rows * shape.keep - len(wanted))
        return [*of_slots, *ids, *positions, *places, *wanted]

    def _upload(self, numbers: list[int]) -> None:
        """One copy from pinned memory, behind whatever the device is doing; its last copy has left by then."""
        if self._uploaded is not None:
            self._uploaded.synchronize()
        self._pinned[: len(numbers)] = torch.tensor(numbers)
        self._buffers.staged[: len(numbers)].copy_(self._pinned[: len(numbers)], non_blocking=True)
        if self._uploaded is not None:
            self._uploaded.record()

    def _replay(self, shape: Shape) -> None:
        if self.device.type != "cuda":
            static_step(self.model, self._cache, self._buffers, shape)
            return
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(shape)
        self._graphs[shape].replay()

    def _capture(self, shape: Shape) -> Any:
        """Warmed up on the very call that is to be made: doing it again writes the same keys and values."""
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


def bucket_of_keys(length: int) -> int:
    """The least key length of a bucket that holds so many: 128, 192, 256, 384, 512, ..."""
    keys = FIRST_KEYS
    while keys < length:
        if 3 * keys // 2 >= length:
            return 3 * keys // 2
        keys *= 2
    return keys


def _bucket(sizes: Sequence[int], value: int) -> int:
    return next(size for size in sizes if size >= value)
