"""The large model's texts for labels: its responses, and how it continues from another token.

Continuations are generated question by question, the longest prefix first: some slot then holds what the next
one begins with, so that it need not be read again (`Runner.start`). Leaves out verifiers and files.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from viaticum.decoders import Event, MixedDecoder, Request
from viaticum.decoders.runner import common_prefix_length
from viaticum.training.label_journal import SENTENCE, Continuation
from viaticum.training.sentences import has_ended


@dataclass(frozen=True, slots=True)
class GenerationTask:
    """A text to generate: a response, or a continuation of one from a replaced token.

    Args:
        id: of the question.
        prompt: token ids before the response.
        max_new_tokens: most tokens to generate.
        position: index of the replaced token in the response; -1 for a response.
        token: the token that replaces it.
        written: tokens of the continuation that an earlier run generated.
        response: tokens of the whole response.
        complete: generate to the end of the text, not only to the end of a sentence.
    """

    id: str
    prompt: Sequence[int]
    max_new_tokens: int
    position: int = -1
    token: int = -1
    written: tuple[int, ...] = ()
    response: tuple[int, ...] = ()
    complete: bool = True

    @property
    def prefix(self) -> list[int]:
        """All token ids before the first one to generate."""
        if self.position < 0:
            return list(self.prompt)
        return [*self.prompt, *self.response[: self.position], self.token, *self.written]


@dataclass(slots=True)
class StageStats:
    """What a stage computed. The names are those in the manifest.

    Args:
        texts: texts generated or judged.
        read: prompt tokens read.
        needed: prompt tokens to read where every common prefix is read once.
        unshared: prompt tokens to read where no prefix is shared.
        made: tokens generated.
        seconds: wall time.
    """

    texts: int = 0
    read: int = 0
    needed: int = 0
    unshared: int = 0
    made: int = 0
    seconds: float = 0.0

    def __add__(self, other: StageStats) -> StageStats:
        return StageStats(*(getattr(self, name) + getattr(other, name) for name in StageStats.__slots__))


FinishedText = tuple[GenerationTask, tuple[int, ...], str]  # task, tokens (those written before too), finish


def generate(
    decoder: MixedDecoder,
    tasks: Iterable[GenerationTask],
    *,
    stop: tuple[str, ...] = (),
    sentence_cap: int,
    stats: StageStats,
) -> Iterator[FinishedText]:
    """Generate texts, yield each as it ends, and add to `stats`.

    Texts that need not be complete end at the second sentence end after their position, or after
    `sentence_cap` tokens.

    Raises:
        ViaticumError: the error of a failed text; texts that ended before it were yielded.
    """
    engine = decoder.engine()
    pending, active = deque(_in_reuse_order(tasks)), dict[int, GenerationTask]()
    limits: dict[int, _SentenceLimit] = {}
    started, read_before = time.perf_counter(), decoder.stats.large.tokens
    sequences: list[list[int]] = []
    try:
        while pending or active:
            active_ids = {task.id for task in active.values()}
            for task in _next_tasks(pending, decoder.slots - len(active), active_ids):
                most = task.max_new_tokens if task.complete else min(task.max_new_tokens, sentence_cap)
                number = engine.add(Request(task.prefix, max_new_tokens=most, stop=stop))
                active[number] = task
                if not task.complete:
                    limits[number] = _SentenceLimit(decoder.config.tokenizer.decode, task)
            for event in engine.step():
                if _reaches_limit(event, limits):
                    engine.abort(event.index)
                if event.result is None:
                    continue
                if event.result.error is not None:
                    raise event.result.error
                task, tokens = active.pop(event.index), event.result.trace.tokens
                limited = limits.pop(event.index, None) is not None
                finish: str = event.result.finish_reason
                if limited and finish in ("aborted", "length"):
                    finish = SENTENCE
                sequences.append([*task.prefix, *tokens[:-1]])
                stats.texts += 1
                stats.made += len(tokens)
                yield task, task.written + tokens, finish
    finally:
        engine.close()
        stats.seconds += time.perf_counter() - started
        stats.read += decoder.stats.large.tokens - read_before
        stats.needed += distinct_tokens(sequences)
        stats.unshared += sum(map(len, sequences))


def to_continuation(finished: FinishedText) -> Continuation:
    task, tokens, finish = finished
    return Continuation(task.id, task.position, task.token, tokens, finish)


def distinct_tokens(sequences: Sequence[Sequence[int]]) -> int:
    """Return the tokens to read where every common prefix is read once."""
    ordered = sorted(sequences, key=list)
    shared = (common_prefix_length(a, b) for a, b in pairwise(ordered))
    return sum(map(len, ordered)) - sum(shared)


def _in_reuse_order(tasks: Iterable[GenerationTask]) -> list[GenerationTask]:
    """Questions in the given order; of each question the longest prefix first."""
    order: dict[str, int] = {}
    tasks = list(tasks)
    for task in tasks:
        order.setdefault(task.id, len(order))
    return sorted(tasks, key=lambda task: (order[task.id], -len(task.prefix)))


def _next_tasks(
    pending: deque[GenerationTask], free_slots: int, active_ids: set[str]
) -> Iterator[GenerationTask]:
    """The next tasks. The first continuation of a question goes alone: the others reuse what it reads."""
    while pending and free_slots > 0:
        task = pending.popleft()
        yield task
        free_slots -= 1
        if task.position >= 0 and task.id not in active_ids:
            return


class _SentenceLimit:
    """Ends a continuation at the second sentence end after its position."""

    def __init__(self, decode: Callable[[list[int]], str], task: GenerationTask) -> None:
        self._decode = decode
        self._tokens = [*task.response[: task.position], task.token, *task.written]
        self._start = len(decode(list(task.response[: task.position])).rstrip("\ufffd"))  # in characters
        self.reached = False

    def push(self, token: int) -> bool:
        """Add a token; return whether the limit is reached with it."""
        self._tokens.append(token)
        self.reached = has_ended(self._decode(self._tokens), self._start)
        return self.reached


def _reaches_limit(event: Event, limits: dict[int, _SentenceLimit]) -> bool:
    limit = limits.get(event.index)
    if limit is None or limit.reached or event.token is None or event.result is not None:
        return False
    return limit.push(event.token)
