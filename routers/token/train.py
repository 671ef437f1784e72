"""Learn from labelled tokens which of the small model's tokens diverge.

Questions are split, never tokens: a fifth is kept for the test, and decides nothing. The others form as many folds as the
router has members; each member learns from all folds but one and stops when it gets worse on that one. What the members
say of the questions they did not see chooses the shape and sets the threshold. Binary cross-entropy, the classes weighted
(R2R, arXiv 2505.21600, section 3.2). The same seed gives the same router. Needs torch alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from viaticum.errors import DataError, InputError
from viaticum.routers.token.artefact import seen_in_training
from viaticum.routers.token.labels import DIVERGENT, IDENTICAL, NEUTRAL, UNKNOWN, LabelledTokens
from viaticum.routers.token.metrics import auc, measure, recall_at, share_for_recall
from viaticum.routers.token.neural import DivergenceNetwork, Inputs, Shape, TrainedRouter, round_weights

Report = Callable[[str, int, int], None]
QUANTILES = 400  # of scores, by which a share becomes a threshold
CHOSEN_BY = tuple(
    share / 100 for share in range(2, 32, 2)
)  # shares whose mean recall on held-out folds chooses
NEUTRALS = (1.0, 5.0)  # weights of a neutral token that are tried where none is given
FEWEST = 5  # questions


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """neutral: how much a neutral token counts beside an identical one, for only it resembles a divergent one; None: 1, and
    where shapes are chosen each of NEUTRALS is tried.

    test: share of the questions kept for the test. recall: of divergent tokens, that the first threshold is set for.
    """

    seed: int = 0
    rate: float = 1e-3
    decay: float = 0.05
    batch: int = 512
    epochs: int = 30
    patience: int = 4
    neutral: float | None = None
    test: float = 0.2
    recall: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.test < 1 or not 0 < self.recall <= 1 or self.neutral_weight <= 0 or self.rate <= 0:
            raise InputError(f"test and recall are shares, neutral and rate above 0; got {self}")
        if min(self.batch, self.epochs, self.patience) < 1:
            raise InputError(f"batch, epochs and patience must be 1 or more; got {self}")

    @property
    def neutral_weight(self) -> float:
        return 1.0 if self.neutral is None else self.neutral


@dataclass(frozen=True, slots=True)
class Split:
    """Question ids: those kept for the test, and the folds of the others."""

    test: tuple[str, ...]
    folds: tuple[tuple[str, ...], ...]

    @property
    def train(self) -> tuple[str, ...]:
        return tuple(name for fold in self.folds for name in fold)


def split_questions(
    questions: Sequence[str], folds: int, *, seed: int = 0, test: float = 0.2, most: int | None = None
) -> Split:
    """Split by a hash of the ids, so that the order of a file does not matter. most: questions to learn from at most.

    The test questions are the same for every `most`. Raises `DataError` for too few questions.
    """

    def place(name: str) -> str:
        return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()

    ordered = sorted(questions, key=place)
    kept = max(1, round(test * len(ordered)))
    rest = ordered[kept:] if most is None else ordered[kept : kept + most]
    if len(rest) < max(2, folds):
        raise DataError(
            f"{len(ordered)} questions are too few to learn from with {folds} members; label {FEWEST * 4} or more"
        )
    count = max(2, folds)
    return Split(tuple(ordered[:kept]), tuple(tuple(rest[fold::count]) for fold in range(count)))


def candidates(shape: Shape, settings: TrainSettings) -> list[tuple[Shape, TrainSettings]]:
    """Shapes and weights to choose from: logistic regression, and small and somewhat larger networks.

    Each with the rank given and with a quarter of it: a few thousand tokens say little about 64 directions. A weight of
    neutral tokens that is given is the only one.
    """
    shapes = [
        replace(shape, depth=0),
        replace(shape, depth=1, width=32),
        replace(shape, depth=2, width=64),
    ]
    ranks = sorted({shape.rank, max(1, shape.rank // 4)} if shape.rank else {0}, reverse=True)
    neutrals = NEUTRALS if settings.neutral is None else (settings.neutral,)
    return [
        (replace(each, rank=rank), replace(settings, neutral=neutral))
        for each in shapes
        for rank in ranks
        for neutral in neutrals
    ]


def train(
    tokens: LabelledTokens,
    shape: Shape,
    *,
    settings: TrainSettings = TrainSettings(),
    choose: bool = True,
    most: int | None = None,
    report: Report = lambda stage, done, of: None,
) -> TrainedRouter:
    """A router with its threshold and what it is worth on the test questions.

    choose: try the `candidates` and take the best on held-out folds; else the shape and weight given. Raises
    `DataError` where no token diverges, or all do, or there are too few questions.
    """
    split = split_questions(
        tokens.questions, shape.members, seed=settings.seed, test=settings.test, most=most
    )
    known = tokens.where(tokens.labels != UNKNOWN)
    learned = known.of(split.train)
    _require_both(learned)
    tried = candidates(shape, settings) if choose else [(shape, settings)]
    best: tuple[float, int, DivergenceNetwork, Tensor] | None = None
    told = []
    for number, (each, with_) in enumerate(tried):
        report("trying shapes" if choose else "training", number, len(tried))
        network, unseen = _fit(learned, split, each, with_)
        seen = ~unseen.isnan()
        value = _value(learned.where(seen), unseen[seen])
        told.append(
            _facts_of(each, with_) | {"recall": value, "auc": _aucs(learned.where(seen), unseen[seen])}
        )
        if best is None or value > best[0]:
            best = (value, number, network, unseen)
    report("trying shapes" if choose else "training", len(tried), len(tried))
    assert best is not None, "at least one shape is tried"
    _, number, network, unseen = best
    return _with_facts(tokens, network, unseen, learned, split, tried[number][1], told)


def _with_facts(
    tokens: LabelledTokens,
    network: DivergenceNetwork,
    unseen: Tensor,
    learned: LabelledTokens,
    split: Split,
    settings: TrainSettings,
    tried: list[dict[str, Any]],
) -> TrainedRouter:
    test = tokens.of(split.test)
    scores = score(network, test)
    rows = ~unseen.isnan()
    share = share_for_recall(unseen[rows], (learned.labels == DIVERGENT)[rows], settings.recall)
    quantiles = score_quantiles(scores)
    manifest = tokens.manifest
    facts: dict[str, Any] = {
        "pair": manifest["pair"],
        "small": manifest["small"],
        "large": manifest["large"],
        "strategy": manifest["settings"]["strategy"],
        "verifier": tokens.verifier,
        "threshold": 0.5,
        "quantiles": quantiles,
        "calibration": {"by": "recall on held-out questions", "recall": settings.recall, "share": share},
        "settings": _facts_of(network.shape, settings) | {"seed": settings.seed},
        "tried": tried,
        "split": {"test": list(split.test), "train": list(split.train)},
        "digests": _digests(tokens, split.train),
        "tokens": {"train": len(learned), "test": len(test)},
        "metrics": {
            "router": measure(test, scores),
            "entropy": measure(test, test.entropy),
        },
        "versions": {**manifest.get("versions", {}), "torch": torch.__version__},
    }
    router = TrainedRouter(network, facts)
    return replace(router, metadata={**facts, "threshold": router.threshold_for(share)})


def _digests(tokens: LabelledTokens, questions: Sequence[str]) -> list[str]:
    """Of the questions' texts; none unless all of them are known."""
    known = tokens.digests
    return [known[name] for name in questions] if all(name in known for name in questions) else []


def unseen_tokens(router: TrainedRouter, tokens: LabelledTokens) -> LabelledTokens:
    """The tokens of the questions that a router did not learn from. Raises `InputError` where it was made for other weights."""
    for role in ("small", "large"):
        of = tokens.manifest[role]
        router.check_weights(role, of["name"], of["sha256"])
    asked = {name: tokens.digests.get(name) for name in tokens.questions}
    learned = seen_in_training(router.metadata, router.metadata["split"]["train"], asked)
    return tokens.of([name for name in tokens.questions if name not in learned])


@torch.inference_mode()
def score(network: DivergenceNetwork, tokens: LabelledTokens, *, batch: int = 4096) -> Tensor:
    """What a router says of labelled tokens: probabilities [N], as it serves."""
    network.eval()
    parts = []
    for rows in torch.split(torch.arange(len(tokens)), batch):
        parts.append(torch.sigmoid(network.logits(_inputs(network.shape, tokens.where(rows)))))
    return torch.cat(parts) if parts else torch.zeros(0)


def score_quantiles(scores: Tensor | Sequence[float]) -> list[float]:
    """QUANTILES + 1 scores that cut all of them into parts of one size."""
    ordered = torch.as_tensor(scores, dtype=torch.float64).sort().values
    places = torch.linspace(0, max(0, len(ordered) - 1), QUANTILES + 1).round().long()
    return [float(each) for each in ordered[places]]


def _inputs(shape: Shape, tokens: LabelledTokens) -> Inputs:
    return Inputs(
        tokens.entropy,
        tokens.top,
        tokens.hidden if "hidden" in shape.inputs else None,
        tokens.embeddings[tokens.token] if "embedding" in shape.inputs else None,
        tokens.embeddings[tokens.second] if "second" in shape.inputs else None,
    )


def _fit(
    tokens: LabelledTokens, split: Split, shape: Shape, settings: TrainSettings
) -> tuple[DivergenceNetwork, Tensor]:
    """A network, and the logits [N] of the members that did not learn from a token's question, NaN for none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = DivergenceNetwork(shape)
        network.fit_features(_inputs(shape, tokens))
        with torch.inference_mode():
            inputs = network.features(_inputs(shape, tokens))
        inputs = inputs.clone()
        fold = _folds(tokens, split)
        held = torch.stack([fold == member % len(split.folds) for member in range(shape.members)])  # [K, N]
        positive = (tokens.labels == DIVERGENT).float()
        weights = torch.where(tokens.labels == NEUTRAL, settings.neutral_weight, 1.0)
        negatives = float((weights * (1 - positive)).sum())
        weights = torch.where(positive > 0, negatives / float(positive.sum()), weights)
        _learn(network, inputs, positive, weights / weights.mean(), held, settings)
    round_weights(network)
    network.eval()
    with torch.inference_mode():
        logits: Tensor = network(inputs)
    unseen = (logits * held).sum(0) / held.sum(0)  # NaN where no member left the token's question out
    return network, unseen.clone()


def _folds(tokens: LabelledTokens, split: Split) -> Tensor:
    of = {name: number for number, fold in enumerate(split.folds) for name in fold}
    return torch.tensor([of.get(name, -1) for name in tokens.questions])[tokens.owner]


def _learn(
    network: DivergenceNetwork,
    inputs: Tensor,
    positive: Tensor,
    weights: Tensor,
    held: Tensor,
    settings: TrainSettings,
) -> None:
    """Train all members together, each on what it does not hold out; each keeps its best weights."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.rate, weight_decay=settings.decay)
    members = network.shape.members
    best = torch.full((members,), math.inf)
    kept = [parameter.detach().clone() for parameter in network.parameters()]
    since, learns = torch.zeros(members), (~held).float() * weights  # [K, N]
    for _ in range(settings.epochs):
        network.train()
        for rows in torch.split(torch.randperm(len(inputs)), settings.batch):
            optimiser.zero_grad()
            loss = _loss(network(inputs[rows]), positive[rows], learns[:, rows]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        network.eval()
        with torch.no_grad():
            now = _loss(network(inputs), positive, held * weights)
        better = now < best
        best, since = torch.where(better, now, best), torch.where(better, 0, since + 1)
        with torch.no_grad():
            for copy, parameter in zip(kept, network.parameters(), strict=True):
                copy[better] = parameter[better]
        if bool((since >= settings.patience).all()):
            break
    with torch.no_grad():
        for copy, parameter in zip(kept, network.parameters(), strict=True):
            parameter.copy_(copy)


def _loss(logits: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean cross-entropy of each member: logits and weights [K, B], positive [B] -> [K]."""
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, positive.expand_as(logits), reduction="none"
    )
    return (each * weights).sum(1) / weights.sum(1).clamp_min(1e-9)


def _value(tokens: LabelledTokens, scores: Tensor) -> float:
    positive = tokens.labels == DIVERGENT
    recalls = [recall_at(scores, positive, share) or 0.0 for share in CHOSEN_BY]
    return sum(recalls) / len(recalls)


def _aucs(tokens: LabelledTokens, scores: Tensor) -> dict[str, float | None]:
    positive, differing = tokens.labels == DIVERGENT, tokens.labels != IDENTICAL
    return {"all": auc(scores, positive), "differing": auc(scores[differing], positive[differing])}


def _facts_of(shape: Shape, settings: TrainSettings) -> dict[str, Any]:
    return {
        "depth": shape.depth,
        "width": shape.width,
        "rank": shape.rank,
        "neutral": settings.neutral_weight,
    }


def _require_both(tokens: LabelledTokens) -> None:
    divergent = int((tokens.labels == DIVERGENT).sum())
    if divergent == 0 or divergent == len(tokens):
        raise DataError(
            f"{divergent} of {len(tokens)} labelled tokens diverge; a router learns from both kinds: label more "
            "questions, or with another verifier"
        )


def evaluate(routers: Mapping[str, TrainedRouter], tokens: LabelledTokens) -> dict[str, Any]:
    """AUC and recall of routers, and of entropy alone, on the questions that none of them learned from.

    Those of routers are under "routers", by their names. Raises `InputError` where a router was made for other weights than
    the labels, `DataError` where no question is left.
    """
    unseen = tokens
    for router in routers.values():
        unseen = unseen_tokens(router, unseen)
    if not len(unseen):
        raise DataError("the router learned from every question of these labels; label others to evaluate it")
    positive = unseen.labels == DIVERGENT
    return {
        "questions": len(unseen.owner.unique()),  # type: ignore[no-untyped-call]
        "tokens": len(unseen),
        "differing": int(unseen.differing.sum()),
        "divergent": int(positive.sum()),
        "unknown": int((unseen.labels == UNKNOWN).sum()),
        "entropy": measure(unseen, unseen.entropy),
        "routers": {name: measure(unseen, score(router.network, unseen)) for name, router in routers.items()},
    }
