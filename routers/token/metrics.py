"""Metrics of divergence scores: over all tokens, and over only those at which the two models differ.

The first measures what serving sees; the second what a score knows beyond "the models will differ", which
entropy predicts well already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from viaticum.routers.token.labels import DIVERGENT, IDENTICAL, UNKNOWN, LabelledTokens

SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)  # of all tokens, that go to the large model
DIFFERING_SHARES = (0.25, 0.5, 0.75)  # of the tokens that differ
DRAWS = 200  # bootstrap samples of questions


def auc(scores: Tensor, positive: Tensor) -> float | None:
    """ROC AUC of scores [N], ties counted half; None without both classes. positive: bool [N]."""
    wins, pairs = _wins(scores, positive)
    return wins / pairs if pairs else None


def _wins(scores: Tensor, positive: Tensor) -> tuple[float, int]:
    up, down = int(positive.sum()), int((~positive).sum())
    _, inverse, counts = torch.unique(scores.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts.double() - 1) / 2)[inverse]  # from 1; equals share their mean rank
    return float(ranks[positive].sum()) - up * (up + 1) / 2, up * down


def recall_at(scores: Tensor, positive: Tensor, share: float) -> float | None:
    """Recall of the `share` of tokens with the highest scores [N]; ties divide the remaining room evenly.

    positive: bool [N]. None without positives.
    """
    if not bool(positive.any()):
        return None
    wanted = share * len(scores)
    values, inverse, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    above = len(scores) - counts.cumsum(0)  # number of tokens that score higher than each value
    part = ((wanted - above).clamp_min(0) / counts).clamp_max(1)  # share selected of the tokens of each value
    assert len(values) == len(part)
    return float(part[inverse][positive].sum() / positive.sum())


def share_for_recall(scores: Tensor, positive: Tensor, recall: float) -> float:
    """The smallest share of tokens with the highest scores [N] that reaches a recall. positive: bool [N]."""
    ordered = positive[scores.argsort(descending=True, stable=True)].cumsum(0)
    needed = recall * int(positive.sum())
    return (int((ordered < needed - 1e-9).sum()) + 1) / len(scores)


def measure(tokens: LabelledTokens, scores: Tensor, *, draws: int = DRAWS) -> dict[str, Any]:
    """AUC and recall of scores [N] on labelled tokens; unknown labels are left out.

    draws: bootstrap samples of questions for the 95% intervals of the AUC.
    """
    known = tokens.labels != UNKNOWN
    tokens, scores = tokens.where(known), scores[known]
    positive, differing = tokens.labels == DIVERGENT, tokens.labels != IDENTICAL
    return {
        "all": {
            "auc": auc(scores, positive),
            "auc_95": _interval(scores, positive, tokens.owner, draws),
            "recall_at_share": {str(each): recall_at(scores, positive, each) for each in SHARES},
        },
        "differing": {
            "auc": auc(scores[differing], positive[differing]),
            "auc_95": _interval(scores[differing], positive[differing], tokens.owner[differing], draws),
            "recall_at_share": {
                str(each): recall_at(scores[differing], positive[differing], each)
                for each in DIFFERING_SHARES
            },
        },
    }


def _interval(scores: Tensor, positive: Tensor, owner: Tensor, draws: int) -> Sequence[float] | None:
    """95% bootstrap interval of the AUC over whole questions: tokens of a text are not independent."""
    owners = owner.unique().tolist()  # type: ignore[no-untyped-call]
    if len(owners) < 2 or draws < 2 or auc(scores, positive) is None:
        return None
    rows = [(owner == each).nonzero().flatten() for each in owners]
    rng = torch.Generator().manual_seed(0)
    values = []
    for _ in range(draws):
        chosen = torch.randint(len(rows), (len(rows),), generator=rng).tolist()
        sampled = torch.cat([rows[i] for i in chosen])
        value = auc(scores[sampled], positive[sampled])
        values += [] if value is None else [value]
    if not values:
        return None
    ends = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.025, 0.975], dtype=torch.float64)
    )
    return [float(each) for each in ends]
