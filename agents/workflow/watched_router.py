"""A router that notices when its models change: it compares settled calls with what it expected of them.

The evidence lies where it is anyway: what was expected is a tag of a call's hold, what became of it is the
call's post in the ledger, and `feedback` says which answers were right. So every process finds the same, and
a new one goes on where others stopped. A change is told once, as a warning and as a line of `changes.jsonl`
in the folder of the ledger, which holds until the model is profiled again. Leaves out the test itself and
what follows for predictions (`viaticum.routers.query.change_detection`, `changed_models`).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from viaticum.agents.workflow.settings import LIVE_OUTCOMES
from viaticum.agents.workflow.settled_calls import EXPECTED, SettledCalls
from viaticum.budgets import Ledger, default_path
from viaticum.errors import InputError, ViaticumError
from viaticum.files import whole_lines
from viaticum.questions import digest_of
from viaticum.routers.query import PlanRow, QueryRouter
from viaticum.routers.query.base import Knowledge
from viaticum.routers.query.change_detection import DISMISSED, Expectation, ModelChange, ModelWatch
from viaticum.strategies import get as get_strategy
from viaticum.strategies import is_known
from viaticum.types import Query, RoutingTable, Row

CHANGES = "changes.jsonl"  # what was told, in the folder of the ledger
REFRESH_SECONDS = 30.0
_log = logging.getLogger("viaticum")


def expected_tags(router: QueryRouter, query: Query, row: Row) -> dict[str, str]:
    """The tag of a call: what was expected of it; none where it would tell nothing about its model.

    A strategy of several samples has none: what is expected is about all of them together.
    """
    if not is_known(row.pair.strategy) or get_strategy(row.pair.strategy).samples > 1:
        return {}
    expected = router.expectation(query, row)
    return {} if expected is None else {EXPECTED: replace(expected, question=digest_of(query.text)).text}


class WatchedRouter(QueryRouter):
    """The predictions of another router, corrected once models have changed. Threads may share it.

    Args:
        router: one with `profiles`.
        ledger: where its calls are settled.
        folder: of the ledger, with what `feedback` recorded and what was told; None where there is none, as
            for a ledger in memory.
    """

    def __init__(self, router: QueryRouter, ledger: Ledger, folder: Path | None) -> None:
        self.router, self._folder = router, folder
        self._current, self._profiles = router, router.profiles()
        self._watches = {model: ModelWatch() for model in self._profiles}
        self._changes: dict[str, ModelChange] = {}
        self._since: dict[str, str] = {}  # by model, when a change was taken back
        self._lock = threading.Lock()
        self._calls, self._read_at, self._answers_read = SettledCalls(ledger), float("-inf"), 0

    # The router

    def table(self, query: Query) -> RoutingTable:
        return self.frozen().table(query)

    def prefetch(self, queries: Sequence[Query]) -> None:
        self.frozen().prefetch(queries)

    def plans_for(self, query: Query) -> list[PlanRow]:
        return self.frozen().plans_for(query)

    def has_seen(self, query: Query) -> bool | None:
        return self._current.has_seen(query)

    def knowledge(self) -> tuple[Knowledge, ...]:
        return self.router.knowledge()

    @property
    def has_plans(self) -> bool:
        return self.router.has_plans

    def profiles(self) -> Mapping[str, str]:
        return self._profiles

    def expectation(self, query: Query, row: Row) -> Expectation | None:
        return self._current.expectation(query, row)

    def frozen(self) -> QueryRouter:
        """The router as it is now. What was settled since is read first, at most every half minute."""
        with self._lock:
            if time.monotonic() - self._read_at >= REFRESH_SECONDS:
                self._read_at = time.monotonic()
                try:
                    self._read()
                except ViaticumError as error:
                    _log.warning("whether models have changed could not be read: %s", error)
            return self._current

    # What is known

    @property
    def changes(self) -> Mapping[str, ModelChange]:
        """By model, as far as was read."""
        return dict(self._changes)

    def _read(self) -> None:
        before = dict(self._changes)
        self._read_changes()
        self._read_posts()
        self._read_answers()
        for model, watch in self._watches.items():
            if watch.changed and model not in self._changes:
                self._tell(watch.change(model, self._profiles[model], now()))
        if self._changes != before:
            self._current = self.router.with_changes(self._changes)

    def _read_changes(self) -> None:
        """What was told, here or elsewhere; evidence from before a change was taken back does not count."""
        for change in read_changes(self._folder) if self._folder is not None else ():
            model = change.model
            if self._profiles.get(model) != change.profile or change.at <= self._since.get(model, ""):
                continue
            if change.kind != DISMISSED:
                self._changes.setdefault(model, change)
                continue
            self._changes.pop(model, None)
            self._since[model], self._watches[model] = change.at, ModelWatch()

    def _read_posts(self) -> None:
        """Calls that were reserved before a change was taken back do not count."""
        for call in self._calls.read():
            if call.expected is None or self._profiles.get(call.model) != call.expected.profile:
                continue
            if call.reserved_at > self._since.get(call.model, ""):
                self._watches[call.model].add_call(call.expected, call.tokens, call.cost)

    def _read_answers(self) -> None:
        """The lines of `feedback` that are new; those from before a change was taken back do not count."""
        if self._folder is None:
            return
        for number, line in _records(self._folder / LIVE_OUTCOMES, self._answers_read):
            self._answers_read = number
            model, accuracy = str(line.get("model")), line.get("expected_accuracy")
            if not isinstance(accuracy, float) or self._profiles.get(model) != line.get("profile"):
                continue
            if model in self._since and str(line.get("at", "")) <= self._since[model]:
                continue
            question = line.get("question_id")
            answer = None if question is None else f"{question} {line.get('strategy')}"
            self._watches[model].add_answer(accuracy, line.get("correct") is True, answer)

    def _tell(self, change: ModelChange) -> None:
        self._changes[change.model] = change
        _log.warning(
            "%s is no longer as it was profiled: %s, by %s calls; it is trusted less until it is profiled "
            "again and the router fitted with that",
            change.model,
            change.why,
            change.calls,
        )
        try:
            if self._folder is not None:
                append_change(self._folder, change)
        except InputError as error:
            _log.warning("%s", error)


def folder_of(where: str | Path | None) -> Path:
    """The folder of a ledger, where `changes.jsonl` is; that of this user's ledger for one that is no file.

    where: as `Ledger` takes it.
    """
    text = str(where or default_path())
    is_file = "://" not in text and not text.startswith("memory:")
    return (Path(text).expanduser() if is_file else default_path()).absolute().parent


def append_change(folder: Path, change: ModelChange) -> None:
    """Write a line, in one write: other processes append too. Raises `InputError` where it cannot."""
    path = folder / CHANGES
    try:
        with path.open("ab", buffering=0) as file:
            file.write((json.dumps(change.to_json()) + "\n").encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def current_changes(folder: Path, profiles: Mapping[str, str] | None = None) -> dict[str, ModelChange]:
    """Changes by model that were told and not taken back since.

    profiles: of a router; only changes of these. By default the newest of each model.
    """
    found: dict[str, ModelChange] = {}
    for change in read_changes(folder):
        if profiles is not None and profiles.get(change.model) != change.profile:
            continue
        if change.kind == DISMISSED:
            found.pop(change.model, None)
        else:
            found[change.model] = change
    return found


def read_changes(folder: Path) -> Iterator[ModelChange]:
    """What was told; lines that are none are left out."""
    for _, line in _records(folder / CHANGES):
        try:
            yield ModelChange.from_json(line)
        except (KeyError, TypeError, ValueError):
            continue


def now() -> str:
    """As the entries of a ledger have it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _records(path: Path, after: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file and the numbers of their lines, those above `after`.

    None where there is no file; lines that are none are left out.
    """
    if not path.is_file():
        return
    for number, text in whole_lines(path):
        if number <= after:
            continue
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield number, found
