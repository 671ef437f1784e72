"""The learned query router: predicts accuracy, tokens and cost of every pair and plan for a question.

Route-To-Reason (RTR, arXiv 2505.19435), extended: several heads, calibrated on out-of-fold predictions;
quantiles of tokens; plans that call an expensive pair only where cheap ones disagree; and trust, which mixes
the predictions with the static means, the more so for a question that is far from all known ones. Made by
`viaticum.routers.query.fit`, written and read by `viaticum.routers.query.storage`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from math import isnan
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from viaticum.errors import InputError
from viaticum.money import NANOUSD_PER_USD
from viaticum.routers.query.base import Knowledge, QueryRouter
from viaticum.routers.query.calibration import without_small_savings
from viaticum.routers.query.change_detection import Expectation, ModelChange
from viaticum.routers.query.changed_models import Adjustments
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.forest import lexical_counts
from viaticum.routers.query.heads import NEIGHBOURS, QUANTILES, NeighboursHead, log_odds
from viaticum.routers.query.out_of_fold import TRUST_NEIGHBOURS
from viaticum.routers.query.parameters import RouterParameters
from viaticum.routers.query.plans import Plan, PlanRow
from viaticum.routers.query.prediction import Prediction
from viaticum.routers.query.seconds import SecondsHead, unknown_like
from viaticum.routers.query.shared_text import SharedText
from viaticum.routers.query.storage import load_parameters, save_parameters
from viaticum.routers.query.token_quantiles import log_characters
from viaticum.types import Pair, Query, RoutingTable, Row

GOLDEN_RATIO = (5**0.5 - 1) / 2  # fractional parts of its multiples are spread evenly
CACHE_SIZE = 32  # questions whose predictions are kept
SAME_AMONG = 4  # nearest questions among which one of the same text is
HOME_TRUST = 0.5  # from which a call tells more about its model than about its question


class RTRRouter(QueryRouter):
    """Predicts with fitted parameters.

    Args:
        parameters: what fitting found.
        encoder: the encoder that they were fitted with; by default the one that they name.
        changes: of models, since they were fitted.
    """

    def __init__(
        self,
        parameters: RouterParameters,
        encoder: Encoder | None = None,
        changes: Mapping[str, ModelChange] | None = None,
    ) -> None:
        self.parameters = parameters
        self._encoder, self._encoder_lock = encoder, threading.Lock()
        added = parameters.added.pairs if parameters.added else ()
        self.pairs = parameters.pairs + added
        self.plans = parameters.plans + tuple(Plan((pair,)) for pair in added)
        # The column of each pair: added pairs come after the plans.
        self.pair_columns = [
            *range(len(parameters.pairs)),
            *range(len(parameters.plans), len(parameters.plans) + len(added)),
        ]
        self._shared = SharedText.from_json(parameters.facts.get("shared_text"))
        self._correct = NeighboursHead(parameters.embeddings, parameters.correct)
        self._cost = NeighboursHead(parameters.embeddings, parameters.cost)
        known = parameters.seconds
        self._seconds = None if known is None else SecondsHead(parameters.embeddings, known)
        if (tokens := parameters.tokens) is not None:
            values = torch.cat((tokens.filled(), tokens.characters[:, None]), 1)
            self._lengths = NeighboursHead(parameters.embeddings, values)
        # Calls of each pair that a plan makes at least [M, P].
        calls = [min(plan.need, len(plan.pairs)) for plan in parameters.plans]
        self._calls = parameters.columns.members * torch.tensor(calls, dtype=torch.float32)[:, None]
        self.changes = {} if changes is None else dict(changes)
        usual = dict(zip(parameters.pairs, parameters.static_means[1].tolist(), strict=False))
        self._adjusted = Adjustments.of(self.changes, self.pairs, self.plans, usual) if self.changes else None
        # Routing asks about a question several times: for its table, its plans, and the pair that is chosen.
        self._cache: OrderedDict[str, Prediction] = OrderedDict()
        self._cache_size = CACHE_SIZE
        self._cache_lock = threading.Lock()

    @property
    def encoder(self) -> Encoder:
        """Made once, whichever thread asks first: each would load its own weights."""
        with self._encoder_lock:
            if self._encoder is None:
                facts = self.parameters.facts
                self._encoder = Encoder(facts["encoder"], windows=facts.get("windows", False))
            return self._encoder

    @cached_property
    def origin(self) -> str:
        """What it was fitted on, in words."""
        return self.parameters.origin()

    def knowledge(self) -> tuple[Knowledge, ...]:
        facts = self.parameters.facts
        models = tuple(sorted({pair.model for plan in self.plans for pair in plan.pairs}))
        error = facts.get("unseen", {}).get("ece")
        datasets, date = dict(facts.get("datasets", {})), facts.get("date", "")
        return (Knowledge("fitted", models, datasets, facts.get("questions", 0), date, "", error),)

    @torch.inference_mode()
    def predict(self, embeddings: Tensor, texts: Sequence[str] | None = None) -> Prediction:
        """Predictions for many questions at once.

        Args:
            embeddings: of length 1 [N, D].
            texts: the questions [N], whose lengths count; by default they have the usual length.
        """
        parameters = self.parameters
        cosines, indices = self._correct.nearest(embeddings, NEIGHBOURS)
        dual, log_tokens = parameters.dual.predict(embeddings)
        heads = {
            "logistic": lambda: parameters.logistic(embeddings),
            "neighbours": lambda: log_odds(self._correct.mean(cosines, indices)),
            "dual": lambda: dual,
        }
        cost = self._cost.mean(cosines, indices)
        if parameters.forest is not None:
            lexical = None if texts is None else lexical_counts(list(map(self._shared.without, texts)))
            of_forest, dollars = parameters.forest(embeddings, lexical, (cosines, indices))
            heads["forest"] = lambda: of_forest
            cost = (cost + dollars) / 2
        logits = [heads[name]() for name in parameters.settings.heads]
        if parameters.sharing is not None:
            logits = [each @ parameters.sharing.T for each in logits]
        accuracy = parameters.mixture(logits)
        share = None
        trust = parameters.trust.at(cosines[:, :TRUST_NEIGHBOURS], indices[:, :TRUST_NEIGHBOURS])
        if parameters.settings.trust:
            share, factor = (
                each[:, None] for each in (parameters.trust.share(trust), parameters.trust.factor(trust))
            )
            kept = share if self._adjusted is None else share * self._adjusted.kept[: accuracy.shape[1]]
            accuracy = parameters.trust.mixed(accuracy, parameters.static_means[0], trust, kept)
            cost = factor * (share * cost + (1 - share) * parameters.static_means[1])
        tokens, prompt, nearby = self._predict_lengths(cosines, indices, log_tokens, cost, texts)
        seconds = unknown_like(cost) if self._seconds is None else self._seconds(cosines, indices, share)
        more = nearby @ self._calls.T
        cost = (cost + more).clamp_min(0.0)
        if parameters.added is not None:
            added = parameters.added.predict(accuracy[:, : len(parameters.pairs)], tokens)
            dollars = added[1]
            if parameters.settings.trust:
                dollars = dollars * parameters.trust.factor(trust)[:, None]
            accuracy, cost = torch.cat((accuracy, added[0]), 1), torch.cat((cost, dollars), 1)
            tokens = torch.cat((tokens, added[2]), 1)
            prompt = torch.cat((prompt, torch.zeros_like(added[1])), 1)
            seconds = torch.cat((seconds, parameters.added.seconds.expand_as(added[1])), 1)
        if parameters.settings.trust:
            wider = parameters.trust.wider(trust).exp()
            usual = wider.mean(1, keepdim=True).expand(-1, tokens.shape[1] - wider.shape[1])
            tokens[..., 1] *= torch.cat((wider, usual), 1)
        if (changed := self._adjusted) is not None:
            accuracy = (accuracy + changed.accuracy).clamp(0.0, 1.0)
            cost, tokens, seconds = cost * changed.cost, tokens * changed.tokens, seconds * changed.cost
        # Kept in half precision, known embeddings are not quite of length 1.
        known = parameters.embeddings[indices[:, :SAME_AMONG]]
        nearest = torch.cosine_similarity(embeddings[:, None], known, dim=2).amax(1)
        compared = cost
        if parameters.settings.savings:
            usual = parameters.static_means[1]
            count = len(usual)
            usual = usual if changed is None else usual * changed.cost[:count]
            found = without_small_savings(accuracy[:, :count], cost[:, :count], usual)
            compared = torch.cat((found, cost[:, count:]), 1)
        return Prediction(accuracy, compared, tokens, trust, indices, prompt, more, nearest, seconds, cost)

    def _predict_lengths(
        self, cosines: Tensor, indices: Tensor, dual: Tensor, cost: Tensor, texts: Sequence[str] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What follows from the lengths of known answers and questions.

        Args:
            dual: quantiles of log tokens by the dual head [N, P, 2].
            cost: mean dollars of the nearest known questions [N, M].

        Returns:
            quantiles of output tokens [N, P, 2]; dollars by which the prompts differ from usual ones, and
            dollars by which calls differ from those of the nearest known questions, both [N, P].
        """
        fitted = self.parameters.tokens
        if fitted is None:
            tokens = (dual + self.parameters.token_offsets).exp()
            prompt = nearby = torch.zeros(dual.shape[:2], dtype=dual.dtype)
        else:
            near = self._lengths.mean(cosines, indices)
            lengths = None if texts is None else log_characters(texts)
            tokens = fitted(near[:, :-1], dual[..., 0], lengths).exp()
            characters = near[:, -1:] if lengths is None else lengths.exp()[:, None]
            usual = fitted.characters.mean()
            prompt = (characters - usual) * fitted.prompt_price
            nearby = (characters - near[:, -1:]) * fitted.prompt_price
            # The tokens grow with the length of the question as their quantiles do.
            near_prompt = self.parameters.prices[:, 0] + (near[:, -1:] - usual) * fitted.prompt_price
            of_tokens = (cost[:, : dual.shape[1]] - near_prompt).clamp_min(0.0)
            nearby = nearby + of_tokens * fitted.growth(near[:, -1].log(), lengths)
        tokens[..., 1] = tokens.amax(-1)
        return tokens, prompt, nearby

    def predict_texts(self, texts: Sequence[str]) -> Prediction:
        """Raises `InputError` for an encoder of other embeddings than the router was fitted on."""
        embeddings = self.encoder([self._shared.without(text) for text in texts])
        given, fitted = embeddings.shape[1], self.parameters.embeddings.shape[1]
        if given != fitted:
            raise InputError(
                f"the encoder {self.encoder.name} gives {given} numbers for a text, and the router was "
                f"fitted on {fitted} of {self.parameters.facts.get('encoder', 'another one')}; give that one"
            )
        return self.predict(embeddings, texts)

    def has_seen(self, query: Query) -> bool:
        return bool(self._predict_text(query.text).seen)

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
        """A row for every pair; costs in nano-dollars, prompt included where the outcomes counted it.

        Of a pair whose outcomes say no tokens these are 0, and costs those of the nearest known questions.
        """
        return self._table_of(self._predict_text(query.text))

    def _table_of(self, prediction: Prediction, known_costs: Tensor | None = None) -> RoutingTable:
        """known_costs: as `_known_costs`, where they are computed already."""
        prices = self.parameters.all_prices
        rows, tokens, seconds = [], prediction.tokens[0], prediction.seconds[0].tolist()
        per_prompt, per_token = prices[:, :1] + prediction.prompt[0][:, None], prices[:, 1:]
        if self._adjusted is None:
            dollars = per_prompt + per_token * tokens
        else:
            dollars = (per_prompt + per_token * tokens / self._adjusted.tokens) * self._adjusted.dollars
        has_tokens, cut_at = self.parameters.has_tokens, self.parameters.cut_at
        counted = tokens.masked_fill(~has_tokens[:, None], 0.0)
        if not bool(has_tokens.all()):
            known = self._known_costs(prediction) if known_costs is None else known_costs
            known = known[:, : len(self.parameters.pairs)].T
            dollars = torch.where(has_tokens[:, None], dollars, torch.cat((known, dollars[len(known) :])))
        for pair, column, (median, high), costs, cut in zip(
            self.pairs, self.pair_columns, counted.tolist(), dollars.tolist(), cut_at, strict=True
        ):
            low_cost, high_cost = _nanousd(costs[0]), _nanousd(max(costs))
            rows.append(
                Row(
                    pair,
                    float(prediction.accuracy[0, column]),
                    round(median),
                    round(max(median, high)),
                    low_cost,
                    high_cost,
                    _nanousd(float(prediction.own_cost[0, column])),
                    cut,
                    origin=self._origin_of((pair,)),
                    seconds=_known(seconds[column]),
                )
            )
        return RoutingTable(tuple(rows))

    def _origin_of(self, pairs: Iterable[Pair]) -> str:
        """What it was fitted on, and which of the pairs' models have changed since."""
        found = {pair.model: self.changes[pair.model] for pair in pairs if pair.model in self.changes}
        notes = [f"{model} has changed, by {each.at[:10]}: {each.why}" for model, each in found.items()]
        return "; ".join((self.origin, *notes))

    def plans_for(self, query: Query) -> list[PlanRow]:
        """A row for every plan: quantiles of one pair are the table's, of several those of known questions.

        These are the 60 nearest ones, with what the query's own prompt costs more.
        """
        prediction = self._predict_text(query.text)
        known = self._known_costs(prediction)
        alone, quantiles = {row.pair: row for row in self._table_of(prediction, known)}, known.T.tolist()
        rows, seconds = [], prediction.seconds[0].tolist()
        for column, plan in enumerate(self.plans):
            accuracy, mean = (float(each[0, column]) for each in (prediction.accuracy, prediction.cost))
            if column >= len(quantiles) or (len(plan.pairs) == 1 and self.parameters.tokens is not None):
                row = alone[plan.pairs[0]]
                costs = row.cost_p50, row.cost_p90
            else:
                median, high = quantiles[column]
                costs = _nanousd(median), _nanousd(max(mean, high))
            origin = self._origin_of(plan.pairs)
            known_seconds = _known(seconds[column])
            rows.append(PlanRow(plan, accuracy, *costs, _nanousd(mean), origin=origin, seconds=known_seconds))
        return rows

    def _known_costs(self, prediction: Prediction) -> Tensor:
        """Quantiles of the dollars of the nearest known questions, 0 where unknown [2, M]."""
        known = self.parameters.cost[prediction.indices[0]] + prediction.more_prompt[0]
        if self._adjusted is not None:
            known = known * self._adjusted.cost[: known.shape[1]]
        # Not the default dtype, which another thread changes while it loads weights.
        levels = torch.tensor(QUANTILES, dtype=known.dtype)
        return torch.nanquantile(known, levels, dim=0).nan_to_num(0.0)

    def profiles(self) -> Mapping[str, str]:
        return self._profiles

    @cached_property
    def _profiles(self) -> dict[str, str]:
        return self.parameters.profiles()

    def expectation(self, query: Query, row: Row) -> Expectation | None:
        """None also far from the known questions, in a conversation, and of a model that has changed."""
        model = row.pair.model
        if query.messages or row.tokens_p50 <= 0 or model in self.changes or model not in self._profiles:
            return None
        if float(self._predict_text(query.text).trust) < HOME_TRUST:
            return None
        return Expectation(
            row.tokens_p50,
            row.tokens_p90,
            row.cost_p50,
            row.cost_p90,
            row.expected_cost,
            self._profiles[model],
        )

    def with_changes(self, changes: Mapping[str, ModelChange]) -> RTRRouter:
        return RTRRouter(self.parameters, self.encoder, changes)

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

    def cost_deviation(self, prediction: Prediction) -> Tensor:
        """Standard deviation of the dollars of each column, as among the nearest known questions [N, M].

        Of pairs that were added, whose neighbours' costs are unknown, as large as the expected cost.
        """
        known = torch.stack([self._spread(rows) for rows in prediction.indices])
        added = prediction.cost[:, known.shape[1] :]
        return torch.cat((known, added), 1)

    def _spread(self, rows: Tensor) -> Tensor:
        """Standard deviation of the known costs of some questions, by column [M]."""
        cost = self.parameters.cost[rows]
        return (cost - cost.nanmean(0)).square().nanmean(0).sqrt().nan_to_num(0.0)

    def expected_cost(self, prediction: Prediction, cost_weight: float) -> float:
        """Corrected mean dollars a question of the columns chosen at a cost weight."""
        chosen = self.choose_columns(prediction, cost_weight)
        cost = float(prediction.cost.gather(1, chosen[:, None]).mean())
        if not self.parameters.settings.spend:
            return cost
        weights, ratios = self.parameters.cost_weights.numpy(), self.parameters.cost_ratios.numpy()
        return cost * float(np.interp(np.log(cost_weight), np.log(weights), ratios))

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


def _known(seconds: float) -> float | None:
    return None if isnan(seconds) else round(seconds, 3)


def _nanousd(dollars: float) -> int:
    return max(0, round(dollars * NANOUSD_PER_USD))
