"""Jobs as `viaticum batch` leaves them, made by a seeded script through a real ledger.

What each pair answers is drawn beforehand, so that the outcome table of the same questions is known as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from viaticum.budgets import Ledger
from viaticum.budgets.tagging import tagged
from viaticum.jobs import ROWS, Call, Job, JobRow, Preview, row_line
from viaticum.money import Price
from viaticum.outcomes import write_outcomes
from viaticum.types import Outcome, Pair, TokenCount

BEGAN = datetime(2026, 11, 21, 8, 0, tzinfo=UTC)
PRICES = {
    "small": Price.per_million("0.05", "0.10"),
    "large": Price.per_million("0.40", "1.20"),
    "remote-xl": Price.per_million("1.50", "6"),
}
# skill on questions of middling difficulty, output tokens, tokens a second
SKILLS = {
    Pair("small", "direct"): (-2.6, 12, 60),
    Pair("small", "cot"): (-0.9, 110, 60),
    Pair("small", "pot"): (-0.6, 90, 60),
    Pair("large", "cot"): (0.5, 120, 25),
    Pair("large", "pot"): (0.9, 85, 25),
    Pair("remote-xl", "cot"): (2.0, 150, 45),
}
CHEAP, MIDDLE, EXPENSIVE = Pair("small", "pot"), Pair("large", "pot"), Pair("remote-xl", "cot")
KNOWLEDGE = [
    {
        "kind": "fitted",
        "models": ["large", "small"],
        "datasets": {"sums": 900, "words": 300},
        "questions": 1_200,
        "date": "2026-11-20",
        "about": "",
        "calibration_error": 0.021,
    },
    {
        "kind": "prior",
        "models": ["remote-xl"],
        "datasets": {},
        "questions": 0,
        "date": "",
        "about": "",
        "calibration_error": None,
    },
]
SCRIPT = "<script>alert('row')</script>"
NAMES = ("Natalia", "Weng", "Betty", "Julie", "James", "Mark", "Albert", "Ken", "Alexis", "Tina")
THINGS = (
    "clips",
    "pencils",
    "marbles",
    "muffins",
    "letters",
    "flowers",
    "eggs",
    "miles",
    "stickers",
    "cards",
)


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    gold: str
    hard: float
    outcomes: dict[Pair, Outcome]


def questions(count: int, seed: int = 0) -> list[Question]:
    """The first one is a script, as is the answer that everyone gives to it."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(count):
        one, other = (int(x) for x in rng.integers(3, 90, 2))
        name, thing = NAMES[rng.integers(len(NAMES))], THINGS[rng.integers(len(THINGS))]
        text = (
            f"{name} has {one} {thing} and buys {other} more every day for {n % 7 + 2} days. How many {thing}"
            " are there in the end?"
        )
        gold = str(one + other * (n % 7 + 2))
        if n == 0:
            text, gold = f"What does {SCRIPT} print? <img src=x onerror=alert(1)>", "row"
        made.append(_question(f"q-{n:04d}", text, gold, float(rng.normal(0, 1.3)), rng))
    return made


def _question(name: str, text: str, gold: str, hard: float, rng: np.random.Generator) -> Question:
    outcomes = {}
    for pair, (skill, length, speed) in SKILLS.items():
        right = bool(rng.random() < 1 / (1 + math.exp(-1.4 * (skill - hard))))
        read, made = 60 + len(text.split()), max(3, int(length * rng.lognormal(0, 0.45)))
        answer = gold if right else str(int(rng.integers(1, 900)))
        if not right and rng.random() < 0.08:
            answer, made = None, 400  # type: ignore[assignment]
        cost = PRICES[pair.model].cost(read, made)
        outcomes[pair] = Outcome(
            "sums",
            name,
            text,
            pair.model,
            pair.strategy,
            answer,
            right,
            read,
            made,
            cost,
            round(made / speed, 3),
            "length" if made >= 400 else "stop",
        )
    return Question(name, text, gold, hard, outcomes)


def write_table(path: Path, asked: Sequence[Question]) -> Path:
    write_outcomes(path, [outcome for question in asked for outcome in question.outcomes.values()])
    return path


class Clock:
    """A clock that a test moves."""

    def __init__(self, began: datetime = BEGAN) -> None:
        self.now = began

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def make_job(
    where: Path,
    asked: Sequence[Question],
    *,
    limit: int = 300_000_000,
    generous: float = 0.0,
    seed: int = 1,
    running: bool = False,
    name: str = "results",
    escalates: bool = True,
    address: str = "",
    began: datetime = BEGAN,
    team: str = "",
) -> Path:
    """Write a job and return its folder.

    Args:
        address: of its ledger; by default a file beside it.
        began: when.
        team: a tag of its calls.
        generous: how much sooner it takes a more expensive pair.
        running: it was not finished.

    In it are rows that escalate, skips once money is short, failures of two kinds, a cached row, an overrun,
    a hold that nobody heard of again, one of a call that no row names, and mixed texts.
    """
    folder = where / f"{name}.jsonl.job"
    folder.mkdir(parents=True)
    clock, rng = Clock(began), np.random.default_rng(seed)
    ledger = address or str(where / f"{name}.db")
    tags = {"team": team} if team else {}
    with Ledger(ledger, clock=clock) as opened, tagged(**tags):
        opened.create("night", limit_nanousd=limit)
        writer = _JobWriter(opened, clock, rng, generous, escalates)
        rows = [writer.row(n, question) for n, question in enumerate(asked)]
        if running:
            rows = rows[: len(rows) * 2 // 3]
        writer.lost_call()
    (folder / ROWS).write_text("".join(map(row_line, rows)), encoding="utf-8")
    Job(
        input="questions.jsonl",
        results=str(where / f"{name}.jsonl"),
        rows=len(asked),
        budget="night",
        limit_nanousd=limit,
        ledger=ledger,
        policy="best",
        fingerprint={"input": "9f2c", "router": "static"},
        previews=tuple(
            Preview(limit * k // 4, 0.40 + 0.28 * (1 - math.exp(-k / 2.5)), limit * k // 5, limit * k // 4)
            for k in (1, 2, 4, 8)
        ),
        began=began.isoformat(),
        ended=None if running else clock.now.isoformat(),
        ending="running" if running else "completed",
        version="0.1.0",
        memory={"knowledge": KNOWLEDGE},
    ).save(folder)
    return folder


class _JobWriter:
    def __init__(
        self, ledger: Ledger, clock: Clock, rng: np.random.Generator, generous: float, escalates: bool
    ) -> None:
        self.ledger, self.clock, self.rng = ledger, clock, rng
        self.generous, self.escalates = generous, escalates

    def row(self, number: int, question: Question) -> JobRow:
        easy = -question.hard + float(self.rng.normal(0, 0.4)) - self.generous
        pair = CHEAP if easy > 1.3 else MIDDLE if easy > -0.4 else EXPENSIVE
        if self.rng.random() < 0.5:  # a router that knows something
            pair = next(
                (each for each in (CHEAP, MIDDLE, EXPENSIVE) if question.outcomes[each].correct), CHEAP
            )
        plan = [pair, EXPENSIVE] if self.escalates and pair == MIDDLE and number % 6 == 0 else [pair]
        route = str(pair) if len(plan) == 1 else f"{pair}, {EXPENSIVE} until two agree"
        skill, length, _ = SKILLS[pair]
        chance = 1 / (1 + math.exp(-1.1 * (skill - question.hard + float(self.rng.normal(0, 0.5)))))
        row = JobRow(
            question.id,
            question.text,
            "answered",
            gold=question.gold,
            route=route,
            accuracy=round(min(0.99, chance + 0.04), 4),
            tokens_p50=length * len(plan),
            tokens_p90=int(length * 1.75 * len(plan)),
        )
        expected = sum(PRICES[each.model].cost(75, SKILLS[each][1]) for each in plan)
        row = replace(row, cost_p50=expected, cost_p90=int(expected * 1.6))
        left = self.ledger.budget("night").left_nanousd or 0
        if number % 41 == 17 or question.text.startswith("What does <script>"):
            return self._failed(row, number, pair)
        if left < 9_000_000:  # two of the dearest calls in the worst case
            return replace(
                row,
                state="skipped",
                correct=False,
                calls=(),
                reason=f"its p90 of ${expected / 1e9:.6f} does not fit what is left, ${left / 1e9:.6f}",
            )
        calls, answer = [], None
        for index, each in enumerate(plan):
            calls.append(self._call(question, number, index, each))
            answer = calls[-1].answer
        row = replace(
            row,
            pair=str(plan[-1]),
            answer=answer,
            correct=answer == question.gold,
            calls=tuple(calls),
            cost_nanousd=sum(call.cost_nanousd for call in calls),
            seconds=sum(call.seconds for call in calls),
        )
        if pair == MIDDLE and number % 5 == 1:
            thinking = f"{question.text} First, the days are counted."
            thinks = number % 2 == 1
            pieces = self._pieces(question, thinking, " </think>" if thinks else "")
            row = replace(row, pieces=pieces, thinking=thinking if thinks else None)
        elif number % 13 == 2:
            row = replace(row, thinking="It is a sum.", text=f"The answer is {answer}.")
        return row

    def _call(self, question: Question, number: int, index: int, pair: Pair) -> Call:
        outcome = question.outcomes[pair]
        used = TokenCount(outcome.input_tokens or 0, outcome.output_tokens or 0)
        key, over = f"night/{question.id}/{index}", number % 97 == 55
        worst = TokenCount(used.input_tokens, used.output_tokens // 2 if over else 400)
        self.ledger.reserve(
            "night", key, {pair.model: worst}, PRICES, tags={"strategy": pair.strategy}, dispatch=True
        )
        self.clock.advance(outcome.seconds or 0.0)
        entry = self.ledger.settle(key, {pair.model: used})
        reported = None
        if pair.model == "remote-xl":
            reported = entry.nanousd + (entry.nanousd // 20 if number % 50 == 7 else 0)
        return Call(
            str(pair),
            key,
            entry.nanousd,
            {pair.model: [used.input_tokens, used.output_tokens]},
            outcome.seconds or 0.0,
            outcome.finish_reason or "stop",
            outcome.answer,
            provider_nanousd=reported,
        )

    def _failed(self, row: JobRow, number: int, pair: Pair) -> JobRow:
        key = f"night/{row.id}/0"
        self.ledger.reserve("night", key, {pair.model: TokenCount(70, 400)}, PRICES, dispatch=True)
        self.clock.advance(30)
        self.ledger.void(key)
        why = (
            f"{pair.model} did not answer within {number} s"
            if number % 2
            else "the provider refused the call: content filter"
        )
        return replace(row, state="failed", correct=False, reason=why, seconds=30.0)

    def _pieces(self, question: Question, thinking: str, mark: str) -> list[list[str]]:
        words = (
            f"{thinking}{mark} Then the sum for each day is added to the start,"
            f" and the result is {question.gold}.".split()
        )
        pieces: list[list[str]] = []
        for index, word in enumerate(words):
            model = "large" if self.rng.random() < 0.1 + 0.5 * (index % 11 == 0) else "small"
            if pieces and pieces[-1][0] == model:
                pieces[-1][1] += f" {word}"
            else:
                pieces.append([model, f" {word}" if pieces else word])
        return pieces

    def lost_call(self) -> None:
        """One that was sent and never heard of again, and one that was paid for and that no row names."""
        left = self.ledger.budget("night").left_nanousd or 0
        if left < 1_000_000:
            return
        self.ledger.reserve(
            "night", "night/lost/0", {"large": TokenCount(80, 400)}, PRICES, dispatch=True, lease=1
        )
        self.ledger.reserve("night", "night/late/0", {"large": TokenCount(80, 400)}, PRICES, dispatch=True)
        self.clock.advance(5)
        self.ledger.settle("night/late/0", {"large": TokenCount(80, 90)})
        self.ledger.expire_leases()
