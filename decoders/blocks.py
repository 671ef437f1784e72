"""Which blocks of a KV cache hold the positions of which slot. Bookkeeping on the host: moves no tensor.

Paged attention (Kwon et al., arXiv 2309.06180): a sequence holds blocks of `BLOCK` positions, as many as its
tokens need, and sequences that begin alike hold the same blocks, counted, until one of them writes there
(copy on write). Two placements: "anywhere" takes any free block from one pool; "in place" gives block i of a
slot a fixed address, so that a slot is read without a copy, and counts blocks in use, where the operating
system maps memory page by page as it is written (as vAttention does on GPUs, arXiv 2405.04437).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from viaticum.errors import ModelError

BLOCK = 32  # positions


class OutOfBlocks(ModelError):
    """Other sequences hold the blocks that a call needs; nothing was changed."""


class BlockPool:
    """The blocks of every slot.

    Attributes:
        table: block of each `BLOCK` positions of each slot, int64 [slots, blocks of a context].
        free: blocks that no slot holds.
        in_place: see the module.

    Args:
        slots: sequences at once.
        context: positions of a sequence.
        blocks: that may be in use at once; None: all contexts at once.
        in_place: place blocks at fixed addresses, which shares none.
    """

    def __init__(self, slots: int, context: int, blocks: int | None = None, *, in_place: bool) -> None:
        self.slots, self.in_place = slots, in_place
        self.per_slot = blocks_of(context)
        whole = slots * self.per_slot
        self.limit = whole if blocks is None else min(blocks, whole)
        self.free = self.limit
        addresses = np.arange(whole, dtype=np.int64).reshape(slots, -1)
        self.table: NDArray[np.int64] = addresses if in_place else np.zeros_like(addresses)
        self._counts = [0] * slots  # blocks that each slot holds
        self._unused = [] if in_place else list(range(self.limit - 1, -1, -1))
        self._references = [0] * (0 if in_place else self.limit)

    @property
    def addresses(self) -> int:
        """Blocks that have an address."""
        return self.table.size if self.in_place else self.limit

    def count(self, slot: int) -> int:
        """Blocks that a slot holds."""
        return self._counts[slot]

    def missing(self, slot: int, start: int, end: int) -> int:
        """Blocks that a slot lacks to write the positions from `start` to `end`."""
        new = max(0, blocks_of(end) - self._counts[slot])
        return new + (self._shared_block(slot, start) is not None)

    def extend(self, slot: int, start: int, end: int) -> tuple[int, int] | None:
        """Give a slot blocks of its own for the positions from `start` to `end`.

        Returns:
            (from, to), the block to copy because other slots hold it too, if there is one.

        Raises:
            OutOfBlocks: `missing` exceeds `free`.
        """
        if self.missing(slot, start, end) > self.free:
            raise OutOfBlocks(
                f"not enough memory for {end} positions: all but {self.free} of {self.limit} blocks of "
                f"{BLOCK} are in use"
            )
        copied = self._shared_block(slot, start)
        if copied is not None:
            old = int(self.table[slot, copied])
            self._references[old] -= 1
            self.table[slot, copied] = self._take()
        for index in range(self._counts[slot], blocks_of(end)):
            if self.in_place:
                self.free -= 1
            else:
                self.table[slot, index] = self._take()
        self._counts[slot] = max(self._counts[slot], blocks_of(end))
        return None if copied is None else (old, int(self.table[slot, copied]))

    def cut(self, slot: int, length: int) -> int:
        """Drop what a slot holds beyond `length` positions; returns how many blocks."""
        keep, held = blocks_of(length), self._counts[slot]
        if keep >= held:
            return 0
        if self.in_place:
            self.free += held - keep
        else:
            for block in self.table[slot, keep:held].tolist():
                self._references[block] -= 1
                if not self._references[block]:
                    self._unused.append(block)
                    self.free += 1
        self._counts[slot] = keep
        return held - keep

    def share(self, source: int, target: int, length: int) -> int:
        """Let `target`, which is empty, hold the whole blocks of the first `length` positions of `source`.

        Returns the number of positions that it holds then; the others have to be copied.
        """
        if self.in_place:
            return 0
        whole = min(length // BLOCK, self._counts[source])
        self.table[target, :whole] = self.table[source, :whole]
        for block in self.table[target, :whole].tolist():
            self._references[block] += 1
        self._counts[target] = whole
        return whole * BLOCK

    def rows(self, slots: Sequence[int], blocks: int | None = None) -> NDArray[np.int64]:
        """The blocks of each of these slots, int64 [len(slots), blocks], by default those of the longest.

        Behind its last block a row repeats its first, which nobody else can damage during a call.
        """
        most = blocks or max(self._counts[slot] for slot in slots)
        found = self.table[list(slots), :most]  # a copy
        for row, slot in enumerate(slots):
            found[row, self._counts[slot] :] = found[row, 0]
        return found

    def owned(self, slot: int) -> list[int]:
        """The blocks that no other slot holds."""
        held: list[int] = self.table[slot, : self._counts[slot]].tolist()
        return held if self.in_place else [block for block in held if self._references[block] == 1]

    def _take(self) -> int:
        block = self._unused.pop()
        self._references[block] = 1
        self.free -= 1
        return block

    def _shared_block(self, slot: int, start: int) -> int | None:
        """Index of the block that position `start` is in, if others hold it too and it is written to."""
        index = start // BLOCK
        if self.in_place or index >= self._counts[slot]:
            return None
        # Blocks after it are cut before a slot is written to.
        return index if self._references[self.table[slot, index]] > 1 else None


def blocks_of(positions: int) -> int:
    """Blocks that hold so many positions."""
    return -(-positions // BLOCK)
