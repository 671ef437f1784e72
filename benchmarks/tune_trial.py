"""`viaticum tune` as a new user meets it: two API models, a CSV of 300 questions, a dollar, and two kills.

The models are stubs on a loopback port, reached as any API model is. The cheap one is right on sums and dates
alone, the dear one, ten times its price, on capitals too; 5% of each one's right answers, drawn by the
question, are wrong. `viaticum tune` is killed (SIGKILL) twice on the way and run again; then 300 other
questions go through `viaticum batch` three times: routed, and with either model alone. Printed are the
commands, what they print, how often each call was made and paid for, and accuracy and cost with differences
paired by question (percentile bootstrap, 95%).

What is asked is synthetic and easy to route: it shows that the parts work together, not what routing is worth
on real questions (`benchmarks/tune.py` measures that).

    viaticum models pull all-minilm-l6-v2
    python benchmarks/tune_trial.py [--folder DIR] [--encoder NAME]
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from viaticum.budgets import Ledger
from viaticum.outcomes import accuracy_interval
from viaticum.routers.query.evaluate import paired_bootstrap

COUNT, KILLS = 300, (80, 220)  # questions; requests after which the process is killed
SECONDS = 0.03  # of a call
WRONG = 0.05
CAPITALS = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Peru": "Lima",
    "Norway": "Oslo",
    "Egypt": "Cairo",
    "Chile": "Santiago",
    "Greece": "Athens",
    "Cuba": "Havana",
    "Ghana": "Accra",
}
PLACES = ("on a stamp", "in a school atlas", "on an old globe", "in a quiz show", "on a train ticket")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
CHEAP, DEAR = "stub-cheap", "stub-dear"
CATALOGUE = """[models.{name}]
description = "A stub on this machine."
kind = "remote"
context_length = 8000
litellm_model = "openai/stub-{name}"
api_base = "http://127.0.0.1:{port}/v1"
api_key_env = "STUB_KEY"
input_price = {price}
output_price = {price}
"""


def question(number: int, rng: random.Random) -> tuple[str, str, str]:
    """Kind, text and answer."""
    if number % 3 == 0:
        first, second = rng.randint(10, 999), rng.randint(10, 999)
        things = rng.choice(("apples", "coins", "shells", "marbles", "stamps"))
        return (
            "sum",
            f"Ann has {first} {things} and finds {second} more. How many {things} now?",
            str(first + second),
        )
    if number % 3 == 1:
        day, later = rng.randrange(7), rng.randint(2, 90)
        return (
            "day",
            f"Today is {DAYS[day]}. Which weekday is it {later} days later?",
            DAYS[(day + later) % 7],
        )
    country = rng.choice(list(CAPITALS))
    text = f"Seen {rng.choice(PLACES)} number {rng.randint(1, 9999)}: what is the capital city of {country}?"
    return "capital", text, CAPITALS[country]


def write_questions(path: Path, seed: int, known: dict[str, tuple[str, str]]) -> None:
    """Different questions; their kinds and answers are noted for the stubs."""
    rng, rows = random.Random(seed), []
    while len(rows) < COUNT:
        kind, text, answer = question(len(rows), rng)
        if text not in known:
            known[text] = kind, answer
            rows.append((f"{path.stem}-{len(rows)}", text, answer, kind))
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "question", "answer", "topic"), *rows])


class Stub(ThreadingHTTPServer):
    """Both models. asked: (model, question) of each request, in their order."""

    daemon_threads = True

    def __init__(self, known: dict[str, tuple[str, str]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.known = known
        self.asked: list[tuple[str, str]] = []

    def answer(self, model: str, prompt: str) -> str:
        text = next(each for each in self.known if each in prompt)
        self.asked.append((model, text))
        kind, right = self.known[text]
        unlucky = hashlib.sha256(f"{model} {text}".encode()).digest()[0] < 256 * WRONG
        if unlucky or (kind == "capital" and model == CHEAP):
            return "The answer is 0."
        return f"The answer is {right}."


class Handler(BaseHTTPRequestHandler):
    """OpenAI's chat API, streamed, as far as it is used here."""

    server: Stub

    def do_POST(self) -> None:
        if not (received := self.rfile.read(int(self.headers["Content-Length"]))):
            return  # of a process that was killed
        body = json.loads(received)
        text = self.server.answer(body["model"], str(body["messages"][-1]["content"]))
        time.sleep(SECONDS)
        words = sum(len(str(each["content"]).split()) for each in body["messages"])
        usage = {"prompt_tokens": words, "completion_tokens": 4, "total_tokens": words + 4}
        chunk: dict[str, Any] = {
            "id": "1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": body["model"],
        }
        start = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}
        end = {"index": 0, "delta": {}, "finish_reason": "stop"}
        events = [{"choices": [start]}, {"choices": [end]}, {"choices": [], "usage": usage}]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in events:
            self.wfile.write(f"data: {json.dumps(chunk | event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


def command(*arguments: str) -> list[str]:
    print(f"\n$ viaticum {shlex.join(arguments)}", flush=True)
    return [sys.executable, "-c", "from viaticum.cli import main; main()", *arguments]


def run(folder: Path, *arguments: str) -> None:
    done = subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, check=False)
    print(done.stdout.rstrip())
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: {done.stderr}")


def kill_after(requests: int, stub: Stub, folder: Path, *arguments: str) -> None:
    with subprocess.Popen(
        command(*arguments), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while len(stub.asked) < requests and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    print(f"killed after {len(stub.asked)} requests", flush=True)


def show_calls(folder: Path, stub: Stub) -> None:
    """How often the calls of the tuning were made and paid for."""
    with Ledger(folder / "ledger.db") as ledger:
        scope = json.loads((folder / "my-router.job" / "tune.json").read_text())["budget"]
        keys = [entry.key for entry in ledger.entries(scope) if entry.kind == "post" and entry.nanousd]
        wrong = ledger.check()
    again = sum(count - 1 for count in Counter(stub.asked).values())
    print(
        f"\ncalls: {len(stub.asked)} requests came to the stubs for {len(set(stub.asked))} different calls; "
        f"{again} ran when the process was killed and were made again\n"
        f"ledger: {len(keys)} calls paid for, {len(keys) - len(set(keys))} of them twice; "
        f"{len(wrong)} contradictions"
    )


def compare(folder: Path) -> None:
    """Accuracy and cost of the three batches, and the routed one against the others."""
    rows = {}
    for name in ("routed", "cheap", "dear"):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found = sorted((json.loads(line) for line in lines), key=lambda each: str(each["id"]))
        right = np.array([bool(each["correct"]) for each in found], dtype=float)
        cost = np.array([each["cost_nanousd"] for each in found], dtype=float) / 1e9
        rows[name] = right, cost
        low, high = accuracy_interval(int(right.sum()), len(right))
        asked = Counter(each["pair"] for each in found)
        print(
            f"{name:<8}{right.mean():.1%} [{low:.1%}, {high:.1%}] right, ${cost.mean():.7f} a question  "
            f"{dict(asked.most_common())}"
        )
    for name in ("cheap", "dear"):
        gain = paired_bootstrap(rows["routed"][0] - rows[name][0])
        saved = paired_bootstrap(rows["routed"][1] - rows[name][1])
        points = "{difference:+.1f} [{low:+.1f}, {high:+.1f}] points".format(
            **{key: 100 * float(value) for key, value in gain.items()}
        )
        dollars = "{difference:+.7f} [{low:+.7f}, {high:+.7f}] $ a question".format(**saved)
        print(f"routed minus {name}: {points}, {dollars}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="an empty one to keep; by default a temporary one")
    parser.add_argument("--encoder", default="all-minilm-l6-v2")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(exist_ok=True)
        known: dict[str, tuple[str, str]] = {}
        write_questions(folder / "questions.csv", 0, known)
        write_questions(folder / "others.csv", 1, known)
        stub = Stub(known)
        threading.Thread(target=stub.serve_forever, daemon=True).start()
        os.environ["STUB_KEY"] = "none"
        entries = [
            CATALOGUE.format(name=name, port=stub.server_port, price=price)
            for name, price in (("cheap", 0.1), ("dear", 1.0))
        ]
        (folder / "catalogue.toml").write_text("\n".join(entries), encoding="utf-8")
        common = ["--catalogue", "catalogue.toml", "--ledger", "ledger.db"]
        tune = ["tune", "questions.csv", "--budget", "1", "--models", "cheap,dear", "--out", "my-router"]
        tune += ["--strategies", "direct", "--encoder", arguments.encoder, *common]
        for requests in KILLS:
            kill_after(requests, stub, folder, *tune)
        run(folder, *tune)
        show_calls(folder, stub)
        batch = ["batch", "others.csv", "--budget", "1", *common]
        run(folder, *batch, "--out", "routed.jsonl", "--router", "my-router", "--policy", "within")
        for name in ("cheap", "dear"):
            run(folder, *batch, "--out", f"{name}.jsonl", "--model", name, "--strategy", "direct")
        print()
        compare(folder)
        stub.shutdown()


if __name__ == "__main__":
    main()
