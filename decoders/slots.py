"""The slots of several runners as one: a text sits in the same slot of each. Knows nothing of what is written."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from viaticum.decoders.runner import Runner


class SlotAllocator:
    """Slots that are free at every runner; a runner may serve other decoders at the same time."""

    def __init__(self, runners: Collection[Runner]) -> None:
        self._runners = runners

    def free(self) -> list[int]:
        first, *others = self._runners
        return [slot for slot in first.free if all(slot in each.free for each in others)]

    def take(self, free: list[int], prompt: Sequence[int]) -> int:
        """Of the free slots the one that has read most of the prompt; of equals the one free for longest."""
        slot = max(free, key=lambda slot: sum(each.shared(slot, prompt) for each in self._runners))
        free.remove(slot)
        for runner in self._runners:
            runner.free.remove(slot)
        return slot

    def give(self, slot: int) -> None:
        for runner in self._runners:
            runner.free.append(slot)
