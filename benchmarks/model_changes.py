"""How soon a change of a model is told, and how rarely one that is none, by simulation.

    python benchmarks/model_changes.py

Output tokens are log-normal with a deviation of 0.5, costs follow them, answers are independent. A change
comes after 200 calls as expected. A burst is 200 calls at once, the shortest of which ends first. Nothing is
asked of any model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean, median

from viaticum.agents.workflow.settled_calls import EXPECTED as TAG
from viaticum.agents.workflow.settled_calls import SettledCalls
from viaticum.budgets import Ledger
from viaticum.money import Price
from viaticum.routers.query.change_detection import CALLS_TO_FALSE_ALARM, Expectation, ModelWatch
from viaticum.types import TokenCount

SIGMA, BEFORE, RUNS, MOST = 0.5, 200, 40, 20_000
HIGH = math.exp(1.2816 * SIGMA)
EXPECTED = Expectation(100, round(100 * HIGH), 1000, round(1000 * HIGH), 1133, "profile")
Step = Callable[[ModelWatch, random.Random, bool], None]


def lengths(factor: float, always: bool = False) -> Step:
    """Calls with `factor` times the tokens once the model has changed."""

    def step(watch: ModelWatch, rng: random.Random, changed: bool) -> None:
        tokens = 100 * (factor if changed or always else 1.0) * math.exp(SIGMA * rng.gauss(0, 1))
        watch.add_call(EXPECTED, round(tokens), round(10 * tokens))

    return step


def answers(before: float, after: float) -> Step:
    def step(watch: ModelWatch, rng: random.Random, changed: bool) -> None:
        watch.add_answer(before, rng.random() < (after if changed else before))

    return step


def calls_until_told(step: Step, seed: int, before: int = BEFORE, most: int = MOST) -> int:
    """Calls after the change until it is told; `most` where it is not."""
    watch, rng = ModelWatch(), random.Random(seed)
    for number in range(before + most):
        step(watch, rng, number >= before)
        if watch.changed:
            return number + 1 - before
    return most


def is_told_in_burst(seed: int, *, as_settled: bool, calls: int = 200, read_every: int = 10) -> bool:
    """Whether calls as expected, all reserved before the first one ends, are taken for a change.

    as_settled: count them in the order in which they end, else as `SettledCalls` reads them.
    """
    rng, watch = random.Random(seed), ModelWatch()
    tokens = {f"{n:03}": round(100 * math.exp(SIGMA * rng.gauss(0, 1))) for n in range(calls)}
    price = {"model": Price(0, 10_000_000)}  # 10 nano-dollars a token
    with Ledger("memory:") as ledger:
        ledger.create("burst", limit_nanousd=10**15)
        settled, told = SettledCalls(ledger), False
        for key in tokens:
            tags = {"model": "model", TAG: EXPECTED.text}
            ledger.reserve("burst", key, {"model": TokenCount(1, 10_000)}, price, tags=tags, dispatch=True)
        for number, key in enumerate(sorted(tokens, key=tokens.__getitem__), 1):
            ledger.settle(key, {"model": TokenCount(1, tokens[key])}, "{}")
            if as_settled:
                watch.add_call(EXPECTED, tokens[key], 10 * tokens[key])
            elif number % read_every == 0:
                for call in settled.read():
                    watch.add_call(EXPECTED, call.tokens, call.cost)
            told |= watch.changed
    return told


def is_told_of_one_question(seed: int, question: str, calls: int = 200) -> bool:
    """Whether one question that has 1.6 times the expected tokens, asked anew each time, is taken for one."""
    rng, watch, told = random.Random(seed), ModelWatch(), False
    for _ in range(calls):
        tokens = round(160 * math.exp(SIGMA / 2 * rng.gauss(0, 1)))
        watch.add_call(replace(EXPECTED, question=question), tokens, 10 * tokens)
        told |= watch.changed
    return told


def main() -> None:
    for name, as_settled in (("as they are settled", True), ("as they were reserved", False)):
        told = sum(is_told_in_burst(seed, as_settled=as_settled) for seed in range(30))
        print(f"a burst, counted {name}: told in {told} of 30 runs")
    for name, question in (("not known to be equal", ""), ("known to be equal", "one")):
        told = sum(is_told_of_one_question(seed, question) for seed in range(30))
        print(f"one question 200 times, {name}: told in {told} of 30 runs")
    steps = {f"{factor} times the tokens": lengths(factor) for factor in (1.5, 2, 3, 0.7, 0.5)}
    pairs = ((0.8, 0.6), (0.8, 0.5), (0.9, 0.6), (0.5, 0.2), (0.5, 0.8))
    steps |= {f"right {before:.0%}, then {after:.0%}": answers(before, after) for before, after in pairs}
    for name, step in steps.items():
        delays = sorted(calls_until_told(step, seed, most=2_000) for seed in range(RUNS))
        early = sum(delay <= 0 for delay in delays)
        print(f"{name}: median {median(delays):.0f}, 90% {delays[RUNS * 9 // 10]}, before the change {early}")
    for name, factor in (("as expected", 1.0), ("65% above the median", math.exp(0.385 * SIGMA))):
        times = [calls_until_told(lengths(factor, True), seed, 0) for seed in range(RUNS)]
        none = sum(time == MOST for time in times)
        print(
            f"{name}: told after {fmean(times):,.0f} calls on average, {none} of {RUNS} not within {MOST:,}; "
            f"the bound is {CALLS_TO_FALSE_ALARM:,}"
        )


if __name__ == "__main__":
    main()
