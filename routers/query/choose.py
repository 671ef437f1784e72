"""Choosing one pair or plan from a routing table by a policy, within the rest of the budget.

Reads predictions only, never outcomes. By default the cheapest within a distance of the most accurate;
beside it the policies of RTR-like routers: the most accurate within the budget, the cheapest or the fastest
that is accurate enough, and accuracy minus lambda times cost.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic_core import core_schema

from viaticum.checks import checked_type
from viaticum.errors import BudgetExceeded, InputError, UnknownName
from viaticum.money import NANOUSD_PER_USD, format_usd
from viaticum.routers.query.plans import PlanRoute, PlanRow
from viaticum.types import Route, RoutingTable, Row

POLICIES = ("within:DISTANCE", "best", "cheapest:ACCURACY", "fastest:ACCURACY", "weighted:PER_DOLLAR")
DEFAULT_POLICY = "within:0.01"
ROUNDING = 1e-9  # a row at the distance itself is within it


class Costed(Protocol):
    """What a policy reads: the row of a pair or of a plan."""

    @property
    def accuracy(self) -> float: ...
    @property
    def cost_p50(self) -> int: ...
    @property
    def cost_p90(self) -> int: ...
    @property
    def expected_cost(self) -> int: ...
    @property
    def seconds(self) -> float | None: ...


RowT = TypeVar("RowT", bound=Costed)
TableRow = TypeVar("TableRow", Row, PlanRow)


class Policy(ABC):
    """A rule that picks one of the rows that fit the budget.

    Attributes:
        reads_seconds: whether it chooses by seconds; rows without them are then given those of earlier calls.
    """

    reads_seconds: ClassVar[bool] = False

    def check(self, rows: Sequence[Costed]) -> None:
        """Raise `InputError` where nothing of what the policy chooses by is known of any of all rows."""
        return

    @abstractmethod
    def pick(self, rows: list[RowT]) -> tuple[RowT, str]:
        """Return one of `rows` (never empty), and the reason as a text."""

    def filter_fallbacks(self, rows: list[RowT]) -> list[RowT]:
        """Rows that are worth their cost after other pairs gave no answer: by default all."""
        return rows

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        """An object of this class; in JSON its text, so that servers of graphs can show what a call takes."""
        return core_schema.json_or_python_schema(
            json_schema=core_schema.str_schema(), python_schema=core_schema.is_instance_schema(cls)
        )


@dataclass(frozen=True)
class Best(Policy):
    """The highest accuracy; among equals the cheapest."""

    def pick(self, rows: list[RowT]) -> tuple[RowT, str]:
        row = max(rows, key=lambda row: (row.accuracy, -row.expected_cost, -_seconds_of(row)))
        return row, f"highest expected accuracy, {row.accuracy:.0%}, of {_ways(rows)}"


@dataclass(frozen=True)
class Cheapest(Policy):
    """The cheapest row that is expected to reach `accuracy`; where none is, the most accurate."""

    accuracy: float

    def __post_init__(self) -> None:
        if not 0 <= self.accuracy <= 1:
            raise InputError(f"the wanted accuracy is between 0 and 1, got {self.accuracy}")

    def pick(self, rows: list[RowT]) -> tuple[RowT, str]:
        enough = [row for row in rows if row.accuracy >= self.accuracy]
        if not enough:
            row, _ = Best().pick(rows)
            return row, f"no pair that fits reaches {self.accuracy:.0%}; the best of them, {row.accuracy:.0%}"
        row = min(enough, key=lambda row: (row.expected_cost, -row.accuracy, _seconds_of(row)))
        return row, f"cheapest of {len(enough)} ways expected to reach {self.accuracy:.0%}"


@dataclass(frozen=True)
class Fastest(Policy):
    """The fastest row that is expected to reach `accuracy`, among equals the cheapest.

    Where none is, the most accurate. A row whose seconds are not known is taken only where none is known of
    any row that is left.
    """

    accuracy: float
    reads_seconds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Cheapest(self.accuracy)

    def check(self, rows: Sequence[Costed]) -> None:
        if rows and all(row.seconds is None for row in rows):
            raise InputError(
                "fastest chooses by seconds, which are known of no way that can be used here: give a router "
                "that was fitted on outcomes with seconds, as `viaticum profile` writes them, or make some "
                "calls with another policy, whose seconds are then known"
            )

    def pick(self, rows: list[RowT]) -> tuple[RowT, str]:
        timed = [(row.seconds, row) for row in rows if row.seconds is not None]
        if not timed:
            row, why = Cheapest(self.accuracy).pick(rows)
            return row, f"{why}; seconds are not known"
        unknown = len(rows) - len(timed)
        note = f"; of {unknown} more the seconds are not known" if unknown else ""
        enough = [(seconds, row) for seconds, row in timed if row.accuracy >= self.accuracy]
        if not enough:
            row, _ = Best().pick([row for _, row in timed])
            return row, (
                f"no pair that fits reaches {self.accuracy:.0%}; the best of them, {row.accuracy:.0%}{note}"
            )
        seconds, row = min(enough, key=lambda each: (each[0], each[1].expected_cost, -each[1].accuracy))
        ways = f"{len(enough)} way{'s' * (len(enough) != 1)}"
        return row, f"fastest of {ways} expected to reach {self.accuracy:.0%}, {seconds:.1f} s{note}"


@dataclass(frozen=True)
class Within(Policy):
    """The cheapest row whose expected accuracy is at most `distance` below the highest; the default.

    Estimates are not exact to a point of accuracy, and the last point often costs several times the rest.
    """

    distance: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.distance <= 1:
            raise InputError(
                f"the distance from the best accuracy is between 0 and 1, got {self.distance}; 0.01 is one"
                " point"
            )

    def pick(self, rows: list[RowT]) -> tuple[RowT, str]:
        highest = max(row.accuracy for row in rows)
        near = [row for row in rows if row.accuracy >= highest - self.distance - ROUNDING]
        row = min(near, key=lambda row: (row.expected_cost, -row.accuracy, _seconds_of(row)))
        if len(near) == 1:
            return Best().pick(rows)
        points = f"{100 * self.distance:g} point{'' if self.distance == 0.01 else 's'}"
        return row, (
            f"cheapest of {len(near)} ways within {points} of the best, {row.accuracy:.0%} expected"
            + (f" against {highest:.0%}" if f"{row.accuracy:.0%}" != f"{highest:.0%}" else "")
        )


@dataclass(frozen=True)
class Weighted(Policy):
    """The highest accuracy minus `per_dollar` times expected dollars (RTR's score with prices)."""

    per_dollar: float

    def __post_init__(self) -> None:
        if not 0 <= self.per_dollar < float("inf"):
            raise InputError(f"the weight of a dollar is 0 or more, got {self.per_dollar}")

    def pick(self, rows: list[RowT]) -> tuple[RowT, str]:
        row = max(
            rows, key=lambda row: (self._score(row), -row.expected_cost, row.accuracy, -_seconds_of(row))
        )
        return row, f"highest accuracy less {self.per_dollar:g} a dollar: {self._score(row):.3f}"

    def _score(self, row: Costed) -> float:
        return row.accuracy - self.per_dollar * row.expected_cost / NANOUSD_PER_USD


@dataclass(frozen=True)
class AtPrice(Weighted):
    """As `Weighted`, with a pacer's value of a dollar; leaves out fallbacks that gain less than they cost."""

    def __post_init__(self) -> None:
        if not self.per_dollar >= 0:
            raise InputError(f"the weight of a dollar is 0 or more, got {self.per_dollar}")

    def filter_fallbacks(self, rows: list[RowT]) -> list[RowT]:
        return [row for row in rows if self._score(row) > 0]


def parse_policy(text: str) -> Policy:
    """Parse one of `POLICIES`; `within` alone is the default. Raises `InputError` for anything else."""
    name, colon, argument = text.partition(":")
    policies: dict[str, Callable[[float], Policy]] = {
        "within": Within,
        "cheapest": Cheapest,
        "fastest": Fastest,
        "weighted": Weighted,
    }
    if name == "best" and not argument:
        return Best()
    if name == "within" and not colon:
        return Within()
    if name not in policies:
        raise UnknownName("policy", text, POLICIES)
    try:
        value = float(argument)
    except ValueError:
        raise InputError(f"policy {text!r} wants a number, such as {name}:0.6") from None
    return policies[name](value)


def as_policy(policy: str | Policy) -> Policy:
    """A policy from its text, or itself. Raises `InputError` for anything else."""
    if isinstance(policy, Policy):
        return policy
    return parse_policy(checked_type("policy", policy, str, "a text such as best, or a Policy"))


def choose(table: RoutingTable, left_nanousd: int | None, policy: Policy) -> Route:
    """Choose a pair among those whose p90 cost fits the budget; one of unknown accuracy (NaN) is left out.

    Args:
        table: a row for every pair.
        left_nanousd: the rest of the budget in nano-dollars; None: no limit.
        policy: picks one of the rows that fit.

    Raises:
        InputError: the table is empty, or no accuracy is known.
        BudgetExceeded: no row fits.
    """
    row, why = _pick(_fitting(table.rows, left_nanousd), policy)
    return Route(row.pair, row, why)


def choose_plan(rows: Sequence[PlanRow], left_nanousd: int | None, policy: Policy) -> PlanRoute:
    """Choose a plan among those whose p90 cost fits the budget, as `choose` does a pair."""
    row, why = _pick(_fitting(rows, left_nanousd), policy)
    return PlanRoute(row.plan, row, why)


def _pick(rows: list[TableRow], policy: Policy) -> tuple[TableRow, str]:
    """The policy's pick; where a prior has a view of this question, never dearer than by its averages."""
    row, why = policy.pick(rows)
    if any(each.average is not None for each in rows):
        averages = [
            each if each.average is None else replace(each, accuracy=each.average, average=None)
            for each in rows
        ]
        usual, usual_why = policy.pick(averages)
        if usual.expected_cost < row.expected_cost:
            row, why = rows[averages.index(usual)], f"{usual_why}, by averages"
    return row, f"{why}; {row.origin}" if row.origin else why


def _seconds_of(row: Costed) -> float:
    """What decides between rows that are equal otherwise."""
    return math.inf if row.seconds is None else row.seconds


def _ways(rows: Sequence[object]) -> str:
    return "the only way that fits" if len(rows) == 1 else f"the {len(rows)} ways that fit"


def _fitting(rows: Sequence[TableRow], left_nanousd: int | None) -> list[TableRow]:
    if not rows:
        raise InputError("no pair is left to choose from; pull weights or profile more pairs")
    rows = [row for row in rows if row.accuracy == row.accuracy]
    if not rows:
        raise InputError("the router knows no accuracy of any pair; a number between 0 and 1 is one")
    fitting = [row for row in rows if left_nanousd is None or row.cost_p90 <= left_nanousd]
    if not fitting:
        cheapest = min(row.cost_p90 for row in rows)
        raise BudgetExceeded(
            f"no pair fits: the cheapest may cost {format_usd(cheapest)} and "
            f"{format_usd(left_nanousd or 0)} is left; raise the budget, or allow cheaper models or fewer "
            "tokens",
            needed=cheapest,
            left=left_nanousd or 0,
        )
    return fitting
