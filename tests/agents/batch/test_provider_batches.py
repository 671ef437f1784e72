"""Rows that wait for a provider's batch: half the price, one hold, one answer, whatever the provider does."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from batch_jobs import write_questions
from batch_provider import BatchProvider, batch_provider
from provider_batch_jobs import COST, HalfRouter, compare, rows_in, run_job, specs
from typer.testing import CliRunner

import viaticum
import viaticum.agents.batch.deferral as deferral
import viaticum.agents.batch.deferred as deferred
import viaticum.agents.batch.executor as executor
import viaticum.agents.batch.provider_batches as provider_batches
import viaticum.agents.batch.run as run
import viaticum.agents.batch.step_threads as step_threads
from viaticum.agents.batch import job_folder, preview_batch
from viaticum.agents.batch.batch_records import BatchJournal, ProviderBatch
from viaticum.agents.batch.deferred import DeferredRows
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue
from viaticum.cli import app
from viaticum.errors import AuthenticationFailed, InputError
from viaticum.jobs import PROVIDER_BATCHES, Job
from viaticum.money import Price
from viaticum.types import TokenCount

FORMS = ("openai", "anthropic")
ROWS = 24
EVEN = ROWS // 2
COLLECTS = "GET /v1/files/file_output-*/content"


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider_batches, "FIRST_LOOK", 0.02)
    monkeypatch.setattr(provider_batches, "LONGEST_LOOK", 0.1)
    monkeypatch.setattr(provider_batches, "LISTING_SECONDS", 0.3)


@pytest.fixture
def server() -> Iterator[BatchProvider]:
    with batch_provider(pace=0.05) as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_questions(tmp_path / "in.jsonl", ROWS)
    return tmp_path


def check(folder: Path, server: BatchProvider, *, late: int, unknown: int = 0) -> None:
    """All rows are done and right; the ledger has what the provider bills, each call once."""
    found = compare(folder, server, ROWS)
    assert (found.rows, found.missing, found.late) == (ROWS, 0, late)
    assert (found.free, found.double, found.unknown, found.findings) == (0, 0, unknown, 0)
    assert all(row.correct for row in rows_in(folder))


def log_of(server: BatchProvider, request: str) -> int:
    return server.log.count(request)


@pytest.mark.parametrize("form", FORMS)
def test_half_the_rows_wait_and_cost_half(folder: Path, server: BatchProvider, form: str) -> None:
    events: list[dict[str, Any]] = []

    def tell(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "waiting":
            for batch in server.batches.values():
                batch.pace = 0.05

    server.pace = 1_000_000.0
    ended = run_job(folder, server.url, form, tell=tell)
    assert ended.job.ending == "completed"
    check(folder, server, late=EVEN)
    found = compare(folder, server, ROWS)
    assert found.posted == found.billed == EVEN * COST // 2 + (ROWS - EVEN) * COST
    assert found.planned == found.posted
    assert len(server.batches) == 1
    waiting = [event for event in events if event["event"] == "waiting"]
    assert waiting[-1]["batches"][0]["rows"] == EVEN
    assert waiting[-1]["held_nanousd"] > 0


def test_a_paced_plan_knows_both_prices(folder: Path, server: BatchProvider) -> None:
    """At a budget for half of the rows at the full price, all are answered where they may wait."""
    budget = ROWS * COST * 0.6 / 1e9 + 0.02  # and room for the holds
    ended = run_job(folder, server.url, router=HalfRouter(every=True), policy="paced", budget=budget)
    assert ended.job.ending == "completed"
    check(folder, server, late=ROWS)


def test_nothing_waits_without_the_time_that_a_provider_asks_for(folder: Path, server: BatchProvider) -> None:
    slow = Catalogue(specs(server.url, "openai", batch_hours=24))
    run_job(folder, server.url, catalogue=slow)
    check(folder, server, late=0)
    assert not server.batches


def test_a_forecast_names_the_batch(folder: Path, server: BatchProvider) -> None:
    common: dict[str, Any] = {"catalogue": Catalogue(specs(server.url, "openai")), "router": HalfRouter()}
    found = preview_batch(folder / "in.jsonl", budget="1", deadline=60.0, **common)
    assert found.routes == {"late+direct (provider batch)": EVEN, "now+direct": ROWS - EVEN}
    at_once = preview_batch(folder / "in.jsonl", budget="1", **common)
    assert found.previews[2].cost_p50 < at_once.previews[2].cost_p50


@pytest.mark.parametrize("form", FORMS)
def test_lines_that_were_not_answered_are_asked_directly(folder: Path, form: str) -> None:
    fates = {2: "error", 4: "expired", 6: "no usage", 10: "error"}
    with batch_provider(pace=0.05, fate=lambda number: fates.get(number, "ok")) as server:
        run_job(folder, server.url, form)
        asked = [number for number, fate in fates.items() if fate != "no usage"]
        check(folder, server, late=EVEN - len(asked))
        assert all(server.direct["late", number] == 1 for number in asked)
        rows = {row.number: row for row in rows_in(folder)}
        assert rows[2].cost_nanousd == COST
        assert rows[4].route == "late+direct"
        # Without usage what was held for the prompt is charged, and the text is counted.
        assert (rows[6].cost_nanousd > COST // 2) is (form == "openai")


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_that_is_lost_stays_charged_and_is_asked_again(folder: Path, form: str) -> None:
    with batch_provider(pace=0.05, fate=lambda number: "no line" if number == 4 else "ok") as server:
        run_job(folder, server.url, form)
        check(folder, server, late=EVEN - 1, unknown=1)
        assert server.direct["late", 4] == 1


def test_an_answer_that_cannot_be_read_stays_charged(folder: Path) -> None:
    with batch_provider(pace=0.05, fate=lambda number: "unreadable" if number == 4 else "ok") as server:
        run_job(folder, server.url)
        check(folder, server, late=EVEN - 1, unknown=1)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_that_expires_half_way(folder: Path, server: BatchProvider, form: str) -> None:
    server.changes = [{"expires": True}]
    run_job(folder, server.url, form)
    check(folder, server, late=EVEN // 2)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_without_batches_is_asked_directly(folder: Path, server: BatchProvider, form: str) -> None:
    server.unsupported = {"late"}
    run_job(folder, server.url, form)
    check(folder, server, late=0)
    created = "POST /v1/batches" if form == "openai" else "POST /v1/messages/batches"
    assert log_of(server, created) == 1


def test_a_full_provider_gets_smaller_batches_one_by_one(folder: Path, server: BatchProvider) -> None:
    server.full = 4
    run_job(folder, server.url)
    check(folder, server, late=EVEN)
    taken = [len(batch.requests) for batch in server.batches.values() if batch.failure is None]
    assert max(taken) <= 4


@pytest.mark.parametrize("form", FORMS)
def test_errors_of_the_provider_are_waited_for(folder: Path, server: BatchProvider, form: str) -> None:
    names = ("files", "batches", "batches/*", "files/file_output-*/content")
    if form == "anthropic":
        names = ("messages/batches", "messages/batches/*", "messages/batches/*/results")
    for name in names:
        server.faults[f"GET /v1/{name}"] = [500, 429, 404, 503]
        server.faults[f"POST /v1/{name}"] = [429, 500]
    run_job(folder, server.url, form)
    check(folder, server, late=EVEN)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_whose_creation_was_not_confirmed_is_found(
    folder: Path, server: BatchProvider, form: str
) -> None:
    path = "/v1/batches" if form == "openai" else "/v1/messages/batches"
    server.faults[f"POST {path}"] = ["hang up"]
    server.listed_after = 0.15
    run_job(folder, server.url, form)
    check(folder, server, late=EVEN)
    assert len(server.batches) == 1


def test_a_batch_that_the_provider_lost_stays_charged(
    folder: Path, server: BatchProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_batches, "MISSING_LOOKS", 2)
    server.faults["GET /v1/batches/*"] = [404] * 3
    run_job(folder, server.url)
    found = compare(folder, server, ROWS)
    assert (found.missing, found.double, found.unknown) == (0, 0, EVEN)


@pytest.mark.parametrize("succeeded", [True, False])
def test_an_ended_batch_whose_results_are_gone_stays_charged(
    folder: Path, server: BatchProvider, succeeded: bool
) -> None:
    """Anthropic removes results after 29 days: the batch has ended then, and has no address of results."""
    server.archived = True
    if not succeeded:
        server.fate = lambda number: "error"
    ended = run_job(folder, server.url, "anthropic")
    assert ended.job.ending == "completed"
    check(folder, server, late=0, unknown=EVEN if succeeded else 0)


@pytest.mark.parametrize("form", FORMS)
def test_results_that_are_refused_for_good_are_lost(
    folder: Path, server: BatchProvider, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_batches, "MISSING_LOOKS", 3)
    name = "files/file_output-*/content" if form == "openai" else "messages/batches/*/results"
    server.faults[f"GET /v1/{name}"] = [400] * 1_000
    ended = run_job(folder, server.url, form)
    assert ended.job.ending == "completed"
    check(folder, server, late=0, unknown=EVEN)
    assert log_of(server, f"GET /v1/{name}") == 3


def test_a_row_that_cannot_be_held_is_asked_directly_and_its_neighbours_wait(
    folder: Path, server: BatchProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = DeferredRows._reserve

    def another_call_came_first(self: DeferredRows, chunk: Any, name: str) -> Any:
        usage, prices = {"late": TokenCount(1, 1)}, {"late": Price(1, 1)}
        self.ledger.reserve(self.tools.job, chunk[2].claim.key, usage, prices, parameters="another")
        return reserve(self, chunk, name)

    monkeypatch.setattr(DeferredRows, "_reserve", another_call_came_first)
    ended = run_job(folder, server.url)
    assert ended.job.ending == "completed"
    assert server.direct.keys() >= {("now", 1)}
    assert len(next(iter(server.batches.values())).requests) == EVEN - 1
    assert sum(model == "late" for model, _ in server.direct) == 1
    assert all(row.correct for row in rows_in(folder))


def test_a_wrong_key_ends_the_job_and_a_right_one_goes_on(folder: Path, server: BatchProvider) -> None:
    server.faults["POST /v1/files"] = [401]
    with pytest.raises(AuthenticationFailed):
        run_job(folder, server.url)
    run_job(folder, server.url)
    check(folder, server, late=EVEN)
    assert len(server.batches) == 1


@pytest.mark.parametrize("form", FORMS)
def test_submit_leave_and_come_back(folder: Path, server: BatchProvider, form: str) -> None:
    server.changes = [{"stays": True}]
    ended = run_job(folder, server.url, form, wait=False)
    assert ended.job.ending == "waiting"
    assert ended.figures["answered"] == ROWS - EVEN
    assert ended.figures["held_nanousd"] > 0
    assert not (folder / "out.jsonl").exists()
    again = run_job(folder, server.url, form, wait=False)
    assert again.job.ending == "waiting"
    next(iter(server.batches.values())).stays = False
    last = run_job(folder, server.url, form, deadline=None)
    assert last.job.ending == "completed"
    check(folder, server, late=EVEN)
    assert len(server.batches) == 1


def test_a_tag_of_the_user_marks_no_call_as_one_of_a_batch(folder: Path, server: BatchProvider) -> None:
    """A dispatched call that is tagged "batch" may be at its provider, and stays held."""
    with viaticum.tagged(batch="nightly"):
        run_job(folder, server.url, wait=False)
    job = Job.load(job_folder(folder / "out.jsonl"))
    with Ledger(folder / "ledger.db") as ledger:
        key = f"{job.budget}/lost"
        tags = {"model": "late", "batch": "nightly"}
        ledger.reserve(
            job.budget, key, {"late": TokenCount(1, 1)}, {"late": Price(1, 1)}, tags=tags, dispatch=True
        )
    run_job(folder, server.url, deadline=None)
    with Ledger(folder / "ledger.db") as ledger:
        hold = ledger.hold(key)
        assert hold is not None
        assert hold.state != "void"


@pytest.mark.parametrize("name", ["model", "provider_batch", "expected"])
def test_tags_that_viaticum_sets_are_not_for_callers(name: str) -> None:
    with pytest.raises(InputError, match=name), viaticum.tagged(**{name: "x"}):
        pass


@pytest.mark.parametrize("form", FORMS)
def test_cancelling_settles_what_was_done(folder: Path, server: BatchProvider, form: str) -> None:
    server.changes = [{"stays": True}]
    run_job(folder, server.url, form, wait=False)
    time.sleep(0.2)
    ended = run_job(folder, server.url, form, cancel=True)
    assert ended.job.ending == "cancelled"
    found = compare(folder, server, ROWS)
    assert (found.late, found.free, found.double, found.unknown) == (EVEN // 2, 0, 0, 0)
    states = [row.state for row in rows_in(folder)]
    assert states.count("skipped") == EVEN // 2
    assert {row.reason for row in rows_in(folder) if row.state == "skipped"} == {"the job was cancelled"}
    assert all(batch.stopped is not None for batch in server.batches.values())
    with Ledger(folder / "ledger.db") as ledger:
        assert ledger.budget(ended.job.budget).held_nanousd == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_is_given_up_in_time_to_ask_directly(
    folder: Path, server: BatchProvider, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferral, "DIRECT_SHARE", 0.9)
    server.changes = [{"stays": True}]
    quick = Catalogue(specs(server.url, form, batch_hours=1 / 3600))
    import_module("litellm")  # which takes seconds, of the eight until then
    run_job(folder, server.url, form, catalogue=quick, deadline=80.0)
    check(folder, server, late=EVEN // 2)


def asked_before(server: BatchProvider, request: str) -> int:
    """Direct calls that came before a request; its absence is an error."""
    return server.log[: server.log.index(request)].count("POST /v1/chat/completions")


def test_batches_are_sent_and_collected_while_other_rows_are_asked(
    folder: Path, server: BatchProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "SEND_SECONDS", 0.1)
    server.faults["POST /v1/batches"] = [429]
    server.may_answer = lambda: COLLECTS in server.log or server.direct.total() < EVEN // 2
    assert run_job(folder, server.url, concurrency=1, deadline=280.0).job.ending == "completed"
    check(folder, server, late=EVEN)
    assert asked_before(server, COLLECTS) < ROWS - EVEN


def test_batches_are_sent_and_collected_while_one_row_runs(
    folder: Path, server: BatchProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All calls that may be made at once are being made, and none ends: nothing further is planned."""
    monkeypatch.setattr(deferred, "SEND_SECONDS", 0.1)
    monkeypatch.setattr(step_threads, "AHEAD_SECONDS", 0.0)
    server.may_answer = lambda: COLLECTS in server.log
    assert run_job(folder, server.url, concurrency=1, deadline=280.0).job.ending == "completed"
    check(folder, server, late=EVEN)
    assert asked_before(server, COLLECTS) == 1


def test_a_batch_that_ends_while_rows_of_another_are_finished_is_finished_too(
    folder: Path, server: BatchProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second batch ends when the rows of the first one are in the ledger, and are yet to be written."""
    monkeypatch.setattr(deferred, "CHUNK_ROWS", EVEN // 2)
    server.changes = [{}, {"stays": True}]
    finish, ended_meanwhile = run._Run._finish_settled, list[int]()

    def after_the_second_has_ended(self: run._Run, *given: Any) -> None:
        second = [*server.batches.values()][-1:]
        if self.deferred.settled and len(self.deferred.open) == 1 and not ended_meanwhile:
            second[0].stays = False
            until = time.monotonic() + 120
            while not second[0].is_through and time.monotonic() < until:
                time.sleep(0.01)
            self.deferred.give_up()  # which is due at once, and comes too late
            before = self.deferred.collected
            finish(self, *given)
            ended_meanwhile.append(self.deferred.collected - before)
        else:
            finish(self, *given)

    monkeypatch.setattr(run._Run, "_finish_settled", after_the_second_has_ended)
    ended = run_job(folder, server.url)
    assert ended_meanwhile == [1]
    assert ended.job.ending == "completed"
    check(folder, server, late=EVEN)
    assert {row.state for row in rows_in(folder)} == {"answered"}


def test_calls_under_way_are_settled_when_a_batch_cannot_be_written_down(
    folder: Path, server: BatchProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the system, while one row runs: its call is in the ledger, and is not made again."""
    monkeypatch.setattr(deferred, "SEND_SECONDS", 0.1)
    monkeypatch.setattr(step_threads, "AHEAD_SECONDS", 0.0)
    failed = threading.Event()
    written = BatchJournal.collected

    def to_a_folder(self: BatchJournal, batch: ProviderBatch, *given: Any) -> None:
        self.requests_file(batch).unlink()
        self.requests_file(batch).mkdir()
        try:
            written(self, batch, *given)
        finally:
            self.requests_file(batch).rmdir()
            failed.set()

    server.may_answer = failed.is_set
    with monkeypatch.context() as broken:
        broken.setattr(BatchJournal, "collected", to_a_folder)
        with pytest.raises(OSError, match="provider_batches"):
            run_job(folder, server.url, concurrency=1, deadline=280.0)
    assert COLLECTS in server.log
    asked = {call: count for call, count in server.direct.items() if call[0] == "now"}
    assert asked
    assert run_job(folder, server.url, concurrency=1, deadline=280.0).job.ending == "completed"
    check(folder, server, late=EVEN)
    assert all(server.direct[call] == count for call, count in asked.items())


def test_no_batch_is_sent_once_the_job_has_to_end(
    folder: Path, server: BatchProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A direct call meets a wrong key while another one runs: rows that wait are left to the next run."""
    monkeypatch.setattr(deferred, "SEND_SECONDS", 1e9)
    monkeypatch.setattr(step_threads, "AHEAD_SECONDS", 0.0)

    stopping = executor._Executor._stopping

    def due_from_then_on(self: executor._Executor) -> bool:
        ends = stopping(self)
        if ends:
            monkeypatch.setattr(deferred, "SEND_SECONDS", 0.0)
        return ends

    monkeypatch.setattr(executor._Executor, "_stopping", due_from_then_on)
    server.faults["POST /v1/chat/completions"] = [401]
    server.may_answer = lambda: bool(server.batches)
    with pytest.raises(AuthenticationFailed):
        run_job(folder, server.url, concurrency=2, drain_seconds=2.0, tries=1)
    assert not server.batches
    server.may_answer = lambda: True
    assert run_job(folder, server.url).job.ending == "completed"
    assert compare(folder, server, ROWS).missing == 0


def test_rows_are_sent_before_the_last_running_rows_end(folder: Path, server: BatchProvider) -> None:
    """All other rows run at once: what waits is sent then, though it is no full batch."""
    server.may_answer = lambda: bool(server.batches)
    run_job(folder, server.url, concurrency=ROWS)
    check(folder, server, late=EVEN)
    (batch,) = server.batches.values()
    assert server.first_answer is not None
    assert batch.created < server.first_answer


def test_a_batch_is_given_up_while_other_rows_are_asked(
    folder: Path, server: BatchProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "SEND_SECONDS", 0.1)
    monkeypatch.setattr(deferral.Deferral, "until", lambda self: time.time() + 2.0)
    server.changes = [{"stays": True}] * ROWS
    cancels = "POST /v1/batches/*/cancel"
    server.may_answer = lambda: cancels in server.log or server.direct.total() < EVEN // 2
    run_job(folder, server.url, concurrency=1)
    assert compare(folder, server, ROWS).missing == 0
    assert asked_before(server, cancels) < ROWS - EVEN


def test_no_batch_is_sent_and_no_row_asked_when_the_time_is_over(
    folder: Path, server: BatchProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows were left to a batch, and the deadline passes until they are sent."""
    send = DeferredRows.send

    def too_late(self: DeferredRows, *, all_money: bool) -> Any:
        run: Any = self.deferral.elapsed
        run.__self__._began -= 3_600
        return send(self, all_money=all_money)

    monkeypatch.setattr(DeferredRows, "send", too_late)
    ended = run_job(folder, server.url)
    assert ended.job.ending == "deadline"
    journal = job_folder(folder / "out.jsonl") / PROVIDER_BATCHES
    assert not journal.exists() or not journal.read_text()
    assert not any(model == "late" for model, _ in server.direct)


def test_identical_calls_are_made_once(tmp_path: Path, server: BatchProvider) -> None:
    rows = [{"id": f"q{n}", "question": "What is 4 + 2?", "answer": "6", "kind": "number"} for n in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = run_job(tmp_path, server.url)
    assert ended.job.ending == "completed"
    assert sum(server.paid.values()) == 1
    assert [row.cost_nanousd for row in rows_in(tmp_path)].count(0) == 2


def test_rows_that_name_their_model_wait_too(tmp_path: Path, server: BatchProvider) -> None:
    rows = [
        {
            "custom_id": f"q{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "late", "messages": [{"role": "user", "content": f"What is {n} + 2?"}]},
        }
        for n in range(6)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = run_job(tmp_path, server.url, policy="paced")
    assert ended.job.ending == "completed"
    assert {way for way, _, _ in server.paid} == {"batch"}
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [each["response"]["body"]["choices"][0]["message"]["content"] for each in lines] == [
        f"It is {n + 2}" for n in range(6)
    ]


def test_holds_never_exceed_the_budget(folder: Path, server: BatchProvider) -> None:
    """With money for the holds of a few rows, batches go one after the other."""
    worst = rows_worst(folder, server)
    ended = run_job(folder, server.url, router=HalfRouter(every=True), budget=5 * worst / 1e9)
    assert ended.job.ending == "completed"
    check(folder, server, late=ROWS)
    assert len(server.batches) > 1


def rows_worst(folder: Path, server: BatchProvider) -> int:
    """Nano-dollars that are held for one row in a batch."""
    run_job(folder, server.url, wait=False)
    scope = Job.load(job_folder(folder / "out.jsonl")).budget
    with Ledger(folder / "ledger.db") as ledger:
        held = [hold.held_nanousd for hold in ledger.holds(scope) if "provider_batch" in hold.tags]
    run_job(folder, server.url, cancel=True)
    for path in (*job_folder(folder / "out.jsonl").iterdir(), folder / "out.jsonl"):
        path.unlink()
    server.batches.clear()
    server.direct.clear()
    return max(held)


def test_starting_over_is_refused_while_a_batch_is_charged_for(folder: Path, server: BatchProvider) -> None:
    server.changes = [{"stays": True}]
    run_job(folder, server.url, wait=False)
    with pytest.raises(InputError, match="cancel them first"):
        run_job(folder, server.url, resume=False, force=True)
    run_job(folder, server.url, cancel=True)
    run_job(folder, server.url, resume=False, force=True)
    assert len(server.batches) == 2


def test_an_interrupt_leaves_the_batch_where_it_is(folder: Path, server: BatchProvider) -> None:
    server.changes = [{"stays": True}]
    stop = threading.Event()

    def tell(event: dict[str, Any]) -> None:
        if event["event"] == "waiting":
            stop.set()

    ended = run_job(folder, server.url, stop=stop, tell=tell)
    assert ended.job.ending == "drained"
    assert all(batch.stopped is None for batch in server.batches.values())
    next(iter(server.batches.values())).stays = False
    assert run_job(folder, server.url).job.ending == "completed"
    check(folder, server, late=EVEN)


def test_the_command_says_what_waits(folder: Path, server: BatchProvider) -> None:
    server.changes = [{"stays": True}]
    entries = [
        "\n".join(
            [
                f"[models.{spec.name}]",
                'description = "Adds two."',
                'kind = "remote"',
                f'litellm_model = "{spec.litellm_model}"',
                f'api_base = "{spec.api_base}"',
                "context_length = 4096",
                "input_price = 1",
                "output_price = 4",
                f'batch_api = "{spec.batch_api}"',
                "batch_hours = 0.001",
            ]
        )
        for spec in specs(server.url, "openai")
    ]
    (folder / "catalogue.toml").write_text("\n".join(entries))
    common = ["--catalogue", str(folder / "catalogue.toml"), "--ledger", str(folder / "ledger.db")]
    command = ["batch", str(folder / "in.jsonl"), "--budget", "1", "--out", str(folder / "out.jsonl")]
    routed = ["--model", "late", "--strategy", "direct", "--deadline", "60s", "--no-wait"]
    ran = CliRunner().invoke(app, [*command, *routed, *common])
    printed = ran.output
    assert ran.exit_code == 3, printed
    assert "waiting: 0 answered" in printed
    assert f"--resume {folder / 'out.jsonl'}" in printed
    assert f"{ROWS} rows of late" in printed
    next(iter(server.batches.values())).stays = False
    ran = CliRunner().invoke(app, ["batch", "--resume", str(folder / "out.jsonl")])
    assert ran.exit_code == 0, ran.output
    assert f"completed: {ROWS} answered" in ran.output
    check(folder, server, late=ROWS)
