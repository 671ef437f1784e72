"""Labels of tokens at which the small model leaves the large one's path (R2R, arXiv 2505.21600).

The large model answers questions and the small one reads the answers. Where the small one would write another
token, the large one continues from that token, and verifiers judge whether the difference matters. Every text
and verdict goes to a journal at once, so that a killed run resumes where it was. More questions may be added
to a folder later. Leaves out training, and the folder itself (`training.label_folder`).
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viaticum.catalogue import Catalogue
from viaticum.errors import DataError, InputError
from viaticum.models.local import LocalModels, check_context
from viaticum.models.settings import prompt, resolve
from viaticum.questions import Question, digest_of
from viaticum.strategies import get as get_strategy
from viaticum.strategies import load
from viaticum.training.label_folder import LabelFolder
from viaticum.training.label_journal import Continuation, DifferenceKey, Response
from viaticum.training.label_texts import LabelTexts
from viaticum.training.progress import Report, no_report
from viaticum.training.provenance import member_facts, prompt_text, versions
from viaticum.training.verifiers import CatalogueEmbedding, VerifierContext, check_names, make
from viaticum.types import Message

if TYPE_CHECKING:
    from viaticum.decoders import MixedDecoder, Runner
    from viaticum.models.base import Model
    from viaticum.training.continuations import FinishedText, GenerationTask, StageStats

RESPONSES_PER_SHARD = 16
VERDICTS_PER_BATCH = 64  # differences that a verifier is given at once


@dataclass(frozen=True)
class LabelSettings:
    """What labels depend on, beside the models and the questions.

    Args:
        strategy: how the questions are asked.
        seed: of strategies that sample.
        sentence_cap: most tokens of a continuation that no verifier needs complete.
        step_tokens: tokens that a call of the small model reads, see `decoders.features`.
    """

    strategy: str = "cot"
    seed: int = 0
    sentence_cap: int = 128
    step_tokens: int = 4

    def __post_init__(self) -> None:
        if self.sentence_cap < 1 or self.step_tokens < 1:
            raise InputError("sentence_cap and step_tokens must be 1 or more")


def label(
    questions: Sequence[Question],
    pair: str,
    out: str | Path,
    *,
    catalogue: Catalogue,
    verifiers: Sequence[str] = ("outcome",),
    settings: LabelSettings = LabelSettings(),
    slots: int = 16,
    models: Callable[[str], Model] | None = None,
    report: Report = no_report,
) -> dict[str, Any]:
    """Label the tokens of a pair on these questions into the folder `out`, and return its manifest.

    A folder with labels is continued with the questions that it does not have yet. Right answers are not
    needed.

    Args:
        questions: questions that the large model answers.
        pair: name of a pair of the catalogue.
        out: the folder of labels, made where it does not exist.
        catalogue: the models.
        verifiers: names of verifiers that judge the differences.
        settings: what labels depend on besides.
        slots: texts that are written at once.
        models: the models that a verifier may ask, by name; by default those of the catalogue.
        report: called with stage, done and total.

    Raises:
        DataError: there are no questions, or none of the texts ended by itself.
        UnknownName: no such verifier or model.
        VocabularyMismatch, WeightsError: the pair cannot run.
        PromptTooLong: a question does not fit both models; raised before anything is written.
        InputError: the folder was made from other weights, prompts or settings.
    """
    if not questions:
        raise DataError("no questions to label; write one object with a question a line")
    check_names(verifiers)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    run = _LabelRun(questions, catalogue, pair, out, settings, slots, models, report)
    with run.folder:
        run.write_responses()
        run.read_features()
        run.write_continuations(complete=run.needs_complete(verifiers))
        run.judge(verifiers)
        return run.finish(verifiers)


def verify(
    folder: str | Path,
    verifiers: Sequence[str],
    *,
    catalogue: Catalogue,
    limit: int | None = None,
    slots: int = 16,
    models: Callable[[str], Model] | None = None,
    report: Report = no_report,
) -> dict[str, Any]:
    """Let more verifiers judge a labelled folder, and return its manifest.

    Args:
        folder: the folder of labels.
        verifiers: their names.
        catalogue: the models.
        limit: how many of the differences each has judged at least at the end, the same ones whatever was
            judged before; by default all. The others are unknown to it: enough to see how far it agrees with
            another verifier, at a part of the cost.
        slots: texts that are written at once.
        models: the models that a verifier may ask, by name; by default those of the catalogue.
        report: called with stage, done and total.

    Raises:
        InputError: a verifier needs complete texts, and some were cut at the end of a sentence.
    """
    from viaticum.routers.token.labels import read_manifest

    check_names(verifiers)
    folder = Path(folder)
    manifest = read_manifest(folder)
    settings = LabelSettings(**manifest["settings"])
    run = _LabelRun([], catalogue, manifest["pair"], folder, settings, slots, models, report)
    with run.folder:
        cut = sum(not each.complete for each in run.journal.continuations.values())
        if cut and run.needs_complete(verifiers):
            raise InputError(
                f"{cut} continuations in {folder} end with a sentence, and {', '.join(verifiers)} needs "
                "whole ones; run `viaticum tokens label` with that verifier on the same folder"
            )
        run.judge(verifiers, limit=limit)
        return run.finish(verifiers)


class _LabelRun:
    """One run over one folder. questions: empty for a run that only verifies."""

    def __init__(
        self,
        questions: Sequence[Question],
        catalogue: Catalogue,
        pair: str,
        out: Path,
        settings: LabelSettings,
        slots: int,
        models: Callable[[str], Model] | None,
        report: Report,
    ) -> None:
        self.catalogue, self.settings, self.slots, self.report = catalogue, settings, slots, report
        self.spec = catalogue[pair]
        if self.spec.kind != "pair":
            raise InputError(
                f"{pair} is a {self.spec.kind} model; labels are made for a pair of local models"
            )
        self.small, self.large = (catalogue[name] for name in self.spec.members)
        load(*catalogue.strategies, settings.strategy)
        self.strategy = get_strategy(settings.strategy)
        self.generation = resolve(catalogue, pair, self.strategy)
        self._pool = LocalModels(catalogue, slots=slots)
        # Checks weights and vocabularies and makes the prompts. It has a pool of its own: what is loaded is
        # in the other one, which `_unload_large` replaces.
        self.model = LocalModels(catalogue).model(pair)
        self._models = models
        self.folder = LabelFolder(out, self._identity())
        self.journal = self.folder.journal
        self.questions = {each.id: each for each in questions} or {
            each.id: Question(each.id, each.query, None) for each in self.journal.responses.values()
        }
        self.folder.check_questions(self.questions.values())

    def _identity(self) -> dict[str, Any]:
        from viaticum.routers.token.labels import FORMAT

        return {
            "format": FORMAT,
            "pair": self.spec.name,
            **member_facts(self.spec, self.catalogue),
            "settings": asdict(self.settings),
            "prompt_sha256": hashlib.sha256(
                prompt_text(self.catalogue, self.spec, self.strategy).encode()
            ).hexdigest(),
        }

    # --- the large model's responses ------------------------------------------------------------------------

    def write_responses(self) -> None:
        """Answer the questions that have no response yet."""
        from viaticum.training.continuations import GenerationTask

        todo = [name for name in self.questions if name not in self.journal.responses]
        if not todo:
            return
        tasks = [GenerationTask(name, self._prompt(name), self.generation.max_new_tokens) for name in todo]
        for task in tasks:
            check_context(task.id, self._small_prompt(task.id), task.max_new_tokens, [self.small])
            check_context(task.id, task.prompt, task.max_new_tokens, [self.large])

        def keep(finished: FinishedText) -> None:
            task, tokens, finish = finished
            query = self.questions[task.id].query
            self.journal.add(Response(task.id, query.text, query.kind, tokens, finish))

        self._generate("responses", tasks, len(self.questions), keep)

    def _generate(
        self, stage: str, tasks: Sequence[GenerationTask], total: int, keep: Callable[[FinishedText], None]
    ) -> None:
        """Generate the texts that are left of `total`, and keep each as it ends."""
        from viaticum.training.continuations import StageStats, generate

        done, stats = total - len(tasks), StageStats()
        self.report(stage, done, total)
        for finished in generate(
            self._decoder,
            tasks,
            stop=self.generation.stop,
            sentence_cap=self.settings.sentence_cap,
            stats=stats,
        ):
            keep(finished)
            done += 1
            self.report(stage, done, total)
        self.folder.add_stats(stage, stats)

    def _finished_responses(self) -> list[Response]:
        """The responses to learn from, in the order of the questions."""
        responses = (self.journal.responses.get(name) for name in self.questions)
        return [each for each in responses if each is not None and each.finish == "stop"]

    def _prompt(self, question: str) -> list[int]:
        return self.model.prompt(self._chat(question), self.generation)

    def _small_prompt(self, question: str) -> list[int]:
        """What the small model reads before the text, by its own chat template."""
        own = self.model.small_prompt(self._chat(question), self.generation)
        return self._prompt(question) if own is None else own

    def _chat(self, question: str) -> Sequence[Message]:
        return prompt(self.spec, self.strategy, self.questions[question].query)

    # --- the small model's features -------------------------------------------------------------------------

    def _unload_large(self) -> None:
        """Free the large model's weights and cache: both models at once may exceed the memory."""
        self.__dict__.pop("_decoder", None)
        self.__dict__.pop("_verifier_context", None)
        self._pool = LocalModels(self.catalogue, slots=self.slots)
        gc.collect()

    def read_features(self) -> None:
        """Run the small model once over each finished response that has no features yet."""
        from viaticum.training.continuations import StageStats

        known = {name for shard in self.folder.shards() for name in shard.questions}
        todo = [each for each in self._finished_responses() if each.id not in known]
        if not todo:
            return
        for each in todo:
            check_context(each.id, self._small_prompt(each.id), len(each.tokens) - 1, [self.small])
        self._unload_large()
        pool = LocalModels(self.catalogue, slots=1)
        runner, done, total = pool.runner(self.small.name, self.spec.name), len(known), len(known) + len(todo)
        self.folder.update_manifest(vocabulary=self.model.vocabulary([runner]).rows)
        self.report("features", done, total)
        started, stats = time.perf_counter(), StageStats(texts=len(todo))
        for first in range(0, len(todo), RESPONSES_PER_SHARD):
            self._write_shard(runner, todo[first : first + RESPONSES_PER_SHARD], done + first, total, stats)
        stats.seconds = time.perf_counter() - started
        self.folder.add_stats("features", stats)

    def _write_shard(
        self, runner: Runner, responses: Sequence[Response], done: int, total: int, stats: StageStats
    ) -> None:
        """Write one file of features, and add the tokens that were read to `stats`."""
        from viaticum.decoders.features import read_features
        from viaticum.routers.token.labels import Shard

        features, vocabulary = [], self.model.vocabulary([runner])
        for number, each in enumerate(responses, 1):
            prompt = self._small_prompt(each.id)
            cached = min(runner.cached_prefix_length(0, prompt), len(prompt) - 1)
            stats.read += len(prompt) - cached + len(each.tokens) - 1
            read = read_features(
                runner,
                prompt,
                each.tokens,
                step_tokens=self.settings.step_tokens,
                vocabulary=vocabulary,
            )
            features.append((each.id, each.tokens, read))
            self.report("features", done + number, total)
        shard = Shard.of(features, self.folder.manifest["stop_ids"], runner.embeddings)
        shard.save(self.folder.next_shard_path())

    # --- continuations of the large model -------------------------------------------------------------------

    def needs_complete(self, verifiers: Sequence[str]) -> bool:
        return any(make(name, self._verifier_context).needs_ending for name in verifiers)

    def write_continuations(self, *, complete: bool) -> None:
        """Continue from every token that differs and has no continuation yet, or one that is too short."""
        from viaticum.training.continuations import to_continuation

        keys = [key for key in self.folder.differences if key[0] in self.questions]
        tasks = []
        for key in keys:
            task = self._task(key, complete)
            if isinstance(task, Continuation):
                self.journal.add(task)
            elif task is not None:
                tasks.append(task)
        if tasks:
            self._generate(
                "continuations",
                tasks,
                len(keys),
                lambda finished: self.journal.add(to_continuation(finished)),
            )

    def _task(self, key: DifferenceKey, complete: bool) -> GenerationTask | Continuation | None:
        """What to generate; the continuation itself where nothing is left to; None where it is written."""
        from viaticum.training.continuations import GenerationTask

        known = self.journal.continuations.get(key)
        if known is not None and (known.complete or not complete):
            return None
        question, position = key
        token, _ = self.folder.differences[key]
        written = () if known is None else known.tokens
        most = self.generation.max_new_tokens - position - 1 - len(written)
        if token in self.folder.manifest["stop_ids"]:
            return Continuation(question, position, token, (), "stop")
        if most < 1:
            return Continuation(question, position, token, written, "length")
        response = self.journal.responses[question].tokens
        return GenerationTask(
            question, self._prompt(question), most, position, token, written, response, complete
        )

    # --- verdicts -------------------------------------------------------------------------------------------

    def judge(self, verifiers: Sequence[str], *, limit: int | None = None) -> None:
        """Let each verifier judge the differences that it has not judged, up to `limit` of all of them."""
        from viaticum.training.continuations import StageStats

        started = time.perf_counter()
        for name in verifiers:
            verifier = make(name, self._verifier_context)
            whole, journal = verifier.needs_ending, self.journal
            keys = [key for key in self.folder.differences if journal.is_continued(key, whole=whole)]
            if limit is not None:
                keys = sorted(keys, key=_random_order)[:limit]
            todo = [key for key in keys if not journal.is_judged(verifier.name, key, whole=whole)]
            if not todo:
                continue
            done = len(keys) - len(todo)
            self.report(f"verdicts by {name}", done, len(keys))
            for first in range(0, len(todo), VERDICTS_PER_BATCH):
                batch = todo[first : first + VERDICTS_PER_BATCH]
                for index, verdict in verifier.judge([self.texts.difference(key) for key in batch]):
                    self.journal.add_verdicts(name, {batch[index]: verdict})
                    done += 1
                    self.report(f"verdicts by {name}", done, len(keys))
            self.folder.add_stats("verdicts", StageStats(texts=len(todo)))
        self.folder.add_stats("verdicts", StageStats(seconds=time.perf_counter() - started))

    @cached_property
    def texts(self) -> LabelTexts:
        return LabelTexts(self.folder, self.model.tokenizer)

    @cached_property
    def _verifier_context(self) -> VerifierContext:
        models = self._models or self._pool.model
        return VerifierContext(self.strategy, CatalogueEmbedding(self.catalogue), models, self.large.name)

    # --- the result -----------------------------------------------------------------------------------------

    def finish(self, verifiers: Sequence[str]) -> dict[str, Any]:
        """Write the rows, then the manifest, and return it."""
        responses = self.journal.responses.values()
        if not any(each.finish == "stop" for each in responses):
            raise DataError(
                f"none of {len(responses)} texts of {self.large.name} ended by itself, so there is nothing "
                f"to label; is {self.strategy.name} right for these questions?"
            )
        names = list(dict.fromkeys([*self.folder.manifest.get("verifiers", []), *verifiers]))
        self.folder.write_rows([self.texts.row(key, names) for key in self.folder.differences])
        self.folder.update_manifest(
            verifiers=names,
            versions=versions(),
            questions=len(responses),
            finished=sum(each.finish == "stop" for each in responses),
            differences=len(self.folder.differences),
            digests={each.id: digest_of(each.question) for each in responses},
        )
        return self.folder.manifest

    @cached_property
    def _decoder(self) -> MixedDecoder:
        """The large model alone; loaded when the first text is written."""
        from viaticum.decoders import MixedDecoder

        runner = self._pool.runner(self.large.name, self.spec.name)
        # A folder keeps the stop ids that its texts were written with.
        ends = self.folder.manifest.get("stop_ids") or self.model.stop_ids([runner])
        self.folder.update_manifest(stop_ids=ends)
        return MixedDecoder(
            runner,
            tokenizer=self.model.tokenizer,
            stop_ids=ends,
            names=(self.small.name, self.large.name),
            shared_vocabulary=self.model.vocabulary([runner]),
        )


def _random_order(key: DifferenceKey) -> str:
    """A sort key that is independent of question and position."""
    return hashlib.sha256(f"{key[0]}:{key[1]}".encode()).hexdigest()
