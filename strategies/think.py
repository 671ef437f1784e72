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
from viaticum.strategies.base import Example, PromptStrategy
from viaticum.types import AnswerKind, Message, Query

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
_NAME = re.compile(rf"{PREFIX}:(0|[1-9][0-9]{{0,9}})(k?)")


@dataclass(frozen=True)
class Think(PromptStrategy):
    """A thought, of `thinking_budget` tokens at most where that is set, then the answer."""

    system: str | None = None
    examples: tuple[Example, ...] = ()

    name = PREFIX
    description = (
        "Lets a reasoning model think for as long as it wants before it answers. Longest and most thorough; "
        "good for hard problems of mathematics, science and logic."
    )
    max_new_tokens = 1024  # of the answer

    def messages(self, query: Query) -> list[Message]:
        *before, _ = super().messages(query)
        instruction = f"Reason step by step, and put {ANSWERS[query.kind]} within \\boxed{{}}."
        return [*before, {"role": "user", "content": f"{query.text.strip()}\n\n{instruction}"}]


def think_within(budget: int) -> Think:
    """`think` with a budget of tokens for the thought: `think:500` or, in multiples of 1024, `think:2k`.

    Raises:
        InputError: a budget below 0 or above 2^20.
    """
    if not 0 <= budget <= MAX_BUDGET:
        raise InputError(f"a thinking budget of {budget}; 0 to {MAX_BUDGET} tokens make sense")
    name = f"{budget // 1024}k" if budget and budget % 1024 == 0 else str(budget)
    return Think(name=f"{PREFIX}:{name}", description=_description(budget), thinking_budget=budget)


def parse_budget(name: str) -> int | None:
    """The budget in a name such as `think:512` or `think:2k` (2048 tokens); None for other names."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1]) * (1024 if match[2] else 1)


def _description(budget: int) -> str:
    if budget == 0:
        return "Has a reasoning model answer without a thought; good for easy questions."
    if budget < 1024:
        use = "Brief; good for problems of a few steps."
    elif budget < 4096:
        use = "Of medium length; good for problems of many steps."
    else:
        use = "Long; good for hard problems that have to be tried and checked."
    return f"Lets a reasoning model think for at most {budget} tokens before it answers. {use}"
