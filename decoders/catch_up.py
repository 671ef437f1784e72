"""Prefill and catch-up: one model call that reads the tokens a model has not seen of several sequences.

A new sequence reuses the longest cached prefix of any slot, and a prefix that several new sequences share is
computed once. If the memory is not enough, sequences are failed one by one until the call fits. Leaves out
sampling, routing and which model is active.
"""

from __future__ import annotations

import itertools

from viaticum.decoders.blocks import OutOfBlocks
from viaticum.decoders.runner import Runner, RunnerOutput, common_prefix_length
from viaticum.decoders.sequence_state import LARGE, SequenceState
from viaticum.decoders.stats import CallStats
from viaticum.decoders.vocabulary import SharedVocabulary
from viaticum.errors import ModelError, SequencesFailed

MIN_SHARED_PREFIX = 16  # fewer tokens that prompts share are read by each of them


def catch_up(
    runner: Runner,
    model: int,
    sequences: list[SequenceState],
    stats: CallStats,
    *,
    hidden: bool = False,
    vocabulary: SharedVocabulary | None = None,
) -> tuple[RunnerOutput | None, list[SequenceState], list[tuple[SequenceState, ModelError]]]:
    """Let a model read what it has not seen of these sequences, in one call.

    The large model returns the logits after the last kept token and after each draft token, the small one
    those after the last draft token.

    Args:
        runner: of the model.
        model: SMALL or LARGE.
        sequences: those to read; their prompts are prefilled if the model has not seen them.
        stats: of the model; its tokens and calls are counted up.
        hidden: also return the last hidden states.
        vocabulary: of the logits, see `Runner.forward`.

    Returns:
        The output, the sequences it is about, and those that failed: those that the runner names, or for lack
        of memory the largest consumer each time, as often as necessary.

    Raises:
        OutOfBlocks: sequences hold the memory that the call needs; it may be repeated with fewer.
    """
    failed: list[tuple[SequenceState, ModelError]] = []
    while sequences:
        calls_before = runner.calls
        try:
            stats.tokens += _prefill(
                runner, model, [each for each in sequences if model not in each.prefilled]
            )
            drafted = [len(each.draft) if model == LARGE else 0 for each in sequences]  # to verify
            new = [
                _unread(runner, model, each, draft) for each, draft in zip(sequences, drafted, strict=True)
            ]
            keep = [draft + 1 for draft in drafted]
            slots = [each.slot for each in sequences]
            output = runner.forward(slots, new, keep, hidden=hidden, vocabulary=vocabulary)
        except SequencesFailed as error:
            failed += [(each, error.failures[each.slot]) for each in sequences if each.slot in error.failures]
            sequences = [each for each in sequences if each.slot not in error.failures]
        except OutOfBlocks:
            raise
        except ModelError as error:
            victim = _largest_consumer(runner, model, sequences)
            failed.append((victim, error))
            runner.reset(victim.slot)  # what it holds may be what the others lack
            sequences = [each for each in sequences if each is not victim]
        else:
            stats.tokens += sum(map(len, new))
            stats.calls += runner.calls - calls_before
            return output, sequences, failed
    return None, [], failed


def _prefill(runner: Runner, model: int, sequences: list[SequenceState]) -> int:
    """Start sequences at a model, reusing cached prefixes; returns the shared prefix tokens that it read."""
    texts = [each.unread(model, 0) for each in sequences]
    shared = _shared_lengths(
        [text[: each.length(model)] for each, text in zip(sequences, texts, strict=True)]
    )
    read = 0
    for number in sorted(range(len(texts)), key=lambda each: -shared[each]):  # others begin as the longest do
        sequence, text = sequences[number], texts[number]
        runner.reuse_prefix(sequence.slot, text)
        sequence.prefilled.add(model)
        sequence.read_by.add(model)
        if not runner.has_stable_keys(len(text)):
            continue  # its prefix is read with the rest
        new = text[len(runner.cached_tokens[sequence.slot]) : shared[number]]
        if len(new) >= MIN_SHARED_PREFIX:
            runner.forward([sequence.slot], [new])
            read += len(new)
    return read


def _unread(runner: Runner, model: int, sequence: SequenceState, draft: int) -> list[int]:
    """Tokens to read for the logits after each of the last `draft` draft tokens and after the one before."""
    # The last token before them is read again if its logits were not used.
    runner.truncate(sequence.slot, sequence.length_with_draft(model) - draft - 1)
    return sequence.unread(model, len(runner.cached_tokens[sequence.slot]))


def _largest_consumer(runner: Runner, model: int, sequences: list[SequenceState]) -> SequenceState:
    """The sequence to fail out of memory: the one that reads most, of equals the longest."""

    def consumption(sequence: SequenceState) -> tuple[int, int]:
        length = sequence.length_with_draft(model)
        return length - len(runner.cached_tokens[sequence.slot]), length

    return max(sequences, key=consumption)


def _shared_lengths(prompts: list[list[int]]) -> list[int]:
    """How many tokens each prompt has in common with the one most like it, short of its last one."""
    order = sorted(range(len(prompts)), key=prompts.__getitem__)  # the most alike are neighbours
    lengths = [0] * len(prompts)
    for one, other in itertools.pairwise(order):
        length = common_prefix_length(prompts[one], prompts[other])
        for number in (one, other):
            lengths[number] = max(lengths[number], min(length, len(prompts[number]) - 1))
    return lengths
