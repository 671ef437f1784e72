"""One causal language model with its KV cache in fixed slots.

`extend` feeds ragged new tokens to some slots and returns the logits after the last one: one token is
decoding, a few are catching up with the other model, many are a prefill (done in chunks). Any
decoder-only family of transformers works, since only the cache and the attention function are ours.
Knows nothing of sampling, routing, text or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel

from viaticum.decoders.attention import NAME as ATTENTION
from viaticum.errors import InputError, ModelError, PromptTooLong

PREFILL_TOKENS = 1024  # new tokens in one model call, over all rows: bounds the memory of activations
FIRST_CAPACITY = 512  # positions allocated at first; doubled when a sequence needs more


@dataclass(frozen=True, slots=True)
class _Batch:
    """Where the rows of one model call live: slots [B], and for each real token its row, step and position."""

    slots: Tensor
    whole: slice | None  # the slots as a slice where they are neighbours: reading them then copies nothing
    token_rows: Tensor
    token_steps: Tensor
    token_positions: Tensor
    keys: int


class SlotCache(Cache):
    """Keys and values of every layer, [slots, kv_heads, capacity, head_dim], zero where nothing was written.

    transformers calls `update` once a layer; it writes the new tokens of the current batch and returns
    the keys and values of its rows. Zeros matter: a masked position still enters the product as 0 * v.
    """

    def __init__(self, slots: int) -> None:
        super().__init__(layers=[])  # transformers' own layers stay unused: `update` below replaces them
        self.slots = slots
        self.capacity = FIRST_CAPACITY
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.batch: _Batch | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        batch = self.batch
        assert batch is not None, "extend sets the batch before it calls the model"
        while len(self.keys) <= layer_idx:
            self.keys.append(self._empty(key_states))
            self.values.append(self._empty(value_states))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        rows, steps = batch.token_rows, batch.token_steps
        where = (batch.slots[rows], slice(None), batch.token_positions)
        keys[where] = key_states[rows, :, steps]
        values[where] = value_states[rows, :, steps]
        if batch.whole is not None:
            return keys[batch.whole, :, : batch.keys], values[batch.whole, :, : batch.keys]
        return keys[batch.slots, :, : batch.keys], values[batch.slots, :, : batch.keys]

    def grow(self, positions: int) -> None:
        """Make room for at least so many positions in every slot."""
        if positions <= self.capacity:
            return
        while self.capacity < positions:
            self.capacity *= 2
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                store[layer] = self._empty(old)
                store[layer][:, :, : old.shape[2]] = old

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        for store in (self.keys, self.values):
            for layer in store:
                layer[target, :, :length] = layer[source, :, :length]

    def wipe(self, slot: int) -> None:
        for store in (self.keys, self.values):
            for layer in store:
                layer[slot] = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.batch is None else self.batch.keys

    @property
    def is_compileable(self) -> bool:
        return False

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.slots, like.shape[1], self.capacity, like.shape[-1])


class Runner:
    """A causal LM and the slots of its sequences.

    held[slot] are the tokens whose keys and values the slot holds; what lies beyond them in the cache is
    never read. A sequence that ended stays in its slot until another starts there, so that prompts which
    begin alike (a strategy's examples, a chat) are read once.

    model: a transformers causal LM loaded with `attn_implementation=ATTENTION` (see `load`);
    slots: sequences held at once; context: most positions of one sequence.
    """

    def __init__(self, model: PreTrainedModel, *, slots: int = 1, context: int | None = None) -> None:
        if slots < 1:
            raise InputError(f"a runner needs at least one slot, got {slots}")
        model.train(False)
        self.model = model
        self.model.set_attn_implementation(ATTENTION)
        self.device = model.device
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        longest = int(getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 20))
        self.context = min(context or longest, longest)
        self.slots = slots
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.free = list(range(slots))  # slots that no text is being written in, free for longest first
        self.calls = 0
        self._cache = SlotCache(slots)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        slots: int = 1,
        context: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
    ) -> Runner:
        """Read a model from a folder (config.json and safetensors); never touches the network."""
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=ATTENTION, local_files_only=True
        )
        model = model.to(torch.device(device))  # type: ignore[arg-type]
        return cls(model, slots=slots, context=context)

    @torch.inference_mode()
    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append `tokens[i]` to `slots[i]` and return the logits after each row's last token.

        slots: B different slots; tokens: B non-empty lists of token ids. Returns float32 [B, vocabulary].
        Raises `PromptTooLong` where a row would pass the context (nothing is then changed) and
        `ModelError` where a row's logits are not finite (those slots are then empty).
        """
        for slot, new in zip(slots, tokens, strict=True):
            if not new:
                raise InputError(f"slot {slot}: no tokens to read")
            if len(self.held[slot]) + len(new) > self.context:
                raise PromptTooLong(
                    f"{len(self.held[slot]) + len(new)} tokens do not fit the context of {self.context}; "
                    "shorten the prompt or lower max_new_tokens"
                )
        logits: Tensor | None = None
        for rows in _alike([len(new) for new in tokens]):
            out = self._prefill([slots[i] for i in rows], [list(tokens[i]) for i in rows])
            if len(rows) == len(slots):
                logits = out
            else:
                logits = out.new_empty(len(slots), out.shape[-1]) if logits is None else logits
                logits[rows] = out
        assert logits is not None
        finite = torch.isfinite(logits.sum(-1))  # a sum is finite only if every term is
        if not bool(finite.all()):
            bad = [slot for slot, good in zip(slots, finite.tolist(), strict=True) if not good]
            for slot in bad:
                self._cache.wipe(slot)  # a NaN left behind would spread: 0 * NaN is NaN
                self.reset(slot)
            raise ModelError(f"logits are not finite in slots {bad}; the weights or the input are damaged")
        return logits

    def reset(self, slot: int) -> None:
        """Forget the slot's sequence."""
        self.held[slot] = []

    def shared(self, slot: int, tokens: Sequence[int]) -> int:
        """How many tokens `slot` and `tokens` have in common at their beginnings."""
        held = self.held[slot]
        return next(
            (i for i, (ours, theirs) in enumerate(zip(held, tokens, strict=False)) if ours != theirs),
            min(len(held), len(tokens)),
        )

    @torch.inference_mode()
    def start(self, slot: int, tokens: Sequence[int]) -> None:
        """Let `slot` hold as much of the beginning of `tokens` as some slot does, without computing it again.

        The last token is never taken over: reading it gives the logits of the next.
        """
        source = max(range(self.slots), key=lambda other: (self.shared(other, tokens), other == slot))
        length = min(self.shared(source, tokens), len(tokens) - 1)
        if source != slot:
            self._cache.copy_prefix(source, slot, length)
        self.held[slot] = list(tokens[:length])

    def _prefill(self, slots: list[int], tokens: list[list[int]]) -> Tensor:
        """Read the rows in chunks that bound memory; returns the logits after each row's last token."""
        width = max(1, PREFILL_TOKENS // len(slots))
        steps = max(map(len, tokens))
        begins = range((steps - 1) % width + 1 - width, steps, width)  # the first chunk is the short one
        for begin in begins:
            # Rows stand at the right, so that the last chunk holds every row's last token.
            chunk = [
                new[max(0, n + begin) : max(0, n + begin + width)]
                for new in tokens
                for n in [len(new) - steps]
            ]
            rows = [i for i, part in enumerate(chunk) if part]
            out = self._call([slots[i] for i in rows], [chunk[i] for i in rows])
        return out

    def _call(self, slots: list[int], tokens: list[list[int]]) -> Tensor:
        """One model call; new tokens stand at the right of each row, so the last step is every row's last."""
        steps = max(map(len, tokens))
        starts = [len(self.held[slot]) for slot in slots]
        keys = max(start + len(new) for start, new in zip(starts, tokens, strict=True))
        self._cache.grow(keys)
        pads = [steps - len(new) for new in tokens]
        ids = torch.tensor(
            [[0] * pad + new for pad, new in zip(pads, tokens, strict=True)], device=self.device
        )
        offset = torch.tensor([s - p for s, p in zip(starts, pads, strict=True)], device=self.device)
        real = torch.arange(steps, device=self.device) >= torch.tensor(pads, device=self.device)[:, None]
        positions = (offset[:, None] + torch.arange(steps, device=self.device)).clamp_min(0)  # [B, T]
        mask = torch.arange(keys, device=self.device) <= positions[:, :, None]  # [B, T, L]
        rows, at = real.nonzero(as_tuple=True)
        contiguous = slots == list(range(slots[0], slots[0] + len(slots)))
        self._cache.batch = _Batch(
            slots=torch.tensor(slots, device=self.device),
            whole=slice(slots[0], slots[0] + len(slots)) if contiguous else None,
            token_rows=rows,
            token_steps=at,
            token_positions=positions[rows, at],
            keys=keys,
        )
        out = self.model(
            input_ids=ids,
            attention_mask=mask[:, None],
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        for slot, new in zip(slots, tokens, strict=True):
            self.held[slot].extend(new)
        self.calls += 1
        logits: Tensor = out.logits[:, -1].float()
        return logits


def _alike(lengths: list[int]) -> list[list[int]]:
    """Rows grouped so that padding to the longest row of a group at most doubles its tokens.

    A row that decodes one token beside a row that reads a prompt would be padded to that prompt's length.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[i] <= 2 * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [sorted(group) for group in groups]
