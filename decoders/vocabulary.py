"""Which tokens a decoder may write: those that its models and its tokenizer share.

Rows of logits are padded to multiples that differ between the sizes of one family (Qwen2.5: 151,936 rows up
to 3B, 152,064 from 7B), and tokenizers have fewer tokens than either. Rows that one of the models lacks are
cut from the logits of the other, so that the entropies of both are over the same tokens. Rows without a
token of the tokenizer stay in the entropy and in what a token router reads, as they were when it was
trained, but none of them is ever chosen. Leaves out whether two tokenizers agree (`viaticum.vocabulary`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from viaticum.errors import InputError


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """The token ids that may be written.

    Args:
        rows: logits that every model has: ids 0 to rows - 1. Entropies are normalised by ln(rows).
        size: one more than the largest id that may be written.
        holes: ids below `size` that may not be written, ascending.
    """

    rows: int
    size: int
    holes: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, rows: int, token_ids: Iterable[int] | None = None, stop_ids: Iterable[int] = ()
    ) -> SharedVocabulary:
        """The vocabulary of models with at least `rows` rows of logits.

        Args:
            rows: rows of logits that every model has.
            token_ids: ids of the tokenizer; None: all rows.
            stop_ids: ids that end a text; they may be written whether or not the tokenizer has them.

        Raises:
            InputError: no id of the tokenizer is below `rows`.
        """
        if token_ids is None:
            return cls(rows, rows)
        allowed = {token for token in token_ids if 0 <= token < rows}
        if not allowed:
            raise InputError(f"none of the tokenizer's ids is below {rows}, the rows of the models' logits")
        allowed.update(token for token in stop_ids if 0 <= token < rows)
        size = max(allowed) + 1
        return cls(rows, size, tuple(token for token in range(size) if token not in allowed))

    def __contains__(self, token: int) -> bool:
        return 0 <= token < self.size and token not in self.holes

    def __len__(self) -> int:
        """Number of tokens that may be written."""
        return self.size - len(self.holes)

    def cut(self, logits: Tensor) -> Tensor:
        """Logits [N, V] of a model without the rows that another one lacks: a view [N, rows]."""
        return logits if logits.shape[-1] == self.rows else logits[:, : self.rows]

    def candidates(self, logits: Tensor) -> Tensor:
        """Logits [N, V] of the tokens to choose from, [N, size], -inf at holes; a view if there are none."""
        chosen = logits if logits.shape[-1] == self.size else logits[:, : self.size]
        if not self.holes:
            return chosen
        return chosen.index_fill(1, _holes(self.holes, logits.device), float("-inf"))


def end_ids(configured: Any) -> frozenset[int]:
    """The ids of a model's `eos_token_id`, which is one id, a list of them, or None."""
    many = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in many if token is not None)


@lru_cache(maxsize=16)
def _holes(holes: tuple[int, ...], device: torch.device) -> Tensor:
    """Holes on a device; kept, since a captured CUDA graph may not upload them."""
    return torch.tensor(holes, device=device)
