"""Near-duplicates: the join finds what comparing every pair finds, in every script, in little memory."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from viaticum.routers.query import heads, similar_texts
from viaticum.routers.query.heads import NeighboursHead
from viaticum.routers.query.outcome_matrix import near_duplicates
from viaticum.routers.query.similar_texts import tf_idf, words_of


def by_all_pairs(texts: list[str], threshold: float) -> list[int]:
    vectors = tf_idf([words_of(text) for text in texts])
    similarity = (vectors @ vectors.T).toarray()
    graph = coo_array(similarity >= threshold)
    return connected_components(graph, directed=False)[1].tolist()


@pytest.mark.parametrize("pairs", [1, 1000, similar_texts.PAIRS])
@pytest.mark.parametrize("seed", range(8))
def test_the_join_finds_what_comparing_all_pairs_finds(
    seed: int, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similar_texts, "PAIRS", pairs)
    monkeypatch.setattr(similar_texts, "BLOCK", max(1, min(pairs // 16, similar_texts.BLOCK)))
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=4)) for _ in range(60)]
    texts = [" ".join(rng.choices(words[: rng.choice((8, 60))], k=rng.randint(1, 12))) for _ in range(40)]
    for text in list(texts):
        changed = [word if rng.random() < 0.85 else rng.choice(words) for word in text.split()]
        texts.append(" ".join(changed) + f" {rng.randint(0, 99)}" * rng.randint(0, 1))
    for threshold in (0.3, 0.6, 0.9):
        assert near_duplicates(texts, threshold).tolist() == by_all_pairs(texts, threshold)


@pytest.mark.parametrize(
    "texts",
    [
        ["怎么申请退款?订单一直没有到", "请问怎么申请退款?订单一直没有到啊", "今天天气怎么样,适合出门吗"],
        ["ขอคืนเงินสำหรับคำสั่งซื้อ", "ขอคืนเงินสำหรับคำสั่งซื้อครับ", "วันนี้อากาศเป็นอย่างไร"],
        ["كيف أطلب استرداد المبلغ", "كيف أطلب استرداد المبلغ من فضلك", "ما هو الطقس اليوم"],
        ["मेरा ऑर्डर कहाँ है", "मेरा ऑर्डर कहाँ है भाई", "मौसम कैसा है"],
        ["🙂🙂", "🙂🙂", "🎉"],
        ["{}[]();", "{}[]();", "a + b"],
    ],
)
def test_near_duplicates_in_every_script(texts: list[str]) -> None:
    assert near_duplicates(texts).tolist() == [0, 0, 1]


def test_many_texts_of_one_template_are_one_group() -> None:
    """Each with each would be a billion pairs."""
    texts = [f"where is my order number {number} please" for number in range(30_000)]
    groups = near_duplicates([*texts, "write a song about the sea"])
    assert groups.tolist() == [0] * len(texts) + [1]


def test_texts_that_are_in_one_group_already_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two million pairs are candidates; the first comparisons join them all."""
    compared, cosines = [], similar_texts._cosines

    def count(vectors: object, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        compared.append(len(first))
        return cosines(vectors, first, second)

    monkeypatch.setattr(similar_texts, "_cosines", count)
    rng = random.Random(0)
    names = ["".join(rng.choices("abcdefgh", k=7)) for _ in range(2_000)]
    groups = near_duplicates([f"{'where is ' * 20} the parcel of {name}" for name in names])
    assert set(groups.tolist()) == {0}
    assert max(compared) <= similar_texts.BLOCK
    assert sum(compared) <= 2 * similar_texts.BLOCK


def test_neighbours_are_the_same_a_few_questions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    rng = np.random.default_rng(0)
    known, asked, values = (
        torch.from_numpy(rng.standard_normal(size)).float() for size in ((50, 8), (40, 8), (50, 3))
    )
    known, asked = (torch.nn.functional.normalize(each, dim=1) for each in (known, asked))
    values[::3, 1] = float("nan")
    head = NeighboursHead(known, values)
    whole = head.mean(*head.nearest(asked, 7))
    monkeypatch.setattr(heads, "CHUNK", 3 * len(known))
    assert torch.allclose(head.mean(*head.nearest(asked, 7)), whole, atol=1e-5)
    assert head.nearest(asked[:0], 7)[1].shape == (0, 7)
