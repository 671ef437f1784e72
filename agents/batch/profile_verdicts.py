"""Verdicts of local models on the answers of an outcome table, in a run of `profile` or on a finished table.

A verifier is asked about the answers of other models; equal answers to a question are asked about once, and
each verdict on them costs as much. A finished table keeps its answers, further columns and verdicts as they
are: only what is missing is asked, without the models, strategies and prices of its answers. Leaves out plans
with a check (`viaticum.routers.query.plans`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from viaticum.agents.batch.profile_journal import (
    ProfileJournal,
    Progress,
    RowProgress,
    Samples,
    profile_lock,
)
from viaticum.agents.batch.row_costs import measured
from viaticum.budgets.records import digest
from viaticum.catalogue import Catalogue
from viaticum.errors import DataError, InputError, PromptTooLong
from viaticum.generation import NO_SETTINGS
from viaticum.models.decoding_modes import in_measured_modes
from viaticum.models.local import LocalModels
from viaticum.models.settings import prompt, resolve
from viaticum.outcomes import COLUMNS, VERDICT, checked_pair, outcome_rows, parse_outcome, write_rows
from viaticum.questions import Question
from viaticum.routers.query.outcome_matrix import canonical_answer
from viaticum.routers.query.plans import SELF_CHECK
from viaticum.strategies import get as get_strategy
from viaticum.strategies.verify import YES, AnsweredQuery
from viaticum.types import VERIFY, Completion, Message, Outcome, Pair, Query, Usage

JOURNAL = ".verdicts.journal"  # after the name of a finished table
_ADDED = "verdicts"  # in place of a fingerprint: each of its lines says what was asked
Key = tuple[Pair, str, str]  # verifier with `verify:` and the pair that was checked, data set, question id


@dataclass(frozen=True)
class OpenCheck:
    """Equal answers to a question that a verifier is to be asked about, or was asked about elsewhere.

    Args:
        verifier: its name.
        rows: the answers that have no verdict of it.
        query: the question with the first of them.
        chat: the verifier's prompt.
        asked: digest of what it is asked, and how.
        given: its verdict on an answer that is equal.
    """

    verifier: str
    rows: tuple[Outcome, ...]
    query: AnsweredQuery
    chat: list[Message]
    asked: str
    given: Outcome | None


@dataclass(frozen=True, slots=True)
class VerdictPlan:
    """What verifiers will be asked on a finished table, before the first call.

    Args:
        answers: the answers that a verifier may check, each as often as there are verifiers.
        there: verdicts on them that the table, or a run that was killed, has.
        calls: what is asked.
        unanswered: of the questions, those of which the table has no row.
    """

    answers: int
    there: int
    calls: int
    unanswered: int


def other_models(verifier: str, pairs: Sequence[Pair], catalogue: Catalogue) -> list[Pair]:
    """The pairs whose answers it may check. Raises `InputError` where all are of its own model."""
    found = [pair for pair in pairs if not catalogue.is_same_model(verifier, pair.model)]
    if not found:
        raise InputError(f"{verifier} does not check its own answers; {SELF_CHECK}")
    return found


def verdict_on(row: Outcome, verdict: Outcome) -> Outcome:
    """A verdict as one on another answer, which is equal."""
    says = (verdict.answer == YES) == row.correct
    checked = {name: getattr(row, name) for name in ("dataset", "question_id", "question")}
    return replace(verdict, strategy=f"{VERDICT}{row.pair}", correct=says, **checked)


def open_checks(
    verifier: str,
    answers: Sequence[Outcome],
    queries: Mapping[str, Query],
    known: Mapping[Key, Outcome],
    journal: ProfileJournal,
    catalogue: Catalogue,
) -> Iterator[OpenCheck]:
    """What is left of a verifier's work.

    Args:
        verifier: its name.
        answers: of pairs that it may check.
        queries: the questions by id.
        known: its verdicts on them.
        journal: of verdicts that were given before a kill.
        catalogue: of the verifier.
    """
    same: dict[tuple[str, str, bool], list[Outcome]] = {}
    for row in answers:
        if (answer := canonical_answer(row.answer)) is not None:
            same.setdefault((row.question_id, answer, row.correct), []).append(row)
    strategy, spec = get_strategy(VERIFY), catalogue[verifier]
    how = [spec.identity, asdict(resolve(catalogue, verifier, strategy, NO_SETTINGS))]
    for rows in same.values():
        found = [known.get(_key(verifier, row)) for row in rows]
        left = tuple(row for row, verdict in zip(rows, found, strict=True) if verdict is None)
        if left:
            query = AnsweredQuery.of(queries[left[0].question_id], str(left[0].answer))
            chat = prompt(spec, strategy, query, NO_SETTINGS)
            asked = digest([*how, chat])
            given = next(filter(None, found), None) or journal.verdicts.get(asked)
            yield OpenCheck(verifier, left, query, chat, asked, given)


def give_verdicts(
    checks: Sequence[OpenCheck], pool: LocalModels, journal: ProfileJournal, progress: RowProgress
) -> dict[Key, Outcome]:
    """The verdicts that are left, in the order of these checks, which are of one verifier."""
    keys = (_key(check.verifier, row) for check in checks for row in check.rows)
    found: dict[Key, Outcome | None] = dict.fromkeys(keys)

    def add(check: OpenCheck, verdict: Outcome) -> None:
        for row in check.rows:
            found[_key(check.verifier, row)] = given = verdict_on(row, verdict)
            progress.add(given)

    for check in checks:
        if check.given is not None:
            add(check, check.given)
    if asked := [check for check in checks if check.given is None]:
        for check, verdict in _ask(asked, pool, journal):
            add(check, verdict)
    return {key: verdict for key, verdict in found.items() if verdict is not None}


def _ask(
    asked: Sequence[OpenCheck], pool: LocalModels, journal: ProfileJournal
) -> Iterator[tuple[OpenCheck, Outcome]]:
    """Ask a verifier, and keep each verdict at once. Yields them in the order in which they end.

    A question with an answer that does not fit its context has no verdict and costs nothing, as in a plan.
    """
    model, strategy = pool.model(asked[0].verifier), get_strategy(VERIFY)
    generation = resolve(pool.catalogue, model.name, strategy, NO_SETTINGS)

    def verdict(check: OpenCheck, completion: Completion) -> Outcome:
        value = strategy.read(completion, check.query).value
        row = replace(check.rows[0], model=model.name, answer=value)
        return verdict_on(check.rows[0], replace(row, **measured(completion, pool.catalogue)))

    fitting = []
    for check in asked:
        try:
            model.worst_case_of(check.chat, generation)
            fitting.append(check)
        except PromptTooLong:
            yield check, verdict(check, Completion("", Usage(), "error"))
    for number, completion in model.generate_all([check.chat for check in fitting], generation):
        check = fitting[number]
        found = verdict(check, completion)
        journal.add_verdict(check.asked, found, Samples.of([completion]))
        yield check, found


def add_verdicts(
    questions: Sequence[Question],
    out: str | Path,
    *,
    catalogue: Catalogue,
    verifiers: Sequence[str],
    dataset: str | None = None,
    pairs: Sequence[Pair] = (),
    slots: int = 32,
    with_text: bool = True,
    completions: str | Path | None = None,
    plan: Callable[[VerdictPlan], None] | None = None,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Add the verdicts that a finished table lacks. Its other rows stay as they are; none is asked again.

    Resumes from `out`.verdicts.journal, which a killed run leaves; the table is replaced in one step at the
    end.

    Args:
        questions: with the ids of the table; those that it has no answer to are passed over.
        out: the table.
        catalogue: of the verifiers, with their prices.
        verifiers: local models.
        dataset: the rows' data set; needed where the table has several.
        pairs: whose answers are checked; all of the table by default.
        slots: sequences that a model decodes at the same time.
        with_text: whether the table keeps the questions' texts.
        completions: the texts file of the answers, which stays as it is.
        plan: called once with what will be asked, before the first call.
        progress: called after every verdict.

    Returns:
        The rows of these pairs, answers and verdicts of all verifiers, those of verdicts last.

    Raises:
        InputError: a verifier may check none of the answers, the table has no such pair or data set, there is
            no such texts file, a file cannot be written, or another run writes the table.
        DataError: the table is damaged, or a question is another one there.
        UnknownPrice: a verifier has no price.
    """
    out, pool = Path(out), _opened(catalogue, verifiers, slots)
    if completions is not None and not Path(completions).is_file():
        raise InputError(f"{out} is finished, and the texts of its answers are not at {completions}")
    with profile_lock(out):
        table = _Table.read(out)
        answers = table.answers(questions, dataset, pairs)
        wanted = list(dict.fromkeys(row.pair for row in answers))
        checked = {}
        for name in verifiers:
            theirs = other_models(name, wanted, catalogue)
            checked[name] = [row for row in answers if row.pair in theirs]
        journal = ProfileJournal(out.with_name(out.name + JOURNAL), _ADDED)
        try:
            checks, queries = [], {each.id: each.query for each in questions}
            for name, rows in checked.items():
                checks.append([*open_checks(name, rows, queries, table.verdicts, journal, catalogue)])
            left = sum(len(check.rows) for check in chain(*checks))
            if plan is not None:
                passed = len(queries.keys() - {row.question_id for row in answers})
                total = sum(canonical_answer(row.answer) is not None for row in chain(*checked.values()))
                plan(_plan(total, [*chain(*checks)], journal, passed))
            reporter = RowProgress(progress, left)
            for each in checks:
                table.verdicts |= give_verdicts(each, pool, journal, reporter)
        finally:
            journal.close()
        if left or not with_text:
            table.write(out, with_text=with_text)
        journal.path.unlink(missing_ok=True)
    made = [*answers, *(row for row in table.verdicts.values() if checked_pair(row) in set(wanted))]
    return made if with_text else [replace(row, question="") for row in made]


def _plan(total: int, checks: Sequence[OpenCheck], journal: ProfileJournal, unanswered: int) -> VerdictPlan:
    """What is asked. total: answers that verifiers may check. checks: those that the table leaves open."""
    resumed = sum(len(each.rows) for each in checks if each.asked in journal.verdicts)
    there = total - sum(len(each.rows) for each in checks) + resumed
    return VerdictPlan(total, there, sum(each.given is None for each in checks), unanswered)


def _opened(catalogue: Catalogue, verifiers: Sequence[str], slots: int) -> LocalModels:
    """The verifiers, opened before anything is written."""
    pool = LocalModels(in_measured_modes(catalogue), slots=slots)
    for name in verifiers:
        catalogue.prices(catalogue[name].members)
        pool.model(name)
    return pool


def _key(verifier: str, row: Outcome) -> Key:
    return Pair(verifier, f"{VERDICT}{row.pair}"), row.dataset, row.question_id


class _Table:
    """A finished table: its answers with all their columns, and its verdicts, where they fit them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[tuple[Outcome, Mapping[str, Any]]] = []  # answers, and their further columns
        self.verdicts: dict[Key, Outcome] = {}
        self._others: dict[Key, Mapping[str, Any]] = {}

    @classmethod
    def read(cls, path: Path) -> _Table:
        """Raises `DataError` for a row that is no outcome."""
        table, verdicts = cls(path), []
        for source, values in outcome_rows(path):
            row = parse_outcome(values, source)
            others = {name: value for name, value in values.items() if name not in COLUMNS}
            if checked_pair(row) is None:
                table.rows.append((row, others))
            else:
                verdicts.append((row, others))
        right = {(row.pair, row.dataset, row.question_id): row.correct for row, _ in table.rows}
        for row, others in verdicts:
            answer = right.get((checked_pair(row) or row.pair, row.dataset, row.question_id))
            if answer is None or (answer == (row.answer == YES)) == row.correct:
                key = row.pair, row.dataset, row.question_id
                table.verdicts[key], table._others[key] = row, others
        return table

    def answers(
        self, questions: Sequence[Question], dataset: str | None, pairs: Sequence[Pair]
    ) -> list[Outcome]:
        """The answers of a data set and some pairs to these questions."""
        rows, names = [row for row, _ in self.rows], {row.dataset for row, _ in self.rows}
        if dataset is None and len(names) > 1:
            raise InputError(f"{self.path} has data sets: {', '.join(sorted(names))}; name one: --dataset")
        if missing := sorted(map(str, set(pairs) - {row.pair for row in rows})):
            raise InputError(
                f"{self.path} is finished, and has no answers of {', '.join(missing)}; profile them into "
                "another table, and join the two: viaticum outcomes merge"
            )
        known = {each.id: each.query.text for each in questions}
        found = []
        for row in rows:
            if row.question_id not in known or (dataset or row.dataset) != row.dataset:
                continue
            if row.question and row.question != known[row.question_id]:
                raise DataError(
                    f"{self.path}: {row.question_id} is another question there; give the file that it is of"
                )
            if not pairs or row.pair in pairs:
                found.append(row)
        if not found:
            raise InputError(
                f"{self.path} has no answer to these questions{f' in {dataset}' if dataset else ''}; "
                "give the file of its questions, or name another --out"
            )
        return found

    def write(self, path: Path, *, with_text: bool) -> None:
        """Write all rows anew. A further column of a new verdict is that of its question's first answer."""
        of_question: dict[tuple[str, str], Mapping[str, Any]] = {}
        for row, others in self.rows:
            of_question.setdefault((row.dataset, row.question_id), others)
        rows = [asdict(row) | dict(others) for row, others in self.rows]
        for key, row in self.verdicts.items():
            others = self._others.get(key, of_question.get(key[1:], {}))
            rows.append(asdict(row) | dict(others))
        if not with_text:
            rows = [row | {"question": ""} for row in rows]
        names = dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)
        write_rows(path, rows, list(names))
