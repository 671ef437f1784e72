"""Keys and values of every layer in blocks of positions, written and read by transformers' layers.

Leaves out which blocks a slot holds (`decoders.blocks`) and the attention itself (`decoders.attention`).
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from viaticum.decoders.blocks import BLOCK, BlockPool
from viaticum.errors import ModelError

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0)  # addresses take no memory before they are written
GIVE_BACK = 16  # blocks that a slot has used and dropped before their memory returns to the system


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Where the new tokens of one model call are written.

    where: address of each new token, int64 [N], or a range of a call with one row.
    keys: number of keys of the longest row.
    """

    where: Tensor | slice
    keys: int


class BlockCache(Cache):
    """Keys and values of every layer, [addresses, kv_heads, head_dim]; an address is a position of a block.

    transformers calls `update` once per layer. It writes the new tokens of the current batch and returns all
    of the layer's blocks, [blocks, kv_heads, BLOCK, head_dim], or with blocks in place its slots, [slots,
    kv_heads, positions, head_dim]; the attention function selects its rows. No address keeps a NaN, because a
    masked position still enters the product as 0 * v.
    """

    def __init__(self, pool: BlockPool) -> None:
        super().__init__(layers=[])  # transformers' own layers stay unused: `update` below replaces them
        self.pool = pool
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.batch: BatchLayout | None = None
        self._maps: list[tuple[mmap.mmap, int]] = []  # memory of a layer, bytes of a position
        self._used = [0] * pool.slots  # blocks of each slot that have memory

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write key and value states [1, kv_heads, N, head_dim] of one layer; returns the whole layer."""
        batch = self.batch
        assert batch is not None, "the runner sets the batch before it calls the model"
        self.allocate(layer_idx, key_states, value_states)
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if isinstance(batch.where, slice):  # a plain copy is much cheaper than writing by index
            keys[batch.where], values[batch.where] = (
                key_states[0].transpose(0, 1),
                value_states[0].transpose(0, 1),
            )
        else:
            where = batch.where.to(keys.device)
            keys.index_copy_(0, where, key_states[0].transpose(0, 1))
            values.index_copy_(0, where, value_states[0].transpose(0, 1))
        return self._rows(keys), self._rows(values)

    def allocate(self, layer_idx: int, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the layers up to `layer_idx`, with the heads and widths of these states."""
        while len(self.keys) <= layer_idx:
            maps = len(self._maps)
            try:
                keys, values = self._empty(key_states), self._empty(value_states)
            except (OSError, MemoryError, RuntimeError) as error:  # a layer has both or none
                del self._maps[maps:]
                if isinstance(error, OSError):  # of mmap, where addresses are limited too
                    raise MemoryError(str(error)) from None
                raise
            self.keys.append(keys)
            self.values.append(values)

    def extend(self, slot: int, start: int, end: int) -> None:
        """Give a slot blocks for the positions from `start` to `end`.

        Raises:
            OutOfBlocks: as `BlockPool.extend`.
        """
        copied = self.pool.extend(slot, start, end)
        self._used[slot] = max(self._used[slot], self.pool.count(slot))
        if copied is not None:
            self._copy(copied[0] * BLOCK, copied[1] * BLOCK, BLOCK)

    def cut(self, slot: int, length: int) -> None:
        """Drop what a slot holds beyond `length` positions."""
        if self.pool.cut(slot, length) and self._used[slot] - self.pool.count(slot) >= GIVE_BACK:
            self._give_back(slot)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Let a slot begin with the first `length` positions of another one; whole blocks are shared.

        Raises:
            OutOfBlocks: the rest cannot be copied; the slot is then empty.
        """
        self.cut(target, 0)
        shared = self.pool.share(source, target, length)
        try:
            self.extend(target, shared, length)
        except ModelError:
            self.cut(target, 0)
            raise
        if shared < length:
            self._copy(self.address(source, shared), self.address(target, shared), length - shared)

    def wipe(self, slot: int) -> None:
        """Fill the blocks that only this slot holds with zeros."""
        for block in self.pool.owned(slot):
            for layer in (*self.keys, *self.values):
                layer[block * BLOCK : (block + 1) * BLOCK] = 0

    def address(self, slot: int, position: int) -> int:
        """Where a position of a slot is; in place, later positions follow."""
        return int(self.pool.table[slot, position // BLOCK]) * BLOCK + position % BLOCK

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.batch is None else self.batch.keys

    @property
    def is_compileable(self) -> bool:
        return False

    def _rows(self, layer: Tensor) -> Tensor:
        size = self.pool.per_slot * BLOCK if self.pool.in_place else BLOCK
        return layer.view(-1, size, *layer.shape[1:]).transpose(1, 2)

    def _copy(self, source: int, target: int, count: int) -> None:
        for layer in (*self.keys, *self.values):
            layer[target : target + count] = layer[source : source + count]

    def _empty(self, like: Tensor) -> Tensor:
        shape = (self.pool.addresses * BLOCK, like.shape[1], like.shape[-1])
        if not self.pool.in_place or like.device.type != "cpu" or not hasattr(mmap, "MADV_DONTNEED"):
            return like.new_zeros(shape)
        row = like.shape[1] * like.shape[-1] * like.element_size()
        memory = mmap.mmap(-1, shape[0] * row, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        self._maps.append((memory, row))
        return torch.frombuffer(memory, dtype=like.dtype).view(shape)

    def _give_back(self, slot: int) -> None:
        """Return the memory of the blocks that a slot in place has dropped to the system."""
        first, last = self.pool.count(slot), self._used[slot]
        self._used[slot] = first
        base = slot * self.pool.per_slot
        for memory, row in self._maps:
            begin = -(-(base + first) * BLOCK * row // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (base + last) * BLOCK * row // mmap.PAGESIZE * mmap.PAGESIZE
            if end > begin:
                memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)
