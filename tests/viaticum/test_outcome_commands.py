"""`viaticum outcomes import|show|merge|split|reprice`: every format in, errors with file, row and column."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_outcomes import outcomes
from typer.testing import CliRunner

from viaticum.cli import app
from viaticum.errors import DataError, InputError, UnknownName, ViaticumError
from viaticum.outcomes import read_outcomes, write_outcomes
from viaticum.types import Outcome, Pair


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["outcomes", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def imported(tmp_path: Path, *arguments: str | Path) -> list[Outcome]:
    run("import", *arguments, "--out", tmp_path / "out.jsonl")
    return read_outcomes(tmp_path / "out.jsonl")


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- tables of one's own --------------------------------------------------------------------------


def test_a_csv_with_a_column_map(tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    table.write_text(
        "prompt;llm;mark;usd;ms;tok\r\nWhat is 2+2?;openai/gpt-4o;0.9;$0.0012;1500;12\r\n"
        '"And\n3+3?";openai/gpt-4o;0.2;;;7\r\n'
    )
    maps = ("question=prompt", "model=llm", "correct=mark", "cost_usd=usd", "milliseconds=ms")
    first, second = imported(
        tmp_path,
        table,
        *(each for one in maps for each in ("--map", one)),
        *("--map", "output_tokens=tok", "--set", "strategy=cot", "--threshold", "0.5"),
    )
    assert (first.question, str(first.pair), first.correct) == ("What is 2+2?", "openai/gpt-4o+cot", True)
    assert (first.cost_nanousd, first.seconds, first.output_tokens) == (1_200_000, 1.5, 12)
    assert (first.dataset, second.question, second.correct) == ("mine", "And\n3+3?", False)
    assert second.cost_nanousd is None
    assert len({first.question_id, second.question_id}) == 2


def test_answers_are_graded_where_the_right_one_is_known(tmp_path: Path) -> None:
    table = write_lines(
        tmp_path / "t.jsonl",
        {"question": "6*7?", "pair": "m+cot", "answer": "42.0", "gold": "so it is #### 42"},
        {"question": "6*8?", "pair": "m+cot", "answer": None, "gold": 48},
    )
    assert [row.correct for row in imported(tmp_path, table)] == [True, False]
    answers = write_lines(tmp_path / "a.jsonl", {"question_id": "q1", "pair": "m+cot", "answer": "B"})
    questions = tmp_path / "q.csv"
    questions.write_text('id,question,answer,options\nq1,Which?,green,"[""red"", ""green""]"\n')
    (row,) = imported(tmp_path, answers, "--questions", questions)
    assert row.correct


def test_nan_is_what_is_missing(tmp_path: Path) -> None:
    """As pandas writes it, also in columns of texts."""
    nothing = dict.fromkeys(
        ("answer", "strategy", "cost_usd", "milliseconds", "output_tokens", "dataset"), math.nan
    )
    table = write_lines(
        tmp_path / "t.jsonl",
        {"question": "6*7?", "model": "m", "correct": 1.0, **nothing},
        {"question": "6*8?", "model": "m", "correct": 0.0, "question_id": math.nan},
    )
    first, second = imported(tmp_path, table)
    assert (first.answer, first.strategy, first.dataset) == (None, "chat", "t")
    assert (first.cost_nanousd, first.seconds, first.output_tokens) == (None, None, None)
    assert first.question_id != second.question_id
    row = {"dataset": "d", "question_id": "1", "model": "m", "strategy": "cot", "correct": True}
    (found,) = read_outcomes(
        write_lines(tmp_path / "o.jsonl", row | dict.fromkeys(("question", "answer"), math.nan))
    )
    assert (found.question, found.answer) == ("", None)


@pytest.mark.parametrize(
    ("row", "arguments", "why"),
    [
        ({"question": "?", "model": "m", "correct": 0.7}, (), r"t.jsonl, line 2: correct .*--threshold"),
        ({"question": "?", "model": "m"}, (), r"line 2: neither correct nor a right answer"),
        ({"question": "?", "correct": True}, (), r"line 2: no model"),
        ({"model": "m", "correct": True}, (), r"line 2: neither question nor question_id"),
        ({"question": "?", "model": "m", "correct": 1}, ("--map", "correct=mark"), r"line 1: no 'mark'"),
        ({"question": "?", "model": "m", "correct": 1, "output_tokens": -3}, (), "line 2: output_tokens"),
        ({"question": "?", "model": "m", "correct": 1, "cost_usd": "cheap"}, (), "line 2: cost_usd"),
        ({"question": "?", "model": "m", "correct": "maybe"}, (), "line 2: correct must be true or false"),
        ({"question": "?", "model": math.nan, "correct": True}, (), "line 2: no model"),
        ({"question": "?", "pair": "m", "correct": True}, (), "line 2: not a pair"),
        ({"question": "?", "model": "m", "correct": True, "cost_usd": math.inf}, (), "line 2: cost_usd"),
        ({"question": "?", "model": "m", "correct": True, "seconds": 10**400}, (), "line 2: seconds"),
        (
            {"question": "?", "model": "m", "correct": True, "cost_nanousd": 10**400},
            (),
            "line 2: cost_nanousd",
        ),
        (
            {"question": "?", "model": "m", "correct": True, "output_tokens": 10**30},
            (),
            "line 2: output_tokens",
        ),
        (
            {"question": "?", "model": "m", "correct": "nan"},
            ("--threshold", "0.5"),
            "line 2: correct must be true or false, not 'nan'",
        ),
    ],
)
def test_errors_name_file_row_and_column(
    tmp_path: Path, row: dict[str, Any], arguments: tuple[str, ...], why: str
) -> None:
    table = write_lines(tmp_path / "t.jsonl", {"question": "1?", "model": "m", "correct": True}, row)
    with pytest.raises(DataError, match=why):
        run("import", table, "--out", tmp_path / "out.jsonl", *arguments)
    assert not (tmp_path / "out.jsonl").exists()


def test_unknown_columns_and_formats(tmp_path: Path) -> None:
    table = write_lines(tmp_path / "t.jsonl", {"question": "?", "model": "m", "correct": True})
    with pytest.raises(UnknownName, match="did you mean 'question'"):
        run("import", table, "--out", tmp_path / "o.jsonl", "--map", "queston=q")
    with pytest.raises(UnknownName, match="did you mean 'lm-eval'"):
        run("import", table, "--out", tmp_path / "o.jsonl", "--from", "lm_eval")
    with pytest.raises(InputError, match="write COLUMN=VALUE"):
        run("import", table, "--out", tmp_path / "o.jsonl", "--set", "model")
    with pytest.raises(InputError, match="there is no such file"):
        run("import", tmp_path / "none.csv", "--out", tmp_path / "o.jsonl")


def test_columns_of_the_same_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("question,model,correct,model\n1?,a,1,b\n")
    with pytest.raises(DataError, match="two columns are named model"):
        run("import", tmp_path / "t.csv", "--out", tmp_path / "o.jsonl")


# --- other tools ----------------------------------------------------------------------------------


def sample(doc_id: int, right: float, filter: str = "none") -> dict[str, Any]:
    return {
        "doc_id": doc_id,
        "doc": {"question": f"{doc_id}+1?", "answer": "#### 1"},
        "target": "1",
        "arguments": {"gen_args_0": {"arg_0": "Q: ...", "arg_1": {}}},
        "resps": [["It is 1"]],
        "filtered_resps": ["1"],
        "filter": filter,
        "metrics": ["exact_match"],
        "exact_match": right,
    }


def test_sample_logs_of_lm_eval(tmp_path: Path) -> None:
    folder = tmp_path / "org__some__model"
    folder.mkdir()
    name = "samples_gsm8k_cot_2026-05-01T10-11-12.123456.jsonl"
    log = write_lines(folder / name, sample(0, 1.0), sample(1, 0.0))
    first, second = imported(tmp_path, log, "--from", "lm-eval")
    assert (first.dataset, first.question_id, first.model) == ("gsm8k_cot", "0", "org/some__model")
    assert (first.question, first.answer, first.correct, second.correct) == ("0+1?", "1", True, False)


def test_a_question_that_lm_eval_logged_once_a_filter_counts_once(tmp_path: Path) -> None:
    log = write_lines(
        tmp_path / "samples_gsm8k.jsonl",
        sample(0, 0.0, "strict-match"),
        sample(0, 1.0, "flexible-extract"),
    )
    arguments = (log, "--from", "lm-eval", "--set", "model=m")
    with pytest.raises(DataError, match="flexible-extract and strict-match; say which"):
        imported(tmp_path, *arguments)
    (row,) = imported(tmp_path, *arguments, "--filter", "flexible-extract")
    assert row.correct


def test_the_likeliest_choice_of_lm_eval_is_the_answer(tmp_path: Path) -> None:
    likelihoods = [["-3.5", "False"], ["-1.25", "True"]]
    row = sample(0, 1) | {"filtered_resps": likelihoods, "metrics": ["acc"], "acc": 1.0}
    log = write_lines(tmp_path / "samples_arc.jsonl", {k: v for k, v in row.items() if k != "exact_match"})
    (outcome,) = imported(tmp_path, log, "--from", "lm-eval", "--set", "model=m")
    assert (outcome.answer, outcome.correct) == ("B", True)


def promptfoo_result(provider: Any, success: bool, **more: Any) -> dict[str, Any]:
    return {
        "provider": provider,
        "prompt": {"raw": "Answer: 2+2?", "label": "Answer: {{question}}"},
        "vars": {"question": "2+2?"},
        "response": {"output": "4", "tokenUsage": {"prompt": 9, "completion": 3, "total": 12}, "cost": 2e-6},
        "success": success,
        "latencyMs": 420,
        **more,
    }


def test_results_of_promptfoo(tmp_path: Path) -> None:
    same_id = {"id": "file://p.py", "label": "claude"}
    results = [
        promptfoo_result({"id": "openai:gpt-4o", "label": ""}, True),
        promptfoo_result(same_id, False),
        promptfoo_result({"id": "x"}, False, response={}, error="HTTP 500", failureReason=2),
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"version": 3, "results": {"version": 3, "results": results}}))
    first, second = imported(tmp_path, path, "--from", "promptfoo")
    assert (first.model, first.strategy, second.model) == ("openai:gpt-4o", "chat", "claude")
    assert (first.cost_nanousd, first.seconds, first.input_tokens, first.output_tokens) == (2000, 0.42, 9, 3)
    assert (first.correct, second.correct, first.question) == (True, False, "2+2?")
    lines = write_lines(tmp_path / "results.jsonl", *results)
    assert run("import", lines, "--from", "promptfoo", "--out", tmp_path / "o.jsonl", "--json")
    again = json.loads(run("import", lines, "--from", "promptfoo", "--out", tmp_path / "o.jsonl", "--json"))
    assert again["left_out"] == {"ended in an error": 1}


def test_runs_of_langsmith(tmp_path: Path) -> None:
    run_row = {
        "id": "r1",
        "reference_example_id": "e1",
        "inputs": {"question": "2+2?"},
        "outputs": {"output": "4"},
        "error": None,
        "feedback_stats": {"correctness": {"n": 1, "avg": 1.0}, "helpfulness": {"n": 1, "avg": 0.3}},
        "extra": {"metadata": {"ls_model_name": "gpt-4o"}},
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "total_cost": "0.00002",
        "start_time": "2026-05-01T10:00:00+00:00",
        "end_time": "2026-05-01T10:00:01.500000+00:00",
    }
    nested = run_row | {"id": "r2", "parent_run_id": "r1"}
    failed = run_row | {"id": "r3", "error": "timeout"}
    log = write_lines(tmp_path / "runs.jsonl", run_row, nested, failed)
    (row,) = imported(tmp_path, log, "--from", "langsmith")
    assert (row.question_id, row.question, row.answer, row.model) == ("e1", "2+2?", "4", "gpt-4o")
    assert (row.correct, row.cost_nanousd, row.seconds, row.output_tokens) == (True, 20_000, 1.5, 2)


def test_an_experiment_of_langsmith_as_csv(tmp_path: Path) -> None:
    table = tmp_path / "experiment.csv"
    table.write_text(
        "example_id,inputs.question,outputs.answer,reference.answer,feedback.exact,execution_time,error\n"
        "e1,2+2?,4,4,1,0.7,\n"
        "e2,3+3?,7,6,0,0.6,\n"
    )
    first, second = imported(tmp_path, table, "--from", "langsmith", "--set", "model=gpt-4o")
    assert (first.question, first.answer, first.correct, first.seconds) == ("2+2?", "4", True, 0.7)
    assert (second.question_id, second.correct) == ("e2", False)


def test_calls_of_a_batch(tmp_path: Path) -> None:
    from viaticum.jobs import Call, Job, JobRow, row_line

    folder = tmp_path / "answers.jsonl.job"
    folder.mkdir()
    Job("sums.csv", "answers.jsonl", 3, "b", 1, "l", "paced").save(folder)
    call = Call("small+cot", "k1", 500, {"small": [10, 5]}, 0.5, "stop", "3")
    other = Call("big+cot", "k2", 9000, {"big": [10, 8]}, 0.9, "stop", "4")
    cached = replace(call, answer="4", cached=True, cost_nanousd=0)
    right = JobRow("a", "2+2?", "answered", answer="4", gold="4", correct=True, calls=(call, other))
    rows = [
        right,
        replace(right, id="b", question="1+3?", calls=(cached,), number=1),
        JobRow("c", "?", "skipped", number=2),
    ]
    (folder / "rows.jsonl").write_text("".join(map(row_line, rows)))
    got = imported(tmp_path, tmp_path / "answers.jsonl", "--from", "batch")
    assert [(row.question_id, str(row.pair), row.correct, row.cost_nanousd) for row in got] == [
        ("a", "small+cot", False, 500),
        ("a", "big+cot", True, 9000),
        ("b", "small+cot", True, None),
    ]
    assert {row.dataset for row in got} == {"sums"}
    with pytest.raises(InputError, match="no job folder"):
        run("import", write_lines(tmp_path / "x.jsonl", {}), "--from", "batch", "--out", tmp_path / "o.jsonl")


def test_live_calls_with_feedback(tmp_path: Path) -> None:
    from viaticum.budgets import Ledger
    from viaticum.money import Price
    from viaticum.types import TokenCount

    live = Outcome("live", "q1", "2+2?", "m", "cot", "4", True, 5, 3, 100)
    write_outcomes(tmp_path / "live.jsonl", [live, replace(live, correct=False)])
    (row,) = imported(tmp_path, tmp_path / "live.jsonl", "--from", "live")
    assert not row.correct, "the last verdict counts"
    where = tmp_path / "ledger.db"
    with Ledger(where) as ledger:
        ledger.create("b", limit_nanousd=10**9)
        tags, prices = {"model": "m", "strategy": "cot"}, {"m": Price(10**9, 2 * 10**9)}
        ledger.reserve("b", "run/0", {"m": TokenCount(10, 10)}, prices, tags=tags)
        ledger.settle("run/0", {"m": TokenCount(10, 4)})
    table = write_lines(tmp_path / "thumbs.jsonl", {"key": "run/0", "question": "2+2?", "correct": True})
    (row,) = imported(tmp_path, table, "--from", "live", "--ledger", where)
    assert (str(row.pair), row.cost_nanousd, row.correct) == ("m+cot", 18_000, True)
    nothing = dict.fromkeys(("model", "strategy", "cost_nanousd", "output_tokens"), math.nan)
    table = write_lines(
        tmp_path / "nan.jsonl", {"key": "run/0", "question": "2+2?", "correct": True, **nothing}
    )
    assert imported(tmp_path, table, "--from", "live", "--ledger", where) == [replace(row, dataset="nan")]
    missing = write_lines(tmp_path / "more.jsonl", {"key": "run/9", "question": "2+2?", "correct": True})
    with pytest.raises(DataError, match="line 1: the ledger has no settled call with the key 'run/9'"):
        imported(tmp_path, missing, "--from", "live", "--ledger", where)


# --- show, merge, split ---------------------------------------------------------------------------


def test_show_counts_holes(tmp_path: Path) -> None:
    rows = outcomes(30)
    holes = [row for row in rows if row.model != "big" or int(row.question_id.split("-")[1]) < 10]
    write_outcomes(tmp_path / "t.parquet", holes)
    shown = json.loads(run("show", tmp_path / "t.parquet", "--json"))
    assert (shown["questions"], shown["complete"], len(shown["pairs"])) == (30, 10, 4)
    by_pair = {row["pair"]: row for row in shown["pairs"]}
    assert (by_pair["big+cot"]["answers"], by_pair["big+cot"]["holes"]) == (10, 20)
    assert by_pair["tiny+cot"]["accuracy"] == pytest.approx(
        sum(row.correct for row in rows if row.pair == Pair("tiny", "cot")) / 30
    )
    assert "10 were given to every pair" in run("show", tmp_path / "t.parquet")


def test_merge_keeps_each_pair_once_on_each_question(tmp_path: Path) -> None:
    rows = outcomes(12)
    write_outcomes(tmp_path / "a.jsonl", rows[:30], {rows[0].question_id: {"topic": "sums"}})
    write_outcomes(tmp_path / "b.csv", rows[20:])
    arguments = ("merge", tmp_path / "a.jsonl", tmp_path / "b.csv", "--out", tmp_path / "both.parquet")
    assert "48 outcomes of 4 pairs on 12 questions" in run(*arguments)
    assert read_outcomes(tmp_path / "both.parquet") == rows
    import pyarrow.parquet as parquet

    kept = parquet.read_table(tmp_path / "both.parquet", columns=["topic"])["topic"].to_pylist()
    assert kept == ["sums"] * 4 + [None] * 44
    write_outcomes(tmp_path / "c.jsonl", [replace(rows[0], correct=not rows[0].correct)])
    with pytest.raises(DataError, match=r"c.jsonl, line 1: .* is (right|wrong), unlike in .*a.jsonl, line 1"):
        run("merge", tmp_path / "a.jsonl", tmp_path / "c.jsonl", "--out", tmp_path / "x.jsonl")
    run("merge", tmp_path / "a.jsonl", tmp_path / "c.jsonl", "--out", tmp_path / "x.jsonl", "--keep", "last")
    assert read_outcomes(tmp_path / "x.jsonl")[0].correct is not rows[0].correct


def test_split_by_question_with_near_duplicates_together(tmp_path: Path) -> None:
    rows = outcomes(60)
    twins = [
        replace(row, question_id=f"twin-{row.question_id}", question=f"{row.question} 7") for row in rows
    ]
    write_outcomes(tmp_path / "all.jsonl", rows + twins)
    sides = ("--train", tmp_path / "t.jsonl", "--held-out", tmp_path / "h.csv")
    arguments = ("split", tmp_path / "all.jsonl", *sides)
    run(*arguments, "--share", "0.3", "--seed", "4")
    train, aside = read_outcomes(tmp_path / "t.jsonl"), read_outcomes(tmp_path / "h.csv")
    ids = [{row.question_id.removeprefix("twin-") for row in side} for side in (train, aside)]
    assert not ids[0] & ids[1]
    assert sorted(map(repr, train + aside)) == sorted(map(repr, rows + twins))
    assert 0.1 < len(aside) / len(rows + twins) <= 0.3
    before = (tmp_path / "h.csv").read_text()
    run(*arguments, "--share", "0.3", "--seed", "4")
    assert (tmp_path / "h.csv").read_text() == before
    with pytest.raises(ViaticumError, match="--share is above 0"):
        run(*arguments, "--share", "1")


def test_no_table_is_written_over_one_that_is_read(tmp_path: Path) -> None:
    """A split reads its tables once for each part: the second would be made of the first."""
    path = tmp_path / "all.jsonl"
    write_outcomes(path, outcomes(60))
    before = path.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(path)
    other = tmp_path / "other.jsonl"
    for train, aside in ((path, other), (other, path), (other, tmp_path / "link.jsonl")):
        with pytest.raises(InputError, match="is the file that is read"):
            run("split", path, "--train", train, "--held-out", aside)
    with pytest.raises(InputError, match="both parts would be"):
        run("split", path, "--train", other, "--held-out", other)
    with pytest.raises(InputError, match="is the file that is read"):
        run("import", path, "--out", path)
    for arguments in (("merge", path, path), ("reprice", path)):
        with pytest.raises(InputError, match="is the file that is read"):
            run(*arguments, "--out", tmp_path / "link.jsonl")
    assert path.read_bytes() == before
    assert not other.exists()


def test_a_table_without_texts_is_split_too(tmp_path: Path) -> None:
    """Ids that differ by their numbers are no near-duplicates."""
    rows = [replace(row, question="") for row in outcomes(60)]
    write_outcomes(tmp_path / "all.jsonl", rows)
    run("split", tmp_path / "all.jsonl", "--train", tmp_path / "t.jsonl", "--held-out", tmp_path / "h.jsonl")
    train, aside = read_outcomes(tmp_path / "t.jsonl"), read_outcomes(tmp_path / "h.jsonl")
    assert {row.question_id for row in train}.isdisjoint(row.question_id for row in aside)
    assert len(aside) == 0.3 * len(rows)


def test_a_table_survives_every_format(tmp_path: Path) -> None:
    rows = outcomes(5)
    for suffix in ("csv", "jsonl", "parquet"):
        write_outcomes(tmp_path / f"t.{suffix}", rows)
        assert read_outcomes(tmp_path / f"t.{suffix}") == rows
    line = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])
    assert line == asdict(rows[0])


# --- prices that changed --------------------------------------------------------------------------

PRICED = """
[models.far]
kind = "remote"
litellm_model = "openai/far"
description = "Far away."
context_length = 1000
input_price = 2
output_price = 10
"""


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_costs_follow_a_new_list_of_prices(tmp_path: Path, suffix: str) -> None:
    table, catalogue = tmp_path / f"old.{suffix}", tmp_path / "catalogue.toml"
    catalogue.write_text(PRICED)
    row = Outcome("d", "1", "q", "far", "cot", "4", True, 100, 10, 5, 1.0, "stop")
    rows = [
        row,
        replace(row, question_id="2", cost_nanousd=None),
        replace(row, question_id="3", input_tokens=None),
        replace(row, question_id="4", model="gone"),
    ]
    write_outcomes(table, rows, {"1": {"note": "kept"}})
    text = run("reprice", table, "--out", tmp_path / "new.jsonl", "--catalogue", catalogue)
    assert "far: 2 outcomes, $0.000000005 before, $0.0006 now" in text
    assert "gone: 1 outcomes keep their costs" in text
    made = read_outcomes(tmp_path / "new.jsonl")
    assert [each.cost_nanousd for each in made] == [300_000, 300_000, 5, 5]
    assert [replace(each, cost_nanousd=None) for each in made] == [
        replace(each, cost_nanousd=None) for each in rows
    ]
    assert json.loads((tmp_path / "new.jsonl").read_text().splitlines()[0])["note"] == "kept"
    again = tmp_path / f"again.{suffix}"
    printed = json.loads(run("reprice", table, "--out", again, "--catalogue", catalogue, "--json"))
    assert printed["models"] == {"far": {"outcomes": 2, "before": 5, "after": 600_000}}
    assert printed["kept"] == {"far": 1, "gone": 1}
    assert [each.cost_nanousd for each in read_outcomes(again)] == [300_000, 300_000, 5, 5]


def test_a_table_without_a_priced_row_is_left_alone(tmp_path: Path) -> None:
    table = tmp_path / "old.jsonl"
    write_outcomes(table, [Outcome("d", "1", "q", "gone", "cot", "4", True, 100, 10, 5)])
    with pytest.raises(DataError, match=r"no row of .* can be priced: its models \(gone\)"):
        run("reprice", table, "--out", tmp_path / "new.jsonl")
    assert not (tmp_path / "new.jsonl").exists()
