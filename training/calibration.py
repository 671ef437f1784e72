"""Calibration of a token router's threshold to a share of the large model, a speed, or a recall.

A share is that of texts which the pair writes with the router, not of existing texts: each token of the small
model changes what follows. So the pair writes, the threshold moves to where its scores have the wanted share,
and the pair writes again. A recall is counted on labels. Leaves out training.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viaticum.catalogue import Catalogue
from viaticum.errors import DataError, InputError, ModelError
from viaticum.models.local import LocalModels, check_context
from viaticum.models.settings import prompt, resolve
from viaticum.models.token_routers import check_members
from viaticum.questions import Question
from viaticum.strategies import get as get_strategy
from viaticum.strategies import load
from viaticum.training.progress import Report, no_report

if TYPE_CHECKING:
    from viaticum.decoders import Request
    from viaticum.routers.token.neural import TrainedRouter

MAX_ROUNDS = 4
SHARE_TOLERANCE = 0.01  # a share that is nearer than this is met


@dataclass(frozen=True)
class _Round:
    """Measurements at one threshold. small, large: seconds per token of each model."""

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
    report: Report = no_report,
) -> TrainedRouter:
    """Let the pair write answers, and store the threshold that comes nearest to a share or a speed.

    Args:
        folder: folder of the router, which is replaced.
        questions: questions that the pair answers.
        catalogue: the models.
        share: wanted share of the tokens that the large model writes; this or tokens_per_second.
        tokens_per_second: wanted speed of all `slots` together, on this machine as it is now.
        pair: by default the pair that the router was trained for.
        strategy: by default that of the labels.
        slots: texts that are written at once.
        report: called with stage, done and total.

    Raises:
        InputError: the share or speed is impossible, or the router was trained on other weights.
        DataError: there are no questions.
        PromptTooLong: a question does not fit both models.
        ModelError: a text failed.
    """
    from viaticum.routers.token.neural import TrainedRouter

    if (share is None) == (tokens_per_second is None):
        raise InputError("give a share or tokens_per_second")
    if share is not None and not 0 < share < 1:
        raise InputError(f"a share is between 0 and 1, got {share}")
    if not questions:
        raise DataError("no questions to calibrate on; write one object with a question a line")
    router = TrainedRouter.load(folder)
    measure = _ThresholdRun(router, questions, catalogue, pair, strategy, slots)
    threshold = router.threshold if share is None else router.threshold_for(share)
    rounds: list[_Round] = []
    for number in range(MAX_ROUNDS):
        report("writing", number, MAX_ROUNDS)
        rounds.append(measure(threshold))
        if tokens_per_second is not None:
            share = _share_for(tokens_per_second, rounds[-1])
        assert share is not None, "one of the two is given"
        if abs(rounds[-1].share - share) <= SHARE_TOLERANCE:
            break
        threshold = _quantile(rounds[-1].scores, 1 - share)
        if any(each.threshold == threshold for each in rounds):
            break  # no score lies in between
    report("writing", MAX_ROUNDS, MAX_ROUNDS)
    assert share is not None, "one of the two is given"
    best = min(rounds, key=lambda each: abs(each.share - share))
    return _save(folder, router, best, share, tokens_per_second, len(questions))


def calibrate_recall(folder: str | Path, labels: str | Path, recall: float) -> TrainedRouter:
    """Store the highest threshold that finds a share of the divergent tokens in questions not learned from.

    Tokens are divergent by the verifier that the router learned from, or by the folder's first where that one
    has no labels.

    Args:
        folder: folder of the router, which is replaced.
        labels: folder of labels.
        recall: wanted share of the divergent tokens, above 0 and at most 1.

    Raises:
        InputError: the recall is out of range, or the labels are of other weights.
        DataError: nothing diverges.
    """
    from viaticum.routers.token.labels import DIVERGENT, UNKNOWN, LabelledTokens
    from viaticum.routers.token.metrics import share_for_recall
    from viaticum.routers.token.neural import TrainedRouter
    from viaticum.routers.token.train import score, score_quantiles, unseen_tokens

    if not 0 < recall <= 1:
        raise InputError(f"a recall is above 0 and at most 1, got {recall}")
    router = TrainedRouter.load(folder)
    tokens = LabelledTokens.load(labels, prefer=router.verifier)
    unseen = unseen_tokens(router, tokens)
    unseen = unseen.where(unseen.labels != UNKNOWN)
    positive = unseen.labels == DIVERGENT
    if not bool(positive.any()):
        raise DataError(
            f"no token of {labels} diverges in a question that the router did not learn from; label others"
        )
    scores = score(router.network, unseen)
    threshold = float(
        scores[positive].sort(descending=True).values[_min_found(recall, int(positive.sum())) - 1]
    )
    share = share_for_recall(scores, positive, recall)
    facts = {
        **router.metadata,
        "threshold": max(0.0, threshold - 1e-7),  # below the score of the last token that counts
        "quantiles": score_quantiles(scores),
        "calibration": {
            "by": "recall on labels",
            "recall": recall,
            "share": share,
            "questions": len(set(unseen.owner.tolist())),
        },
    }
    calibrated = replace(router, metadata=facts)
    calibrated.save(folder)
    return calibrated


def _min_found(recall: float, of: int) -> int:
    """Tokens to find for a recall of `of` tokens, rounded up."""
    return max(1, -int(-(recall * of - 1e-9) // 1))


class _ThresholdRun:
    """Lets the pair answer the questions at a threshold, and measures share and speed."""

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
        self.spec = catalogue[pair or router.metadata["pair"]]
        if self.spec.kind != "pair":
            raise InputError(f"{self.spec.name} is a {self.spec.kind} model; a token router is for a pair")
        check_members(router, self.spec, catalogue)
        self.pool = LocalModels(catalogue, slots=slots)
        self.model = self.pool.model(self.spec.name)
        load(*catalogue.strategies, strategy or router.metadata["strategy"])
        prompting = get_strategy(strategy or router.metadata["strategy"])
        generation = resolve(catalogue, self.spec.name, prompting)
        self.names = [each.id for each in questions]
        chats = [prompt(self.spec, prompting, each.query) for each in questions]
        self.requests: list[Request] = [
            Request(
                self.model.prompt(chat, generation),
                generation.max_new_tokens,
                stop=generation.stop,
                small_prompt=self.model.small_prompt(chat, generation),
            )
            for chat in chats
        ]
        members = [catalogue[name] for name in self.spec.members]
        for name, request in zip(self.names, self.requests, strict=True):
            for text, member in zip(request.prompts, members, strict=True):
                check_context(name, text, request.max_new_tokens, [member])

    def __call__(self, threshold: float) -> _Round:
        from viaticum.decoders import MixedDecoder
        from viaticum.routers.token.neural import LearnedDivergenceRouter

        small, large = self.pool.runners(self.spec.name)
        decoder = MixedDecoder(
            large,
            small,
            tokenizer=self.model.tokenizer,
            router=LearnedDivergenceRouter(self.router.network, small.embeddings, threshold),
            stop_ids=self.model.stop_ids([small, large]),
            names=(self.spec.members[0], self.spec.members[1]),
            shared_vocabulary=self.model.vocabulary([small, large]),
        )
        started = time.perf_counter()
        results = decoder.generate_all(self.requests)
        seconds, stats = time.perf_counter() - started, decoder.stats
        for name, result in zip(self.names, results, strict=True):
            if result.error is not None:
                raise ModelError(f"question {name!r}: {result.error}")
        traces = [result.trace for result in results]
        made_by = [model for trace in traces for model in trace.made_by]  # 0: small, 1: large
        return _Round(
            threshold,
            share=sum(made_by) / len(made_by),
            tokens=len(made_by),
            seconds=seconds,
            small=stats.small.seconds / max(1, stats.proposed),
            large=stats.large.seconds / max(1, stats.large_tokens),
            scores=[score for trace in traces for score in trace.scores if score == score],
        )


def _share_for(tokens_per_second: float, measured: _Round) -> float:
    """The share with this expected speed: seconds per token = small + share * large.

    Without a token of the large model its time is taken to be the small one's: too little, until the next
    round.
    """
    if not tokens_per_second > 0:
        raise InputError(f"tokens_per_second must be above 0, got {tokens_per_second}")
    fastest = 1 / measured.small
    if tokens_per_second >= fastest:
        raise InputError(
            f"{tokens_per_second:g} tokens a second cannot be reached: the small model alone makes "
            f"{fastest:.1f}"
        )
    share = (1 / tokens_per_second - measured.small) / (measured.large or measured.small)
    return min(share, 0.99)


def _quantile(scores: list[float], level: float) -> float:
    """The score that a share `level` of the scores does not exceed."""
    ordered = sorted(scores)
    return ordered[min(len(ordered) - 1, max(0, round(level * len(ordered)) - 1))]


def _save(
    folder: str | Path,
    router: TrainedRouter,
    best: _Round,
    share: float,
    tokens_per_second: float | None,
    questions: int,
) -> TrainedRouter:
    from viaticum.routers.token.train import score_quantiles

    calibration: dict[str, Any] = {
        "by": "share of served texts" if tokens_per_second is None else "tokens per second",
        "wanted": share if tokens_per_second is None else tokens_per_second,
        "share": best.share,
        "tokens_per_second": best.tokens / best.seconds,
        "questions": questions,
        "tokens": best.tokens,
    }
    facts = {
        **router.metadata,
        "threshold": best.threshold,
        "quantiles": score_quantiles(best.scores),
        "calibration": calibration,
    }
    calibrated = replace(router, metadata=facts)
    calibrated.save(folder)
    return calibrated
