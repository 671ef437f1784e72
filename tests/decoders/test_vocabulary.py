"""Which tokens may be written: the rows that models share, without the ids that their tokenizer lacks."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from viaticum.decoders.vocabulary import SharedVocabulary
from viaticum.errors import InputError
from viaticum.routers.token.base import argmax_token


def test_rows_ids_and_stop_ids_make_the_vocabulary() -> None:
    assert SharedVocabulary.of(97) == SharedVocabulary(97, 97)
    found = SharedVocabulary.of(97, [*range(10), 12, 13, 96, 97, 200], stop_ids=[14, 98])
    assert found == SharedVocabulary(97, 97, (10, 11, *range(15, 96)), own_ends=(98,), end=14)
    assert SharedVocabulary.of(97, range(10), stop_ids=[98, -1]) == SharedVocabulary(97, 10), (
        "no end for both"
    )
    assert [token for token in range(-1, 120) if token in found] == [*range(10), 12, 13, 14, 96]
    assert SharedVocabulary.of(112, range(95)) == SharedVocabulary(112, 95), (
        "padding of the models themselves"
    )
    with pytest.raises(InputError, match="97"):
        SharedVocabulary.of(97, [97, 98])


def test_nothing_is_copied_where_nothing_is_missing() -> None:
    logits = torch.randn(3, 112)
    assert SharedVocabulary(112, 112).cut(logits) is logits
    assert SharedVocabulary(112, 112).candidates(logits) is logits
    padded = SharedVocabulary(97, 95)
    for view, width in ((padded.cut(logits), 97), (padded.candidates(logits), 95)):
        assert view.shape == (3, width)
        assert view.data_ptr() == logits.data_ptr()


def test_an_end_that_one_model_has_alone_counts_for_one_that_both_have() -> None:
    vocabulary = SharedVocabulary.of(5, range(4), stop_ids=[3, 6, 200])
    logits = torch.tensor([[0.0, 1, 2, 3, 9, 9, 4, 9], [0.0, 1, 2, 3, 9, 9, -4, 9]])
    assert vocabulary.cut(logits).tolist() == [[0, 1, 2, 4, 9], [0, 1, 2, 3, 9]]
    assert logits[0, 3] == 3, "the model's own logits stay"
    assert vocabulary.cut(logits[:, :5]) is not None
    assert [vocabulary.written(token) for token in (2, 3, 6, 7, 200)] == [2, 3, 3, 7, 3]
    assert [token in vocabulary for token in (3, 4, 6)] == [True, False, False]


def test_holes_are_never_the_most_likely_token() -> None:
    logits = torch.arange(20.0).repeat(2, 1)
    vocabulary = SharedVocabulary.of(18, [*range(10), 12])
    assert argmax_token(vocabulary.candidates(logits)).tolist() == [12, 12]
    assert logits[0].tolist() == list(range(20)), "the logits that a router reads are left as they are"


def strided(rows: int, size: int, rng: random.Random) -> Tensor:
    """Few distinct values, so that many are equal; a view of wider rows."""
    wide = torch.tensor([[rng.randrange(30) for _ in range(size + 50)] for _ in range(rows)]).float()
    return wide[:, :size]


@pytest.mark.parametrize("size", [1, 97, 127, 128, 129, 255, 256, 300, 1000])
def test_the_first_of_equal_logits_is_found_in_rows_of_any_length(size: int) -> None:
    rng = random.Random(size)
    for rows in (1, 5):
        logits = strided(rows, size, rng)
        assert argmax_token(logits).tolist() == [row.index(max(row)) for row in logits.tolist()]
    last = torch.zeros(2, size)
    last[:, -1] = 1
    assert argmax_token(last).tolist() == [size - 1] * 2
