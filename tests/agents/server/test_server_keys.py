"""API keys: created, stored as hashes, revoked, tied to a budget; one response to every invalid one."""

from __future__ import annotations

import hmac
import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlite_utils import Database
from typer.testing import CliRunner
from viaticum_server import WORD, RunningServer, serving

from viaticum.agents.server import api_keys as keys_module
from viaticum.agents.server.api_keys import MIGRATIONS, VERSION, ApiKeyStore
from viaticum.agents.server.process import Address, require_key_for_public_address
from viaticum.budgets import Ledger
from viaticum.cli import app
from viaticum.errors import InputError, LedgerError, UnknownName


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[ApiKeyStore]:
    with ApiKeyStore(tmp_path / "keys.db") as keys:
        yield keys


# --- storage -----------------------------------------------------------------------------------------


def test_a_key_is_shown_once_and_kept_as_a_hash(keys: ApiKeyStore) -> None:
    token, key = keys.create("alice", scope="team", models=["fast"], per_minute=5)
    assert token.startswith("vk-")
    assert len(token) == 46, "256 bits"
    assert keys.find(token) == key
    assert keys.all() == [key]
    kept = b"".join(file.read_bytes() for file in keys.path.parent.glob("keys.db*"))
    assert token.encode() not in kept
    assert token[3:].encode() not in kept
    assert keys.path.stat().st_mode & 0o077 == 0
    with pytest.raises(InputError, match="already"):
        keys.create("alice")
    for name in ("", " ", "a\nb"):
        with pytest.raises(InputError):
            keys.create(name)


def test_revoked_is_at_once_and_for_good_also_for_those_who_have_the_file_open(keys: ApiKeyStore) -> None:
    token, _ = keys.create("alice")
    with ApiKeyStore(keys.path) as other:
        assert other.find(token) is not None
        first = keys.revoke("alice").revoked
        assert other.find(token) is None
        assert other.revoke("alice").revoked == first
        late, _ = other.create("bob")
    assert keys.find(late) is not None
    with pytest.raises(UnknownName, match="did you mean 'alice'"):
        keys.revoke("alic")


def test_every_token_is_compared_with_every_key_to_the_end(
    keys: ApiKeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No clock: the work itself is counted, and is the same whatever is wrong with the token, or right."""
    tokens = [keys.create(f"key {number}", scope=f"s{number % 2}")[0] for number in range(6)]
    keys.revoke("key 2")
    keys.find("")  # the rows are read
    work: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        keys_module.hmac,
        "compare_digest",
        lambda a, b: work.append(("compare", len(a), len(b))) or compare(a, b),  # type: ignore[func-returns-value]
    )
    done = []
    for token in (tokens[0], tokens[5], tokens[2], tokens[1], "", "vk-" + "x" * 43, "x" * 10_000, "\udcff"):
        work.clear()
        keys.find(token, scopes={"s0"})
        done.append(list(work))
    assert done[0] == [("compare", 64, 64)] * 6
    assert all(each == done[0] for each in done)
    found = [keys.find(token, scopes={"s0"}) for token in tokens]
    assert [each is not None for each in found] == [True, False, False, False, True, False]


compare = hmac.compare_digest


def test_migrations_are_numbered_and_a_newer_or_foreign_file_is_refused(tmp_path: Path) -> None:
    assert len(MIGRATIONS) == VERSION
    path = tmp_path / "keys.db"
    ApiKeyStore(path).close()
    assert Database(path).execute("PRAGMA user_version").fetchone() == (VERSION,)
    ApiKeyStore(path).close()
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()
    with pytest.raises(LedgerError, match="newer"):
        ApiKeyStore(path)
    other = tmp_path / "other.db"
    db = sqlite3.connect(other)
    db.execute("CREATE TABLE t (x)")
    db.commit()
    db.close()
    with pytest.raises(LedgerError, match="no keys"):
        ApiKeyStore(other)
    (tmp_path / "junk.db").write_text("junk" * 100)
    with pytest.raises(LedgerError, match="cannot use"):
        ApiKeyStore(tmp_path / "junk.db")


# --- authentication ---------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with serving(tmp_path, root_scope="serve") as server:
        server.client.ledger.create("team", parent="serve", limit_nanousd=20 * WORD)
        server.client.ledger.create("elsewhere", limit_nanousd=10**9)
        yield server
        server.assert_settled()


def test_as_soon_as_there_is_a_key_one_is_needed(server: RunningServer) -> None:
    assert server.ask().status_code == 200
    token, _ = server.keys.create("alice", scope="team")
    assert server.ask().status_code == 401
    response = server.ask(headers=bearer(token), max_tokens=9)
    assert response.status_code == 200
    assert response.headers["x-viaticum-left"] == str(6 * WORD)
    assert server.client.ledger.budget("team").posted_nanousd == 14 * WORD
    refused = server.ask(headers=bearer(token))
    assert (refused.status_code, refused.json()["error"]["type"]) == (402, "insufficient_quota")


def test_every_authentication_failure_has_the_same_response(server: RunningServer) -> None:
    tokens = {name: server.keys.create(name, scope="team")[0] for name in ("good", "revoked")}
    elsewhere, _ = server.keys.create("elsewhere", scope="elsewhere")
    lost, _ = server.keys.create("lost", scope="no such budget")
    server.keys.revoke("revoked")
    wrong: list[dict[str, str]] = [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {tokens['good']}"},
        bearer("vk-" + "x" * 43),
        bearer(tokens["good"][:-1]),
        bearer(tokens["good"] + "x"),
        bearer(tokens["revoked"]),
        bearer(elsewhere),
        bearer(lost),
    ]
    for path in ("/v1/models", "/v1/models/fast", "/metrics"):
        assert {server.http.get(path, headers=each).status_code for each in wrong} == {401}
        assert server.http.get(path, headers=bearer(tokens["good"])).status_code == 200
    answers = [server.ask(headers=each) for each in wrong]
    assert {each.status_code for each in answers} == {401}
    assert len({each.text for each in answers}) == 1
    assert all(each.headers["www-authenticate"] == "Bearer" for each in answers)
    assert len({tuple(sorted(set(each.headers) - {"date"})) for each in answers}) == 1
    for path in ("/health", "/openapi.json"):
        assert server.http.get(path).status_code == 200
    assert server.client.ledger.holds() == []


def test_a_key_for_some_models_does_not_see_the_others(server: RunningServer) -> None:
    token, _ = server.keys.create("alice", models=["fast", "auto"])
    assert [each["id"] for each in server.http.get("/v1/models", headers=bearer(token)).json()["data"]] == [
        "auto",
        "fast",
    ]
    assert server.ask("fast", headers=bearer(token)).status_code == 200
    hidden, unknown = (server.ask(name, headers=bearer(token)) for name in ("slow", "nobody"))
    assert hidden.status_code == unknown.status_code == 404
    assert hidden.text.replace("slow", "nobody") == unknown.text
    assert server.http.get("/v1/models/slow", headers=bearer(token)).status_code == 404


def test_each_key_has_a_rate_of_its_own(server: RunningServer) -> None:
    one, two = (server.keys.create(name, per_minute=rate)[0] for name, rate in (("one", 1), ("two", 2)))
    assert [server.ask(headers=bearer(one)).status_code for _ in range(2)] == [200, 429]
    assert [server.ask(headers=bearer(two)).status_code for _ in range(3)] == [200, 200, 429]


def test_a_server_for_other_machines_needs_a_key(keys: ApiKeyStore) -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        require_key_for_public_address(Address(host), keys, insecure=False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.com"):
        with pytest.raises(InputError, match="--insecure"):
            require_key_for_public_address(Address(host), keys, insecure=False)
        require_key_for_public_address(Address(host), keys, insecure=True)
    keys.create("alice")
    require_key_for_public_address(Address("0.0.0.0"), keys, insecure=False)
    keys.revoke("alice")
    with pytest.raises(InputError):
        require_key_for_public_address(Address("0.0.0.0"), keys, insecure=False)


def test_an_address_that_is_taken_or_none() -> None:
    with Address(port=0).listen() as listener, pytest.raises(InputError, match="cannot listen"):
        Address(port=listener.getsockname()[1]).listen()
    with pytest.raises(InputError, match="cannot listen"):
        Address("not a host").listen()


# --- the command ------------------------------------------------------------------------------------------


def run(folder: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["keys", *words, "--folder", str(folder)])


def test_keys_on_the_command_line(tmp_path: Path) -> None:
    made = json.loads(
        run(tmp_path, "create", "alice", "--limit", "5", "--model", "fast", "--rate", "9", "--json").stdout
    )
    assert made["scope"] == "alice"
    assert (made["models"], made["per_minute"]) == (["fast"], 9)
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.budget("alice").limit_nanousd == 5 * 10**9
    with ApiKeyStore(tmp_path / "keys.db") as keys:
        found = keys.find(made["key"])
        assert found is not None
        assert found.name == "alice"
    (listed,) = json.loads(run(tmp_path, "list", "--json").stdout)
    assert "key" not in listed
    assert listed["name"] == "alice"
    assert "alice" in run(tmp_path, "list").stdout
    assert run(tmp_path, "revoke", "alice").stdout == "revoked alice\n"
    assert json.loads(run(tmp_path, "list", "--json").stdout)[0]["revoked"]
    assert run(tmp_path, "create", "bob").stdout.startswith("vk-")
    refused = run(tmp_path, "create", "carol", "--scope", "alicia")
    assert isinstance(refused.exception, UnknownName)


@pytest.mark.parametrize("words", [("list",), ("revoke", "alice")])
def test_keys_that_are_looked_for_elsewhere_make_no_store(tmp_path: Path, words: tuple[str, ...]) -> None:
    refused = run(tmp_path / "typo", *words)
    assert f"no keys in {tmp_path / 'typo'}" in str(refused.exception)
    assert not (tmp_path / "typo").exists()


def test_a_key_sees_the_metrics_of_its_own_budget_alone(server: RunningServer) -> None:
    server.client.ledger.create("team/eve", limit_nanousd=100 * WORD, parent="team")
    tokens = {
        name: server.keys.create(name, scope=scope, metrics=name == "prometheus")[0]
        for name, scope in (("lead", "team"), ("eve", "team/eve"), ("alice", None), ("prometheus", None))
    }

    def metrics(name: str) -> str:
        return server.http.get("/metrics", headers=bearer(tokens[name])).text

    def budgets(name: str) -> set[str]:
        return set(re.findall(r'viaticum_spent_dollars\{budget="([^"]*)"', metrics(name)))

    assert server.ask(headers=bearer(tokens["eve"]), max_tokens=9).status_code == 200
    assert budgets("eve") == {"team/eve"}
    assert budgets("lead") == {"team"}
    assert budgets("alice") == {"serve"}
    assert budgets("prometheus") == {"serve", "team", "team/eve"}
    for name in ("eve", "alice"):
        assert "viaticum_requests_total" not in metrics(name), "of all keys together"
        assert "viaticum_holds" not in metrics(name)
    assert 'viaticum_requests_total{model="fast",status="200"} 1.0' in metrics("prometheus")


@pytest.mark.parametrize(
    ("host", "passes"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:80", True),
        ("[::1]", True),
        ("[::1]:8000", True),
        ("[::1]evil.example", False),
        ("[::1]:80.evil.example", False),
        ("[::1", False),
        ("localhost:evil", False),
        ("localhost:80@evil.example", False),
        ("evil.example:localhost", False),
        ("localhost.evil.example", False),
        ("localhost/", False),
        ("", False),
    ],
)
def test_without_keys_the_whole_host_header_is_a_loopback_name(
    server: RunningServer, host: str, passes: bool
) -> None:
    assert server.http.get("/v1/models", headers={"host": host}).status_code == (200 if passes else 401)
