"""Sampling: the effect of temperature, top-k and top-p, repeatable seeds, and sampled frequencies."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from viaticum.decoders import Sampling
from viaticum.decoders import sampling as module
from viaticum.decoders.sampling import PROPOSE, REDRAW, distributions, sample, sample_index, uniform
from viaticum.errors import InputError

LOGITS = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()


def probabilities(**values: float) -> list[float]:
    got: list[float] = distributions(LOGITS[None], [Sampling(**values)])[0].tolist()  # type: ignore[arg-type]
    return got


def test_greedy_is_one_hot_and_takes_the_first_of_equals() -> None:
    assert probabilities() == [1, 0, 0, 0]
    tokens, drawn_from = sample(torch.tensor([[1.0, 3.0, 3.0]]), [Sampling()], [0.9])
    assert (tokens.tolist(), drawn_from) == ([1], {})


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


def test_min_p_keeps_what_is_probable_enough() -> None:
    assert probabilities(temperature=1, min_p=0.4) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    assert probabilities(temperature=1, min_p=1) == pytest.approx([1, 0, 0, 0])
    with pytest.raises(InputError, match=r"1\.5"):
        Sampling(min_p=1.5)


def test_all_limits_together_are_those_of_transformers() -> None:
    rng = random.Random(9)
    logits = torch.randn(40, 60, generator=torch.Generator().manual_seed(2)) * 2
    samplings = [
        Sampling(
            rng.choice([0.3, 0.6, 1, 2]),
            rng.choice([0.5, 0.95, 1]),
            rng.choice([0, 5, 20]),
            min_p=rng.choice([0, 0.01, 0.1, 0.5]),
        )
        for _ in range(40)
    ]
    together = distributions(logits, samplings)
    for row, each in enumerate(samplings):
        scores = TemperatureLogitsWarper(float(each.temperature))(None, logits[row : row + 1])
        if each.top_k:
            scores = TopKLogitsWarper(each.top_k)(None, scores)
        if each.top_p < 1:
            scores = TopPLogitsWarper(each.top_p)(None, scores)
        if each.min_p:
            scores = MinPLogitsWarper(each.min_p)(None, scores)
        assert torch.allclose(together[row], scores.softmax(-1)[0], atol=1e-6)
        assert torch.allclose(distributions(logits[row : row + 1], [each])[0], together[row], atol=1e-6)


def test_top_p_with_tokens_out_of_order() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    got = distributions(logits, [Sampling(temperature=1, top_p=0.5)])
    assert got[0].tolist() == pytest.approx([0, 4 / 7, 0, 3 / 7])


@pytest.mark.parametrize("nucleus", [1, 5, 512])
@pytest.mark.parametrize("floor", ["_floor_by_order", "_floor_by_counting"])
def test_rows_of_many_kinds_equal_each_row_alone(
    nucleus: int, floor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each row alone equals the definition, computed one token at a time."""
    monkeypatch.setattr(module, "NUCLEUS", nucleus)
    monkeypatch.setattr(module, "_floor_by_order", getattr(module, floor))
    rng = random.Random(4)
    samplings = [
        Sampling(rng.choice([0, 0.3, 1, 2]), rng.choice([0.1, 0.6, 0.95, 1]), rng.choice([0, 1, 7, 99]))
        for _ in range(60)
    ]
    logits = torch.randn(60, 50, generator=torch.Generator().manual_seed(1)) * 2
    together = distributions(logits, samplings)
    for row, sampling in enumerate(samplings):
        expected = torch.zeros(50, dtype=torch.float64)
        order = logits[row].argsort(descending=True).tolist()
        if sampling.temperature == 0:
            expected[order[0]] = 1
        else:
            weights = (logits[row].double() / sampling.temperature).softmax(-1)
            order = order[: sampling.top_k or None]
            total, covered = sum(float(weights[token]) for token in order), 0.0
            for token in order:
                expected[token] = weights[token]
                covered += float(weights[token]) / total
                if covered >= sampling.top_p:
                    break
            expected /= expected.sum()
        torch.testing.assert_close(together[row].double(), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together[row], distributions(logits[row : row + 1], [sampling])[0])


def test_draw_follows_the_distribution_and_the_number_alone() -> None:
    sampling = Sampling(temperature=1, top_k=3)
    numbers = [uniform(1, position, PROPOSE) for position in range(2000)]
    tokens, drawn_from = sample(LOGITS.expand(2000, 4), [sampling] * 2000, numbers)
    shares = [tokens.tolist().count(token) / 2000 for token in range(4)]
    assert shares == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0], abs=0.04)
    assert shares[3] == 0
    assert len(drawn_from) == 2000
    mixed = [Sampling(), sampling, Sampling(), sampling]
    tokens_of_four, drawn_from = sample(LOGITS.expand(4, 4), mixed, [0.99, numbers[1], 0.99, numbers[3]])
    assert tokens_of_four.tolist() == [0, tokens[1], 0, tokens[3]]
    assert sorted(drawn_from) == [1, 3]


def test_pick_never_takes_what_has_no_weight() -> None:
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]) * 1.7  # any sum
    numbers = [0.0, 0.2999, 0.3001, 1 - 2**-24]
    assert sample_index(weights.expand(4, 5), numbers).tolist() == [1, 1, 3, 3]
    assert sample_index(torch.tensor([[0.1] * 3 + [0.0]]), [1.0]).item() < 3, "rounded up to the sum"


def test_numbers_differ_by_seed_place_and_use_and_are_even() -> None:
    numbers = [
        uniform(seed, position, use)
        for seed in range(20)
        for position in range(100)
        for use in (PROPOSE, REDRAW)
    ]
    assert len(set(numbers)) > len(numbers) - 5  # of 2^24: once in two such lists two are equal
    assert all(0 <= number < 1 for number in numbers)
    counts = torch.histc(torch.tensor(numbers), 20, 0, 1)
    assert float(((counts - 200) ** 2 / 200).sum()) < 51  # chi-square, 19 degrees: once in 10,000
    pairs = torch.tensor([numbers[:-1], numbers[1:]])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 4 / len(numbers) ** 0.5
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)
    assert uniform(10**30, 3, 1) == uniform(10**30, 3, 1)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_k": -1},
    ],
)
def test_values_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Sampling(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("floor", ["_floor_by_order", "_floor_by_counting"])
def test_a_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(
    spread: float, floor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From nearly all tokens, many of them alike, down to one; a row of NaN leaves the others alone."""
    monkeypatch.setattr(module, "_floor_by_order", getattr(module, floor))
    logits = spread * torch.randn(5, 20_000, generator=torch.Generator().manual_seed(3)).round(decimals=1)
    logits[3] = float("nan")
    shares = [1e-14, 0.5, 0.95, 0.9, 1 - 1e-9]
    got = distributions(logits, [Sampling(1.0, share) for share in shares])
    whole = torch.softmax(logits.double(), -1)
    for row in (0, 1, 2, 4):
        kept = got[row] > 0
        least = whole[row][kept].min()
        assert whole[row][kept].sum() > shares[row] - 1e-5, "together they reach the share"
        assert whole[row][whole[row] > least * (1 + 1e-4)].sum() < shares[row] + 1e-5, "none is too many"
        assert kept[whole[row] > least * (1 + 1e-4)].all()
        assert float(got[row].sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.7, 0.9, 20, min_p=0.02),
        Sampling(1.0, 0.95),
    ],
)
def test_a_draw_reads_nothing_from_its_device(sampling: Sampling) -> None:
    """A tensor without numbers has none to read: any wait for the device would be an error."""
    logits = torch.empty(3, 1000, device="meta")
    tokens, drawn_from = sample(logits, [sampling] * 3, [0.1, 0.5, 0.9])
    assert tokens.shape == (3,)
    assert len(drawn_from) == 3 * (sampling.temperature > 0)


@pytest.mark.parametrize("temperature", [1e-39, 1e-12, 9e-7])
def test_temperatures_next_to_zero_are_greedy(temperature: float) -> None:
    sampling = Sampling(temperature)
    assert sampling == Sampling(0.0)
    logits = torch.tensor([[1.0, 30.0, 2.0]])
    assert sample(logits, [sampling], [0.5])[0].tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-6, 1e5, 1e39, 1e308])
def test_probabilities_are_finite_at_any_temperature(temperature: float) -> None:
    """Also where a token is banned, and with more tokens to keep than there are."""
    logits = torch.tensor([[40.0, -40.0, float("-inf"), 3.0]])
    found = distributions(logits, [Sampling(temperature, top_k=10**9)])
    assert bool(torch.isfinite(found).all())
    assert float(found.sum()) == pytest.approx(1)
    assert float(found[0, 2]) == 0
