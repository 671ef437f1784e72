"""Programs in replies: which part is the program, how it ends in its answer, what is read from its output."""

from __future__ import annotations

import pytest

from viaticum.strategies import equivalent, get
from viaticum.strategies.programs import find_program, read_output
from viaticum.types import AnswerKind, Completion, Query, Reading, Usage


def read(text: str, kind: AnswerKind = "number") -> Reading:
    return get("pot").read(Completion(text, Usage(), "stop"), Query("How many?", kind))


def run(program: str, kind: AnswerKind = "number") -> str | None:
    return read(f"```python\n{program}\n```", kind).value


@pytest.mark.parametrize(
    ("stdout", "kind", "answer"),
    [
        ("1000000", "number", "1000000"),
        ("2**3", "auto", "2^3"),
        ("x**2 + 3*x", "expression", "x^2 + 3*x"),
        ("**42**", "number", "42"),
        ("np.float64(3.0)", "number", "3"),
        ("(np.float64(3.0), np.int64(2))", "auto", "(3.0, 2)"),
        ("[np.True_]", "boolean", "yes"),
        ("{'pears': np.int64(7)}", "number", "7"),
        ("Fraction(3, 4)", "number", "0.75"),
        ("[Fraction(3, 4), Fraction(1, 2)]", "auto", "[3/4, 1/2]"),
        ("[Decimal('3.50')]", "number", "3.5"),
        ("mpf('1.5')", "number", "1.5"),
        ("[1 2 3]", "auto", "[1, 2, 3]"),
        ("[1.  2.5]", "auto", "[1.0, 2.5]"),
        ("[[1 2]\n [3 4]]", "auto", "[[1, 2], [3, 4]]"),
        ("Matrix([[1, 2], [3, 4]])", "expression", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        ("2*sqrt(3)", "number", "3.464101615138"),
        ("3*pi/4", "auto", "3*pi/4"),
        ("[7/2]", "auto", "7/2"),
        ("[-I, I]", "auto", "[-i, i]"),
        ("(3+4j)", "auto", "3 + 4i"),
        ("{x: 2, y: 1}", "auto", "x=2, y=1"),
        ("[{x: 2}]", "auto", "2"),
        ("Interval.open(-2, 2)", "auto", "(-2, 2)"),
        ("Union(Interval(-oo, -2), Interval(2, oo))", "auto", r"(-\infty, -2] \cup [2, \infty)"),
        ("FiniteSet(1, 2)", "auto", "{1, 2}"),
        ("Eq(x, 5)", "auto", "5"),
        ("[datetime.date(2021, 5, 3)]", "date", "2021-05-03"),
        ("2021-10-12", "date", "2021-10-12"),
        ("1,234", "number", "1234"),
        ("$1,234.50", "number", "1234.5"),
        ("3, 4", "auto", "3, 4"),
        ("3 4", "auto", "3, 4"),
        ("(B)", "choice", "B"),
        ("St. Louis", "text", "St. Louis"),
        ("New York", "text", "New York"),
        ("555-1234", "text", "555-1234"),
        ("Answer: 42 apples", "number", "42"),
        ('{\n  "answer": 42\n}', "number", "42"),
        ("2\n---", "number", "2"),
        ("None", "auto", None),
        ("nan", "number", None),
        ("-inf", "number", None),
        ("[3, 4]", "number", None),
        ("3 4", "number", None),
        ("9**9**9**9", "number", "9"),
    ],
)
def test_output_is_a_value(stdout: str, kind: AnswerKind, answer: str | None) -> None:
    value = read_output(stdout, "", kind)
    assert value == answer or (value is not None and equivalent(value, answer, kind))


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        ("clips = 72\nmonths = 2\nprint(f'Rosa sold {clips} clips in {months} months')", None),
        ("clips = 72\nprint(f'Rosa sold {clips} clips in 2 months')", "72"),
        ("clips = 72\nprint('In 2 months she sold', clips, 'clips')", "72"),
        ("apples, answer = 3, 72\nprint(f'Of {apples} apples she bakes {answer} pies')", "72"),
        ("print(72)\nprint('Done in 3 steps')", "72"),
        ("print(72)\nif 1 < 2:\n    print('So 73 in all')", "73"),
    ],
)
def test_what_a_program_puts_into_a_sentence_is_the_answer(program: str, answer: str | None) -> None:
    value = run(program)
    assert value == answer if answer else value in ("72", "2")


@pytest.mark.parametrize(
    "program",
    [
        "def compute():\n    total = 3\n    return total * 14",
        "eggs = 3\ndef total():\n    return eggs * 14",
        "class Farm:\n    def __init__(self):\n        self.n = 42\n    def f(self):\n        return self.n",
        "def main():\n    print('It is', 42)\n\nif __name__ == '__main__':\n    main()",
        "total = 40\ntotal += 2\nreturn total",
        "eggs = 5\nif eggs > 3:\n    return 42\nelse:\n    return 1",
        "import asyncio\nasync def main():\n    return 42\nprint(asyncio.run(main()))",
        "async def main():\n    return 42",
        "async def main():\n    print(42)\nmain()",
        "async def total():\n    return 42\nprint(await total())",
        "import matplotlib.pyplot as plt\nprint(42)\nplt.plot([1, 2])\nplt.title('50')\nplt.show()",
        "import matplotlib.pyplot as plt\nanswer = 42\nfig, axes = plt.subplots()\naxes.plot([1])",
        "import sys\nprint(42)\nsys.exit(0)",
        "answer = 42\nexit()",
        "answer = 42\n'''\nnotes of 7 lines\n'''",
        "answer = 6 × 7\nprint(answer)",
        "answer = 50 − 8\nprint(answer)",
        "if 3 ≤ 4:\n    print(“42”)",
        "if True:\n\tanswer = 42\n        \n\tprint(answer)",
        "answer\u00a0= 42\nprint(answer)",
        "!pip install sympy\nprint(42)",
        "print(42)<|im_end|>",
        "answer = 42\nnotes = []\nnotes.append(7)",
    ],
)
def test_a_program_shows_its_answer(program: str) -> None:
    assert run(program) == "42"


@pytest.mark.parametrize(
    "text",
    [
        "~~~py\nprint(42)\n~~~",
        "1. Compute:\n   ```python\n   print(42)\n   ```\n2. Done",
        "````python\nprint(42)\n````",
        "> ```python\n> print(42)\n> ```",
        "Sure: ```python\nprint(42)```",
        "```Python title='a.py'\nprint(42)\n```",
        "```{python}\nprint(42)\n```",
        "```\npython\nprint(42)\n```",
        "[PYTHON]\nprint(42)\n[/PYTHON]",
        "<tool_code>print(42)</tool_code>",
        "`print(42)`",
        "```python\nprint(42)\n``",
        "Here is the program:\n\neggs = 40\nprint(eggs + 2)\n\nThis prints the answer.",
        "```\n>>> eggs = 40\n>>> for each in range(2):\n...     eggs += 1\n>>> eggs\n42\n```",
        "In [1]: eggs = 40\nIn [2]: eggs + 2",
        '```python\nfence = """\n```\n"""\nprint(42)\n```',
        "```\neggs = 42\nprint(eggs)\n```\nOutput:\n```\neggs = 41\n```",
        "```bash\npip install numpy\n```\n```python\nprint(42)\n```",
        "```python\nprint(42)\n```\n```javascript\nconsole.log(3)\n```",
        "```python\nprint(42)\n```\n```python\nprint(43 +\n",
    ],
)
def test_code_is_found_in_many_dresses(text: str) -> None:
    assert read(text) == Reading("42")


@pytest.mark.parametrize(
    "text",
    [
        "```python\nprint(41)\n```\nThat is wrong. Corrected:\n```python\nprint(42)\n```",
        "```python\ndef double(n):\n    return 2 * n\n```\nNow call it:\n```python\nprint(double(21))\n```",
        "```python\nimport math\n```\nthen\n```python\nprint(math.isqrt(1764))\n```",
        "```python\neggs = 40\n```\n```python\neggs += 2\nprint(eggs)\n```",
        "```python\ndef f(n=21):\n    return 2 * n\nprint(f())\n```\nExample:\n```python\nprint(f(3))\n```",
        "```python\nprint(42)\n```\nTests:\n```python\nassert 1 == 1\nprint('All 3 tests passed')\n```",
    ],
)
def test_of_several_blocks_the_program_is_the_one_that_computes(text: str) -> None:
    assert read(text) == Reading("42")


def test_the_draft_of_a_thought_is_no_program() -> None:
    draft = "```python\nprint(1)\n```"
    assert find_program(f"<think>\n{draft}") is None
    assert find_program(f"{draft}\n</think>\nI cannot say.") is None
    assert read(f"<think>\n{draft}\n</think>\n```python\nprint(42)\n```") == Reading("42")
    assert read("<think>\nLet me write ```python\nprint(1)\n</think>\n```python\nprint(42)\n```") == Reading(
        "42"
    )


@pytest.mark.parametrize(
    "text", ["", "I have 3 apples.", "```text\n42\n```", "The answer = 42", "```python\n```"]
)
def test_prose_is_no_program(text: str) -> None:
    assert find_program(text) is None
