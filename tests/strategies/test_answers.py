"""Reading and comparing answers: tables of cases, and properties on arbitrary text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from viaticum.strategies.answers import agreement, equivalent, normalise, read_answer
from viaticum.types import ANSWER_KINDS, AnswerKind


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3 * 4 = 12 apples.\nThe answer is 12.", "number", "12"),
        ("The answer is $1,200.00.", "number", "1200"),
        ("The answer is 5 + 3 = 8 apples.", "number", "8"),
        ("**The final answer is: 1,234**", "number", "1234"),
        ("So we get \\boxed{\\frac{3}{4}}.", "number", "0.75"),
        ("Therefore $\\boxed{12 \\text{ cm}}$.", "auto", "12"),
        ("The answer is \\(\\boxed{72}\\).", "auto", "72"),
        ("Cost: \\boxed{\\$1{,}500}", "auto", "1500"),
        ("tulips: 12 * 9 = 108\n#### 108", "number", "108"),
        ("#### -5", "auto", "-5"),
        ("### Answer\n\n42", "auto", "42"),
        ("Answer: -$5.50", "auto", "-5.5"),
        ("The answer is −7.", "number", "-7"),
        ("The answer is 50%.", "auto", "50"),
        ("The answer is 2 1/2 cups.", "auto", "2.5"),
        ("The answer is 1/3.", "number", "1/3"),
        ("The answer is 1.5e3.", "number", "1500"),
        ("The answer is 2.5 million dollars.", "auto", "2500000"),
        ("The answer is .5", "number", "0.5"),
        ("The answer is 3. Then I check: 4 is wrong.", "auto", "3"),
        ("The answer is 10.\nWait, no. The answer is 12.", "auto", "12"),
        ("She has 3 apples, then 7 in all.", "number", "7"),
        ("6 - 2 = 4", "number", "4"),
        ("Rosa is 22 years old.", "auto", "22"),
        ("Total cost: $120.00", "auto", "120"),
        ("22.0", "auto", "22"),
        ("Paris", "auto", "Paris"),
        ("Apollo 11", "auto", "Apollo 11"),
        ("The answer is July 4, 1999.", "auto", "July 4, 1999"),
        ("The answer is Paris. It is the capital.", "text", "Paris"),
        ("The answer is St. Louis.", "text", "St. Louis"),
        ("It rains.\nThe answer is (B) because it rains.", "choice", "B"),
        ("\\boxed{C}", "choice", "C"),
        ("Option D fits best.", "choice", "D"),
        ("b", "choice", "B"),
        ("The answer is yes.", "boolean", "yes"),
        ("No, it does not, even if some say yes.", "boolean", "no"),
        ("The answer is False.", "boolean", "no"),
        ("nothing to count here", "number", None),
        ("", "auto", None),
        ("The answer is", "number", None),
        ("5/0", "number", None),
        ("The answer is 3 × 10^8 m/s.", "auto", "300000000"),
        ("\\boxed{1.2 \\times 10^{-3}}", "number", "0.0012"),
        ("about 5·10⁶ people", "number", "5000000"),
        ("The answer is 3/4 * 10^2.", "number", "0.75"),
        ("The answer is -2½ cups.", "number", "-2.5"),
        ("The answer is 72^\\circ.", "auto", "72"),
        ("The answer is 12 cm^2.", "auto", "12"),
        ("The answer is $2\\sqrt{3}$.", "auto", "2\\sqrt{3}"),
        ("\\boxed{12x+3}", "auto", "12x+3"),
        ("The answer is x = 5.", "auto", "5"),
        ("The answer is x + 5 = 20, x = 15.", "auto", "15"),
        ("The answer is x = 3, y = 4.", "auto", "x = 3, y = 4"),
        ("\\boxed{(2, 3)}", "auto", "(2, 3)"),
        ("The answer is x = 5, y = 2x + 1.", "auto", "x = 5, y = 2x + 1"),
        ("The answer is \\(\\frac{\\sqrt{3}}{2}\\).", "expression", "\\frac{\\sqrt{3}}{2}"),
        ("The answer is $x^2 + 1$. It is even.", "expression", "x^2 + 1"),
        ("We need $x$, and find \\[ x = 2\\pi. \\]", "expression", "x = 2\\pi"),
        ("2x + 1", "expression", "2x + 1"),
        ("", "expression", None),
        ("The answer is July 4, 1999.", "date", "1999-07-04"),
        ("Born on the 4th of July, 1999 in Ulm; the answer is above.", "date", "1999-07-04"),
        ("He was born in Ulm on 4 July 1999 and died there.", "date", "1999-07-04"),
        ("1999/7/4", "date", "1999-07-04"),
        ("\\boxed{2024-02-29}", "date", "2024-02-29"),
        ("#### 12/31/1999", "date", "1999-12-31"),
        ("#### 31/12/1999", "date", "1999-12-31"),
        ("#### 4.7.1999", "date", "1999-07-04"),
        ("Answer: July 1999", "date", "1999-07"),
        ("Answer: Feb. 29", "date", "--02-29"),
    ],
)
def test_reads(text: str, kind: AnswerKind, value: str | None) -> None:
    assert read_answer(text, kind) == value


def test_a_guess_can_be_left_out() -> None:
    assert read_answer("3 * 4 = 12 apples, and then", "number", marked_only=True) is None
    assert read_answer("The answer is 12. And th", "number", marked_only=True) == "12"


@pytest.mark.parametrize(
    ("a", "b", "kind", "same"),
    [
        ("1,200.00", "1200", "number", True),
        ("50%", "50", "number", True),
        ("3/4", "0.75", "number", True),
        ("$5", "5 dollars", "number", True),
        ("$5", "5 dollars", "auto", True),
        ("0.30000000000000004", "0.3", "number", True),
        ("1/3", "0.333333333", "number", True),
        ("1/3", "0.33", "number", False),
        ("-5", "5", "number", False),
        ("10", "100", "auto", False),
        ("12", "12.0", "auto", True),
        ("7 of 9", "7", "auto", False),
        ("Room 5", "5", "auto", False),
        ("Paris.", "paris", "auto", True),
        ("the Nile", "Nile", "text", True),
        ("5", "5.0", "text", False),
        ("(b)", "B", "choice", True),
        ("A", "B", "choice", False),
        ("True", "yes", "boolean", True),
        ("no", "yes", "boolean", False),
        ("3 × 10^8", "300,000,000", "auto", True),
        ("3\\cdot10^{-2}", "0.03", "number", True),
        ("12 cm^2", "12", "auto", True),
        ("12x", "12", "auto", False),
        ("July 4, 1999", "1999-07-04", "auto", True),
        ("Sunday, the 4th of July 1999", "7/4/1999", "date", True),
        ("July 1999", "July 4, 1999", "date", False),
        ("4 July", "July 4th", "date", True),
        ("2023-02-29", "February 29, 2023", "date", False),
        ("1999", "1999-01-01", "auto", False),
        ("\\frac{\\sqrt{3}}{2}", "$\\sqrt{3}/2$", "expression", True),
        ("\\dfrac{1}{2}", "0.5", "expression", True),
        ("(x+1)^2", "x^2 + 2x + 1", "expression", True),
        ("(x+1)^2", "x^2 + 1", "expression", False),
        ("sin(x)^2 + cos(x)^2", "1", "expression", True),
        ("2*pi", "2π", "auto", True),
        ("x^10", "x^{10}", "auto", True),
        ("x = 5", "5", "auto", True),
        ("x = 5", "y = 5", "expression", False),
        ("[2, \\infty)", "x ≥ 2", "expression", True),
        ("\\{1, 2\\}", "\\{2, 1\\}", "expression", True),
        ("(1, 2)", "(2, 1)", "expression", False),
        ("3 \\text{ cm}", "3", "expression", True),
        ("listen", "silent", "expression", False),
        ("listen", "silent", "auto", False),
        ("1-2", "-1", "auto", False),
        ("(2,3)", "(2, 3)", "auto", True),
        ("(2, 3)", "[2, 3)", "auto", False),
        ("x+1", "X + 1", "auto", True),
    ],
)
def test_compares(a: str, b: str, kind: AnswerKind, same: bool) -> None:
    assert equivalent(a, b, kind) is same
    assert equivalent(b, a, kind) is same


def test_no_answer_equals_no_answer_alone() -> None:
    assert equivalent(None, None)
    assert not equivalent(None, "5")
    assert not equivalent("", None)


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        (["12", "$12.00", "13", None], 0.5),
        (["5", "5", "5.0"], 1.0),
        (["1", "2"], 0.5),
        ([None, None], 0.0),
        ([], 0.0),
    ],
)
def test_agreement(answers: list[str | None], share: float) -> None:
    assert agreement(answers, "number") == share


def test_normal_forms() -> None:
    assert normalise("$1,200.50", "number") == "1200.5"
    assert normalise("(c) blue", "choice") == "C"
    assert normalise("Yes!", "auto") == "yes"
    assert normalise("  The  Nile. ", "text") == "nile"
    assert normalise("...", "text") == "..."


ANSWERLIKE = st.one_of(
    st.text(max_size=200),
    st.text(alphabet="0123456789.,-+/%$eE= \\{}()ABCabcyesnoframx\n#*:", max_size=120),
    st.sampled_from(["The answer is ", "\\boxed{", "#### ", "1" * 400, "1e9999", "1,2,3", "٣/٤", "-$5", "½"]),
)


@given(ANSWERLIKE, ANSWERLIKE, st.sampled_from(ANSWER_KINDS))
@settings(max_examples=300, deadline=None)
def test_any_text_can_be_read_and_compared(a: str, b: str, kind: AnswerKind) -> None:
    read_answer(a + b, kind)
    read_answer(a, kind, marked_only=True)
    assert isinstance(normalise(a, kind), str)
    assert equivalent(a, a, kind)
    assert equivalent(a, b, kind) == equivalent(b, a, kind)
    assert 0.0 < agreement([a, b, a], kind) <= 1.0


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=3))
@settings(max_examples=100, deadline=None)
def test_a_number_reads_back_as_itself(number: object) -> None:
    value = read_answer(f"The answer is {number:,}.", "number")
    assert value is not None
    assert equivalent(value, str(number), "number")


@pytest.mark.parametrize(
    "text",
    [
        "#" * 10**6,
        "\\boxed{" * 10**5,
        "1," * 10**6,
        "answer is " * 10**5,
        "{" * 10**6,
        "-" * 10**6,
        "a " * 10**6,
        "\\text{" * 10**5,
        "1 1/" * 10**5,
        "9" * 10**6,
        "(A" * 10**5,
        "$-" * 10**5,
        "1e1" * 10**5,
        "The answer is 1\nQ: " * 10**4,
        "\\boxed{1} and " * 10**5,
        "three and a half " * 10**4,
    ],
    ids=lambda text: text[:8],
)
def test_long_text_takes_no_time(text: str) -> None:
    started = time.process_time()
    for kind in ANSWER_KINDS:
        read_answer(text, kind)
        equivalent(text, text + "x", kind)
    # Linear work takes about 0.1 s here; backtracking would take minutes.
    assert time.process_time() - started < 5.0
