"""Profiling: every local (model, strategy) pair on questions with known answers.

Finished rows go to a journal beside the output at once, so that a killed run goes on where it stopped. Leaves
out fitting a router on the table (`viaticum.routers.query`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import DataError, InputError
from viaticum.files import JournalFile, write_jsonl
from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.models.decoding_modes import in_measured_modes
from viaticum.models.local import LocalModels
from viaticum.models.settings import prompt, resolve
from viaticum.outcomes import VERDICT, parse_outcome, write_outcomes
from viaticum.questions import Question
from viaticum.routers.query.outcome_matrix import canonical_answer
from viaticum.routers.query.plans import SELF_CHECK
from viaticum.strategies import get as get_strategy
from viaticum.strategies.answers import is_right
from viaticum.strategies.verify import PROMPT as VERIFY_PROMPT
from viaticum.strategies.verify import YES, AnsweredQuery
from viaticum.types import VERIFY, Completion, FinishReason, Outcome, Pair, Reading, Usage

# Pair, rows of it that are done, rows in all done, rows in all, accuracy of the pair so far.
Progress = Callable[[Pair, int, int, int, float], None]


def profile(
    questions: Sequence[Question],
    pairs: Sequence[Pair],
    out: str | Path,
    *,
    catalogue: Catalogue,
    dataset: str,
    slots: int = 32,
    with_text: bool = True,
    completions: str | Path | None = None,
    settings: GenerationSettings = NO_SETTINGS,
    verifiers: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[Outcome]:
    """Measure every pair on every question; `out` (.parquet or .jsonl) is written at the end.

    Verifiers then say of every answer whether it is right. Equal answers to a question are asked about once,
    and each verdict on them costs as much.

    Resumes from `out`.journal where that was made from the same questions. A row's seconds run from its first
    decoding step to its last, with the time that it waits for other rows of its batch. A pair of models is
    measured in the mode that its entry names, else in the routed one.

    Args:
        questions: all with a known answer.
        pairs: (model, strategy), of local models.
        out: the outcome table.
        catalogue: of the models, with their prices.
        dataset: name of the questions in the table.
        slots: sequences that a model decodes at the same time.
        with_text: whether the table holds the questions' texts; False for a table that is published where the
            questions may not be.
        completions: a JSONL file with what the models wrote, a line for every row of the table: question_id,
            model, strategy, answer, correct, finish_reason, and for each sample its text (`texts`), thought
            (`thinking`) and end (`finish_reasons`). `rereading` reads it.
        settings: how texts are generated, whatever strategies and catalogue entries say; not of verdicts.
        verifiers: local models whose verdicts the table is to have (`viaticum.outcomes.read_verdicts`).
        progress: called after every row.

    Returns:
        The rows of the table, those of verdicts last.

    Raises:
        DataError: a question has no known answer.
        InputError: the journal belongs to another run, a file cannot be written, or a model has no template.
        UnknownPrice: a model has no price.
    """
    for question in questions:
        if question.gold is None:
            raise DataError(f"question {question.id!r} has no answer; profiling compares with known answers")
    names = [*(pair.model for pair in pairs), *verifiers]
    for name in names:
        catalogue.prices(catalogue[name].members)
    checks = [
        Pair(name, f"{VERDICT}{pair}") for name in verifiers for pair in _checked(name, pairs, catalogue)
    ]
    pool = LocalModels(in_measured_modes(catalogue), slots=slots)
    for name in names:
        pool.model(name)  # raises if it cannot be opened, before anything is written
    out = Path(out)
    fingerprint = _fingerprint(questions, catalogue, pairs, dataset, settings, verifiers)
    journal = ProfileJournal(out.with_name(out.name + ".journal"), fingerprint)
    total = (len(pairs) + len(checks)) * len(questions)
    try:
        _run_pairs(questions, pairs, pool, dataset, journal, settings, (progress, total))
        outcomes = [journal.rows[pair][question.id] for pair in pairs for question in questions]
        for name in verifiers:
            own = set(_checked(name, pairs, catalogue))
            theirs = [row for row in outcomes if row.pair in own]
            _run_verifier(name, questions, theirs, pool, journal, (progress, total))
    finally:
        journal.close()
    verdicts = [
        journal.rows[check][question.id]
        for check in checks
        for question in questions
        if question.id in journal.rows.get(check, {})
    ]
    rows = outcomes + verdicts if with_text else [replace(row, question="") for row in outcomes + verdicts]
    if completions is not None:
        write_jsonl(completions, (journal.completion(row) for row in rows[: len(outcomes)]))
    write_outcomes(out, rows, {each.id: each.columns for each in questions if each.columns})
    journal.path.unlink(missing_ok=True)
    return rows


def _run_pairs(
    questions: Sequence[Question],
    pairs: Sequence[Pair],
    pool: LocalModels,
    dataset: str,
    journal: ProfileJournal,
    settings: GenerationSettings,
    progress: tuple[Progress | None, int],
) -> None:
    """Add the rows that the journal lacks. Pairs of one model run in turn, so that its weights stay warm.

    progress: with the number of all rows.
    """
    for pair in sorted(pairs):
        done = journal.rows.setdefault(pair, {})
        todo = [question for question in questions if question.id not in done]
        for row, samples in _run(pair, todo, pool, dataset, settings):
            journal.add(row, samples)
            _report(pair, journal, progress)


def _checked(verifier: str, pairs: Sequence[Pair], catalogue: Catalogue) -> list[Pair]:
    """The pairs of other models. Raises `InputError` where there is none."""
    found = [pair for pair in pairs if not catalogue.is_same_model(verifier, pair.model)]
    if not found:
        raise InputError(f"{verifier} does not check its own answers; {SELF_CHECK}")
    return found


def _run_verifier(
    model: str,
    questions: Sequence[Question],
    outcomes: Sequence[Outcome],
    pool: LocalModels,
    journal: ProfileJournal,
    progress: tuple[Progress | None, int],
) -> None:
    """Add the verdicts on these answers that the journal lacks; those on equal answers together."""
    same: dict[tuple[str, str], list[Outcome]] = {}
    for row in outcomes:
        if (answer := canonical_answer(row.answer)) is not None:
            same.setdefault((row.question_id, answer), []).append(row)
    rows = [[row for row in each if not _has_verdict(model, row, journal)] for each in same.values()]
    rows = [each for each in rows if each]
    known = {question.id: question.query for question in questions}
    queries = [AnsweredQuery.of(known[each[0].question_id], str(each[0].answer)) for each in rows]
    strategy, spec = get_strategy(VERIFY), pool.catalogue[model]
    generation = resolve(pool.catalogue, model, strategy, NO_SETTINGS)
    chats = [prompt(spec, strategy, query, NO_SETTINGS) for query in queries]
    for number, completion in pool.model(model).generate_all(chats, generation) if chats else ():
        value = strategy.read(completion, queries[number]).value
        for row in rows[number]:
            verdict = replace(
                row,
                model=model,
                strategy=f"{VERDICT}{row.pair}",
                answer=value,
                correct=(value == YES) == row.correct,
                **_measured(completion, pool.catalogue),
            )
            journal.add(verdict, Samples.of([completion]))
            _report(verdict.pair, journal, progress)


def _has_verdict(model: str, row: Outcome, journal: ProfileJournal) -> bool:
    return row.question_id in journal.rows.get(Pair(model, f"{VERDICT}{row.pair}"), {})


def _report(pair: Pair, journal: ProfileJournal, progress: tuple[Progress | None, int]) -> None:
    report, total = progress
    if report is not None:
        done = journal.rows[pair]
        right = sum(each.correct for each in done.values()) / len(done)
        report(pair, len(done), sum(map(len, journal.rows.values())), total, right)


def _run(
    pair: Pair, questions: list[Question], pool: LocalModels, dataset: str, settings: GenerationSettings
) -> Iterator[tuple[Outcome, Samples]]:
    """Outcomes of one pair with its samples, in the order in which they end.

    A strategy with several samples draws one for every question that is open, then the next.
    """
    if not questions:
        return
    model, strategy = pool.model(pair.model), get_strategy(pair.strategy)
    readings: dict[int, list[Reading]] = {index: [] for index in range(len(questions))}
    samples: dict[int, list[Completion]] = {index: [] for index in readings}
    usage = dict.fromkeys(readings, Usage())
    spec = pool.catalogue[pair.model]
    for sample in range(strategy.samples):
        generation = resolve(pool.catalogue, pair.model, strategy, settings, sample=sample)
        still = list(readings)
        chats = [prompt(spec, strategy, questions[index].query, settings) for index in still]
        for number, completion in model.generate_all(chats, generation):
            index = still[number]
            question = questions[index]
            usage[index] += completion.usage
            samples[index].append(completion)
            readings[index].append(strategy.read(completion, question.query))
            verdict = strategy.vote(readings[index], question.query)
            if verdict is None:
                continue
            del readings[index]
            total = replace(completion, usage=usage[index])
            row = _outcome(pair, question, verdict, total, dataset, pool.catalogue)
            yield row, Samples.of(samples.pop(index))


def _outcome(
    pair: Pair,
    question: Question,
    reading: Reading,
    completion: Completion,
    dataset: str,
    catalogue: Catalogue,
) -> Outcome:
    return Outcome(
        dataset=dataset,
        question_id=question.id,
        question=question.query.text,
        model=pair.model,
        strategy=pair.strategy,
        answer=reading.value,
        correct=is_right(reading.value, question.accepted, question.query.kind),
        **_measured(completion, catalogue),
    )


def _measured(completion: Completion, catalogue: Catalogue) -> dict[str, Any]:
    """The last columns of a row."""
    return {
        "input_tokens": completion.usage.input_tokens,
        "output_tokens": completion.usage.output_tokens,
        "cost_nanousd": cost_of(completion, catalogue),
        "seconds": round(completion.usage.seconds, 3),
        "finish_reason": completion.finish_reason,
    }


def cost_of(completion: Completion, catalogue: Catalogue) -> int:
    """Cost of a completion in nano-dollars, at the catalogue's prices. Raises `UnknownPrice`."""
    models = completion.usage.models
    prices = catalogue.prices(models)
    return sum(prices[name].cost(count.input_tokens, count.output_tokens) for name, count in models.items())


@dataclass(frozen=True, slots=True)
class Samples:
    """What a model wrote for one row, one entry a sample: texts, thoughts, and how each ended."""

    texts: tuple[str, ...]
    thinking: tuple[str, ...]
    finish_reasons: tuple[FinishReason, ...]

    @classmethod
    def of(cls, completions: Sequence[Completion]) -> Samples:
        return cls(
            tuple(each.text for each in completions),
            tuple(each.thinking for each in completions),
            tuple(each.finish_reason for each in completions),
        )

    @classmethod
    def parse(cls, record: Mapping[str, Any]) -> Samples:
        """Read a line of a journal or texts file; older ones have the end of the last sample alone."""
        texts = tuple(record["texts"])
        thinking = tuple(record.get("thinking") or ("",) * len(texts))
        last: FinishReason = record.get("finish_reason") or "stop"
        ends = record.get("finish_reasons") or (*("stop",) * (len(texts) - 1), last)
        return cls(texts, thinking, tuple(ends))


def kept_line(row: Outcome, samples: Samples) -> dict[str, Any]:
    """A line of the texts file: what the models wrote for a row, with the answer that was read from it."""
    kept = ("question_id", "model", "strategy", "answer", "correct", "finish_reason")
    return {name: getattr(row, name) for name in kept} | asdict(samples)


class ProfileJournal:
    """Journal of finished rows, one JSON line each; the first line holds the fingerprint of the run."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.rows: dict[Pair, dict[str, Outcome]] = {}
        self._samples: dict[tuple[Pair, str], Samples] = {}
        self._file = JournalFile(path)
        self._read(fingerprint)

    def add(self, row: Outcome, samples: Samples) -> None:
        self._file.append(asdict(row) | asdict(samples))
        self._remember(row, samples)

    def completion(self, row: Outcome) -> dict[str, Any]:
        """What the models wrote for a row, with the answer that was parsed from it."""
        return kept_line(row, self._samples[row.pair, row.question_id])

    def close(self) -> None:
        """Close the file; one without a row is removed, so that a run that was refused leaves nothing."""
        self._file.close()
        if not any(self.rows.values()):
            self.path.unlink(missing_ok=True)

    def _read(self, fingerprint: str) -> None:
        lines = [(number, json.loads(line)) for number, line in self._file.lines()]
        if lines and lines[0][1].get("fingerprint") != fingerprint:
            if len(lines) > 1:
                raise InputError(
                    f"{self.path} belongs to other questions, models, prompts or pairs; "
                    f"remove it to start anew"
                )
            lines = []
            self.path.unlink()  # an earlier run was killed before its first row: nothing is lost
        for number, record in lines[1:]:
            row = parse_outcome(record, f"{self.path}, line {number}")
            self._remember(row, Samples.parse(record))
        if not lines:
            self._file.append({"fingerprint": fingerprint})

    def _remember(self, row: Outcome, samples: Samples) -> None:
        self.rows.setdefault(row.pair, {})[row.question_id] = row
        self._samples[row.pair, row.question_id] = samples


def _entry(spec: ModelSpec) -> str:
    return json.dumps(spec.identity, separators=(",", ":"), ensure_ascii=False)


def _fingerprint(
    questions: Sequence[Question],
    catalogue: Catalogue,
    pairs: Sequence[Pair],
    dataset: str,
    settings: GenerationSettings,
    verifiers: Sequence[str],
) -> str:
    """Hash of what the outcomes depend on: questions, gold answers, models, prompts and settings."""
    inputs = {
        "journal": 2,  # format of its lines: 2 has the texts
        "dataset": dataset,
        "pairs": [str(pair) for pair in pairs],
        "models": {pair.model: _entry(catalogue[pair.model]) for pair in pairs},
        "prompts": {
            pair.strategy: get_strategy(pair.strategy).messages(questions[0].query) for pair in pairs
        },
        "questions": [(each.id, each.query.text, *each.accepted) for each in questions],
    }
    own = {pair.strategy: get_strategy(pair.strategy).changed_settings for pair in pairs}
    if settings.given or any(own.values()):  # else as in the journals of earlier versions
        inputs["settings"] = [settings.given, own]
    if verifiers:
        inputs["verifiers"] = [{name: _entry(catalogue[name]) for name in verifiers}, VERIFY_PROMPT]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
