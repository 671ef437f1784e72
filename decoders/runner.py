"""One causal language model with its KV cache in fixed slots.

`forward` appends ragged new tokens to some slots and returns the logits after the last ones: one new token is
a decode step, a few are a catch-up with the other model or a draft to verify, many are a prefill (in chunks).
Any decoder-only family of transformers works, since only the cache and the attention function are replaced.
Leaves out loading (`decoders.load`), sampling, routing, text and requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from viaticum.decoders.attention import NAME as ATTENTION
from viaticum.decoders.attention import attending, spans
from viaticum.decoders.cache import BatchLayout, SlotCache
from viaticum.decoders.linear import weight_bytes
from viaticum.decoders.memory import out_of_memory
from viaticum.decoders.rope import reset_rope_lengths, rope_varies_beyond
from viaticum.errors import InputError, ModelError, PromptTooLong

PREFILL_TOKENS = 1024  # new tokens in one model call, over all rows: bounds the memory of activations


@dataclass(frozen=True, slots=True)
class RunnerOutput:
    """What a model returns for N positions, ordered by row and within a row by position.

    N is the sum of `keep`. All tensors are on the model's device.

    Args:
        logits: float32 [N, vocabulary].
        finite: whether all logits of a position are finite, bool [N].
        hidden: last hidden states [N, D] in the model's dtype; None unless requested.
        tokens: argmax of the logits, the first of equals, int64 [N]; None unless the call computed it
            (`decoders.graphs`).
        entropy: normalised entropy, float32 [N]; None like `tokens`.
    """

    logits: Tensor
    finite: Tensor
    hidden: Tensor | None = None
    tokens: Tensor | None = None
    entropy: Tensor | None = None


class Runner:
    """A causal LM and the KV slots of its sequences.

    `cached_tokens[slot]` are the tokens whose keys and values the slot holds; cache positions beyond them are
    never read. A finished sequence stays in its slot until another one takes the slot, so that a common
    prompt prefix (the examples of a strategy, a chat) is computed once.

    Args:
        model: a transformers causal LM whose attention can be replaced; its attention becomes
            `slot_attention`.
        slots: sequences in the cache at once.
        context: maximum positions of one sequence; None: what the model supports.

    Raises:
        InputError: `slots` is below 1.
    """

    def __init__(self, model: PreTrainedModel, *, slots: int = 1, context: int | None = None) -> None:
        if slots < 1:
            raise InputError(f"a runner needs at least one slot, got {slots}")
        model.train(False)
        self.model = model
        self.model.set_attn_implementation(ATTENTION)
        self.device = model.device
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.context = context_length(model.config, context)
        self._rope_limit = rope_varies_beyond(model.config)
        self.weight_bytes = weight_bytes(model)
        self.slots = slots
        self.cached_tokens: list[list[int]] = [[] for _ in range(slots)]
        self._longest = [0] * slots  # maximum length that the sequence of each slot has had
        self.free_slots = list(range(slots))  # slots without an active sequence, the longest free first
        self.calls = 0
        self._cache = SlotCache(slots)
        # transformers passes it on unread: `slot_attention` masks by spans.
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)

    @property
    def capacity(self) -> int:
        """Positions allocated in every slot; `forward` grows it up to the context."""
        return self._cache.capacity

    @property
    def embeddings(self) -> Tensor:
        """The input embeddings [vocabulary, D] in the model's dtype."""
        found: Any = self.model.get_input_embeddings().weight
        weights: Tensor = found.detach()
        return weights

    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """`forward`, returning only the logits after each row's last token: float32 [B, vocabulary].

        Raises:
            ModelError: a row's logits are not finite; its slot is then empty. Otherwise as `forward`.
        """
        output = self.forward(slots, tokens)
        if not bool(output.finite.all()):
            bad = [slot for slot, finite in zip(slots, output.finite.tolist(), strict=True) if not finite]
            for slot in bad:
                self.discard(slot)
            raise ModelError(f"logits are not finite in slots {bad}; the weights or the input are damaged")
        return output.logits

    @torch.inference_mode()
    def forward(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        keep: Sequence[int] | None = None,
        *,
        hidden: bool = False,
    ) -> RunnerOutput:
        """Append `tokens[i]` to `slots[i]` and return the logits after the last `keep[i]` of them.

        A slot whose logits are not finite should be discarded, since its keys and values are damaged.

        Args:
            slots: B different slots.
            tokens: B non-empty lists of token ids.
            keep: B counts of positions whose logits are returned; None: 1 for every row.
            hidden: also return the last hidden states.

        Raises:
            InputError: `keep[i]` is below 1 or above the number of tokens.
            PromptTooLong: a row would exceed the context; nothing is changed then.
            ModelError: the memory is not enough; `cached_tokens` then tells which tokens were processed
                before.
        """
        keep = [1] * len(slots) if keep is None else keep
        for slot, new, last in zip(slots, tokens, keep, strict=True):
            if not 1 <= last <= len(new):
                raise InputError(
                    f"slot {slot}: {len(new)} tokens to read, logits wanted after {last} of them"
                )
            if len(self.cached_tokens[slot]) + len(new) > self.context:
                raise PromptTooLong(
                    f"{len(self.cached_tokens[slot]) + len(new)} tokens do not fit the context of "
                    f"{self.context}; shorten the prompt or lower max_new_tokens"
                )
        longest = max(
            len(self.cached_tokens[slot]) + len(new) for slot, new in zip(slots, tokens, strict=True)
        )
        capacity = self.capacity
        try:
            self._cache.grow(longest)
            return self._forward(slots, tokens, keep, hidden)
        except (MemoryError, RuntimeError) as error:
            failure = out_of_memory(error)
        self._cache.shrink(capacity, complete=self.calls > 0)
        # Raised outside of the handler: an error that carries the failed frames would keep their tensors
        # alive.
        raise ModelError(failure)

    def _forward(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], keep: Sequence[int], hidden: bool
    ) -> RunnerOutput:
        # Sorted so that neighbouring slots with equally many tokens form one span (`attention.spans`).
        order = sorted(range(len(slots)), key=lambda row: (len(tokens[row]), slots[row]))
        batches = self._batches(order, slots, tokens)
        parts: list[RunnerOutput] = []
        for rows in batches:
            for chunk in _chunks([len(tokens[row]) for row in rows], [keep[row] for row in rows]):
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
        """Drop what the slot holds beyond `length` tokens, e.g. a draft that was not accepted."""
        del self.cached_tokens[slot][length:]

    @torch.inference_mode()
    def discard(self, slot: int) -> None:
        """Drop the slot's sequence and zero its cache: a NaN left behind would spread, for 0 * NaN is NaN."""
        self._cache.wipe(slot)
        self.reset(slot)

    def reset(self, slot: int) -> None:
        """Drop the slot's sequence."""
        self.cached_tokens[slot] = []
        self._longest[slot] = 0

    def cached_prefix_length(self, slot: int, tokens: Sequence[int]) -> int:
        """Length of the common prefix of `tokens` and what `slot` holds, with the same keys.

        0 if one of them has exceeded the length from which the rotation depends on the longest sequence of a
        call.
        """
        if not self.has_stable_keys(max(self._longest[slot], len(tokens))):
            return 0
        return common_prefix_length(self.cached_tokens[slot], tokens)

    def has_stable_keys(self, length: int) -> bool:
        """Whether a sequence of `length` tokens has the keys of any other sequence with the same prefix."""
        return self._rope_limit is None or length <= self._rope_limit

    @torch.inference_mode()
    def reuse_prefix(self, slot: int, tokens: Sequence[int]) -> None:
        """Start a sequence in `slot` with the longest prefix of `tokens` that any slot holds, uncomputed.

        The last token is never reused: computing it gives the logits of the next one.
        """
        source = max(
            range(self.slots), key=lambda other: (self.cached_prefix_length(other, tokens), other == slot)
        )
        length = min(self.cached_prefix_length(source, tokens), len(tokens) - 1)
        if source != slot:
            self._cache.copy_prefix(source, slot, length)
        self.cached_tokens[slot] = list(tokens[:length])
        self._longest[slot] = length

    def _call(
        self, slots: list[int], tokens: list[list[int]], keep: list[int], *, hidden: bool
    ) -> RunnerOutput | None:
        """One model call, the new tokens of all rows as one sequence [1, N] without padding.

        Returns logits after the last keep[i] tokens of each row (which may be 0); None if no row wants any.
        """
        starts = [len(self.cached_tokens[slot]) for slot in slots]
        keys = max(start + len(new) for start, new in zip(starts, tokens, strict=True))
        self._cache.grow(keys)
        ends = list(itertools.accumulate(map(len, tokens)))
        wanted = [i for end, last in zip(ends, keep, strict=True) for i in range(end - last, end)]
        ids = torch.tensor([[token for new in tokens for token in new]], device=self.device)
        positions = torch.tensor(
            [i for start, new in zip(starts, tokens, strict=True) for i in range(start, start + len(new))],
            device=self.device,
        )
        single = len(slots) == 1
        self._cache.batch = BatchLayout(
            token_slots=torch.tensor(
                [slot for slot, new in zip(slots, tokens, strict=True) for _ in new], device=self.device
            ),
            token_positions=positions,
            single_row=(slots[0], slice(None), slice(starts[0], keys)) if single else None,
            keys=keys,
        )
        if self._rope_limit is not None:
            reset_rope_lengths(self.model)
        states: list[Tensor] = []
        head: torch.nn.Module = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        rows = spans(slots, starts, list(map(len, tokens)), self.device, gather=self.device.type != "cpu")
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
                logits_to_keep=torch.tensor(wanted or [len(ids[0]) - 1], device=self.device),
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


def _chunks(lengths: list[int], keep: list[int]) -> Iterator[list[tuple[int, int, int, int]]]:
    """Split new tokens into calls of at most `PREFILL_TOKENS`: (row, begin, end, positions wanted)."""
    chunk: list[tuple[int, int, int, int]] = []
    room = PREFILL_TOKENS
    for row, (length, last) in enumerate(zip(lengths, keep, strict=True)):
        begin = 0
        while begin < length:
            end = min(length, begin + room)
            chunk.append((row, begin, end, max(0, min(end - begin, end - length + last))))
            room -= end - begin
            begin = end
            if not room:
                yield chunk
                chunk, room = [], PREFILL_TOKENS
    if chunk:
        yield chunk


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens that two sequences begin with alike; bisected, for comparing whole slices is fast."""
    low, high = 0, min(len(first), len(second))
    if not high or first[0] != second[0]:
        return 0
    first, second = list(first[:high]), list(second[:high])
    if first == second:
        return high
    while high - low > 1:  # the first `low` are common, the first `high` are not
        middle = (low + high) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle)
    return low


def restoring_order(rows: Sequence[int], keep: Sequence[int]) -> list[int] | None:
    """Indices that sort the kept positions of `rows` by row; None if they are sorted already."""
    owners = [row for row in rows for _ in range(keep[row])]
    order = sorted(range(len(owners)), key=owners.__getitem__)  # stable: positions of a row stay in order
    return None if order == list(range(len(owners))) else order


def concatenate(parts: list[RunnerOutput], order: list[int] | None) -> RunnerOutput:
    """The outputs of several calls as one, its positions permuted by `order`."""
    if len(parts) == 1 and order is None:
        return parts[0]

    def column(name: str) -> Tensor | None:
        found = [value for part in parts if (value := getattr(part, name)) is not None]
        if len(found) < len(parts):
            return None
        whole = torch.cat(found) if len(found) > 1 else found[0]
        return whole if order is None else whole[order]

    logits, finite = column("logits"), column("finite")
    assert logits is not None
    assert finite is not None
    return RunnerOutput(logits, finite, column("hidden"), column("tokens"), column("entropy"))


def context_length(config: Any, limit: int | None) -> int:
    """Maximum positions of one sequence: `limit`, within what the model supports. config: of the model."""
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", 1 << 20))
    return min(limit or longest, longest)
