"""Token routers: entropy, R-Stitch's threshold, and the fixed and replayed ones."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from viaticum.errors import InputError
from viaticum.routers.token import (
    AlwaysLarge,
    AlwaysSmall,
    DivergenceRouter,
    EntropyRouter,
    RandomRouter,
    ReplayRouter,
    Step,
    entropy,
)


def a_step(
    entropies: list[float], requests: list[int] | None = None, positions: list[int] | None = None
) -> Step:
    rows = len(entropies)
    return Step(
        logits=torch.zeros(rows, 4),
        entropy=torch.tensor(entropies),
        requests=requests or list(range(rows)),
        positions=positions or [0] * rows,
        tokens=torch.zeros(rows, dtype=torch.int64),
    )


@pytest.mark.parametrize("size", [2, 97, 150_000])
def test_entropy_of_uniform_and_one_hot(size: int) -> None:
    assert entropy(torch.full((1, size), 3.0)).item() == pytest.approx(1, abs=1e-5)
    one_hot = torch.full((2, size), -1e4)
    one_hot[0, 1] = one_hot[1, 0] = 1e4
    assert entropy(one_hot).tolist() == [0, 0]
    masked = torch.full((1, size), float("-inf"))
    masked[0, 0] = 0
    assert entropy(masked).item() == 0


def test_entropy_of_a_known_distribution() -> None:
    p = [0.5, 0.25, 0.125, 0.125]
    expected = -sum(x * math.log(x) for x in p) / math.log(4)
    assert entropy(torch.tensor([p]).log()).item() == pytest.approx(expected)


@pytest.mark.parametrize("scale", [0, 0.01, 1, 10, 1000])
def test_entropy_is_between_0_and_1(scale: float) -> None:
    torch.manual_seed(0)
    got = entropy(torch.randn(200, 97) * scale)
    assert got.dtype == torch.float32
    assert got.shape == (200,)
    assert float(got.min()) >= 0
    assert float(got.max()) <= 1 + 1e-5


def test_the_threshold_works_both_ways_and_includes_tau() -> None:
    router = EntropyRouter(0.25)
    step = a_step([0.0, 0.25, 0.26, 1.0])
    assert router.starts_small
    assert router.keep_small(step).tolist() == [True, True, False, False]
    assert router.hand_back(step).tolist() == [True, True, False, False]


@pytest.mark.parametrize("tau", [-0.01, 1.01, float("nan"), float("inf")])
def test_tau_out_of_range(tau: float) -> None:
    with pytest.raises(InputError, match="tau"):
        EntropyRouter(tau)


def test_fixed_routers() -> None:
    step = a_step([0.0, 1.0])
    assert AlwaysSmall().starts_small
    assert AlwaysSmall().keep_small(step).tolist() == [True, True]
    assert AlwaysSmall().hand_back(step).tolist() == [True, True]
    assert not AlwaysLarge().starts_small
    assert AlwaysLarge().keep_small(step).tolist() == [False, False]
    assert AlwaysLarge().hand_back(step).tolist() == [False, False]


def test_replay_looks_at_this_token_or_the_next() -> None:
    router = ReplayRouter([[True, False, True], [False]])
    step = a_step([0.0] * 4, requests=[0, 0, 1, 1], positions=[0, 1, 0, 7])
    assert router.keep_small(step).tolist() == [False, True, True, True]
    assert router.hand_back(step).tolist() == [True, False, True, True]


def test_chance_takes_its_share_and_decides_a_place_once() -> None:
    count = 4000
    step = a_step(
        [0.5] * count, requests=[position % 8 for position in range(count)], positions=list(range(count))
    )
    kept = RandomRouter(0.3).keep_small(step)
    assert 1 - kept.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert RandomRouter(0.3).keep_small(step).equal(kept)
    assert not RandomRouter(0.3, seed=1).keep_small(step).equal(kept)
    assert bool(RandomRouter(0.3).hand_back(step).all())
    with pytest.raises(InputError, match=r"1\.1"):
        RandomRouter(1.1)


class Sevens(DivergenceRouter):
    """Score: the token's sevenths."""

    def score(self, step: Step) -> torch.Tensor:
        return step.tokens / 7


def test_divergence_drops_what_scores_above_the_threshold_and_always_hands_back() -> None:
    router = Sevens(3 / 7)
    step = replace(a_step([0.1, 0.9, 0.5]), tokens=torch.tensor([2, 3, 4]))
    assert router.keep_small(step).tolist() == [True, True, False]
    assert router.keep_small(replace(step, scores=torch.tensor([1.0, 0.0, float("nan")]))).tolist() == [
        False,
        True,
        False,
    ], "what was scored is not scored again; what is no number is not trusted"
    assert router.hand_back(step).tolist() == [True] * 3
    assert (router.needs_hidden, router.multi_token_handoff, router.depends_on_token) == (True, False, True)
    assert EntropyRouter().score(step) is None


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_out_of_range(threshold: float) -> None:
    with pytest.raises(InputError, match="threshold"):
        Sevens(threshold)


def test_the_largest_logits_are_sorted() -> None:
    step = replace(a_step([0.0]), logits=torch.tensor([[3.0, 9.0, 1.0, 5.0]]))
    assert step.top_logits(3).tolist() == [[9, 5, 3]]
    assert step.top_logits().tolist() == [[9, 5, 3, 1]]
