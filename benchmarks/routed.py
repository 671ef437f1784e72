"""The routed workflow on local models against every single pair, on the same questions: accuracy and cost, paired.

    viaticum profile QUESTIONS.jsonl --limit 200 --out PAIRS.parquet        # every pair alone, once
    viaticum router fit OTHER_OUTCOMES.parquet --out my-router              # on other questions
    python benchmarks/routed.py QUESTIONS.jsonl --outcomes PAIRS.parquet --router my-router --mean 0.00008 --limit 200

Each question runs through the whole workflow (route, reserve, generate, settle, read, check), --concurrency at once,
under one budget. The operating point is a worth of a dollar, at which the router expects these questions to cost
--mean dollars each; it knows no answer. Plans that ask several pairs are charged for each. Differences are paired by
question, with 95% intervals of a bootstrap. Finished answers go to --journal, so that a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from viaticum import Answer, Viaticum
from viaticum.money import NANOUSD_PER_USD, format_usd
from viaticum.outcomes import accuracy_interval, read_outcomes
from viaticum.questions import Question, read_questions
from viaticum.routers.query import Weighted
from viaticum.routers.query.evaluate import MARGIN
from viaticum.routers.query.rtr import RTRRouter
from viaticum.strategies import equivalent
from viaticum.types import Outcome

DRAWS = 2_000


def operating_point(router: RTRRouter, questions: list[Question], mean: float) -> float:
    """The worth of a dollar at which these questions are expected to cost `mean` dollars each."""
    told = router.predict_texts([question.query.text for question in questions])
    return router.worth_of(told, mean * (1 - MARGIN))


def answered(
    questions: list[Question], arguments: argparse.Namespace, worth: float, journal: dict[str, Any]
) -> None:
    """Ask what the journal does not have yet; each answer is written to it as it comes."""
    left = [question for question in questions if question.id not in journal]
    with (
        tempfile.TemporaryDirectory() as folder,
        Viaticum(
            budget=arguments.budget,
            router=arguments.router,
            policy=Weighted(worth),
            folder=folder,
            concurrency=arguments.concurrency,
            slots=arguments.concurrency,
        ) as client,
        arguments.journal.open("a", encoding="utf-8") as file,
    ):
        began = time.perf_counter()
        for done, (place, answer) in enumerate(client.batch(question.query for question in left), 1):
            question = left[place]
            if not isinstance(answer, Answer):
                raise answer
            assert question.gold is not None
            right = answer.value is not None and equivalent(answer.value, question.gold, question.query.kind)
            told = {
                "id": question.id,
                "right": right,
                "cost": answer.cost,
                "pairs": [str(route.pair) for route in answer.routes],
            }
            journal[question.id] = told
            file.write(json.dumps(told) + "\n")
            file.flush()
            rate = (time.perf_counter() - began) / done
            sys.stderr.write(f"\r{len(journal)}/{len(questions)}, {rate:.1f} s each ")
        posted, spent = client.budget().posted_nanousd, sum(journal[q.id]["cost"] for q in left)
        assert posted == spent, f"the ledger posted {posted}, the answers say {spent}"


def interval(differences: np.ndarray) -> list[float]:
    """Mean and 95% interval, percentile bootstrap over questions."""
    drawn = np.random.default_rng(0).integers(0, len(differences), (DRAWS, len(differences)))
    low, high = np.quantile(differences[drawn].mean(1), (0.025, 0.975))
    return [float(differences.mean()), float(low), float(high)]


def line(name: str, right: np.ndarray, cost: np.ndarray, ours: tuple[np.ndarray, np.ndarray] | None) -> dict:
    found: dict[str, Any] = {
        "way": name,
        "accuracy": float(right.mean()),
        "accuracy_95": list(accuracy_interval(int(right.sum()), len(right))),
        "cost": float(cost.mean()),
    }
    if ours is not None:
        found["ours_minus"] = interval(ours[0] - right)
        found["our_cost_minus"] = interval(ours[1] - cost)
    return found


def pairs_alone(outcomes: list[Outcome], ids: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Right [Q] and nano-dollars [Q] of every pair that was asked all these questions."""
    by_pair: dict[str, dict[str, Outcome]] = {}
    for outcome in outcomes:
        by_pair.setdefault(str(outcome.pair), {})[outcome.question_id] = outcome
    return {
        pair: (
            np.array([float(rows[each].correct) for each in ids]),
            np.array([float(rows[each].cost_nanousd or 0) for each in ids]),
        )
        for pair, rows in by_pair.items()
        if set(ids) <= set(rows)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", type=Path)
    parser.add_argument("--outcomes", type=Path, required=True, help="every pair on these questions")
    parser.add_argument("--router", type=Path, required=True, help="the folder of a fitted router")
    parser.add_argument("--mean", type=float, required=True, help="dollars a question, expected")
    parser.add_argument("--budget", default="1", help="dollars for all of them, at most (default 1)")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--journal", type=Path, default=Path("routed.jsonl"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    questions = read_questions(arguments.questions, limit=arguments.limit)
    journal: dict[str, Any] = {}
    if arguments.journal.exists():
        lines = arguments.journal.read_text(encoding="utf-8").splitlines()
        journal = {told["id"]: told for told in map(json.loads, lines)}
    worth = operating_point(RTRRouter.load(arguments.router), questions, arguments.mean)
    answered(questions, arguments, worth, journal)
    ids = [question.id for question in questions]
    right = np.array([float(journal[each]["right"]) for each in ids])
    cost = np.array([float(journal[each]["cost"]) for each in ids])
    alone = pairs_alone(read_outcomes(arguments.outcomes), ids)
    asked = Counter(pair for each in ids for pair in journal[each]["pairs"])
    results = {
        "questions": len(ids),
        "mean_budget": arguments.mean,
        "worth_of_a_dollar": worth,
        "ways": [
            line("routed", right, cost, None),
            *(line(pair, *played, (right, cost)) for pair, played in alone.items()),
        ],
        "calls": dict(asked.most_common()),
        "oracle": float(np.max([played[0] for played in alone.values()], axis=0).mean()),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "concurrency": arguments.concurrency,
    }
    sys.stderr.write("\n")
    if arguments.json:
        print(json.dumps(results))
        return
    table = Table("way", "right", "95%", "cost a question", "routed minus it", "95%", box=None)
    for each in results["ways"]:
        low, high = each["accuracy_95"]
        minus = each.get("ours_minus")
        told = (f"{minus[0]:+.1%}", f"{minus[1]:+.1%} to {minus[2]:+.1%}") if minus else ("", "")
        dollars = format_usd(round(each["cost"])) if each["cost"] < NANOUSD_PER_USD else str(each["cost"])
        table.add_row(each["way"], f"{each['accuracy']:.1%}", f"{low:.0%} to {high:.0%}", dollars, *told)
    Console(width=120).print(table)
    print(f"calls: {results['calls']}; oracle {results['oracle']:.1%}")


if __name__ == "__main__":
    main()
