"""Sampling: what temperature, top-k and top-p leave, and that a seed repeats."""

from __future__ import annotations

import pytest
import torch

from viaticum.decoders import Sampling
from viaticum.decoders.sampling import distribution, draw
from viaticum.errors import InputError

LOGITS = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()


def probabilities(**values: float) -> list[float]:
    return distribution(LOGITS, Sampling(**values)).tolist()  # type: ignore[arg-type]


def test_greedy_is_one_hot_and_takes_the_first_of_equals() -> None:
    assert probabilities() == [1, 0, 0, 0]
    assert draw(torch.tensor([[1.0, 3.0, 3.0]]), [Sampling()], [torch.Generator()]) == [1]


def test_temperature() -> None:
    assert probabilities(temperature=1) == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert probabilities(temperature=0.5) == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30])
    assert probabilities(temperature=1e6) == pytest.approx([0.25] * 4, abs=1e-5)


def test_top_k() -> None:
    assert probabilities(temperature=1, top_k=1) == pytest.approx([1, 0, 0, 0])
    assert probabilities(temperature=1, top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert probabilities(temperature=1, top_k=99) == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    assert probabilities(temperature=1, top_p=0.01) == pytest.approx([1, 0, 0, 0])
    assert probabilities(temperature=1, top_p=0.5) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert probabilities(temperature=1, top_p=0.8) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])


def test_top_k_comes_before_top_p() -> None:
    assert probabilities(temperature=1, top_k=2, top_p=0.55) == pytest.approx([1, 0, 0, 0])


def test_top_p_with_tokens_out_of_order() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    got = distribution(logits, Sampling(temperature=1, top_p=0.5))
    assert got.tolist() == pytest.approx([0, 4 / 7, 0, 3 / 7])


def test_draw_follows_the_distribution_and_the_seed() -> None:
    sampling = Sampling(temperature=1, top_k=3)

    def drawn(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [draw(LOGITS[None], [sampling], [generator])[0] for _ in range(2000)]

    first = drawn(1)
    assert first == drawn(1)
    assert first != drawn(2)
    shares = [first.count(token) / 2000 for token in range(4)]
    assert shares == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0], abs=0.04)
    assert shares[3] == 0


def test_a_greedy_row_uses_no_randomness() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    draw(LOGITS[None], [Sampling()], [generator])
    assert torch.equal(before, generator.get_state())


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}],
)
def test_values_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Sampling(**values)  # type: ignore[arg-type]
