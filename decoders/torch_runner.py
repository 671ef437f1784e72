"""A causal language model of transformers with its KV cache in blocks.

Any decoder-only family of transformers works, since only the cache and the attention function are replaced.
Prefill is split into chunks. Leaves out loading (`decoders.load`), sampling, routing, text and requests.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from viaticum.decoders.attention import NAME as ATTENTION
from viaticum.decoders.attention import attending, check_layers, spans, unmasked_length
from viaticum.decoders.blocks import BLOCK, BlockPool, OutOfBlocks, blocks_of
from viaticum.decoders.cache import BatchLayout, BlockCache
from viaticum.decoders.linear import weight_bytes
from viaticum.decoders.memory import MASK_PAIRS, MASK_TOKENS, out_of_memory
from viaticum.decoders.rope import reset_rope_lengths, rope_varies_beyond
from viaticum.decoders.runner import Runner, RunnerOutput, concatenate, restoring_order
from viaticum.decoders.vocabulary import end_ids
from viaticum.errors import InputError, ModelError
from viaticum.routers.token.base import to_device

PREFILL_TOKENS = 1024  # new tokens in one model call, over all rows: bounds the memory of activations


class TorchRunner(Runner):
    """A `Runner` over a transformers model, on any torch device.

    Args:
        model: a transformers causal LM whose attention can be replaced; its attention becomes
            `slot_attention`.
        slots: sequences in the cache at once.
        context: maximum positions of one sequence; None: what the model supports. It is never more than all
            blocks together hold.
        blocks: blocks of `BLOCK` positions that sequences may hold at once, on CUDA allocated at the start;
            None: the whole context of every slot.
        in_place: read slots in place (see `decoders.blocks`); None: on a CPU.

    Raises:
        InputError: `slots` or `blocks` is below 1.
        ModelError: the model cannot be computed here (`check_layers`), or counts the positions of a text
            itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int = 1,
        context: int | None = None,
        blocks: int | None = None,
        in_place: bool | None = None,
    ) -> None:
        if blocks is not None and blocks < 1:
            raise InputError(f"a runner needs at least one block of {BLOCK} positions, got {blocks}")
        check_layers(model.config)
        if "position_ids" not in inspect.signature(type(model).forward).parameters:
            raise ModelError(
                f"{type(model).__name__} counts the positions of a text itself, so that several in one "
                "call would be mixed up; take another model"
            )
        longest = context_length(model.config, context)
        super().__init__(
            slots=slots,
            context=longest if blocks is None else min(longest, blocks * BLOCK),
            vocabulary=int(model.config.get_text_config().vocab_size),
            weight_bytes=weight_bytes(model),
            stop_ids=end_ids(getattr(model.generation_config, "eos_token_id", None)),
            device=model.device,
        )
        model.train(False)
        self.model = model
        self.model.set_attn_implementation(ATTENTION)
        self._rope_limit = rope_varies_beyond(model.config)
        self._longest = [0] * slots  # maximum length that the sequence of each slot has had
        in_place = self.device.type == "cpu" if in_place is None else in_place
        self.pool = BlockPool(slots, self.context, blocks, in_place=in_place)
        self._cache = self._new_cache()
        # transformers passes it on unread: `slot_attention` masks by spans.
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)

    def _new_cache(self) -> BlockCache:
        return BlockCache(self.pool)

    @property
    def overflow_hint(self) -> str:
        if self.model.dtype != torch.float16:
            return super().overflow_hint
        return (
            "float16 ends at 65,504, which many models exceed: set dtype to bfloat16 or float32 (in its "
            f"entry, or --dtype); if that changes nothing, {super().overflow_hint}"
        )

    @property
    def embeddings(self) -> Tensor:
        """The input embeddings [vocabulary, D] in the model's dtype."""
        found: Any = self.model.get_input_embeddings().weight
        weights: Tensor = found.detach()
        return weights

    def _forward(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], keep: Sequence[int], hidden: bool
    ) -> RunnerOutput:
        self._reserve(slots, tokens)
        try:
            return self._forward_rows(slots, tokens, keep, hidden)
        except (MemoryError, RuntimeError) as error:
            failure = out_of_memory(error)
        # Raised outside of the handler: an error that carries the failed frames would keep their tensors
        # alive.
        raise ModelError(failure)

    def _reserve(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Give the rows of a call the blocks that they need, some of free slots if need be, or none."""
        rows = [
            (slot, len(self.cached_tokens[slot]), len(self.cached_tokens[slot]) + len(new))
            for slot, new in zip(slots, tokens, strict=True)
        ]
        for slot, start, _ in rows:
            self._cache.cut(slot, start)
        missing = sum(itertools.starmap(self.pool.missing, rows))
        if missing > self.pool.free:
            self._reclaim(missing, slots)
            missing = sum(itertools.starmap(self.pool.missing, rows))
        if missing > self.pool.free:
            raise OutOfBlocks(
                f"not enough memory: {missing} more blocks of {BLOCK} positions are needed, and "
                f"{self.pool.free} of {self.pool.limit} are free; shorten the request, or run fewer at once"
            )
        for row in rows:
            self._cache.extend(*row)

    def _reclaim(self, blocks: int, keep: Collection[int]) -> None:
        """Drop what free slots hold, from the end of the longest free one, until so many blocks are free."""
        for slot in self.free_slots:
            while slot not in keep and self.pool.free < blocks and (held := self.pool.count(slot)):
                self.truncate(slot, max(0, held - (blocks - self.pool.free)) * BLOCK)

    def make_room(self, lengths: Mapping[int, int]) -> bool:
        missing = sum(max(0, blocks_of(length) - self.pool.count(slot)) for slot, length in lengths.items())
        self._reclaim(missing, lengths)
        return missing <= self.pool.free

    def _forward_rows(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], keep: Sequence[int], hidden: bool
    ) -> RunnerOutput:
        # Sorted so that neighbouring slots with equally many tokens form one span (`attention.spans`).
        order = sorted(range(len(slots)), key=lambda row: (len(tokens[row]), slots[row]))
        batches = self._batches(order, slots, tokens)
        parts: list[RunnerOutput] = []
        for rows in batches:
            for chunk in _chunks(
                [len(self.cached_tokens[slots[row]]) for row in rows],
                [len(tokens[row]) for row in rows],
                [keep[row] for row in rows],
            ):
                part = self._call(
                    [slots[rows[i]] for i, *_ in chunk],
                    [list(tokens[rows[i]][begin:end]) for i, begin, end, _ in chunk],
                    [last for *_, last in chunk],
                    hidden=hidden,
                )
                if part is not None:
                    parts.append(part)
        return concatenate(parts, restoring_order([row for rows in batches for row in rows], keep))

    def _batches(
        self, order: list[int], slots: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """Rows that may share a call; beyond the limit of a length-dependent RoPE a row is computed alone."""
        if self._rope_limit is None:
            return [order]
        within = [
            row
            for row in order
            if self.has_stable_keys(len(self.cached_tokens[slots[row]]) + len(tokens[row]))
        ]
        beyond = [[row] for row in order if row not in within]
        return [within, *beyond] if within else beyond

    def truncate(self, slot: int, length: int) -> None:
        super().truncate(slot, length)
        self._cache.cut(slot, len(self.cached_tokens[slot]))

    def reset(self, slot: int) -> None:
        super().reset(slot)
        self._cache.cut(slot, 0)
        self._longest[slot] = 0

    def cached_prefix_length(self, slot: int, tokens: Sequence[int]) -> int:
        """As `Runner`; 0 if one of them has exceeded the length from which the rotation varies."""
        if not self.has_stable_keys(max(self._longest[slot], len(tokens))):
            return 0
        return super().cached_prefix_length(slot, tokens)

    def has_stable_keys(self, length: int) -> bool:
        return self._rope_limit is None or length <= self._rope_limit

    def reuse_prefix(self, slot: int, tokens: Sequence[int]) -> None:
        try:
            super().reuse_prefix(slot, tokens)
        except OutOfBlocks:  # for two copies; it is computed again where the first one makes room
            self.reset(slot)
        self._cache.cut(slot, len(self.cached_tokens[slot]))
        self._longest[slot] = len(self.cached_tokens[slot])

    def _copy_prefix(self, source: int, target: int, length: int) -> None:
        self.truncate(target, 0)
        self._reclaim(blocks_of(length) if self.pool.in_place else 1, (source, target))
        self._cache.copy_prefix(source, target, length)

    def _wipe(self, slot: int) -> None:
        self._cache.wipe(slot)

    def _call(
        self, slots: list[int], tokens: list[list[int]], keep: list[int], *, hidden: bool
    ) -> RunnerOutput | None:
        """One model call, the new tokens of all rows as one sequence [1, N] without padding.

        Returns logits after the last keep[i] tokens of each row (which may be 0); None if no row wants any.
        """
        starts = [len(self.cached_tokens[slot]) for slot in slots]
        keys = max(start + len(new) for start, new in zip(starts, tokens, strict=True))
        ends = list(itertools.accumulate(map(len, tokens)))
        wanted = [i for end, last in zip(ends, keep, strict=True) for i in range(end - last, end)]
        ids = to_device([[token for new in tokens for token in new]], self.device)
        positions = to_device(
            [i for start, new in zip(starts, tokens, strict=True) for i in range(start, start + len(new))],
            self.device,
        )
        first = self._cache.address(slots[0], starts[0])
        one_range = len(slots) == 1 and self.pool.in_place
        self._cache.batch = BatchLayout(
            where=slice(first, first + len(tokens[0]))
            if one_range
            else to_device(
                [
                    self._cache.address(slot, start + index)
                    for slot, start, new in zip(slots, starts, tokens, strict=True)
                    for index in range(len(new))
                ],
                self.device,
            ),
            keys=keys,
        )
        if self._rope_limit is not None:
            reset_rope_lengths(self.model)
        states: list[Tensor] = []
        head: torch.nn.Module = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        pool = None if self.pool.in_place else self.pool
        rows = spans(slots, starts, list(map(len, tokens)), self.device, pool=pool)
        with (
            head.register_forward_pre_hook(lambda _, inputs: states.extend(inputs if hidden else ())),
            attending(rows, self.model),
        ):
            out = self.model(
                input_ids=ids,
                attention_mask=self._no_mask,
                position_ids=positions[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=to_device(wanted or [len(ids[0]) - 1], self.device),
            )
        for slot, new in zip(slots, tokens, strict=True):
            self.cached_tokens[slot].extend(new)
            self._longest[slot] = max(self._longest[slot], len(self.cached_tokens[slot]))
        self.calls += 1
        if not wanted:
            return None
        logits = out.logits[0].float()
        finite = torch.isfinite(logits.sum(-1))  # a sum is finite only if every term is
        return RunnerOutput(logits, finite, states[0][0] if hidden else None)


def _chunks(
    starts: Sequence[int], lengths: Sequence[int], keep: Sequence[int]
) -> Iterator[list[tuple[int, int, int, int]]]:
    """Split new tokens into calls of bounded size: (row, begin, end, positions wanted).

    A call has `PREFILL_TOKENS` at most; a long prompt fewer, since a token's mask is as wide as its keys.

    Args:
        starts: tokens that each row's slot holds already.
        lengths: new tokens of each row.
        keep: positions of each row whose logits are wanted.
    """
    chunk: list[tuple[int, int, int, int]] = []
    room, pairs = PREFILL_TOKENS, MASK_PAIRS
    for row, (start, length, last) in enumerate(zip(starts, lengths, keep, strict=True)):
        begin = 0
        while begin < length:
            new = min(length - begin, room)
            if new > MASK_TOKENS:
                new = max(MASK_TOKENS, min(new, pairs // (start + begin + new)))
                pairs -= new * (start + begin + new)
            end = begin + new
            chunk.append((row, begin, end, max(0, min(new, end - length + last))))
            room -= new
            begin = end
            if not room or begin < length:
                yield chunk
                chunk, room, pairs = [], PREFILL_TOKENS, MASK_PAIRS
    if chunk:
        yield chunk


def context_length(config: Any, limit: int | None) -> int:
    """Maximum positions of one sequence: `limit`, within what the model supports. config: of the model."""
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", 1 << 20))
    longest = min(longest, unmasked_length(config) or longest)
    return min(limit or longest, longest)
