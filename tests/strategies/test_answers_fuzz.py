"""Arbitrary text for everything that reads and compares answers: no exception, each step in time.

VIATICUM_FUZZ_EXAMPLES sets the number of examples (default 1,500); VIATICUM_FUZZ_REPORT names a JSON file for
the measurements. `python benchmarks/fuzz_answers.py --examples 100000` sets both, and uses the real worker;
without a report, most endless comparisons are interrupted inside the worker, which saves starting another.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import interruptible_expression_worker
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from viaticum.strategies import agreement, equivalent, get, normalise, read_answer
from viaticum.strategies.answers import expressions
from viaticum.strategies.programs import end_in_answer, find_program, read_output
from viaticum.types import ANSWER_KINDS, AnswerKind, Completion, FinishReason, Query, Usage

EXAMPLES = int(os.environ.get("VIATICUM_FUZZ_EXAMPLES", "1500"))
REPORT = os.environ.get("VIATICUM_FUZZ_REPORT")
SEED = int(os.environ.get("VIATICUM_FUZZ_SEED", "0"))

READ_SECONDS = 5.0  # of this process; the longest text that is read takes a tenth
COMPARE_SECONDS = expressions.SECONDS + expressions.START_SECONDS  # the worker's start included

PIECES = (
    "The answer is ",
    "the final answer is: ",
    "Answer:\n",
    "#### ",
    "\\boxed{",
    "\\fbox{",
    "}",
    "**",
    "\n",
    " ",
    ".",
    "\\frac{",
    "}{",
    "\\sqrt{",
    "\\text{",
    "\\left(",
    "\\right)",
    "\\(",
    "\\)",
    "\\[",
    "\\]",
    "$",
    "$$",
    "^{",
    "_{",
    "\\times 10^",
    "×10⁸",
    "\\cdot ",
    "\\pi",
    "\\infty",
    "\\pm ",
    "\\int_0^1 ",
    "\\sum_{n=1}^{9} ",
    "\\log_2 ",
    "sin(",
    "\\begin{pmatrix}",
    "\\end{pmatrix}",
    "&",
    "\\\\",
    "x",
    "y",
    "2x",
    "x^2",
    "(x+1)^9",
    "!",
    "!!",
    "^",
    "**",
    "/",
    "-",
    "+",
    "=",
    ">=",
    "<",
    "(",
    ")",
    "[",
    ",",
    "0",
    "1",
    "9",
    "12",
    "99",
    "1,200.00",
    "3/4",
    "1e9",
    "1e-300",
    "50%",
    "½",
    "−7",
    "٣",
    "€",
    "million",
    " dollars",
    " cm^2",
    "90^\\circ",
    "yes",
    "No",
    "(B)",
    "option c",
    "July 4, 1999",
    "2024-02-30",
    "7/4/1999",
    "4.7.1999",
    "May",
    "\u202e",
    "\x00",
    "\ud800",
    "😀",
    "```python\n",
    "print(",
    "```",
)
TEXT = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
    st.text(alphabet="0123456789.,-+/%$eE= \\{}()[]^!xyABCnos\n#*:|<>", max_size=120),
    st.text(max_size=200),
    st.tuples(st.sampled_from(PIECES), st.integers(1, 400)).map(lambda pair: pair[0] * pair[1]),
)

LEAF = st.sampled_from(("0", "1", "2", "7", "0.5", "10", "99", "x", "y", "n", "\\pi", "e", "i", "\\infty"))
FORMULA = st.recursive(
    LEAF,
    lambda inner: st.tuples(
        st.sampled_from(
            (
                "{}+{}",
                "{}-{}",
                "{}*{}",
                "{}/{}",
                "{}^{{{}}}",
                "({})^({})",
                "\\frac{{{}}}{{{}}}",
                "\\sqrt[{}]{{{}}}",
                "\\sin({})\\cos {}",
                "\\log_{{{}}} {}",
                "({})!+{}",
                "{}={}",
                "{} < {}",
                "({}, {})",
                "\\{{{}, {}\\}}",
                "\\int_0^{{{}}} {} dx",
                "{}\\pm {}",
                "sqrt({})({})",
            )
        ),
        inner,
        inner,
    ).map(lambda parts: parts[0].format(*parts[1:])),
    max_leaves=6,
)
# Two texts and a kind; one example of twelve is a pair of formulas, which the worker is asked about.
TEXTS = st.tuples(TEXT, TEXT, st.sampled_from(ANSWER_KINDS))
FORMULAS = st.tuples(FORMULA, FORMULA, st.sampled_from(("expression", "auto")))
ASKED = st.sampled_from([TEXTS] * 11 + [FORMULAS]).flatmap(lambda chosen: chosen)


@dataclass
class Slowest:
    """The slowest example of one kind of step."""

    seconds: float = 0.0
    example: str = ""
    steps: int = 0
    total: float = 0.0

    def took(self, seconds: float, limit: float, example: str) -> None:
        self.steps += 1
        self.total += seconds
        if seconds > self.seconds:
            self.seconds, self.example = seconds, example
        assert seconds < limit, f"took {seconds:.2f} s, more than {limit} s: {example}"


@dataclass
class Measured:
    """What a run took, for the report."""

    examples: int = 0
    read: Slowest = field(default_factory=Slowest)
    compare: Slowest = field(default_factory=Slowest)
    over_time: int = 0

    def write(self, path: Path) -> None:
        report = {
            "examples": self.examples,
            "comparisons_stopped": self.over_time,
            "limits": {"read": READ_SECONDS, "compare": COMPARE_SECONDS},
            **{name: vars(step) for name, step in (("read", self.read), ("compare", self.compare))},
        }
        path.write_text(json.dumps(report))


def check(a: str, b: str, kind: AnswerKind, finish: FinishReason, measured: Measured) -> None:
    measured.examples += 1
    shown = f"{kind}: {a!r}, {b!r}"
    started = time.process_time()
    values = read(a, b, kind, finish)
    seconds = time.process_time() - started
    if seconds >= READ_SECONDS:  # of a machine that was busy the second time tells
        started = time.process_time()
        read(a, b, kind, finish)
        seconds = time.process_time() - started
    measured.read.took(seconds, READ_SECONDS, shown)
    for x, y in ((a, b), (values[1], values[2])):
        started = time.perf_counter()
        same = equivalent(x, y, kind)
        seconds = time.perf_counter() - started
        measured.compare.took(seconds, COMPARE_SECONDS, shown)
        measured.over_time += seconds >= expressions.SECONDS
        assert equivalent(y, x, kind) is same
        assert agreement([x, y], kind) in ((0.5, 1.0) if x is not None or y is not None else (0.0,))


def read(a: str, b: str, kind: AnswerKind, finish: FinishReason) -> list[str | None]:
    """What is read from both texts together, from the first, and from the marks of the second."""
    values = [read_answer(a + b, kind), read_answer(a, kind), read_answer(b, kind, marked_only=True)]
    for name in ("direct", "cot"):
        reading = get(name).read(Completion(a, Usage(), finish), Query("Which?", kind))
        assert reading.answered or reading.reason
    program = find_program(a)  # what comes before the sandbox
    assert program is None or isinstance(end_in_answer(program), str)
    assert isinstance(read_output(a, b, kind), str | None)  # and what comes after it
    for value in (a, b, *values):
        if value is not None:
            assert isinstance(normalise(value, kind), str)
            assert equivalent(value, value, kind)
    return values


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker of this test's own."""
    client = expressions._WorkerClient()
    monkeypatch.setattr(expressions, "_shared", client)
    monkeypatch.setattr(expressions, "SECONDS", COMPARE_SECONDS - expressions.START_SECONDS)
    if not REPORT:
        monkeypatch.setattr(expressions, "_WORKER", Path(interruptible_expression_worker.__file__))
    yield
    client.close()


@pytest.mark.timeout(0 if REPORT else 900)
@pytest.mark.usefixtures("worker")
def test_arbitrary_text_is_read_and_compared_in_time() -> None:
    measured = Measured()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,  # the limits are per step, below
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @seed(SEED)
    @given(ASKED, st.sampled_from(("stop", "length")))
    def fuzz(asked: tuple[str, str, AnswerKind], finish: FinishReason) -> None:
        check(*asked, finish, measured)

    fuzz()
    if REPORT:
        measured.write(Path(REPORT))
    assert measured.examples >= EXAMPLES * 0.9
