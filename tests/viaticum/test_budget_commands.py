"""`viaticum budget`, run as a program on real ledgers."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from ledger_calls import CALL, PRICES, USED, Clock

from viaticum.budgets import Ledger

Run = Callable[..., subprocess.CompletedProcess[str]]


def program(where: str) -> Run:
    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [
                sys.executable,
                "-W",
                "error",
                "-c",
                "from viaticum.cli import main; main()",
                "budget",
                *arguments,
            ],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env=os.environ | {"VIATICUM_LEDGER": where, "COLUMNS": "200"},
        )
        assert done.returncode == code, done.stderr
        return done

    return run


@pytest.fixture
def where(tmp_path: Path) -> str:
    return str(tmp_path / "ledger.db")


@pytest.fixture
def run(where: str) -> Run:
    return program(where)


LOOKS = ["list", "show", "entries", "verify", "export", "spending", "reconcile", "set x --pause", "show x"]


@pytest.mark.parametrize("command", LOOKS)
def test_a_ledger_that_is_looked_at_is_not_made(tmp_path: Path, command: str) -> None:
    path = tmp_path / "typo.db"
    for more in ((), ("--read-only",)) if command == "list" else ((),):
        done = program(str(path))(*command.split(), *more, code=1)
        assert done.stderr.startswith(f"error: no ledger at {path}; correct the path"), done.stderr
    assert not path.exists()


def test_before_the_first_call_this_users_ledger_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIATICUM_HOME", str(tmp_path / "home"))
    run = program("")
    assert told(run("list", "--json")) == []
    assert "unknown budget 'x'; known: none" in run("show", "x", code=1).stderr
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("limit", ["0", "-3"])
def test_a_limit_is_above_zero_dollars(run: Run, where: str, limit: str) -> None:
    for command in ("create", "set"):
        done = run(command, "x", "--limit", limit, code=1)
        assert done.stderr == f"error: a budget is above zero dollars, got {limit}\n"


def test_an_unknown_name_lists_some_of_many(run: Run, where: str) -> None:
    with Ledger(where) as ledger:
        for number in range(25):
            ledger.create(f"job-{number:02}", limit_nanousd=1)
    assert run("show", "zzz", code=1).stderr.endswith("job-18, job-19 and 5 more\n")
    assert "did you mean 'job-24'" in run("show", "job24", code=1).stderr
    assert (
        "unknown kind of entry 'pst'; did you mean 'post'?" in run("entries", "--kind", "pst", code=1).stderr
    )


def spend(where: str) -> None:
    """Below org > run: one call posted, one void, one dispatched and one reserved."""
    with Ledger(where) as ledger:
        for key in ("posted", "void", "dispatched", "reserved"):
            ledger.reserve("run", key, CALL, PRICES, tags={"model": "small", "strategy": "cot"})
        ledger.settle("posted", USED)
        ledger.void("void")
        ledger.dispatch("dispatched")


def told(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout)


def test_budgets_are_made_listed_and_changed(run: Run, where: str) -> None:
    made = told(run("create", "org", "--limit", "0.001", "--per", "day", "--zone", "Europe/Berlin", "--json"))
    assert (made["limit_nanousd"], made["window"], made["state"]) == (1_000_000, "day Europe/Berlin", "open")
    run("create", "run", "--parent", "org", "--tokens", "500")
    spend(where)
    lines = run("list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["budget", "org", "run", "2"]
    assert lines[3] == "2 budgets: $0.000000025 spent, $0.00000014 held"
    assert lines[2].startswith("  run")
    assert "$0.000000025" in lines[1]
    assert "500 tokens" in lines[2]
    rows = list(csv.DictReader(run("list", "--csv").stdout.splitlines()))
    assert [(row["name"], row["parent"], row["held_nanousd"]) for row in rows] == [
        ("org", "", "140"),
        ("run", "org", "140"),
    ]
    assert told(run("set", "org", "--limit", "0.002", "--no-window", "--json"))["limit_nanousd"] == 2_000_000
    assert told(run("set", "run", "--pause", "--reason", "lunch", "--json"))["state"] == "paused"
    assert told(run("set", "run", "--resume", "--json"))["state"] == "open"
    shown = told(run("show", "run", "--json"))
    assert [above["name"] for above in shown["above"]] == ["org"]
    assert [hold["key"] for hold in shown["open"]] == ["reserved", "dispatched"]
    assert "dispatched" in run("show", "run").stdout
    assert [budget["name"] for budget in told(run("show", "--json"))] == ["org", "run"]


def test_entries_forecast_and_export(run: Run, where: str, tmp_path: Path) -> None:
    run("create", "org", "--limit", "0.001")
    run("create", "run", "--parent", "org")
    spend(where)
    entries = [json.loads(line) for line in run("entries", "run", "--json").stdout.splitlines()]
    assert [entry["kind"] for entry in entries] == ["limit", *["reserve"] * 4, "post", "void", "dispatch"]
    assert entries[5]["models"]["small"]["output_tokens"] == 5
    assert entries[5]["prices"] == {
        "small": {"input_nanousd_per_million": 10**6, "output_nanousd_per_million": 3 * 10**6}
    }
    assert len(run("entries", "run", "--kind", "reserve", "--last", "2").stdout.splitlines()) == 3
    rows = list(csv.DictReader(run("entries", "run", "--key", "posted", "--csv").stdout.splitlines()))
    assert [(row["kind"], row["nanousd"], row["strategy"]) for row in rows] == [
        ("reserve", "70", "cot"),
        ("post", "25", "cot"),
    ]
    found = told(run("forecast", "run", "--strategy", "cot", "--json"))
    assert (found["past_calls"], found["cost_p90"], found["calls_p50"]) == (1, 25, (10**6 - 165) // 25)
    assert "from 1 settled calls" in run("forecast", "org").stdout
    assert "no settled call" in run("forecast", "run", "--strategy", "pot", code=1).stderr
    for name in ("all.csv", "all.jsonl"):
        run("export", "--out", str(tmp_path / name))
    with (tmp_path / "all.csv").open(newline="") as file:
        exported = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [row["hash"] for row in exported] == [line["hash"] for line in lines]
    assert len(lines) == 9
    assert run("export", "run", "--json").stdout.count("\n") == 8
    assert "name it .csv or .jsonl" in run("export", "--out", "all.xls", code=1).stderr


def test_reconcile_lists_what_is_unknown_and_settles_it(run: Run, where: str, tmp_path: Path) -> None:
    run("create", "org", "--limit", "0.001")
    run("create", "run", "--parent", "org")
    with Ledger(where) as ledger:
        for key in ("never sent", "paid", "free", "lost", "in a file", "not in it"):
            ledger.reserve("run", key, CALL, PRICES)
            if key != "never sent":
                ledger.dispatch(key)
    assert "no call is unknown" in run("reconcile").stdout  # leases are not over
    found = told(run("reconcile", "--crashed", "--json"))
    assert found["expired"] == ["never sent"]
    assert [hold["key"] for hold in found["unknown"]] == ["paid", "free", "lost", "in a file", "not in it"]
    assert run("reconcile", "paid", "--used", "small=10,5").stdout.startswith(
        "paid: post $0.000000025, 15 tokens"
    )
    assert run("reconcile", "free", "--void").stdout.startswith("free: void")
    assert told(run("reconcile", "lost", "--worst", "--json"))["settled"][0]["nanousd"] == 70
    file = tmp_path / "provider.jsonl"
    file.write_text('{"key": "in a file", "usage": {"small": {"input_tokens": 10, "output_tokens": 1}}}\n\n')
    left = told(run("reconcile", "--file", str(file), "--json"))
    assert [hold["key"] for hold in left["unknown"]] == ["not in it"]
    file.write_text('{"key": "not in it"}\n')
    assert "line 1" in run("reconcile", "--file", str(file), code=1).stderr
    for wrong in (["paid"], ["paid", "--void", "--worst"], ["--void"], ["not in it", "--used", "small:1"]):
        assert run("reconcile", *wrong, code=1).stderr.startswith("error: ")
    assert "ok: org" in run("verify").stdout


def test_verify_vouches_for_the_tree_that_it_checked(run: Run) -> None:
    run("create", "org", "--limit", "1")
    run("create", "team", "--parent", "org")
    run("create", "other", "--limit", "1")
    assert run("verify", "team").stdout.startswith("ok: org: 2 entries")
    assert "other" not in run("verify", "team").stdout
    assert list(told(run("verify", "org", "--json"))["heads"]) == ["org"]
    assert list(told(run("verify", "--json"))["heads"]) == ["org", "other"]


def test_verify_tells_what_was_altered(run: Run, where: str) -> None:
    run("create", "org", "--limit", "0.001")
    run("create", "run", "--parent", "org")
    spend(where)
    found = told(run("verify", "--json"))
    assert found["ok"]
    assert found["heads"]["org"]["entries"] == 9
    with closing(sqlite3.connect(where)) as shell:
        shell.execute("DROP TRIGGER entries_are_not_updated")
        shell.execute("UPDATE entries SET nanousd = 1 WHERE kind = 'post'")
        shell.commit()
    assert "its hash is not that of its columns" in run("verify", "org", code=1).stdout
    assert not told(run("verify", "--json", code=1))["ok"]


@pytest.mark.parametrize("entries", ["99999999999999999999", "-1", "1e999", "[]"])
def test_a_damaged_file_of_heads_is_an_error_in_one_line(run: Run, tmp_path: Path, entries: str) -> None:
    run("create", "org", "--limit", "1")
    file = tmp_path / "heads.json"
    file.write_text(f'{{"heads": {{"org": {{"entries": {entries}, "head": "00"}}}}}}')
    for names in ([], ["org"]):
        assert run("verify", *names, "--head", str(file), code=1).stderr.startswith("error: ")


def test_wrong_use_is_told_in_one_line(run: Run, tmp_path: Path) -> None:
    run("create", "org", "--limit", "1")
    for arguments, said in [
        (["create", "new"], "no limit given"),
        (["create", "new", "--limit", "-1"], "a budget is above zero dollars"),
        (["create", "new", "--limit", "1", "--per", "week"], "use hour, day or month"),
        (["create", "new", "--limit", "1", "--per", "day", "--zone", "Mars"], "unknown time zone"),
        (["create", "new", "--limit", "1", "--rolling"], "go with --per"),
        (["create", "new", "--parent", "og"], "did you mean 'org'"),
        (["set", "org"], "say what to change"),
        (["set", "org", "--pause", "--close"], "say what to change"),
        (["show", "new"], "unknown budget"),
        (["list", "--ledger", str(tmp_path)], "give another path"),
        (["list", "--ledger", "postgresql://nobody@127.0.0.1:1/nothing"], "cannot be reached"),
    ]:
        done = run(*arguments, code=1)
        assert done.stderr.startswith("error: ")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_commands_work_on_postgres(postgres: str) -> None:
    run = program(postgres)
    run("create", "org", "--limit", "0.001")
    run("create", "run", "--parent", "org", "--tokens", "500")
    spend(postgres)
    assert [budget["name"] for budget in told(run("list", "--json", "--read-only"))] == ["org", "run"]
    assert run("export", "--json", "--read-only").stdout.count("\n") == 9
    assert "ok: org: 9 entries" in run("verify", "--read-only").stdout


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_views_give_spend_by_scope_model_strategy_and_day(
    kind: str, where: str, request: pytest.FixtureRequest
) -> None:
    if kind == "postgres":
        where = request.getfixturevalue("postgres")
    with Ledger(where) as ledger:
        ledger.create("org", limit_nanousd=10**6)
        ledger.create("run", parent="org")
        for key, strategy in (("a", "cot"), ("b", "pot"), ("c", "cot")):
            ledger.reserve("run", key, CALL | {"large": CALL["small"]}, PRICES, tags={"strategy": strategy})
            ledger.settle(key, USED | {"large": USED["small"]})
        today = ledger.entries()[-1].at[:10]
    assert view(kind, where, "name, posted_usd, held_usd FROM spend_by_scope") == [
        ("org", 825e-9, 0),
        ("run", 825e-9, 0),
    ]
    assert view(kind, where, "model, calls, usd, output_tokens FROM spend_by_model") == [
        ("large", 3, 750e-9, 15),
        ("small", 3, 75e-9, 15),
    ]
    assert view(kind, where, "strategy, calls, usd, tokens FROM spend_by_strategy") == [
        ("cot", 2, 550e-9, 60),
        ("pot", 1, 275e-9, 30),
    ]
    assert view(kind, where, "day, calls, usd FROM spend_by_day") == [(today, 3, 825e-9)]


def view(kind: str, where: str, what: str) -> list[tuple[Any, ...]]:
    if kind == "sqlite":
        with closing(sqlite3.connect(where)) as shell:
            rows = shell.execute(f"SELECT {what}").fetchall()
    else:
        import psycopg

        with psycopg.connect(where) as connection:
            connection.execute("SET search_path TO viaticum")
            rows = connection.execute(f"SELECT {what}").fetchall()  # type: ignore[call-overload]
    return [tuple(value if isinstance(value, str) else float(value) for value in row) for row in rows]


def test_runs_are_listed_by_kind_with_their_dates_and_a_total(run: Run, where: str) -> None:
    clock = Clock("2026-11-03T08:00:00")
    with Ledger(where, clock=clock) as ledger:
        ledger.create("org", limit_nanousd=10**6)
        for name in ("run-0123456789ab", "run-0a23456789ab", "agent-0123456789ab"):
            ledger.create(name, limit_nanousd=10**6)
            ledger.reserve(name, name, CALL, PRICES)
            clock.wait(days=2)
            ledger.settle(name, USED)
        for name in ("batch-0123456789ab", "batch-1123456789ab", "run-search"):
            ledger.create(name, parent="org")
        ledger.reserve("batch-1123456789ab", "one", CALL, PRICES)
    lines = [line.split() for line in run("list").stdout.splitlines()]
    assert [line[0] for line in lines] == [
        "budget",
        "agent-0123456789ab",
        "org",
        "batch-...",
        "run-search",
        "run-...",
        "7",
        "each",
    ]
    assert lines[5] == ["run-...", "(2)", "-", "$0.00000005", "$0", "-", "-", "-", "2026-11-03", "2026-11-07"]
    assert lines[3][3:5] == ["$0", "$0.00000007"]
    assert " ".join(lines[6]) == "7 budgets: $0.000000075 spent, $0.00000007 held"
    every = [line.split()[0] for line in run("list", "--all").stdout.splitlines()]
    assert len(every) == 9
    assert {"run-0123456789ab", "batch-1123456789ab"} <= set(every)
    rows = told(run("list", "--json"))
    assert len(rows) == 7
    assert {row["name"]: (row["began"][:10], row["last"][:10]) for row in rows}["run-0a23456789ab"] == (
        "2026-11-05",
        "2026-11-07",
    )
