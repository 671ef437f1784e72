"""The prior: figures place models, rows are marked as a prior, outcomes take over, and prices buy nothing."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from viaticum import strategies
from viaticum.errors import DataError, InputError, WeightsError
from viaticum.money import Price
from viaticum.routers.query import Best, Cheapest, Policy, Weighted, choose
from viaticum.routers.query.ability import SPELLINGS, Benchmark, Normal, estimate, log_odds
from viaticum.routers.query.prior import (
    ORIGIN,
    THINKING,
    AbilityPrior,
    PriorModel,
    PriorWeights,
    default_prior,
)
from viaticum.routers.query.question_view import QuestionView
from viaticum.types import Outcome, Pair, Query, RoutingTable, Row

QUERY = Query("Which is heavier, a litre of oil or a litre of water?")
CHEAP, DEAR = Price.per_million("0.1", "0.4"), Price.per_million("3", "15")
USUAL = ("cot", "cod", "direct")


def model(name: str, price: Price = CHEAP, **benchmarks: float) -> PriorModel:
    return PriorModel(
        name, price, benchmarks={key.replace("_", "-"): value for key, value in benchmarks.items()}
    )


def outcomes(name: str, right: int, asked: int, strategy: str = "cot", tokens: int = 50) -> list[Outcome]:
    return [
        Outcome("own", str(n), "q", name, strategy, "a", n < right, 10, tokens, 100) for n in range(asked)
    ]


def rows_of(prior: AbilityPrior, *models: PriorModel, names: tuple[str, ...] = USUAL) -> dict[str, Row]:
    return {str(row.pair): row for row in prior.rows(QUERY, models, names)}


# --- figures ------------------------------------------------------------------------------------------------


def test_higher_figures_expect_more_right_answers() -> None:
    prior = AbilityPrior()
    figures = (0.3, 0.5, 0.64, 0.84)
    shares = [rows_of(prior, model("m", mmlu_pro=figure))["m+cot"].accuracy for figure in figures]
    assert shares == sorted(shares)
    assert shares[-1] - shares[0] > 0.2
    unknown = rows_of(prior, model("m"))["m+cot"]
    assert shares[0] < unknown.accuracy < shares[-1]


def test_several_figures_narrow_the_interval_and_unknown_benchmarks_say_nothing() -> None:
    scale = AbilityPrior().weights.scale
    one, two = scale.ability({"gsm8k": 0.93}), scale.ability({"gsm8k": 0.93, "mmlu-pro": 0.64})
    assert two.sd < one.sd < scale.ability({}).sd
    assert scale.ability({"my-own-exam": 0.99}) == scale.ability({})
    assert scale.ability({"gsm-8k": 0.93}) == one
    for share in (0.0, 1.0):
        assert abs(scale.ability({"gsm8k": share}).mean) < 5


def test_a_figure_is_what_is_expected_on_its_own_benchmark() -> None:
    """The scale is that of the benchmarks: a model placed by one is expected to reach it there."""
    scale = AbilityPrior().weights.scale
    for name, share in itertools.product(("mmlu-pro", "gsm8k", "mmlu"), (0.35, 0.6, 0.8)):
        found = estimate(
            scale, {"m": scale.ability({name: share})}, [Pair("m", "cot")], kind=scale.benchmarks[name]
        )
        assert found.accuracy[0] == pytest.approx(share, abs=0.06)


def test_intervals_are_wide_and_hold_the_accuracy() -> None:
    for row in rows_of(AbilityPrior(), model("a", mmlu_pro=0.6), model("b")).values():
        assert row.accuracy_low is not None
        assert row.accuracy_high is not None
        assert row.accuracy_low < row.accuracy < row.accuracy_high
        assert row.accuracy_high - row.accuracy_low > 0.3
        assert row.origin == ORIGIN


# --- prices -------------------------------------------------------------------------------------------------


def test_a_price_is_not_taken_for_quality() -> None:
    """Without figures the dear model is as good as the cheap one: every policy takes the cheap one."""
    rows = AbilityPrior().rows(QUERY, [model("dear", DEAR), model("cheap")], USUAL)
    by_pair = {str(row.pair): row for row in rows}
    assert by_pair["dear+cot"].accuracy == by_pair["cheap+cot"].accuracy
    policies: tuple[Policy, ...] = (Best(), Cheapest(0.3), Cheapest(0.99), Weighted(1.0))
    for policy in policies:
        route = choose(RoutingTable(tuple(rows)), None, policy)
        assert route.pair.model == "cheap"
        assert route.why.endswith(ORIGIN)


def test_costs_follow_price_question_and_strategy() -> None:
    prior = AbilityPrior()
    rows = rows_of(prior, model("cheap"), model("dear", DEAR))
    for strategy in USUAL:
        cheap, dear = rows[f"cheap+{strategy}"], rows[f"dear+{strategy}"]
        assert dear.cost_p50 > 20 * cheap.cost_p50
        assert cheap.cost_p50 <= cheap.expected_cost <= cheap.cost_p90
        assert cheap.tokens_p50 < cheap.tokens_p90
    assert rows["cheap+direct"].cost_p50 < rows["cheap+cod"].cost_p50 < rows["cheap+cot"].cost_p50
    longer = prior.rows(Query("word " * 4000), [model("cheap")], ["cot"])
    assert longer[0].cost_p50 > 2 * rows["cheap+cot"].cost_p50
    thinking = prior.rows(QUERY, [PriorModel("cheap", CHEAP, thinks=True)], ["cot"])
    assert thinking[0].tokens_p50 == pytest.approx(THINKING * rows["cheap+cot"].tokens_p50, rel=0.02)


def test_all_samples_are_paid_for() -> None:
    rows = rows_of(
        AbilityPrior(), model("m"), names=("cot", "self-consistency:cot:5", "self-consistency:think:2k:3")
    )
    one, five = rows["m+cot"], rows["m+self-consistency:cot:5"]
    assert five.cost_p50 == pytest.approx(5 * one.cost_p50, rel=0.02)
    assert five.tokens_p90 == pytest.approx(5 * one.tokens_p90, rel=0.02)
    thought = rows["m+self-consistency:think:2k:3"]
    assert thought.tokens_p50 == pytest.approx(3 * THINKING * one.tokens_p50, rel=0.02)


def test_a_model_without_a_price_gets_no_row() -> None:
    """It would look free: every policy that weighs prices would take it."""
    rows = AbilityPrior().rows(QUERY, [PriorModel("unpriced", None), model("m")], USUAL)
    assert {row.pair.model for row in rows} == {"m"}


def test_a_strategy_that_no_table_knows_counts_as_the_usual_one_with_a_wider_interval() -> None:
    rows = rows_of(AbilityPrior(), model("m"), names=("cot", "my.module:Mine"))
    usual, own = rows["m+cot"], rows["m+my.module:Mine"]
    assert own.tokens_p50 == usual.tokens_p50
    assert own.accuracy == pytest.approx(usual.accuracy, abs=0.03)
    assert own.accuracy_low is not None
    assert usual.accuracy_low is not None
    assert own.accuracy_low < usual.accuracy_low


def test_the_same_rows_for_the_same_models_and_estimates() -> None:
    prior = default_prior()
    assert prior is default_prior()
    models = (model("a"), model("b", mmlu_pro=0.5))
    first = prior.rows(QUERY, models, USUAL)
    assert (
        prior.rows(Query("Another question of much the same length, is it not so?"), [*models], USUAL)
        is first
    )
    assert [row.pair for row in first] == [Pair(m.name, s) for m in models for s in USUAL]
    changed = prior.rows(QUERY, (model("a"), model("b", mmlu_pro=0.9)), USUAL)
    assert changed[3].accuracy > first[3].accuracy
    assert prior.rows(QUERY, (), USUAL) == prior.rows(QUERY, models, ()) == ()


def test_threads_share_a_prior_whose_cache_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("viaticum.routers.query.prior.CACHE_SIZE", 2)
    prior = AbilityPrior()
    models = [model(f"m{n}") for n in range(6)]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda n: prior.rows(QUERY, [models[n % 6]], USUAL)[0].pair.model, range(600))
        assert list(found) == [f"m{n % 6}" for n in range(600)]


# --- outcomes -----------------------------------------------------------------------------------------------


def test_it_yields_to_outcomes_by_their_number() -> None:
    figures = model("m", mmlu_pro=0.8)
    before = rows_of(AbilityPrior(), figures)["m+cot"]
    distances = [before.accuracy - 0.2]
    for asked in (5, 20, 100, 1000):
        row = rows_of(AbilityPrior(outcomes=outcomes("m", asked // 5, asked)), figures)["m+cot"]
        distances.append(row.accuracy - 0.2)
        assert row.origin == f"prior and {asked} outcomes of this model"
    assert distances == sorted(distances, reverse=True)
    assert abs(distances[-1]) < 0.02
    assert distances[1] < 0.6 * distances[0]


def test_outcomes_of_one_model_say_what_kind_of_questions_they_are() -> None:
    """Hard questions for one model are hard for the others, which keep their order."""
    models = (model("asked", mmlu_pro=0.7), model("better", mmlu_pro=0.8), model("worse", mmlu_pro=0.4))
    before = rows_of(AbilityPrior(), *models)
    after = rows_of(AbilityPrior().with_outcomes(outcomes("asked", 4, 40)), *models)
    for name in ("better", "worse"):
        assert after[f"{name}+cot"].accuracy < before[f"{name}+cot"].accuracy
        assert after[f"{name}+cot"].origin == ORIGIN
    assert after["better+cot"].accuracy > after["asked+cot"].accuracy > after["worse+cot"].accuracy


def test_outcomes_of_models_that_are_not_asked_about_count_too() -> None:
    known = AbilityPrior(outcomes=outcomes("another", 38, 40))
    assert (
        rows_of(known, model("m"))["m+cot"].accuracy > rows_of(AbilityPrior(), model("m"))["m+cot"].accuracy
    )


def test_lengths_of_own_answers_take_over() -> None:
    usual = rows_of(AbilityPrior(), model("m"))["m+cot"].tokens_p50
    for asked, near in ((5, 1.5), (200, 1.05)):
        row = rows_of(AbilityPrior(outcomes=outcomes("m", 3, asked, tokens=10 * usual)), model("m"))["m+cot"]
        assert 10 * usual / near**4 < row.tokens_p50 <= 10 * usual


def test_many_outcomes_of_many_pairs_stay_finite() -> None:
    rng = random.Random(0)
    names = [f"m{n}" for n in range(12)]
    rows = [
        row
        for name, strategy in itertools.product(names, ("cot", "pot", "direct"))
        for row in outcomes(name, rng.choice((0, 500)), 500, strategy)
    ]
    found = rows_of(AbilityPrior(outcomes=rows), *map(model, names), names=("cot", "pot", "direct"))
    for row in found.values():
        assert row.accuracy_low is not None
        assert row.accuracy_high is not None
        assert 0 <= row.accuracy_low <= row.accuracy <= row.accuracy_high <= 1


# --- the file -----------------------------------------------------------------------------------------------


def test_the_packaged_weights_are_small_and_state_their_origin_and_licence() -> None:
    file = resources.files("viaticum.routers.query") / "prior.json"
    text = file.read_text(encoding="utf-8")
    assert len(text) < 200_000
    assert "Licence: Apache-2.0" in text
    assert "Faithful-CoT (MIT)" in text
    weights = PriorWeights.load()
    graded = {name for name in strategies.names() if strategies.get(name).graded} - {"think"}
    assert graded <= set(weights.lengths) & set(weights.scale.gains)
    assert weights.scale.benchmarks["mmlu-pro"].offset == 0
    assert all(each.slope > 0 for each in weights.scale.benchmarks.values())


def test_weights_are_read_back_as_written(tmp_path: Path) -> None:
    import json

    path = tmp_path / "prior.json"
    path.write_text(json.dumps(PriorWeights.load().document()))
    assert PriorWeights.load(path) == PriorWeights.load()
    with pytest.raises(InputError, match="cannot read the prior"):
        PriorWeights.load(tmp_path / "none.json")
    for text in ("", "[]", "{}", '{"abilities": {"mean": 1}}'):
        path.write_text(text)
        with pytest.raises(DataError, match="is not a prior"):
            PriorWeights.load(path)


def test_the_page_names_the_benchmarks_that_are_known() -> None:
    page = (Path(__file__).parents[3] / "docs/reference/benchmark-figures.md").read_text(encoding="utf-8")
    known = page.partition("Known: ")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([a-z0-9-]+)`", known))
    assert named == set(PriorWeights.load().scale.benchmarks) | SPELLINGS.keys()


def test_log_odds_of_extreme_figures_are_bounded() -> None:
    assert log_odds(0.0) == pytest.approx(-log_odds(1.0))
    assert Normal(0.0, 1.0) != Benchmark(0.0, 1.0, 1.0)


# --- single questions ---------------------------------------------------------------------------------------


def question_with_options(count: int) -> Query:
    lines = [f"{chr(65 + n)}. option {n}" for n in range(count)]
    return Query("\n".join(["Which one is right?", "Options:", *lines]))


def embedding_of(view: QuestionView, towards: float) -> np.ndarray[Any, Any]:
    """A learned centre, moved a little along (or against) the weights: near, and easy (or hard)."""
    moved = view.centres[0] + towards * 0.2 * view.weights / np.linalg.norm(view.weights)
    return np.asarray(moved / np.linalg.norm(moved))


def test_near_what_was_learned_a_question_has_a_view_of_its_own() -> None:
    packaged = QuestionView()
    shares = {}
    for name, towards in (("easy", 1.0), ("hard", -1.0)):
        view = QuestionView(lambda texts, towards=towards: [embedding_of(packaged, towards)])
        prior = AbilityPrior(view=view)
        rows = {str(row.pair): row for row in prior.rows(question_with_options(10), [model("m")], USUAL)}
        shares[name] = rows["m+cot"].accuracy
        usual = rows_of(AbilityPrior(), model("m"))
        assert rows["m+cot"].average == usual["m+cot"].accuracy
        assert rows["m+cot"].cost_p50 == prior.rows(question_with_options(5), [model("m")], USUAL)[0].cost_p50
    assert shares["easy"] > shares["hard"] + 0.02


def test_elsewhere_there_is_none() -> None:
    packaged = QuestionView()
    asked: list[str] = []

    def encode(texts: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        asked.extend(texts)
        return [-packaged.centres.sum(0) / np.linalg.norm(packaged.centres.sum(0))]

    prior = AbilityPrior(view=QuestionView(encode))
    for query in (QUERY, question_with_options(5)):
        assert all(row.average is None for row in prior.rows(query, [model("m")], USUAL))
    assert asked == []  # neither the encoder nor torch is loaded for other kinds of questions
    far = prior.rows(question_with_options(10), [model("m")], USUAL)
    assert len(asked) == 1
    assert all(row.average is None for row in far)


def test_outcomes_say_more_than_the_wording() -> None:
    view = QuestionView(lambda texts: [embedding_of(QuestionView(), 1.0)])
    prior = AbilityPrior(view=view).with_outcomes(outcomes("m", 3, 10))
    assert all(row.average is None for row in prior.rows(question_with_options(10), [model("m")], USUAL))


def test_without_an_encoder_all_questions_are_alike(caplog: pytest.LogCaptureFixture) -> None:
    def encode(texts: Sequence[str]) -> Any:
        raise WeightsError("the weights are not here")

    prior = AbilityPrior(view=QuestionView(encode))
    with caplog.at_level("INFO"):
        for _ in range(3):
            rows = prior.rows(question_with_options(10), [model("m")], USUAL)
    assert all(row.average is None for row in rows)
    assert caplog.text.count("takes all questions as alike") == 1


def test_an_encoder_of_other_embeddings_has_no_view(caplog: pytest.LogCaptureFixture) -> None:
    prior = AbilityPrior(view=QuestionView(lambda texts: np.ones((len(texts), 768)) / 768**0.5))
    with caplog.at_level("INFO"):
        assert prior.rows(question_with_options(10), [model("m")], USUAL)[0].average is None
    assert "768 numbers" in caplog.text


@pytest.mark.parametrize("towards", [-1.0, 1.0])
def test_a_view_never_buys_dearer_than_the_averages_whatever_the_policy(towards: float) -> None:
    packaged, rng = QuestionView(), random.Random(1)
    view = QuestionView(lambda texts: [embedding_of(packaged, towards)])
    plain, viewed = AbilityPrior(), AbilityPrior(view=view)
    question = question_with_options(10)
    for _ in range(20):
        models = [
            PriorModel(f"m{n}", Price.per_million(price, 4 * price), "", {"mmlu-pro": rng.uniform(0.2, 0.9)})
            for n, price in enumerate((0.1, 0.5, 2.0, 10.0))
        ]
        for policy in (Best(), Weighted(rng.uniform(1, 500)), Cheapest(rng.uniform(0.3, 0.95))):
            routes = [
                choose(RoutingTable(tuple(prior.rows(question, models, USUAL))), None, policy)
                for prior in (plain, viewed)
            ]
            assert routes[1].row.expected_cost <= routes[0].row.expected_cost
