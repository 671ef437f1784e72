"""Which rows of a job may wait for a provider's batch, and what a call costs there.

A row may wait where its plan is one call of one remote model with a batch endpoint, and where the job's
deadline leaves the provider the time that it asks for. A batch is given up early enough for its rows to be
asked directly before the deadline. Leaves out the choice among plans (`agents.batch.planning`) and the
batches themselves (`agents.batch.deferred`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from viaticum.agents.batch.input import BatchRow
from viaticum.catalogue import Catalogue
from viaticum.errors import ViaticumError
from viaticum.models.base import Model
from viaticum.money import Price
from viaticum.routers.query import Plan
from viaticum.strategies import get as get_strategy
from viaticum.types import Pair

DIRECT_SHARE = 1 / 24  # of a deadline, kept to ask directly what a batch has not answered
LEAST_SHARE = 1 / 4  # of the time that a provider asks for, below which no further batch is sent


def never(row: BatchRow) -> bool:
    return False


@dataclass
class Deferral:
    """Rows and models that may wait.

    Args:
        catalogue: with the entries of the models.
        model: returns a model by its name.
        deadline: seconds of the job; None for no deadline, and nothing waits.
        elapsed: returns the seconds since the job started.
        is_direct: rows that are asked directly, whatever their plan.

    Attributes:
        refused: models whose batches the provider does not take.
    """

    catalogue: Catalogue
    model: Callable[[str], Model]
    deadline: float | None
    elapsed: Callable[[], float]
    is_direct: Callable[[BatchRow], bool] = never
    refused: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._factors: dict[Pair, float | None] = {}

    def factor(self, row: BatchRow, plan: Plan) -> float | None:
        """The share of a plan's price that it costs in a batch; None where the row cannot wait for one."""
        if self.deadline is None or len(plan.pairs) != 1 or self.is_direct(row):
            return None
        pair = plan.pairs[0]
        if pair.model in self.refused:
            return None
        if pair not in self._factors:
            self._factors[pair] = None
            with suppress(ViaticumError):  # a pair that a row names: it says why when it is asked
                self._factors[pair] = self._factor_of(pair)
        factor = self._factors[pair]
        return factor if factor is not None and self.has_time(pair.model) else None

    def price_share(self, name: str) -> float:
        """What a call of a model costs in a batch of its price, whether or not one would be sent now."""
        spec = self.catalogue[name]
        return 1.0 if spec.price is None or spec.batch_price is None else _ratio(spec.batch_price, spec.price)

    def until(self) -> float | None:
        """Unix time at which a batch is given up; None for none."""
        if self.deadline is None:
            return None
        return time.time() + self.deadline * (1 - DIRECT_SHARE) - self.elapsed()

    def has_time(self, model: str) -> bool:
        """Whether a batch of a model is still sent."""
        assert self.deadline is not None
        left = self.deadline * (1 - DIRECT_SHARE) - self.elapsed()
        return left >= LEAST_SHARE * self.catalogue[model].batch_seconds

    def _factor_of(self, pair: Pair) -> float | None:
        spec = self.catalogue.get(pair.model)
        if spec is None or spec.batch_form is None or spec.price is None or spec.batch_price is None:
            return None
        if self.deadline is None or self.deadline < spec.batch_seconds:
            return None
        if get_strategy(pair.strategy).samples > 1 or not has_batches(self.model(pair.model)):
            return None
        return _ratio(spec.batch_price, spec.price)


def has_batches(model: Model) -> bool:
    """Whether a model is one of the catalogue's remote ones, and not an object in its place."""
    from viaticum.models.remote.model import RemoteModel

    return isinstance(model, RemoteModel)


def deferred_prices(catalogue: Catalogue, name: str) -> dict[str, Price]:
    """The price of a model in a batch, as a hold takes it."""
    price = catalogue[name].batch_price
    return {} if price is None else {name: price}


def _ratio(batch: Price, direct: Price) -> float:
    """Of two prices of the same model; the larger of input and output."""
    rates = (
        (batch.input_nanousd_per_million, direct.input_nanousd_per_million),
        (batch.output_nanousd_per_million, direct.output_nanousd_per_million),
    )
    return max((part / whole for part, whole in rates if whole), default=1.0)
