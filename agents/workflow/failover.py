"""Failover: which errors of a call another model may not have, and which pairs are left after them.

The state keeps the failures of a question as [pair, class of the error, message]. A model that was limited,
away or refused the content is not asked again for this question, whatever the strategy; a prompt that was too
long for one pair may fit another one of the same model. Leaves out choosing among what is left
(`viaticum.agents.workflow.graph`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from viaticum.agents.workflow.calls import existing_tries
from viaticum.budgets import Entry, Ledger
from viaticum.errors import (
    ContentRefused,
    ModelUnavailable,
    PromptTooLong,
    ProviderUnavailable,
    RateLimited,
)
from viaticum.types import Pair

FAILOVER = (ModelUnavailable, RateLimited, ProviderUnavailable, ContentRefused, PromptTooLong)


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that no answer came of. pair: as model+strategy; kind: the class of its error."""

    pair: str
    kind: str
    message: str

    @classmethod
    def of(cls, pair: str, error: Exception) -> Failure:
        return cls(pair, type(error).__name__, str(error))

    @property
    def as_list(self) -> list[str]:
        return [self.pair, self.kind, self.message]

    @property
    def why(self) -> str:
        return f"{self.pair} failed: {self.message}"


def failures_of(state: Mapping[str, Any]) -> list[Failure]:
    return [Failure(*each) for each in state.get("failures") or ()]


def last_failure(state: Mapping[str, Any]) -> str:
    """Why the latest pair could not answer; "" if it did."""
    failures = failures_of(state)
    return failures[-1].why if failures and failures[-1].pair == state["tried"][-1] else ""


def may_ask(state: Mapping[str, Any], pair: Pair) -> bool:
    """Whether a pair may answer where others failed."""
    return not any(
        str(pair) == failure.pair
        or (failure.kind != PromptTooLong.__name__ and pair.model == Pair.parse(failure.pair).model)
        for failure in failures_of(state)
    )


def posts_of_tries(ledger: Ledger, first: str) -> Iterator[Entry]:
    """The entries that charged for the tries of a call. first: the key of its first try."""
    for hold in existing_tries(ledger, first):
        yield from (entry for entry in ledger.entries(key=hold.key) if entry.kind == "post")


def cost_of_tries(ledger: Ledger, first: str) -> int:
    """Nano-dollars."""
    return sum(entry.nanousd for entry in posts_of_tries(ledger, first))


def has_written(ledger: Ledger, first: str) -> bool:
    """Whether text came of a call before it failed."""
    return any(
        count.output_tokens for entry in posts_of_tries(ledger, first) for count in entry.usage.values()
    )


def next_call_is_known(ledger: Ledger, first: str) -> bool:
    """Whether an earlier run of a row, which a kill ended, went on from this call to the next one."""
    run, number = first.rsplit("/", 1)
    return ledger.hold(f"{run}/{int(number) + 1}") is not None
