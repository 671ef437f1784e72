"""The controller that keeps the large model's share at its target, on synthetic streams of scores."""

from __future__ import annotations

import pytest
import torch

from viaticum.errors import InputError
from viaticum.routers.token.drift import ShareController


def stream(shifts: list[float], each: int, rows: int, seed: int = 0) -> list[torch.Tensor]:
    """Scores of `each` steps with so many rows at every shift of their log-odds."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.sigmoid(torch.randn(rows, generator=generator) + shift) for shift in shifts for _ in range(each)
    ]


def share(kept: list[torch.Tensor]) -> float:
    return 1 - float(torch.cat(kept).float().mean())


@pytest.mark.parametrize(
    ("rows", "shift", "target"), [(1, 2.0, 0.3), (16, 2.0, 0.1), (8, -1.5, 0.3), (16, -1.5, 0.7)]
)
def test_the_share_comes_back_when_prompts_change(rows: int, shift: float, target: float) -> None:
    each = 6000 // rows
    steps = stream([0.0, shift], each, rows)
    threshold = float(torch.cat(steps[:each]).quantile(1 - target))
    plain = [scores <= threshold for scores in steps]
    assert share(plain[:each]) == pytest.approx(target, abs=0.02)
    assert abs(share(plain[each:]) - target) > 0.08, "else there is no drift to correct"
    controller = ShareController(target)
    kept = [controller.keep(scores, threshold) for scores in steps]
    assert share(kept[:each]) == pytest.approx(target, abs=0.02)
    assert share(kept[-each // 2 :]) == pytest.approx(target, abs=0.02)
    assert controller.offset == pytest.approx(shift, abs=0.4)


def test_the_same_stream_gives_the_same_decisions() -> None:
    steps = stream([0.0, 1.0], 200, 3)
    first, second = ShareController(0.2), ShareController(0.2)
    ours = [first.keep(scores, 0.5) for scores in steps]
    theirs = [second.keep(scores, 0.5) for scores in steps]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    first.reset()
    again = [first.keep(scores, 0.5) for scores in steps]
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_it_is_bounded_and_comes_back_from_the_bound() -> None:
    controller = ShareController(0.2, gain=0.1, bound=1.5)
    for _ in range(500):
        controller.keep(torch.tensor([0.9999]), 0.5)
    assert controller.offset == 1.5
    for _ in range(500):
        controller.keep(torch.tensor([0.0001, 0.0]), 0.5)
    assert controller.offset == -1.5
    steps = stream([0.0], 2000, 4)
    kept = [controller.keep(scores, 0.5) for scores in steps]
    assert share(kept[1000:]) == pytest.approx(0.2, abs=0.03)


def test_scores_at_the_ends_and_no_numbers() -> None:
    controller = ShareController(0.5)
    assert controller.keep(torch.tensor([0.0, 1.0, float("nan")]), 0.5).tolist() == [True, False, False]
    assert controller.keep(torch.tensor([0.0, 1.0]), 0.0).tolist() == [True, False]
    assert controller.keep(torch.tensor([0.0, 0.9]), 1.0).tolist() == [True, True]


@pytest.mark.parametrize(
    "values", [{"target": 0.0}, {"target": 1.0}, {"target": 0.5, "gain": 0.0}, {"target": 0.5, "bound": 0.0}]
)
def test_values_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"between 0 and 1|gain"):
        ShareController(**values)
