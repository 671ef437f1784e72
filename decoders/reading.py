"""What a model has to read for the texts that wait for it, in one call; and who is given up where memory is short.

A sequence starts from what any slot still holds, and what several new texts begin with is computed once.
Knows nothing of sampling, routing or who writes.
"""

from __future__ import annotations

from viaticum.decoders.runner import Runner, RunnerOutput, shared_length
from viaticum.decoders.sequence_state import LARGE, SequenceState
from viaticum.decoders.stats import CallStats
from viaticum.errors import ModelError

SHARED_PREFIX = 16  # prompts that share fewer tokens than this are read apart


def read_unseen(
    runner: Runner, model: int, texts: list[SequenceState], calls: CallStats, *, hidden: bool = False
) -> tuple[RunnerOutput | None, list[SequenceState], list[tuple[SequenceState, ModelError]]]:
    """Let a model read what it has not seen of these texts.

    The large model tells what follows the kept text and each token of its draft, the small one what follows
    the draft's last. Returns that, the texts that it is about, and those given up for want of memory: of many
    rows the one that asks for most, as often as it takes.
    """
    failed: list[tuple[SequenceState, ModelError]] = []
    while texts:
        before = runner.calls
        try:
            calls.tokens += _start(runner, model, [text for text in texts if model not in text.readers])
            seen = [len(text.tokens) if model == LARGE else len(text.sequence) for text in texts]
            new = [_unread(runner, text, length) for text, length in zip(texts, seen, strict=True)]
            keep = [len(text.sequence) - length + 1 for text, length in zip(texts, seen, strict=True)]
            heads = runner.read([text.slot for text in texts], new, keep, hidden=hidden)
        except ModelError as error:
            text = _greediest(runner, texts)
            failed.append((text, error))
            texts = [each for each in texts if each is not text]
        else:
            calls.tokens += sum(map(len, new))
            calls.calls += runner.calls - before
            return heads, texts, failed
    return None, [], failed


def _start(runner: Runner, model: int, texts: list[SequenceState]) -> int:
    """Start texts at a model, from what its slots still hold; returns how many tokens of their prefix it read."""
    prefix = _shared_prefix([text.tokens for text in texts])
    read = 0
    for text in texts:
        runner.start(text.slot, text.sequence)
        text.readers.add(model)
        if not runner.rotates_alike(len(text.sequence)):
            continue  # its prefix is read with the rest
        if new := prefix[len(runner.held[text.slot]) :]:
            runner.read([text.slot], [new])
            read += len(new)
    return read


def _unread(runner: Runner, text: SequenceState, seen: int) -> list[int]:
    """The tokens to read in order to tell what follows the first `seen` ones, and each after them."""
    runner.truncate(text.slot, seen - 1)  # the last of them is read again where it was read in vain
    return text.sequence[len(runner.held[text.slot]) :]


def _greediest(runner: Runner, texts: list[SequenceState]) -> SequenceState:
    """Whom to give up for want of memory: the longest text if the cache has to grow, else the one that reads most."""
    longest = max(texts, key=lambda text: len(text.sequence))
    if len(longest.sequence) > runner.capacity:
        return longest
    return max(texts, key=lambda text: len(text.sequence) - len(runner.held[text.slot]))


def _shared_prefix(texts: list[list[int]]) -> list[int]:
    """What all texts begin with, less one token, so that each still has something to read."""
    if len(texts) < 2:
        return []
    # Sorted as words are, the first and the last have least in common.
    first, last = min(texts), max(texts)
    length = min(shared_length(first, last), min(map(len, texts)) - 1)
    return list(first[:length]) if length >= SHARED_PREFIX else []
