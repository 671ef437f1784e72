"""Structures of answers, and their comparison: lists, sets, intervals, equations, matrices, units, bases.

Each pair is compared both ways round.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from viaticum.strategies.answers import agreement, equivalent, expressions, group
from viaticum.strategies.answers.structures import Collection, Equation, Matrix, Union, Value, parse
from viaticum.types import AnswerKind

EQUAL = [
    ("4,7,9", "4, 7, 9"),
    ("4, 7 and 9", "9, 7, 4"),
    ("[4, 7, 9]", "4, 7, 9"),
    ("[4 7 9]", "[4, 7, 9]"),
    ("[np.int64(4), np.int64(7)]", "[4, 7]"),
    (r"\{4, 7\}", "{7, 4}"),
    (r"\{4, 4, 7\}", r"\{4, 7\}"),
    (r"\left( 2, \frac{\pi}{3} \right)", r"(2,\frac{\pi}3)"),
    (r"\langle 4, 7, 9 \rangle", "(4, 7, 9)"),
    ("[1, 6)", r"\left[1, 6\right)"),
    ("]1, 6[", "(1, 6)"),
    (r"x \in [1, 6)", "[1,6)"),
    (r"1 \le x < 6", "[1, 6)"),
    ("6 > x ≥ 1", "[1, 6)"),
    (r"t \leq 4", r"(-\infty, 4]"),
    (r"x < 1 \text{ or } x > 6", r"(6, \infty) \cup (-\infty, 1)"),
    (r"\{x \mid x > 6\}", r"(6, \infty)"),
    (r"\mathbb{R}", r"(-\infty, \infty)"),
    (r"\emptyset", "No real solutions."),
    ("x = 4 or x = -7", "-7 and 4"),
    (r"x = 4 \text{ or } -7", "x=-7, x=4"),
    (r"\pm 4", "4, -4"),
    (r"x = \pm 4", "x = -4 or x = 4"),
    (r"2 \pm \sqrt{5}", r"2+\sqrt5, 2-\sqrt5"),
    ("y = 3x + 2", "3x + 2"),
    ("y = 3x + 2", "2 + 3x = y"),
    ("3x - y + 2 = 0", "y = 3x + 2"),
    ("f(x) = x^3", "y = x^3"),
    (r"\text{Area} = 12", "12"),
    ("4 + 8 = 12", "12"),
    ("x = 4, y = 7", "y = 7, x = 4"),
    ("{x: 4, y: 7}", "x = 4, y = 7"),
    ("(x, y) = (4, 7)", "(4, 7)"),
    ("x, y = 4, 7", "x=4, y=7"),
    ("x = 4, y = 7", "4, 7"),
    ("12 (none of the others)", "12"),
    ("Matrix([[4, 7], [1, 0]])", r"\begin{pmatrix} 4 & 7 \\ 1 & 0 \end{pmatrix}"),
    (r"\begin{bmatrix}4\\7\end{bmatrix}", "(4, 7)"),
    (r"\begin{array}{cc} 4 & 7 \\ 1 & 0 \end{array}", "[[4, 7], [1, 0]]"),
    (r"2\begin{pmatrix}2\\3\end{pmatrix}", r"\begin{pmatrix}4\\6\end{pmatrix}"),
    ("2413_5", "2413_{5}"),
    (r"2413_{\text{five}}", "2413_5"),
    ("2413_5", "2413"),
    (r"\frac57", r"\dfrac{5}{7}"),
    (r"\cfrac{5}{7}", "5/7"),
    (r"13\sqrt3", r"13 \sqrt{3}"),
    (r"48\sqrt{5}cm^{3}", r"48\sqrt{5}"),
    (r"6\pi \text{ square units}", r"6\pi"),
    (r"60^\circ", "60 degrees"),
    (r"\sin 30^\circ", "0.5"),
    (r"35\%", "35"),
    (r"\$12.50", "12.5 dollars"),
    ("3 km", "3"),
    ("3 km", "3 kilometres"),
    (r"4 \, \mathrm{m/s^2}", "4 meters per second squared"),
    ("7.50", "7.5"),
    (r"4.5 \times 10^{12}", "4.5e12"),
    ("twelve", "12"),
    ("0.666667", "2/3"),
    ("0.30000000000000004", "0.3"),
    ("3 - 4i", "-4i + 3"),
    (r"e^{i\pi}", "-1"),
    (r"\frac{1}{\sqrt{n}}", r"\sqrt{1/n}"),
    (r"\frac{M}{2m}", r"\frac{M}{m+m}"),
    (r"\infty", "infinity"),
    (r"\text{(D)}", "D"),
    ("(D) twelve apples", "D"),
    ("3 : 5", "3:5"),
    ("2 + 2x", r"$\boxed{2x+2}$"),
]
DIFFERENT = [
    ("4, 7", "4"),
    ("4, 7", "4, 8"),
    ("(4, 7)", "(7, 4)"),
    ("(4, 7)", "[4, 7]"),
    ("[1, 6)", "(1, 6]"),
    ("[1, 6)", "1, 6"),
    (r"\{4, 7\}", r"\{4, 7, 9\}"),
    ("x > 6", r"x \ge 6"),
    ("x > 6", "y > 6"),
    (r"(-\infty, 1) \cup (6, \infty)", r"(-\infty, 1] \cup (6, \infty)"),
    (r"\pm 4", "4"),
    (r"2 \pm \sqrt{5}", r"2+\sqrt5"),
    (r"1, 4, \ldots, n^2", r"1, 2, \ldots, n"),
    ("n = 4, 7, 9", "n = 1, 7, 9"),
    ("4 and 7", "7"),
    ("x = 4", "y = 4"),
    ("f(x) = x^3", "g(x) = x^3"),
    ("3x = 12", "12"),
    ("x = 4, y = 7", "7, 4"),
    ("x + y = 12", "12"),
    ("y = 3x + 2", "y = 3x - 2"),
    (r"\begin{pmatrix} 4 & 7 \end{pmatrix}", r"\begin{pmatrix} 4 \\ 7 \end{pmatrix}"),
    (r"\begin{pmatrix} 4 & 7 \end{pmatrix}", r"\begin{pmatrix} 7 & 4 \end{pmatrix}"),
    ("2413_5", "2413_6"),
    ("101_2", "5"),
    ("2^{99}", "2^{98}"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    (r"\frac{1}{1999!}", r"\frac{1}{2000!}"),
    (r"48\sqrt{5}cm^{3}", "48"),
    (r"6\pi\text{ cm}", "6"),
    ("3ab", "3"),
    ("3 km", "3 m"),
    ("$3", "3 cents"),
    ("$3", "€3"),
    ("3 a.m.", "3 p.m."),
    (r"4 \text{ m/s}", r"4 \text{ m/s}^2"),
    ("3 km", "3000 m"),
    ("35%", "0.35"),
    ("1000000", "1000001"),
    ("1000000.0", "1000001"),
    ("123456.7", "123456.8"),
    ("0.67", "2/3"),
    ("3.14", r"\pi"),
    ("5 feet 6 inches", "5"),
    ("6:30", "6:30 pm"),
    ("3:5", "5:3"),
    (r"\frac{M}{m}", r"\frac{m}{M}"),
    ("x^2", "x^3"),
    ("|x|", "x"),
    (r"\infty", r"-\infty"),
    ("3 - 4i", "3 + 4i"),
    ("5!", "5"),
    ("D", "C"),
]


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal_answers(a: str, b: str) -> None:
    assert equivalent(a, b)
    assert equivalent(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different_answers(a: str, b: str) -> None:
    assert not equivalent(a, b)
    assert not equivalent(b, a)


@pytest.mark.parametrize(
    ("a", "b", "kind", "same"),
    [
        ("35%", "0.35", "expression", True),
        ("35%", "7/20", "number", True),
        ("35%", "35", "number", True),
        ("35%", "0.36", "number", False),
        ("3 km", "3000 m", "expression", True),
        ("3 km", "3000 m", "number", True),
        ("3 km", "3 m", "number", False),
        ("3 m", "300 cm", "expression", True),
        ("6m", "6", "expression", False),
        ("6m", "6", "auto", True),
        (r"7\sqrt{2}", "7", "number", False),
        ("123456789012345678901", "123456789012345678902", "number", False),
        ("1e400", "10e399", "number", True),
        ("1e400", "1e401", "number", False),
        ("(Q)", "q", "choice", True),
        ("C. twelve", "C", "choice", True),
        ("Option 3", "(3)", "choice", True),
        ("C", "D", "choice", False),
        ("the Nile", "Nile.", "text", True),
        ("it’s", "It's", "text", True),
        ("red, blue", "blue, red", "text", False),
        ("red, blue", "blue, red", "auto", True),
        ("9" * 400 + "1", "9" * 400 + "2", "auto", False),
        ("no " * 150 + "a", "no " * 150 + "b", "text", False),
    ],
)
def test_kinds_have_rules_of_their_own(a: str, b: str, kind: AnswerKind, same: bool) -> None:
    assert equivalent(a, b, kind) is same
    assert equivalent(b, a, kind) is same


def test_a_structure_is_split_at_brackets_commas_and_relations() -> None:
    four, seven = Value("4"), Value("7")
    assert parse(r"\left[4, 7\right)") == Collection("[)", (four, seven))
    assert parse("4 and 7") == Collection("", (four, seven))
    assert parse("4,000") == Value("4,000")
    assert parse("(4,000)") == Collection("()", (four, Value("000")))
    assert parse(r"x \in (4, 7)") == Equation("x", Collection("()", (four, seven)), r"x \in (4, 7)")
    assert parse("[[4, 7], [7, 4]]") == Matrix(((four, seven), (seven, four)))
    assert parse(r"(4, 7) \cup \{4\}") == Union((Collection("()", (four, seven)), four))
    assert parse("(a+b)(c+d)") == Value("(a+b)(c+d)")
    assert parse("((((((((((4))))))))))") != four, "nested too deeply to be split"


def test_groups_follow_equality() -> None:
    answers = ["4, 7", "x=7 or x=4", None, r"\{7, 4\}", "4", "(7, 4)"]
    assert group(answers) == [["4, 7", "x=7 or x=4", r"\{7, 4\}"], ["4"], ["(7, 4)"]]
    assert agreement(answers) == 0.5


def test_numbers_and_equal_texts_need_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "_shared", None)  # any question would be an error
    assert equivalent("4, 7", "7 and 4")
    assert equivalent(r"$\dfrac{x+1}{2}$", r"\frac{x + 1}{2}")
    assert equivalent("12.50", "$12.5")
    assert not equivalent("12", "13")
    assert not equivalent("Oslo", "Bergen")
    assert not equivalent("(4, 7)", "(4, 8)")


def test_the_worker_inherits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENTINEL_API_KEY", "not for the worker")
    own = expressions._WorkerClient()
    monkeypatch.setattr(expressions, "_shared", own)
    try:
        assert equivalent("(x+3)^2", "x^2+6x+9")
        assert own._process is not None
        environment = Path(f"/proc/{own._process.pid}/environ")
        if not environment.exists():
            pytest.skip("needs /proc")
        inherited = {
            entry.partition(b"=")[0].decode() for entry in environment.read_bytes().split(b"\0") if entry
        }
        assert inherited <= {"PYTHONHOME", "LD_LIBRARY_PATH"}
        assert "SENTINEL_API_KEY" in os.environ
    finally:
        own.close()
