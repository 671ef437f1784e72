"""Sessions: a conversation keeps its model while that is worth it, and goes on with a better one in trouble.

A session is a name that the caller gives. What is remembered of it, in this process, is the model of its last
turn, how much of the conversation that model has read, and which of its last turns gave an answer. The choice
itself is that of an agent's step (`viaticum.routers.query.steps`): a switch is priced by the cache that it
loses, over the turns that are expected. Leaves out the texts of a conversation, which callers send.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from viaticum.budgets.records import digest
from viaticum.catalogue import Catalogue
from viaticum.checks import checked_text
from viaticum.errors import InputError
from viaticum.models.base import BYTES_PER_TOKEN
from viaticum.money import Price
from viaticum.routers.query import PlanRoute, PlanRow, Policy
from viaticum.routers.query.steps import RECENT, StepChoice, StepState, choose_step
from viaticum.types import Message, RoutingTable, Row

MOST = 10_000  # sessions that are remembered, the latest used ones
LONGEST = 200  # characters of a name


@dataclass(frozen=True, slots=True)
class _Session:
    """model: of the last turn; tokens: read and written; results: whether turns gave an answer."""

    model: str
    tokens: int
    results: tuple[bool, ...]


class Sessions:
    """What is remembered of sessions, by their names. Threads may share one."""

    def __init__(self, most: int = MOST) -> None:
        self._most, self._lock = most, threading.Lock()
        self._sessions: OrderedDict[str, _Session] = OrderedDict()

    def model(self, name: str) -> str | None:
        """The model of the last turn; None before the first."""
        with self._lock:
            found = self._sessions.get(name)
        return None if found is None else found.model

    def state(self, name: str, messages: Iterable[Message], *, in_loop: bool = False) -> StepState:
        """Where a session stands before a turn.

        Args:
            messages: of the turn: the conversation before it, and the question.
            in_loop: whether the turn answers results of tools.
        """
        with self._lock:
            found = self._sessions.get(name)
        tokens = count_tokens(messages)
        if found is None:
            return StepState(None, tokens, in_loop=in_loop)
        return StepState(found.model, tokens, min(found.tokens, tokens), found.results, in_loop)

    def note(self, name: str, model: str, tokens: int, *, answered: bool) -> None:
        """Remember a turn that has ended. tokens: of its conversation, with its text."""
        with self._lock:
            before = self._sessions.pop(name, None)
            results = (*(before.results if before is not None else ()), answered)[-RECENT:]
            self._sessions[name] = _Session(model, tokens, results)
            while len(self._sessions) > self._most:
                self._sessions.popitem(last=False)


def checked_session(name: str) -> str:
    """The name of a session. Raises `InputError` where it is none."""
    if len(checked_text("session", name)) > LONGEST:
        raise InputError(f"the name of a session has {LONGEST} characters at most, got {len(name)}")
    return name


def count_tokens(messages: Iterable[Message], text: str = "") -> int:
    """An estimate of the tokens of a conversation. text: of the answer."""
    texts = [*(each["content"] or "" for each in messages), text]
    return sum(len(each.encode(errors="replace")) for each in texts) // BYTES_PER_TOKEN


def known_prices(catalogue: Catalogue, models: Iterable[str]) -> dict[str, Price]:
    """Prices by model; a pair has none, so that its row's costs count."""
    found = {name: catalogue[name].price for name in models if name in catalogue}
    return {name: price for name, price in found.items() if price is not None}


def session_tags(sessions: Sessions, session: str | None, model: str) -> dict[str, str]:
    """What a hold says of its session: a digest of the name, and the model that is left for this one."""
    if session is None:
        return {}
    before = sessions.model(session)
    switched = {"switched_from": before} if before is not None and before != model else {}
    return {"session": digest(session)[:12], **switched}


def choose_turn(
    rows: Mapping[str, Row], state: StepState, catalogue: Catalogue, policy: Policy, left: int | None
) -> StepChoice:
    """The model of a turn, among those that may be asked. Raises `BudgetExceeded`.

    rows: of each model its best one. left: nano-dollars; None for no limit.
    """
    table = RoutingTable(tuple(rows.values()))
    choice = choose_step(table, state, known_prices(catalogue, rows), policy, left=left)
    if state.model is None or choice.switched:
        return choice
    return StepChoice(choice.model, f"{choice.why}; the session stays with it", False, choice.cost)


def route_turn(
    plans: Sequence[PlanRow],
    table: RoutingTable,
    state: StepState,
    catalogue: Catalogue,
    policy: Policy,
    left: int | None,
) -> PlanRoute | None:
    """The plan of a turn: one pair, the best of the model that the session takes. Raises `BudgetExceeded`.

    None where no plan is a single pair.
    """
    single = {row.plan.pairs[0]: row for row in plans if len(row.plan.pairs) == 1}
    best: dict[str, Row] = {}
    for row in table:
        name = row.pair.model
        if row.pair in single and (name not in best or row.accuracy > best[name].accuracy):
            best[name] = row
    if not best:
        return None
    choice = choose_turn(best, state, catalogue, policy, left)
    plan = single[best[choice.model].pair]
    return PlanRoute(plan.plan, plan, choice.why)
