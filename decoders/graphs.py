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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from viaticum.decoders.attention import attending
from viaticum.decoders.blocks import BLOCK, blocks_of
from viaticum.decoders.cache import BlockCache
from viaticum.decoders.fused_layers import fuse_layers
from viaticum.decoders.memory import out_of_memory
from viaticum.decoders.runner import RunnerOutput
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
        keep: last positions of a row whose logits are computed.
        vocabulary: the tokens that argmax and entropy are over.
    """

    rows: int
    tokens: int
    keys: int
    keep: int
    vocabulary: SharedVocabulary

    @property
    def input_size(self) -> int:
        """Integers uploaded a call: blocks [R, B]; ids, positions, addresses [R, T]; wanted [R * keep]."""
        return self.rows * (blocks_of(self.keys) + 3 * self.tokens + self.keep)


@dataclass(frozen=True, slots=True)
class StaticLayout:
    """Addresses in the cache of a static call.

    where: of each token, int64 [R * T]. read: of each row's keys, int64 [R * L].
    """

    rows: int
    where: Tensor
    read: Tensor


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


class StaticCache(BlockCache):
    """A cache allocated in full at the start, with one more block, which padding is written to.

    Addresses never change, as graphs require.
    """

    @property
    def padding(self) -> int:
        """The block that padding is written to."""
        return self.pool.addresses

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        batch: Any = self.batch
        if not isinstance(batch, StaticLayout):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.allocate(layer_idx, key_states, value_states)
        found = []
        for layer, states in (
            (self.keys[layer_idx], key_states),
            (self.values[layer_idx], value_states),
        ):
            layer.index_copy_(0, batch.where, states.transpose(1, 2).flatten(0, 1))
            rows = layer.transpose(0, 1).index_select(1, batch.read)  # [kv_heads, R * L, D]
            found.append(rows.view(len(rows), batch.rows, -1, rows.shape[-1]).transpose(0, 1))
        return found[0], found[1]

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros((self.pool.addresses + 1) * BLOCK, like.shape[1], like.shape[-1])


def static_step(model: Any, cache: StaticCache, buffers: Buffers, shape: GraphShape) -> None:
    """Run one model call of a given shape from `buffers.inputs` to the other buffers.

    Reads nothing on the host. New tokens are right-aligned in each row. Output n belongs to position
    wanted[n] of the R * keep last ones.
    """
    rows, steps, last = shape.rows, shape.tokens, shape.rows * shape.keep
    sizes = [rows * blocks_of(shape.keys), *[rows * steps] * 3, last]
    blocks, ids, positions, where, wanted = torch.split(buffers.inputs[: shape.input_size], sizes)
    positions = positions.view(rows, steps)
    keys = torch.arange(shape.keys, device=positions.device)
    read = blocks.view(rows, -1).index_select(1, keys // BLOCK) * BLOCK + keys % BLOCK  # [R, L]
    cache.batch = StaticLayout(rows, where, read.flatten())  # type: ignore[assignment]
    visible = keys <= positions[:, :, None]  # [R, T, L]
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
    shared = shape.vocabulary.cut(logits)
    buffers.tokens[:last] = argmax_token(shape.vocabulary.candidates(shared))
    buffers.finite[:last] = torch.isfinite(logits.sum(-1))  # a sum is finite only if every term is
    buffers.entropy[:last] = entropy(shared)


class GraphRunner(TorchRunner):
    """A `TorchRunner` that makes its calls of few tokens with `static_step`, on CUDA as graphs.

    The cache is allocated at the start, with all of its blocks; a call gathers each row's keys from them. A
    graph is captured at the first call of its bucket, which takes about as long as three calls; if the memory
    is not enough for that, the bucket is left to the dynamic path. The model's layers are replaced by fused
    ones where possible (`decoders.fused_layers`). `static_calls` counts the calls in static shapes, `calls`
    all of them.

    Raises:
        ModelError: the memory is not enough for cache and buffers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int = 1,
        context: int | None = None,
        blocks: int | None = None,
    ) -> None:
        super().__init__(model, slots=slots, context=context, blocks=blocks, in_place=False)
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
        raise ModelError(f"{failure}; a runner with graphs takes the memory of all its blocks at once")

    def _new_cache(self) -> StaticCache:
        return StaticCache(self.pool)

    @property
    def _static_cache(self) -> StaticCache:
        assert isinstance(self._cache, StaticCache)
        return self._cache

    @torch.inference_mode()
    def _allocate(self) -> None:
        """Allocate all buffers, and the cache by a call of padding only."""
        limit = min(MAX_NEW_TOKENS, _bucket(ROWS, min(self.slots, ROWS[-1])) * TOKENS[-1])
        head: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        device, cuda = self.device, self.device.type == "cuda"
        blocks = min(self.slots, ROWS[-1]) * 2 * (self.pool.per_slot + blocks_of(FIRST_KEYS))
        input_size = MAX_NEW_TOKENS * 4 + blocks
        self._pinned = torch.zeros(input_size, dtype=torch.int64, pin_memory=cuda)
        # Of the model's device, which need not be torch's current one.
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._uploaded = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self._buffers = Buffers(
            inputs=torch.zeros(input_size, dtype=torch.int64, device=device),
            logits=torch.zeros(limit, self.vocabulary, device=device),
            hidden=torch.zeros(limit, head.in_features, dtype=self.model.dtype, device=device),
            tokens=torch.zeros(limit, dtype=torch.int64, device=device),
            finite=torch.zeros(limit, dtype=torch.bool, device=device),
            entropy=torch.zeros(limit, device=device),
        )
        padding = self._static_cache.padding
        shape = GraphShape(1, 1, min(FIRST_KEYS, BLOCK), 1, self._call_vocabulary)
        self._upload(np.array([padding, 0, 0, padding * BLOCK, 0]))
        static_step(self.model, self._static_cache, self._buffers, shape)

    def _forward_rows(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], keep: Sequence[int], hidden: bool
    ) -> RunnerOutput:
        """One static call if a shape fits, else one of the dynamic path: weights are read once a step."""
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
        return super()._forward_rows(slots, tokens, keep, hidden)

    def _shape(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], keep: int) -> GraphShape | None:
        """The smallest bucket that fits a call; None if none does."""
        steps = max(map(len, tokens))
        if self._rope_limit is not None or steps > TOKENS[-1] or len(slots) > ROWS[-1]:
            return None
        rows, steps = _bucket(ROWS, len(slots)), _bucket(TOKENS, steps)
        if rows * steps > MAX_NEW_TOKENS:
            return None
        longest = max(
            len(self.cached_tokens[slot]) + len(new) for slot, new in zip(slots, tokens, strict=True)
        )
        keys = min(key_bucket(longest), self.pool.per_slot * BLOCK)
        shape = GraphShape(rows, steps, keys, 1 if keep == 1 else steps, self._call_vocabulary)
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
    ) -> NDArray[np.int64]:
        """The integers that `static_step` reads, see `GraphShape.input_size`."""
        padding, steps = self._static_cache.padding, shape.tokens
        blocks = np.full((shape.rows, blocks_of(shape.keys)), padding)
        blocks[: len(slots)] = self.pool.rows(slots, blocks.shape[1])
        ids, positions = np.zeros((2, shape.rows, steps), dtype=np.int64)
        where = np.full((shape.rows, steps), padding * BLOCK)
        wanted: list[int] = []
        for row, (slot, new, last) in enumerate(zip(slots, tokens, keep, strict=True)):
            start, begin = len(self.cached_tokens[slot]), steps - len(new)
            ids[row, begin:] = new
            at = positions[row, begin:] = np.arange(start, start + len(new))
            where[row, begin:] = self.pool.table[slot, at // BLOCK] * BLOCK + at % BLOCK
            wanted += range((row + 1) * shape.keep - last, (row + 1) * shape.keep)
        wanted += [0] * (shape.rows * shape.keep - len(wanted))
        return np.concatenate([blocks.ravel(), ids.ravel(), positions.ravel(), where.ravel(), wanted])

    def _upload(self, values: NDArray[np.int64]) -> None:
        """Enqueue one copy from pinned memory, after the previous copy has finished."""
        if self._uploaded is not None:
            self._uploaded.synchronize()
        self._pinned[: len(values)] = torch.from_numpy(values)
        self._buffers.inputs[: len(values)].copy_(self._pinned[: len(values)], non_blocking=True)
        if self._uploaded is not None:
            self._uploaded.record(torch.cuda.current_stream(self.device))

    def _replay(self, shape: GraphShape) -> None:
        if self.device.type != "cuda":
            static_step(self.model, self._static_cache, self._buffers, shape)
            return
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(shape)
        self._graphs[shape].replay()

    def _capture(self, shape: GraphShape) -> Any:
        """Warm up and capture on the call to be made: repeating it writes the same keys and values."""
        stream, current = self._stream, torch.cuda.current_stream(self.device)
        assert stream is not None, "a runner on CUDA has a stream"
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):
                static_step(self.model, self._static_cache, self._buffers, shape)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Without a stream torch captures on the device that was current at the first capture of all.
        capture = torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local")
        with torch.cuda.device(self.device), capture:
            static_step(self.model, self._static_cache, self._buffers, shape)
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
