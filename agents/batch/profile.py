"""Profiling: every local (model, strategy) pair on questions with known answers.

Finished rows go to a journal beside the output at once, so that a killed run goes on where it stopped. Leaves
out the verdicts of verifiers (`agents.batch.profile_verdicts`) and fitting a router on the table
(`viaticum.routers.query`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from viaticum.agents.batch.profile_journal import (
    ProfileJournal,
    Progress,
    RowProgress,
    Samples,
    profile_lock,
)
from viaticum.agents.batch.profile_verdicts import add_verdicts, give_verdicts, open_checks, other_models
from viaticum.agents.batch.row_costs import measured
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import DataError
from viaticum.files import write_jsonl
from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.models.decoding_modes import in_measured_modes
from viaticum.models.local import LocalModels
from viaticum.models.settings import prompt, resolve
from viaticum.outcomes import checked_pair, write_outcomes
from viaticum.questions import Question
from viaticum.strategies import get as get_strategy
from viaticum.strategies.answers import is_right
from viaticum.types import Completion, Outcome, Pair, Reading, Usage


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

    Verifiers then say of every answer of another model whether it is right. On a table that is finished they
    are asked for the verdicts that it lacks, and nothing else is asked (`profile_verdicts.add_verdicts`).

    Resumes from `out`.journal where that was made from the same questions; verifiers can be added by then. A
    row's seconds run from its first decoding step to its last, with the time that it waits for other rows of
    its batch. A pair of models is measured in the mode that its entry names, else in the routed one.

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
            Without any a finished table is measured and written anew.
        progress: called after every row.

    Returns:
        The rows of the table, those of verdicts last.

    Raises:
        DataError: a question has no known answer.
        InputError: the journal belongs to another run, another run writes the table, a verifier may check no
            answer, a file cannot be written, or a model has no template.
        UnknownPrice: a model has no price.
    """
    out = Path(out)
    if verifiers and is_finished(out):
        return add_verdicts(
            questions,
            out,
            catalogue=catalogue,
            verifiers=verifiers,
            dataset=dataset,
            pairs=pairs,
            slots=slots,
            with_text=with_text,
            completions=completions,
            progress=progress,
        )
    for question in questions:
        if question.gold is None:
            raise DataError(f"question {question.id!r} has no answer; profiling compares with known answers")
    names = [*(pair.model for pair in pairs), *verifiers]
    for name in names:
        catalogue.prices(catalogue[name].members)
    checked = {name: other_models(name, pairs, catalogue) for name in verifiers}
    pool = LocalModels(in_measured_modes(catalogue), slots=slots)
    for name in names:
        pool.model(name)  # raises if it cannot be opened, before anything is written
    fingerprint = _fingerprint(questions, catalogue, pairs, dataset, settings)
    total = (len(pairs) + sum(map(len, checked.values()))) * len(questions)
    with profile_lock(out):
        journal = ProfileJournal(_journal_path(out), fingerprint)
        try:
            reporter = RowProgress(
                progress, total, (row for of in journal.rows.values() for row in of.values())
            )
            _run_pairs(questions, pairs, pool, dataset, journal, settings, reporter)
            outcomes = [journal.rows[pair][question.id] for pair in pairs for question in questions]
            queries = {each.id: each.query for each in questions}
            verdicts: list[Outcome] = []
            for name, own in checked.items():
                answers = [row for row in outcomes if row.pair in own]
                checks = [*open_checks(name, answers, queries, {}, journal, catalogue)]
                verdicts += give_verdicts(checks, pool, journal, reporter).values()
        finally:
            journal.close()
        rows = [*outcomes, *_in_order(verdicts, checked, pairs, questions)]
        rows = rows if with_text else [replace(row, question="") for row in rows]
        if completions is not None:
            write_jsonl(completions, (journal.completion(row) for row in rows[: len(outcomes)]))
        write_outcomes(out, rows, {each.id: each.columns for each in questions if each.columns})
        journal.path.unlink(missing_ok=True)
    return rows


def is_finished(out: Path) -> bool:
    """Whether a table is there, and no run of `profile` that would write it anew was killed."""
    return out.is_file() and not _journal_path(out).is_file()


def _journal_path(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


def _in_order(
    verdicts: Sequence[Outcome],
    checked: Mapping[str, Sequence[Pair]],
    pairs: Sequence[Pair],
    questions: Sequence[Question],
) -> list[Outcome]:
    """By verifier, pair and question, in the order in which these were given."""
    given = {(row.model, checked_pair(row), row.question_id): row for row in verdicts}
    order = ((name, pair, each.id) for name in checked for pair in pairs for each in questions)
    return [given[key] for key in order if key in given]


def _run_pairs(
    questions: Sequence[Question],
    pairs: Sequence[Pair],
    pool: LocalModels,
    dataset: str,
    journal: ProfileJournal,
    settings: GenerationSettings,
    progress: RowProgress,
) -> None:
    """Add the rows that the journal lacks. Pairs of one model run in turn, so that its weights stay warm."""
    for pair in sorted(pairs):
        done = journal.rows.setdefault(pair, {})
        todo = [question for question in questions if question.id not in done]
        for row, samples in _run(pair, todo, pool, dataset, settings):
            journal.add(row, samples)
            progress.add(row)


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
        **measured(completion, catalogue),
    )


def _entry(spec: ModelSpec) -> str:
    return json.dumps(spec.identity, separators=(",", ":"), ensure_ascii=False)


def _fingerprint(
    questions: Sequence[Question],
    catalogue: Catalogue,
    pairs: Sequence[Pair],
    dataset: str,
    settings: GenerationSettings,
) -> str:
    """Hash of what the outcomes depend on: questions, gold answers, models, prompts and settings."""
    inputs: dict[str, Any] = {
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
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
