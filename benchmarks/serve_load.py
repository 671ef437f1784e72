"""`viaticum serve` under load: many clients stream at once on the loopback, some vanish in mid-stream, and it
is told to end.

The server is a process of its own over a scripted model, so what is measured is the server and the ledger.
Afterwards nothing may be left over: no place taken, no hold open, and what was spent is the sum of the calls
that were settled.

    python benchmarks/serve_load.py --clients 200 --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from viaticum.budgets import Ledger

WORDS = 120
PAUSE = 0.02  # seconds before each word
LEAVE_AFTER = 15  # pieces
MODELS = ("slow", "slow+cot")


@dataclass
class Visit:
    """What became of one client: served, left, or the status or error it was told."""

    end: str
    first: float = 0.0  # seconds to the first piece
    whole: float = 0.0
    id: str = ""
    cost: int | None = None  # nano-dollars, as the last chunk says


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=64, help="of the server")
    parser.add_argument("--term-after", type=float, help="seconds after which the server is told to end")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        told = run(Path(folder), args.clients, args.concurrency, args.term_after)
    print(json.dumps(told) if args.json else "\n".join(f"{name}: {value}" for name, value in told.items()))
    leaks = (
        told["clients_told_otherwise"]
        or told["leaked_holds"]
        or told["leaked_places"]
        or told["spend_differs_nanousd"]
    )
    sys.exit(bool(leaks or told["exit_code"] or told["ledger_faults"]))


def run(folder: Path, clients: int, concurrency: int, term_after: float | None) -> dict[str, Any]:
    process, url = start(folder, concurrency, queue=clients)
    began = time.perf_counter()
    visits, memory = asyncio.run(visit_all(process, url, clients, term_after))
    seconds = time.perf_counter() - began
    places = None
    if term_after is None:
        places = asyncio.run(settled(url))
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    with Ledger(folder / "ledger.db") as ledger:
        holds, budget = ledger.holds(), ledger.budget("serve")
        posts = {entry.key: entry.nanousd for entry in ledger.entries() if entry.kind == "post"}
        faults = ledger.check()
    paid: Counter[str] = (
        Counter()
    )  # by request: plain chats are held under its id, the workflow's calls tagged with it
    for hold in holds:
        paid[hold.tags.get("thread", hold.key).rpartition("-")[0]] += posts.get(hold.key, 0)
    told = [visit for visit in visits if visit.cost is not None]
    firsts = [visit.first for visit in visits if visit.first]
    wholes = [visit.whole for visit in visits if visit.end == "served"]
    return {
        "clients": clients,
        "concurrency": concurrency,
        "term_after": term_after,
        "ends": dict(Counter(visit.end for visit in visits)),
        "seconds": round(seconds, 2),
        "first_piece_p50": _middle(firsts),
        "whole_p50": _middle(wholes),
        "server_peak_mb": memory,
        "holds": dict(Counter(hold.state for hold in holds)),
        "leaked_holds": sum(hold.state not in ("posted", "void") for hold in holds),
        "leaked_places": places or 0,
        "spent_nanousd": budget.posted_nanousd,
        "settled_calls": len(posts),
        "spend_differs_nanousd": budget.posted_nanousd - sum(posts.values()) + budget.held_nanousd,
        "told_to_clients_nanousd": sum(visit.cost or 0 for visit in told),
        "clients_told_otherwise": sum(visit.cost != paid[visit.id] for visit in told),
        "ledger_faults": len(faults),
        "exit_code": process.returncode,
        "tracebacks": errors.count("Traceback"),
    }


def start(folder: Path, concurrency: int, queue: int) -> tuple[subprocess.Popen[str], str]:
    text = " ".join(f"w{number}" for number in range(WORDS)) + " The answer is 7."
    catalogue = folder / "catalogue.toml"
    catalogue.write_text(
        f'[models.slow]\ndescription = "d"\nkind = "scripted"\ncontext_length = 8192\ninput_price = 1\n'
        f'output_price = 1\npause = {PAUSE}\ntext = "{text}"\n'
    )
    command = [
        sys.executable,
        "-c",
        "from viaticum.cli import main; main()",
        "serve",
        "--port",
        "0",
        "--json",
        "--folder",
        str(folder),
        "--catalogue",
        str(catalogue),
        "--budget",
        "100",
        "--concurrency",
        str(concurrency),
        "--queue",
        str(queue),
        "--grace",
        "2",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())["url"]


async def visit_all(
    process: subprocess.Popen[str], url: str, clients: int, term_after: float | None
) -> tuple[list[Visit], float]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=300, limits=limits) as http:
        tasks = [asyncio.create_task(visit(http, url, number)) for number in range(clients)]
        if term_after is not None:
            await asyncio.sleep(term_after)
            process.send_signal(signal.SIGTERM)
        visits = await asyncio.gather(*tasks)
    return list(visits), _peak_mb(process.pid)


async def visit(http: httpx.AsyncClient, url: str, number: int) -> Visit:
    body = {
        "model": MODELS[number % len(MODELS)],
        "messages": [{"role": "user", "content": f"What is {number} + 1?"}],
        "stream": True,
        "max_tokens": WORDS + 20,
    }
    told, began, seen = Visit("cut"), time.perf_counter(), 0
    try:
        async with http.stream("POST", f"{url}/chat/completions", json=body) as response:
            if response.status_code != 200:
                return Visit(str(response.status_code))
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                seen += 1
                told.first = told.first or time.perf_counter() - began
                if number % 3 == 0 and seen > LEAVE_AFTER:
                    told.end = "left"
                    return told
                event = json.loads(line[6:])
                if "viaticum" in event:
                    told.id, told.cost = event["id"], event["viaticum"]["cost_nanousd"]
                    told.end, told.whole = "served", time.perf_counter() - began
    except httpx.HTTPError as error:
        told.end = type(error).__name__
    return told


async def settled(url: str) -> int:
    """Places still taken, half a minute at most after the last client went."""
    async with httpx.AsyncClient() as http:
        for _ in range(300):
            health = (await http.get(url.removesuffix("/v1") + "/health")).json()
            if not health["in_flight"] and not health["queued"]:
                return 0
            await asyncio.sleep(0.1)
    return int(health["in_flight"])


def _peak_mb(process: int) -> float:
    """Of resident memory; 0 where the process has ended or the system does not say."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return round(int(lines[0].split()[1]) / 1024, 1) if lines else 0.0


def _middle(values: list[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None


if __name__ == "__main__":
    main()
