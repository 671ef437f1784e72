r"""Think: for models that think before they answer; zero-shot, no system turn, the answer in `\boxed{}`.

Makers of such models advise against worked examples and system turns (DeepSeek-R1, arXiv 2501.12948).
`think:512`, `think:2k` and so on limit the thought to so many tokens: arms for a router that chooses a length
with the model (R2-Router, arXiv 2602.02823). How a limit is kept is the model's matter: local ones close the
thought by force (arXiv 2501.19393), remote ones are told. A model that does not think reasons in its answer
instead, and the budget does nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from viaticum.errors import InputError
from viaticum.strategies.base import Strategy, read_text
from viaticum.types import AnswerKind, Completion, Message, Query, Reading

PREFIX = "think"
MAX_BUDGET = 1 << 20
ANSWERS: Mapping[AnswerKind, str] = {
    "auto": "your final answer",
    "number": "your final answer, a number,",
    "choice": "the letter of your final choice",
    "boolean": "your final answer, yes or no,",
    "date": "your final answer, a date written YYYY-MM-DD,",
    "expression": "your final answer, a mathematical expression,",
    "text": "your final answer, a word or a short phrase,",
}
_NAME = re.compile(rf"{PREFIX}(?::(0|[1-9][0-9]{{0,9}})(k?))?")


@dataclass(frozen=True)
class Think(Strategy):
    """A thought, as long as the model likes or of `thinking_budget` tokens at most, then the answer.

    Raises:
        InputError: a budget below 0 or above 2^20.
    """

    thinking_budget: int | None = None

    max_new_tokens = 1024  # of the answer

    def __post_init__(self) -> None:
        if self.thinking_budget is not None and not 0 <= self.thinking_budget <= MAX_BUDGET:
            raise InputError(
                f"a thinking budget of {self.thinking_budget}; 0 to {MAX_BUDGET} tokens make sense"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        return budget_name(self.thinking_budget)

    @property
    def description(self) -> str:  # type: ignore[override]
        if self.thinking_budget is None:
            return (
                "Lets a reasoning model think for as long as it wants before it answers. Longest and most "
                "thorough; good for hard problems of mathematics, science and logic."
            )
        if self.thinking_budget == 0:
            return "Has a reasoning model answer without a thought; good for easy questions."
        return (
            f"Lets a reasoning model think for at most {self.thinking_budget} tokens before it answers. "
            f"{_length_of(self.thinking_budget)}"
        )

    def messages(self, query: Query) -> list[Message]:
        instruction = f"Reason step by step, and put {ANSWERS[query.kind]} within \\boxed{{}}."
        return [{"role": "user", "content": f"{query.text.strip()}\n\n{instruction}"}]

    def read(self, completion: Completion, query: Query) -> Reading:
        return read_text(completion, query)


def budget_name(budget: int | None) -> str:
    """`think`, `think:500` or, for whole multiples of 1024, `think:2k`."""
    if budget is None:
        return PREFIX
    return f"{PREFIX}:{budget // 1024}k" if budget and budget % 1024 == 0 else f"{PREFIX}:{budget}"


def parse_think(name: str) -> Think | None:
    """The strategy of a name such as `think:512` or `think:2k` (2048 tokens); None for other names.

    Raises:
        InputError: a budget above 2^20.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    number, kilo = match.groups()
    return Think(None if number is None else int(number) * (1024 if kilo else 1))


def _length_of(budget: int) -> str:
    if budget < 1024:
        return "Brief; good for problems of a few steps."
    if budget < 4096:
        return "Of medium length; good for problems of many steps."
    return "Long; good for hard problems that have to be tried and checked."
