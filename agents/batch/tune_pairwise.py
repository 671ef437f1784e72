"""A judge that compares the answers of pairs, two at a time: right is what no other answer is better than.

Each comparison is asked in both orders, since judges prefer a place (arXiv 2306.05685); an answer is better
only if both say so, everything else is a tie. The first answer to a question is challenged by each other one
in turn, and the better one goes on; the best answer and those that tie with it count as right. So accuracies
are those against the best answer at hand: where no pair is right they are too high. Answers that compare as
equal are one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from viaticum.agents.batch.planned_rows import PlannedRow
from viaticum.agents.batch.steps import RowTools
from viaticum.agents.batch.tune_judge import (
    CHECKED,
    GivenAnswer,
    Grader,
    JudgeCalls,
    Progress,
    call_of_judge,
)
from viaticum.budgets.records import digest
from viaticum.generation import GenerationSettings
from viaticum.questions import Question
from viaticum.strategies.answers import equivalent
from viaticum.strategies.verify import UNTRUSTED, quoted

Choice = Literal["A", "B", "TIE"]
PROMPT = f"""You compare two final answers to a question, A and B. Work out the right answer yourself first.
One is better than the other only if it is right and the other is not, or if it has what was asked for and the
other leaves some of it out; form, wording, length and order do not matter. Where both are right, both are
wrong, or you cannot tell, they tie. {UNTRUSTED}

Question: {{question}}

A: {{first}}

B: {{second}}

Give your reason in one or two sentences, then a last line with one word: A, B or TIE."""
_CHOICE = re.compile(r"(?:\A|\n|:)\W*(?:Answer\s+)?(A|B|(?i:TIE))\W*\Z")


def read_choice(text: str) -> Choice | None:
    """The choice at the end of a text; None where there is none."""
    found = _CHOICE.search(text)
    choices: dict[str, Choice] = {"A": "A", "B": "B", "TIE": "TIE"}
    return choices[found[1].upper()] if found else None


def comparison_row(
    model: str, number: int, question: Question, first: str, second: str, settings: GenerationSettings
) -> PlannedRow:
    """The row of one comparison in one order. Its key in the ledger is of question, answers and order."""
    prompt = PROMPT.format(question=quoted(question.query.text), first=quoted(first), second=quoted(second))
    return call_of_judge(model, number, _comparison_id(question, first, second), question, prompt, settings)


@dataclass
class _Standing:
    """The answers to one question: those that count as right, and the comparison that is wanted next."""

    question: Question
    answers: list[str] = field(default_factory=list)  # those that differ, in order
    cells: dict[int, int | None] = field(default_factory=dict)  # cell -> index of its answer
    best: list[int] = field(default_factory=list)  # the best answer first, then those that tie with it
    unknown: set[int] = field(default_factory=set)
    next: tuple[int, int] | None = None  # best answer and challenger

    def add(self, number: int, answer: str | None) -> None:
        if number in self.cells:
            return
        if answer is None:
            self.cells[number] = None
            return
        kind = self.question.query.kind
        for index, each in enumerate(self.answers):
            if equivalent(each, answer, kind):
                self.cells[number] = index
                return
        self.cells[number] = len(self.answers)
        self.answers.append(answer)

    def number_of(self, index: int) -> int:
        """The first cell with an answer."""
        return next(number for number, each in self.cells.items() if each == index)


class PairwiseJudge(Grader):
    """Asks a model which of two answers is better.

    Args:
        model: of the catalogue.
        rows: resources and budget of the run.
        folder: of its comparisons; made where it is missing.
        cells: how many answers there can be.
    """

    def __init__(self, model: str, rows: RowTools, folder: Path, cells: int) -> None:
        self.name, self.models = f"judge {model}, by pairs,", (model,)
        self.calls = JudgeCalls(model, rows, folder, 2 * cells)
        self._model = model
        self._standings: dict[str, _Standing] = {}
        self._of_cell: dict[int, _Standing] = {}

    def grade(self, answers: Mapping[int, GivenAnswer], progress: Progress) -> None:
        for number, each in answers.items():
            standing = self._standings.setdefault(each.question.id, _Standing(each.question))
            standing.add(number, each.answer)
            self._of_cell[number] = standing
        asked: set[str] = set()
        while wanted := self._wanted(asked):
            asked |= {each.row.id for each in wanted}
            self.calls.ask(wanted, progress)

    def verdict(self, number: int) -> bool | None:
        """As of every grader. No answer is wrong; without an opponent or a comparison nothing is known."""
        standing = self._of_cell.get(number)
        if standing is None or len(standing.cells) < 2:
            return None
        index = standing.cells[number]
        if index is None:
            return False
        return None if standing.unknown else index in standing.best

    def cost(self, number: int) -> int:
        """The comparisons in which the answer of this cell was the challenger."""
        standing = self._of_cell.get(number)
        index = None if standing is None else standing.cells[number]
        if standing is None or index is None or standing.number_of(index) != number:
            return 0
        question, challenger = standing.question, standing.answers[index]
        return sum(
            self.calls.costs.get(_comparison_id(question, *order), 0)
            for other in standing.answers[:index]
            for order in ((other, challenger), (challenger, other))
        )

    def to_check(self, known: Mapping[int, GivenAnswer]) -> Iterable[int]:
        """All answers to the first questions that have different ones."""
        of_question: dict[str, list[int]] = defaultdict(list)
        for number, each in known.items():
            of_question[each.question.id].append(number)
        taken: list[int] = []
        for numbers in of_question.values():
            if len({known[number].answer for number in numbers}) > 1 and len(taken) < CHECKED:
                taken += numbers
        return taken

    @property
    def mute(self) -> str:
        return self.calls.mute(read_choice)

    def close(self) -> None:
        self.calls.close()

    def _wanted(self, asked: set[str]) -> list[PlannedRow]:
        """The next comparison of every question, in both orders; none that was asked and gave no verdict."""
        rows = []
        for standing in self._standings.values():
            self._update(standing, asked)
            if standing.next is None:
                continue
            best, challenger = (standing.answers[each] for each in standing.next)
            number = 2 * standing.number_of(standing.next[1])
            for offset, order in enumerate(((best, challenger), (challenger, best))):
                settings = self.calls.settings
                rows.append(comparison_row(self._model, number + offset, standing.question, *order, settings))
        return rows

    def _update(self, standing: _Standing, asked: set[str]) -> None:
        """Let the answers challenge the best one in turn, as far as comparisons are known."""
        standing.best, standing.unknown, standing.next = [0] if standing.answers else [], set(), None
        for challenger in range(1, len(standing.answers)):
            best = standing.best[0]
            texts = standing.answers[best], standing.answers[challenger]
            choice = self._choice(standing.question, *texts)
            if choice is None:
                standing.unknown.add(challenger)
                if standing.next is None and _comparison_id(standing.question, *texts) not in asked:
                    standing.next = best, challenger
            elif choice == "B":
                standing.best = [challenger]
            elif choice == "TIE":
                standing.best.append(challenger)

    def _choice(self, question: Question, first: str, second: str) -> Choice | None:
        """Which of two answers is better in both orders; None where one order has no verdict."""
        there = read_choice(self.calls.texts.get(_comparison_id(question, first, second), ""))
        back = read_choice(self.calls.texts.get(_comparison_id(question, second, first), ""))
        if there is None or back is None:
            return None
        agreed: dict[tuple[Choice, Choice], Choice] = {("A", "B"): "A", ("B", "A"): "B"}
        return agreed.get((there, back), "TIE")


def _comparison_id(question: Question, first: str, second: str) -> str:
    return f"compare {question.id} {digest([first, second])[:16]}"
