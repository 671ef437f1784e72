"""What a model held by torch and llama.cpp at once could gain, by a cost model of calls that are timed here.

    python benchmarks/two_engines.py MODEL_FOLDER
    python benchmarks/two_engines.py --times '{"torch": [[62, 90, 192], 6.8], "llama": [[44, 156, 287], 21]}'

Each engine has keys and values of its own: what one has read the other has to read as well before it can go
on. Printed for each load: tokens a second of each engine alone; of the best possible sequence of engines
(found with foresight by dynamic programming, so that no policy can do better); of a policy without foresight;
and of one that could copy keys and values between the engines for nothing. Gains are those over the better
engine alone. Times: milliseconds of a step of 1, 4 and 16 rows, and of a
token of a prompt.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROWS = (1, 4, 16)
PROMPT = 256


@dataclass(frozen=True)
class EngineTimes:
    """steps: seconds of a step by `ROWS`. read: seconds of a token of a prompt."""

    steps: Sequence[float]
    read: float

    def step(self, rows: int) -> float:
        """Interpolated between the measured numbers of rows."""
        pairs = list(itertools.pairwise(zip(ROWS, self.steps, strict=True)))
        (low, below), (high, above) = next((each for each in pairs if rows <= each[1][0]), pairs[-1])
        return below + (above - below) * (rows - low) / (high - low)


@dataclass(frozen=True)
class Text:
    """start: the step in which it is read. tokens: of its answer."""

    start: int
    tokens: int

    def length(self, step: int) -> int:
        """Tokens that an engine holds of it once it has made that step; 0 before it begins."""
        return PROMPT + step - self.start + 1 if self.start <= step else 0


def loads() -> dict[str, list[Text]]:
    """Answers of 64 to 512 tokens."""
    rng = random.Random(0)

    def answers(count: int) -> list[int]:
        return [rng.randrange(64, 513) for _ in range(count)]

    clock, arrivals = 0, list[Text]()
    for tokens in answers(24):
        arrivals.append(Text(clock, tokens))
        clock += rng.randrange(1, 160)
    clock, mixed = 512, [Text(0, tokens) for tokens in answers(16)]
    for tokens in answers(8):
        mixed.append(Text(clock, tokens))
        clock += tokens
    return {
        "one text": [Text(0, 256)],
        "4 texts at once": [Text(0, tokens) for tokens in answers(4)],
        "16 texts at once": [Text(0, tokens) for tokens in answers(16)],
        "24 texts that come and go": arrivals,
        "16 texts, then 8 in turn": mixed,
    }


def active(texts: Sequence[Text], step: int) -> list[Text]:
    return [text for text in texts if text.start <= step < text.start + text.tokens]


def stretches(texts: Sequence[Text]) -> list[tuple[int, int]]:
    """(first step, steps) between which the same texts are written."""
    edges = sorted({edge for text in texts for edge in (text.start, text.start + text.tokens)})
    return [(first, last - first) for first, last in itertools.pairwise(edges)]


def stretch_seconds(times: EngineTimes, texts: Sequence[Text], first: int, steps: int) -> float:
    """Of one engine, with the prompts that begin in it."""
    rows = active(texts, first)
    prompts = sum(text.start == first for text in rows)
    return (steps * times.step(len(rows)) if rows else 0.0) + times.read * PROMPT * prompts


def seconds_alone(times: EngineTimes, texts: Sequence[Text]) -> float:
    return sum(stretch_seconds(times, texts, *stretch) for stretch in stretches(texts))


def seconds_together(engines: Sequence[EngineTimes], texts: Sequence[Text]) -> float:
    """The least seconds of any sequence of engines; one that takes over reads what it has not seen.

    It takes over where a stretch begins: within one, waiting costs the same at every step and leaves more to
    read. The state is the engine in use and since when: the other one has read all until then.
    """
    best: dict[tuple[int, int], float] = {(0, -1): 0.0, (1, -1): 0.0}  # (engine, first step): seconds
    for first, steps in stretches(texts):
        after: dict[tuple[int, int], float] = {}
        going_on = [text for text in active(texts, first) if text.start < first]
        for (engine, since), seconds in best.items():
            other = 1 - engine
            unread = sum(text.length(first - 1) - text.length(since - 1) for text in going_on)
            stays = seconds + stretch_seconds(engines[engine], texts, first, steps)
            takes = seconds + unread * engines[other].read
            takes += stretch_seconds(engines[other], texts, first, steps)
            for state, cost in (((engine, since), stays), ((other, first), takes)):
                after[state] = min(cost, after.get(state, cost))
        best = after
    return min(best.values())


def seconds_online(engines: Sequence[EngineTimes], texts: Sequence[Text]) -> float:
    """Of a policy that knows no future: the other engine takes over once it would have saved what that costs.

    It begins with the engine that is faster for one text.
    """
    engine = min((0, 1), key=lambda each: engines[each].step(1))
    since, saved, seconds = -1, 0.0, 0.0
    for step in range(max(text.start + text.tokens for text in texts)):
        other = 1 - engine
        going_on = [text for text in active(texts, step) if text.start < step]
        costs = [stretch_seconds(each, texts, step, 1) for each in engines]
        unread = sum(text.length(step - 1) - text.length(since - 1) for text in going_on)
        saved = max(0.0, saved + costs[engine] - costs[other])
        if costs[other] < costs[engine] and saved >= unread * engines[other].read:
            engine, since, saved = other, step, 0.0
            seconds += unread * engines[engine].read
        seconds += costs[engine]
    return seconds


def seconds_copied(engines: Sequence[EngineTimes], texts: Sequence[Text]) -> float:
    """Every prompt and every step by the faster engine, keys and values copied for nothing."""
    fast = EngineTimes(
        [min(pair) for pair in zip(*(each.steps for each in engines), strict=True)],
        min(each.read for each in engines),
    )
    return seconds_alone(fast, texts)


def measured(folder: Path) -> dict[str, EngineTimes]:
    """Both engines' calls on this machine, one engine loaded after the other."""
    from viaticum.decoders import load_runner
    from viaticum.decoders.call_times import measure

    found = {}
    for engine in ("torch", "llama"):
        runner = load_runner(folder, engine=engine, slots=max(ROWS), context=2 * PROMPT)  # type: ignore[arg-type]
        steps = measure(runner, rows=ROWS, tokens=(1,), context=PROMPT, repeats=5)
        prompt = measure(runner, rows=(1,), tokens=(1, PROMPT - 1), context=1, repeats=3)
        read = (prompt.seconds[0][1] - prompt.seconds[0][0]) / (PROMPT - 2)
        found[engine] = EngineTimes([seconds for (seconds,) in steps.seconds], read)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="folder with safetensors and model.gguf")
    parser.add_argument("--times", type=json.loads, help="milliseconds in place of a measurement")
    given = parser.parse_args()
    if (given.model is None) == (given.times is None):
        sys.exit("give a model folder or --times")
    engines = (
        measured(given.model)
        if given.model
        else {
            name: EngineTimes([ms / 1000 for ms in steps], read / 1000)
            for name, (steps, read) in given.times.items()
        }
    )
    for name, times in engines.items():
        steps = ", ".join(f"{1000 * seconds:.1f}" for seconds in times.steps)
        print(f"{name}: {steps} ms a step of {ROWS} rows; {1000 * times.read:.2f} a token of a prompt")
    print(
        f"{'tokens a second':27}",
        *(f"{name:>8}" for name in (*engines, "both", "online", "copied", "gain", "online")),
    )
    pair = list(engines.values())
    for name, texts in loads().items():
        tokens = sum(text.tokens for text in texts)
        alone = [seconds_alone(each, texts) for each in pair]
        together = [seconds_together(pair, texts), seconds_online(pair, texts)]
        rates = [f"{tokens / each:8.1f}" for each in (*alone, *together, seconds_copied(pair, texts))]
        print(f"{name:27}", *rates, *(f"{min(alone) / each:8.3f}" for each in together))


if __name__ == "__main__":
    main()
