"""The demo from its set-up to its report: what is done in which order, and how long each part takes."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.demo.authorship import write_together
from viaticum.demo.interruption import InterruptedBatch
from viaticum.demo.lanes import BUDGET_PARTS, Lane, LaneAnswer, open_lanes, run_lanes
from viaticum.demo.questions import PAIR, ROUTER_POLICY, TOPIC, router_folder, waves
from viaticum.demo.screen import Screen, open_in_browser
from viaticum.demo.verdict import Score, verdict
from viaticum.errors import InputError, MissingExtra, SandboxError, WeightsError, one_line
from viaticum.files import atomic_write, write_jsonl
from viaticum.generation import GenerationSettings
from viaticum.models.base import Generation
from viaticum.money import format_usd, nanousd
from viaticum.outcomes import write_outcomes
from viaticum.questions import Question
from viaticum.routers.query import DEFAULT_POLICY, parse_policy
from viaticum.signals import run_interruptible
from viaticum.types import Query
from viaticum.weights import locate

if TYPE_CHECKING:
    from viaticum.agents.client import Viaticum
    from viaticum.reports import Report

WAVE = 12  # questions that a lane answers at once, before the next lane has its turn
SLOTS = 2 * WAVE  # so that the examples of one lane's strategies outlive the turns of the others
MAX_TOKENS = 160  # of an answer in every lane: a text that goes round in circles keeps a whole wave waiting
SHORT = 0.5  # money of the interrupted job, as a share of what the routed lane spent on its questions
LANES_ENDED = "calls under way were ended and settled"
WARM_UP = Query("How many legs do six spiders have together?", "number")


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs with.

    Args:
        questions: with their right answers.
        budget: dollars for the lanes and the answer of two models; each lane has a quarter.
        folder: exists; everything is written there.
        catalogue: a file laid over the packaged catalogue, or None.
        router: the folder of a fitted router, or None for the packaged table.
        policy: of the routed lane and of the interrupted job; None for their usual ones.
    """

    questions: Sequence[Question]
    budget: str
    folder: Path
    catalogue: Path | None = None
    router: Path | None = field(default_factory=router_folder)
    policy: str | None = None

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.db"

    @property
    def lane_limit(self) -> int:
        """Nano-dollars of each lane."""
        return nanousd(self.budget) // BUDGET_PARTS


def new_folder(base: Path) -> Path:
    """Make and return a folder named after the time, in another that is made too."""
    base.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=datetime.now().strftime("%Y-%m-%d-%H%M%S-"), dir=base))


def needed_weights(catalogue: Catalogue, router: Path | None) -> tuple[ModelSpec, ...]:
    """The entries whose weights the demo uses: of both models, and of the encoder of a fitted router."""
    encoders = [spec.name for spec in catalogue.encoders()] if router is not None else []
    return catalogue.weights_of(PAIR, *encoders)


def sandbox_notes() -> Iterator[str]:
    """Open the sandbox that answers by programs use, and say what will not run; nothing where all will."""
    from viaticum.strategies.sandbox import default_sandbox, open_sandbox

    try:
        default_sandbox()
    except SandboxError as error:
        yield f"no sandbox works here, so that an answer by a program is none: {one_line(error)}"
        return
    try:
        open_sandbox("bwrap", workers=1).close()
    except SandboxError as error:
        yield f"no bubblewrap: a program that needs more than plain Python is no answer ({one_line(error)})"


class Demo:
    """One run. What was measured is in `facts`, which end as `results.json` in the folder.

    Raises `InputError` where the folder is not empty, or the policy is none.
    """

    def __init__(self, settings: DemoSettings) -> None:
        if any(settings.folder.iterdir()):
            raise InputError(f"{settings.folder} is not empty; give a folder of its own: --out")
        if settings.policy is not None:
            parse_policy(settings.policy)
        self.settings = settings
        catalogue = Catalogue.load(settings.catalogue)
        pair = catalogue[PAIR]
        # One answer shows the token router at work, so the pair may not choose a faster way.
        self.catalogue = catalogue.with_models(pair.model_copy(update={"mode": "routed"}))
        self.small, self.large = pair.members
        self.screen = Screen(len(settings.questions), pair.members)
        self.facts: dict[str, Any] = {"seconds": {}, "lanes": []}
        self._began = time.perf_counter()
        self._ended = LANES_ENDED  # what an interrupt means for calls under way

    @property
    def policy(self) -> str:
        """Of the routed lane: the given one, that of the shipped router, or the usual one."""
        shipped = self.settings.router is not None and self.settings.router == router_folder()
        return self.settings.policy or (ROUTER_POLICY if shipped else DEFAULT_POLICY)

    def run(self) -> None:
        """Show all parts.

        Raises:
            WeightsError: weights are not here.
            MissingExtra: what local models need is not installed.
            KeyboardInterrupt: after what was done until then was told and written.
        """
        self._check_weights()
        logging.getLogger("concurrent.futures").addFilter(_is_told)
        try:
            self._show_lanes_and_pair()
            gc.collect()  # the weights: the next part has processes of its own
            self._show_interruption()
            self._show_report()
        except KeyboardInterrupt:
            self.screen.line(f"interrupted: {self._ended}", "bold red")
            self.screen.line(f"what was measured until then: {self._results}", wrap=False)
            raise
        finally:
            logging.getLogger("concurrent.futures").removeFilter(_is_told)
            self._save()
        set_up = self.facts["seconds"]["set-up"]
        total = time.perf_counter() - self._began - set_up
        self.screen.line(f"all answers and figures: {self._results}", wrap=False)
        self.screen.line(f"{total:.0f} s in all, after {set_up:.0f} s of set-up")

    def _check_weights(self) -> None:
        missing = []
        for spec in needed_weights(self.catalogue, self.settings.router):
            try:
                locate(spec)
            except WeightsError:
                missing.append(spec.name)
        if missing:
            raise WeightsError(
                f"the weights of {', '.join(missing)} are not here: `viaticum models pull` fetches all that "
                "is used by default once, `viaticum demo --pull` does so and goes on"
            )

    # Lanes, and one answer of two models

    def _show_lanes_and_pair(self) -> None:
        with self._open() as client:
            settings, screen = self.settings, self.screen
            with self._timed("set-up"):
                self._set_up(client)
            screen.heading(
                f"{len(settings.questions)} questions, three lanes in turns, ${settings.budget} at most"
            )
            lanes = open_lanes(client, self.small, self.large, settings.lane_limit)
            try:
                self._run_lanes(lanes)
            finally:
                screen.hide_lanes()
                self.facts["lanes"] = [_lane_facts(lane) for lane in lanes]
                outcomes = itertools.chain.from_iterable(lane.outcomes() for lane in lanes[:-1])
                write_outcomes(self._outcomes, outcomes)
            *fixed, routed = map(_score, lanes)
            self.facts["verdict"] = verdict(fixed, routed)
            for sentence in self.facts["verdict"]:
                screen.line(sentence)
            self._tell_routes(lanes[-1])
            self._show_authors(client)

    def _open(self) -> Viaticum:
        from viaticum.agents.client import Viaticum

        return Viaticum(
            self.settings.budget,
            folder=self.settings.folder,
            catalogue=self.catalogue,
            router=self.settings.router,
            policy=self.policy,
            concurrency=WAVE,
            slots=SLOTS,
            generation=GenerationSettings(max_new_tokens=MAX_TOKENS),
        )

    def _set_up(self, client: Viaticum) -> None:
        """Load the weights, the router's encoder and the sandbox, so that no lane waits for them."""
        screen = self.screen
        screen.heading("Set-up")
        for name in self._models_of(client):
            began = time.perf_counter()
            try:
                client.model(name).generate([{"role": "user", "content": WARM_UP.text}], Generation(1))
            except InputError as error:  # such as a token router that was trained on other weights
                screen.line(f"{name} cannot be asked here: {one_line(error)}", "yellow")
                continue
            screen.line(f"{name} is ready, after {time.perf_counter() - began:.1f} s")
        row = client.router.table(WARM_UP).rows[0]
        if self.settings.router is None:
            screen.line(f"router: {row.origin}; other kinds of questions it does not know")
        else:
            screen.line(f"router: {self.settings.router}, fitted on outcomes of other questions", wrap=False)
        screen.line(f"policy: {self.policy}")
        for note in sandbox_notes():
            screen.line(note, "yellow")

    def _models_of(self, client: Viaticum) -> list[str]:
        """Both models, and the pairs of models that a fitted router may choose."""
        known = (
            [] if self.settings.router is None else [row.pair.model for row in client.router.table(WARM_UP)]
        )
        return list(dict.fromkeys([self.small, self.large, *filter(client.is_usable, known)]))

    def _run_lanes(self, lanes: Sequence[Lane]) -> None:
        self.screen.show_lanes(lanes)
        with self._timed("lanes"):
            run_interruptible(run_lanes(lanes, waves(self.settings.questions, WAVE), self.screen.wave))

    def _tell_routes(self, routed: Lane) -> None:
        counts: dict[str, int] = {}
        for answer in routed.answers.values():
            route = ", then ".join(map(self.screen.short, answer.routes)) or "no answer"
            counts[route] = counts.get(route, 0) + 1
        ordered = sorted(counts.items(), key=lambda item: -item[1])
        self.screen.line(f"Routes: {'; '.join(f'{count} x {route}' for route, count in ordered)}.")
        if len(counts) == 1:
            self.screen.line("All questions went one way: here the router saw no reason to tell them apart.")

    def _show_authors(self, client: Viaticum) -> None:
        self.screen.heading("One answer of both models (R-Stitch): who wrote which token")
        with self._timed("two models"):
            authored = write_together(client, PAIR, self.settings.questions[0])
        self.screen.authored(authored)
        self.facts["authors"] = {
            "answer": authored.answer.value,
            "right": authored.right,
            "tokens": dict(zip(authored.models, authored.tokens, strict=True)),
            "parts": authored.parts,
            "cost_nanousd": authored.answer.cost,
        }

    # A job that is killed

    def _show_interruption(self) -> None:
        asked = self.settings.questions[:WAVE]
        costs = {each["id"]: each["cost_nanousd"] for each in self.facts["lanes"][-1]["answers"]}
        limit = round(SHORT * sum(costs.get(each.id, 0) for each in asked))
        if limit <= 0:
            self.screen.line("Routing spent nothing, so there is no half of it for a job to run short of.")
            return
        folder = self.settings.folder
        batch = InterruptedBatch(
            self._write_questions(asked), folder, self.settings.ledger, limit, self._batch_options()
        )
        self.screen.heading(
            f"{len(asked)} of them for half of what they took, {format_usd(limit)}: killed, resumed"
        )
        self.screen.line(f"$ {shlex.join(batch.command)}", "dim", wrap=False)
        self._ended = "the job was killed; calls under way stay held until their leases end"
        try:
            with self._timed("killed job"):
                found = batch.run(self.screen.job_event)
        finally:
            batch.close()
        self._ended = LANES_ENDED
        self.screen.interruption(found, limit)
        self.facts["job"] = {
            "results": str(batch.results),
            "limit_nanousd": limit,
            "rows_at_kill": found.rows_at_kill,
            "spent_at_kill_nanousd": found.before.spent,
            "under_way_at_kill": found.before.under_way,
            "spent_nanousd": found.after.spent,
            "calls": len(found.after.posted),
            "paid_twice": found.paid_twice,
            "findings": list(found.findings),
            **{name: found.figures[name] for name in ("done", "right", "graded", "skipped", "failed")},
        }

    def _write_questions(self, asked: Sequence[Question]) -> Path:
        path = self.settings.folder / "questions.jsonl"
        write_jsonl(
            path,
            [
                {
                    "id": each.id,
                    "question": each.query.text,
                    "answers": list(each.accepted),
                    "kind": each.query.kind,
                    **each.columns,
                }
                for each in asked
            ],
        )
        return path

    def _batch_options(self) -> list[str]:
        router, catalogue, policy = self.settings.router, self.settings.catalogue, self.settings.policy
        return [
            *("--max-tokens", str(MAX_TOKENS)),
            *(() if router is None else ("--router", str(router))),
            *(() if policy is None else ("--policy", policy)),
            *(() if catalogue is None else ("--catalogue", str(catalogue))),
        ]

    def _show_report(self) -> None:
        if "job" not in self.facts:
            return
        from viaticum.reports import build

        results = self.facts["job"]["results"]

        def make(name: str) -> Report:
            path = self.settings.folder / name
            return build(results, path, outcomes=self._outcomes, title="viaticum demo", force=True)

        try:
            made = make("report.html")
        except MissingExtra as error:
            made = make("report.md")
            self.screen.line(f"The report is Markdown: {one_line(error)}", "yellow")
        self.facts["report"] = str(made.path)
        opened = made.format == "html" and open_in_browser(made.path)
        self.screen.heading("Report")
        self.screen.line(f"{made.path}{' (opened)' if opened else ''}", wrap=False)

    # What is kept

    @property
    def _outcomes(self) -> Path:
        return self.settings.folder / "outcomes.jsonl"

    @property
    def _results(self) -> Path:
        return self.settings.folder / "results.json"

    def _save(self) -> None:
        text = json.dumps(self.facts, ensure_ascii=False, indent=1) + "\n"
        atomic_write(self._results, text)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.facts["seconds"][part] = round(time.perf_counter() - began, 1)


def _score(lane: Lane) -> Score:
    right = {name: each.right for name, each in lane.answers.items()}
    return Score(lane.name, right, lane.cost, lane.seconds)


def _lane_facts(lane: Lane) -> dict[str, Any]:
    return {
        "name": lane.name,
        "way": lane.way,
        "right": lane.right,
        "answered": len(lane.answers),
        "cost_nanousd": lane.cost,
        "seconds": round(lane.seconds, 2),
        "answers": [_answer_facts(each) for each in lane.answers.values()],
    }


def _answer_facts(answer: LaneAnswer) -> dict[str, Any]:
    return {
        "id": answer.question.id,
        "topic": answer.question.columns.get(TOPIC),
        "answer": answer.value,
        "gold": answer.question.gold,
        "right": answer.right,
        "routes": list(answer.routes),
        "cost_nanousd": answer.cost,
        "reason": answer.reason,
    }


def _is_told(record: logging.LogRecord) -> bool:
    """False for a step that ends after its graph was interrupted, so that no next one can begin."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, RuntimeError) and "after shutdown" in str(error))
