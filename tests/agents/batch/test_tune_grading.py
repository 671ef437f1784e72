"""Grading answers without a known one for `tune`: by pairs of answers, and by the agreement of pairs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from synthetic_outcomes import WORDS, Words
from tune_job import bought
from tune_models import model, questions, right, says, tuning

from viaticum.agents.batch.tune_agreement import agreed_answer
from viaticum.agents.batch.tune_pairwise import read_choice
from viaticum.agents.batch.tune_report import conclude, table_path
from viaticum.catalogue import Catalogue
from viaticum.commands.tune_page import judge_sentence, mark_sentence, write_tuning_page
from viaticum.errors import InputError
from viaticum.models.base import Generation
from viaticum.models.scripted import ScriptedModel
from viaticum.models.settings import judge_settings
from viaticum.outcomes import outcome_rows
from viaticum.strategies.verify import read_verdict, verdict_of
from viaticum.types import Message

pytestmark = pytest.mark.usefixtures("one_thread")


def compares(messages: Sequence[Message], generation: Generation) -> str:
    """The right answer is better; where none of them is, the first one is, in either order."""
    text = str(messages[-1]["content"])
    second = re.findall(r'\nB: "(-?\d+)"', text)[0]
    if right(text) == second:
        return "The second is right.\nB"
    return "The first is.\nA"


def judged(folder: Path, known: int = 0, script: Any = compares, **changed: Any) -> Any:
    given = {
        "some": model("some", says("sums", "games"), "1"),
        "all": model("all", says(*WORDS), "10"),
        "judge": model("judge", script, "1"),
    }
    settings = {"judge": "judge", "grading": "pairwise", "given": given} | changed
    return tuning(folder, questions(known=known), **settings)


def calls(job: Any) -> int:
    judge = job.workflow.models["judge"]
    assert isinstance(judge, ScriptedModel)
    return len(judge.calls)


def test_by_pairs_the_answer_that_is_better_in_both_orders_is_right(tmp_path: Path) -> None:
    job = judged(tmp_path)
    found = bought(job)
    assert found.judged is not None
    assert found.judged.grader == "judge judge, by pairs,"
    assert found.judged.ungraded == 0
    kin = range(list(WORDS).index("kin"), 48, 3)
    by_pair = {(row.question_id, row.model): row.correct for row in found.outcomes}
    asked = {question for question, _ in by_pair}
    assert asked
    for number in range(48):
        if f"q{number}" in asked:
            assert by_pair[f"q{number}", "all"] is True
            if (f"q{number}", "some") in by_pair:
                assert by_pair[f"q{number}", "some"] is (number not in kin)
    different = sum((f"q{number}", "some") in by_pair for number in kin)
    assert calls(job) == 2 * different, "equal answers are not compared, others in both orders"


def test_by_pairs_a_judge_that_prefers_a_place_ties(tmp_path: Path) -> None:
    found = bought(judged(tmp_path, script="I like the first.\nA"))
    assert found.outcomes
    assert all(row.correct for row in found.outcomes)


def test_by_pairs_an_answer_without_a_verdict_is_no_outcome(tmp_path: Path) -> None:
    found = bought(judged(tmp_path, script="I had rather not say."))
    assert found.judged is not None
    assert found.judged.ungraded > 0
    assert not {row.question_id for row in found.outcomes if row.model == "some"} & {
        f"q{number}" for number in range(list(WORDS).index("kin"), 48, 3)
    }


def test_by_pairs_the_judge_is_compared_with_known_answers_and_paid_once(tmp_path: Path) -> None:
    first = bought(judged(tmp_path, known=24))
    assert first.judged is not None
    assert first.judged.checked > 10
    assert first.judged.agreeing == first.judged.checked
    again = judged(tmp_path, known=24)
    second = bought(again)
    assert second.cost_nanousd == first.cost_nanousd
    assert second.outcomes == first.outcomes
    assert calls(again) == 0
    with pytest.raises(InputError, match="another grading: 'pairwise' then, None now"):
        bought(judged(tmp_path, known=24, grading="rubric"))


def test_the_choice_is_the_last_word_on_its_own() -> None:
    assert read_choice("A is longer, but B is right.\nB") == "B"
    assert read_choice("Both say 4.\n**TIE**") == "TIE"
    assert read_choice("Verdict: A.") == "A"
    assert read_choice("Both say 4.\nTie") == "TIE"
    assert read_choice("It has it all.\nAnswer B") == "B"
    assert read_choice("I cannot choose A or B") is None
    assert read_choice("B is right, and A") is None


@pytest.mark.parametrize(
    "text",
    [
        "RIGHT or WRONG",  # the end of the prompt once more
        "WRONG or RIGHT",
        "RIGHT/WRONG",
        "neither WRONG nor RIGHT",
        "I cannot say whether it is RIGHT",
        "It cannot be RIGHT",
        "It isn't really RIGHT",
        "PARTLY RIGHT",
        "Not entirely RIGHT.",
        "It would be WRONG to call it RIGHT",
        "Is it RIGHT?",
        "not\nRIGHT",
        "RIGHT or\nWRONG",
        "not WRONG",
        "RIGHT?",
        "It is not 100% RIGHT",
        "I do not think that the answer is RIGHT",
        "It does not add up, so I cannot call it RIGHT",
        "I am not so sure that it is RIGHT",
        "RIGHT if it is 5, otherwise WRONG",
        "It is wrong to call it RIGHT",
        "right/WRONG",
        "",
    ],
)
def test_a_verdict_that_is_taken_back_or_asked_for_is_none(text: str) -> None:
    assert read_verdict(text) is None


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("The sum is 12 and not 15 so the answer is WRONG", False),
        ("The answer doesn't account for tax so it is WRONG", False),
        ("The answer is wrong - WRONG", False),
        ("48 + 24 is 72 (not 70) - WRONG", False),
        ("48 + 24 is 72, not 70 \u2192 WRONG", False),
        ("The sum is not 15 and the answer is WRONG", False),
        ("It does not have the unit and is therefore WRONG", False),
        ("The method is right but the answer is WRONG", False),
        ("The unit is not given\u2014WRONG", False),
        ("This is the right answer - RIGHT", True),
        ("It does not matter how it is written because the sum of the parts is RIGHT", True),
    ],
)
def test_a_verdict_after_a_reason_on_its_line_counts(text: str, verdict: bool) -> None:
    """Reasons deny something more often where the verdict is WRONG: to drop them would favour RIGHT."""
    assert read_verdict(text) is verdict
    assert verdict_of(text, "length") is None


def test_a_verdict_counts_of_a_call_that_came_to_its_end() -> None:
    """What is cut at the token limit can end in the word by chance; a refusal says nothing either."""
    assert verdict_of("It is 5, not 4, so it is RIGHT", "stop") is True
    for ended in ("length", "loop", "aborted", "error", "refused", "tool_calls"):
        assert verdict_of("The task is to say whether it is\nRIGHT", ended) is None


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("I cannot help with that.", "it says 'I cannot help with that.'"),
        ("word " * 700 + "\nRIGHT", "its text was cut at the token limit"),
    ],
)
@pytest.mark.parametrize("grading", ["rubric", "pairwise"])
def test_a_judge_that_gives_no_verdict_ends_the_buying(
    tmp_path: Path, script: str, why: str, grading: str
) -> None:
    """Answers that nobody can grade are worth nothing; the reason is told, and nothing is paid twice."""
    found = []
    for _ in range(2):
        given = {
            "some": model("some", says("sums"), "1"),
            "all": model("all", says(*WORDS), "10"),
            "judge": model("judge", script, "1"),
        }
        job = tuning(tmp_path, questions(known=0), judge="judge", grading=grading, given=given)
        found.append(bought(job))
    first, again = found
    assert first.judged is not None
    assert first.judged.mute == why
    assert f"buying ended, as no call of it gave one: {why}" in judge_sentence(first.judged, first.pairs)
    held_out = {each.id for each in job.questions[job.learning :]}
    assert not {row.question_id for row in first.outcomes} & held_out
    assert given["judge"].calls == []
    assert again.cost_nanousd == first.cost_nanousd


def test_a_judge_that_thinks_has_room_for_its_verdict() -> None:
    """A limit of the verdict alone would be used up by the thought."""
    specs = {name: model(name, "RIGHT", "1").spec for name in ("plain", "deepseek-r1")}
    specs["deepseek-r1"] = specs["deepseek-r1"].model_copy(update={"thinking": "think"})
    listed = Catalogue(specs.values())
    assert judge_settings(listed, "plain").max_new_tokens == 512
    thinks = judge_settings(listed, "deepseek-r1")
    assert thinks.max_new_tokens is not None
    assert thinks.max_new_tokens > 2000
    assert thinks.temperature == 0.0


# --- without a judge ----------------------------------------------------------------------------------------


def three(folder: Path, known: int = 0, **changed: Any) -> Any:
    """Two models that know everything but games, and one that knows games alone."""
    given = {
        "one": model("one", says("sums", "kin"), "1"),
        "two": model("two", says("sums", "kin"), "5"),
        "odd": model("odd", says("games"), "10"),
    }
    settings = {"grading": "agreement", "given": given, "models": [*given]} | changed
    return tuning(folder, questions(known=known), **settings)


def test_what_most_of_the_strongest_pairs_say_is_right(tmp_path: Path) -> None:
    job = three(tmp_path)
    forecast = job.forecast()
    assert [str(each) for each in forecast.voters] == ["odd+direct", "two+direct", "one+direct"]
    found = bought(job)
    assert found.judged is not None
    assert found.judged.grader == "agreement of odd+direct, two+direct and one+direct"
    assert found.judged.checked == 0
    assert {row.question_id for row in found.outcomes if row.model == "odd" and row.correct} == set()
    assert all(row.correct for row in found.outcomes if row.model in ("one", "two"))


def test_agreement_is_compared_with_known_answers(tmp_path: Path) -> None:
    found = bought(three(tmp_path, known=36))
    assert found.judged is not None
    assert found.judged.checked > 30
    share = found.judged.agreeing / found.judged.checked
    assert 0.5 < share < 1, "on games all but the right one agree"


def test_answers_that_nobody_shares_give_no_outcome(tmp_path: Path) -> None:
    given = {name: model(name, f"The answer is {n}.", "1") for n, name in enumerate(("one", "two", "odd"))}
    found = bought(three(tmp_path, given=given))
    assert found.judged is not None
    assert not found.outcomes
    assert found.judged.ungraded > 0


@pytest.mark.parametrize(
    ("votes", "agreed"),
    [
        (["4", "4.0", "5"], "4"),
        (["4", "5", "6"], None),
        (["4"], None),
        (["4", "4", "5", "5"], None),
        ([], None),
    ],
)
def test_two_have_to_agree_and_more_than_any_others(votes: list[str], agreed: str | None) -> None:
    assert agreed_answer(votes, "number") == agreed


def test_every_figure_that_rests_on_agreement_is_marked(tmp_path: Path) -> None:
    job = three(tmp_path)
    forecast, found = job.forecast(), bought(job)
    result = conclude(found, job.out, Words(), {})
    assert found.judged is not None
    assert result.judged == result.questions > 0
    assert mark_sentence(result).startswith("* agreement of odd+direct, two+direct and one+direct graded")
    assert "known answers is unknown: no question has one" in judge_sentence(found.judged, found.pairs)
    path = write_tuning_page(job.out, forecast, found, result)
    assert path is not None
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", path.read_text()))
    shares = re.findall(r"\d+\.\d%\*?(?= \()", text)
    assert shares
    assert all(each.endswith("*") for each in shares)
    rows = [row for _, row in outcome_rows(table_path(job.out))]
    assert {row["graded_by"] for row in rows} == {found.judged.grader}


def test_ways_of_grading_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pairwise needs a judge"):
        judged(tmp_path, judge=None)
    with pytest.raises(InputError, match="agreement needs no judge"):
        judged(tmp_path, grading="agreement")
    with pytest.raises(InputError, match="grading is rubric, pairwise, agreement, got 'best'"):
        judged(tmp_path, grading="best")
    with pytest.raises(InputError, match="alone agrees with itself"):
        three(tmp_path, models=["one"])
