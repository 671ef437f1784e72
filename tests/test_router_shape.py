"""What a question looks like, in ten numbers."""

from __future__ import annotations

import pytest
import torch

from viaticum.routers.query.shape import shape, with_shape

TEXTS = [
    "Who is her uncle?",
    "Baker made 121 cakes and sold 105 of them at $2.50 each. How many are left, and what did each of 3 friends get?",
    "",
    "1,000,000.5 and 1.2.3 and " + "9" * 400,
]


def test_every_text_has_numbers_of_a_sane_size() -> None:
    found = shape(TEXTS)
    assert found.shape == (4, 10)
    assert torch.isfinite(found).all()
    assert float(found.abs().max()) < 10


def test_more_numbers_and_words_are_seen() -> None:
    short, long = shape(TEXTS[:2])
    assert (long[:3] > short[:3]).all()
    assert (short[8], long[8]) == (0, 1), "dollars"
    assert long[9] > short[9], "each"


def test_beside_an_embedding_it_weighs_little() -> None:
    embeddings = torch.nn.functional.normalize(torch.randn(4, 32), dim=1)
    joined = with_shape(embeddings, TEXTS)
    assert joined.norm(dim=1) == pytest.approx(torch.ones(4))
    usual = joined[:2, :32].norm(dim=1)
    assert (usual > 0.85).all()
