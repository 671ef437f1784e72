"""Faithful chain of thought (arXiv 2301.13379): the reasoning is a program.

Each subquestion is a comment that names the facts or earlier subquestions it depends on, followed by the line
of Python that answers it. The printed result is the answer, so that the shown reasoning is the real one.
Finding, running and reading the program is done by `pot`; the other languages of the paper (Datalog,
planning) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from viaticum.strategies.base import Example
from viaticum.strategies.pot import Pot

SYSTEM = (
    "You solve problems by writing a Python program whose comments are the reasoning. Split the question "
    "into "
    "numbered subquestions. Write each as a comment that ends with the facts of the question it is taken "
    "from, or "
    "the numbers of the subquestions it depends on; below it, compute its answer in one line. Store the "
    "result in "
    "answer and print it. Reply with the program only, in a ```python block."
)

EXAMPLES = (
    Example(
        "A cinema has 12 rows of 20 seats. 85% of the seats are taken, and 34 guests leave at the break. How "
        "many "
        "guests see the end?",
        "```python\n"
        "# 1. How many rows are there? (fact: 12 rows)\n"
        "rows = 12\n"
        "# 2. How many seats has a row? (fact: 20 seats)\n"
        "seats_per_row = 20\n"
        "# 3. How many guests come? (depends on 1 and 2; fact: 85% of the seats)\n"
        "guests = rows * seats_per_row * 85 / 100\n"
        "# 4. How many guests leave? (fact: 34 guests leave)\n"
        "leave = 34\n"
        "# 5. How many guests see the end? (depends on 3 and 4)\n"
        "answer = guests - leave\n"
        "print(answer)\n"
        "```",
    ),
    Example(
        "Marta is 4 years younger than Jan. In 5 years Jan will be 18. How old was Marta 2 years ago?",
        "```python\n"
        "# 1. How old will Jan be in 5 years? (fact: Jan will be 18)\n"
        "jan_in_5_years = 18\n"
        "# 2. How old is Jan now? (depends on 1)\n"
        "jan_now = jan_in_5_years - 5\n"
        "# 3. How old is Marta now? (depends on 2; fact: 4 years younger)\n"
        "marta_now = jan_now - 4\n"
        "# 4. How old was Marta 2 years ago? (depends on 3)\n"
        "answer = marta_now - 2\n"
        "print(answer)\n"
        "```",
    ),
    Example(
        "A confectioner packs 96 pralines into boxes of 8 and sells each box for $14. The ingredients cost "
        "$45. "
        "What is the profit?",
        "```python\n"
        "# 1. How many pralines are there? (fact: 96 pralines)\n"
        "pralines = 96\n"
        "# 2. How many boxes do they fill? (depends on 1; fact: boxes of 8)\n"
        "boxes = pralines / 8\n"
        "# 3. How much money do the boxes bring? (depends on 2; fact: $14 each)\n"
        "income = boxes * 14\n"
        "# 4. What do the ingredients cost? (fact: $45)\n"
        "costs = 45\n"
        "# 5. What is the profit? (depends on 3 and 4)\n"
        "answer = income - costs\n"
        "print(answer)\n"
        "```",
    ),
)


@dataclass(frozen=True)
class FaithfulCot(Pot):
    """A program whose comments are the reasoning, run in a sandbox; settings as for `Pot`."""

    system: str | None = SYSTEM
    examples: tuple[Example, ...] = EXAMPLES

    name = "faithful-cot"
    description = (
        "Writes its reasoning as numbered subquestions, each followed by the line of Python that answers it, "
        "and runs "
        "the program. Exact and easy to check; good for word problems of several dependent quantities."
    )
