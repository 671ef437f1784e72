"""The large model's texts for labels: its responses, and how it would go on from another token.

Continuations are written question by question, the longest prefix first: then some slot always holds what the next
one begins with, and reading it again is not needed (`Runner.start`). Knows no verifier and no file.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from viaticum.decoders import Event, MixedDecoder, Request
from viaticum.decoders.runner import shared_length
from viaticum.training.label_journal import SENTENCE, Continuation
from viaticum.training.sentences import has_ended


@dataclass(frozen=True, slots=True)
class Start:
    """Where a text is to be written from: a question's id, the tokens before it, and how many more at most.

    place, token: of a continuation, the token of the response that `token` takes the place of. before: what was
    written of it already. context: the response up to the place, as text.
    """

    id: str
    prompt: Sequence[int]
    most: int
    place: int = -1
    token: int = -1
    before: tuple[int, ...] = ()
    response: tuple[int, ...] = ()
    whole: bool = True  # to the end of the text, not to a sentence's end alone

    @property
    def sequence(self) -> list[int]:
        if self.place < 0:
            return list(self.prompt)
        return [*self.prompt, *self.response[: self.place], self.token, *self.before]


@dataclass(slots=True)
class Work:
    """What a stage took. needed: tokens that differ from all others' beginnings; unshared: were nothing kept."""

    texts: int = 0
    read: int = 0
    needed: int = 0
    unshared: int = 0
    made: int = 0
    seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, name) + getattr(other, name) for name in Work.__slots__))


Ended = tuple[Start, tuple[int, ...], str]  # where it began, its tokens, how it ended


def write(
    decoder: MixedDecoder,
    starts: Iterable[Start],
    *,
    stop: tuple[str, ...] = (),
    sentence_cap: int,
    work: Work,
) -> Iterator[Ended]:
    """Texts from these places on, as each ends; adds up what they took.

    Those that are not wanted whole end at the second sentence end after their place, or after `sentence_cap` tokens.
    Raises what made a text fail, once it is met; those before it were given.
    """
    engine = decoder.engine()
    pending, active = deque(_ordered(starts)), dict[int, Start]()
    watches: dict[int, _Watch] = {}
    began, read = time.perf_counter(), decoder.stats.large.tokens
    sequences: list[list[int]] = []
    try:
        while pending or active:
            for start in _admitted(pending, decoder.slots - len(active), set(map(_of, active.values()))):
                most = start.most if start.whole else min(start.most, sentence_cap)
                number = engine.add(Request(start.sequence, max_new_tokens=most, stop=stop))
                active[number] = start
                if not start.whole:
                    watches[number] = _Watch(decoder.tokenizer.decode, start)
            for event in engine.step():
                if _is_over(event, watches):
                    engine.abort(event.index)
                if event.result is None:
                    continue
                if event.result.error is not None:
                    raise event.result.error
                start, tokens = active.pop(event.index), event.result.trace.tokens
                watched = watches.pop(event.index, None)
                finish: str = event.result.finish_reason
                if watched is not None and finish in ("aborted", "length"):
                    finish = SENTENCE
                sequences.append([*start.sequence, *tokens[:-1]])
                work.texts += 1
                work.made += len(tokens)
                yield start, start.before + tokens, finish
    finally:
        engine.close()
        work.seconds += time.perf_counter() - began
        work.read += decoder.stats.large.tokens - read
        work.needed += distinct_tokens(sequences)
        work.unshared += sum(map(len, sequences))


def branch_of(ended: Ended) -> Continuation:
    start, tokens, finish = ended
    return Continuation(start.id, start.place, start.token, tokens, finish)


def distinct_tokens(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens that have to be read where every common beginning is read once."""
    ordered = sorted(sequences, key=list)
    shared = (shared_length(a, b) for a, b in pairwise(ordered))
    return sum(map(len, ordered)) - sum(shared)


def _ordered(starts: Iterable[Start]) -> list[Start]:
    """Questions as they come, of each the longest prefix first."""
    places: dict[str, int] = {}
    starts = list(starts)
    for start in starts:
        places.setdefault(start.id, len(places))
    return sorted(starts, key=lambda start: (places[start.id], -len(start.sequence)))


def _admitted(pending: deque[Start], free: int, active: set[str]) -> Iterator[Start]:
    """The next texts. After the first of a question none follows in this step: the others begin with what it reads."""
    while pending and free > 0:
        start = pending.popleft()
        yield start
        free -= 1
        if start.place >= 0 and start.id not in active:
            return


def _of(start: Start) -> str:
    return start.id


class _Watch:
    """Whether a continuation has reached the second sentence end after its place."""

    def __init__(self, decode: Callable[[list[int]], str], start: Start) -> None:
        self._decode, self._tokens = decode, [*start.response[: start.place], start.token, *start.before]
        self._at = len(decode(list(start.response[: start.place])).rstrip("\ufffd"))
        self.over = False

    def push(self, token: int) -> bool:
        """Whether it has been reached now, with one more token."""
        self._tokens.append(token)
        self.over = has_ended(self._decode(self._tokens), self._at)
        return self.over


def _is_over(event: Event, watches: dict[int, _Watch]) -> bool:
    watch = watches.get(event.index)
    if watch is None or watch.over or event.token is None or event.result is not None:
        return False
    return watch.push(event.token)
