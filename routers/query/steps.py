"""Choosing the model of each step of an agent: what a switch costs, when to escalate, what a step may cost.

A provider keeps the prompt of the last step in its cache, and another model reads all of it anew. So a model
is priced over the steps that are still expected: the first with what is cached for it, the others cached.
That makes a switch as dear as it is, and staying as cheap. Leaves out predictions (`QueryRouter`) and what
the messages of an agent look like (`viaticum.agents.integrations.agent_steps`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from viaticum.errors import BudgetExceeded
from viaticum.money import Price, format_usd
from viaticum.routers.query.choose import Policy, choose
from viaticum.types import RoutingTable, Row

EXPECTED_STEPS = 6  # of a run, before any has ended
RECENT, TROUBLE = 3, 2  # an agent is in trouble while this many of its last results of tools are errors


@dataclass(frozen=True, slots=True)
class StepState:
    """Where an agent stands before a step.

    Attributes:
        model: of the last step; None before the first.
        prompt_tokens: of this step.
        cached_tokens: part of them that the last step's provider has read before.
        results: whether each result of a tool was right so far, oldest first; False is an error.
        in_loop: whether the step answers results of tools, so that a chain of calls is under way.
    """

    model: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    results: tuple[bool, ...] = ()
    in_loop: bool = False

    @property
    def in_trouble(self) -> bool:
        """Whether at least two of the last three results of tools are errors."""
        return self.results[-RECENT:].count(False) >= TROUBLE


@dataclass(frozen=True, slots=True)
class StepChoice:
    """The model of a step.

    Attributes:
        model: its name.
        why: the reason, as a text.
        switched: whether it is another one than that of the last step.
        cost: expected nano-dollars of this step.
    """

    model: str
    why: str
    switched: bool
    cost: int


def choose_step(
    table: RoutingTable,
    state: StepState,
    prices: Mapping[str, Price],
    policy: Policy,
    *,
    left: int | None = None,
    steps: float = EXPECTED_STEPS,
) -> StepChoice:
    """Choose the model of a step.

    Inside a chain of tool calls the model stays, unless the agent is in trouble: then one that is more
    accurate by the table goes on, and the choice is free again when the trouble is over.

    Args:
        table: a row a model. Its costs are replaced where a price is known.
        state: where the agent stands.
        prices: by model.
        policy: picks among the rows that the budget can pay for.
        left: nano-dollars that the rest of the run may cost; None for no limit.
        steps: steps still expected, this one included.

    Raises:
        BudgetExceeded: not even the cheapest model can be expected to make the step.
    """
    steps = max(1.0, steps)
    rows = {row.pair.model: _over(row, state, prices.get(row.pair.model), steps) for row in table}
    current = rows.get(state.model or "")
    if current is not None and state.in_trouble:
        better = [row for row in rows.values() if row.accuracy > current.accuracy]
        if better and (up := _pick(better, policy, left, steps)) is not None:
            wrong = state.results[-RECENT:].count(False)
            return _choice(up[0], state, f"{wrong} of the last results of tools were errors: {up[1]}", steps)
        if _fits(current, left, steps):
            return _choice(current, state, "in trouble, and nothing better can be paid for", steps)
    elif current is not None and state.in_loop and _fits(current, left, steps):
        return _choice(current, state, "stays until the chain of tool calls ends", steps)
    picked = _pick(list(rows.values()), policy, left, steps)
    if picked is None:
        cheapest = min(rows.values(), key=lambda row: row.cost_p90)
        raise BudgetExceeded(
            f"{format_usd(left or 0)} are left, a step by {cheapest.pair.model} may cost "
            f"{format_usd(int(cheapest.cost_p90 / steps))}; raise the limit, or end the run"
        )
    row, why = picked
    if current is not None and row is not current:
        why += f"; a switch from {state.model}, which has {state.cached_tokens} tokens in its cache"
    return _choice(row, state, why, steps)


def remaining_steps(lengths: Sequence[int], done: int) -> float:
    """Steps still expected of a run after `done`, this one included: the median of longer runs' rests.

    lengths: steps of runs that have ended. Without one that was longer, `EXPECTED_STEPS` less `done`.
    """
    rests = [length - done for length in lengths if length > done]
    return float(statistics.median(rests)) if rests else float(max(1, EXPECTED_STEPS - done))


def _over(row: Row, state: StepState, price: Price | None, steps: float) -> Row:
    """The row with the cost of the rest of the run."""
    if price is None:
        p50, p90 = steps * row.cost_p50, steps * row.cost_p90
    else:
        kept = min(state.cached_tokens, state.prompt_tokens) if row.pair.model == state.model else 0
        p50, p90 = (
            price.cost(state.prompt_tokens, tokens, cached_input_tokens=kept)
            + (steps - 1) * price.cost(state.prompt_tokens, tokens, cached_input_tokens=state.prompt_tokens)
            for tokens in (row.tokens_p50, row.tokens_p90)
        )
    return replace(row, cost_p50=round(p50), cost_p90=round(max(p50, p90)), cost_mean=None)


def _fits(row: Row, left: int | None, steps: float) -> bool:
    """Whether one step can be paid for."""
    return left is None or row.cost_p90 <= left * steps


def _pick(rows: list[Row], policy: Policy, left: int | None, steps: float) -> tuple[Row, str] | None:
    """The policy's choice among rows that can pay for the rest of the run, else for this step alone."""
    short = "", ", for this step alone: the rest of the run cannot be paid for"
    for share, note in zip((1.0, steps), short, strict=True):
        try:
            route = choose(RoutingTable(tuple(rows)), None if left is None else int(left * share), policy)
        except BudgetExceeded:
            continue
        return next(row for row in rows if row.pair == route.pair), route.why + note
    return None


def _choice(row: Row, state: StepState, why: str, steps: float) -> StepChoice:
    switched = state.model is not None and row.pair.model != state.model
    return StepChoice(row.pair.model, why, switched, round(row.expected_cost / steps))
