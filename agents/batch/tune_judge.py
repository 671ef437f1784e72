"""Grades answers to questions without a known answer: by a judge model, or (elsewhere) by agreement.

A grader sees final answers alone, not the texts around them, whose length and style sway judges (arXiv
2306.05685). Some answers whose verdict is known are graded too, to see how far it agrees with known answers.
Here is the judge that says of one answer whether it is right; verdicts are rows of the same batch and budget,
and answers that are the same are graded once. Leaves out judging by pairs (`agents.batch.tune_pairwise`), the
agreement of pairs (`agents.batch.tune_agreement`), and which answers are graded (`agents.batch.tune_rounds`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from viaticum.agents.batch.executor import process_rows
from viaticum.agents.batch.input import BatchRow, RequestOverrides
from viaticum.agents.batch.output import RowJournal
from viaticum.agents.batch.planned_rows import NO_FALLBACK, PlannedRow
from viaticum.agents.batch.steps import RowTools
from viaticum.budgets.records import digest
from viaticum.files import private_folder
from viaticum.generation import GenerationSettings
from viaticum.jobs import JobRow, read_rows
from viaticum.models.settings import judge_settings
from viaticum.questions import Question
from viaticum.routers.query import Plan
from viaticum.strategies.verify import read_verdict, rubric_prompt
from viaticum.types import Pair

Grading = Literal["rubric", "pairwise", "agreement"]
Progress = Callable[[str, int, int], None]  # stage, done, total

CHECKED = 40  # answers with a known verdict that the judge grades too
MUTE = 20  # calls of a judge that gave no verdict, and none did, after which it is not worth asking for more


@dataclass(frozen=True)
class Judged:
    """What rests on a grader.

    grader: who graded, in words. models: that graded, or whose answers did. outcomes: how many it decided.
    checked, agreeing: answers with a known verdict that it graded too, and on how many it agreed. questions:
    ids of those without a known answer. ungraded: answers without a verdict, which give no outcome. mute: why
    no call of the judge gave one, where buying ended for that.
    """

    grader: str
    models: tuple[str, ...]
    outcomes: int
    checked: int
    agreeing: int
    questions: frozenset[str]
    ungraded: int = 0
    mute: str = ""


@dataclass(frozen=True)
class GivenAnswer:
    """An answer to grade: None where none was given."""

    question: Question
    pair: Pair
    answer: str | None


class Grader(ABC):
    """Grades the answers of one run, each under the number of its cell."""

    name: str  # who grades, in words
    models: tuple[str, ...]

    @abstractmethod
    def grade(self, answers: Mapping[int, GivenAnswer], progress: Progress) -> None:
        """Grade all answers so far, in the order in which they were planned, as far as the money goes."""

    @abstractmethod
    def verdict(self, number: int) -> bool | None:
        """Whether an answer is right; None where that is not known. Later answers may change it."""

    @abstractmethod
    def to_check(self, known: Mapping[int, GivenAnswer]) -> Iterable[int]:
        """Of the answers whose verdict is known, those that are graded too."""

    def cost(self, number: int) -> int:
        """Nano-dollars of the verdict."""
        return 0

    @property
    def mute(self) -> str:
        """Why no call gave a verdict, after `MUTE` calls; "" where some did."""
        return ""

    def close(self) -> None:
        """Close what is open."""
        return


class JudgeCalls:
    """The calls of a judge: rows of the same batch and budget, in a journal of their own.

    Args:
        model: the judge.
        rows: resources and budget of the run.
        folder: of the judge's calls; made where it is missing.
        cells: how many calls there can be.
    """

    def __init__(self, model: str, rows: RowTools, folder: Path, cells: int) -> None:
        private_folder(folder)
        self.rows, self.settings = rows, judge_settings(rows.resources.catalogue, model)
        self.texts: dict[str, str] = {}  # by the row's id; calls that were cut off are made again
        self.failed: dict[str, str] = {}  # why a call has no text
        self.costs: dict[str, int] = {}
        self.journal = RowJournal(folder, cells)
        for row in read_rows(folder):
            self._add(row)

    def ask(self, wanted: Iterable[PlannedRow], progress: Progress) -> None:
        """Make the calls that were not made, as far as the money goes."""
        new = {each.row.id: each for each in wanted if each.row.id not in self.texts}
        for done, (_, row) in enumerate(process_rows(iter(new.values()), self.rows), 1):
            if self._add(row):
                self.journal.write(row)
            progress("grading", done, len(new))
        self.journal.sync()

    def mute(self, read: Callable[[str], object]) -> str:
        """As of a grader. read: the verdict in a text, or None."""
        if len(self.texts) + len(self.failed) < MUTE or any(
            read(each) is not None for each in self.texts.values()
        ):
            return ""
        reasons = Counter(self.failed.values()).most_common(1)
        return reasons[0][0] if reasons else f"it says {next(iter(self.texts.values()))[:60]!r}"

    def close(self) -> None:
        self.journal.close()

    def _add(self, row: JobRow) -> bool:
        if row.state == "skipped":
            return False
        if not row.pair or not row.calls or row.calls[-1].finish_reason == "length":
            self.failed[row.id] = row.reason if not row.calls else "its text was cut at the token limit"
            return False
        self.failed.pop(row.id, None)
        self.texts[row.id], self.costs[row.id] = row.text or row.answer or "", row.cost_nanousd
        return True


class RubricJudge(Grader):
    """Asks a model of every answer whether it is right."""

    def __init__(self, model: str, rows: RowTools, folder: Path, cells: int) -> None:
        self.name, self.models = f"judge {model}", (model,)
        self.calls = JudgeCalls(model, rows, folder, cells)
        self._model = model
        self._ids: dict[int, str | None] = {}

    def grade(self, answers: Mapping[int, GivenAnswer], progress: Progress) -> None:
        wanted = []
        for number, each in answers.items():
            self._ids[number] = None if each.answer is None else verdict_id(each.question, each.answer)
            if each.answer is not None:
                row = judge_row(self._model, number, each.question, each.answer, self.calls.settings)
                wanted.append(row)
        self.calls.ask(reversed(wanted), progress)  # of equal answers the first one

    def verdict(self, number: int) -> bool | None:
        """As of every grader. No answer is wrong."""
        key = self._ids.get(number, "")
        return False if key is None else read_verdict(self.calls.texts.get(key, ""))

    def cost(self, number: int) -> int:
        return self.calls.costs.get(self._ids.get(number) or "", 0)

    def to_check(self, known: Mapping[int, GivenAnswer]) -> Iterable[int]:
        """The first answer of each question."""
        firsts: dict[str, int] = {}
        for number, each in known.items():
            if each.answer is not None:
                firsts.setdefault(each.question.id, number)
        return list(firsts.values())[:CHECKED]

    @property
    def mute(self) -> str:
        return self.calls.mute(read_verdict)

    def close(self) -> None:
        self.calls.close()


def judge_row(
    model: str, number: int, question: Question, answer: str, settings: GenerationSettings
) -> PlannedRow:
    """The row of one verdict. Its key in the ledger is of question and answer, whoever gave that."""
    prompt = rubric_prompt(question.query.text, answer)
    return call_of_judge(model, number, verdict_id(question, answer), question, prompt, settings)


def call_of_judge(
    model: str, number: int, name: str, question: Question, prompt: str, settings: GenerationSettings
) -> PlannedRow:
    """The row of a call of the judge. name: by which it is paid for once. settings: see `judge_settings`."""
    overrides = RequestOverrides(model, settings, ({"role": "user", "content": prompt},))
    row = BatchRow(number, name, question.query, overrides=overrides)
    return PlannedRow(row, Plan((Pair(model, "chat"),)), NO_FALLBACK)


def verdict_id(question: Question, answer: str) -> str:
    return f"judge {question.id} {digest(answer)[:16]}"
