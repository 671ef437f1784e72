"""Holds of the model calls of one middleware: of a call, and of each further attempt of its client.

Leaves out what a call takes at most (`call_bounds`), and when it is made (`middleware`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from langchain_core.language_models import BaseChatModel

from viaticum.agents.integrations.call_attempts import Attempts
from viaticum.agents.integrations.call_bounds import model_name
from viaticum.agents.integrations.held_calls import HeldCall
from viaticum.agents.integrations.model_labels import ChatModelGuard
from viaticum.budgets import Ledger
from viaticum.money import Price
from viaticum.types import TokenCount

BYTES_COUNTED = "every byte counts as a token, which is several times too many; count takes a tokenizer"


@dataclass(frozen=True)
class CallHolds:
    """Reserves calls in a budget.

    Args:
        budget: the name of the one that pays.
        prices: by model name.
        unpriced: names of models that may go without a price.
        guard: knows where the data of a model goes.
        count: an upper bound of the tokens of a text; None where its bytes are counted.
    """

    ledger: Ledger
    budget: str
    prices: Mapping[str, Price]
    unpriced: tuple[str, ...]
    guard: ChatModelGuard
    count: Callable[[str], int] | None

    def count_text(self, text: str) -> int:
        """An upper bound of the tokens of a text."""
        return len(text.encode(errors="surrogatepass")) if self.count is None else self.count(text)

    def reserve(self, key: str, model: BaseChatModel, worst: TokenCount) -> None:
        """Reserve a call of a model under a key. Raises as `Ledger.reserve` does."""
        name = model_name(model)
        self.ledger.reserve(
            self.budget,
            key,
            {name: worst},
            self.prices,
            tags={"model": name, "door": "agent"},
            unpriced=self.unpriced,
            hint=BYTES_COUNTED if self.count is None else "",
            labels=self.guard.labels(name, model),
        )

    def attempts(self, held: HeldCall) -> Attempts:
        """The attempts of a call that is held. A further one is held as the first, or as its request says."""

        def reserve(key: str, most: TokenCount | None) -> None:
            hold = self.ledger.hold(held.key)
            assert hold is not None
            (worst,) = hold.usage.values()
            self.reserve(key, held.request.model, most or worst)

        return Attempts(self.ledger, held.key, reserve, self.count_text)
