"""/v1/files and /v1/batches through OpenAI's SDK, unchanged; scripted models, and a provider with faults."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai_batches import CHAT, create, ended, jsonl, line, rows, sdk
from openai_server import OpenAIServer, running_server, spec_for
from viaticum_server import WORD, RunningServer, hold_back, serving, wait_until, write_catalogue

from viaticum import FakeRouter
from viaticum.agents.openai_api.batches import Line, new_batch, parse_batch_request
from viaticum.agents.openai_api.chat import ChatCompletions
from viaticum.agents.responses_api.store import ResponseStore
from viaticum.agents.server.batch_lines import line_key
from viaticum.agents.server.batch_runner import MAX_RUNNING
from viaticum.agents.server.batch_store import StoredBatch
from viaticum.catalogue import Catalogue
from viaticum.models.remote.request import load_litellm
from viaticum.money import Price
from viaticum.types import TokenCount

WORDS = "Seven times six is forty-two. The answer is 42."


@pytest.fixture(scope="module")
def far() -> Iterator[OpenAIServer]:
    load_litellm()  # once, before a client waits for it
    with running_server() as far:
        yield far


@pytest.fixture(scope="module")
def server(far: OpenAIServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("batches")
    catalogue = Catalogue.load(write_catalogue(folder)).with_models(spec_for(far, max_retries=0))
    with serving(folder, catalogue=catalogue, budget="10") as server:
        yield server


@pytest.fixture(autouse=True)
def anew(far: OpenAIServer) -> None:
    far.reset()


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with sdk(server) as client:
        yield client


def test_the_example_of_the_sdk(client: openai.OpenAI, server: RunningServer, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(jsonl(*(line(f"request-{n}", "auto" if n % 2 else "fast") for n in range(5))))
    before = server.spent_and_held()[0]

    with path.open("rb") as requests:
        batch_input_file = client.files.create(file=requests, purpose="batch")
    batch = client.batches.create(
        input_file_id=batch_input_file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"description": "nightly eval job"},
    )
    assert batch.status in ("validating", "in_progress", "finalizing", "completed")
    while (batch := client.batches.retrieve(batch.id)).status != "completed":
        time.sleep(0.05)
    file_response = client.files.content(batch.output_file_id or "")

    answers = [json.loads(each) for each in file_response.text.splitlines()]
    assert sorted(each["custom_id"] for each in answers) == [f"request-{n}" for n in range(5)]
    for each in answers:
        assert each["error"] is None
        assert each["response"]["status_code"] == 200
        assert each["response"]["body"]["choices"][0]["message"]["content"].startswith("Seven times six")
        assert each["response"]["request_id"].startswith("req_")
    cost = sum(each["response"]["body"]["viaticum"]["cost_nanousd"] for each in answers)
    assert server.spent_and_held() == (before + cost, 0)
    assert batch.error_file_id is None
    assert batch.errors is None
    assert batch.metadata == {"description": "nightly eval job"}
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (5, 5, 0)
    usage = [each["response"]["body"]["usage"] for each in answers]
    assert batch.usage is not None
    assert batch.usage.total_tokens == sum(each["total_tokens"] for each in usage) > 0
    assert batch.created_at <= (batch.in_progress_at or 0) <= (batch.completed_at or 0)
    assert batch.expires_at == batch.created_at + 86_400
    output = client.files.retrieve(batch.output_file_id or "")
    assert (output.purpose, output.bytes) == ("batch_output", len(file_response.content))
    assert client.files.delete(output.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(output.id)
    server.assert_settled()


def test_lines_of_the_responses_api_are_kept_as_live_ones(client: openai.OpenAI) -> None:
    body = {"model": "fast", "input": "What is 6 times 7?"}
    request = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": body}
    batch = ended(client, create(client, jsonl(request), endpoint="/v1/responses"))
    (answer,) = rows(client, batch.output_file_id).values()
    response = answer["response"]["body"]
    assert client.responses.retrieve(response["id"]).output_text == WORDS
    assert batch.usage.output_tokens == response["usage"]["output_tokens"] > 0
    following = client.responses.create(model="fast", input="Again?", previous_response_id=response["id"])
    assert following.status == "completed"


@pytest.mark.parametrize(
    ("content", "code", "number"),
    [
        (b"", "empty_file", None),
        (b"\n \n", "empty_file", None),
        (b"{nonsense\n", "invalid_json_line", 1),
        (b"[1, 2]\n", "invalid_json_line", 1),
        (b'"text"\n', "invalid_json_line", 1),
        (b"\xff\xfe\n", "invalid_json_line", 1),
        (b"[" * 100_000 + b"\n", "invalid_json_line", 1),
        (jsonl(line("a")).replace(b'"fast"', b"[" * 900 + b"]" * 900), "invalid_json_line", 1),
        (jsonl(line("a"), line("b"), line("a")), "duplicate_custom_id", 3),
        (jsonl({**line("a"), "url": "/v1/embeddings"}), "invalid_url", 1),
        (jsonl({**line("a"), "method": "GET"}), "invalid_method", 1),
        (jsonl({**line("a"), "custom_id": 7}), "invalid_custom_id", 1),
        (jsonl({**line("a"), "custom_id": ""}), "invalid_custom_id", 1),
        (b'{"custom_id": "\\ud800", "method": "POST", "url": "x", "body": {}}\n', "invalid_custom_id", 1),
        (jsonl({"method": "POST", "url": CHAT, "body": {}}), "missing_required_parameter", 1),
        (jsonl({**line("a"), "body": "text"}), "invalid_body", 1),
        (jsonl(line("a", stream=True)), "invalid_body", 1),
        (jsonl(line("a", user="x" * (1 << 20))), "request_too_large", 1),
        (jsonl(*(line(f"{n}") for n in range(50_001))), "too_many_requests", None),
    ],
)
def test_a_file_that_is_wrong_fails_the_batch(
    client: openai.OpenAI, server: RunningServer, content: bytes, code: str, number: int | None
) -> None:
    before = server.spent_and_held()
    batch = ended(client, create(client, content))
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, number)
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert server.spent_and_held() == before


def test_blank_lines_a_byte_order_mark_and_no_last_newline(client: openai.OpenAI) -> None:
    content = b"\xef\xbb\xbf" + jsonl(line("a")) + b"\r\n\n" + jsonl(line("é\u2028b")).rstrip() + b"\n\n"
    batch = ended(client, create(client, content))
    assert rows(client, batch.output_file_id).keys() == {"a", "é\u2028b"}
    batch = ended(client, create(client, jsonl(line("a")).rstrip()))
    assert (batch.status, batch.request_counts.total) == ("completed", 1)


def test_lines_that_fail_are_in_the_error_file(client: openai.OpenAI, server: RunningServer) -> None:
    content = jsonl(
        line("good"),
        line("no model", "gpt-none"),
        line("no field", nonsense=1),
        line("dear", budget="0.0000001"),
        line("half", messages=[{"role": "user", "content": "\ud800"}]),
        line("elsewhere", only="no-such-label"),
    )
    batch = ended(client, create(client, content))
    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 5)
    assert rows(client, batch.output_file_id).keys() == {"good"}
    failed = rows(client, batch.error_file_id)
    found = {
        name: (each["response"]["status_code"], each["response"]["body"]["error"]["code"])
        for name, each in failed.items()
    }
    assert found["no model"] == (404, "model_not_found")
    assert found["no field"][0] == 400
    assert found["dear"] == (402, "budget_exceeded")
    assert found["elsewhere"] == (403, "model_not_allowed")
    assert found["half"][0] == 400
    live = server.ask("gpt-none")
    assert failed["no model"]["response"]["body"] == live.json()
    server.assert_settled()


def test_where_all_lines_fail_there_is_no_output_file(client: openai.OpenAI) -> None:
    batch = ended(client, create(client, jsonl(line("a", "gpt-none"))))
    assert (batch.status, batch.output_file_id) == ("completed", None)
    assert rows(client, batch.error_file_id).keys() == {"a"}


def test_a_provider_that_is_busy_is_asked_again(
    client: openai.OpenAI, server: RunningServer, far: OpenAIServer
) -> None:
    far.script = [(429, {"retry-after": "0"}, "slow down"), (503, {}, "away"), "drop"]
    batch = ended(client, create(client, jsonl(line("a", "far"))))
    (answer,) = rows(client, batch.output_file_id).values()
    assert answer["response"]["body"]["choices"][0]["message"]["content"] == "you said: What is 6 times 7?"
    assert len(far.requests) == 4
    server.assert_settled()
    key = answer["response"]["request_id"].removeprefix("req_")
    posts = [each for each in server.client.ledger.entries() if each.kind == "post" and key in str(each.key)]
    assert len(posts) == 1


def test_a_stream_that_breaks_off_is_not_paid_for_again(
    client: openai.OpenAI, server: RunningServer, far: OpenAIServer
) -> None:
    """What it wrote was charged: a further try would be charged again."""
    far.script = ["break"]
    batch = ended(client, create(client, jsonl(line("a", "far"))))
    (answer,) = rows(client, batch.error_file_id).values()
    assert answer["response"]["status_code"] == 502
    assert len(far.requests) == 1
    server.assert_settled()


def test_pages(client: openai.OpenAI, server: RunningServer) -> None:
    made = [create(client, jsonl(line("a"))) for _ in range(3)]
    for batch in made:
        ended(client, batch)
    first = client.batches.list(limit=2)
    assert [each.id for each in first.data] == [made[2].id, made[1].id]
    assert first.has_more
    everything = [each.id for each in client.batches.list(limit=1)]
    assert everything[:3] == [each.id for each in reversed(made)]
    inputs = [each.input_file_id for each in made]
    oldest_first = [each.id for each in client.files.list(purpose="batch", order="asc", limit=1)]
    assert [each for each in oldest_first if each in inputs] == inputs
    assert {each.purpose for each in client.files.list(purpose="batch_output")} == {"batch_output"}
    for path in (
        "/v1/batches?limit=0",
        "/v1/batches?limit=x",
        "/v1/batches?after=none",
        "/v1/files?order=up",
    ):
        assert server.http.get(path).status_code == 400


def test_what_is_refused(client: openai.OpenAI, server: RunningServer) -> None:
    file = client.files.create(file=("in.jsonl", jsonl(line("a"))), purpose="batch")
    settings: dict[str, Any] = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    for wrong, param in (
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"endpoint": "/v1/images/generations"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"metadata": {"k": "x" * 513}}, "metadata.k"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            client.batches.create(**{**settings, **wrong})
        assert caught.value.status_code in (400, 404)
        assert caught.value.param == param
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("in.jsonl", b"{}"), purpose="fine-tune")
    for name in ("file-none", "..%2Fbatches.db", "."):
        assert server.http.get(f"/v1/files/{name}/content").status_code == 404
    for name in ("batch_none", "x"):
        assert server.http.get(f"/v1/batches/{name}").status_code == 404
        assert server.http.post(f"/v1/batches/{name}/cancel").status_code == 404
    done = ended(client, client.batches.create(**settings))
    with pytest.raises(openai.BadRequestError, match="completed"):
        client.batches.cancel(done.id)
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.batches.create(**{**settings, "input_file_id": done.output_file_id})


def test_uploads_that_are_refused(server: RunningServer) -> None:
    form = {"purpose": "batch"}
    file = {"file": ("a.jsonl", b"{}")}
    page = server.http.post("/v1/files", data=form, files=file, headers={"origin": "https://evil.example"})
    assert page.status_code == 403
    assert server.http.post("/v1/files", data=form).status_code == 400
    assert server.http.post("/v1/files", json=form).status_code == 400
    assert server.http.post("/v1/files", files=file).json()["error"]["param"] == "purpose"
    assert server.http.post("/v1/files", data={**form, "file": "text"}, files={}).status_code == 400
    two = [("file", ("a", b"{}")), ("file", ("b", b"{}"))]
    assert server.http.post("/v1/files", data=form, files=two).status_code == 400
    kind = {"content-type": "multipart/form-data; boundary=x"}
    for content in (
        b"",
        b"--x\r\n",
        b"nonsense",
        b"--x\r\nContent-Disposition: form-data\r\n\r\nq\r\n--x--\r\n",
    ):
        assert server.http.post("/v1/files", content=content, headers=kind).status_code == 400
    for seconds in ("60", "x", "999999999"):
        expires = {**form, "expires_after[anchor]": "created_at", "expires_after[seconds]": seconds}
        assert server.http.post("/v1/files", data=expires, files=file).status_code == 400
    good = {**form, "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    made = server.http.post("/v1/files", data=good, files={"file": ("../../a\nb.jsonl", b"{}")}).json()
    assert made["expires_at"] == made["created_at"] + 3600
    disposition = server.http.get(f"/v1/files/{made['id']}/content").headers["content-disposition"]
    assert "\n" not in disposition


def test_sizes(tmp_path: Path) -> None:
    with serving(tmp_path, file_bytes=1000, bytes_a_key=2500) as server, sdk(server) as client:
        first = client.files.create(file=("a", b"x" * 1000), purpose="batch")
        client.files.create(file=("b", b"x" * 1000), purpose="batch")
        with pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=("c", b"x" * 1001), purpose="batch")
        assert caught.value.status_code == 413
        with pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=("d", b"x" * 1000), purpose="batch")
        assert (caught.value.status_code, caught.value.code) == (413, "storage_full")
        client.files.delete(first.id)
        client.files.create(file=("d", b"x" * 1000), purpose="batch")
        assert len(list((tmp_path / "files").iterdir())) == 2

        def endless() -> Iterator[bytes]:
            yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
            while True:
                yield b"y" * 1000

        kind = {"content-type": "multipart/form-data; boundary=x"}
        try:
            answer = server.http.post("/v1/files", content=endless(), headers=kind)
        except httpx.TransportError:
            pass  # it was cut while it still sent
        else:
            assert answer.status_code == 413
        assert {each.stat().st_mode & 0o077 for each in (tmp_path / "files").iterdir()} == {0}


def test_a_batch_needs_room_for_its_output(tmp_path: Path) -> None:
    """What one that has not ended may write counts as much as its input."""
    content = jsonl(*(line(f"{n}", "slow") for n in range(9)))
    with serving(tmp_path, bytes_a_key=3 * len(content) - 1, concurrency=1) as server, sdk(server) as client:
        first = create(client, content)
        for refused in (
            lambda: client.files.create(file=("b", content), purpose="batch"),
            lambda: client.batches.create(
                input_file_id=first.input_file_id, endpoint=CHAT, completion_window="24h"
            ),
        ):
            with pytest.raises(openai.APIStatusError) as caught:
                refused()
            assert (caught.value.status_code, caught.value.code) == (413, "storage_full")
        client.batches.cancel(first.id)
        ended(client, first)


def test_the_error_file_is_no_longer_than_the_ids_it_repeats(tmp_path: Path) -> None:
    """Characters are not escaped to six or twelve bytes; those that split lines are."""
    names = [f"{n}" + "\N{GRINNING FACE}" * 500 + "\u2028\x85\u2029" for n in range(8)]
    content = b"".join(json.dumps(line(each), ensure_ascii=False).encode() + b"\n" for each in names)
    with serving(tmp_path) as server, sdk(server) as client:
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        asked = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
        made = new_batch("batch_early", parse_batch_request(json.dumps(asked).encode()), int(time.time()))
        made["status"], made["cancelling_at"] = "cancelling", int(time.time())
        assert server.service.files is not None
        server.service.files.add_batch(StoredBatch(made, "@serve", "", "serve", None))
        batch = ended(client, client.batches.retrieve("batch_early"))
        assert list(rows(client, batch.error_file_id)) == names
        assert client.files.retrieve(batch.error_file_id).bytes < 2 * len(content)


def test_a_key_has_so_many_batches_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, concurrency=4) as server, sdk(server) as client:
        made = [create(client, jsonl(line("a", "slow", max_tokens=30))) for _ in range(MAX_RUNNING + 3)]
        for batch in made:
            assert ended(client, batch).status == "completed"
        found = [client.batches.retrieve(each.id) for each in made]
        assert found[-1].in_progress_at is not None
        blocked = [
            create(client, jsonl(*(line(f"{n}", "slow") for n in range(99)))) for _ in range(MAX_RUNNING)
        ]
        waiting = create(client, jsonl(line("a")))
        time.sleep(0.5)
        assert client.batches.retrieve(waiting.id).status == "validating"
        client.batches.cancel(blocked[0].id)
        assert ended(client, waiting).status == "completed"
        for batch in blocked:
            client.batches.cancel(batch.id)
        for batch in blocked:
            assert ended(client, batch).status == "cancelled"


def test_one_keys_files_and_batches_are_invisible_to_another(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        with (
            sdk(server, server.keys.create("alice")[0]) as alice,
            sdk(server, server.keys.create("bob")[0]) as bob,
        ):
            batch = ended(alice, create(alice, jsonl(line("a"))))
            assert len(alice.files.list().data) == 2
            assert bob.files.list().data == []
            assert bob.batches.list().data == []
            for file in (batch.input_file_id, batch.output_file_id):
                for call in (bob.files.retrieve, bob.files.content, bob.files.delete):
                    with pytest.raises(openai.NotFoundError):
                        call(file)
            for retrieve in (bob.batches.retrieve, bob.batches.cancel):
                with pytest.raises(openai.NotFoundError):
                    retrieve(batch.id)
            with pytest.raises(openai.NotFoundError):
                bob.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
            with pytest.raises(openai.BadRequestError):
                list(bob.batches.list(after=batch.id))
            assert rows(alice, batch.output_file_id).keys() == {"a"}
        server.assert_settled()


def test_at_the_cap_of_a_key_lines_fail_and_the_batch_completes(tmp_path: Path) -> None:
    with serving(tmp_path, concurrency=4) as server:
        server.client.ledger.create("team", limit_nanousd=100 * WORD)
        with sdk(server, server.keys.create("alice", scope="team")[0]) as client:
            batch = ended(client, create(client, jsonl(*(line(f"{n}", max_tokens=9) for n in range(30)))))
            assert batch.status == "completed"
            done, failed = rows(client, batch.output_file_id), rows(client, batch.error_file_id)
        assert len(done) + len(failed) == 30
        codes = {each["response"]["body"]["error"]["code"] for each in failed.values()}
        assert codes == {"budget_exceeded"}
        budget = server.client.ledger.budget("team")
        assert budget.posted_nanousd == sum(
            each["response"]["body"]["viaticum"]["cost_nanousd"] for each in done.values()
        )
        # Each line posts 14 words: those that fit have been answered, although four at once held more than
        # there was.
        assert len(done) == 100 // 14 == budget.posted_nanousd // (14 * WORD)
        assert server.spent_and_held() == (0, 0)
        server.assert_settled()


def test_levels_of_a_line(client: openai.OpenAI) -> None:
    """Up to the limit a line is answered as a live request; beyond it the batch fails, and ends."""
    for levels, is_taken in ((248, True), (249, False), (960, False), (975, False), (987, False)):
        deep = jsonl(line("a", metadata="m")).replace(b'"m"', b'{"a": ' * levels + b"1" + b"}" * levels)
        batch = ended(client, create(client, jsonl(line("b")) + deep))
        if is_taken:
            assert batch.request_counts.completed == 1
            assert rows(client, batch.error_file_id)["a"]["response"]["status_code"] == 400
        else:
            assert (batch.status, batch.errors.data[0].line) == ("failed", 2)


def test_what_does_not_fit_beside_others_waits_for_them(tmp_path: Path) -> None:
    """Worst cases of lines that run at once exceed the budget; each alone fits, and so all are answered."""
    with serving(tmp_path, concurrency=8) as server:
        server.client.ledger.create("team", limit_nanousd=1200 * WORD)
        with sdk(server, server.keys.create("alice", scope="team")[0]) as client:
            batch = ended(client, create(client, jsonl(*(line(f"{n}", max_tokens=1000) for n in range(10)))))
            assert (batch.request_counts.completed, batch.request_counts.failed) == (10, 0)


def test_a_line_waits_for_holds_of_others_and_not_for_calls_that_were_lost(tmp_path: Path) -> None:
    """What a sibling holds comes back; what an unknown call holds does not."""
    with serving(tmp_path) as server:
        ledger = server.client.ledger
        ledger.create("team", limit_nanousd=1500 * WORD)
        for name in ("alice", "bob"):
            ledger.create(f"team/{name}", parent="team")
        with sdk(server, server.keys.create("alice", scope="team/alice")[0]) as client:
            for ends in (ledger.void, ledger.abandon):
                key = ends.__name__
                price = Price(WORD * 10**6, WORD * 10**6)
                usage = {"fast": TokenCount(1000, 0)}
                ledger.reserve("team/bob", key, usage, {"fast": price}, dispatch=ends == ledger.abandon)
                batch = create(client, jsonl(line("a", max_tokens=1000)))
                wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress")  # noqa: B023
                time.sleep(0.7)
                assert client.batches.retrieve(batch.id).status == "in_progress"
                ends(key)
                counts = ended(client, batch).request_counts
                assert (counts.completed, counts.failed) == ((1, 0) if ends == ledger.void else (0, 1))


@pytest.mark.parametrize("state", ["unknown", "dispatched", "reserved"])
def test_the_budget_of_a_line_counts_what_it_holds_since_a_kill(tmp_path: Path, state: str) -> None:
    """A call that a kill cut may be charged for: the line has the rest of its budget for a further one."""
    with serving(tmp_path) as server, sdk(server) as client:
        content = jsonl(
            line("a", max_tokens=1000, budget="0.0015"), line("b", max_tokens=1000, budget="0.0015")
        )
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        asked = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
        made = new_batch("batch_early", parse_batch_request(json.dumps(asked).encode()), int(time.time()))
        key = f"chatcmpl-{line_key('batch_early', Line(1, 'a', b''))}-0/1"
        usage, price = {"fast": TokenCount(1000, 0)}, Price(WORD * 10**6, WORD * 10**6)
        ledger = server.client.ledger
        ledger.reserve("serve", key, usage, {"fast": price}, dispatch=state != "reserved")
        if state == "unknown":
            ledger.abandon(key)
        assert server.service.files is not None
        server.service.files.add_batch(StoredBatch(made, "@serve", "", "serve", None))
        batch = ended(client, client.batches.retrieve("batch_early"))
        assert rows(client, batch.output_file_id).keys() == {"b"}
        (failed,) = rows(client, batch.error_file_id).values()
        assert failed["response"]["body"]["error"]["code"] == "budget_exceeded"


def test_cancel_lets_running_lines_end_and_begins_no_other(tmp_path: Path) -> None:
    with serving(tmp_path, concurrency=2) as server, sdk(server) as client:
        batch = create(client, jsonl(*(line(f"{n}", "slow", max_tokens=50) for n in range(20))))
        wait_until(lambda: server.service.limiter.running > 0)
        with pytest.raises(openai.BadRequestError, match="needs this file"):
            client.files.delete(batch.input_file_id)
        cancelled = client.batches.cancel(batch.id)
        assert cancelled.status == "cancelling"
        assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        batch = ended(client, batch)
        assert batch.status == "cancelled"
        assert batch.cancelling_at <= batch.cancelled_at
        done, failed = rows(client, batch.output_file_id), rows(client, batch.error_file_id)
        assert len(done) >= 1
        assert len(done) + len(failed) == 20
        assert {each["error"]["code"] for each in failed.values()} == {"batch_cancelled"}
        assert {each["response"] for each in failed.values()} == {None}
        server.assert_settled()


def test_a_batch_that_is_cancelled_before_it_begins_names_all_its_lines(tmp_path: Path) -> None:
    with serving(tmp_path) as server, sdk(server) as client:
        file = client.files.create(
            file=("in.jsonl", jsonl(*(line(f"{n}") for n in range(3)))), purpose="batch"
        )
        asked = parse_batch_request(
            json.dumps({"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}).encode()
        )
        made = new_batch("batch_early", asked, int(time.time()))
        made["status"], made["cancelling_at"] = "cancelling", int(time.time())
        assert server.service.files is not None
        server.service.files.add_batch(StoredBatch(made, "@serve", "", "serve", None))
        batch = ended(client, client.batches.retrieve("batch_early"))
        assert (batch.status, batch.request_counts.total, batch.request_counts.failed) == ("cancelled", 3, 3)
        failed = rows(client, batch.error_file_id)
        assert {each["error"]["code"] for each in failed.values()} == {"batch_cancelled"}
        assert failed.keys() == {"0", "1", "2"}


def test_a_batch_expires(tmp_path: Path) -> None:
    with serving(tmp_path, concurrency=1) as server, sdk(server) as client:
        content = jsonl(*(line(f"{n}", "slow", max_tokens=50) for n in range(20)))
        batch = ended(client, create(client, content, completion_window="1s"))
        assert batch.status == "expired"
        assert batch.expired_at >= batch.expires_at == batch.created_at + 1
        done, failed = rows(client, batch.output_file_id), rows(client, batch.error_file_id)
        assert len(done) + len(failed) == 20
        assert {each["error"]["code"] for each in failed.values()} == {"batch_expired"}
        counts = batch.request_counts
        assert (counts.completed, counts.failed) == (len(done), len(failed))
        server.assert_settled()


def test_live_requests_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, concurrency=1, queue=8) as server, sdk(server) as client:
        slow: Any = server.client.model("slow")
        go_on = hold_back(slow, monkeypatch)
        batch = create(client, jsonl(*(line(f"{n}", "slow", max_tokens=20) for n in range(30))))
        wait_until(lambda: server.service.limiter.running > 0)
        assert server.service.limiter.queued == 0  # lines are no part of the queue
        asked = [
            threading.Thread(target=server.ask, args=("slow",), kwargs={"max_tokens": 5}) for _ in range(6)
        ]
        for thread in asked:
            thread.start()
        wait_until(lambda: server.service.limiter.queued == 6)
        go_on.set()
        for thread in asked:
            thread.join()
        # Six live requests waited at once: between them no line had a slot.
        limits = [generation.max_new_tokens for _, generation in slow.calls]
        assert limits[:7] == [20, *[5] * 6]
        client.batches.cancel(batch.id)
        assert ended(client, batch).status == "cancelled"


def test_a_revoked_key_spends_nothing_more(tmp_path: Path) -> None:
    with serving(tmp_path, concurrency=1) as server:
        token, _ = server.keys.create("alice")
        server.keys.create("bob")
        with sdk(server, token) as client:
            batch = create(client, jsonl(*(line(f"{n}", "slow", max_tokens=100) for n in range(50))))
        wait_until(lambda: server.service.limiter.running > 0)
        server.keys.revoke("alice")
        files = server.service.files
        assert files is not None
        wait_until(lambda: not files.unfinished())
        found = files.batch(batch.id, "key alice@serve")
        assert found is not None
        assert found["status"] == "failed"
        assert found["errors"] is not None
        assert found["errors"]["data"][0]["code"] == "invalid_api_key"
        assert found["request_counts"]["completed"] < 10
        server.assert_settled()


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.mark.parametrize("waits_for", ["rate", "slot", "budget", "provider"])
def test_lines_that_wait_lose_the_rights_that_their_key_loses(
    tmp_path: Path, far: OpenAIServer, monkeypatch: pytest.MonkeyPatch, waits_for: str
) -> None:
    """What a key may no longer do, its lines do not, whatever they had to wait for."""
    catalogue = Catalogue.load(write_catalogue(tmp_path)).with_models(spec_for(far, max_retries=0))
    with serving(tmp_path, catalogue=catalogue, budget="10", concurrency=1) as server:
        ledger = server.client.ledger
        ledger.create("team", limit_nanousd=1500 * WORD)
        scope = "team" if waits_for == "budget" else None
        token, _ = server.keys.create("alice", per_minute=3 if waits_for == "rate" else None, scope=scope)
        bob, _ = server.keys.create("bob")
        go_on = hold_back(server.client.model("slow"), monkeypatch)
        asked_by_bob = {"headers": bearer(bob), "max_tokens": 5}
        live = threading.Thread(target=server.ask, args=("slow",), kwargs=asked_by_bob)
        if waits_for == "slot":
            live.start()
            wait_until(lambda: server.service.limiter.running > 0)
        far.script = [(503, {"retry-after": "60"}, "away")] * 8
        price = Price(WORD * 10**6, WORD * 10**6)
        ledger.reserve("team", "held", {"fast": TokenCount(1000, 0)}, {"fast": price})
        model = "far" if waits_for == "provider" else "fast"
        with sdk(server, token) as client:
            batch = create(client, jsonl(*(line(f"{n}", model, max_tokens=900) for n in range(4))))
        files = server.service.files
        assert files is not None
        answered = 3 if waits_for == "rate" else 0
        wait_until(lambda: files.unfinished()[0].batch["request_counts"]["completed"] == answered)
        wait_until(lambda: waits_for != "provider" or far.requests)
        time.sleep(1.0)
        asked, posted = len(far.requests), len(ledger.entries())
        server.keys.revoke("alice")
        before = time.monotonic()
        wait_until(lambda: not files.unfinished())
        assert time.monotonic() - before < 20
        found = files.batch(batch.id, f"key alice@{scope or 'serve'}")
        assert found is not None
        assert (found["status"], found["request_counts"]["completed"]) == ("failed", answered)
        assert len(far.requests) == asked
        if waits_for == "slot":
            go_on.set()
            live.join()
        else:
            assert len(ledger.entries()) == posted
        wait_until(lambda: server.service.limiter.running == 0)


@pytest.mark.parametrize("tries", [0, 2], ids=["one try", "three tries"])
@pytest.mark.parametrize("model", ["far", "far+direct"])
def test_a_line_waits_for_its_provider_without_slot_and_hold(
    tmp_path: Path, far: OpenAIServer, model: str, tries: int
) -> None:
    """Meanwhile others have the slot and the money, and then it is answered and paid for once."""
    catalogue = Catalogue.load(write_catalogue(tmp_path)).with_models(spec_for(far, max_retries=tries))
    with serving(tmp_path, catalogue=catalogue, budget="10", concurrency=1) as server:
        far.script = [(429, {"retry-after": "4"}, "slow down")]
        with sdk(server) as client:
            batch = create(client, jsonl(*(line(f"{n}", model) for n in range(3))))
            wait_until(lambda: bool(far.requests))
            assert server.ask("fast", max_tokens=5).status_code == 200
            batch = ended(client, batch)
            answers = rows(client, batch.output_file_id)
        assert {each["response"]["status_code"] for each in answers.values()} == {200}
        assert len(answers) == 3
        assert len(far.requests) == 4
        holds = [hold.state for hold in server.client.ledger.holds() if "far" in hold.usage]
        assert holds.count("posted") == 3
        assert set(holds) == {"posted", "void"}
        server.assert_settled()


def test_a_line_that_waits_for_its_second_choice_keeps_the_first(tmp_path: Path, far: OpenAIServer) -> None:
    """What is paid for is not asked again, and no choice is lost."""
    catalogue = Catalogue.load(write_catalogue(tmp_path)).with_models(spec_for(far))
    with serving(tmp_path, catalogue=catalogue, budget="10", concurrency=1) as server, sdk(server) as client:
        far.script = ["ok", (429, {"retry-after": "2"}, "slow down")]
        batch = ended(client, create(client, jsonl(line("a", "far", n=2))))
        (answer,) = rows(client, batch.output_file_id).values()
        choices = answer["response"]["body"]["choices"]
        assert [each["finish_reason"] for each in choices] == ["stop", "stop"]
        assert {each["message"]["content"] for each in choices} == {"you said: What is 6 times 7?"}
        assert len(far.requests) == 3
        assert [hold.state for hold in server.client.ledger.holds()] == ["posted", "void", "posted"]
        server.assert_settled()


def test_a_line_that_waits_for_its_provider_is_not_sent_once_its_key_is_revoked(
    tmp_path: Path, far: OpenAIServer
) -> None:
    """Its key has one line, so that no other one looks the key up."""
    catalogue = Catalogue.load(write_catalogue(tmp_path)).with_models(spec_for(far))
    with serving(tmp_path, catalogue=catalogue, budget="10", concurrency=1) as server:
        far.script = [(429, {"retry-after": "60"}, "slow down")]
        token, _ = server.keys.create("alice")
        with sdk(server, token) as client:
            batch = create(client, jsonl(line("a", "far")))
        wait_until(lambda: len(far.requests) == 1 and server.service.limiter.running == 0)
        server.keys.revoke("alice")
        files = server.service.files
        assert files is not None
        wait_until(lambda: not files.unfinished())
        found = files.batch(batch.id, "key alice@serve")
        assert found is not None
        assert found["errors"] is not None
        assert found["errors"]["data"][0]["code"] == "invalid_api_key"
        assert len(far.requests) == 1
        assert [hold.state for hold in server.client.ledger.holds()] == ["void"]


def test_a_line_that_waits_for_its_provider_is_not_sent_once_its_budget_is_closed(
    tmp_path: Path, far: OpenAIServer
) -> None:
    catalogue = Catalogue.load(write_catalogue(tmp_path)).with_models(spec_for(far))
    with serving(tmp_path, catalogue=catalogue, budget="10", concurrency=1) as server, sdk(server) as client:
        far.script = [(429, {"retry-after": "60"}, "slow down")]
        batch = create(client, jsonl(line("a", "far")))
        wait_until(lambda: len(far.requests) == 1 and server.service.limiter.running == 0)
        server.client.ledger.pause("serve")
        (answer,) = rows(client, ended(client, batch).error_file_id).values()
        assert answer["response"]["status_code"] == 402
        assert answer["response"]["body"]["error"]["code"] == "budget_closed"
        assert len(far.requests) == 1


def test_a_line_whose_provider_refuses_for_good_has_its_error(
    tmp_path: Path, far: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("viaticum.agents.server.batch_lines.REFUSALS", 2)
    catalogue = Catalogue.load(write_catalogue(tmp_path)).with_models(spec_for(far))
    with serving(tmp_path, catalogue=catalogue, budget="10", concurrency=1) as server, sdk(server) as client:
        far.script = [(429, {"retry-after": "2"}, "slow down")] * 8
        batch = ended(client, create(client, jsonl(line("a", "far"))))
        (answer,) = rows(client, batch.error_file_id).values()
        assert answer["response"]["status_code"] == 429
        assert len(far.requests) == 2
        server.assert_settled()


def test_a_line_that_any_model_may_answer_is_answered_by_another_one(
    tmp_path: Path, far: OpenAIServer
) -> None:
    """It waits for its best model a few times, and no longer."""
    catalogue = Catalogue.load(write_catalogue(tmp_path)).with_models(spec_for(far))
    router = FakeRouter("far+direct", "fast+direct")
    with (
        serving(tmp_path, catalogue=catalogue, router=router, budget="10", concurrency=1) as server,
        sdk(server) as client,
    ):
        far.script = [(429, {"retry-after": "1.5"}, "slow down")] * 20
        batch = ended(client, create(client, jsonl(line("a", "auto"))))
        (answer,) = rows(client, batch.output_file_id).values()
        assert answer["response"]["status_code"] == 200
        assert len(far.requests) == 6
        assert [hold.state for hold in server.client.ledger.holds()] == ["void"] * 4 + ["posted"]
        server.assert_settled()


def test_lines_keep_the_rate_and_the_models_of_their_key(tmp_path: Path) -> None:
    with serving(tmp_path, concurrency=4) as server:
        token, _ = server.keys.create("alice", per_minute=120, models=["fast"])
        with sdk(server, token) as client:
            began = time.monotonic()
            content = jsonl(line("m", "mute"), line("w", nonsense=1), *(line(f"{n}") for n in range(120)))
            batch = ended(client, create(client, content))
            assert time.monotonic() - began >= 1.0  # a burst of 120, then one each half second
            failed = rows(client, batch.error_file_id)
            assert failed["m"]["response"]["status_code"] == 404
            assert batch.request_counts.completed == 120


def test_lines_are_parsed_beside_the_threads_of_live_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines that are slow to parse hold up no live request."""
    names = set[str]()

    def parse(self: ChatCompletions, body: bytes) -> Any:
        names.add(threading.current_thread().name.rpartition("_")[0])
        return original(self, body)

    original = ChatCompletions.parse
    monkeypatch.setattr(ChatCompletions, "parse", parse)
    with serving(tmp_path) as server, sdk(server) as client:
        ended(client, create(client, jsonl(line("a"), line("w", nonsense=1))))
        assert names == {"viaticum-line"}


def test_an_input_file_that_is_gone_fails_the_batch(tmp_path: Path) -> None:
    with serving(tmp_path, concurrency=1) as server, sdk(server) as client:
        file = client.files.create(file=("in.jsonl", jsonl(line("a"))), purpose="batch")
        (tmp_path / "files" / file.id).unlink()
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        batch = ended(client, batch)
        assert (batch.status, batch.errors.data[0].code) == ("failed", "file_not_found")
        with pytest.raises(openai.NotFoundError):
            client.files.content(file.id)


def test_files_expire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as server, sdk(server) as client:
        expires = {"anchor": "created_at", "seconds": 3600}
        batch = ended(client, create(client, jsonl(line("a")), output_expires_after=expires))
        files = server.service.files
        assert files is not None
        later = time.time() + 3601
        monkeypatch.setattr(time, "time", lambda: later)
        with pytest.raises(openai.NotFoundError):
            client.files.content(batch.output_file_id)
        files.delete_expired()
        assert [each.name for each in (tmp_path / "files").iterdir()] == [batch.input_file_id]
        later += 31 * 86_400
        files.delete_expired()
        assert list((tmp_path / "files").iterdir()) == []
        assert client.batches.list().data == []


def test_responses_of_a_key_have_a_cap(tmp_path: Path) -> None:
    def put(store: ResponseStore, id: str, scope: str, size: int) -> None:
        store.put(id, scope, None, [{"role": "user", "content": "x"}], {"id": id, "text": "y" * size})

    with ResponseStore(tmp_path / "responses.db", bytes_a_key=10_000) as store:
        put(store, "other", "bob", 9_000)
        for number in range(20):
            put(store, f"{number}", "alice", 900)
        kept = [each for each in map(str, range(20)) if store.body(each, "alice")]
        assert kept == [f"{number}" for number in range(10, 20)]
        assert store.body("other", "bob") is not None
        put(store, "19", "alice", 900)  # the same again is no other one
        assert store.body("11", "alice") is not None
        assert store.delete("19", "alice")
        put(store, "20", "alice", 900)
        assert store.body("11", "alice") is not None
        put(store, "huge", "alice", 20_000)
        assert store.body("huge", "alice") is None
        assert store.body("20", "alice") is not None  # it drove nothing out
    with ResponseStore(tmp_path / "responses.db", bytes_a_key=3_000) as store:
        put(store, "small", "bob", 100)
        assert store.body("other", "bob") is None
        assert store.body("small", "bob") is not None


def test_responses_that_an_earlier_version_kept_count(tmp_path: Path) -> None:
    with ResponseStore(tmp_path / "responses.db") as store:
        store.put("old", "alice", None, [], {"text": "y" * 5_000})
        for name in ("size_of_new", "size_of_old"):
            store._db.execute(f"DROP TRIGGER {name}")
        store._db.execute("DROP TABLE sizes")
    with ResponseStore(tmp_path / "responses.db", bytes_a_key=6_000) as store:
        store.put("new", "alice", None, [], {"text": "y" * 2_000})
        assert store.body("old", "alice") is None
        assert store.body("new", "alice") is not None
