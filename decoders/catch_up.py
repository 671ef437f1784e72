"""Prefill and catch-up: one model call that reads the tokens a model has not seen of several sequences.

A new sequence reuses the longest cached prefix of any slot, and a prefix that several new sequences share is
computed once. If the memory is not enough, sequences are failed one by one until the call fits. Leaves out
sampling, routing and which model is active.
"""

from __future__ import annotations

from viaticum.decoders.runner import Runner, RunnerOutput, common_prefix_length
from viaticum.decoders.sequence_state import LARGE, SequenceState
from viaticum.decoders.stats import CallStats
from viaticum.errors import ModelError, SequencesFailed

MIN_SHARED_PREFIX = 16  # prompts that share fewer tokens than this are prefilled separately


def catch_up(
    runner: Runner,
    model: int,
    sequences: list[SequenceState],
    stats: CallStats,
    *,
    hidden: bool = False,
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

    Returns:
        The output, the sequences it is about, and those that failed: those that the runner names, or for lack
        of memory the largest consumer each time, as often as necessary.
    """
    failed: list[tuple[SequenceState, ModelError]] = []
    while sequences:
        calls_before = runner.calls
        try:
            stats.tokens += _prefill(
                runner, model, [each for each in sequences if model not in each.prefilled]
            )
            lengths = [len(each.tokens) if model == LARGE else each.length_with_draft for each in sequences]
            new = [_unread(runner, each, length) for each, length in zip(sequences, lengths, strict=True)]
            keep = [
                each.length_with_draft - length + 1 for each, length in zip(sequences, lengths, strict=True)
            ]
            output = runner.forward([each.slot for each in sequences], new, keep, hidden=hidden)
        except SequencesFailed as error:
            failed += [(each, error.failures[each.slot]) for each in sequences if each.slot in error.failures]
            sequences = [each for each in sequences if each.slot not in error.failures]
        except ModelError as error:
            victim = _largest_consumer(runner, sequences)
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
    prefix = _shared_prefix([each.tokens for each in sequences])
    read = 0
    for sequence in sequences:
        runner.reuse_prefix(sequence.slot, sequence.unread(0))
        sequence.prefilled.add(model)
        if not runner.has_stable_keys(sequence.length_with_draft):
            continue  # its prefix is read with the rest
        if new := prefix[len(runner.cached_tokens[sequence.slot]) :]:
            runner.forward([sequence.slot], [new])
            read += len(new)
    return read


def _unread(runner: Runner, sequence: SequenceState, length: int) -> list[int]:
    """Tokens to read for the logits after the first `length` tokens and after each later one."""
    runner.truncate(sequence.slot, length - 1)  # token `length` is read again if its logits were not used
    return sequence.unread(len(runner.cached_tokens[sequence.slot]))


def _largest_consumer(runner: Runner, sequences: list[SequenceState]) -> SequenceState:
    """The sequence to fail out of memory: the longest if the cache has to grow, else what reads most."""
    longest = max(sequences, key=lambda each: each.length_with_draft)
    if longest.length_with_draft > runner.capacity:
        return longest
    return max(sequences, key=lambda each: each.length_with_draft - len(runner.cached_tokens[each.slot]))


def _shared_prefix(prompts: list[list[int]]) -> list[int]:
    """The common prefix of all prompts, at least one token shorter than each; empty if too short to pay."""
    if len(prompts) < 2:
        return []
    # In lexicographic order the first and the last have the shortest common prefix.
    first, last = min(prompts), max(prompts)
    length = min(common_prefix_length(first, last), min(map(len, prompts)) - 1)
    return list(first[:length]) if length >= MIN_SHARED_PREFIX else []
