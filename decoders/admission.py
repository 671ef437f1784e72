"""Which sequences of an engine hold a slot: admission, and preemption where memory runs out.

Requests start first come first served, each as soon as a slot is free and every model has memory for its
prompt. When a call finds too few blocks, the youngest sequence gives its slot up and waits before all
requests; its tokens are kept, and read again once there is room (recomputation, Kwon et al., arXiv
2309.06180, section 4.5). The oldest is never preempted while others are active, so that every one ends.
Leaves out what is decoded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence

from viaticum.decoders.catch_up import MIN_SHARED_PREFIX
from viaticum.decoders.config import DecoderConfig
from viaticum.decoders.request import Request
from viaticum.decoders.runner import Runner
from viaticum.decoders.sequence_state import SequenceState
from viaticum.decoders.speculate import DraftLength

MARGIN = 32  # positions beyond its tokens that a sequence needs to start, and every active one keeps


class Admission:
    """The requests and preempted sequences that wait; a runner may serve other engines at the same time.

    Attributes:
        config: of the engine.
        sequences: preempted, or next to start; they wait before all requests, by age.
        preemptions: how often a sequence had to give its slot up.
    """

    def __init__(self, config: DecoderConfig) -> None:
        self.config = config
        self._requests: deque[tuple[int, Request]] = deque()
        self.sequences: list[SequenceState] = []
        self._choice: tuple[int, list[int], int] = (-1, [], -1)  # index, free slots, the slot chosen of them
        self.preemptions = 0

    def __len__(self) -> int:
        return len(self._requests) + len(self.sequences)

    def add(self, requests: Iterable[tuple[int, Request]]) -> None:
        """Queue requests with their indices, which increase."""
        self._requests.extend(requests)

    def withdraw(self, indices: Collection[int]) -> list[SequenceState]:
        """Take out what waits with one of these indices."""
        found = [each for each in self.sequences if each.index in indices]
        self.sequences = [each for each in self.sequences if each.index not in indices]
        found += [self._new(*each) for each in self._requests if each[0] in indices]
        self._requests = deque(each for each in self._requests if each[0] not in indices)
        return found

    def clear(self) -> None:
        self._requests.clear()
        self.sequences.clear()

    def free_slots(self) -> list[int]:
        """Slots that are free in every runner, the longest free first."""
        first, *others = self._runners
        return [slot for slot in first.free_slots if all(slot in each.free_slots for each in others)]

    def admit(self, active: Sequence[SequenceState]) -> SequenceState | None:
        """Give the one that waits longest a slot; None if none waits, or it does not fit beside `active`."""
        free = self.free_slots() if len(self) else []
        if not free:
            return None
        if not self.sequences:
            self.sequences.append(self._new(*self._requests.popleft()))
        sequence = self.sequences[0]
        slot = self._choose(free, sequence)
        rooms = []
        for model, runner in self.config.runners.items():
            lengths = {each.slot: _room_for(each, model) for each in active}
            rooms.append(runner.make_room(lengths | {slot: _room_for(sequence, model)}))
        if not all(rooms):
            return None
        for runner in self._runners:
            runner.free_slots.remove(slot)
        sequence.slot = slot
        return self.sequences.pop(0)

    def release(self, sequence: SequenceState) -> None:
        """Return the slot of a sequence to every runner; what it holds stays reusable."""
        for runner in self._runners:
            runner.idle(sequence.slot)
            runner.free_slots.append(sequence.slot)

    def is_alone(self, active: Sequence[SequenceState]) -> bool:
        """Whether a single sequence holds the only slot in use, so that no other has memory to give."""
        return len(active) == 1 and all(len(each.free_slots) == each.slots - 1 for each in self._runners)

    def preempt(self, active: list[SequenceState]) -> SequenceState:
        """Have the youngest of `active` give its slot up and wait; its tokens and its draft are kept."""
        sequence = max(active, key=lambda each: each.index)
        active.remove(sequence)
        self.release(sequence)
        sequence.slot = -1
        sequence.prefilled.clear()
        self.sequences = sorted([*self.sequences, sequence], key=lambda each: each.index)
        self.preemptions += 1
        return sequence

    @property
    def _runners(self) -> Collection[Runner]:
        return self.config.runners.values()

    def _choose(self, free: list[int], sequence: SequenceState) -> int:
        """The free slot with the longest prefix of a sequence over all models, then the longest free.

        A few tokens, such as those with which a chat template begins, are no reason to give up what a slot
        holds while another has been free for longer.
        """
        if self._choice[:2] != (sequence.index, free):
            runners = self.config.runners.items()
            texts = [(runner, sequence.unread(model, 0)) for model, runner in runners]

            def cached(slot: int) -> int:
                length = sum(runner.cached_prefix_length(slot, text) for runner, text in texts)
                return length if length >= MIN_SHARED_PREFIX else 0

            self._choice = (sequence.index, free, max(free, key=cached))
        return self._choice[2]

    def _new(self, index: int, request: Request) -> SequenceState:
        config = self.config
        draft_length = DraftLength(config.draft, config.relative_draft_cost)
        return SequenceState(index, request, config.tokenizer, config.loop_guard, draft_length)


def _room_for(sequence: SequenceState, model: int) -> int:
    """Positions of a model that a sequence is to have room for now."""
    most = sequence.length(model) + sequence.remaining
    return min(most, sequence.length_with_draft(model) + MARGIN)
