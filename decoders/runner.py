"""What the decoders ask of a language model: a `Runner`, whatever computes it, and the output of its calls.

A back end implements `Runner`: torch (`decoders.torch_runner`, with CUDA graphs `decoders.graphs`). The base
class keeps the bookkeeping of slots and checks the calls; a back end computes logits and moves keys and
values. Leaves out loading (`decoders.load`), sampling, routing, text and requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from viaticum.decoders.vocabulary import SharedVocabulary
from viaticum.errors import InputError, ModelError, PromptTooLong


@dataclass(frozen=True, slots=True)
class RunnerOutput:
    """What a model returns for N positions, ordered by row and within a row by position.

    N is the sum of `keep`. All tensors are on the model's device.

    Args:
        logits: float32 [N, rows of the vocabulary that the call was made for].
        finite: whether all logits of a position are finite, bool [N].
        hidden: last hidden states [N, D] in the model's dtype; None unless requested.
        tokens: most likely token that the vocabulary allows, the first of equals, int64 [N]; None unless the
            call computed it (`decoders.graphs`).
        entropy: normalised entropy, float32 [N]; None like `tokens`.
    """

    logits: Tensor
    finite: Tensor
    hidden: Tensor | None = None
    tokens: Tensor | None = None
    entropy: Tensor | None = None


class Runner(ABC):
    """A causal LM and the KV slots of its sequences.

    `cached_tokens[slot]` are the tokens whose keys and values the slot holds; cache positions beyond them are
    never read. A finished sequence stays in its slot until another one takes the slot, so that a common
    prompt prefix (the examples of a strategy, a chat) is computed once.

    Args:
        slots: sequences in the cache at once.
        context: maximum positions of one sequence, for which there is memory.
        vocabulary: rows of logits; padding beyond the tokenizer's tokens is among them.
        weight_bytes: bytes of weights that a decode step of one row reads.
        stop_ids: token ids that end a text by the model's own settings; the tokenizer may name another.
        device: of the tensors that calls return.

    Raises:
        InputError: `slots` is below 1.
    """

    def __init__(
        self,
        *,
        slots: int,
        context: int,
        vocabulary: int,
        weight_bytes: int,
        stop_ids: frozenset[int] = frozenset(),
        device: torch.device | None = None,
    ) -> None:
        if slots < 1:
            raise InputError(f"a runner needs at least one slot, got {slots}")
        self.slots, self.context, self.vocabulary = slots, context, vocabulary
        self.weight_bytes, self.stop_ids = weight_bytes, stop_ids
        self.device = device or torch.device("cpu")
        self.cached_tokens: list[list[int]] = [[] for _ in range(slots)]
        self.free_slots = list(range(slots))  # slots without an active sequence, the longest free first
        self.calls = 0
        # Of a back end that works ahead: seconds that a call takes less if every row goes on where the model
        # itself wrote, and what the last call saved so.
        self.round_trip = self.saved_seconds = 0.0
        self._call_vocabulary = SharedVocabulary(vocabulary, vocabulary)  # of the call that is being made

    @property
    def description(self) -> str:
        """What computes the model; times of its calls hold as long as this is the same."""
        return f"{type(self).__name__} on {self.device}, {self.weight_bytes} bytes of weights"

    @property
    def overflow_hint(self) -> str:
        """What logits that are not finite may come from, and what to do about it."""
        return "its weights or the input are damaged"

    # --- what a back end implements -------------------------------------------------------------------------

    @property
    @abstractmethod
    def embeddings(self) -> Tensor:
        """The input embeddings [vocabulary, D].

        Raises:
            ModelError: the back end has none.
        """

    @abstractmethod
    def _forward(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], keep: Sequence[int], hidden: bool
    ) -> RunnerOutput:
        """`forward` after its checks, with all logits; extends `cached_tokens` and counts `calls`.

        `tokens` and `entropy`, where the call computes them, are those of `_call_vocabulary`.
        """

    @abstractmethod
    def _copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""

    @abstractmethod
    def _wipe(self, slot: int) -> None:
        """Remove what the slot's cache holds, so that nothing of it can spread."""

    # --- calls ----------------------------------------------------------------------------------------------

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
            raise ModelError(f"logits are not finite in slots {bad}; {self.overflow_hint}")
        return output.logits

    @torch.inference_mode()
    def forward(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        keep: Sequence[int] | None = None,
        *,
        hidden: bool = False,
        vocabulary: SharedVocabulary | None = None,
    ) -> RunnerOutput:
        """Append `tokens[i]` to `slots[i]` and return the logits after the last `keep[i]` of them.

        One new token is a decode step, a few are a catch-up with the other model or a draft to verify, many
        are a prefill. A slot whose logits are not finite should be discarded, since its keys and values are
        damaged.

        Args:
            slots: B different slots.
            tokens: B non-empty lists of token ids.
            keep: B counts of positions whose logits are returned; None: 1 for every row.
            hidden: also return the last hidden states.
            vocabulary: cuts the logits to its rows; what the call computes of them is over its tokens. None:
                all rows of this model.

        Raises:
            InputError: `keep[i]` is below 1 or above the number of tokens.
            PromptTooLong: a row would exceed the context; nothing is changed then.
            SequencesFailed: some rows failed, e.g. their server; `cached_tokens` is unchanged.
            OutOfBlocks: other sequences hold the memory that the call needs; nothing is changed then.
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
        self._call_vocabulary = vocabulary or SharedVocabulary(self.vocabulary, self.vocabulary)
        output = self._forward(slots, tokens, keep, hidden)
        logits = self._call_vocabulary.cut(output.logits)
        return output if logits is output.logits else replace(output, logits=logits)

    # --- slots ----------------------------------------------------------------------------------------------

    def truncate(self, slot: int, length: int) -> None:
        """Drop what the slot holds beyond `length` tokens, e.g. a draft that was not accepted."""
        del self.cached_tokens[slot][length:]

    @torch.inference_mode()
    def discard(self, slot: int) -> None:
        """Drop the slot's sequence and wipe its cache: a NaN left behind would spread, for 0 * NaN is NaN."""
        self._wipe(slot)
        self.reset(slot)

    def idle(self, slot: int) -> None:  # noqa: B027 (most back ends have nothing to do)
        """Called when the slot's sequence has ended, or is decoded by the other model for now.

        What the slot holds stays. A back end that works ahead stops.
        """

    def reset(self, slot: int) -> None:
        """Drop the slot's sequence."""
        self.cached_tokens[slot] = []

    def cached_prefix_length(self, slot: int, tokens: Sequence[int]) -> int:
        """Length of the common prefix of `tokens` and what `slot` holds, with the same keys."""
        return common_prefix_length(self.cached_tokens[slot], tokens)

    def make_room(self, lengths: Mapping[int, int]) -> bool:
        """Whether these slots can grow to these lengths beside what other sequences hold.

        Drops the prefixes that free slots still hold where they are in the way, the longest free first.
        """
        return True

    def has_stable_keys(self, length: int) -> bool:
        """Whether a sequence of `length` tokens has the keys of any other sequence with the same prefix.

        False for rotations that depend on the longest sequence of a call.
        """
        return True

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
            self._copy_prefix(source, slot, length)
        self.cached_tokens[slot] = list(tokens[:length])


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
