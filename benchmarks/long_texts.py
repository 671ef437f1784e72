"""Long prompts and outputs through every way to ask: seconds, memory and bytes stored, by tokens.

    python benchmarks/long_texts.py [--tokens 1000 4000 16000 32000] [--only solve batch ...] [--json]

A question has --tokens words; what is written for it has as many, 15 of 16 in the thought. The words are
drawn from about 20,000 by Zipf's law. Each measurement is a process of its own, warmed up by a short one.

    solve     `Viaticum.solve`, a scripted model; ledger and checkpoints are SQLite files
    provider  the same over a provider on the loopback, in this process, 100 characters a chunk
    stream    `Viaticum.stream`, every event read
    samples   the workflow over self-consistency of five: a checkpoint holds what the last samples wrote
    thread    the graph itself, in one thread with three questions, with checkpoints and history
    batch     20 rows that keep texts, killed in the 11th call and resumed
    report    `viaticum report` of that batch, an HTML page
    server    the server's stream, read byte by byte (which includes the client)
    chat      `ChatViaticum.stream`

    seconds       of a question (report: of the page), at best of --repeat; batch: of the run that was resumed
                  and the one that was killed, by 20
    cpu           seconds of processor time of all threads, likewise
    memory        growth of the resident maximum since the short question, in MB
    ledger, checkpoints, rows   bytes a question in these files after they are closed; rows: journal, cache
                  and results of a batch
    page          bytes of the page, or of what the server sent for a question
    32k/4k        of the last row of a way to that of 4,000 tokens; 8 is linear
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from viaticum import FakeRouter, ScriptedModel, Viaticum
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.models.base import Generation
from viaticum.types import Message

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

SIZES = (1_000, 4_000, 16_000, 32_000)
ROWS, KILLED_IN = 20, 11
CONTEXT = 400_000
FIELDS = ("seconds", "cpu", "memory_mb", "ledger", "checkpoints", "rows", "page")
SPEC = ModelSpec(
    name="scripted",
    description="Says what it is told.",
    kind="scripted",
    context_length=CONTEXT,
    input_price="0.001",  # type: ignore[arg-type]
    output_price="0.001",  # type: ignore[arg-type]
)


@dataclass
class Measurement:
    """Numbers of one way at one size; None where a way has none."""

    way: str
    tokens: int
    seconds: float
    cpu: float
    memory_mb: float
    ledger: int | None = None
    checkpoints: int | None = None
    rows: int | None = None
    page: int | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, tokens = options.one[0], int(options.one[1])
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            print(json.dumps(asdict(WAYS[way](Path(folder), tokens, options.repeat))))
        return
    found = []
    for way in options.only:
        for tokens in options.tokens:
            command = [sys.executable, __file__, "--one", way, str(tokens), "--repeat", str(options.repeat)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(Measurement(**json.loads(done.stdout.splitlines()[-1])))
            print(f"{way} {tokens}: {found[-1].seconds} s", file=sys.stderr)
    growths = {way: growth([each for each in found if each.way == way]) for way in options.only}
    if options.json:
        print(json.dumps({"measurements": [asdict(each) for each in found], "growth": growths}))
        return
    show(found, growths)


def growth(rows: Sequence[Measurement]) -> dict[str, float]:
    """The last of the rows to that of 4,000 tokens."""
    base = next((each for each in rows if each.tokens == 4_000), None)
    if base is None or not rows:
        return {}
    pairs = {name: (getattr(rows[-1], name), getattr(base, name)) for name in FIELDS}
    return {name: round(last / first, 1) for name, (last, first) in pairs.items() if last and first}


def show(rows: Sequence[Measurement], growths: dict[str, dict[str, float]]) -> None:
    table = Table("way", "tokens", "seconds", "cpu", "memory MB", *FIELDS[3:], box=None, pad_edge=False)
    for row in rows:
        sizes = ["-" if (size := getattr(row, name)) is None else f"{size:,}" for name in FIELDS[3:]]
        table.add_row(
            row.way, f"{row.tokens:,}", f"{row.seconds:.3f}", f"{row.cpu:.3f}", f"{row.memory_mb:.1f}", *sizes
        )
        if row.tokens == rows[-1].tokens and (ratios := growths[row.way]):
            table.add_row("", "32k/4k", *(str(ratios.get(name, "-")) for name in FIELDS))
    Console(width=max(110, Console().width)).print(table)


# --- texts ----------------------------------------------------------------------------------------


class Words:
    """Varied words: about 20,000 of them, frequent as in a language."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        syllables = [first + second for first in "bcdfghjklmnprstvwz" for second in "aeiou"]
        lengths = self._random.choices((1, 2, 3, 4), k=30_000)
        self._words = sorted({"".join(self._random.choices(syllables, k=length)) for length in lengths})
        self._random.shuffle(self._words)
        self._weights = [1 / rank for rank in range(1, len(self._words) + 1)]

    def text(self, count: int) -> str:
        return " ".join(self._random.choices(self._words, self._weights, k=count))

    def question(self, tokens: int) -> str:
        return self.text(tokens - 8) + " Seen all this, what is 6 times 7?"

    def thought(self, tokens: int) -> str:
        return self.text(tokens - tokens // 16)

    def answer(self, tokens: int) -> str:
        return self.text(tokens // 16 - 4) + ". The answer is 42."


def scripted(words: Words) -> ScriptedModel:
    """Writes as many words as its limit of tokens, less a margin, anew in each call."""

    def script(messages: Sequence[Message], generation: Generation) -> str:
        tokens = generation.max_new_tokens - 40
        return f"<think>{words.thought(tokens)}</think> {words.answer(tokens)}"

    return ScriptedModel(script, spec=SPEC)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def stored(folder: Path, name: str) -> int:
    """Bytes of the files of a name, an SQLite file's log among them."""
    return sum(path.stat().st_size for path in folder.glob(f"{name}*"))


@dataclass
class Cost:
    """Of a question: the best seconds, the best processor time, and the growth of memory in MB."""

    seconds: float
    cpu: float
    memory_mb: float


def cpu_seconds() -> float:
    """Of this process and of the processes that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def timed(ask: Callable[[], object], repeat: int) -> Cost:
    """What it costs to ask; the memory is that of all repetitions."""
    before, costs = peak_mb(), []
    for _ in range(repeat):
        began, cpu = time.perf_counter(), cpu_seconds()
        ask()
        costs.append((time.perf_counter() - began, cpu_seconds() - cpu))
    seconds, used = map(min, zip(*costs, strict=True))
    return Cost(round(seconds, 4), round(used, 4), round(peak_mb() - before, 1))


def asked(ask: Callable[[str, int], object], words: Words, tokens: int, repeat: int) -> Cost:
    """What a question costs, after a short one."""
    ask(words.question(60), 60)
    questions = iter([words.question(tokens) for _ in range(repeat)])
    return timed(lambda: ask(next(questions), tokens), repeat)


def measured(way: str, folder: Path, tokens: int, asks: int, cost: Cost, **sizes: int) -> Measurement:
    """asks: how many questions of this size were asked."""
    ledger, checkpoints = stored(folder, "ledger.db") // asks, stored(folder, "checkpoints.db") // asks
    return Measurement(way, tokens, **asdict(cost), ledger=ledger, checkpoints=checkpoints, **sizes)


# --- ways to ask ----------------------------------------------------------------------------------


@contextmanager
def client(folder: Path, words: Words, strategy: str = "cot") -> Iterator[Viaticum]:
    models = {"scripted": scripted(words)}
    with Viaticum(100, folder=folder, models=models, router=FakeRouter(f"scripted+{strategy}")) as opened:
        yield opened


def solve(folder: Path, tokens: int, repeat: int, way: str = "solve", strategy: str = "cot") -> Measurement:
    words = Words()
    with client(folder, words, strategy) as opened:

        def ask(question: str, size: int) -> None:
            answer = opened.solve(question, max_tokens=size + 40)
            assert answer.value == "42", answer.reason

        cost = asked(ask, words, tokens, repeat)
    return measured(way, folder, tokens, repeat, cost)


def samples(folder: Path, tokens: int, repeat: int) -> Measurement:
    return solve(folder, tokens, repeat, "samples", "self-consistency:cot:5")


def provider(folder: Path, tokens: int, repeat: int) -> Measurement:
    from openai_server import running_server, spec_for

    words = Words()
    with running_server() as server:
        spec = spec_for(server, thinking=True, context_length=CONTEXT)
        router = FakeRouter("far+cot")
        with Viaticum(100, catalogue=Catalogue([spec]), router=router, folder=folder) as opened:

            def ask(question: str, size: int) -> None:
                server.thought, server.text = words.thought(size), words.answer(size)
                server.requests.clear()
                server.piece = 100
                answer = opened.solve(question, max_tokens=size + 40)
                assert answer.value == "42", answer.reason

            cost = asked(ask, words, tokens, repeat)
    return measured("provider", folder, tokens, repeat, cost)


def stream(folder: Path, tokens: int, repeat: int) -> Measurement:
    words = Words()
    with client(folder, words) as opened:

        def ask(question: str, size: int) -> None:
            assert sum(1 for _ in opened.stream(question, max_tokens=size + 40)) >= size

        cost = asked(ask, words, tokens, repeat)
    return measured("stream", folder, tokens, repeat, cost)


def thread(folder: Path, tokens: int, repeat: int) -> Measurement:
    from viaticum.agents.workflow.state import Allowance
    from viaticum.generation import GenerationSettings

    words, number = Words(), iter(range(100))
    with client(folder, words) as opened:

        def ask(question: str, size: int) -> None:
            config: Any = {"configurable": {"thread_id": f"t{next(number)}"}}
            allowance = Allowance(settings=GenerationSettings.of(max_new_tokens=size + 40))
            for part in range(3):
                asked: Any = {"question": f"{part} {question}"}
                assert opened.graph.invoke(asked, config, context=allowance)["value"] == "42"
            assert len(list(opened.graph.get_state_history(config))) > 9

        cost = asked(ask, words, tokens, repeat)
    return measured(
        "thread", folder, tokens, 3 * repeat, Cost(cost.seconds / 3, cost.cpu / 3, cost.memory_mb)
    )


def server(folder: Path, tokens: int, repeat: int) -> Measurement:
    import httpx
    from viaticum_server import serving

    words, sent = Words(), [0]
    text = f"<think>{words.thought(tokens)}</think> {words.answer(tokens)}"
    spec = SPEC.model_copy(update={"name": "fast", "text": text})
    with serving(folder, catalogue=Catalogue([spec])) as running:

        def ask(question: str, size: int) -> None:
            body = {"model": "fast+cot", "messages": [{"role": "user", "content": question}], "stream": True}
            body["max_tokens"] = tokens + 40
            with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body, timeout=60) as answer:
                assert answer.status_code == 200
                sent[0] = sum(map(len, answer.iter_raw()))

        cost = asked(ask, words, tokens, repeat)
    return measured("server", folder, tokens, repeat, cost, page=sent[0])


def chat(folder: Path, tokens: int, repeat: int) -> Measurement:
    from viaticum import ChatViaticum

    words = Words()
    models: Any = {"scripted": scripted(words)}
    with ChatViaticum(model="scripted", budget="1", models=models, folder=folder) as opened:

        def ask(question: str, size: int) -> None:
            pieces = list(opened.stream(question, max_tokens=size + 40))
            assert "42" in "".join(str(piece.text) for piece in pieces)

        cost = asked(ask, words, tokens, repeat)
    return measured("chat", folder, tokens, repeat, cost)


# --- a job ----------------------------------------------------------------------------------------


def job(folder: Path, tokens: int) -> Cost:
    """A batch that is killed and goes on: what both runs cost, and the memory of the second."""
    from viaticum.agents.batch import run_batch
    from viaticum.generation import GenerationSettings

    words, calls = Words(), iter(range(ROWS + 1))
    with (folder / "in.jsonl").open("w") as file:
        for number in range(ROWS):
            asked = {"id": f"q{number}", "question": words.question(tokens), "answer": "42"}
            file.write(json.dumps(asked) + "\n")
    told = scripted(words)

    def run(model: ScriptedModel, **settings: Any) -> None:
        run_batch(
            folder / "in.jsonl",
            folder / "out.jsonl",
            models={"scripted": model},
            router=FakeRouter("scripted+cot"),
            ledger=folder / "ledger.db",
            keep_texts=True,
            concurrency=2,
            generation=GenerationSettings.of(max_new_tokens=tokens + 40),
            **settings,
        )

    def killed(messages: Sequence[Message], generation: Generation) -> str:
        if next(calls) == KILLED_IN - 1:
            os.kill(os.getpid(), 9)
        return str(told.script(messages, generation))  # type: ignore[operator]

    began, cpu = time.perf_counter(), cpu_seconds()
    if not (process := os.fork()):
        run(ScriptedModel(killed, spec=SPEC), budget=100)
        os._exit(1)
    assert os.waitpid(process, 0)[1] == 9, "the job ended before it was killed"
    before = peak_mb()
    run(told, resume=True)
    return Cost(time.perf_counter() - began, cpu_seconds() - cpu, round(peak_mb() - before, 1))


def batch(folder: Path, tokens: int, repeat: int) -> Measurement:
    cost = job(folder, tokens)
    lines = (folder / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == ["42"] * ROWS
    kept = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    kept -= stored(folder, "ledger.db") + stored(folder, "in.jsonl")
    return Measurement(
        "batch",
        tokens,
        round(cost.seconds / ROWS, 4),
        round(cost.cpu / ROWS, 4),
        cost.memory_mb,
        ledger=stored(folder, "ledger.db") // ROWS,
        rows=kept // ROWS,
    )


def report(folder: Path, tokens: int, repeat: int) -> Measurement:
    from viaticum.reports import build

    for place, size in ((folder / "small", 60), (folder / "large", tokens)):
        place.mkdir()
        if not (process := os.fork()):
            job(place, size)
            os._exit(0)
        assert os.waitpid(process, 0)[1] == 0, "the job failed"

    def make(place: Path) -> None:
        build([place / "out.jsonl"], place / "report.html", force=True)

    make(folder / "small")
    cost = timed(lambda: make(folder / "large"), repeat)
    page = (folder / "large" / "report.html").stat().st_size
    return Measurement("report", tokens, **asdict(cost), page=page)


WAYS: dict[str, Callable[[Path, int, int], Measurement]] = {
    "solve": solve,
    "provider": provider,
    "stream": stream,
    "samples": samples,
    "thread": thread,
    "batch": batch,
    "report": report,
    "server": server,
    "chat": chat,
}


if __name__ == "__main__":
    main()
