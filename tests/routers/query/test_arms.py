"""Arms on the curve of their model: levels read from names, predictions for an arm that nobody profiled."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_arms import ARMS, RIGHT, five_budgets
from synthetic_outcomes import Words, a_question

from viaticum.routers.query.arms import BANDWIDTHS, arms_of, curve_weights, smoother
from viaticum.routers.query.fit import fit
from viaticum.routers.query.learn import add
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.routers.query.parameters import RTRSettings
from viaticum.routers.query.rtr import RTRRouter
from viaticum.types import Pair

pytestmark = pytest.mark.usefixtures("one_thread")
PRICE = (0.0, 1.0)  # dollars a million tokens, as in the table


def pairs(*names: str) -> list[Pair]:
    return [Pair.parse(name) for name in names]


def weights_of(new: str, *known: str) -> tuple[list[float], list[float]] | None:
    found = curve_weights(Pair.parse(new), pairs(*known))
    return None if found is None else (found[0].tolist(), found[1].tolist())


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        ("m+think:0", "m+think:512"),
        ("m+think:512", "m+think:2k"),
        ("m+cot", "m+self-consistency:cot:3"),
        ("m+self-consistency:cot:3", "m+self-consistency:cot:9"),
        ("gpt-low+cot", "gpt-high+cot"),
        ("gpt:minimal+cot", "gpt:medium+cot"),
    ],
)
def test_levels_are_read_from_names(lower: str, higher: str) -> None:
    low, high = ({arm.curve: arm.level for arm in arms_of(Pair.parse(each))} for each in (lower, higher))
    common = set(low) & set(high)
    assert any(low[curve] < high[curve] for curve in common)


@pytest.mark.parametrize(
    "known",
    [
        ("m+think:512",),  # one arm is no curve
        ("other+think:0", "other+think:512"),
        ("m+cot", "m+direct"),
        ("m+self-consistency:cot:3", "m+self-consistency:direct:3"),
    ],
)
def test_what_is_no_curve_is_left_to_descriptions(known: tuple[str, ...]) -> None:
    assert weights_of("m+think:2k", *known) is None


def test_between_arms_weights_are_by_distance_and_beyond_them_accuracy_does_not_rise() -> None:
    known = ("m+self-consistency:cot:2", "m+direct", "m+self-consistency:cot:8")
    between = weights_of("m+self-consistency:cot:4", *known)
    assert between is not None
    assert between[0] == pytest.approx([0.5, 0.0, 0.5])
    assert between[1] == between[0]
    above = weights_of("m+self-consistency:cot:16", *known)
    assert above is not None
    assert above[0] == pytest.approx([0.0, 0.0, 1.0]), "more is rarely worse, and not known to be better"
    assert above[1] == pytest.approx([-0.5, 0.0, 1.5])
    below = weights_of("m+cot", *known)
    assert below is not None
    assert below[0] == pytest.approx([1.5, 0.0, -0.5])
    far = weights_of("m+self-consistency:cot:99999", *known)
    assert far is not None
    assert far[1] == pytest.approx([-1.0, 0.0, 2.0]), "a curve does not go on for ever"
    for each in (between, above, below, far):
        assert [sum(weights) for weights in each] == pytest.approx([1.0, 1.0])


def test_efforts_are_arms_of_a_model_of_another_name() -> None:
    found = weights_of("gpt-medium+cot", "gpt-low+cot", "gpt-high+cot", "gpt-high+direct")
    assert found is not None
    assert found[0] == pytest.approx([0.5, 0.5, 0.0])


@pytest.fixture(scope="module")
def without() -> RTRRouter:
    """Fitted on all budgets but think:2k."""
    rows = [row for row in five_budgets(360) if row.strategy != "think:2k"]
    return fit(OutcomeMatrix.from_outcomes(rows), Words(), settings=RTRSettings(plans=False))  # type: ignore[arg-type]


def test_an_arm_that_nobody_profiled_begins_on_the_curve(without: RTRRouter) -> None:
    new = Pair("m", "think:2k")
    router, rng = add(without, new, {}, PRICE), np.random.default_rng(3)
    column = router.pair_columns[router.pairs.index(new)]
    number = list(ARMS).index("think:2k")
    for kind, right in RIGHT.items():
        prediction = router.predict_texts([a_question(kind, rng) for _ in range(60)])
        assert float(prediction.accuracy[:, column].mean()) == pytest.approx(right[number], abs=0.13)
        tokens = prediction.tokens[:, router.pairs.index(new), 0]
        assert float(tokens.median()) == pytest.approx(ARMS["think:2k"], rel=0.35)
        assert float(prediction.cost[:, column].mean()) == pytest.approx(1e-6 * 1500, rel=0.45)


def test_an_arm_beyond_the_known_ones_is_dearer_and_no_better(without: RTRRouter) -> None:
    new = Pair("m", "think:128k")
    router, rng = add(without, new, {}, PRICE), np.random.default_rng(4)
    column = router.pair_columns[router.pairs.index(new)]
    last = router.pairs.index(Pair("m", "think:32k"))
    prediction = router.predict_texts([a_question("kin", rng) for _ in range(40)])
    assert np.allclose(prediction.accuracy[:, column], prediction.accuracy[:, last], atol=2e-3)
    ratio = (prediction.tokens[:, -1, 0] / prediction.tokens[:, last, 0]).log().mean()
    assert float(ratio) == pytest.approx(math.log(4), abs=0.5)


def test_outcomes_correct_where_an_arm_lies(without: RTRRouter) -> None:
    """An arm that is not on the curve: as if think:2k were as good and as long as think:32k."""
    new = Pair("m", "think:2k")
    rows = [
        replace(row, strategy=new.strategy)
        for row in five_budgets(300, seed=9)
        if row.strategy == "think:32k"
    ]
    seen = OutcomeMatrix.from_outcomes(rows, pairs=[new])
    texts = [a_question("kin", np.random.default_rng(seed)) for seed in range(60)]
    before, after = (add(without, new, {}, PRICE, each) for each in (None, seen))
    column, number = before.pair_columns[-1], len(before.pairs) - 1
    accuracy = [float(each.predict_texts(texts).accuracy[:, column].mean()) for each in (before, after)]
    assert accuracy[1] > accuracy[0] + 0.2
    assert accuracy[1] == pytest.approx(0.92, abs=0.12)
    tokens = [float(each.predict_texts(texts).tokens[:, number, 0].median()) for each in (before, after)]
    assert tokens[1] == pytest.approx(24_000, rel=0.3)
    assert tokens[1] > 8 * tokens[0]


@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
def test_a_smoother_leaves_lines_and_other_columns_as_they_are(bandwidth: float) -> None:
    known = pairs("m+think:0", "m+direct", "m+think:512", "m+think:2k", "m+think:8k", "n+think:512")
    weights = smoother(known, 8, bandwidth)
    assert weights is not None
    levels = np.array(
        [next((arm.level for arm in arms_of(each) if arm.curve == ("m", "think")), 5.0) for each in known]
    )
    line = torch.tensor([*(2 - 0.7 * levels), 1.0, -1.0], dtype=torch.float32)
    assert torch.allclose(weights @ line, line, atol=1e-4)
    for number in (1, 5, 6, 7):
        assert torch.equal(weights[number], torch.eye(8)[number])
    arms = [0, 2, 3, 4]
    noise = weights[arms][:, arms].square().sum(1)
    assert bool((noise <= 1.0 + 1e-6).all()), "an arm has no more noise than alone"
    assert smoother(pairs("m+think:0", "m+think:512", "m+cot"), 3, bandwidth) is None


def log_loss_of(router: RTRRouter, seed: int) -> float:
    """Against the true rates, on questions that it has not seen."""
    rng, losses = np.random.default_rng(seed), []
    for kind, rights in RIGHT.items():
        predicted = router.predict_texts([a_question(kind, rng) for _ in range(50)]).accuracy[:, : len(ARMS)]
        truth = torch.tensor(rights)
        chance = predicted[:, [router.pairs.index(Pair("m", arm)) for arm in ARMS]].clamp(0.001, 0.999)
        losses.append(-(truth * chance.log() + (1 - truth) * (1 - chance).log()).mean())
    return float(torch.stack(losses).mean())


def test_arms_of_small_tables_share_what_is_predicted_of_a_question(tmp_path: Path) -> None:
    words: object = Words()
    gains = []
    for seed in range(3):
        matrix = OutcomeMatrix.from_outcomes(five_budgets(60, seed))
        with_, alone = (
            fit(matrix, words, settings=RTRSettings(plans=False, arms=arms, seed=seed))  # type: ignore[arg-type]
            for arms in (True, False)
        )
        assert alone.parameters.sharing is None
        gains.append(log_loss_of(alone, 50 + seed) - log_loss_of(with_, 50 + seed))
        if with_.parameters.sharing is not None:
            with_.save(tmp_path / str(seed))
            loaded = RTRRouter.load(tmp_path / str(seed), words)  # type: ignore[arg-type]
            assert loaded.parameters.sharing is not None
            assert log_loss_of(loaded, 9) == pytest.approx(log_loss_of(with_, 9), abs=1e-3)
    assert np.mean(gains) > 0, gains
    assert min(gains) > -0.02, gains
