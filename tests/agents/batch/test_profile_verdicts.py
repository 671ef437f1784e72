"""Verdicts that are added to a finished outcome table: nothing that is there is asked or written anew."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from viaticum.agents.batch.profile import profile
from viaticum.agents.batch.profile_journal import profile_lock
from viaticum.agents.batch.profile_verdicts import VerdictPlan, add_verdicts
from viaticum.catalogue import Catalogue
from viaticum.cli import app
from viaticum.errors import DataError, InputError
from viaticum.outcomes import outcome_rows, read_outcomes, read_verdicts, write_outcomes, write_rows
from viaticum.questions import Question
from viaticum.types import Outcome, Pair, Query

KILLED = Path(__file__).resolve().parents[2] / "support" / "killed_at_line.py"
SMALL, REMOTE = Pair("tiny-small", "cot"), Pair("far-away", "own-strategy")


def questions(count: int) -> list[Question]:
    return [Question(f"q{n}", Query(f"What is {n} + {n}?", "number"), str(2 * n)) for n in range(count)]


def table_rows(count: int, pairs: Sequence[Pair] = (SMALL, REMOTE), dataset: str = "d") -> list[Outcome]:
    """Answers, every third one missing, of a local model and of one that is nowhere here."""
    return [
        Outcome(
            dataset=dataset,
            question_id=f"q{n}",
            question=f"What is {n} + {n}?",
            model=pair.model,
            strategy=pair.strategy,
            answer=None if (n + number) % 3 == 0 else str(2 * n + number),
            correct=number == 0 and n % 3 != 0,
            cost_nanousd=1000,
        )
        for number, pair in enumerate(pairs)
        for n in range(count)
    ]


def answered(rows: Sequence[Outcome]) -> int:
    return sum(row.answer is not None for row in rows)


def added(
    out: Path, catalogue: Catalogue, count: int = 6, **settings: Any
) -> tuple[list[Outcome], VerdictPlan]:
    plans: list[VerdictPlan] = []
    settings = {"verifiers": ["tiny-large"], "catalogue": catalogue, "plan": plans.append} | settings
    return add_verdicts(questions(count), out, **settings), plans[0]


@pytest.fixture(params=["jsonl", "csv", "parquet"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A finished table with a further column, which is another one for each answer."""
    out = tmp_path / f"known.{request.param}"
    rows = [asdict(row) | {"graded_by": f"person {number}"} for number, row in enumerate(table_rows(6))]
    write_rows(out, rows, ["graded_by"])
    yield out
    assert list(tmp_path.iterdir()) == [out]


def test_only_what_is_missing_is_asked_and_nothing_is_lost(table: Path, tiny_catalogue: Catalogue) -> None:
    before = [values for _, values in outcome_rows(table)]
    rows, plan = added(table, tiny_catalogue)
    total = answered(table_rows(6))
    assert (plan.answers, plan.there, plan.calls, plan.unanswered) == (total, 0, total, 0)
    after = [values for _, values in outcome_rows(table)]
    assert after[: len(before)] == before
    verdicts = read_verdicts(table)
    assert rows == [*read_outcomes(table), *verdicts]
    assert len(verdicts) == total
    assert {row.strategy for row in verdicts} == {f"verify:{SMALL}", f"verify:{REMOTE}"}
    assert all(row.output_tokens and row.cost_nanousd and row.seconds is not None for row in verdicts)
    assert all(values["graded_by"].startswith("person ") for values in after)
    content = table.read_bytes()
    assert added(table, tiny_catalogue)[1] == VerdictPlan(total, total, 0, 0)
    assert table.read_bytes() == content, "there was nothing to add"
    without = [row for row in [*read_outcomes(table), *verdicts] if row != verdicts[2]]
    write_outcomes(table, without)
    rows, plan = added(table, tiny_catalogue)
    assert (plan.there, plan.calls) == (total - 1, 1)
    again = {(row.strategy, row.question_id): row for row in read_verdicts(table)}
    assert len(again) == total
    key = verdicts[2].strategy, verdicts[2].question_id
    assert replace(again.pop(key), seconds=verdicts[2].seconds) == verdicts[2]
    assert set(again.values()) == {row for row in verdicts if row != verdicts[2]}


def test_equal_answers_are_asked_about_once_and_share_what_is_known(
    tmp_path: Path, tiny_catalogue: Catalogue
) -> None:
    """Equal as numbers; where one counts as right and the other as wrong they are no equal answers."""
    out, other = tmp_path / "known.jsonl", Pair("elsewhere", "cot")
    first = replace(table_rows(2)[1], answer="2.0", correct=True)
    same = replace(first, model=other.model, answer="2")
    write_outcomes(out, [first, same, replace(same, model="third", answer="2 ", correct=False)])
    _, plan = added(out, tiny_catalogue)
    assert (plan.answers, plan.calls) == (3, 2)
    by_model = {row.strategy: row for row in read_verdicts(out)}
    one, two = by_model[f"verify:{SMALL}"], by_model[f"verify:{other}"]
    assert replace(two, strategy=one.strategy) == one
    write_outcomes(out, [first, same, one])
    rows, plan = added(out, tiny_catalogue)
    assert (plan.answers, plan.there, plan.calls) == (2, 1, 0)
    assert {row.strategy for row in read_verdicts(out)} == {one.strategy, two.strategy}
    assert rows[-1] == two


def test_a_verifier_is_added_and_may_not_check_its_own_answers(
    tmp_path: Path, tiny_catalogue: Catalogue
) -> None:
    out = tmp_path / "known.jsonl"
    write_outcomes(out, table_rows(6))
    added(out, tiny_catalogue)
    first = read_verdicts(out)
    _, plan = added(out, tiny_catalogue, verifiers=["tiny-small"])
    theirs = answered([row for row in table_rows(6) if row.pair == REMOTE])
    assert (plan.answers, plan.calls) == (theirs, theirs)
    assert set(first) < set(read_verdicts(out))
    assert {row.strategy for row in read_verdicts(out) if row.model == "tiny-small"} == {f"verify:{REMOTE}"}
    content = out.read_bytes()
    for verifier in ("tiny-small", "tiny-pair"):  # which decodes with it
        with pytest.raises(InputError, match=f"{verifier} does not check its own answers"):
            added(out, tiny_catalogue, verifiers=[verifier], pairs=[SMALL])
        with pytest.raises(InputError, match="does not check its own answers"):
            profile(
                questions(1),
                [Pair("tiny-small", "direct")],
                tmp_path / "new.jsonl",
                catalogue=tiny_catalogue,
                dataset="d",
                verifiers=[verifier],
            )
    assert out.read_bytes() == content
    assert list(tmp_path.iterdir()) == [out]


def test_a_verdict_on_another_answer_is_asked_for_again(tmp_path: Path, tiny_catalogue: Catalogue) -> None:
    out = tmp_path / "known.jsonl"
    write_outcomes(out, table_rows(6))
    added(out, tiny_catalogue)
    rows = [*read_outcomes(out), *(replace(row, correct=not row.correct) for row in read_verdicts(out)[:1])]
    write_outcomes(out, rows)
    _, plan = added(out, tiny_catalogue)
    assert plan.there == 0
    right = {(str(row.pair), row.question_id): row.correct for row in read_outcomes(out)}
    for row in read_verdicts(out):
        checked = right[row.strategy.removeprefix("verify:"), row.question_id]
        assert row.correct == ((row.answer == "yes") == checked)


def test_some_pairs_and_questions_of_a_table(tmp_path: Path, tiny_catalogue: Catalogue) -> None:
    out = tmp_path / "known.jsonl"
    rows = [*table_rows(6), *table_rows(3, dataset="e")]
    write_outcomes(out, rows)
    with pytest.raises(InputError, match="has data sets: d, e; name one"):
        added(out, tiny_catalogue)
    _, plan = added(out, tiny_catalogue, 8, dataset="d", pairs=[SMALL])
    assert (plan.calls, plan.unanswered) == (4, 2)
    assert {(row.dataset, row.strategy) for row in read_verdicts(out)} == {("d", f"verify:{SMALL}")}
    assert read_outcomes(out) == rows
    with pytest.raises(InputError, match=r"no answers of nobody\+cot.*outcomes merge"):
        added(out, tiny_catalogue, dataset="d", pairs=[Pair("nobody", "cot")])
    with pytest.raises(InputError, match="no answer to these questions in f"):
        added(out, tiny_catalogue, dataset="f")
    write_outcomes(out, [replace(table_rows(1)[0], question="Another one?")])
    with pytest.raises(DataError, match="q0 is another question there"):
        added(out, tiny_catalogue)
    write_outcomes(out, [replace(row, question="") for row in table_rows(3)])
    added(out, tiny_catalogue)
    assert {row.question for row in read_verdicts(out)} == {""}, "who left the texts out wants none"


def test_what_does_not_fit_the_verifier_is_no_verdict_and_ends_nothing(
    tmp_path: Path, tiny_catalogue: Catalogue
) -> None:
    """As in a plan, where it counts as no."""
    out, asked = tmp_path / "known.jsonl", questions(3)
    asked[1] = replace(asked[1], query=Query("word " * 9000))
    rows = [replace(row, question="", answer="5") for row in table_rows(3, [SMALL])]
    write_outcomes(out, rows)
    add_verdicts(asked, out, catalogue=tiny_catalogue, verifiers=["tiny-large"])
    given = {row.question_id: row for row in read_verdicts(out)}
    assert given.keys() == {"q0", "q1", "q2"}
    long = given["q1"]
    assert (long.answer, long.cost_nanousd, long.output_tokens, long.finish_reason) == (None, 0, 0, "error")
    assert long.correct == (not rows[1].correct)
    assert given["q0"].cost_nanousd
    assert list(tmp_path.iterdir()) == [out]


def test_the_command_prints_what_it_will_ask(tmp_path: Path, tiny_catalogue_file: Path) -> None:
    file, out, texts = question_file(tmp_path, 8), tmp_path / "known.jsonl", tmp_path / "texts.jsonl"
    write_outcomes(out, table_rows(6))
    more = ["--verifier", "tiny-large", "--completions", str(texts)]
    arguments = [each for each in command(tiny_catalogue_file, file, out, *more) if each != "--json"]
    refused = CliRunner().invoke(app, arguments)
    assert "the texts of its answers are not at" in str(refused.exception)
    assert read_verdicts(out) == []
    texts.write_text("")
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    total = answered(table_rows(6))
    assert (
        f"{out} is finished and its answers stay: of {total} verdicts 0 are there, {total} calls give the "
        "others; 2 of the questions have no answer there"
    ) in done.stderr
    assert f"12 outcomes and {total} verdicts in" in done.stdout
    assert "tiny-large" in done.stdout
    assert texts.read_text() == ""


def test_two_runs_do_not_write_one_table(tmp_path: Path, tiny_catalogue: Catalogue) -> None:
    out = tmp_path / "known.jsonl"
    write_outcomes(out, table_rows(2))
    with profile_lock(out):
        with pytest.raises(InputError, match="another run of profile writes"):
            added(out, tiny_catalogue)
        with pytest.raises(InputError, match="another run of profile writes"):
            profile(questions(1), [SMALL], out, catalogue=tiny_catalogue, dataset="d")
    assert read_outcomes(out) == table_rows(2)
    assert list(tmp_path.iterdir()) == [out]


def command(catalogue: Path, file: Path, out: Path, *more: str) -> list[str]:
    return ["profile", str(file), "--out", str(out), "--catalogue", str(catalogue), "--json", *more]


def question_file(folder: Path, count: int) -> Path:
    file = folder / "questions.jsonl"
    rows = [{"id": each.id, "question": each.query.text, "answer": each.gold} for each in questions(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_killed_among_the_verdicts_nothing_is_asked_twice(
    tmp_path: Path, tiny_catalogue_file: Path, tiny_catalogue: Catalogue
) -> None:
    """After a kill, half of a line included, the table is the old one, and what was said is known."""
    file, out, whole = question_file(tmp_path, 6), tmp_path / "known.jsonl", tmp_path / "whole.jsonl"
    for path in (out, whole):
        write_outcomes(path, table_rows(6))
    journal = tmp_path / "known.jsonl.verdicts.journal"
    arguments = command(tiny_catalogue_file, file, out, "--verifier", "tiny-large", "--slots", "1")
    for _ in range(2):
        killed = [sys.executable, str(KILLED), journal.name, "3", *arguments]
        assert subprocess.run(killed, capture_output=True, timeout=240).returncode == -signal.SIGKILL
        with journal.open("ab") as half:
            half.write(b'{"dataset": "d", "asked": ')
    assert read_verdicts(out) == []
    kept = journal.read_bytes().count(b"\n") - 1
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    total = answered(table_rows(6))
    asked = json.loads(done.stdout)["asked"]
    assert (asked["answers"], asked["there"], asked["calls"]) == (total, kept, total - kept)
    assert 0 < kept < total
    assert f"of {total} verdicts {kept} are there, {total - kept} calls give the others" in done.stderr
    assert not journal.exists()
    added(whole, tiny_catalogue)
    assert [replace(row, seconds=0) for row in read_verdicts(out)] == [
        replace(row, seconds=0) for row in read_verdicts(whole)
    ]


def test_a_verifier_added_to_a_killed_run_keeps_its_answers(
    tmp_path: Path, tiny_catalogue_file: Path
) -> None:
    file, out = question_file(tmp_path, 6), tmp_path / "known.jsonl"
    settings = ["--model", "tiny-small", "--strategy", "chat", "--max-tokens", "20", "--slots", "1"]
    arguments = command(tiny_catalogue_file, file, out, *settings)
    killed = [sys.executable, str(KILLED), f"{out.name}.journal", "4", *arguments]
    assert subprocess.run(killed, capture_output=True, timeout=240).returncode == -signal.SIGKILL
    lines = Path(f"{out}.journal").read_text().splitlines()[1:]
    assert len(lines) > 1
    done = CliRunner().invoke(app, [*arguments, "--verifier", "tiny-large"], catch_exceptions=False)
    payload = json.loads(done.stdout)
    assert payload["outcomes"] == 6
    assert "asked" not in payload
    rows = {row.question_id: row for row in read_outcomes(out)}
    for line in lines:
        record = json.loads(line)
        assert rows[record["question_id"]].seconds == record["seconds"], "it was measured once"
    assert len(read_verdicts(out)) == payload["verdicts"] == answered(list(rows.values()))
