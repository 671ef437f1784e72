"""Sixty tasks about the harbour: ten families of six, each with a gold answer that a program computes.

A gold is computed from the harbour's objects, never by the tools. `solution` is one way to the answer by
the tools: what scripted models do, and what shows that a task can be solved. `is_solved` is the program that
checks an answer; no model judges.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median

from harbour import MONTHS, SEED, Harbour

from viaticum.strategies.answers import is_right, read_answer
from viaticum.types import AnswerKind

EACH = 6  # tasks of a family
NUMBER, AFTER_COLON = r"(-?\d+(?:\.\d+)?)", r": ([^:\n]+)$"


@dataclass(frozen=True)
class Step:
    """One call of a tool. `{0}`, `{1}` in the input stand for what was taken from earlier results.

    take: a pattern whose group is what later steps, or the answer, need of the result.
    """

    tool: str
    input: str
    take: str = r"(?s)^(.*)$"


@dataclass(frozen=True)
class Task:
    """A question about the harbour.

    Attributes:
        names: where the answer is a name, all that might be named.
        answer: the answer in terms of what the steps took.
    """

    id: str
    family: str
    question: str
    gold: str
    kind: AnswerKind = "number"
    names: tuple[str, ...] = ()
    solution: tuple[Step, ...] = field(default=(), repr=False)

    def is_solved(self, answer: str | None) -> bool:
        """Whether an answer is right: the number, or the one name that it mentions."""
        if not answer:
            return False
        if self.names:
            named = {
                each for each in self.names if re.search(rf"\b{re.escape(each)}\b", answer, re.IGNORECASE)
            }
            return named == {self.gold}
        return is_right(read_answer(answer, self.kind), [self.gold], self.kind)


Family = Callable[[Harbour, random.Random], Task]


def _sql(query: str, take: str = NUMBER) -> Step:
    return Step("sql", query, take)


def _trips(world: Harbour, rng: random.Random) -> Task:
    boat = rng.choice(world.boats).name
    return Task(
        "", "trips", f"How many trips did the {boat} make?", str(len(world.trips_of(boat))),
        solution=(_sql(f"SELECT COUNT(*) FROM trips WHERE boat = '{boat}'"),),
    )  # fmt: skip


def _passengers(world: Harbour, rng: random.Random) -> Task:
    trip = rng.choice(world.trips)
    boat, month = trip.boat, trip.month
    gold = sum(each.passengers for each in world.trips_of(boat, month))
    query = f"SELECT SUM(passengers) FROM trips WHERE boat = '{boat}' AND month = '{month}'"
    question = f"How many passengers did the {boat} carry in {month}, over all its trips?"
    return Task("", "passengers", question, str(gold), solution=(_sql(query),))


def _busiest(world: Harbour, rng: random.Random) -> Task:
    kind, month = rng.choice([boat.kind for boat in world.boats]), rng.choice(MONTHS)
    names = [boat.name for boat in world.boats if boat.kind == kind]
    totals = {name: sum(trip.passengers for trip in world.trips_of(name, month)) for name in names}
    gold = max(totals, key=lambda name: totals[name])
    if list(totals.values()).count(totals[gold]) > 1:
        return _busiest(world, rng)
    query = (
        f"SELECT boat FROM trips JOIN boats ON boat = name WHERE kind = '{kind}' AND month = '{month}' "
        "GROUP BY boat ORDER BY SUM(passengers) DESC LIMIT 1"
    )
    question = f"Which {kind} carried the most passengers in {month}, over all its trips?"
    everybody = tuple(boat.name for boat in world.boats)
    return Task("", "busiest", question, gold, "text", everybody, (_sql(query, r"(\w+)"),))


def _captain(world: Harbour, rng: random.Random) -> Task:
    boat, job = rng.choice(world.boats), rng.choice(("captain", "engineer"))
    everybody = tuple(name for each in world.boats for name in (each.captain, each.engineer))
    step = Step("search", f"{job} {boat.name}", AFTER_COLON)
    return Task(
        "", "crew", f"Who is the {job} of the {boat.name}?", getattr(boat, job), "text", everybody, (step,)
    )


def _repair(world: Harbour, rng: random.Random) -> Task:
    boat = rng.choice(world.boats)
    step = Step("search", f"repair {boat.name}", rf"{NUMBER} dollars")
    return Task(
        "",
        "repair",
        f"How many dollars did the repair of the {boat.name} cost?",
        str(boat.cost),
        solution=(step,),
    )


def _remainder(world: Harbour, rng: random.Random) -> Task:
    base, power, divisor = rng.randint(12, 99), rng.randint(11, 29), rng.randint(201, 999)
    question = f"What is the remainder when {base} to the power of {power} is divided by {divisor}?"
    step = Step("python", f"print({base} ** {power} % {divisor})", NUMBER)
    return Task("", "remainder", question, str(pow(base, power, divisor)), solution=(step,))


def _digits(world: Harbour, rng: random.Random) -> Task:
    top, divisor, total = rng.randrange(300, 900, 50), rng.randint(3, 9), rng.randint(6, 13)
    gold = sum(1 for n in range(1, top + 1) if n % divisor == 0 and sum(map(int, str(n))) == total)
    if not gold:
        return _digits(world, rng)
    question = (
        f"How many whole numbers from 1 to {top} are divisible by {divisor} and have digits that add up "
        f"to {total}?"
    )
    test = f"n % {divisor} == 0 and sum(int(d) for d in str(n)) == {total}"
    step = Step("python", f"print(len([n for n in range(1, {top + 1}) if {test}]))", NUMBER)
    return Task("", "digits", question, str(gold), solution=(step,))


def _captains_trips(world: Harbour, rng: random.Random) -> Task:
    boat = rng.choice(world.boats)
    steps = (
        Step("search", f"captain {boat.captain}", r"Captain of the (\w+)"),
        _sql("SELECT COUNT(*) FROM trips WHERE boat = '{0}'"),
    )
    question = f"How many trips did the boat make whose captain is {boat.captain}?"
    return Task("", "captain's trips", question, str(len(world.trips_of(boat.name))), solution=steps)


def _profit(world: Harbour, rng: random.Random) -> Task:
    boat = rng.choice(world.boats)
    earned = sum(trip.passengers * trip.price for trip in world.trips_of(boat.name))
    steps = (
        Step("search", f"repair {boat.name}", rf"{NUMBER} dollars"),
        _sql(f"SELECT SUM(passengers * price) - {{0}} FROM trips WHERE boat = '{boat.name}'"),
    )
    question = (
        f"A trip earns its price times its passengers. How many dollars did all trips of the {boat.name} "
        "earn, less what its repair cost?"
    )
    return Task("", "profit", question, str(earned - boat.cost), solution=steps)


def _median(world: Harbour, rng: random.Random) -> Task:
    boat = rng.choice(world.boats).name
    gold = median(trip.passengers for trip in world.trips_of(boat))
    steps = (
        _sql(f"SELECT passengers FROM trips WHERE boat = '{boat}'", r"(?s)^(.*)$"),
        Step("python", "import statistics\nprint(statistics.median([{0}]))", NUMBER),
    )
    question = f"What is the median of the numbers of passengers of all trips of the {boat}?"
    return Task("", "median", question, f"{gold:g}", solution=steps)


FAMILIES: tuple[Family, ...] = (
    _trips, _captain, _remainder, _captains_trips, _passengers, _repair, _digits, _profit, _busiest, _median,
)  # fmt: skip


def make_tasks(world: Harbour, seed: int = SEED) -> list[Task]:
    """The tasks of a harbour, one family after the other, so that the first ten are one of each."""
    return list(_numbered(world, random.Random(seed)))


def _numbered(world: Harbour, rng: random.Random) -> Iterator[Task]:
    seen: set[str] = set()
    for number in range(EACH * len(FAMILIES)):
        make = FAMILIES[number % len(FAMILIES)]
        while (task := make(world, rng)).question in seen:
            continue
        seen.add(task.question)
        yield Task(
            f"t{number + 1:02}", task.family, task.question, task.gold, task.kind, task.names, task.solution
        )
