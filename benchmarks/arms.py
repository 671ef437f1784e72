"""Fixed pairs against the routed workflow on the same questions: accuracy, tokens, cost, seconds, one stream.

    python benchmarks/arms.py QUESTIONS.jsonl --limit 30

Every arm is the whole workflow (route, reserve, generate, settle, read); a fixed pair is a routing table of
one row. Without a file it runs the demo's own questions. Finished answers go to --journal, so that a run that
was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from viaticum import Pair, Viaticum
from viaticum.money import format_usd
from viaticum.outcomes import accuracy_interval
from viaticum.questions import Question, read_questions
from viaticum.routers.query import QueryRouter, StaticRouter
from viaticum.strategies.answers import is_right
from viaticum.types import RoutingTable, Row

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from demo import OWN_QUESTIONS

SMALL, LARGE, BOTH = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "qwen2.5-coder-r-stitch"


def only(model: str, strategy: str) -> QueryRouter:
    """A router with one pair, whose estimates are never used."""
    return StaticRouter(RoutingTable((Row(Pair(model, strategy), 0.5, 0, 0, 0, 0),)))


ARMS: dict[str, Callable[[], QueryRouter]] = {
    "0.5B cot": lambda: only(SMALL, "cot"),
    "1.5B cot": lambda: only(LARGE, "cot"),
    "R-Stitch cot": lambda: only(BOTH, "cot"),
    "routed": StaticRouter.default,
}


@dataclass
class Result:
    """One answer: right or not, output tokens by model, nano-dollars, seconds, and the pairs that ran."""

    right: bool
    made: dict[str, int]
    cost: int
    seconds: float
    pairs: list[str]


def ask(client: Viaticum, question: Question) -> Result:
    answer = client.solve(question.query.text, kind="number")
    return Result(
        right=is_right(answer.value, question.accepted, "number"),
        made={name: count.output_tokens for name, count in answer.usage.models.items()},
        cost=answer.cost,
        seconds=answer.seconds,
        pairs=[str(route.pair) for route in answer.routes],
    )


def run(questions: list[Question], arms: list[str], journal: Path | None) -> dict[str, list[Result]]:
    done: dict[tuple[str, str], Result] = {}
    if journal is not None and journal.exists():
        for line in journal.read_text().splitlines():
            row: dict[str, Any] = json.loads(line)
            done[row.pop("arm"), row.pop("id")] = Result(**row)
    for arm in arms:
        todo = [question for question in questions if (arm, question.id) not in done]
        if not todo:
            continue
        with (
            tempfile.TemporaryDirectory() as folder,
            Viaticum("1", router=ARMS[arm](), folder=folder) as client,
        ):
            client.solve("What is 1 + 1?", kind="number")  # loads the weights and reads the examples
            for question in todo:
                result = done[arm, question.id] = ask(client, question)
                sys.stderr.write(
                    f"{arm} {question.id} {'right' if result.right else 'wrong'} {result.seconds:.1f} s\n"
                )
                if journal is not None:
                    with journal.open("a") as file:
                        file.write(json.dumps({"arm": arm, "id": question.id} | vars(result)) + "\n")
    return {arm: [done[arm, question.id] for question in questions] for arm in arms}


def show(results: dict[str, list[Result]]) -> None:
    table = Table(
        "arm",
        "right",
        "95% interval",
        "0.5B tokens",
        "1.5B tokens",
        "cost",
        "s a question",
        "s in all",
        box=None,
    )
    for arm, rows in results.items():
        right = sum(row.right for row in rows)
        low, high = accuracy_interval(right, len(rows))
        table.add_row(
            arm,
            f"{right}/{len(rows)} {right / len(rows):.0%}",
            f"{low:.0%} to {high:.0%}",
            str(sum(row.made.get(SMALL, 0) for row in rows)),
            str(sum(row.made.get(LARGE, 0) for row in rows)),
            format_usd(sum(row.cost for row in rows)),
            f"{statistics.median(row.seconds for row in rows):.1f}",
            f"{sum(row.seconds for row in rows):.0f}",
        )
    Console(width=120).print(table)
    for arm, rows in results.items():
        pairs = [pair for row in rows for pair in row.pairs]
        print(f"{arm}: " + ", ".join(f"{pair} x{pairs.count(pair)}" for pair in sorted(set(pairs))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="?", type=Path)
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--arm", action="append", choices=list(ARMS))
    parser.add_argument("--journal", type=Path)
    options = parser.parse_args()
    questions = read_questions(options.questions, limit=options.limit) if options.questions else OWN_QUESTIONS
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, bfloat16, {len(questions)} "
        "questions, greedy, one stream, weights loaded before"
    )
    show(run(questions, options.arm or list(ARMS), options.journal))


if __name__ == "__main__":
    main()
