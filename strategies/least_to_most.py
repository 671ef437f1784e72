"""Least-to-most prompting (arXiv 2205.10625): split a question into simpler ones and solve these in order.

The paper asks once to decompose and once per subquestion. Here one reply lists the subquestions and then
solves them, which costs one call and one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

from viaticum.strategies.base import Example, PromptStrategy

SYSTEM = (
    "You solve problems from the simple to the hard. First list the subquestions that lead to the answer, "
    "the "
    "easiest first, the question itself last. Then answer them in that order, one short line each, using the "
    'answers before it. End with one line: "The answer is X."'
)

EXAMPLES = (
    Example(
        "A bakery makes 6 trays of 15 rolls. It sells 70 rolls for $0.80 each and the others in the evening "
        "for "
        "half that price. How much money does it take?",
        "Subquestions:\n"
        "1. How many rolls are there?\n"
        "2. How much do the first 70 rolls bring?\n"
        "3. How many rolls are left for the evening?\n"
        "4. How much do those bring?\n"
        "5. How much money does the bakery take?\n"
        "Answers:\n"
        "1. There are 6 * 15 = 90 rolls.\n"
        "2. The first 70 rolls bring 70 * 0.80 = 56 dollars.\n"
        "3. For the evening 90 - 70 = 20 rolls are left.\n"
        "4. Each costs 0.80 / 2 = 0.40 dollars, so they bring 20 * 0.40 = 8 dollars.\n"
        "5. The bakery takes 56 + 8 = 64 dollars.\n"
        "The answer is 64.",
    ),
    Example(
        "Lena's book has 150 pages. She reads 24 pages on Monday, a third more on Tuesday, and on Wednesday "
        "as "
        "many as on both days together. How many pages are left?",
        "Subquestions:\n"
        "1. How many pages does she read on Tuesday?\n"
        "2. How many pages does she read on Wednesday?\n"
        "3. How many pages are left?\n"
        "Answers:\n"
        "1. A third of 24 is 24 / 3 = 8, so on Tuesday she reads 24 + 8 = 32 pages.\n"
        "2. On Wednesday she reads 24 + 32 = 56 pages.\n"
        "3. On the three days she reads 56 + 56 = 112 pages, so 150 - 112 = 38 pages are left.\n"
        "The answer is 38.",
    ),
    Example(
        "Two taps fill a pool of 1,800 litres. The first gives 20 litres a minute, the second twice as much, "
        "but it "
        "is opened 15 minutes later. How many minutes after the first tap was opened is the pool full?",
        "Subquestions:\n"
        "1. How much does the first tap give before the second is opened?\n"
        "2. How much do both taps give in a minute?\n"
        "3. How long do both taps take for the rest?\n"
        "4. How many minutes after the first tap was opened is the pool full?\n"
        "Answers:\n"
        "1. In 15 minutes the first tap gives 15 * 20 = 300 litres.\n"
        "2. The second tap gives 2 * 20 = 40 litres a minute, so both give 20 + 40 = 60 litres.\n"
        "3. The rest is 1800 - 300 = 1500 litres, which takes 1500 / 60 = 25 minutes.\n"
        "4. The pool is full after 15 + 25 = 40 minutes.\n"
        "The answer is 40.",
    ),
)


@dataclass(frozen=True)
class LeastToMost(PromptStrategy):
    """Subquestions from the easiest to the hardest, then their answers in order."""

    system: str | None = SYSTEM
    examples: tuple[Example, ...] = EXAMPLES

    name = "least-to-most"
    description = (
        "Splits the question into simpler subquestions and answers them in order, each with the answers "
        "before it. "
        "Longer than plain reasoning; good for compositional problems with many dependent steps."
    )
