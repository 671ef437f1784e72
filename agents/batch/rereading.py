"""Read the kept texts of a profile again, with today's reader, without calling a model.

An outcome table is as good as the reader that filled its columns `answer` and `correct`. The texts that a
profile kept are split from thoughts, read, voted on and compared anew; tokens, costs, seconds and ends stay.
Leaves out prompts: texts of other prompts need another profile.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from viaticum.agents.batch.profile_journal import Samples, kept_line, profile_lock
from viaticum.catalogue import Catalogue
from viaticum.errors import DataError, InputError
from viaticum.files import read_jsonl, whole_lines, write_jsonl
from viaticum.outcomes import checked_pair, parse_outcome, read_outcomes, read_verdicts, write_outcomes
from viaticum.questions import Question
from viaticum.routers.query.outcome_matrix import canonical_answer
from viaticum.stop_strings import AnswerStream
from viaticum.strategies import get as get_strategy
from viaticum.strategies.answers import is_right
from viaticum.strategies.verify import YES
from viaticum.thinking import AUTO, ThinkingFormat, ThinkingSplitter
from viaticum.types import Completion, FinishReason, Outcome, Pair, Usage

Key = tuple[str, str, str]  # model, strategy, id of the question


@dataclass(frozen=True, slots=True)
class Change:
    """A row that is read otherwise than before."""

    before: Outcome
    after: Outcome

    @property
    def newly_right(self) -> bool:
        return self.after.correct and not self.before.correct

    @property
    def newly_wrong(self) -> bool:
        return self.before.correct and not self.after.correct


@dataclass(frozen=True, slots=True)
class Rereading:
    """The rows of the new table, and those of them that changed. unfinished: the run has not ended yet."""

    outcomes: tuple[Outcome, ...]
    changes: tuple[Change, ...]
    unfinished: bool


def reread(
    questions: Sequence[Question],
    out: str | Path,
    *,
    catalogue: Catalogue,
    completions: str | Path | None = None,
    with_text: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Rereading:
    """Read the texts of a profile again and write its table anew, and the texts file with the new answers.

    Both are replaced in one step each. Verdicts on answers that are read otherwise now are left out, since
    they are on other answers. Where a run has not ended yet there is only its journal: its rows make
    a first table, and the journal stays for the run to go on.

    Args:
        questions: of the profile; their right answers and kinds are those of now.
        out: the table of before.
        catalogue: says how the models mark thoughts in texts of before; others are split by well-known tags.
        completions: the texts file of before.
        with_text: whether the table holds the questions' texts, where it does now; of verdicts too.
        progress: called with rows done and rows in all.

    Raises:
        InputError: there is no table or journal, no texts file for a table, or another run writes the table.
        DataError: a row has no text, no question or another question; a question has no right answer.
    """
    out = Path(out)
    unfinished = not out.is_file() and Path(f"{out}.journal").is_file()
    known = {question.id: question for question in questions}
    with nullcontext() if unfinished else profile_lock(out):  # the run that goes on has it
        rows, verdicts, kept = _read(out, completions, unfinished=unfinished)
        changed = []
        for number, row in enumerate(rows, 1):
            changed.append(_reread_row(row, kept, known, catalogue, out))
            if progress is not None:
                progress(number, len(rows))
        changes = [Change(before, after) for before, after in zip(rows, changed, strict=True)]
        table = [*changed, *_standing(verdicts, changes)]
        table = table if with_text else [replace(row, question="") for row in table]
        write_outcomes(out, table, {each.id: each.columns for each in questions if each.columns})
        if completions is not None:
            write_jsonl(completions, (kept_line(row, kept[_key(row)]) for row in changed))
    found = tuple(each for each in changes if _differs(each))
    return Rereading(tuple(table[: len(changed)]), found, unfinished)


def _read(
    out: Path, completions: str | Path | None, *, unfinished: bool
) -> tuple[list[Outcome], list[Outcome], dict[Key, Samples]]:
    """The answers and verdicts of before, and what the models wrote."""
    if unfinished:
        rows, kept = _read_journal(Path(f"{out}.journal"))
        return rows, [], kept
    if completions is None:
        raise InputError("reading again needs the texts of the profile; add: --completions TEXTS.jsonl")
    return read_outcomes(out), read_verdicts(out), _read_texts(completions)


def _standing(verdicts: Iterable[Outcome], changes: Sequence[Change]) -> Iterator[Outcome]:
    """The verdicts on answers that are as they were, right or wrong by the right answers of now."""
    of = {(each.after.pair, each.after.question_id): each for each in changes}
    for row in verdicts:
        change = of.get((checked_pair(row) or row.pair, row.question_id))
        if change is None:
            yield row
        elif canonical_answer(change.before.answer) == canonical_answer(change.after.answer):
            yield replace(row, correct=(row.answer == YES) == change.after.correct)


def _differs(change: Change) -> bool:
    before, after = change.before, change.after
    return (before.answer, before.correct) != (after.answer, after.correct)


def _key(row: Outcome) -> Key:
    return row.model, row.strategy, row.question_id


def _reread_row(
    row: Outcome,
    kept: Mapping[Key, Samples],
    known: Mapping[str, Question],
    catalogue: Catalogue,
    out: Path,
) -> Outcome:
    where = f"{out}: {row.pair} on question {row.question_id!r}"
    samples, question = kept.get(_key(row)), known.get(row.question_id)
    if samples is None:
        raise DataError(f"{where} has no text in the texts file; give the one that belongs to this table")
    if question is None or (row.question and row.question != question.query.text):
        raise DataError(f"{where} is not one of these questions; give the file that was profiled")
    if question.gold is None:
        raise DataError(f"question {question.id!r} has no answer; profiling compares with known answers")
    strategy, tags = get_strategy(row.strategy), _format_of(row.pair, catalogue)
    readings = [strategy.read(each, question.query) for each in _completions(samples, tags)]
    verdict = strategy.vote(readings, question.query) or strategy.vote(readings, question.query, last=True)
    answer = verdict.value if verdict is not None else None
    return replace(row, answer=answer, correct=is_right(answer, question.accepted, question.query.kind))


def _format_of(pair: Pair, catalogue: Catalogue) -> ThinkingFormat:
    return catalogue.thinking_format(pair.model) if pair.model in catalogue else AUTO


def _completions(samples: Samples, tags: ThinkingFormat) -> Iterator[Completion]:
    for text, thinking, ended in zip(samples.texts, samples.thinking, samples.finish_reasons, strict=True):
        if thinking:
            yield Completion(text, Usage(), ended, thinking=thinking)
        else:
            yield _split(text, ended, tags)


def _split(text: str, ended: FinishReason, tags: ThinkingFormat) -> Completion:
    """A text that was kept before thoughts were kept apart."""
    answer = AnswerStream(ThinkingSplitter(tags))
    answer.push(text)
    answer.finish(ended=ended == "stop")
    return Completion(answer.text, Usage(), ended, thinking=answer.thinking)


def _read_texts(path: str | Path) -> dict[Key, Samples]:
    kept = {}
    for number, record in read_jsonl(path):
        try:
            kept[record["model"], record["strategy"], record["question_id"]] = Samples.parse(record)
        except (KeyError, TypeError):
            raise DataError(
                f"{path}, line {number}: not a line of kept texts; give the file that profile wrote with "
                "--completions"
            ) from None
    return kept


def _read_journal(path: Path) -> tuple[list[Outcome], dict[Key, Samples]]:
    """The rows of a run that goes on; the line that it is writing is left alone."""
    rows: dict[Key, Outcome] = {}
    kept = {}
    for number, line in islice(whole_lines(path), 1, None):
        try:
            record: dict[str, Any] = json.loads(line)
            row = parse_outcome(record, f"{path}, line {number}")
            if checked_pair(row) is None:
                rows[_key(row)], kept[_key(row)] = row, Samples.parse(record)
        except (ValueError, KeyError):
            raise DataError(f"{path}, line {number}: not a row of a profile's journal") from None
    return list(rows.values()), kept
