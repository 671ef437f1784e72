"""Word that a share of a budget is spent: once, signed, tried again, and never in the way of a call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from batch_jobs import models, two_plans_router, write_questions
from langchain.agents import create_agent
from viaticum_server import wait_until
from webhook_receiver import Receiver, receiving

from viaticum import FakeRouter, InputError, ScriptedModel, Viaticum, build_graph
from viaticum.agents.batch import run_batch
from viaticum.agents.batch.output import Counts
from viaticum.agents.batch.progress import Progress
from viaticum.agents.batch.settings import BatchSettings
from viaticum.agents.batch.soft_limits import watch_soft_limits
from viaticum.agents.integrations.middleware import BudgetMiddleware
from viaticum.agents.workflow.soft_limits import ShareSpent, SoftLimits, SoftLimitWatch
from viaticum.agents.workflow.webhooks import Webhook
from viaticum.budgets import Claim, Ledger, Settlement
from viaticum.money import Price
from viaticum.types import TokenCount

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
PRICE = {"m": Price.per_million(1, 1)}
LIMIT = 1_000_000  # a thousand tokens


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def spend(ledger: Ledger, tokens: int, budget: str = "b", key: str | None = None) -> None:
    key = key or f"k{len(list(ledger.entries(budget)))}"
    ledger.reserve(budget, key, {"m": TokenCount(tokens, 0)}, PRICE)
    ledger.settle(key, {"m": TokenCount(tokens, 0)})


def opened(folder: Path, **more: Any) -> Ledger:
    ledger = Ledger(folder / "ledger.db", **more)
    if "b" not in {budget.name for budget in ledger.budgets()}:
        ledger.create("b", limit_nanousd=LIMIT)
    return ledger


def test_the_signature_is_that_of_the_standard() -> None:
    """The example of the specification's own libraries."""
    signed = Webhook("https://example.org", SECRET).headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    )
    assert signed["webhook-id"] == "msg_p5jXN8AQM9LWM0D4loKWxJek"
    assert signed["webhook-timestamp"] == "1614265330"
    assert signed["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_every_share_is_told_once_and_in_order(
    tmp_path: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[ShareSpent] = []
    limits = SoftLimits((0.8, 0.5), told.append, Webhook(receiver.url, SECRET))
    with opened(tmp_path) as ledger:
        watch = SoftLimitWatch(ledger, limits)
        with caplog.at_level(logging.WARNING, "viaticum"):
            for _ in range(10):
                spend(ledger, 100)
        receiver.wait_for(2)
        watch.close()
    assert [(each.share, each.spent_nanousd) for each in told] == [(0.5, 500_000), (0.8, 800_000)]
    assert [record.getMessage() for record in caplog.records] == [
        "budget b has spent $0.0005 of $0.001, which passes its soft limit of 50%",
        "budget b has spent $0.0008 of $0.001, which passes its soft limit of 80%",
    ]
    assert receiver.ids == [each.id for each in told]
    assert receiver.events[0]["type"] == "budget.share_spent"
    assert receiver.events[0]["data"] == {
        "budget": "b",
        "share": 0.5,
        "spent_nanousd": 500_000,
        "limit_nanousd": 1_000_000,
        "left_nanousd": 500_000,
        "spent_usd": "0.0005",
        "limit_usd": "0.001",
        "left_usd": "0.0005",
    }
    for headers, body in receiver.received:
        wanted = Webhook(receiver.url, SECRET).headers(
            headers["webhook-id"], int(headers["webhook-timestamp"]), body
        )
        assert headers["webhook-signature"] == wanted["webhook-signature"]


def test_one_call_may_pass_several_shares_and_a_new_limit_has_its_own(tmp_path: Path) -> None:
    told: list[ShareSpent] = []
    with opened(tmp_path) as ledger:
        watch = SoftLimitWatch(ledger, SoftLimits((0.5, 0.8, 1.0), told.append))
        spend(ledger, 1000)
        assert [each.share for each in told] == [0.5, 0.8, 1.0]
        ledger.set_limit("b", limit_nanousd=2 * LIMIT)
        spend(ledger, 10)
        spend(ledger, 10)
        assert [(each.share, each.limit_nanousd) for each in told[3:]] == [(0.5, 2 * LIMIT)]
        watch.close()
        spend(ledger, 900)
        assert len(told) == 4


def test_the_limits_of_budgets_above_count_too(tmp_path: Path) -> None:
    told: list[ShareSpent] = []
    with opened(tmp_path) as ledger:
        ledger.create("team", limit_nanousd=10 * LIMIT, parent="b")
        SoftLimitWatch(ledger, SoftLimits((0.5,), told.append))
        spend(ledger, 600, "team")
        assert [each.budget for each in told] == ["b"]


def test_many_processes_and_threads_give_word_once(tmp_path: Path) -> None:
    """Each with a ledger object and a watch of its own, as processes have."""
    told: list[ShareSpent] = []

    def work(number: int) -> None:
        with opened(tmp_path) as ledger:
            watches = [SoftLimitWatch(ledger, SoftLimits((0.5, 0.8), told.append)) for _ in range(2)]
            for turn in range(5):
                spend(ledger, 20, key=f"{number}-{turn}")
            for watch in watches:
                watch.close()

    opened(tmp_path).close()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.share for each in told) == [0.5, 0.8]


@pytest.mark.parametrize("statuses", [[500, 503], [429], [302, 404, 400]])
def test_a_receiver_that_fails_is_tried_again(
    tmp_path: Path, receiver: Receiver, statuses: list[int]
) -> None:
    receiver.statuses = list(statuses)
    webhook = Webhook(receiver.url, SECRET, retry_seconds=(0.01, 0.01, 0.01, 0.01))
    with opened(tmp_path) as ledger:
        watch = SoftLimitWatch(ledger, SoftLimits((0.5,), webhook=webhook))
        spend(ledger, 600)
        receiver.wait_for(len(statuses) + 1)
        watch.close()
    assert len(receiver.received) == len(statuses) + 1
    assert len(set(receiver.ids)) == 1
    assert len({body for _, body in receiver.received}) == 1


def test_a_receiver_that_is_gone_or_away_for_good_is_left(
    tmp_path: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.statuses = [410]
    nowhere = "http://127.0.0.1:1/hook"
    for url, problem in ((receiver.url, "status 410"), (nowhere, "ConnectError")):
        (tmp_path / problem).mkdir()
        with opened(tmp_path / problem) as ledger, caplog.at_level(logging.ERROR, "viaticum"):
            watch = SoftLimitWatch(
                ledger, SoftLimits((0.5,), webhook=Webhook(url, SECRET, retry_seconds=(0.01,)))
            )
            spend(ledger, 600)
            wait_until(lambda: problem in caplog.text)  # noqa: B023
            watch.close()
        assert problem in caplog.text
    assert len(receiver.received) == 1
    assert SECRET not in caplog.text


def test_a_process_that_ends_or_is_killed_leaves_its_word_to_the_next(
    tmp_path: Path, receiver: Receiver
) -> None:
    """One closes while its receiver fails; one claims a share and is never heard of again."""
    receiver.statuses = [500, 500]
    webhook = Webhook(receiver.url, SECRET, retry_seconds=(60.0,))
    with opened(tmp_path) as ledger:
        watch = SoftLimitWatch(ledger, SoftLimits((0.5,), webhook=webhook))
        spend(ledger, 600)
        receiver.wait_for(1)
        watch.close()
    with opened(tmp_path) as ledger:
        killed = SoftLimitWatch(ledger, SoftLimits((0.5,)))
        killed._give_word = lambda *_: None  # type: ignore[method-assign]
        spend(ledger, 1)
        ledger.on_post.clear()
    for hours, count in ((0, 2), (1, 3), (2, 3)):
        clock = datetime.now(UTC) + timedelta(hours=hours)
        with opened(tmp_path, clock=lambda at=clock: at) as ledger:
            watch = SoftLimitWatch(ledger, SoftLimits((0.5,), webhook=webhook))
            spend(ledger, 1)
            receiver.wait_for(count)
            watch.close()
        assert len(receiver.received) == count
    assert len(set(receiver.ids)) == 1, "the receiver can drop repetitions"


def test_an_error_of_the_callback_is_no_error_of_the_call(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: ShareSpent) -> None:
        raise ValueError("a bug")

    with opened(tmp_path) as ledger:
        SoftLimitWatch(ledger, SoftLimits((0.1,), broken))
        spend(ledger, 500)
        assert "on_share failed for budget b" in caplog.text
        assert ledger.budget("b").posted_nanousd == 500_000


def test_client_graph_and_agent_take_soft_limits(tmp_path: Path) -> None:
    told: list[str] = []
    limits = SoftLimits((0.01,), lambda event: told.append(event.budget))
    models = {"scripted": ScriptedModel("The answer is 42.")}
    settings: Any = {"models": models, "router": FakeRouter("scripted+direct"), "folder": tmp_path}
    with Viaticum("0.0005", budget_name="client", soft_limits=limits, **settings) as client:
        client.solve("What is 6 * 7?")
    graph = build_graph("0.0005", budget_name="graph", soft_limits=limits, **settings)
    graph.invoke({"question": "What is 6 * 7?"})  # type: ignore[call-overload]
    with Ledger("memory:") as ledger:
        from fake_chat import fake, says

        budget = BudgetMiddleware(
            "0.01", prices={"fake": (1, 2)}, ledger=ledger, budget_name="agent", soft_limits=limits
        )
        create_agent(fake(says()), [], middleware=[budget]).invoke({"messages": [("user", "hi")]})
    assert told == ["client", "graph", "agent"]


def test_a_job_gives_word_as_everything_else_does(tmp_path: Path, receiver: Receiver) -> None:
    """By callback, webhook and log, once a share; a job that goes on gives no word again."""
    write_questions(tmp_path / "in.jsonl", 20)
    told: list[ShareSpent] = []
    limits = SoftLimits((0.3, 0.6), told.append, Webhook(receiver.url, SECRET))
    given: dict[str, Any] = {
        "models": models(),
        "router": two_plans_router(),
        "ledger": tmp_path / "ledger.db",
        "soft_limits": limits,
        "policy": "best",
    }
    ended = run_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", budget="0.009", **given)
    spent = ended.figures["spent_nanousd"] / 9_000_000
    assert spent > 0.6
    assert [(each.budget, each.share) for each in told] == [(ended.job.budget, 0.3), (ended.job.budget, 0.6)]
    receiver.wait_for(2)
    run_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", resume=True, **given)
    assert len(told) == 2
    assert receiver.ids == [each.id for each in told]


def test_what_workers_post_is_told_with_the_progress(tmp_path: Path) -> None:
    """Workers have ledgers of their own, so that nothing is posted through the one of the job."""
    told: list[float] = []
    with opened(tmp_path) as ledger, opened(tmp_path) as worker, ExitStack() as stack:
        progress = Progress(lambda event: None, ledger, "b", 2, Counts())
        limits = SoftLimits((0.5, 0.9), lambda event: told.append(event.share))
        settings = BatchSettings(soft_limits=limits, engine="ray")
        watch = watch_soft_limits(settings, ledger, progress, stack)
        assert watch is not None
        spend(worker, 600)
        assert told == []
        progress.now()
        assert told == [0.5]
        spend(worker, 350)
        progress.now()
        progress.now()
        assert told == [0.5, 0.9]


def test_calls_that_are_posted_together_are_looked_at_once(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        seen: list[int] = []
        ledger.on_post.append(lambda entries: seen.append(len(entries)))
        claims = [Claim(f"k{n}", {"m": TokenCount(10, 0)}, PRICE, "", {}) for n in range(3)]
        ledger.reserve_many("b", claims)
        ledger.settle_many([Settlement(each.key, {"m": TokenCount(10, 0)}) for each in claims])
        assert seen == [3]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SoftLimits(()),
        lambda: SoftLimits((0.5, 1.5)),
        lambda: SoftLimits((0,)),
        lambda: SoftLimits(on_share="no"),
        lambda: SoftLimits(webhook="https://a"),
        lambda: Webhook("ftp://a", SECRET),
        lambda: Webhook("https://", SECRET),
        lambda: Webhook("https://a", "short"),
        lambda: Webhook("https://a", "whsec_%%%"),
        lambda: Viaticum(soft_limits=0.5),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings_are_refused(make: Any) -> None:
    with pytest.raises(InputError):
        make()


def test_the_secret_is_not_shown() -> None:
    assert SECRET not in repr(SoftLimits(webhook=Webhook("https://a", SECRET)))


def test_the_options_of_the_commands(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    from viaticum.commands.soft_limits import soft_limits_of

    assert soft_limits_of(None, None) is None
    assert soft_limits_of([0.9], None) == SoftLimits([0.9])
    monkeypatch.delenv("VIATICUM_WEBHOOK_SECRET", raising=False)
    with pytest.raises(InputError, match="VIATICUM_WEBHOOK_SECRET"):
        soft_limits_of(None, receiver.url)
    monkeypatch.setenv("VIATICUM_WEBHOOK_SECRET", SECRET)
    assert soft_limits_of(None, receiver.url) == SoftLimits(webhook=Webhook(receiver.url, SECRET))
