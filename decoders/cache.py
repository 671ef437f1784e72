"""The KV cache of a runner: one slot a sequence, all slots of a layer in one tensor.

Replaces the layers of transformers' `Cache`; the attention function (`decoders.attention`) reads the slots in
place. Leaves out which slot belongs to which sequence (`decoders.runner`, `decoders.slots`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache

FIRST_CAPACITY = 512  # positions allocated at first; doubled when a sequence needs more


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Cache positions of the new tokens of one model call.

    token_slots, token_positions: slot and position of each new token, int64 [N].
    single_row: (slot, all heads, new positions) of a call with one row, else None.
    keys: number of keys of the longest row.
    """

    token_slots: Tensor
    token_positions: Tensor
    single_row: tuple[int, slice, slice] | None
    keys: int


class SlotCache(Cache):
    """Keys and values of every layer, [slots, kv_heads, capacity, head_dim]; zero where nothing was written.

    transformers calls `update` once per layer. It writes the new tokens of the current batch and returns the
    keys and values of all slots; the attention function selects its rows. Unwritten positions have to be
    zero, because a masked position still enters the product as 0 * v.
    """

    def __init__(self, slots: int) -> None:
        super().__init__(layers=[])  # transformers' own layers stay unused: `update` below replaces them
        self.slots = slots
        self.capacity = FIRST_CAPACITY
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.batch: BatchLayout | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write key and value states [1, kv_heads, N, head_dim] of one layer; returns those of all slots."""
        batch = self.batch
        assert batch is not None, "the runner sets the batch before it calls the model"
        while len(self.keys) <= layer_idx:
            self.keys.append(self._empty(key_states))
            self.values.append(self._empty(value_states))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if batch.single_row is not None:  # a plain copy is much cheaper than writing by index
            keys[batch.single_row], values[batch.single_row] = key_states[0], value_states[0]
        else:
            where = (batch.token_slots, slice(None), batch.token_positions)
            keys[where], values[where] = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        return keys, values

    def grow(self, positions: int) -> None:
        """Allocate at least `positions` positions in every slot."""
        if positions <= self.capacity:
            return
        while self.capacity < positions:
            self.capacity *= 2
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                if (
                    old.shape[2] < self.capacity
                ):  # else an earlier, interrupted growth has replaced it already
                    store[layer] = self._empty(old)
                    store[layer][:, :, : old.shape[2]] = old

    def shrink(self, capacity: int, *, complete: bool) -> None:
        """Set the capacity to what is allocated after a failed allocation.

        complete: whether every layer had been allocated before the failure; otherwise all layers are dropped.
        """
        if not complete:
            self.keys, self.values = [], []
        self.capacity = min((layer.shape[2] for layer in (*self.keys, *self.values)), default=capacity)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for store in (self.keys, self.values):
            for layer in store:
                layer[target, :, :length] = layer[source, :, :length]

    def wipe(self, slot: int) -> None:
        """Fill a slot with zeros."""
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
