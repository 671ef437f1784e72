"""Set a token router's threshold on prompts of one's own: to a share of the large model, to a speed, or to a recall.

A share is that of texts which the pair writes with the router, not of texts that are there already: what the small model
writes changes what it is asked next. So the pair writes, the threshold is moved to where the share of its scores is the wanted one,
and it writes again. Leaves out training; a recall can only be counted on labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viaticum.catalogue import Catalogue
from viaticum.errors import DataError, InputError, ModelError
from viaticum.models.local import LocalModels, check_context, stop_ids
from viaticum.models.token_routers import check_members
from viaticum.questions import Question
from viaticum.strategies import get as get_strategy

if TYPE_CHECKING:
    from viaticum.decoders import Request
    from viaticum.routers.token.neural import TrainedRouter

ROUNDS = 4
CLOSE = 0.01  # of a share: nearer than this it is met
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Round:
    """What the pair did at a threshold. small, large: seconds a token of each."""

    threshold: float
    share: float
    tokens: int
    seconds: float
    small: float
    large: float
    scores: list[float]


def calibrate(
    folder: str | Path,
    questions: Sequence[Question],
    *,
    catalogue: Catalogue,
    share: float | None = None,
    tokens_per_second: float | None = None,
    pair: str = "",
    strategy: str = "",
    slots: int = 16,
    report: Report = lambda stage, done, of: None,
) -> TrainedRouter:
    """Let the pair write the answers, and keep the threshold that comes nearest to the share, or the speed.

    The speed is that of all `slots` together, on this machine as it is now. The router in the folder is replaced. Raises
    `InputError` for a share or speed that cannot be, or a router of other weights, `PromptTooLong` for a question that does
    not fit both models, and `ModelError` where a text fails.
    """
    from viaticum.routers.token.neural import TrainedRouter

    if (share is None) == (tokens_per_second is None):
        raise InputError("give a share or tokens_per_second")
    if share is not None and not 0 < share < 1:
        raise InputError(f"a share is between 0 and 1, got {share}")
    if not questions:
        raise DataError("no questions to calibrate on; write one object with a question a line")
    router = TrainedRouter.load(folder)
    writes = _Writer(router, questions, catalogue, pair, strategy, slots)
    threshold = router.threshold if share is None else router.threshold_for(share)
    rounds: list[_Round] = []
    for number in range(ROUNDS):
        report("writing", number, ROUNDS)
        rounds.append(writes(threshold))
        if tokens_per_second is not None:
            share = _share_for(tokens_per_second, rounds[-1])
        assert share is not None, "one of the two is given"
        if abs(rounds[-1].share - share) <= CLOSE:
            break
        threshold = _quantile(rounds[-1].scores, 1 - share)
        if any(each.threshold == threshold for each in rounds):
            break  # no score lies between
    report("writing", ROUNDS, ROUNDS)
    assert share is not None, "one of the two is given"
    best = min(rounds, key=lambda each: abs(each.share - share))
    return _keep(folder, router, best, share, tokens_per_second, len(questions))


def calibrate_recall(folder: str | Path, labels: str | Path, recall: float) -> TrainedRouter:
    """Keep the highest threshold that finds so much of the divergent tokens of the questions it did not learn from.

    Which tokens diverge is told by the verifier that it learned from, or the folder's first where it has none by that one.
    Raises `InputError` for a recall out of range or labels of other weights, `DataError` where nothing diverges.
    """
    from viaticum.routers.token.labels import DIVERGENT, UNKNOWN, LabelledTokens
    from viaticum.routers.token.metrics import share_for_recall
    from viaticum.routers.token.neural import TrainedRouter
    from viaticum.routers.token.train import quantiles_of, score, unseen_by

    if not 0 < recall <= 1:
        raise InputError(f"a recall is above 0 and at most 1, got {recall}")
    router = TrainedRouter.load(folder)
    tokens = LabelledTokens.load(labels, prefer=router.verifier)
    unseen = unseen_by(router, tokens)
    unseen = unseen.where(unseen.labels != UNKNOWN)
    positive = unseen.labels == DIVERGENT
    if not bool(positive.any()):
        raise DataError(
            f"no token of {labels} diverges in a question that the router did not learn from; label others"
        )
    scores = score(router.network, unseen)
    threshold = float(scores[positive].sort(descending=True).values[_needed(recall, int(positive.sum())) - 1])
    share = share_for_recall(scores, positive, recall)
    facts = {
        **router.facts,
        "threshold": max(0.0, threshold - 1e-7),  # the last token that counts has to lie above it
        "quantiles": quantiles_of(scores),
        "calibration": {
            "by": "recall on labels",
            "recall": recall,
            "share": share,
            "questions": len(set(unseen.owner.tolist())),
        },
    }
    found = replace(router, facts=facts)
    found.save(folder)
    return found


def _needed(recall: float, of: int) -> int:
    return max(1, -int(-(recall * of - 1e-9) // 1))


class _Writer:
    """Lets the pair answer the questions at a threshold."""

    def __init__(
        self,
        router: TrainedRouter,
        questions: Sequence[Question],
        catalogue: Catalogue,
        pair: str,
        strategy: str,
        slots: int,
    ) -> None:
        from viaticum.decoders import Request

        self.router = router
        self.spec = catalogue[pair or router.facts["pair"]]
        if self.spec.kind != "pair":
            raise InputError(f"{self.spec.name} is a {self.spec.kind} model; a token router is for a pair")
        check_members(router, self.spec, catalogue)
        self.pool = LocalModels(catalogue, slots=slots)
        self.model = self.pool.model(self.spec.name)
        asks = get_strategy(strategy or router.facts["strategy"])
        self.names = [each.id for each in questions]
        self.requests: list[Request] = [
            Request(self.model.prompt(asks.messages(each.query)), asks.max_new_tokens, stop=asks.stop)
            for each in questions
        ]
        members = [catalogue[name] for name in self.spec.members]
        for name, request in zip(self.names, self.requests, strict=True):
            check_context(name, request.prompt, request.max_new_tokens, members)

    def __call__(self, threshold: float) -> _Round:
        from viaticum.decoders import MixedDecoder
        from viaticum.routers.token.neural import LearnedDivergence

        small, large = (self.pool.runner(name) for name in self.spec.members)
        decoder = MixedDecoder(
            large,
            small,
            tokenizer=self.model.tokenizer,
            router=LearnedDivergence(self.router.network, small.embeddings, threshold),
            stop_ids=stop_ids(large, self.model.tokenizer),
            names=(self.spec.members[0], self.spec.members[1]),
        )
        began = time.perf_counter()
        results = decoder.write_all(self.requests)
        seconds, stats = time.perf_counter() - began, decoder.stats
        for name, result in zip(self.names, results, strict=True):
            if result.error is not None:
                raise ModelError(f"question {name!r}: {result.error}")
        traces = [result.trace for result in results]
        made = [each for trace in traces for each in trace.made_by]
        return _Round(
            threshold,
            share=sum(made) / len(made),
            tokens=len(made),
            seconds=seconds,
            small=stats.small.seconds / max(1, stats.proposed),
            large=stats.large.seconds / max(1, stats.large_tokens),
            scores=[score for trace in traces for score in trace.scores if score == score],
        )


def _share_for(tokens_per_second: float, seen: _Round) -> float:
    """The share at which so many tokens a second are to be expected: seconds a token = small + share * large.

    Where no token of the large model was seen its time is that of the small one: too little, until the next round.
    """
    if not tokens_per_second > 0:
        raise InputError(f"tokens_per_second must be above 0, got {tokens_per_second}")
    fastest = 1 / seen.small
    if tokens_per_second >= fastest:
        raise InputError(
            f"{tokens_per_second:g} tokens a second cannot be reached: the small model alone makes {fastest:.1f}"
        )
    share = (1 / tokens_per_second - seen.small) / (seen.large or seen.small)
    return min(share, 0.99)


def _quantile(scores: list[float], level: float) -> float:
    """The score that this share of the scores is at most: what lies above it goes to the large model."""
    ordered = sorted(scores)
    return ordered[min(len(ordered) - 1, max(0, round(level * len(ordered)) - 1))]


def _keep(
    folder: str | Path,
    router: TrainedRouter,
    best: _Round,
    share: float,
    tokens_per_second: float | None,
    questions: int,
) -> TrainedRouter:
    from viaticum.routers.token.train import quantiles_of

    told: dict[str, Any] = {
        "by": "share of served texts" if tokens_per_second is None else "tokens per second",
        "wanted": share if tokens_per_second is None else tokens_per_second,
        "share": best.share,
        "tokens_per_second": best.tokens / best.seconds,
        "questions": questions,
        "tokens": best.tokens,
    }
    facts = {
        **router.facts,
        "threshold": best.threshold,
        "quantiles": quantiles_of(best.scores),
        "calibration": told,
    }
    found = replace(router, facts=facts)
    found.save(folder)
    return found
