"""How long a pair or plan takes on a question: the mean of the nearest known ones, as its dollars are found.

Seconds are those of the outcome table, so they hold for the machine and the number of texts at once that it
was measured with. Leaves out what calls take here and now (`viaticum.agents.workflow.latencies`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from viaticum.routers.query.heads import NeighboursHead


class SecondsHead:
    """Predicts seconds; NaN for a column of which none are known.

    Args:
        embeddings: of the known questions [Q, D].
        seconds: of every column on them, NaN where unknown [Q, M].
    """

    def __init__(self, embeddings: Tensor, seconds: Tensor) -> None:
        self._head = NeighboursHead(embeddings, seconds)
        self._unknown = seconds.isnan().all(0)

    def __call__(self, cosines: Tensor, indices: Tensor, share: Tensor | None) -> Tensor:
        """Expected seconds [N, M].

        Args:
            cosines, indices: of the nearest known questions [N, K].
            share: of the neighbours beside the mean of all questions [N, 1]; None for the neighbours alone.
        """
        near = self._head.mean(cosines, indices)
        if share is not None:
            near = share * near + (1 - share) * self._head.means
        return near.masked_fill(self._unknown, float("nan"))


def unknown_like(columns: Tensor) -> Tensor:
    """Seconds of a router that was fitted without any: NaN [N, M]."""
    return torch.full_like(columns, float("nan"))
