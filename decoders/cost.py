"""What decoding costs on this machine, and which way of decoding is fastest: a cost model of `Engine`.

The times of model calls are measured, by rows and new tokens (`measure`). A way of decoding is then played
through with those times and with how often models hand over (`HandoffStats`), step by step as the engine does it, but
without a model: that gives the tokens a second to expect (`CostModel.predict`). Knows nothing of quality: the
caller says which ways are allowed.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import statistics
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from viaticum.decoders.runner import Runner
from viaticum.decoders.speculate import BatchWaitPolicy
from viaticum.decoders.stats import Stats
from viaticum.errors import DataError, InputError
from viaticum.routers.token import entropy
from viaticum.routers.token.base import likeliest

ROWS = (1, 2, 4, 8, 16, 32)
TOKENS = (1, 2, 3, 5, 9, 17)
CONTEXT = 512  # positions that rows hold while they are timed: a few-shot prompt
PLAYED = 4_000  # tokens that a prediction plays through
DRAFTS = (1, 2, 3, 4, 6, 8)  # draft lengths that are tried


@dataclass(frozen=True, slots=True)
class CallTimes:
    """Seconds of one call of a model. rows and tokens (new ones a row) rise from 1; seconds [rows][tokens].

    Between the measured points it is linear, beyond them it goes on as between the last two.
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
        (row, down), (column, right) = _place(self.rows, rows), _place(self.tokens, tokens)
        above, below = self.seconds[row], self.seconds[min(row + 1, len(self.rows) - 1)]
        after = min(column + 1, len(self.tokens) - 1)
        upper = above[column] + (above[after] - above[column]) * right
        lower = below[column] + (below[after] - below[column]) * right
        return max(upper + (lower - upper) * down, 0.0)


@dataclass(frozen=True, slots=True)
class HandoffStats:
    """How a pair of models and a router go about it, as chances.

    drop: the router drops a token of the small model; back: the large one hands back after a token;
    accept: the large model takes the next drafted token, given that it took those before.
    """

    drop: float
    back: float
    accept: float = 0.7

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value <= 1:
                raise InputError(f"{name} is a chance between 0 and 1, got {value}")

    @property
    def large_share(self) -> float:
        """The share of tokens that the large model writes."""
        if self.drop == 0:
            return 0.0
        if self.back == 0:
            return 1.0
        large, small = 1 / self.back, (1 - self.drop) / self.drop
        return large / (large + small)

    @classmethod
    def seen(cls, stats: Stats) -> HandoffStats:
        """Counted from what a decoder did.

        Every stretch of the large model begins with a dropped token; where the next token after it is dropped at
        once, a trace shows one stretch for two, so traces alone do not tell. Without any draft `accept` stays
        what it is by default. Raises `DataError` where nothing was written.
        """
        if not stats.proposed and not stats.large_tokens:
            raise DataError("the decoder has written nothing; let it write a few texts first")
        habits = cls(
            drop=stats.dropped / stats.proposed if stats.proposed else 1.0,
            back=min(1.0, stats.dropped / stats.large_tokens) if stats.large_tokens else 1.0,
        )
        if not stats.drafted:
            return habits
        return replace(habits, accept=_chance(stats.accepted, stats.drafted, stats.large.rows))


TYPICAL = HandoffStats(
    drop=0.2, back=0.4, accept=0.7
)  # about those of R-Stitch with tau 0.03 on a 0.5B and a 1.5B model


def _chance(accepted: int, drafted: int, passes: int) -> float:
    """The chance per token that gives `accepted` of drafts of the mean length, by bisection."""
    length = max(1, round(drafted / max(1, passes)))
    wanted = accepted / drafted * length
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if sum(middle**place for place in range(1, length + 1)) < wanted:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True, slots=True)
class DecodingMode:
    """One way to decode. routed: a router hands tokens to and fro, else the large model writes all of them;
    draft: tokens that the small model drafts before each pass of the large one."""

    routed: bool
    draft: int = 0

    def __str__(self) -> str:
        name = "routed" if self.routed else "speculative" if self.draft else "large"
        return f"{name}:{self.draft}" if self.draft else name


LARGE_ALONE = DecodingMode(routed=False)
LOSSLESS = (
    LARGE_ALONE,
    *(DecodingMode(False, draft) for draft in DRAFTS),
)  # what the large model would write
ROUTED = (DecodingMode(True), *(DecodingMode(True, draft) for draft in DRAFTS[:4]))


@dataclass(frozen=True, slots=True)
class Calls:
    """What one text asked of the two models: for every call the tokens that were new to the model, and those in its cache.

    tokens: of the text, the prompt left out.
    """

    small: tuple[tuple[int, int], ...]
    large: tuple[tuple[int, int], ...]
    tokens: int

    @classmethod
    def of(cls, made_by: Sequence[int], dropped: Sequence[bool], prompt: int, cached: int = 0) -> Calls:
        """Of a text that `Engine` wrote without drafts, by who made each token (0 small, 1 large) and where the small one's was dropped.

        prompt: its tokens; cached: those at its beginning that both models hold already.
        """
        if not 0 <= cached < prompt:
            raise InputError(
                f"at most all but the last token of a prompt of {prompt} are cached, got {cached}"
            )
        asked: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        read = [cached, cached]
        for place, (maker, lost) in enumerate(zip(made_by, dropped, strict=True)):
            for model in (0, 1) if lost else (maker,):
                asked[model].append((prompt + place - read[model], read[model]))
                read[model] = prompt + place
        return cls(tuple(asked[0]), tuple(asked[1]), len(made_by))


@dataclass(frozen=True, slots=True)
class CostModel:
    """Call times of both models of a pair on one machine. conditions: what they were measured with.

    cached: seconds that a call of each model takes longer for every position that a row holds beyond conditions["context"]; 0
    where that was not measured.
    """

    small: CallTimes
    large: CallTimes
    conditions: dict[str, Any]
    cached: tuple[float, float] = (0.0, 0.0)

    def predict(self, way: DecodingMode, habits: HandoffStats, streams: int, *, batch: int = 1) -> float:
        """Tokens a second, all streams together, while as many texts are being written.

        batch: rows that the large model waits for (`MixedDecoder(llm_batch=...)`).
        """
        if streams < 1:
            raise InputError(f"streams must be 1 or more, got {streams}")
        return _Play(self, way, habits, streams, batch).tokens_per_second()

    def latency(self, calls: Calls, streams: int = 1) -> float:
        """Seconds from a text's beginning to its end, where as many texts like it are written at once.

        One stream: the sum of its calls. More: a step serves each row of either model once, a model has as many rows as so many texts
        like this one would ask for (binomial, each on its own), and every text waits for the step, and for the others to read
        their prompts.
        """
        if streams < 1:
            raise InputError(f"streams must be 1 or more, got {streams}")
        context = self.conditions.get("context", CONTEXT)
        seconds = 0.0
        for times, mine, slope in zip(
            (self.small, self.large), (calls.small, calls.large), self.cached, strict=True
        ):
            if not mine:
                continue
            first, rest = mine[0], mine[1:]
            seconds += streams * max(0.0, times(1, first[0]) + slope * (first[1] - context))
            if not rest:
                continue
            chance = len(rest) / calls.tokens
            news = Counter(new for new, _ in rest)
            held = sum(cached for _, cached in rest) / len(rest)
            for rows in range(1, streams + 1):
                likely = math.comb(streams, rows) * chance**rows * (1 - chance) ** (streams - rows)
                mean = sum(times(rows, new) * count for new, count in news.items()) / len(rest)
                seconds += calls.tokens * likely * max(0.0, mean + rows * slope * (held - context))
        return seconds

    def fastest(
        self, ways: Sequence[DecodingMode], habits: HandoffStats, streams: int
    ) -> tuple[DecodingMode, dict[DecodingMode, float]]:
        """The way with the most tokens a second, and what each is expected to give. Of equals the first.

        Put `LARGE_ALONE` among the ways, and routing is never slower than not routing, as far as this model tells.
        """
        if not ways:
            raise InputError("name at least one way to decode")
        expected = {way: self.predict(way, habits, streams) for way in ways}
        return max(expected, key=lambda way: expected[way]), expected

    def save(self, path: str | Path) -> None:
        scratch = Path(f"{path}.{os.getpid()}")
        scratch.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        scratch.replace(path)

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> CostModel:
        """From plain data, as `asdict` gives it and a file holds it."""
        small, large = told.get("cached", (0.0, 0.0))
        return cls(
            _times(told["small"]),
            _times(told["large"]),
            dict(told["conditions"]),
            (float(small), float(large)),
        )

    @classmethod
    def load(cls, path: str | Path) -> CostModel:
        """Raises `InputError` where there is none, `DataError` where the file is no cost model."""
        try:
            return cls.of(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(f"cannot read the cost model {path}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a cost model ({error}); measure it again") from None


class _Row:
    """A text in the play: who has the pen, tokens that each model has not read, and its draft."""

    def __init__(self, pen_large: bool) -> None:
        self.large = pen_large
        self.unread_small = self.unread_large = 1
        self.draft = self.wanted = 0

    @property
    def drafting(self) -> bool:
        return self.large and self.draft < self.wanted


class _Play:
    """The engine's steps with a clock and dice in place of models."""

    def __init__(
        self, costs: CostModel, way: DecodingMode, habits: HandoffStats, streams: int, batch: int
    ) -> None:
        self.costs, self.way, self.habits = costs, way, habits
        self.patience = BatchWaitPolicy(batch, way.draft)
        self.padded = str(costs.conditions.get("device", "cpu")).startswith("cuda")
        self.dice = random.Random(f"{way}{streams}")
        self.rows = [_Row(not way.routed) for _ in range(streams)]
        for row in self.rows:
            self._plan(row)
        self.seconds, self.written = 0.0, 0

    def tokens_per_second(self) -> float:
        while self.written < PLAYED:
            self._small()
            self._large()
        return self.written / self.seconds

    def _calls(self, times: CallTimes, lengths: list[int]) -> float:
        """Seconds to read so many new tokens of each row in one call: padded where calls have static shapes, on CUDA."""
        return times(len(lengths), max(lengths) if self.padded else sum(lengths) / len(lengths))

    def _happens(self, chance: float) -> bool:
        return self.dice.random() < chance

    def _plan(self, row: _Row) -> None:
        row.wanted = max(self.way.draft, row.draft) if row.large and self.way.draft else 0

    def _small(self) -> None:
        rows = [row for row in self.rows if not row.large or row.drafting]
        if not rows:
            return
        self.seconds += self._calls(self.costs.small, [row.unread_small for row in rows])
        for row in rows:
            if row.large:
                row.draft += 1
                row.unread_small = 1  # the guess itself
            elif self._happens(self.habits.drop):
                row.large = True
                row.draft = row.unread_small = int(
                    self.way.draft > 0
                )  # the dropped token is a guess for nothing
                self._plan(row)
            else:
                row.unread_small = 1
                row.unread_large += 1
                self.written += 1

    def _large(self) -> None:
        ready = [row for row in self.rows if row.large and not row.drafting]
        drafting = any(row.drafting for row in self.rows)
        if not self.patience.is_over(len(ready), drafting, any(not row.large for row in self.rows)):
            return
        self.seconds += self._calls(self.costs.large, [row.unread_large + row.draft for row in ready])
        for row in ready:
            read = max(row.draft - 1, 0)  # the small model has not read its last guess
            written, accepted, back = self._write(row.draft)
            self.written += written
            behind = 0 if row.draft else row.unread_small
            row.unread_small = max(1, behind + written - min(accepted, read))
            row.unread_large, row.draft = 1, 0
            row.large = not back
            self._plan(row)

    def _write(self, draft: int) -> tuple[int, int, bool]:
        """Tokens that a pass over a draft writes, those of them that were the draft's, and whether the pen goes back."""
        written = accepted = 0
        for place in range(draft + 1):
            written += 1
            took = place < draft and self._happens(self.habits.accept)
            accepted += took
            if self.way.routed and self._happens(self.habits.back):
                return written, accepted, True
            if not took:
                break
        return written, accepted, False


@torch.inference_mode()
def measure(
    runner: Runner,
    *,
    rows: Sequence[int] = ROWS,
    tokens: Sequence[int] = TOKENS,
    context: int = CONTEXT,
    repeats: int = 3,
    verifies: bool = False,
) -> CallTimes:
    """Median seconds of calls of a runner none of whose slots is in use; numbers of rows beyond its slots are left out.

    verifies: time the logits of every token read, as verifying a draft needs them, not of the last alone.
    What is done with the logits is timed as well (entropy, the likeliest token, the way to the host).
    """
    sizes = [count for count in rows if count <= runner.slots]
    context = min(context, runner.context - max(tokens))
    if context < 1:
        raise InputError(f"a context of {runner.context} is too short to time calls of {max(tokens)} tokens")
    if len(runner.free) < runner.slots:
        raise InputError("some slots are in use; measure a runner before texts are written with it")
    prompt = [1 + place % 97 for place in range(context)]
    for slot in range(max(sizes)):
        runner.start(slot, [*prompt, 1])
        if unread := prompt[len(runner.held[slot]) :]:
            runner.read([slot], [unread])

    def call(count: int, new: int) -> float:
        for slot in range(count):
            runner.truncate(slot, context)
        began = time.perf_counter()
        heads = runner.read(range(count), [[7] * new] * count, [new if verifies else 1] * count)
        torch.stack([entropy(heads.logits), likeliest(heads.logits).float()]).tolist()
        return time.perf_counter() - began

    # All cells in turn, again and again: what disturbs the machine for seconds then spoils one time of many cells, and
    # no median.
    taken: dict[tuple[int, int], list[float]] = {(count, new): [] for count in sizes for new in tokens}
    for turn in range(repeats + 1):
        for cell, times in taken.items():
            seconds = call(*cell)
            times += [seconds] if turn else []
    found = [tuple(statistics.median(taken[count, new]) for new in tokens) for count in sizes]
    for slot in range(max(sizes)):
        runner.reset(slot)
    return CallTimes(tuple(sizes), tuple(tokens), tuple(found))


def conditions() -> dict[str, Any]:
    """What times depend on, besides the models: they hold as long as this stays the same."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }


def measure_pair(small: Runner, large: Runner, *, context: int = CONTEXT, repeats: int = 3) -> CostModel:
    """The cost model of a pair on this machine, in seconds to minutes: time it on an otherwise quiet machine."""
    times = (
        measure(small, context=context, repeats=repeats),
        measure(large, context=context, repeats=repeats, verifies=True),
    )
    return CostModel(
        *times,
        conditions() | {"device": str(large.device), "context": context},
        (_slope(small, times[0], context, repeats), _slope(large, times[1], context, repeats)),
    )


def _slope(runner: Runner, times: CallTimes, context: int, repeats: int) -> float:
    """Seconds that a call of one row and one token takes longer for each position in its cache; 0 if the context is too short."""
    longer = min(4 * context, runner.context - 1)
    if longer <= context:
        return 0.0
    far = measure(runner, rows=(1,), tokens=(1,), context=longer, repeats=repeats)
    return max(0.0, (far(1, 1) - times(1, 1)) / (longer - context))


def _times(told: dict[str, Any]) -> CallTimes:
    return CallTimes(
        tuple(told["rows"]), tuple(told["tokens"]), tuple(tuple(map(float, line)) for line in told["seconds"])
    )


def _place(points: tuple[int, ...], value: float) -> tuple[int, float]:
    """The measured point that the value goes on from, and how far it lies towards the next (above 1 beyond the last)."""
    at = min(max(bisect_right(points, value) - 1, 0), max(len(points) - 2, 0))
    if len(points) == 1:
        return 0, 0.0
    return at, (value - points[at]) / (points[at + 1] - points[at])
