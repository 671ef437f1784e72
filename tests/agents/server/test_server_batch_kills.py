"""SIGKILL and SIGTERM of a server that answers a batch: each line is paid for once and answered once."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from openai_server import running_server
from viaticum_server import chat_body, wait_until

from viaticum.agents.server.batch_run import ENDED
from viaticum.budgets import Ledger

SERVER = Path(__file__).resolve().parents[2] / "support" / "batch_server.py"
CHAT = "/v1/chat/completions"


class ServerProcess:
    """A server in a process of its own, with OpenAI's client of it."""

    def __init__(self, process: subprocess.Popen[str], client: openai.OpenAI) -> None:
        self.process, self.client = process, client

    def end(self, number: signal.Signals) -> int:
        """Send a signal and wait; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(120)


@contextmanager
def running(folder: Path, provider: str = "-", dies_at: int = 0) -> Iterator[ServerProcess]:
    command = [sys.executable, str(SERVER), str(folder), provider, str(dies_at)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, "the server did not start"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            try:
                yield ServerProcess(process, client)
            finally:
                process.kill()


def requests(models: list[str], count: int) -> bytes:
    lines = []
    for number in range(count):
        body: dict[str, Any] = chat_body(models[number % len(models)], max_tokens=12)
        lines.append({"custom_id": f"line-{number}", "method": "POST", "url": CHAT, "body": body})
    return "".join(json.dumps(each) + "\n" for each in lines).encode()


def begin(server: ServerProcess, content: bytes) -> str:
    file = server.client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = server.client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    return batch.id


def completed(server: ServerProcess, batch_id: str) -> int:
    counts = server.client.batches.retrieve(batch_id).request_counts
    return 0 if counts is None else counts.completed


def finish(server: ServerProcess, batch_id: str) -> tuple[Any, list[dict[str, Any]]]:
    """Wait for the end of a batch; the batch, and the lines of its two files."""
    wait_until(lambda: server.client.batches.retrieve(batch_id).status in ENDED)
    batch = server.client.batches.retrieve(batch_id)
    files = [each for each in (batch.output_file_id, batch.error_file_id) if each]
    return batch, [
        json.loads(row) for file in files for row in server.client.files.content(file).text.splitlines()
    ]


def check(folder: Path, batch: Any, rows: list[dict[str, Any]], count: int) -> Ledger:
    """Every line is answered once, and at most one call of it is posted; the ledger as it is then."""
    assert batch.status == "completed"
    assert Counter(each["custom_id"] for each in rows) == Counter(f"line-{n}" for n in range(count))
    assert (batch.request_counts.total, batch.request_counts.completed) == (count, count)
    ledger = Ledger(folder / "ledger.db")
    assert ledger.check() == []
    assert {hold.state for hold in ledger.holds()} <= {"posted", "unknown", "void", "expired"}
    posts = Counter(_line_of(each.key) for each in ledger.entries() if each.kind == "post")
    ids = [each["response"]["request_id"].removeprefix("req_") for each in rows]
    assert posts == Counter(ids)
    paid = {each["response"]["body"]["viaticum"]["cost_nanousd"] for each in rows}
    assert min(paid) > 0
    total = sum(each["response"]["body"]["viaticum"]["cost_nanousd"] for each in rows)
    assert ledger.budget("serve").posted_nanousd == total
    return ledger


def _line_of(key: str | None) -> str:
    """The key of the line that a call belongs to."""
    assert key is not None
    return key.removeprefix("chatcmpl-")[:32]


def test_kills_at_random_moments(tmp_path: Path) -> None:
    rng, count = random.Random(24), 120
    content = requests(["fast", "auto", "slow", "fast+cot"], count)
    with running(tmp_path) as server:
        batch_id = begin(server, content)
        time.sleep(0.2)
        server.end(signal.SIGKILL)
    for _ in range(8):
        with running(tmp_path) as server:
            time.sleep(rng.uniform(0.0, 0.5))
            server.end(signal.SIGKILL)
    with running(tmp_path) as server:
        batch, rows = finish(server, batch_id)
        check(tmp_path, batch, rows, count).close()


def test_an_answer_that_was_paid_for_and_lost_is_given_and_not_paid_for_again(tmp_path: Path) -> None:
    count = 24
    with running(tmp_path, dies_at=3) as server:
        batch_id = begin(server, requests(["fast", "auto", "fast+cot"], count))
        assert server.process.wait(120) == -signal.SIGKILL
    with Ledger(tmp_path / "ledger.db") as ledger:
        posted = ledger.budget("serve").posted_nanousd
    output = [each for each in (tmp_path / "files").iterdir() if each.stat().st_size]
    assert posted > 0
    assert sum(len(each.read_text().splitlines()) for each in output) == count + 2
    for dies_at in (1, 1, 2):
        with running(tmp_path, dies_at=dies_at) as server:
            assert server.process.wait(120) == -signal.SIGKILL
    with running(tmp_path) as server:
        batch, rows = finish(server, batch_id)
        check(tmp_path, batch, rows, count).close()


def test_kills_while_a_provider_answers(tmp_path: Path) -> None:
    """A call that was sent and lost may be charged there: it stays held, and the line is asked anew."""
    count = 40
    with running_server() as far:
        far.pause = 0.1
        with running(tmp_path, far.url) as server:
            batch_id = begin(server, requests(["far"], count))
            wait_until(lambda: len(far.requests) > 6)
            server.end(signal.SIGKILL)
        with running(tmp_path, far.url) as server:
            wait_until(lambda: len(far.requests) > 12)
            server.end(signal.SIGKILL)
        far.pause = 0.0
        with running(tmp_path, far.url) as server:
            batch, rows = finish(server, batch_id)
            with check(tmp_path, batch, rows, count) as ledger:
                unknown = ledger.holds(state="unknown")
                assert 0 < len(unknown) <= 8
                assert len(far.requests) <= count + len(unknown)


def test_sigterm_drains_and_the_batch_goes_on(tmp_path: Path) -> None:
    count = 60
    with running(tmp_path) as server:
        batch_id = begin(server, requests(["slow"], count))
        wait_until(lambda: completed(server, batch_id) > 2)
        assert server.end(signal.SIGTERM) == 0
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.budget("serve").held_nanousd == 0  # the lines that ran have ended
    with running(tmp_path) as server:
        batch, rows = finish(server, batch_id)
        check(tmp_path, batch, rows, count).close()


def test_two_servers_of_one_folder_answer_a_batch_once(tmp_path: Path) -> None:
    count = 40
    with running(tmp_path) as one, running(tmp_path) as other:
        batch_id = begin(one, requests(["slow"], count))
        wait_until(lambda: completed(other, batch_id) > 2)
        one.end(signal.SIGKILL)
        batch, rows = finish(other, batch_id)
        check(tmp_path, batch, rows, count).close()


def test_cancel_at_another_server_of_the_folder(tmp_path: Path) -> None:
    count = 1000  # 30 seconds, if it were not cancelled
    with running(tmp_path) as one, running(tmp_path) as other:
        batch_id = begin(one, requests(["slow"], count))
        wait_until(lambda: one.client.batches.retrieve(batch_id).status == "in_progress")
        other.client.batches.cancel(batch_id)
        batch, rows = finish(other, batch_id)
        assert batch.status == "cancelled"
        assert len(rows) == count
