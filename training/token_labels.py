"""Labels for a token router: at which tokens would the small model leave the large one's path (R2R, arXiv 2505.21600)?

The large model answers questions; the small one reads the answers, and where it would write another token the large one
goes on from that token; verifiers say whether the difference matters. Every text and verdict goes to a journal at
once, so that a killed run goes on where it was. More questions may be added to a folder later. Leaves out training.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from filelock import FileLock, Timeout

from viaticum.catalogue import Catalogue
from viaticum.errors import DataError, InputError
from viaticum.models.local import LocalModels, check_context, stop_ids
from viaticum.questions import Question, digest_of
from viaticum.strategies import get as get_strategy
from viaticum.training.label_journal import Continuation, Journal, Place, Response
from viaticum.training.sentences import part
from viaticum.training.verifiers import Difference, Verifier, VerifierContext, check_names, make
from viaticum.types import FinishReason, Query
from viaticum.weights import fingerprint

if TYPE_CHECKING:
    from viaticum.decoders import MixedDecoder
    from viaticum.models.base import Model
    from viaticum.routers.token.labels import Shard
    from viaticum.training.continuations import Start, Work

Report = Callable[[str, int, int], None]  # stage, texts done, texts in all
SHARD = 16  # responses whose features share a file
JUDGED = 64  # differences that a verifier is given at once


@dataclass(frozen=True)
class LabelSettings:
    """What labels depend on, beside the models and the questions.

    sentence_cap: the most tokens of a continuation that no verifier wants whole. step_tokens: see
    `decoders.features`. seed: of strategies that sample.
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
    report: Report = lambda stage, done, of: None,
) -> dict[str, Any]:
    """Label the tokens of a pair on these questions into the folder `out`; returns its manifest.

    A folder that was labelled so far goes on, with the questions that it does not have yet; right answers are not
    needed. models: what a verifier may ask, by name; by default those of the catalogue.

    Raises `DataError` for no questions, `UnknownName` for a verifier, `VocabularyMismatch`, `WeightsError`, `PromptTooLong`
    before anything is written for a question that does not fit both models, and `InputError` where the folder was made from other weights, prompts or settings.
    """
    if not questions:
        raise DataError("no questions to label; write one object with a question a line")
    check_names(verifiers)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    run = _Labelling(questions, catalogue, pair, out, settings, slots, models, report)
    with run:
        run.write_responses()
        run.read_features()
        run.write_branches(whole=run.wants_endings(verifiers))
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
    report: Report = lambda stage, done, of: None,
) -> dict[str, Any]:
    """Let more verifiers look at a folder that was labelled. Returns its manifest.

    limit: how many of the differences each has to have judged at least, the same ones whatever was judged before; all by
    default. The others are unknown to it: enough to see how far it agrees with another, at a part of the cost.

    Raises `InputError` where one of them wants texts that were not written to their ends.
    """
    from viaticum.routers.token.labels import read_manifest

    check_names(verifiers)
    folder = Path(folder)
    manifest = read_manifest(folder)
    settings = LabelSettings(**manifest["settings"])
    run = _Labelling([], catalogue, manifest["pair"], folder, settings, slots, models, report)
    with run:
        short = sum(not branch.ended for branch in run.journal.branches.values())
        if short and run.wants_endings(verifiers):
            raise InputError(
                f"{short} continuations in {folder} end with a sentence, and {', '.join(verifiers)} needs whole ones; "
                "run `viaticum tokens label` with that verifier on the same folder"
            )
        run.judge(verifiers, most=limit)
        return run.finish(verifiers)


class _Labelling:
    """One run over one folder. questions: none for a run that only verifies."""

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
        self.catalogue, self.out, self.settings, self.slots, self.report = (
            catalogue,
            out,
            settings,
            slots,
            report,
        )
        self.spec = catalogue[pair]
        if self.spec.kind != "pair":
            raise InputError(
                f"{pair} is a {self.spec.kind} model; labels are made for a pair of local models"
            )
        self.small, self.large = (catalogue[name] for name in self.spec.members)
        self.strategy = get_strategy(settings.strategy)
        self._pool = LocalModels(catalogue, slots=slots)
        # Checks weights and vocabularies, and knows the prompts; what is loaded is in the other pool.
        self.model = LocalModels(catalogue).model(pair)
        self._models = models
        self.manifest = self._identity()
        self._check_manifest()
        self._lock = FileLock(out / ".lock")  # the system frees that of a killed process
        self.journal = Journal(out / "journal.jsonl")
        self.asked = {each.id: each for each in questions} or {
            each.id: Question(each.id, each.query, None) for each in self.journal.responses.values()
        }
        self._check_questions()

    def __enter__(self) -> _Labelling:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"another run is labelling into {self.out}; wait for it, or use another folder"
            ) from None
        return self

    def __exit__(self, *error: object) -> None:
        self.journal.close()
        self._lock.release()

    # --- what the folder belongs to -----------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        from viaticum.routers.token.labels import FORMAT

        prompt = json.dumps(
            [self.strategy.messages(Query("?")), self.strategy.max_new_tokens], sort_keys=True
        )
        return {
            "format": FORMAT,
            "pair": self.spec.name,
            "small": {"name": self.small.name, "sha256": fingerprint(self.small)},
            "large": {"name": self.large.name, "sha256": fingerprint(self.large)},
            "settings": asdict(self.settings),
            "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
        }

    def _check_manifest(self) -> None:
        """What is in the folder already was made from the same; else nobody knows what its labels mean."""
        from viaticum.routers.token.labels import MANIFEST, read_manifest, write_whole

        path = self.out / MANIFEST
        if not path.exists():
            write_whole(path, _json({**self.manifest, "verifiers": [], "versions": _versions()}))
            return
        kept = read_manifest(self.out)
        for name, value in self.manifest.items():
            if kept.get(name) != value:
                raise InputError(
                    f"{self.out} was labelled with another {name}: {_short(kept.get(name))}, now {_short(value)}; "
                    "label into a new folder"
                )
        self.manifest = kept

    def _check_questions(self) -> None:
        for name, question in self.asked.items():
            known = self.journal.responses.get(name)
            if known is not None and known.question != question.query.text:
                raise InputError(
                    f"{self.out} has another question with the id {name!r}; give ids, or label into a new folder"
                )

    # --- the large model's responses ------------------------------------------------------------------------

    def write_responses(self) -> None:
        """Answer the questions that have no response yet."""
        from viaticum.training.continuations import Start, Work, write

        todo = [each for each in self.asked.values() if each.id not in self.journal.responses]
        if not todo:
            return
        starts = [Start(each.id, self._prompt(each.id), self.strategy.max_new_tokens) for each in todo]
        for start in starts:
            check_context(start.id, start.prompt, start.most, (self.small, self.large))
        work = Work()
        done = len(self.asked) - len(todo)
        self.report("responses", done, len(self.asked))
        for start, tokens, finish in write(
            self._decoder, starts, stop=self.strategy.stop, sentence_cap=self.settings.sentence_cap, work=work
        ):
            query = self.asked[start.id].query
            self.journal.add(Response(start.id, query.text, query.kind, tokens, finish))
            done += 1
            self.report("responses", done, len(self.asked))
        self._tally("responses", work)

    def _finished(self) -> list[Response]:
        """The responses that are learned from, in the order of the questions."""
        found = (self.journal.responses.get(name) for name in self.asked)
        return [each for each in found if each is not None and each.finish == "stop"]

    def _prompt(self, name: str) -> list[int]:
        return self.model.prompt(self.strategy.messages(self.asked[name].query))

    # --- the small model's features -------------------------------------------------------------------------

    def _forget_large(self) -> None:
        """Give up the large model's weights and cache: both models at once may be more than there is memory for."""
        self.__dict__.pop("_decoder", None)
        self.__dict__.pop("_bench", None)
        self._pool = LocalModels(self.catalogue, slots=self.slots)
        gc.collect()

    def read_features(self) -> None:
        """One pass of the small model over each finished response that has none yet."""
        from viaticum.decoders.features import read_features
        from viaticum.routers.token.labels import Shard
        from viaticum.training.continuations import Work

        known = {name for shard in self._shards() for name in shard.questions}
        todo = [each for each in self._finished() if each.id not in known]
        if not todo:
            return
        for each in todo:
            check_context(each.id, self._prompt(each.id), len(each.tokens) - 1, [self.small])
        self._forget_large()
        pool = LocalModels(self.catalogue, slots=1)
        runner, done, of = pool.runner(self.small.name), len(known), len(known) + len(todo)
        self._know(vocabulary=runner.vocabulary)
        self.report("features", done, of)
        began, work = time.perf_counter(), Work(texts=len(todo))
        for first in range(0, len(todo), SHARD):
            features = []
            for each in todo[first : first + SHARD]:
                prompt = self._prompt(each.id)
                held = min(runner.shared(0, prompt), len(prompt) - 1)
                work.read += len(prompt) - held + len(each.tokens) - 1
                seen = read_features(runner, prompt, each.tokens, step_tokens=self.settings.step_tokens)
                features.append((each.id, each.tokens, seen))
                done += 1
                self.report("features", done, of)
            shard = Shard.of(features, self.manifest["stop_ids"], runner.embeddings)
            shard.save(self._next_shard())
        work.seconds = time.perf_counter() - began
        self._tally("features", work)

    def _shards(self) -> Iterator[Shard]:
        from viaticum.routers.token.labels import Shard, shard_paths

        for path in shard_paths(self.out):
            yield Shard.load(path)

    def _next_shard(self) -> Path:
        from viaticum.routers.token.labels import shard_paths

        last = shard_paths(self.out)[-1:]
        number = int(last[0].stem.rpartition("-")[2]) + 1 if last else 0
        return self.out / f"features-{number:05d}.safetensors"

    @cached_property
    def _differences(self) -> dict[Place, tuple[int, float]]:
        """Where the two models' tokens differ: the small one's, and its normalised entropy."""
        found: dict[Place, tuple[int, float]] = {}
        for shard in self._shards():
            rows = shard.differs.nonzero().flatten()
            columns = (shard.owner, shard.place, shard.known[shard.token], shard.entropy)
            for owner, place, token, chance in zip(*(each[rows].tolist() for each in columns), strict=True):
                if shard.questions[owner] in self.journal.responses:
                    found[shard.questions[owner], place] = (token, chance)
        return found

    # --- how the large model would go on ----------------------------------------------------------------------

    def wants_endings(self, verifiers: Sequence[str]) -> bool:
        return any(make(name, self._bench).needs_ending for name in verifiers)

    def write_branches(self, *, whole: bool) -> None:
        """Go on from every token that differs and has no continuation yet, or too short a one."""
        from viaticum.training.continuations import Work, branch_of, write

        places = [place for place in self._differences if place[0] in self.asked]
        starts = []
        for place in places:
            start = self._start(place, whole)
            if isinstance(start, Continuation):
                self.journal.add(start)
            elif start is not None:
                starts.append(start)
        done = len(places) - len(starts)
        if not starts:
            return
        self.report("continuations", done, len(places))
        work = Work()
        for ended in write(
            self._decoder, starts, stop=self.strategy.stop, sentence_cap=self.settings.sentence_cap, work=work
        ):
            self.journal.add(branch_of(ended))
            done += 1
            self.report("continuations", done, len(places))
        self._tally("continuations", work)

    def _start(self, place: Place, whole: bool) -> Start | Continuation | None:
        """Where a continuation begins; a branch if nothing is left to write; None if it is written already."""
        from viaticum.training.continuations import Start

        known = self.journal.branches.get(place)
        if known is not None and (known.ended or not whole):
            return None
        question, at = place
        token = self._differences[place][0]
        before = () if known is None else known.tokens
        most = self.strategy.max_new_tokens - at - 1 - len(before)
        if token in self.manifest["stop_ids"]:
            return Continuation(question, at, token, (), "stop")
        if most < 1:
            return Continuation(question, at, token, before, "length")
        response = self.journal.responses[question].tokens
        return Start(question, self._prompt(question), most, at, token, before, response, whole)

    # --- verdicts ------------------------------------------------------------------------------------------------

    def judge(self, verifiers: Sequence[str], *, most: int | None = None) -> None:
        """Let each verifier look at the differences that it has no verdict on yet, at `most` of all of them."""
        from viaticum.training.continuations import Work

        began = time.perf_counter()
        for name in verifiers:
            verifier = make(name, self._bench)
            places = [place for place in self._differences if self._can_judge(verifier, place)]
            if most is not None:
                places = sorted(places, key=_mixed)[:most]
            todo = [place for place in places if not self._has_judged(verifier, place)]
            if not todo:
                continue
            done = len(places) - len(todo)
            self.report(f"verdicts by {name}", done, len(places))
            for first in range(0, len(todo), JUDGED):
                batch = todo[first : first + JUDGED]
                for index, verdict in verifier.judge([self._difference(place) for place in batch]):
                    self.journal.judge(name, {batch[index]: verdict})
                    done += 1
                    self.report(f"verdicts by {name}", done, len(places))
            self._tally("verdicts", Work(texts=len(todo)))
        self._tally("verdicts", Work(seconds=time.perf_counter() - began))

    def _can_judge(self, verifier: Verifier, place: Place) -> bool:
        """Whether there is a continuation, and one that ended where the verifier needs its end."""
        branch = self.journal.branches.get(place)
        return branch is not None and (branch.ended or not verifier.needs_ending)

    def _has_judged(self, verifier: Verifier, place: Place) -> bool:
        """Whether it has a verdict. That it could not tell is none where it may not have seen the text's end."""
        known = self.journal.verdicts.get(verifier.name, {})
        return place in known and (known[place] is not None or not verifier.needs_ending)

    @cached_property
    def _bench(self) -> VerifierContext:
        models = self._models or self._pool.model
        return VerifierContext(self.strategy, _Embedding(self.catalogue), models, self.large.name)

    def _texts(self, place: Place) -> tuple[str, str, int, tuple[int, int]]:
        """Both texts, where they part, and the lengths of the tokens that differ, in characters."""
        response, branch = self.journal.responses[place[0]], self.journal.branches[place]
        ours, theirs = response.tokens, (*response.tokens[: place[1]], branch.token, *branch.tokens)
        original, other = self._decode(ours), self._decode(theirs)
        before = self._decode(ours[: place[1]]).rstrip("\ufffd")
        lengths = [len(self._decode(tokens[: place[1] + 1])) - len(before) for tokens in (ours, theirs)]
        return original, other, len(before), (max(0, lengths[0]), max(0, lengths[1]))

    def _decode(self, tokens: Sequence[int]) -> str:
        ends = self.manifest["stop_ids"]
        return str(self.model.tokenizer.decode([token for token in tokens if token not in ends]))

    def _difference(self, place: Place) -> Difference:
        branch = self.journal.branches[place]
        original, other, at, lengths = self._texts(place)
        return Difference(
            self.journal.responses[place[0]].query,
            part(original, other, at, lengths),
            original,
            other if branch.ended else None,
            cast(FinishReason, branch.finish if branch.ended else "stop"),
        )

    # --- the folder ----------------------------------------------------------------------------------------------

    def finish(self, verifiers: Sequence[str]) -> dict[str, Any]:
        """Write the rows and the manifest: what there is now, whole or not at all."""
        from viaticum.routers.token.labels import MANIFEST, ROWS, write_whole

        responses = self.journal.responses.values()
        if not any(each.finish == "stop" for each in responses):
            raise DataError(
                f"none of {len(responses)} texts of {self.large.name} ended by itself, so there is nothing to label; "
                f"is {self.strategy.name} right for these questions?"
            )
        names = list(dict.fromkeys([*self.manifest.get("verifiers", []), *verifiers]))
        rows = [json.dumps(self._row(place, names), ensure_ascii=False) for place in self._differences]
        write_whole(self.out / ROWS, "".join(f"{row}\n" for row in rows))
        self.manifest = {
            **self.manifest,
            "verifiers": names,
            "versions": _versions(),
            "questions": len(responses),
            "finished": sum(each.finish == "stop" for each in responses),
            "differences": len(self._differences),
            "digests": {each.id: digest_of(each.question) for each in responses},
        }
        write_whole(self.out / MANIFEST, _json(self.manifest))
        return self.manifest

    def _row(self, place: Place, verifiers: Sequence[str]) -> dict[str, Any]:
        token, chance = self._differences[place]
        target = self.journal.responses[place[0]].tokens[place[1]]
        row: dict[str, Any] = {
            "question": place[0],
            "place": place[1],
            "target": target,
            "token": token,
            "target_text": self._decode([target]),
            "token_text": self._decode([token]),
            "entropy": round(chance, 6),
            "nats": round(nats(chance, self.manifest["vocabulary"]), 4),
        }
        if place in self.journal.branches:
            difference = self._difference(place)
            row |= {
                **asdict(difference.parting),
                "other_text": difference.other,
                "other_finish": self.journal.branches[place].finish,
            }
        row["verdicts"] = {
            name: self.journal.verdicts[name][place]
            for name in verifiers
            if place in self.journal.verdicts.get(name, {})
        }
        return row

    def _tally(self, stage: str, work: Work) -> None:
        """Add what a stage took to the manifest. A stage that is killed is not counted."""
        from viaticum.training.continuations import Work

        known: dict[str, Any] = self.manifest.get("work", {})
        self._know(work={**known, stage: asdict(Work(**known.get(stage, {})) + work)})

    def _know(self, **facts: Any) -> None:
        """Put a fact into the manifest, as soon as it is known."""
        from viaticum.routers.token.labels import MANIFEST, write_whole

        if any(self.manifest.get(name) != value for name, value in facts.items()):
            kept = {"verifiers": [], **self.manifest, **facts, "versions": _versions()}
            self.manifest = kept
            write_whole(self.out / MANIFEST, _json(kept))

    @cached_property
    def _decoder(self) -> MixedDecoder:
        """The large model alone; loaded when the first text is to be written."""
        from viaticum.decoders import MixedDecoder

        runner = self._pool.runner(self.large.name)
        ends = stop_ids(runner, self.model.tokenizer)
        self._know(stop_ids=ends)
        return MixedDecoder(
            runner,
            tokenizer=self.model.tokenizer,
            stop_ids=ends,
            names=(self.small.name, self.large.name),
        )


class _Embedding:
    """Sentence embeddings by the catalogue's encoder, loaded when they are asked for."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._encoder: Any = None

    def __call__(self, texts: Sequence[str]) -> Any:
        from viaticum.routers.query.encoder import Encoder

        self._encoder = self._encoder or Encoder(catalogue=self._catalogue)
        return self._encoder(texts)


def _mixed(place: Place) -> str:
    """An order of places that has nothing to do with where they are."""
    return hashlib.sha256(f"{place[0]}:{place[1]}".encode()).hexdigest()


def nats(chance: float, vocabulary: int) -> float:
    """A normalised entropy in nats."""
    return chance * math.log(vocabulary)


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("viaticum", "torch", "transformers")}


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _short(value: Any) -> str:
    """A value of the manifest as a message shows it: hashes by their beginning."""
    if isinstance(value, dict) and "sha256" in value:
        return f"{value['name']} with sha256 {value['sha256'][:12]}"
    return repr(value)[:120]
