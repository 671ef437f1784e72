"""Train R2R's router on labelled tokens (arXiv 2505.21600, section 3.2).

Questions are split, never tokens: a fifth is the test set, which decides nothing. The others form as many
folds as the router has members; each member is trained on all folds but one and stops early on that one. The
members' out-of-fold predictions select the hyperparameters and set the threshold. The loss is binary
cross-entropy with weighted classes. The same seed gives the same router. Needs torch only.
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
QUANTILES = 400  # of scores, which map a share to a threshold
# The candidate with the highest mean recall at these shares on held-out folds is selected.
SELECTION_SHARES = tuple(share / 100 for share in range(2, 32, 2))
NEUTRAL_WEIGHTS = (1.0, 5.0)  # weights of a neutral token that are tried if none is given
MIN_QUESTIONS = 20  # to label, in the message for too few


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Hyperparameters of training.

    Args:
        seed: of the split, the weights and the batches.
        rate: learning rate of AdamW.
        decay: its weight decay.
        batch: tokens a step.
        epochs: maximum.
        patience: epochs without improvement on the held-out fold after which a member stops.
        neutral: weight of a neutral token relative to an identical one, since only it resembles a divergent
            one; None: 1, and each of NEUTRAL_WEIGHTS is tried if hyperparameters are searched.
        test: share of the questions in the test set.
        recall: of divergent tokens, for which the first threshold is set.

    Raises:
        InputError: a value out of range.
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
    """Question ids: the test set, and the folds of the training set."""

    test: tuple[str, ...]
    folds: tuple[tuple[str, ...], ...]

    @property
    def train(self) -> tuple[str, ...]:
        return tuple(name for fold in self.folds for name in fold)


def split_questions(
    questions: Sequence[str], folds: int, *, seed: int = 0, test: float = 0.2, most: int | None = None
) -> Split:
    """Split questions by a hash of their ids, so that the order of a file does not matter.

    Args:
        questions: ids.
        folds: of the training set, at least 2 are made.
        seed: of the hash.
        test: share of the questions in the test set.
        most: maximum questions in the training set; the test set is the same for every value.

    Raises:
        DataError: too few questions.
    """

    def hash_of(name: str) -> str:
        return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()

    ordered = sorted(questions, key=hash_of)
    test_count = max(1, round(test * len(ordered)))
    rest = ordered[test_count:] if most is None else ordered[test_count : test_count + most]
    fold_count = max(2, folds)
    if len(rest) < fold_count:
        raise DataError(
            f"{len(ordered)} questions are too few to learn from with {folds} members; "
            f"label {MIN_QUESTIONS} or more"
        )
    return Split(
        tuple(ordered[:test_count]), tuple(tuple(rest[fold::fold_count]) for fold in range(fold_count))
    )


def candidates(shape: Shape, settings: TrainSettings) -> list[tuple[Shape, TrainSettings]]:
    """Hyperparameters to search: logistic regression, a small and a somewhat larger network.

    Each with the given rank and with a quarter of it: a few thousand tokens say little about 64 directions. A
    given weight of neutral tokens is the only one that is tried.
    """
    shapes = [
        replace(shape, depth=0),
        replace(shape, depth=1, width=32),
        replace(shape, depth=2, width=64),
    ]
    ranks = sorted({shape.rank, max(1, shape.rank // 4)} if shape.rank else {0}, reverse=True)
    neutrals = NEUTRAL_WEIGHTS if settings.neutral is None else (settings.neutral,)
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
    """Train a router, set its threshold, and measure it on the test questions.

    Args:
        tokens: labelled tokens.
        shape: of the network.
        settings: of training.
        choose: try the `candidates` and take the best on held-out folds; else the given shape and weight.
        most: maximum questions to train on.
        report: called with (stage, done, total).

    Raises:
        DataError: no token diverges, or all do, or there are too few questions.
    """
    split = split_questions(
        tokens.questions, shape.members, seed=settings.seed, test=settings.test, most=most
    )
    labelled = tokens.where(tokens.labels != UNKNOWN)
    training = labelled.of(split.train)
    _require_both_classes(training)
    tried = candidates(shape, settings) if choose else [(shape, settings)]
    best: tuple[float, int, DivergenceNetwork, Tensor] | None = None
    results = []
    stage = "trying shapes" if choose else "training"
    for index, (candidate, candidate_settings) in enumerate(tried):
        report(stage, index, len(tried))
        network, held_out = _fit(training, split, candidate, candidate_settings)
        rows = ~held_out.isnan()
        recall = _mean_recall(training.where(rows), held_out[rows])
        results.append(
            _hyperparameters(candidate, candidate_settings)
            | {"recall": recall, "auc": _aucs(training.where(rows), held_out[rows])}
        )
        if best is None or recall > best[0]:
            best = (recall, index, network, held_out)
    report(stage, len(tried), len(tried))
    assert best is not None, "at least one shape is tried"
    _, index, network, held_out = best
    return _trained_router(tokens, network, held_out, training, split, tried[index][1], results)


def _trained_router(
    tokens: LabelledTokens,
    network: DivergenceNetwork,
    held_out: Tensor,
    training: LabelledTokens,
    split: Split,
    settings: TrainSettings,
    tried: list[dict[str, Any]],
) -> TrainedRouter:
    test = tokens.of(split.test)
    scores = score(network, test)
    rows = ~held_out.isnan()
    share = share_for_recall(held_out[rows], (training.labels == DIVERGENT)[rows], settings.recall)
    quantiles = score_quantiles(scores)
    manifest = tokens.manifest
    metadata: dict[str, Any] = {
        "pair": manifest["pair"],
        "small": manifest["small"],
        "large": manifest["large"],
        "strategy": manifest["settings"]["strategy"],
        "verifier": tokens.verifier,
        "threshold": 0.5,
        "quantiles": quantiles,
        "calibration": {"by": "recall on held-out questions", "recall": settings.recall, "share": share},
        "settings": _hyperparameters(network.shape, settings) | {"seed": settings.seed},
        "tried": tried,
        "split": {"test": list(split.test), "train": list(split.train)},
        "digests": _digests(tokens, split.train),
        "tokens": {"train": len(training), "test": len(test)},
        "metrics": {
            "router": measure(test, scores),
            "entropy": measure(test, test.entropy),
        },
        "versions": {**manifest.get("versions", {}), "torch": torch.__version__},
    }
    router = TrainedRouter(network, metadata)
    return replace(router, metadata={**metadata, "threshold": router.threshold_for(share)})


def _digests(tokens: LabelledTokens, questions: Sequence[str]) -> list[str]:
    """Digests of the questions' texts; none unless all are known."""
    known = tokens.digests
    return [known[name] for name in questions] if all(name in known for name in questions) else []


def unseen_tokens(router: TrainedRouter, tokens: LabelledTokens) -> LabelledTokens:
    """The tokens of the questions that a router was not trained on.

    Raises:
        InputError: the router was made for other weights.
    """
    for role in ("small", "large"):
        model = tokens.manifest[role]
        router.check_weights(role, model["name"], model["sha256"])
    digests = {name: tokens.digests.get(name) for name in tokens.questions}
    trained = seen_in_training(router.metadata, router.metadata["split"]["train"], digests)
    return tokens.of([name for name in tokens.questions if name not in trained])


@torch.inference_mode()
def score(network: DivergenceNetwork, tokens: LabelledTokens, *, batch: int = 4096) -> Tensor:
    """Probabilities of divergence [N] of labelled tokens, as in serving. batch: tokens computed at once."""
    network.eval()
    parts = []
    for rows in torch.split(torch.arange(len(tokens)), batch):
        parts.append(torch.sigmoid(network.logits(_inputs(network.shape, tokens.where(rows)))))
    return torch.cat(parts) if parts else torch.zeros(0)


def score_quantiles(scores: Tensor | Sequence[float]) -> list[float]:
    """QUANTILES + 1 quantiles of scores [N], from the lowest to the highest."""
    ordered = torch.as_tensor(scores, dtype=torch.float64).sort().values
    indices = torch.linspace(0, max(0, len(ordered) - 1), QUANTILES + 1).round().long()
    return [float(each) for each in ordered[indices]]


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
    """A trained network, and out-of-fold logits [N], NaN where every member saw a token's question."""
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
        _optimise(network, inputs, positive, weights / weights.mean(), held, settings)
    round_weights(network)
    network.eval()
    with torch.inference_mode():
        logits: Tensor = network(inputs)
    held_out = (logits * held).sum(0) / held.sum(0)  # 0 / 0 is NaN
    return network, held_out.clone()


def _folds(tokens: LabelledTokens, split: Split) -> Tensor:
    """The fold of each token's question, int64 [N]; -1: none."""
    fold_of = {name: index for index, fold in enumerate(split.folds) for name in fold}
    return torch.tensor([fold_of.get(name, -1) for name in tokens.questions])[tokens.owner]


def _optimise(
    network: DivergenceNetwork,
    inputs: Tensor,
    positive: Tensor,
    weights: Tensor,
    held: Tensor,
    settings: TrainSettings,
) -> None:
    """Train all K members together, each without its held-out tokens; each keeps its best weights.

    inputs: [N, F]; positive, weights: [N]; held: tokens that each member holds out, bool [K, N].
    """
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.rate, weight_decay=settings.decay)
    members = network.shape.members
    best = torch.full((members,), math.inf)
    best_weights = [parameter.detach().clone() for parameter in network.parameters()]
    stale, train_weights = torch.zeros(members), (~held).float() * weights  # [K], [K, N]
    for _ in range(settings.epochs):
        network.train()
        for rows in torch.split(torch.randperm(len(inputs)), settings.batch):
            optimiser.zero_grad()
            loss = _loss(network(inputs[rows]), positive[rows], train_weights[:, rows]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        network.eval()
        with torch.no_grad():
            held_out_loss = _loss(network(inputs), positive, held * weights)
        improved = held_out_loss < best
        best, stale = torch.where(improved, held_out_loss, best), torch.where(improved, 0, stale + 1)
        with torch.no_grad():
            for copy, parameter in zip(best_weights, network.parameters(), strict=True):
                copy[improved] = parameter[improved]
        if bool((stale >= settings.patience).all()):
            break
    with torch.no_grad():
        for copy, parameter in zip(best_weights, network.parameters(), strict=True):
            parameter.copy_(copy)


def _loss(logits: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy of each member: logits and weights [K, B], positive [B] -> [K]."""
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, positive.expand_as(logits), reduction="none"
    )
    return (each * weights).sum(1) / weights.sum(1).clamp_min(1e-9)


def _mean_recall(tokens: LabelledTokens, scores: Tensor) -> float:
    positive = tokens.labels == DIVERGENT
    recalls = [recall_at(scores, positive, share) or 0.0 for share in SELECTION_SHARES]
    return sum(recalls) / len(recalls)


def _aucs(tokens: LabelledTokens, scores: Tensor) -> dict[str, float | None]:
    positive, differing = tokens.labels == DIVERGENT, tokens.labels != IDENTICAL
    return {"all": auc(scores, positive), "differing": auc(scores[differing], positive[differing])}


def _hyperparameters(shape: Shape, settings: TrainSettings) -> dict[str, Any]:
    return {
        "depth": shape.depth,
        "width": shape.width,
        "rank": shape.rank,
        "neutral": settings.neutral_weight,
    }


def _require_both_classes(tokens: LabelledTokens) -> None:
    divergent = int((tokens.labels == DIVERGENT).sum())
    if divergent == 0 or divergent == len(tokens):
        raise DataError(
            f"{divergent} of {len(tokens)} labelled tokens diverge; a router learns from both kinds: label "
            "more questions, or with another verifier"
        )


def evaluate(routers: Mapping[str, TrainedRouter], tokens: LabelledTokens) -> dict[str, Any]:
    """AUC and recall of routers, and of entropy alone, on the questions that none of them was trained on.

    Args:
        routers: by name.
        tokens: labelled tokens.

    Raises:
        InputError: a router was made for other weights than the labels.
        DataError: no question is left.
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
