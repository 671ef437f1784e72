"""Strategies: their messages, what they read out of realistic completions, and how a user adds one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from viaticum.errors import InputError, UnknownName
from viaticum.messages import with_history
from viaticum.strategies import Example, get, names, register, registry
from viaticum.strategies.cot import Cot
from viaticum.strategies.pot import Pot
from viaticum.strategies.programs import end_in_answer, find_program
from viaticum.strategies.sandbox import Limits
from viaticum.types import ANSWER_KINDS, AnswerKind, Completion, FinishReason, Message, Query, Reading, Usage

QUESTION = Query("Tom has 3 bags of 4 apples. How many apples does he have?")
ALL = ("direct", "cot", "cod", "pot", "least-to-most", "faithful-cot")
DOCS = Path(__file__).resolve().parents[2] / "docs" / "reference" / "strategies.md"


def reading(name: str, text: str, kind: AnswerKind = "auto", finish: FinishReason = "stop") -> Reading:
    return get(name).read(Completion(text, Usage(), finish), replace(QUESTION, kind=kind))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ANSWER_KINDS)
def test_messages_are_a_chat_that_every_template_takes(name: str, kind: AnswerKind) -> None:
    messages = get(name).messages(replace(QUESTION, kind=kind))
    roles = [message["role"] for message in messages]
    assert roles[0] == "system"
    assert roles[1:] == ["user", "assistant"] * ((len(roles) - 2) // 2) + ["user"]
    assert messages[-1]["content"].startswith(QUESTION.text)
    assert all(message["content"].strip() == message["content"] for message in messages)
    assert sum(len(message["content"]) for message in messages) < 4_500


@pytest.mark.parametrize("name", ALL)
def test_a_strategy_says_what_it_is(name: str) -> None:
    strategy = get(name)
    assert strategy.name == name
    assert 40 < len(strategy.description) < 300
    assert strategy.max_new_tokens is None or 0 < strategy.max_new_tokens <= 400
    assert strategy.needs <= {"sandbox"}
    assert f"| `{name}` |" in DOCS.read_text(encoding="utf-8")


def test_the_kind_of_answer_is_asked_for() -> None:
    assert "yes or no" in Cot().messages(Query("Is it?", "boolean"))[-1]["content"]
    assert "letter" in Cot().messages(Query("Which?", "choice"))[-1]["content"]


@pytest.mark.parametrize("name", ["cot", "cod", "pot", "least-to-most", "faithful-cot"])
def test_each_worked_example_reads_as_its_own_answer(name: str) -> None:
    """The prompt shows only what `read` understands, and every program in it runs."""
    replies = [
        message["content"] for message in get(name).messages(QUESTION) if message["role"] == "assistant"
    ]
    gold = {
        "cot": ["65", "120", "4", "360"],
        "cod": ["175", "5", "22"],
        "pot": ["65", "120", "4", "360", "156", "33", "44", "15"],
        "least-to-most": ["64", "38", "40"],
        "faithful-cot": ["170", "7", "123"],
    }
    # Such texts have about 3 characters a token, so a reply ends well within its limit.
    assert all(len(reply) <= 2 * (get(name).max_new_tokens or 400) for reply in replies)
    assert [reading(name, reply).value for reply in replies] == gold[name]


def test_a_variant_is_one_call() -> None:
    variant = replace(Cot(), system="Think.", examples=(Example("1 + 1?", "The answer is 2."),))
    assert [message["content"] for message in variant.messages(QUESTION)][:3] == [
        "Think.",
        "1 + 1?",
        "The answer is 2.",
    ]
    assert variant.name == "cot"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("direct", "12", "12"),
        ("direct", "12 apples.", "12"),
        ("direct", "Paris", "Paris"),
        ("cot", "Each bag has 4.\nSo 3 * 4 = 12.\nThe answer is 12.", "12"),
        ("cot", "3 bags of 4 make \\(3 \\times 4 = 12\\).\n\nThe final answer is: $\\boxed{12}$", "12"),
        ("cot", "Tom has 3 bags.\nIn all he has 12 apples.", "12"),
        ("cod", "apples: 3 * 4 = 12\n#### 12", "12"),
        (
            "least-to-most",
            "Subquestions:\n1. How many bags?\n2. How many apples?\nAnswers:\n1. 3.\n2. 3 * 4 = 12 apples.\n"
            "The answer is 12.",
            "12",
        ),
        (
            "faithful-cot",
            "```python\n# 1. How many? (fact: 3 bags of 4)\nanswer = 3 * 4\nprint(answer)\n```",
            "12",
        ),
        ("faithful-cot", "# 1. How many apples? (fact: 3 bags of 4)\nanswer = 3 * 4", "12"),
        ("pot", "```python\nbags = 3\nper_bag = 4\nanswer = bags * per_bag\nprint(answer)\n```", "12"),
        ("pot", "```python\nbags = 3\nanswer = bags * 4\nprint(answer)", "12"),
        ("pot", "Here it is:\n\n```python\nprint(3 * 4)\n```\n\nIt prints:\n\n```\n99\n```", "12"),
        ("pot", "bags = 3\nprint(bags * 4)", "12"),
        ("pot", "```python\ndef solution():\n    bags = 3\n    return bags * 4\n```", "12"),
        ("pot", "```python\ndef solution():\n    return 3 * 4\n\nanswer = solution()\n```", "12"),
        ("pot", "```python\ndef main():\n    print(12)\n\nif __name__ == '__main__':\n    main()\n```", "12"),
        ("pot", "```python\ndef solve():\n    print('Apples:', 3 * 4)\n```", "12"),
        ("pot", "```python\nbags = 3\nanswer = bags * 4\nleft = 0\n```", "12"),
        ("pot", "```python\nbags = 3\napples = bags * 4\n```", "12"),
        (
            "pot",
            "```py\nfor bag in range(3):\n    print(4 * bag)\nprint(f'Total: {12:.2f} apples')\n```",
            "12",
        ),
    ],
)
def test_reads(name: str, text: str, value: str) -> None:
    assert reading(name, text) == Reading(value)


@pytest.mark.parametrize("name", ["pot", "faithful-cot"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no program in the text"),
        ("Tom has twelve apples.", "no program in the text"),
        ("```python\n```", "no program in the text"),
        ("```python\nprint(3 / 0)\n```", "the program raised ZeroDivisionError: division by zero"),
        ("```python\nif True:\n    pass\n```", "the program printed nothing"),
        ("```python\nprint(3 *\n```", "the program is not valid Python: "),
        (
            "```python\nimport no_such_module\nprint(1)\n```",
            "the program raised ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("```python\n" + "x = 1\n" * 5_000 + "```", "the program is longer than 20000 characters"),
    ],
)
def test_a_program_without_an_answer_says_why(name: str, text: str, reason: str) -> None:
    result = reading(name, text)
    assert result.value is None
    assert result.reason.startswith(reason)


def test_an_endless_program_is_no_answer() -> None:
    completion = Completion("```python\nwhile True:\n    pass\n```", Usage(), "stop")
    pot = Pot(limits=Limits(seconds=0.1))
    assert pot.read(completion, QUESTION) == Reading(None, "the program was stopped after 0.1 s")


@pytest.mark.parametrize("name", ["direct", "cot", "cod", "least-to-most"])
def test_the_last_number_of_a_cut_text_is_no_answer(name: str) -> None:
    cut = reading(name, "Each bag has 4 apples, so 3", finish="length")
    assert cut == Reading(None, "the text ended before a final answer (finish reason length)")
    assert reading(name, "The answer is 12.\nLet us check: 3", finish="length") == Reading("12")


def test_a_cut_program_says_that_it_was_cut() -> None:
    cut = reading("pot", "```python\nbags = 3\nprint(bags *", finish="length")
    assert cut.value is None
    assert cut.reason.endswith("; the text was cut (finish reason length)")
    assert reading("pot", "```python\nprint(12)\n```\nThis", finish="length") == Reading("12")


def test_text_without_an_answer_says_so() -> None:
    assert reading("cot", "I cannot say.", "number") == Reading(None, "no answer in the text")


def test_a_wrong_answer_is_read_as_it_stands() -> None:
    assert reading("cot", "3 + 4 = 7. The answer is 7.") == Reading("7")


@pytest.mark.parametrize(
    ("program", "ends"),
    [
        ("answer = 5", "answer"),
        ("result = 5\nother = 6", "result"),
        ("def solution(n=1):\n    return n", "solution()"),
        ("def solution(n):\n    return n\ntotal = solution(2)", "total"),
        ("answer: int = 5\nanswer += 1", "answer"),
        ("5 + 5", "5 + 5"),
        ("print(5)", "print(5)"),
        ("def f(:", "def f(:"),
        ("", ""),
    ],
)
def test_a_program_is_made_to_end_in_its_answer(program: str, ends: str) -> None:
    assert end_in_answer(program).strip().endswith(ends)


def test_the_last_python_block_is_the_program() -> None:
    text = "```python\nfirst = 1\n```\nBetter:\n```python\nsecond = 2\n```\n```text\nthird = 3\n```"
    assert find_program(text) == "second = 2\n"


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_strategies", dict(registry._strategies))


@pytest.mark.usefixtures("_own_registry")
def test_a_user_adds_a_strategy_in_ten_lines() -> None:
    """The example of the documentation, as it stands there."""
    source = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[0]
    before, added, after = source.partition("class ")
    assert len([line for line in (added + after).splitlines() if line.strip()]) <= 10, before
    exec(source, {"__name__": "example"})
    assert names() == (*ALL, "think", "chat", "recall")
    assert get("recall").messages(QUESTION)[-1]["content"] == QUESTION.text
    assert reading("recall", "A bag holds 4.\nThe answer is 12.") == Reading("12")
    assert get("self-consistency:recall:3").samples == 3


def test_an_unknown_name_points_to_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'cot'"):
        get("cott")


@pytest.mark.parametrize(("name", "description"), [("", "x"), ("a+b", "x"), (" cot", "x"), ("mute", "")])
def test_a_strategy_needs_a_name_and_a_description(name: str, description: str) -> None:
    class Odd(Cot):
        pass

    Odd.name, Odd.description = name, description
    with pytest.raises(InputError):
        register(Odd())


def test_chat_passes_the_question_on_and_takes_the_whole_reply() -> None:
    chat = get("chat")
    assert chat.messages(QUESTION) == [{"role": "user", "content": QUESTION.text}]
    assert reading("chat", " Well,\nit depends. ", finish="length") == Reading("Well,\nit depends.")
    assert reading("chat", " \n").reason == "the model wrote nothing"
    assert not chat.graded
    assert [name for name in names() if not get(name).graded] == ["chat"]


def test_a_conversation_joins_the_messages_of_a_strategy_as_one_chat() -> None:
    own: list[Message] = [{"role": "system", "content": "A"}, {"role": "user", "content": "Q"}]
    assert with_history((), own) == own
    before: list[Message] = [
        {"role": "user", "content": "1"},
        {"role": "system", "content": "B"},
        {"role": "user", "content": "2"},
    ]
    assert with_history(before, own) == [
        {"role": "system", "content": "A\n\nB"},
        {"role": "user", "content": "1\n\n2\n\nQ"},
    ]
    answered: list[Message] = [*before, {"role": "assistant", "content": "3"}]
    assert [each["role"] for each in with_history(answered, own[1:])] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
