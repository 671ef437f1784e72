"""Chain of thought (arXiv 2201.11903): reason in short sentences, one step per line, then state the answer.

The worked examples set the length as well as the form: a reply takes about 150 tokens, so that few are cut at
the token limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from viaticum.strategies.base import Example, PromptStrategy

SYSTEM = (
    "You solve problems step by step. Write one short step per line, say what each quantity means, and "
    "calculate carefully. Use every fact of the question, and check what exactly is asked. "
    'End with one line: "The answer is X."'
)

EXAMPLES = (
    Example(
        "A library shelf holds 14 cookbooks, three times as many novels as cookbooks, and 5 fewer atlases "
        "than cookbooks. How many books are on the shelf?",
        "The shelf holds 14 cookbooks.\n"
        "There are three times as many novels: 3 * 14 = 42 novels.\n"
        "There are 5 fewer atlases than cookbooks: 14 - 5 = 9 atlases.\n"
        "Altogether there are 14 + 42 + 9 = 65 books.\n"
        "The answer is 65.",
    ),
    Example(
        "A rain barrel holds 200 litres. Omar uses 30% of the water on Monday and a quarter of what is left "
        "on Tuesday. On Wednesday rain adds 15 litres. How many litres are in the barrel then?",
        "On Monday Omar uses 30% of 200 litres: 0.30 * 200 = 60 litres.\n"
        "After Monday 200 - 60 = 140 litres are left.\n"
        "On Tuesday he uses a quarter of what is left: 140 / 4 = 35 litres.\n"
        "After Tuesday 140 - 35 = 105 litres are left.\n"
        "Rain adds 15 litres: 105 + 15 = 120 litres.\n"
        "The answer is 120.",
    ),
    Example(
        "Ines walks 45 minutes to work and 45 minutes back, 4 days a week. By bicycle each way takes her a "
        "third of that time. How many hours does she save in a week by cycling?",
        "Walking takes 45 * 2 = 90 minutes a day.\n"
        "By bicycle each way takes 45 / 3 = 15 minutes, so 15 * 2 = 30 minutes a day.\n"
        "Each day she saves 90 - 30 = 60 minutes.\n"
        "In 4 days she saves 60 * 4 = 240 minutes, and 240 / 60 = 4 hours.\n"
        "The answer is 4.",
    ),
    Example(
        "Four flatmates buy a sofa. A voucher takes $60 off its price, and they share the rest equally, "
        "paying $75 each. How much did the sofa cost before the voucher?",
        "Together the flatmates paid 4 * 75 = 300 dollars.\n"
        "That was the price after $60 was taken off.\n"
        "Before the voucher the sofa cost 300 + 60 = 360 dollars.\n"
        "The answer is 360.",
    ),
)


@dataclass(frozen=True)
class Cot(PromptStrategy):
    """Reasoning in short sentences, then the answer."""

    system: str | None = SYSTEM
    examples: tuple[Example, ...] = EXAMPLES

    name = "cot"
    description = (
        "Reasons step by step in plain sentences before it states the answer. "
        "Long and dependable; good for word problems, logic and questions that take several steps."
    )
