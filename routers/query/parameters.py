"""What fitting the learned router finds: settings, tensors, and pairs that were added later.

Only data: `fit` and `learn` make it, `rtr` predicts with it, `storage` writes and reads it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property
from math import isnan
from typing import Any

import torch
from torch import Tensor

from viaticum.quantiles import NORMAL_P90
from viaticum.routers.query.forest import ForestHead
from viaticum.routers.query.heads import CalibratedMixture, Columns, DualHead, LogisticHead, log_odds
from viaticum.routers.query.plans import Plan
from viaticum.routers.query.static import TableOrigin
from viaticum.routers.query.token_quantiles import TokenQuantiles
from viaticum.routers.query.trust import Trust
from viaticum.types import Pair


@dataclass(frozen=True)
class RTRSettings:
    """What fitting can leave out, for ablations.

    Args:
        heads: names among logistic, neighbours, dual and forest.
        decision: weight of the loss on the decision in the dual head.
        calibrate: Platt scaling per column.
        trust: predictions are mixed with the static means, the more so far from all known questions.
        plans: search for plans of several pairs.
        spend: correct expected costs by `RouterParameters.cost_ratios`.
        savings: small savings by less accurate columns are taken back (`calibration.without_small_savings`).
        arms: arms of one model share what is predicted of a question.
        seed: seed of every draw.
    """

    heads: tuple[str, ...] = ("logistic", "neighbours", "dual", "forest")
    decision: float = 0.5
    calibrate: bool = True
    trust: bool = True
    plans: bool = True
    spend: bool = True
    savings: bool = True
    arms: bool = True
    seed: int = 0


@dataclass(frozen=True)
class AddedPairs:
    """A pairs that were added after fitting (`viaticum.routers.query.learn.add`).

    Args:
        pairs: their names.
        weights: of the log-odds of the P fitted pairs [A, P].
        offset: added to these log-odds [A].
        similarity: weights of the fitted pairs' log tokens, which sum to 1 [A, P].
        token_offsets: added to these log tokens, median and 90% quantile [A, 2].
        prices: dollars of a prompt and of an output token [A, 2].
        seconds: mean of the known answers; NaN where none is [A].
    """

    pairs: tuple[Pair, ...]
    weights: Tensor
    offset: Tensor
    similarity: Tensor
    token_offsets: Tensor
    prices: Tensor
    seconds: Tensor

    def concat(self, other: AddedPairs) -> AddedPairs:
        names = [field.name for field in fields(self) if field.name != "pairs"]
        tensors = {name: torch.cat((getattr(self, name), getattr(other, name))) for name in names}
        return AddedPairs(self.pairs + other.pairs, **tensors)

    def predict(self, accuracy: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predictions for the added pairs from those for the fitted ones.

        The expected number of tokens is the mean of the log-normal distribution with the two quantiles.

        Args:
            accuracy: of the fitted pairs [N, P].
            tokens: quantiles of the fitted pairs [N, P, 2].

        Returns:
            accuracy [N, A], expected dollars [N, A] and token quantiles [N, A, 2].
        """
        added_accuracy = torch.sigmoid(log_odds(accuracy) @ self.weights.T + self.offset)
        log_tokens = torch.einsum("npk,ap->nak", tokens.log(), self.similarity) + self.token_offsets
        log_tokens[..., 1] = log_tokens.amax(-1)
        spread = (log_tokens[..., 1] - log_tokens[..., 0]) / NORMAL_P90
        mean = torch.exp(log_tokens[..., 0] + spread.square() / 2)
        return added_accuracy, self.prices[:, 0] + self.prices[:, 1] * mean, log_tokens.exp()


@dataclass
class RouterParameters:
    """Everything that fitting found, for M columns of which the first P are the pairs.

    Args:
        pairs: the P pairs.
        plans: the plan of each column.
        embeddings: of the known questions [Q, D].
        correct: known outcomes [Q, M]; NaN where unknown.
        cost: known dollars [Q, M].
        columns, logistic, dual, mixture: the fitted heads.
        static_means: accuracy and dollars of each column where nothing is known of a question [2, M].
        trust: how far predictions count, beside the static means.
        token_offsets: added to the dual head's log tokens where `tokens` is None [P, 2].
        prices: dollars of a prompt and of an output token [P, 2].
        cost_weights: values of a dollar in units of accuracy [W].
        cost_ratios: actual over expected cost of what is chosen at each of them [W].
        settings: settings of the fit.
        facts: what `router.json` says about the fit.
        tokens: quantiles of output tokens; None in a router that an earlier version fitted.
        added: pairs that were added later.
        seconds: of every column on the known questions, NaN where unknown [Q, M]; None in a router that an
            earlier version fitted.
        sharing: weights of all columns' log-odds in that of each one, where arms share [M, M].
        forest: None where it is not among the heads.
    """

    pairs: tuple[Pair, ...]
    plans: tuple[Plan, ...]
    embeddings: Tensor
    correct: Tensor
    cost: Tensor
    columns: Columns
    logistic: LogisticHead
    dual: DualHead
    mixture: CalibratedMixture
    static_means: Tensor
    trust: Trust
    token_offsets: Tensor
    prices: Tensor
    cost_weights: Tensor
    cost_ratios: Tensor
    settings: RTRSettings
    facts: dict[str, Any]
    tokens: TokenQuantiles | None = None
    added: AddedPairs | None = None
    sharing: Tensor | None = None
    seconds: Tensor | None = None
    forest: ForestHead | None = None

    def origin(self) -> str:
        """What it was fitted on, in words."""
        names = list(self.facts.get("datasets", {}))
        more = f" and {len(names) - 2} more" if len(names) > 3 else ""
        dataset = ", ".join(names[: 2 if more else 3]) + more
        return str(
            TableOrigin(dataset or "an outcome table", self.facts["questions"], self.facts.get("date", ""))
        )

    @cached_property
    def all_prices(self) -> Tensor:
        """As `prices`, added pairs included [P + A, 2]."""
        return self.prices if self.added is None else torch.cat((self.prices, self.added.prices))

    @cached_property
    def has_tokens(self) -> Tensor:
        """Whether anything is known of the output tokens of each pair, added ones included [P + A].

        Those of added pairs follow from the fitted ones'.
        """
        fitted = torch.ones(len(self.pairs), dtype=torch.bool)
        if self.tokens is not None:
            fitted = ~self.tokens.log_tokens.isnan().all(0)
        added = 0 if self.added is None else len(self.added.pairs)
        return torch.cat((fitted, fitted.any().expand(added)))

    @cached_property
    def cut_at(self) -> list[int | None]:
        """For every pair, added ones included, the tokens at which its known outputs were cut."""
        known = [] if self.tokens is None else self.tokens.cut_at.tolist()
        found = [None if isnan(tokens) else round(tokens) for tokens in known]
        added = 0 if self.added is None else len(self.added.pairs)
        return found + [None] * (len(self.pairs) + added - len(found))

    def profiles(self) -> dict[str, str]:
        """By model a digest of its known outcomes, and of what is known of its added pairs."""
        added = () if self.added is None else self.added.pairs
        found = {}
        for model in dict.fromkeys(pair.model for pair in (*self.pairs, *added)):
            digest = hashlib.sha256()
            columns = [number for number, pair in enumerate(self.pairs) if pair.model == model]
            parts = [self.correct[:, columns], self.cost[:, columns]]
            if self.added is not None:
                rows = [number for number, pair in enumerate(added) if pair.model == model]
                parts += [self.added.offset[rows], self.added.prices[rows]]
            for part in parts:
                digest.update(part.nan_to_num(-1.0).contiguous().numpy().tobytes())
            found[model] = digest.hexdigest()[:12]
        return found
