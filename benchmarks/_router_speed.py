"""Speed of the learned router: one choice, with and without the encoder, many rows at once, and fitting."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from viaticum.routers.query.choose import Weighted, choose, choose_plan
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.routers.query.rtr import RTRRouter
from viaticum.routers.query.shared_text import SharedText
from viaticum.types import Query

CHOICES, ENCODED, BATCH, ROUNDS = 200, 50, 1_000, 20
POLICY = Weighted(50.0)


class PrecomputedEncoder:
    """Embeddings that were computed before, in place of an encoder."""

    def __init__(self, texts: Sequence[str], embeddings: Tensor) -> None:
        self.embeddings = dict(zip(texts, embeddings, strict=True))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self.embeddings[text] for text in texts])


def median_ms(work: Callable[[str], Any], texts: Sequence[str]) -> float:
    """The median over texts, each once, after a warm-up."""
    times = []
    for text in [texts[0], *texts]:
        began = time.perf_counter()
        work(text)
        times.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(times[1:]), 2)


def rows_a_second(router: RTRRouter, embeddings: Tensor, columns: int) -> float:
    """Predictions for `columns` of every question, and a choice, in batches; the median of several rounds."""
    speeds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for part in torch.split(embeddings, BATCH):
            router.choose_columns(router.predict(part), POLICY.per_dollar)
        speeds.append(len(embeddings) * columns / (time.perf_counter() - began))
    return round(statistics.median(speeds))


def speed(router: RTRRouter, matrix: OutcomeMatrix) -> dict[str, Any]:
    """Milliseconds are medians over questions; rows are questions times pairs."""
    shared = SharedText.from_json(router.parameters.facts.get("shared_text"))
    read = [shared.without(text) for text in matrix.texts]
    embeddings = router.encoder(read).float()
    precomputed = RTRRouter(router.parameters, PrecomputedEncoder(read, embeddings))  # type: ignore[arg-type]
    encoder = Encoder(router.encoder.name, cache=None)
    encoding = RTRRouter(router.parameters, encoder)
    texts = matrix.texts[:CHOICES]
    return {
        "table_and_choose_ms": median_ms(
            lambda text: choose(precomputed.table(Query(text)), None, POLICY), texts
        ),
        "plans_and_choose_ms": median_ms(
            lambda text: choose_plan(precomputed.plans_for(Query(text)), None, POLICY), texts
        ),
        "encoder_ms": median_ms(lambda text: encoder([text]), texts[:ENCODED]),
        "with_encoder_ms": median_ms(
            lambda text: choose(encoding.table(Query(text)), None, POLICY), texts[:ENCODED]
        ),
        "plans_with_encoder_ms": median_ms(
            lambda text: choose_plan(encoding.plans_for(Query(text)), None, POLICY), texts[:ENCODED]
        ),
        "rows_a_second": rows_a_second(precomputed, embeddings, len(router.pairs)),
        "columns": len(router.plans),
        "batch": BATCH,
        "fit_rows": router.parameters.facts["questions"] * len(router.pairs),
        "fit_seconds": router.parameters.facts["seconds"],
    }
