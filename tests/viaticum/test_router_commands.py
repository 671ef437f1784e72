"""`viaticum router ...`: what each command prints, and that stdout is clean JSON when asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_outcomes import PAIRS, outcomes
from typer.testing import CliRunner

from viaticum.cli import app
from viaticum.errors import DataError, InputError
from viaticum.outcomes import write_outcomes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW
    from synthetic_outcomes import NAMES, WORDS

    folder = tmp_path_factory.mktemp("encoder") / "words"
    words = [
        *NAMES,
        *(word for kind in WORDS.values() for word in kind),
        "tiny",
        "mid",
        "big",
        "cot",
        "direct",
    ]
    SentenceTransformer(modules=[BoW(words)], device="cpu").save(str(folder))
    return str(folder)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path / "cache"))


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["router", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def fitted(tmp_path: Path, encoder: str) -> Path:
    write_outcomes(tmp_path / "known.jsonl", outcomes(240))
    run("fit", tmp_path / "known.jsonl", "--out", tmp_path / "router", "--encoder", encoder)
    return tmp_path / "router"


def run_json(*arguments: str | Path) -> Any:
    return json.loads(run(*arguments, "--json"))


def test_fit_evaluate_show(fitted: Path, tmp_path: Path, encoder: str) -> None:
    assert sorted(path.name for path in fitted.iterdir()) == ["router.json", "router.safetensors"]
    write_outcomes(tmp_path / "new.parquet", outcomes(90, seed=5))
    result = run_json("evaluate", fitted, tmp_path / "new.parquet")
    assert result["questions"] == 90
    keys = {
        "best_single",
        "curve",
        "hull",
        "cost_at_best_single_accuracy",
        "ece",
        "token_coverage_p90",
        "largest_share",
        "oracle",
        "curve_minus_hull",
    }
    assert keys <= set(result)
    assert set(result["best_single"]) == {"pair", "accuracy", "cost", "ties"}
    assert result["learned_from"] == 0
    assert [set(point) for point in result["curve"]] == [{"budget", "accuracy", "cost"}] * 7
    assert "best single pair: big+cot" in run("evaluate", fitted, tmp_path / "new.parquet")
    shown = run_json("show", fitted, "mother sister uncle family")
    assert {row["pair"] for row in shown["table"]} == {str(pair) for pair in PAIRS}
    costs = [way["cost"] for way in shown["plans"]]
    assert costs == sorted(costs)
    assert [way["accuracy"] for way in shown["plans"]] == sorted(way["accuracy"] for way in shown["plans"])
    assert "trust in this" in run("show", fitted, "mother sister uncle family")
    again = run_json("fit", tmp_path / "known.jsonl", "--out", fitted, "--encoder", encoder, "--seed", "2")
    assert again["facts"]["questions"] == 240
    assert (fitted / "previous" / "router.json").exists()


def test_evaluate_tells_what_a_batch_would_do_and_budgets_that_are_too_small(
    fitted: Path, tmp_path: Path
) -> None:
    write_outcomes(tmp_path / "new.jsonl", outcomes(150, seed=5))
    budgets = ("--budget", "0.000005", "--budget", "0.0005")
    result = run_json("evaluate", fitted, tmp_path / "new.jsonl", *budgets)
    assert result["cheapest"]["pair"] == "tiny+direct"
    assert result["cheapest"]["budgets_below"] == [0.000005]
    poor, rich = result["paced"]
    assert poor["cost"] <= 0.000005 < result["curve"][0]["cost"]
    assert 0.3 < poor["skipped"] < 0.7
    assert rich["cost"] <= 0.0005
    assert rich["skipped"] == 0
    assert rich["accuracy"] > result["hull"][1]["accuracy"] - 0.03
    shown = CliRunner().invoke(
        app, ["router", "evaluate", str(fitted), str(tmp_path / "new.jsonl"), *budgets]
    )
    assert "paced" in shown.stdout
    assert "pair costs here, tiny+direct" in shown.stderr


def test_evaluate_draws_a_page_and_tells_the_area(fitted: Path, tmp_path: Path) -> None:
    write_outcomes(tmp_path / "new.jsonl", outcomes(120, seed=5))
    page = tmp_path / "page.html"
    result = run_json("evaluate", fitted, tmp_path / "new.jsonl", "--page", page)
    area = result["area"]
    assert 0.3 < area["pairs"] < 1
    assert area["router"] > area["pairs"], "plans and questions are worth something here"
    assert area["low"] <= area["difference"] <= area["high"]
    assert area["difference"] == pytest.approx(area["router"] - area["pairs"])
    assert len(result["sweep"]) == 60
    html = page.read_text(encoding="utf-8")
    assert "<svg" in html
    assert "a router evaluated" in html
    for each in result["pairs"]:
        assert each["pair"] in html
    assert "mean accuracy over the logarithm of the cost" in run("evaluate", fitted, tmp_path / "new.jsonl")
    for wrong in (("--refits", "2"), ("--leave-out", "dataset", "--page", page)):
        with pytest.raises(InputError, match=r"leave (it|one of them) out"):
            run("evaluate", fitted, tmp_path / "new.jsonl", *wrong)


def test_evaluate_leaves_out_data_sets(fitted: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", fitted, tmp_path / "known.jsonl", "--leave-out")
    result = run_json(*arguments, "dataset", "--budget", "0.0002")
    assert [kind["dataset"] for kind in result["kinds"]] == ["games", "kin", "sums"]
    (pooled,) = result["pooled"]
    assert pooled["low_kinds"] < pooled["high_kinds"]
    shown = run(*arguments, "dataset", "--budget", "0.0002")
    assert "fitted without kin (80 questions)" in shown
    assert "all of these (240 questions)" in shown
    with pytest.raises(InputError, match="known: dataset"):
        run(*arguments, "model")


def test_a_table_without_tokens_is_evaluated_without_their_share(fitted: Path, tmp_path: Path) -> None:
    rows = [replace(row, input_tokens=None, output_tokens=None) for row in outcomes(60, seed=5)]
    write_outcomes(tmp_path / "bare.jsonl", rows)
    assert run_json("evaluate", fitted, tmp_path / "bare.jsonl")["token_coverage_p90"] is None
    shown = run("evaluate", fitted, tmp_path / "bare.jsonl")
    assert "tokens within" not in shown
    assert "nan" not in shown


def test_a_table_with_few_questions_is_warned_of(encoder: str, tmp_path: Path) -> None:
    for count, warned in ((40, True), (100, False)):
        write_outcomes(tmp_path / "few.jsonl", outcomes(count))
        arguments = ("fit", tmp_path / "few.jsonl", "--out", tmp_path / "few", "--encoder", encoder)
        result = CliRunner().invoke(app, ["router", *map(str, arguments)], catch_exceptions=False)
        assert ("questions are few" in result.stderr) == warned


def test_show_marks_what_is_extrapolated(encoder: str, tmp_path: Path) -> None:
    rows = [
        replace(row, output_tokens=40, finish_reason="length") if (row.output_tokens or 0) > 40 else row
        for row in outcomes(240)
    ]
    write_outcomes(tmp_path / "cut.jsonl", rows)
    run("fit", tmp_path / "cut.jsonl", "--out", tmp_path / "router", "--encoder", encoder)
    table = run_json("show", tmp_path / "router", "mother sister uncle family")["table"]
    beyond = [row for row in table if row.get("cut_at") and row["tokens_p90"] > row["cut_at"] == 40]
    shown = run("show", tmp_path / "router", "mother sister uncle family")
    assert beyond
    assert all(f"~{row['tokens_p90']} " in shown for row in beyond)
    assert "extrapolated" in shown


def test_prices_replace_what_the_table_says(fitted: Path, tmp_path: Path) -> None:
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"tiny": {"output": 100}, "mid": {"output": 1}, "big": {"output": 1}}))
    write_outcomes(tmp_path / "new.jsonl", outcomes(60, seed=5))
    result = run_json("evaluate", fitted, tmp_path / "new.jsonl", "--prices", prices)
    assert result["best_single"]["cost"] == pytest.approx(1e-4, rel=0.2)
    prices.write_text("{}")
    with pytest.raises(InputError, match="no price for big, mid, tiny"):
        run("evaluate", fitted, tmp_path / "new.jsonl", "--prices", prices)


def test_add_and_refit(fitted: Path, tmp_path: Path) -> None:
    catalogue = tmp_path / "catalogue.toml"
    catalogue.write_text(
        '[models.fresh]\ndescription = "tiny"\nkind = "remote"\nlitellm_model = "openai/fresh"\n'
        "context_length = 4096\ninput_price = 0.1\noutput_price = 2.0\n"
    )
    rows = [replace(row, model="fresh") for row in outcomes(60, seed=6) if row.pair == PAIRS[1]]
    write_outcomes(tmp_path / "fresh.jsonl", rows)
    result = run_json(
        "add",
        fitted,
        "--model",
        "fresh",
        "--strategy",
        "cot",
        "--outcomes",
        tmp_path / "fresh.jsonl",
        "--catalogue",
        catalogue,
    )
    assert result["added"] == ["fresh+cot"]
    assert result["outcomes"] == 60
    assert "fresh+cot" in {row["pair"] for row in run_json("show", fitted, "sum total")["table"]}
    live = [
        replace(row, correct=not row.correct, cost_nanousd=None, output_tokens=None)
        for row in outcomes(120, seed=7)
    ]
    write_outcomes(tmp_path / "live.jsonl", live)
    refitted = run_json("refit", fitted, tmp_path / "known.jsonl", "--live", tmp_path / "live.jsonl")
    assert refitted["after"] < refitted["before"]
    assert refitted["live"] == 480
    before = (fitted / "router.json").read_bytes()
    write_outcomes(tmp_path / "wrong.jsonl", [replace(row, correct=not row.correct) for row in outcomes(240)])
    run(
        "fit",
        tmp_path / "known.jsonl",
        "--out",
        tmp_path / "good",
        "--encoder",
        json.loads(before)["facts"]["encoder"],
    )
    kept = (tmp_path / "good" / "router.json").read_bytes()
    write_outcomes(tmp_path / "more.jsonl", outcomes(40, seed=8))
    with pytest.raises(DataError, match="predicts live answers worse"):
        run("refit", tmp_path / "good", tmp_path / "wrong.jsonl", "--live", tmp_path / "more.jsonl")
    assert (tmp_path / "good" / "router.json").read_bytes() == kept


def test_a_table_with_missing_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"dataset": "d", "question_id": "1", "question": "?"}\n')
    with pytest.raises(DataError, match="missing model, strategy, correct"):
        run("fit", tmp_path / "bad.jsonl", "--out", tmp_path / "router")
