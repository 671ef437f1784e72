"""One paid call of one model, streamed: worst case held before, true cost posted after, whatever happens between.

What every door shares that calls a model without the workflow (the chat model, the server's named models). The workflow's
nodes do the same in steps, with a checkpoint after each. Knows no strategy and no router.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import count
from typing import Any

from viaticum.agents.workflow.serialization import completion_from_json, completion_to_json
from viaticum.budgets import Entry, Hold, Ledger
from viaticum.catalogue import Catalogue
from viaticum.errors import HoldError, LedgerError, ProviderTimeout
from viaticum.models.base import Generation, Model
from viaticum.strategies import get as get_strategy
from viaticum.strategies import with_history
from viaticum.types import Completion, Message, Pair, Query

_GENERATION = [each.name for each in fields(Generation)]


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One call: who is asked, what, how long the answer may be, and all of it as the ledger knows it."""

    model: Model
    messages: list[Message]
    generation: Generation

    @classmethod
    def of(cls, model: Model, pair: Pair, query: Query, sample: int = 0) -> ModelCall:
        """What the strategy of a pair asks its model; sample: which of the texts that the strategy wants."""
        strategy = get_strategy(pair.strategy)
        generation = Generation(
            max_new_tokens=strategy.max_new_tokens,
            stop=strategy.stop,
            temperature=strategy.temperature,
            seed=sample,
        )
        return cls(model, with_history(query.messages, strategy.messages(query)), generation)

    @property
    def parameters(self) -> dict[str, Any]:
        written = {name: getattr(self.generation, name) for name in _GENERATION}
        return {"model": self.model.name, "messages": self.messages, **written}


def next_try(ledger: Ledger, first: str, parameters: str) -> tuple[str, Hold | None, int]:
    """The key of the next try of a call, its hold where it has one that is good, and what earlier tries cost.

    first: the key of the first try; parameters: the digest of what is asked.
    """
    wasted = 0
    for key, hold in tries(ledger, first):
        if hold is None or (hold.parameters == parameters and is_good(hold)):
            return key, hold, wasted
        posts = [entry for entry in ledger.entries(key=key) if entry.kind == "post"]
        wasted += sum(entry.nanousd for entry in posts)
    raise AssertionError("numbers do not end")


def tries(ledger: Ledger, first: str) -> Iterator[tuple[str, Hold | None]]:
    """The keys of the tries of a call with their holds, without end: there is none from the first new key on."""
    for number in count(1):
        key = first + (f".{number}" if number > 1 else "")
        yield key, ledger.hold(key)


def existing_tries(ledger: Ledger, first: str) -> Iterator[Hold]:
    """The tries of a call that there are."""
    for _, hold in tries(ledger, first):
        if hold is None:
            return
        yield hold


def is_good(hold: Hold) -> bool:
    """Whether a hold still stands for a call that can go on, or has its text."""
    if hold.state in ("void", "expired"):
        return False
    return hold.result is not None or hold.state == "dispatched"


@dataclass(frozen=True, slots=True)
class SettledCall:
    """A finished call, and the entry that posted its cost."""

    completion: Completion
    entry: Entry


@dataclass(frozen=True)
class Calls:
    """model: a model by its name."""

    catalogue: Catalogue
    ledger: Ledger
    model: Callable[[str], Model]

    def stream(
        self,
        budget: str,
        key: str,
        model: str,
        messages: Sequence[Message],
        generation: Generation,
        *,
        tags: Mapping[str, str] | None = None,
    ) -> Iterator[str | SettledCall]:
        """Pieces of text as they come, then what was paid. The worst case is held when the first piece is asked for.

        The same key and call again gives the stored text and charges nothing. Closing the iterator early posts what
        was counted until then; a model that fails before its first piece frees the hold. Raises `BudgetExceeded`,
        `BudgetClosed`, `UnknownPrice`, `PromptTooLong`, `ModelError`, and `HoldError` where the key stands for another
        call, or one that has ended without a text.
        """
        asked = self.model(model)
        worst = asked.worst_case_of(messages, generation)
        hold = self.ledger.reserve(
            budget,
            key,
            worst,
            self.catalogue.prices(worst),
            parameters={"model": model, "messages": messages, **asdict(generation)},
            tags={"model": model, **(tags or {})},
        )
        if hold.result is None:
            if hold.state != "reserved":
                raise HoldError(
                    f"the call {key!r} is {hold.state}, and no text of it was kept; take another key"
                )
            completion = yield from self._write(asked, key, messages, generation)
        else:
            completion = completion_from_json(json.loads(hold.result))
            yield completion.text
        yield SettledCall(completion, self.ledger.settle(key, completion.usage.models))

    def _write(
        self, model: Model, key: str, messages: Sequence[Message], generation: Generation
    ) -> Generator[str, None, Completion]:
        """Pieces; returns the completion, kept with the hold."""
        self.ledger.dispatch(key)
        with settle_on_failure(self.ledger, key, model, messages, generation) as pieces:
            for piece in pieces:
                if isinstance(piece, Completion):
                    self.ledger.attach(key, json.dumps(completion_to_json(piece)))
                    return piece
                yield piece
        raise AssertionError("a stream ends with its completion")


class CallStream(Iterator[str | Completion]):
    """What a model writes for one call, from the first time it is asked for. written: all of it so far."""

    def __init__(self, model: Model, messages: Sequence[Message], generation: Generation) -> None:
        self._begin = partial(model.stream, messages, generation)
        self._pieces: Iterator[str | Completion] | None = None
        self._text = ""

    def __next__(self) -> str | Completion:
        if self._pieces is None:
            self._pieces = self._begin()
        piece = next(self._pieces)
        if isinstance(piece, str):
            self._text += piece
        return piece

    @property
    def written(self) -> str:
        return self._text + getattr(
            self._pieces, "hidden_text", ""
        )  # what a remote model wrote that is no text

    def close(self) -> None:
        """A local model frees its slot, a remote one its connection; plain iterators have nothing to close."""
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()


@contextmanager
def settle_on_failure(
    ledger: Ledger, key: str, model: Model, messages: Sequence[Message], generation: Generation
) -> Iterator[CallStream]:
    """Let the model write under a hold that is dispatched. An error inside ends the hold: see `give_up`."""
    writing = CallStream(model, messages, generation)
    try:
        yield writing
    except BaseException as error:
        with suppress(LedgerError):  # what stopped the model is the error to tell
            give_up(ledger, key, model, writing.written, closed=is_caller_cancelled(error))
        raise
    finally:
        writing.close()


def give_up(ledger: Ledger, key: str, model: Model, text: str, *, closed: bool) -> None:
    """End the hold of a call that stopped early: free where nothing came of it, else what was counted is posted.

    closed: its caller went away, so that the prompt at least was read. It is charged as it was held, the text by its
    tokens and by no more than were held: each model of a pair read the prompt, and the one that was held to write
    wrote.
    """
    hold = ledger.hold(key)
    if hold is not None and (text or closed):
        made = model.count(text)
        used = {
            name: replace(worst, output_tokens=min(made, worst.output_tokens))
            for name, worst in hold.usage.items()
        }
        ledger.settle(key, used)
    else:
        ledger.void(key)


def is_caller_cancelled(error: BaseException) -> bool:
    """Whether it was the caller who ended the call, not the model: an interrupt, a closed stream, lost patience."""
    return not isinstance(error, Exception) or isinstance(error, ProviderTimeout)
