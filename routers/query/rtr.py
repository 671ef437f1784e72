"""The learned query router: accuracy, tokens and cost of every pair and plan for a question, and what to do with them.

RTR (arXiv 2505.19435) with what it lacks: several heads, calibrated on questions that they had not seen; quantiles of
tokens; plans that ask a dear pair only where cheap ones disagree; and trust: the further a question lies from all that
were profiled, the more its table is that of the static mixture. Made by `viaticum.routers.query.fit`.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from viaticum.errors import DataError, InputError
from viaticum.money import NANOUSD_PER_USD
from viaticum.routers.query.base import QueryRouter
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.heads import (
    NEIGHBOURS,
    CalibratedMixture,
    Columns,
    DualHead,
    LogisticHead,
    NeighboursHead,
    log_odds,
)
from viaticum.routers.query.plans import Plan, PlanRow
from viaticum.types import Pair, Query, RoutingTable, Row

FORMAT = 1
COLUMNS = ("models", "strategies", "of_pair", "members")
ADDED = ("weights", "offset", "alike", "lengths", "rate")
NORMAL_P90 = 1.2816  # standard deviations of a normal distribution below which 90% lie
GOLDEN = (5**0.5 - 1) / 2  # its multiples are spread evenly over the questions
RECENT = 32  # questions whose predictions are kept
NEAREST = 10  # questions whose mean similarity says how far to trust a prediction


class Prediction(NamedTuple):
    """Of N questions. accuracy: chance of a right answer [N, M]; cost: expected dollars [N, M]; tokens: output tokens,
    median and 90%, of pairs [N, P, 2]; trust: 0 far from all known questions, 1 among them [N]; numbers: the nearest
    known questions [N, K]."""

    accuracy: Tensor
    cost: Tensor
    tokens: Tensor
    trust: Tensor
    numbers: Tensor


@dataclass(frozen=True)
class RTRSettings:
    """What fitting can leave out, for ablations. heads: among logistic, neighbours, dual; decision: the weight of the
    loss that looks at the decision; seed: of every draw."""

    heads: tuple[str, ...] = ("logistic", "neighbours", "dual")
    decision: float = 0.5
    calibrate: bool = True
    trust: bool = True
    plans: bool = True
    spend: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Added:
    """A pairs that were added later (`viaticum.routers.query.learn.add`). weights: of the log-odds of the P learned pairs
    [A, P], offset [A]; alike: shares of their log tokens [A, P], lengths: added to these [A, 2]; rate: as in `Learned`."""

    pairs: tuple[Pair, ...]
    weights: Tensor
    offset: Tensor
    alike: Tensor
    lengths: Tensor
    rate: Tensor

    def join(self, other: Added) -> Added:
        tensors = {name: torch.cat((getattr(self, name), getattr(other, name))) for name in ADDED}
        return Added(self.pairs + other.pairs, **tensors)

    def predict(self, accuracy: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of learned pairs [N, P] and [N, P, 2] -> accuracy [N, A], expected dollars [N, A], tokens [N, A, 2].

        The expected number of tokens is that of a log-normal distribution with these quantiles.
        """
        found = torch.sigmoid(log_odds(accuracy) @ self.weights.T + self.offset)
        lengths = torch.einsum("npk,ap->nak", tokens.log(), self.alike) + self.lengths
        lengths[..., 1] = lengths.amax(-1)
        spread = (lengths[..., 1] - lengths[..., 0]) / NORMAL_P90
        mean = torch.exp(lengths[..., 0] + spread.square() / 2)
        return found, self.rate[:, 0] + self.rate[:, 1] * mean, lengths.exp()


@dataclass
class Learned:
    """Everything that fitting found. plans: a plan for each of the M columns, the first P being the pairs.

    right, cost: what was known [Q, M], at questions of `embeddings` [Q, D]; static: accuracy and dollars of each column
    where nothing is known of a question [2, M]; limits: the similarity that is trusted not at all, and wholly [2];
    stretch: added to log tokens, median and 90% [P, 2]; rate: dollars of a prompt and of an output token [P, 2];
    worth, spend: for a worth of a dollar, real over expected cost of what is then chosen [W], [W].
    """

    pairs: tuple[Pair, ...]
    plans: tuple[Plan, ...]
    embeddings: Tensor
    right: Tensor
    cost: Tensor
    columns: Columns
    logistic: LogisticHead
    dual: DualHead
    mixture: CalibratedMixture
    static: Tensor
    limits: Tensor
    stretch: Tensor
    rate: Tensor
    worth: Tensor
    spend: Tensor
    settings: RTRSettings
    facts: dict[str, Any]
    added: Added | None = None


class RTRRouter(QueryRouter):
    """Predicts with what was learned; `encoder` gives the embeddings it was learned with."""

    def __init__(self, learned: Learned, encoder: Encoder | None = None) -> None:
        self.learned = learned
        self._given = encoder
        later = learned.added.pairs if learned.added else ()
        self.pairs = learned.pairs + later
        self.plans = learned.plans + tuple(Plan((pair,)) for pair in later)
        # Where each pair stands among the columns: those added later come after the plans.
        self.pair_columns = [
            *range(len(learned.pairs)),
            *range(len(learned.plans), len(learned.plans) + len(later)),
        ]
        self._right = NeighboursHead(learned.embeddings, learned.right)
        self._cost = NeighboursHead(learned.embeddings, learned.cost)
        # A question is asked about several times while it is routed: for its table, its plans, and the pair that is taken.
        self._recent: OrderedDict[str, Prediction] = OrderedDict()
        self._most = RECENT
        self._recent_lock = threading.Lock()

    @cached_property
    def encoder(self) -> Encoder:
        return self._given or Encoder(self.learned.facts["encoder"])

    # --- predictions ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, embeddings: Tensor) -> Prediction:
        """Of many questions at once; embeddings [N, D] of length 1."""
        learned = self.learned
        cosines, numbers = self._right.nearest(embeddings, NEIGHBOURS)
        dual, log_tokens = learned.dual.predict(embeddings)
        heads = {
            "logistic": lambda: learned.logistic(embeddings),
            "neighbours": lambda: log_odds(self._right.mean(cosines, numbers)),
            "dual": lambda: dual,
        }
        accuracy = learned.mixture([heads[name]() for name in learned.settings.heads])
        cost = self._cost.mean(cosines, numbers)
        low, high = learned.limits.tolist()
        trust = ((cosines[:, :NEAREST].mean(1) - low) / max(high - low, 1e-6)).clamp(0, 1)
        if learned.settings.trust:
            sure = trust[:, None]
            accuracy = sure * accuracy + (1 - sure) * learned.static[0]
            cost = sure * cost + (1 - sure) * learned.static[1]
        tokens = (log_tokens + learned.stretch).exp()
        tokens[..., 1] = tokens.amax(-1)
        if learned.added is not None:
            extra = learned.added.predict(accuracy[:, : len(learned.pairs)], tokens)
            accuracy, cost = torch.cat((accuracy, extra[0]), 1), torch.cat((cost, extra[1]), 1)
            tokens = torch.cat((tokens, extra[2]), 1)
        return Prediction(accuracy, cost, tokens, trust, numbers)

    def predict_texts(self, texts: Sequence[str]) -> Prediction:
        return self.predict(self.encoder(texts))

    def prefetch(self, queries: Sequence[Query]) -> None:
        """Predict many at once, and keep what was predicted until they are asked about."""
        with self._recent_lock:
            self._most = max(RECENT, 2 * len(queries))
            new = list(dict.fromkeys(query.text for query in queries if query.text not in self._recent))
        if new:
            told = self.predict_texts(new)
            parts = [Prediction(*(each[n : n + 1] for each in told)) for n in range(len(new))]
            self._remember(dict(zip(new, parts, strict=True)))

    def _predict_text(self, text: str) -> Prediction:
        with self._recent_lock:
            found = self._recent.get(text)
            if found is not None:
                self._recent.move_to_end(text)
                return found
        found = self.predict_texts([text])
        self._remember({text: found})
        return found

    def _remember(self, told: dict[str, Prediction]) -> None:
        with self._recent_lock:
            self._recent |= told
            while len(self._recent) > self._most:
                self._recent.popitem(last=False)

    def table(self, query: Query) -> RoutingTable:
        """A row for every pair; costs in nano-dollars, prompt included where the outcomes counted it."""
        told = self._predict_text(query.text)
        added = self.learned.added
        rates = (self.learned.rate if added is None else torch.cat((self.learned.rate, added.rate))).tolist()
        rows = []
        for pair, column, (median, high), (fixed, each) in zip(
            self.pairs, self.pair_columns, told.tokens[0].tolist(), rates, strict=True
        ):
            costs = [_nanousd(fixed + each * tokens) for tokens in (median, high)]
            rows.append(
                Row(pair, float(told.accuracy[0, column]), round(median), round(high), costs[0], costs[1])
            )
        return RoutingTable(tuple(rows))

    def plans_for(self, query: Query) -> list[PlanRow]:
        """A row for every plan; cost_p90 is that of its 60 nearest known questions."""
        told = self._predict_text(query.text)
        known = self.learned.cost[told.numbers[0]]
        high = torch.nanquantile(known, 0.9, dim=0).nan_to_num(0.0)
        if (added := self.learned.added) is not None:
            most = told.tokens[0, len(self.learned.pairs) :, 1]
            high = torch.cat((high, added.rate[:, 0] + added.rate[:, 1] * most))
        return [
            PlanRow(plan, accuracy, _nanousd(cost), _nanousd(max(cost, most)))
            for plan, accuracy, cost, most in zip(
                self.plans, told.accuracy[0].tolist(), told.cost[0].tolist(), high.tolist(), strict=True
            )
        ]

    # --- choosing for many ----------------------------------------------------------------------------------

    def choose_columns(self, told: Prediction, worth: float) -> Tensor:
        """For each question the column with the greatest accuracy less `worth` times its expected dollars [N]."""
        return (told.accuracy - worth * told.cost).argmax(1)

    def choose_within(self, told: Prediction, dollars: float) -> Tensor:
        """For each question the column to take, so that they are expected to cost at most `dollars` on average [N].

        A worth of a dollar at which they do, the least that there is; where the table is the same for many questions
        (far from all that is known), what is left is spent on a part of them, which makes a mixture of two columns.
        """
        enough, more = self._worth_about(told, dollars)
        chosen, dearer = self.choose_columns(told, enough), self.choose_columns(told, more)
        spent, costs = self.expected_cost(told, enough), self.expected_cost(told, more)
        if not spent < dollars < costs:
            return chosen
        share = (dollars - spent) / (costs - spent)
        places = torch.arange(len(chosen), dtype=torch.float64)
        return torch.where((places * GOLDEN) % 1 < share, dearer, chosen)

    def worth_of(self, told: Prediction, dollars: float) -> float:
        """The least worth of a dollar at which these questions are expected to cost at most `dollars` on average.

        Expectations are corrected by `spend`: what is chosen because it looks cheap tends to cost more than it
        looked. Knows predictions alone. Where even the cheapest choice costs more, that is what is taken.
        """
        return self._worth_about(told, dollars)[0]

    def _worth_about(self, told: Prediction, dollars: float) -> tuple[float, float]:
        """Where the expected cost comes to `dollars`: the worth of a dollar just past that, and just before."""
        low, high = -3.0, 6.0
        for _ in range(40):
            middle = (low + high) / 2
            if self.expected_cost(told, 10**middle) <= dollars:
                high = middle
            else:
                low = middle
        return float(10**high), float(10**low)

    def expected_cost(self, told: Prediction, worth: float) -> float:
        """Mean dollars a question of what is chosen at a worth of a dollar, corrected."""
        chosen = self.choose_columns(told, worth)
        cost = float(told.cost.gather(1, chosen[:, None]).mean())
        if not self.learned.settings.spend:
            return cost
        ratio = np.interp(np.log(worth), np.log(self.learned.worth.numpy()), self.learned.spend.numpy())
        return cost * float(ratio)

    # --- files ----------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """router.json and router.safetensors; the last version that lay there moves to `previous/`."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "router.json").exists():
            (folder / "previous").mkdir(exist_ok=True)
            for name in ("router.json", "router.safetensors"):
                shutil.copy2(folder / name, folder / "previous" / name)
        learned = self.learned
        tensors = {
            "embeddings": learned.embeddings.half(),
            "right": _small(learned.right),
            "cost": learned.cost,
            "logistic": learned.logistic.weights,
            "mixture.shares": learned.mixture.shares,
            "mixture.slope": learned.mixture.slope,
            "mixture.offset": learned.mixture.offset,
            **{
                name: getattr(learned, name)
                for name in ("static", "limits", "stretch", "rate", "worth", "spend")
            },
            **{f"columns.{name}": getattr(learned.columns, name) for name in COLUMNS},
            **{f"dual.{name}": each for name, each in learned.dual.state_dict().items()},
            **({f"added.{name}": getattr(learned.added, name) for name in ADDED} if learned.added else {}),
        }
        scratch = folder / ".router.safetensors"
        save_file({name: each.contiguous().clone() for name, each in tensors.items()}, scratch)
        scratch.replace(folder / "router.safetensors")
        document = {
            "router": "rtr",
            "format": FORMAT,
            "pairs": [str(pair) for pair in learned.pairs],
            "plans": [
                {"pairs": [str(pair) for pair in plan.pairs], "need": plan.need} for plan in learned.plans
            ],
            "added": [str(pair) for pair in learned.added.pairs] if learned.added else [],
            "settings": asdict(learned.settings),
            "facts": learned.facts,
        }
        scratch = folder / ".router.json"
        scratch.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        scratch.replace(folder / "router.json")

    @classmethod
    def load(cls, folder: str | Path, encoder: Encoder | None = None) -> RTRRouter:
        """Raises `InputError` where there is no router, `DataError` where it is damaged or of a later format."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            document = json.loads((folder / "router.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "router.safetensors")
        except OSError as error:
            raise InputError(
                f"no router in {folder} ({error.strerror or error}); make one with: viaticum router fit"
            ) from None
        except (ValueError, SafetensorError) as error:
            raise DataError(f"the router in {folder} is damaged ({error}); fit it again") from None
        if document.get("format") != FORMAT:
            raise DataError(
                f"the router in {folder} has format {document.get('format')}, this version reads {FORMAT}; "
                "fit it again"
            )
        try:
            return cls(_learned(document, tensors), encoder)
        except (KeyError, RuntimeError, TypeError) as error:
            raise DataError(f"the router in {folder} is damaged ({error}); fit it again") from None

    def check_fits(self, models: Sequence[str], strategies: Sequence[str]) -> None:
        """Raise `InputError` that names the models and strategies of this router that are not among these."""
        unknown = sorted({pair.model for pair in self.pairs} - set(models))
        unknown += sorted({pair.strategy for pair in self.pairs} - set(strategies))
        if unknown:
            raise InputError(
                f"the router knows {', '.join(unknown)}, which this catalogue does not; fit it again, or use the "
                "catalogue that it was fitted with"
            )


def _learned(document: dict[str, Any], tensors: dict[str, Tensor]) -> Learned:
    settings = RTRSettings(**(document["settings"] | {"heads": tuple(document["settings"]["heads"])}))
    columns = Columns(**{name: tensors[f"columns.{name}"] for name in COLUMNS})
    right, pairs = _wide(tensors["right"]), tuple(map(Pair.parse, document["pairs"]))
    dual = DualHead(columns, right, torch.zeros(1, len(pairs)), tensors["embeddings"].shape[1])
    later = tuple(map(Pair.parse, document["added"]))
    dual.load_state_dict(
        {name.removeprefix("dual."): each for name, each in tensors.items() if name.startswith("dual.")}
    )
    return Learned(
        pairs=pairs,
        plans=tuple(Plan(tuple(map(Pair.parse, plan["pairs"])), plan["need"]) for plan in document["plans"]),
        embeddings=tensors["embeddings"].float(),
        right=right,
        cost=tensors["cost"],
        columns=columns,
        logistic=LogisticHead(tensors["logistic"]),
        dual=dual.freeze(),
        mixture=CalibratedMixture(*(tensors[f"mixture.{name}"] for name in ("shares", "slope", "offset"))),
        static=tensors["static"],
        limits=tensors["limits"],
        stretch=tensors["stretch"],
        rate=tensors["rate"],
        worth=tensors["worth"],
        spend=tensors["spend"],
        settings=settings,
        facts=document["facts"],
        added=Added(later, **{name: tensors[f"added.{name}"] for name in ADDED}) if later else None,
    )


def _small(right: Tensor) -> Tensor:
    """0, 1 and NaN as int8 0, 1 and -1."""
    return right.nan_to_num(-1.0).to(torch.int8)


def _wide(right: Tensor) -> Tensor:
    wide = right.float()
    return wide.masked_fill(wide < 0, float("nan"))


def _nanousd(dollars: Tensor | float) -> int:
    return max(0, round(float(dollars) * NANOUSD_PER_USD))
