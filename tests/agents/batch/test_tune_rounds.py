"""Buying outcomes for `tune` of scripted, free and local models; with a judge, and with little time."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from synthetic_outcomes import WORDS, Words
from tune_job import bought
from tune_models import model, questions, right, says
from tune_models import tuning as opened

from viaticum.agents.batch.tune import Tuning
from viaticum.agents.batch.tune_report import conclude
from viaticum.agents.batch.tune_rounds import buy
from viaticum.catalogue import Catalogue
from viaticum.errors import DataError, InputError
from viaticum.generation import GenerationSettings
from viaticum.models.base import Generation
from viaticum.models.scripted import ScriptedModel
from viaticum.questions import Question
from viaticum.strategies.verify import read_verdict
from viaticum.types import Message, Query

pytestmark = pytest.mark.usefixtures("one_thread")


def judges(messages: Sequence[Message], generation: Generation) -> str:
    """Right, but for names that end in 9, which it takes for wrong."""
    text = str(messages[-1]["content"])
    wanted, given = right(text), re.findall(r'Answer: "(\d+)"', text)[0]
    return f"Because I say so.\n{'RIGHT' if wanted == given and wanted[-1] != '9' else 'WRONG'}"


def tuning(folder: Path, asked: Sequence[Question] | None = None, **changed: Any) -> Tuning:
    """As `opened`, with a judge among the models."""
    price = changed.pop("price", "1")
    given = {
        "some": model("some", says("sums", "games"), price, changed.pop("pause", 0.0)),
        "all": model("all", says(*WORDS), "10" if price != "0" else "0"),
        "judge": model("judge", judges, price),
    }
    return opened(folder, asked or questions(), **{"given": given} | changed)


def test_no_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no questions"):
        Tuning.open([], tmp_path / "router", budget="1")


def test_questions_made_from_a_template_are_on_both_sides(tmp_path: Path) -> None:
    asked = [Question(str(n), Query(f"Ann has {n} of the name{n} apples."), str(n)) for n in range(100)]
    asked.append(Question("again", asked[0].query, "0"))
    job = tuning(tmp_path, asked)
    assert 25 <= len(job.questions) - job.learning <= 30
    texts = {each.query.text for each in job.questions[: job.learning]}
    assert not texts & {each.query.text for each in job.questions[job.learning :]}


def test_free_models_are_asked_everything_and_compared_by_accuracy(tmp_path: Path) -> None:
    job = tuning(tmp_path, price="0")
    assert job.forecast().cost_p90 == 0
    found = bought(job)
    assert found.cost_nanousd == 0
    assert [str(each) for each in found.remaining] == ["all+direct"]
    assert [str(found.pairs[each.pair]) for each in found.dropped] == ["some+direct"]
    result = conclude(found, job.out, Words(), {})
    assert "only pair left" in result.why
    assert not job.out.exists()


class Counted(ScriptedModel):
    """Counts how often its worst case was asked for."""

    forecasts = 0

    def worst_case(self, *arguments: Any, **named: Any) -> Any:
        self.forecasts += 1
        return super().worst_case(*arguments, **named)


def test_what_a_run_will_cost_is_computed_once(tmp_path: Path) -> None:
    counted = Counted("The answer is 1.", spec=model("some", "42", "1").catalogue_entry())
    job = tuning(tmp_path, given={"some": counted}, models=["some"])
    forecast = job.forecast()
    assert isinstance(forecast.cost_p90, int)
    before = counted.forecasts
    found = buy(job, forecast, Words()([each.query.text for each in job.questions[: job.learning]]).numpy())
    assert counted.forecasts - before == len(found.outcomes)


def with_figures(names: dict[str, float], **prices: str) -> dict[str, ScriptedModel]:
    """Models that know all kinds, with a public figure each."""
    made = {}
    for name, figure in names.items():
        each = model(name, says(*WORDS), prices.get(name, "1"))
        spec = each.catalogue_entry().model_copy(update={"benchmarks": {"mmlu-pro": figure}})
        made[name] = ScriptedModel(says(*WORDS), spec=spec)
    return made


def test_the_first_round_asks_the_most_promising_pair_first_and_a_hopeless_one_nothing(
    tmp_path: Path,
) -> None:
    given = with_figures({"weak": 0.2, "fair": 0.6, "good": 0.9}, weak="10")
    job = tuning(tmp_path, given=given, models=[*given], strategies=["cot"], concurrency=1)
    forecast = job.forecast()
    assert [str(job.pairs[each]) for each in forecast.screen.order()] == ["good+cot", "fair+cot", "weak+cot"]
    found = buy(job, forecast, Words()([each.query.text for each in job.questions[: job.learning]]).numpy())
    assert [tuple(map(str, each)) for each in found.left_out] == [("weak+cot", "good+cot")]
    assert not given["weak"].calls
    assert {row.model for row in found.outcomes} == {"fair", "good"}
    first = json.loads((tmp_path / "my-router.job" / "rounds.jsonl").read_text().splitlines()[0])
    assert [number % 3 for number in first["cells"][:4]] == [2, 1, 2, 1]


def test_local_models_and_pairs_are_asked(tmp_path: Path, tiny_catalogue: Catalogue) -> None:
    job = tuning(
        tmp_path,
        catalogue=tiny_catalogue,
        given=None,
        models=["tiny-small", "tiny-pair"],
        generation=GenerationSettings(max_new_tokens=2),
        concurrency=8,
    )
    found = bought(job)
    assert {row.model for row in found.outcomes} == {"tiny-small", "tiny-pair"}
    assert 0 < found.cost_nanousd <= 1_000_000_000


def test_a_judge_grades_what_has_no_answer_and_is_compared_where_it_has_one(tmp_path: Path) -> None:
    job = tuning(tmp_path, questions(known=20), judge="judge")
    forecast = job.forecast()
    assert forecast.judge is not None
    assert forecast.ungraded == 28
    assert sum(forecast.prices) > sum(each.cost_p50 for each in forecast.pairs) / 1e9
    found = bought(job)
    assert found.judged is not None
    assert found.judged.outcomes == sum(row.question_id in found.judged.questions for row in found.outcomes)
    assert found.judged.ungraded == 0
    assert found.judged.checked == 20
    assert 18 <= found.judged.agreeing < 20  # it is wrong of name9 and name19, where these were right
    by_id = {row.question_id: row for row in found.outcomes if row.model == "all"}
    assert by_id["q28"].correct is False  # name29: the judge decides
    assert by_id["q29"].correct is True
    assert by_id["q8"].correct is True  # name9: the known answer decides


def test_answers_of_a_judge_are_paid_for_once(tmp_path: Path) -> None:
    first = bought(tuning(tmp_path, questions(known=20), judge="judge"))
    again = tuning(tmp_path, questions(known=20), judge="judge")
    assert bought(again).cost_nanousd == first.cost_nanousd
    assert again.workflow.models is not None
    for each in again.workflow.models.values():
        assert isinstance(each, ScriptedModel)
        assert not each.calls
    other = tuning(tmp_path, questions(known=20), judge="some")
    with pytest.raises(InputError, match="another judge: 'judge' then, 'some' now"):
        bought(other)


def test_answers_in_the_ledger_are_read_as_another_version_wrote_them(tmp_path: Path) -> None:
    first = bought(tuning(tmp_path))
    (tmp_path / "my-router.job" / "rows.jsonl").write_text("")
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as database:
        triggers = database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for (name,) in triggers:
            database.execute(f"DROP TRIGGER {name}")
        database.execute("""UPDATE holds SET result = replace(result, '": ', '":')""")
        database.commit()
    again = bought(tuning(tmp_path))
    assert not again.unanswered
    assert again.outcomes == first.outcomes
    assert again.cost_nanousd == first.cost_nanousd


def test_without_a_judge_all_questions_need_answers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"28 of 48 questions have no answer.*--judge"):
        tuning(tmp_path, questions(known=20))


def test_the_verdict_is_the_last_word() -> None:
    assert read_verdict("The answer seems WRONG, but is RIGHT.\nRIGHT") is True
    assert read_verdict("RIGHT would be 5.\n**WRONG**") is False
    assert read_verdict("Verdict: RIGHT.") is True
    assert read_verdict("It says the same.\nRight.") is True
    assert read_verdict("I cannot tell whether it is right.") is None
    assert read_verdict("Final verdict: NOT RIGHT") is None
    assert read_verdict("So it isn't RIGHT.") is None
    assert read_verdict("It is not WRONG") is None
    assert read_verdict("It is not 5.\nWRONG") is False
    assert read_verdict("Some say 4; it is not.\nRIGHT") is True
    assert read_verdict("That is not wrong, is it? No.\nRIGHT") is True
    assert read_verdict("I have to say whether it is RIGHT or") is None


def test_an_answer_without_a_verdict_is_no_outcome(tmp_path: Path) -> None:
    given = {
        "some": model("some", says("sums", "games"), "1"),
        "all": model("all", says(*WORDS), "10"),
        "judge": model("judge", "I had rather not say.", "1"),
    }
    found = bought(tuning(tmp_path, questions(known=40), judge="judge", given=given))
    assert found.judged is not None
    assert (found.judged.outcomes, found.judged.checked) == (0, 0)
    assert found.judged.ungraded == 16
    assert not found.judged.questions & {row.question_id for row in found.outcomes}


def test_where_the_time_is_up_what_was_bought_is_kept(tmp_path: Path) -> None:
    began = time.monotonic()
    job = tuning(tmp_path, pause=0.1, seconds=2.0, concurrency=1)
    found = bought(job)
    assert found.late
    assert 0 < len(found.outcomes) < 2 * 48
    assert not found.stopped
    assert bought(tuning(tmp_path)).outcomes[: len(found.outcomes)]
    assert time.monotonic() - began < 120


def test_what_cannot_be_told_apart_is_not_said_to_pay(tmp_path: Path) -> None:
    job = tuning(tmp_path, questions(60))
    found = conclude(bought(job), job.out, Words(), {})
    assert found.gain is not None
    pays = found.gain["low"] > 0
    assert bool(found.why) is not pays
