"""Durations of model calls by rows and new tokens, measured on this machine and interpolated.

Leaves out what a decoder does with its calls (`decoders.cost`).
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from viaticum.decoders.runner import Runner
from viaticum.errors import InputError
from viaticum.routers.token import entropy
from viaticum.routers.token.base import argmax_token

ROWS = (1, 2, 4, 8, 16, 32)
TOKENS = (1, 2, 3, 5, 9, 17)
QUICK_ROWS, QUICK_TOKENS, QUICK_CONTEXT = (1, 4, 16), (1, 4), 64
CONTEXT = 512  # cached positions of each row while it is timed: a few-shot prompt


@dataclass(frozen=True, slots=True)
class CallTimes:
    """Seconds of one call of a model by its size, from measured points.

    Calling it interpolates bilinearly and extrapolates from the last two points.

    Args:
        rows: measured numbers of rows, rising from 1.
        tokens: measured numbers of new tokens a row, rising from 1.
        seconds: [len(rows)][len(tokens)].

    Raises:
        InputError: points that do not rise from 1, or another number of seconds.
    """

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if [len(line) for line in self.seconds] != [len(self.tokens)] * len(self.rows):
            raise InputError(
                "seconds must have a line for every number of rows, a value for every number of tokens"
            )
        for points in (self.rows, self.tokens):
            if not points or points[0] != 1 or list(points) != sorted(set(points)):
                raise InputError(f"measured points must rise from 1, got {points}")

    def __call__(self, rows: int, tokens: float) -> float:
        """Seconds of a call of `rows` rows with `tokens` new tokens each."""
        (row, down), (column, right) = _interpolate(self.rows, rows), _interpolate(self.tokens, tokens)
        above, below = self.seconds[row], self.seconds[min(row + 1, len(self.rows) - 1)]
        after = min(column + 1, len(self.tokens) - 1)
        upper = above[column] + (above[after] - above[column]) * right
        lower = below[column] + (below[after] - below[column]) * right
        return max(upper + (lower - upper) * down, 0.0)


def _interpolate(points: tuple[int, ...], value: float) -> tuple[int, float]:
    """Index of the measured point at or below `value`, and the fraction to the next, over 1 at the end."""
    index = min(max(bisect_right(points, value) - 1, 0), max(len(points) - 2, 0))
    if len(points) == 1:
        return 0, 0.0
    return index, (value - points[index]) / (points[index + 1] - points[index])


def measure(
    runner: Runner,
    *,
    rows: Sequence[int] = ROWS,
    tokens: Sequence[int] = TOKENS,
    context: int = CONTEXT,
    repeats: int = 3,
    verifies: bool = False,
) -> CallTimes:
    """Measure the median seconds of calls, including entropy, argmax and transfer as a decoder does them.

    Args:
        runner: none of its slots may be in use.
        rows: numbers of rows to time; those beyond the runner's slots are left out.
        tokens: numbers of new tokens a row to time.
        context: cached positions of each row.
        repeats: calls per cell.
        verifies: compute the logits of every new token, as verifying a draft does, not of the last one only.

    Raises:
        InputError: slots are in use, or the runner's context is too short.
    """
    sizes = [count for count in rows if count <= runner.slots]
    return CallTimes(tuple(sizes), tuple(tokens), _seconds(runner, sizes, tokens, context, repeats, verifies))


@torch.inference_mode()
def _seconds(
    runner: Runner,
    sizes: Sequence[int],
    tokens: Sequence[int],
    context: int,
    repeats: int,
    verifies: bool,
) -> tuple[tuple[float, ...], ...]:
    """Median seconds of calls [len(sizes)][len(tokens)]."""
    context = min(context, runner.context - max(tokens))
    if context < 1:
        raise InputError(f"a context of {runner.context} is too short to time calls of {max(tokens)} tokens")
    if len(runner.free_slots) < runner.slots:
        raise InputError("some slots are in use; measure a runner before texts are written with it")
    prompt = [1 + i % 97 for i in range(context)]
    for slot in range(max(sizes)):
        runner.reuse_prefix(slot, [*prompt, 1])
        if unread := prompt[len(runner.cached_tokens[slot]) :]:
            runner.forward([slot], [unread])

    def call(count: int, new: int) -> float:
        for slot in range(count):
            runner.truncate(slot, context)
        began = time.perf_counter()
        output = runner.forward(range(count), [[7] * new] * count, [new if verifies else 1] * count)
        torch.stack([entropy(output.logits), argmax_token(output.logits).float()]).tolist()
        return time.perf_counter() - began

    # All cells in turn, repeatedly: a disturbance of seconds then spoils one time of many cells, and no
    # median.
    samples: dict[tuple[int, int], list[float]] = {(count, new): [] for count in sizes for new in tokens}
    for turn in range(repeats + 1):
        for cell, times in samples.items():
            seconds = call(*cell)
            times += [seconds] if turn else []  # the first turn warms up
    medians = [tuple(statistics.median(samples[count, new]) for new in tokens) for count in sizes]
    for slot in range(max(sizes)):
        runner.reset(slot)
    return tuple(medians)


def measure_within(runner: Runner, seconds: float, *, verifies: bool = False) -> CallTimes:
    """Roughly measure calls of few sizes, and of no further number of rows once `seconds` have passed.

    Raises:
        InputError: as `measure`.
    """
    began, found = time.perf_counter(), list[tuple[float, ...]]()
    for rows in QUICK_ROWS:
        if rows > runner.slots or (found and time.perf_counter() - began > seconds):
            break
        found += _seconds(runner, [rows], QUICK_TOKENS, QUICK_CONTEXT, 1, verifies)
    return CallTimes(QUICK_ROWS[: len(found)], QUICK_TOKENS, tuple(found))
