"""`viaticum serve` under load: concurrent streams on the loopback, a third of the clients leave, SIGTERM.

The server is a process of its own over a scripted model, so the server and the ledger are measured.
Afterwards no slot may be in use and no hold open, and the spend must be the sum of the settled calls.

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
class ClientResult:
    """How one client ended: served, left, or the status or error that it got."""

    end: str
    first: float = 0.0  # seconds to the first piece
    whole: float = 0.0
    id: str = ""
    cost: int | None = None  # nano-dollars, as the last chunk says


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=64, help="of the server")
    parser.add_argument("--term-after", type=float, help="seconds after which the server gets SIGTERM")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(Path(folder), args.clients, args.concurrency, args.term_after)
    print(
        json.dumps(report) if args.json else "\n".join(f"{name}: {value}" for name, value in report.items())
    )
    leaks = (
        report["clients_with_wrong_cost"]
        or report["leaked_holds"]
        or report["leaked_slots"]
        or report["spend_differs_nanousd"]
    )
    sys.exit(bool(leaks or report["exit_code"] or report["ledger_faults"]))


def run(folder: Path, clients: int, concurrency: int, term_after: float | None) -> dict[str, Any]:
    process, url = start(folder, concurrency, queue=clients)
    started = time.perf_counter()
    results, memory = asyncio.run(run_clients(process, url, clients, term_after))
    seconds = time.perf_counter() - started
    slots = None
    if term_after is None:
        slots = asyncio.run(wait_until_idle(url))
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    with Ledger(folder / "ledger.db") as ledger:
        holds, budget = ledger.holds(), ledger.budget("serve")
        posts = {entry.key: entry.nanousd for entry in ledger.entries() if entry.kind == "post"}
        faults = ledger.check()
    # By request: holds of plain chats have its id as key, those of the workflow have it as a tag.
    paid: Counter[str] = Counter()
    for hold in holds:
        paid[hold.tags.get("thread", hold.key).rpartition("-")[0]] += posts.get(hold.key, 0)
    reported = [result for result in results if result.cost is not None]
    firsts = [result.first for result in results if result.first]
    wholes = [result.whole for result in results if result.end == "served"]
    return {
        "clients": clients,
        "concurrency": concurrency,
        "term_after": term_after,
        "ends": dict(Counter(result.end for result in results)),
        "seconds": round(seconds, 2),
        "first_piece_p50": _median(firsts),
        "whole_p50": _median(wholes),
        "server_peak_mb": memory,
        "holds": dict(Counter(hold.state for hold in holds)),
        "leaked_holds": sum(hold.state not in ("posted", "void") for hold in holds),
        "leaked_slots": slots or 0,
        "spent_nanousd": budget.posted_nanousd,
        "settled_calls": len(posts),
        "spend_differs_nanousd": budget.posted_nanousd - sum(posts.values()) + budget.held_nanousd,
        "reported_to_clients_nanousd": sum(result.cost or 0 for result in reported),
        "clients_with_wrong_cost": sum(result.cost != paid[result.id] for result in reported),
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


async def run_clients(
    process: subprocess.Popen[str], url: str, clients: int, term_after: float | None
) -> tuple[list[ClientResult], float]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=300, limits=limits) as http:
        tasks = [asyncio.create_task(run_client(http, url, number)) for number in range(clients)]
        if term_after is not None:
            await asyncio.sleep(term_after)
            process.send_signal(signal.SIGTERM)
        results = await asyncio.gather(*tasks)
    return list(results), _peak_mb(process.pid)


async def run_client(http: httpx.AsyncClient, url: str, number: int) -> ClientResult:
    body = {
        "model": MODELS[number % len(MODELS)],
        "messages": [{"role": "user", "content": f"What is {number} + 1?"}],
        "stream": True,
        "max_tokens": WORDS + 20,
    }
    result, started, seen = ClientResult("cut"), time.perf_counter(), 0
    try:
        async with http.stream("POST", f"{url}/chat/completions", json=body) as response:
            if response.status_code != 200:
                return ClientResult(str(response.status_code))
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                seen += 1
                result.first = result.first or time.perf_counter() - started
                if number % 3 == 0 and seen > LEAVE_AFTER:
                    result.end = "left"
                    return result
                event = json.loads(line[6:])
                if "viaticum" in event:
                    result.id, result.cost = event["id"], event["viaticum"]["cost_nanousd"]
                    result.end, result.whole = "served", time.perf_counter() - started
    except httpx.HTTPError as error:
        result.end = type(error).__name__
    return result


async def wait_until_idle(url: str) -> int:
    """Wait up to 30 s after the last client. Returns the slots still in use."""
    async with httpx.AsyncClient() as http:
        for _ in range(300):
            health = (await http.get(url.removesuffix("/v1") + "/health")).json()
            if not health["in_flight"] and not health["queued"]:
                return 0
            await asyncio.sleep(0.1)
    return int(health["in_flight"])


def _peak_mb(process: int) -> float:
    """Peak resident memory in MB; 0 where the process has ended or the system does not report it."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return round(int(lines[0].split()[1]) / 1024, 1) if lines else 0.0


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None


if __name__ == "__main__":
    main()
