"""KV slot allocation over several runners, the same slot in each. Leaves out what is decoded."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from viaticum.decoders.runner import Runner


class SlotAllocator:
    """Allocates slots that are free in every runner; a runner may serve other decoders at the same time."""

    def __init__(self, runners: Collection[Runner]) -> None:
        self._runners = runners

    def free_slots(self) -> list[int]:
        """Slots that are free in every runner, the longest free first."""
        first, *others = self._runners
        return [slot for slot in first.free_slots if all(slot in each.free_slots for each in others)]

    def allocate(self, free: list[int], prompts: Sequence[Sequence[int]]) -> int:
        """Take from `free` the slot with the longest cached prefix of a text, then the longest free.

        prompts: of the text, one for each runner.
        """

        def cached(slot: int) -> int:
            pairs = zip(self._runners, prompts, strict=True)
            return sum(runner.cached_prefix_length(slot, prompt) for runner, prompt in pairs)

        slot = max(free, key=cached)
        free.remove(slot)
        for runner in self._runners:
            runner.free_slots.remove(slot)
        return slot

    def release(self, slot: int) -> None:
        """Return a slot to every runner; what it holds stays reusable."""
        for runner in self._runners:
            runner.idle(slot)
            runner.free_slots.append(slot)
