"""Which tokens a decoder may write: those that its models and its tokenizer share.

Rows of logits are padded to multiples that differ between the sizes of one family (Qwen2.5: 151,936 rows up
to 3B, 152,064 from 7B), and tokenizers have fewer tokens than either. Rows that one of the models lacks are
cut from the logits of the other, so that the entropies of both are over the same tokens. Rows without a
token of the tokenizer stay in the entropy and in what a token router reads, as they were when it was
trained, but none of them is ever chosen. A model may end its texts by a token that the other has no row for
(a chat model beside its base model): one that both have is written for it. Leaves out whether two tokenizers
agree (`viaticum.vocabulary`).
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
        own_ends: stop ids from `rows` on, which only some of the models have.
        end: stop id below `rows` that is written for any of them; None: there is none.
    """

    rows: int
    size: int
    holes: tuple[int, ...] = ()
    own_ends: tuple[int, ...] = ()
    end: int | None = None

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
        stops = sorted(token for token in stop_ids if token >= 0)
        end = next((token for token in stops if token < rows), None)
        own_ends = tuple(token for token in stops if token >= rows) if end is not None else ()
        if token_ids is None:
            return cls(rows, rows, (), own_ends, end if own_ends else None)
        allowed = {token for token in token_ids if 0 <= token < rows}
        if not allowed:
            raise InputError(f"none of the tokenizer's ids is below {rows}, the rows of the models' logits")
        allowed.update(token for token in stops if token < rows)
        size = max(allowed) + 1
        holes = tuple(token for token in range(size) if token not in allowed)
        return cls(rows, size, holes, own_ends, end if own_ends else None)

    def __contains__(self, token: int) -> bool:
        return 0 <= token < self.size and token not in self.holes

    def __len__(self) -> int:
        """Number of tokens that may be written."""
        return self.size - len(self.holes)

    def written(self, token: int) -> int:
        """The id that is written for a token of one of the models."""
        return self.end if self.end is not None and token in self.own_ends else token

    def cut(self, logits: Tensor) -> Tensor:
        """Logits [N, V] of a model without the rows that another one lacks, [N, rows].

        A view, unless the model has ends of its own: `end` then has the largest logit of them all, so that
        the most likely token ends a text where it did in the model's own rows.
        """
        if logits.shape[-1] == self.rows:
            return logits
        shared = logits[:, : self.rows]
        ends = [end for end in (self.end, *self.own_ends) if end is not None and end < logits.shape[-1]]
        if len(ends) < 2:
            return shared
        shared = shared.clone()
        shared[:, ends[0]] = torch.stack([logits[:, end] for end in ends]).amax(0)
        return shared

    def candidates(self, logits: Tensor) -> Tensor:
        """Logits [N, rows] of the tokens to choose from, [N, size], -inf at holes; a view without any."""
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
