"""The learned query router: predicts accuracy, tokens and cost of every pair and plan for a question.

Route-To-Reason (RTR, arXiv 2505.19435), extended: several heads, calibrated on out-of-fold predictions;
quantiles of tokens; plans that call an expensive pair only where cheap ones disagree; and trust, which moves
the predictions for a question that is far from all known ones to the static means. Made by
`viaticum.routers.query.fit`, written and read by `viaticum.routers.query.storage`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from viaticum.errors import InputError
from viaticum.money import NANOUSD_PER_USD
from viaticum.routers.query.base import QueryRouter
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.heads import NEIGHBOURS, NeighboursHead, log_odds
from viaticum.routers.query.parameters import RouterParameters
from viaticum.routers.query.plans import Plan, PlanRow
from viaticum.routers.query.storage import load_parameters, save_parameters
from viaticum.types import Query, RoutingTable, Row

GOLDEN_RATIO = (5**0.5 - 1) / 2  # fractional parts of its multiples are spread evenly
CACHE_SIZE = 32  # questions whose predictions are kept
TRUST_NEIGHBOURS = 10  # questions whose mean similarity determines trust


class Prediction(NamedTuple):
    """Predictions for N questions.

    Args:
        accuracy: probability of a correct answer [N, M].
        cost: expected dollars [N, M].
        tokens: output tokens of the pairs, median and 90% quantile [N, P, 2].
        trust: 0 far from all known questions, 1 among them [N].
        indices: the nearest known questions [N, K].
    """

    accuracy: Tensor
    cost: Tensor
    tokens: Tensor
    trust: Tensor
    indices: Tensor


class RTRRouter(QueryRouter):
    """Predicts with fitted parameters.

    Args:
        parameters: what fitting found.
        encoder: the encoder that they were fitted with; by default the one that they name.
    """

    def __init__(self, parameters: RouterParameters, encoder: Encoder | None = None) -> None:
        self.parameters = parameters
        self._given_encoder = encoder
        added = parameters.added.pairs if parameters.added else ()
        self.pairs = parameters.pairs + added
        self.plans = parameters.plans + tuple(Plan((pair,)) for pair in added)
        # The column of each pair: added pairs come after the plans.
        self.pair_columns = [
            *range(len(parameters.pairs)),
            *range(len(parameters.plans), len(parameters.plans) + len(added)),
        ]
        self._correct = NeighboursHead(parameters.embeddings, parameters.correct)
        self._cost = NeighboursHead(parameters.embeddings, parameters.cost)
        # Routing asks about a question several times: for its table, its plans, and the pair that is chosen.
        self._cache: OrderedDict[str, Prediction] = OrderedDict()
        self._cache_size = CACHE_SIZE
        self._cache_lock = threading.Lock()

    @cached_property
    def encoder(self) -> Encoder:
        return self._given_encoder or Encoder(self.parameters.facts["encoder"])

    # --- predictions ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, embeddings: Tensor) -> Prediction:
        """Predictions for many questions at once; embeddings [N, D] of length 1."""
        parameters = self.parameters
        cosines, indices = self._correct.nearest(embeddings, NEIGHBOURS)
        dual, log_tokens = parameters.dual.predict(embeddings)
        heads = {
            "logistic": lambda: parameters.logistic(embeddings),
            "neighbours": lambda: log_odds(self._correct.mean(cosines, indices)),
            "dual": lambda: dual,
        }
        accuracy = parameters.mixture([heads[name]() for name in parameters.settings.heads])
        cost = self._cost.mean(cosines, indices)
        low, high = parameters.trust_limits.tolist()
        trust = ((cosines[:, :TRUST_NEIGHBOURS].mean(1) - low) / max(high - low, 1e-6)).clamp(0, 1)
        if parameters.settings.trust:
            share = trust[:, None]
            accuracy = share * accuracy + (1 - share) * parameters.static_means[0]
            cost = share * cost + (1 - share) * parameters.static_means[1]
        tokens = (log_tokens + parameters.token_offsets).exp()
        tokens[..., 1] = tokens.amax(-1)
        if parameters.added is not None:
            added = parameters.added.predict(accuracy[:, : len(parameters.pairs)], tokens)
            accuracy, cost = torch.cat((accuracy, added[0]), 1), torch.cat((cost, added[1]), 1)
            tokens = torch.cat((tokens, added[2]), 1)
        return Prediction(accuracy, cost, tokens, trust, indices)

    def predict_texts(self, texts: Sequence[str]) -> Prediction:
        return self.predict(self.encoder(texts))

    def prefetch(self, queries: Sequence[Query]) -> None:
        """Predict for many queries in one batch and cache the predictions."""
        with self._cache_lock:
            self._cache_size = max(CACHE_SIZE, 2 * len(queries))
            missing = list(dict.fromkeys(query.text for query in queries if query.text not in self._cache))
        if missing:
            prediction = self.predict_texts(missing)
            rows = [Prediction(*(each[n : n + 1] for each in prediction)) for n in range(len(missing))]
            self._store(dict(zip(missing, rows, strict=True)))

    def _predict_text(self, text: str) -> Prediction:
        with self._cache_lock:
            cached = self._cache.get(text)
            if cached is not None:
                self._cache.move_to_end(text)
                return cached
        prediction = self.predict_texts([text])
        self._store({text: prediction})
        return prediction

    def _store(self, predictions: dict[str, Prediction]) -> None:
        with self._cache_lock:
            self._cache |= predictions
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)

    def table(self, query: Query) -> RoutingTable:
        """A row for every pair; costs in nano-dollars, prompt included where the outcomes counted it."""
        prediction = self._predict_text(query.text)
        added = self.parameters.added
        prices = (
            self.parameters.prices if added is None else torch.cat((self.parameters.prices, added.prices))
        )
        rows = []
        for pair, column, (median, high), (per_prompt, per_token) in zip(
            self.pairs, self.pair_columns, prediction.tokens[0].tolist(), prices.tolist(), strict=True
        ):
            accuracy = float(prediction.accuracy[0, column])
            costs = [_nanousd(per_prompt + per_token * tokens) for tokens in (median, high)]
            rows.append(Row(pair, accuracy, round(median), round(high), costs[0], costs[1]))
        return RoutingTable(tuple(rows))

    def plans_for(self, query: Query) -> list[PlanRow]:
        """A row for every plan; cost_p90 is the 90% quantile over its 60 nearest known questions."""
        prediction = self._predict_text(query.text)
        known = self.parameters.cost[prediction.indices[0]]
        high = torch.nanquantile(known, 0.9, dim=0).nan_to_num(0.0)
        if (added := self.parameters.added) is not None:
            tokens_p90 = prediction.tokens[0, len(self.parameters.pairs) :, 1]
            high = torch.cat((high, added.prices[:, 0] + added.prices[:, 1] * tokens_p90))
        return [
            PlanRow(plan, accuracy, _nanousd(cost), _nanousd(max(cost, cost_p90)))
            for plan, accuracy, cost, cost_p90 in zip(
                self.plans,
                prediction.accuracy[0].tolist(),
                prediction.cost[0].tolist(),
                high.tolist(),
                strict=True,
            )
        ]

    # --- choices for many questions -------------------------------------------------------------------------

    def choose_columns(self, prediction: Prediction, cost_weight: float) -> Tensor:
        """For each question the column of the highest accuracy minus weighted expected dollars [N]."""
        return (prediction.accuracy - cost_weight * prediction.cost).argmax(1)

    def choose_within(self, prediction: Prediction, dollars: float) -> Tensor:
        """Columns whose expected mean cost is at most `dollars` [N].

        They are chosen at the lowest cost weight that keeps to it. Where many questions have the same
        predictions (far from all known ones) the cost jumps at a cost weight; the rest of the money then
        moves an evenly spread part of the questions to the more expensive choice, so that the result is a
        mixture of two columns.
        """
        within, beyond = self._bracket_cost_weight(prediction, dollars)
        cheap, expensive = (self.choose_columns(prediction, each) for each in (within, beyond))
        low, high = (self.expected_cost(prediction, each) for each in (within, beyond))
        if not low < dollars < high:
            return cheap
        share = (dollars - low) / (high - low)
        numbers = torch.arange(len(cheap), dtype=torch.float64)
        return torch.where((numbers * GOLDEN_RATIO) % 1 < share, expensive, cheap)

    def cost_weight_for(self, prediction: Prediction, dollars: float) -> float:
        """The lowest cost weight at which these questions are expected to cost at most `dollars` on average.

        Expected costs are corrected by `cost_ratios`: what is chosen because it looks cheap tends to cost
        more than predicted. Uses predictions only. Where even the cheapest choice costs more, the result is
        that choice's weight.
        """
        return self._bracket_cost_weight(prediction, dollars)[0]

    def _bracket_cost_weight(self, prediction: Prediction, dollars: float) -> tuple[float, float]:
        """Cost weights just above and below the one at which the expected cost reaches `dollars`."""
        low, high = -3.0, 6.0
        for _ in range(40):
            middle = (low + high) / 2
            if self.expected_cost(prediction, 10**middle) <= dollars:
                high = middle
            else:
                low = middle
        return float(10**high), float(10**low)

    def expected_cost(self, prediction: Prediction, cost_weight: float) -> float:
        """Corrected mean dollars a question of the columns chosen at a cost weight."""
        chosen = self.choose_columns(prediction, cost_weight)
        cost = float(prediction.cost.gather(1, chosen[:, None]).mean())
        if not self.parameters.settings.spend:
            return cost
        weights, ratios = self.parameters.cost_weights.numpy(), self.parameters.cost_ratios.numpy()
        return cost * float(np.interp(np.log(cost_weight), np.log(weights), ratios))

    # --- files ----------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write router.json and router.safetensors; the last version moves to `previous/`."""
        save_parameters(self.parameters, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, encoder: Encoder | None = None) -> RTRRouter:
        """Read a router that `save` wrote.

        Raises:
            InputError: there is no router in the folder.
            DataError: it is damaged, or of a later format.
        """
        return cls(load_parameters(Path(folder)), encoder)

    def check_fits(self, models: Sequence[str], strategies: Sequence[str]) -> None:
        """Raise `InputError` naming the models and strategies of this router that are not among these."""
        unknown = sorted({pair.model for pair in self.pairs} - set(models))
        unknown += sorted({pair.strategy for pair in self.pairs} - set(strategies))
        if unknown:
            raise InputError(
                f"the router knows {', '.join(unknown)}, which this catalogue does not; fit it again, or use "
                "the catalogue that it was fitted with"
            )


def _nanousd(dollars: float) -> int:
    return max(0, round(dollars * NANOUSD_PER_USD))
