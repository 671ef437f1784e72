"""Spending by label: real calls of a server with keys, of code and of jobs, counted against the ledger."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from zoneinfo import ZoneInfo

import pytest
from ledger_calls import CALL, PRICES, USED, Clock
from scripted_client import client
from typer.testing import CliRunner
from viaticum_server import serving

import viaticum
from viaticum.budgets import Claim, Ledger
from viaticum.budgets.tagging import VARIABLE, current_tags
from viaticum.cli import app
from viaticum.errors import InputError, UnknownName
from viaticum.reports.spending import NO_TAG, period_of, read_spending, weeks_between
from viaticum.types import TokenCount

PAIR = {"small": TokenCount(10, 5), "large": TokenCount(20, 10)}
COSTS = {"small": 25, "large": 500}


@pytest.fixture
def where(tmp_path: Path) -> str:
    """Three weeks of calls in two trees: small alone, a pair of models, and one that was lost."""
    address, clock = str(tmp_path / "ledger.db"), Clock("2026-11-01T23:30:00")  # a Sunday
    with Ledger(address, clock=clock) as ledger:
        ledger.create("org", limit_nanousd=10_000)
        ledger.create("run", parent="org")
        ledger.create("other", limit_nanousd=10_000)
        with viaticum.tagged(team="search", customer="=acme"):
            ledger.reserve("run", "a", CALL, PRICES)
            ledger.settle("a", USED)
            clock.set("2026-11-02T00:30:00")  # a Monday
            ledger.reserve("run", "b", PAIR, PRICES)
            ledger.settle("b", PAIR)
        clock.set("2026-11-17T12:00:00")
        ledger.reserve("other", "c", CALL, PRICES)
        ledger.settle("c", USED)
        ledger.reserve("other", "lost", CALL, PRICES, dispatch=True)
        ledger.abandon("lost")
        ledger.reserve("other", "void", CALL, PRICES)
        ledger.void("void")
    return address


def test_lines_add_up_to_what_the_ledger_posted(where: str) -> None:
    with Ledger(where, read_only=True) as ledger:
        posted = sum(each.posted_nanousd for each in ledger.budgets() if each.parent is None)
        for by in (["team"], ["model"], ["week"], ["team", "model"], ["tag:customer", "budget", "month"]):
            found = read_spending(ledger, by)
            assert sum(line.nanousd for line in found.lines) == found.nanousd == posted == 575
            assert found.calls == 3
        assert (found.unknown, found.unknown_nanousd) == (1, 70)
        models = {line.labels: line for line in read_spending(ledger, ["model"]).lines}
        assert {key: line.nanousd for key, line in models.items()} == {("large",): 500, ("small",): 75}
        assert (models["small",].calls, models["large",].calls) == (3, 1)
        assert (models["small",].input_tokens, models["small",].output_tokens) == (30, 15)
        teams = {line.labels: line.nanousd for line in read_spending(ledger, ["team"]).lines}
        assert teams == {("search",): 550, (NO_TAG,): 25}
        roots = {line.labels: line.nanousd for line in read_spending(ledger, ["root"]).lines}
        assert roots == {("org",): 550, ("other",): 25}


def test_a_scope_a_time_and_a_zone_narrow_it(where: str) -> None:
    with Ledger(where, read_only=True) as ledger:
        assert read_spending(ledger, ["team"], budget="org").nanousd == 550
        assert read_spending(ledger, ["team"], budget="org").unknown == 0
        monday = datetime(2026, 11, 2, tzinfo=UTC)
        assert read_spending(ledger, ["team"], since=monday).nanousd == 550
        assert read_spending(ledger, ["team"], until=monday).nanousd == 25
        weeks = {line.labels[0]: line.nanousd for line in read_spending(ledger, ["week"]).lines}
        assert weeks == {"2026-W44": 25, "2026-W45": 525, "2026-W47": 25}
        berlin = read_spending(ledger, ["week"], zone="Europe/Berlin").lines  # both in Monday's first hours
        assert {line.labels[0]: line.nanousd for line in berlin} == {"2026-W45": 550, "2026-W47": 25}
        with pytest.raises(UnknownName):
            read_spending(ledger, ["team"], budget="orgg")
        for wrong in ([], ["teams"], ["team", "team"], ["tag:"]):
            with pytest.raises(InputError):
                read_spending(ledger, wrong)
        with pytest.raises(InputError, match="time zone"):
            read_spending(ledger, ["week"], zone="Mars/Base")


def test_weeks_are_those_of_iso_8601_over_new_year() -> None:
    assert period_of("2026-12-31T10:00", "week", ZoneInfo("UTC")) == "2026-W53"
    assert period_of("2027-01-03T10:00", "week", ZoneInfo("UTC")) == "2026-W53"
    assert period_of("2027-01-04T10:00", "week", ZoneInfo("UTC")) == "2027-W01"
    assert weeks_between("2026-W52", "2027-W02") == ["2026-W52", "2026-W53", "2027-W01", "2027-W02"]


@pytest.mark.parametrize(
    "zone", ["UTC", "Asia/Kolkata", "Asia/Kathmandu", "America/Los_Angeles", "Europe/Berlin"]
)
def test_single_days_add_up_to_the_whole_in_every_zone(tmp_path: Path, zone: str) -> None:
    """Each call counts on one day: that of its own time zone, over a change of clocks too."""
    clock, local = Clock("2026-10-24T00:05:00"), ZoneInfo(zone)
    with Ledger(tmp_path / "ledger.db", clock=clock) as ledger:
        ledger.create("run", limit_nanousd=10**9)
        expected: dict[str, int] = {}
        for n in range(100):
            clock.wait(minutes=47)
            ledger.reserve("run", f"{n}", CALL, PRICES)
            ledger.settle(f"{n}", USED)
            day = f"{clock().astimezone(local):%Y-%m-%d}"
            expected[day] = expected.get(day, 0) + 25
        whole = read_spending(ledger, ["day"], zone=zone)
        assert {line.labels[0]: line.nanousd for line in whole.lines} == expected
        for day, amount in expected.items():
            since = datetime.fromisoformat(day).replace(tzinfo=local)
            until = (datetime.fromisoformat(day) + timedelta(days=1)).replace(tzinfo=local)
            alone = read_spending(ledger, ["model"], since=since, until=until, zone=zone)
            assert alone.nanousd == amount


def test_the_command_prints_a_table_csv_and_json(where: str, tmp_path: Path) -> None:
    run = CliRunner()
    done = run.invoke(app, ["budget", "spending", "--ledger", where, "--by", "team", "--by", "model"])
    assert done.exit_code == 0, done.output
    assert "$0.0000005" in done.stdout
    assert "$0.000000575 spent in 3 calls" in done.stdout
    assert "not counted: $0.00000007 held for 1 call" in done.stderr
    done = run.invoke(app, ["budget", "spending", "--ledger", where, "--by", "tag:customer", "--csv"])
    lines = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [line["nanousd"] for line in lines] == ["550", "25"]
    assert lines[0]["usd"] == "0.00000055"
    assert lines[0]["tag:customer"] == "'=acme", "no formula to a spreadsheet"
    done = run.invoke(app, ["budget", "spending", "org", "--ledger", where, "--by", "week", "--json"])
    told = json.loads(done.stdout)
    assert [line["week"] for line in told["lines"]] == ["2026-W44", "2026-W45"]
    out = tmp_path / "spent.csv"
    arguments = ["budget", "spending", "--ledger", where, "--since", "2026-11-02", "-o", str(out)]
    assert run.invoke(app, arguments).exit_code == 0
    assert sum(int(line["nanousd"]) for line in csv.DictReader(out.read_text().splitlines())) == 550
    assert run.invoke(app, arguments).exit_code == 1, "a file that is there is kept"
    assert run.invoke(app, [*arguments[:-1], str(tmp_path / "spent.xls")]).exit_code == 1
    assert run.invoke(app, ["budget", "spending", "--ledger", where, "--since", "soon"]).exit_code == 1


def test_an_empty_ledger_has_a_total_and_a_page(tmp_path: Path) -> None:
    where = str(tmp_path / "empty.db")
    Ledger(where).close()
    run = CliRunner()
    done = run.invoke(app, ["budget", "spending", "--ledger", where])
    assert done.stdout == "$0 spent in 0 calls\n"
    page = tmp_path / "spending.html"
    done = run.invoke(app, ["budget", "spending", "--ledger", where, "-o", str(page)])
    assert done.exit_code == 0, done.output
    assert "No call was posted in this time." in page.read_text(encoding="utf-8")


def test_the_page_shows_every_label_and_amount(where: str, tmp_path: Path) -> None:
    page = tmp_path / "spending.html"
    done = CliRunner().invoke(app, ["budget", "spending", "--ledger", where, "-o", str(page)])
    assert done.exit_code == 0, done.output
    text = page.read_text(encoding="utf-8")
    for part in ("$0.000000575 was spent in 3 calls", "2026-W46", "By the tag customer", "=acme", "95.7%"):
        assert part in text
    assert "No call has a key." in text


def test_calls_of_a_server_carry_their_key_and_its_team(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        anna, _ = server.keys.create("anna", team="search")
        bob, _ = server.keys.create("bob")
        spent = {}
        for name, token, count in (("anna", anna, 2), ("bob", bob, 1)):
            for _ in range(count):
                done = server.ask(headers={"authorization": f"Bearer {token}"})
                assert done.status_code == 200, done.text
                spent[name] = spent.get(name, 0) + int(done.headers["x-viaticum-cost"])
        server.assert_settled()
        found = read_spending(server.client.ledger, ["team", "key"])
    assert {line.labels: line.nanousd for line in found.lines} == {
        ("search", "anna"): spent["anna"],
        (NO_TAG, "bob"): spent["bob"],
    }
    assert {line.labels: line.calls for line in found.lines} == {("search", "anna"): 2, (NO_TAG, "bob"): 1}


def test_tags_reach_the_calls_of_a_client_and_end_with_their_block(tmp_path: Path) -> None:
    with client(tmp_path) as viaticum_client:
        with viaticum.tagged(team="search"):
            viaticum_client.solve("twice 3?", kind="number")
            with viaticum.tagged(team="maps", customer="acme"):
                viaticum_client.solve("twice 4?", kind="number")
        viaticum_client.solve("twice 5?", kind="number")
        posts = [each for each in viaticum_client.ledger.entries() if each.kind == "post"]
    labels = [(each.note["tags"].get("team"), each.note["tags"].get("customer")) for each in posts]
    assert list(dict.fromkeys(labels)) == [("search", None), ("maps", "acme"), (None, None)]
    assert all({"model", "strategy"} <= each.note["tags"].keys() for each in posts), "its own tags stay"


def test_a_process_has_tags_and_a_block_overrides_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "team=search, customer = a b,")
    assert current_tags() == {"team": "search", "customer": "a b"}
    with viaticum.tagged(team="maps"):
        assert current_tags() == {"team": "maps", "customer": "a b"}
        seen: list[dict[str, str]] = []
        thread = Thread(target=lambda: seen.append(current_tags()))
        thread.start()
        thread.join()
        assert seen == [{"team": "search", "customer": "a b"}], "a bare thread has a context of its own"
    for wrong in ("team", "model=x", "=x", "team="):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(InputError):
            current_tags()


@pytest.mark.parametrize("tags", [{"model": "x"}, {"strategy": "x"}, {"team": ""}, {"team": "a\nb"}])
def test_what_viaticum_itself_sets_cannot_be_set(tags: dict[str, str]) -> None:
    with pytest.raises(InputError), viaticum.tagged(**tags):
        pass


def test_a_call_that_is_tried_again_under_other_tags_is_the_same_call(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.create("run", limit_nanousd=10_000)
        with viaticum.tagged(team="search"):
            first = ledger.reserve("run", "a", CALL, PRICES)
        with viaticum.tagged(team="maps"):
            assert ledger.reserve("run", "a", CALL, PRICES) == first
            (many,) = ledger.reserve_many("run", [Claim("b", CALL, PRICES, tags={"team": "own"})])
        assert first.tags == {"team": "search"}
        assert not isinstance(many, Exception)
        assert many.tags == {"team": "own"}, "what a call says itself counts"
        assert ledger.check() == []
