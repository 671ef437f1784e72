"""The routed workflow on local models against every single pair: accuracy and cost, paired by question.

    viaticum profile QUESTIONS.jsonl --limit 200 --out PAIRS.parquet        # every pair alone, once
    viaticum router fit OTHER_OUTCOMES.parquet --out my-router              # on other questions
    python benchmarks/routed.py QUESTIONS.jsonl --outcomes PAIRS.parquet --router my-router --mean 0.00008

Each question runs through the whole workflow, --concurrency at once, under one budget. The operating point is
the cost weight at which the router expects these questions to cost --mean dollars each, from predictions
alone. Plans that call several pairs are charged for each. Differences are paired by question, with 95%
intervals of a bootstrap. Finished answers are appended to --journal, so that a killed run can go on.
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
from viaticum.routers.query.evaluate import MARGIN, paired_bootstrap
from viaticum.routers.query.rtr import RTRRouter
from viaticum.strategies.answers import is_right
from viaticum.types import Outcome

BOOTSTRAP_SAMPLES = 2_000


def operating_point(router: RTRRouter, questions: list[Question], mean: float) -> float:
    """The cost weight at which these questions are expected to cost `mean` dollars each."""
    prediction = router.predict_texts([question.query.text for question in questions])
    return router.cost_weight_for(prediction, mean * (1 - MARGIN))


def answered(
    questions: list[Question], arguments: argparse.Namespace, cost_weight: float, journal: dict[str, Any]
) -> None:
    """Ask the questions that the journal lacks; each answer is appended to it at once."""
    missing = [question for question in questions if question.id not in journal]
    with (
        tempfile.TemporaryDirectory() as folder,
        Viaticum(
            budget=arguments.budget,
            router=arguments.router,
            policy=Weighted(cost_weight),
            folder=folder,
            concurrency=arguments.concurrency,
            slots=arguments.concurrency,
        ) as client,
        arguments.journal.open("a", encoding="utf-8") as file,
    ):
        began = time.perf_counter()
        for done, (index, answer) in enumerate(client.batch(question.query for question in missing), 1):
            question = missing[index]
            if not isinstance(answer, Answer):
                raise answer
            assert question.gold is not None
            correct = is_right(answer.value, question.accepted, question.query.kind)
            entry = {
                "id": question.id,
                "right": correct,
                "cost": answer.cost,
                "pairs": [str(route.pair) for route in answer.routes],
            }
            journal[question.id] = entry
            file.write(json.dumps(entry) + "\n")
            file.flush()
            rate = (time.perf_counter() - began) / done
            sys.stderr.write(f"\r{len(journal)}/{len(questions)}, {rate:.1f} s each ")
        posted, spent = client.budget().posted_nanousd, sum(journal[q.id]["cost"] for q in missing)
        assert posted == spent, f"the ledger posted {posted}, the answers say {spent}"


def interval(differences: np.ndarray) -> list[float]:
    """Mean and 95% interval, percentile bootstrap over questions."""
    return [*paired_bootstrap(differences, samples=BOOTSTRAP_SAMPLES).values()]


def summary(
    name: str, correct: np.ndarray, cost: np.ndarray, routed: tuple[np.ndarray, np.ndarray] | None
) -> dict[str, Any]:
    """Accuracy and cost, and the routed run minus them."""
    result: dict[str, Any] = {
        "way": name,
        "accuracy": float(correct.mean()),
        "accuracy_95": list(accuracy_interval(int(correct.sum()), len(correct))),
        "cost": float(cost.mean()),
    }
    if routed is not None:
        result["ours_minus"] = interval(routed[0] - correct)
        result["our_cost_minus"] = interval(routed[1] - cost)
    return result


def pairs_alone(outcomes: list[Outcome], ids: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Correct [Q] and nano-dollars [Q] of every pair that was asked all these questions."""
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
        journal = {entry["id"]: entry for entry in map(json.loads, lines)}
    cost_weight = operating_point(RTRRouter.load(arguments.router), questions, arguments.mean)
    answered(questions, arguments, cost_weight, journal)
    ids = [question.id for question in questions]
    correct = np.array([float(journal[each]["right"]) for each in ids])
    cost = np.array([float(journal[each]["cost"]) for each in ids])
    alone = pairs_alone(read_outcomes(arguments.outcomes), ids)
    asked = Counter(pair for each in ids for pair in journal[each]["pairs"])
    results = {
        "questions": len(ids),
        "mean_budget": arguments.mean,
        "worth_of_a_dollar": cost_weight,
        "ways": [
            summary("routed", correct, cost, None),
            *(summary(pair, *results_of_pair, (correct, cost)) for pair, results_of_pair in alone.items()),
        ],
        "calls": dict(asked.most_common()),
        "oracle": float(np.max([correct for correct, _ in alone.values()], axis=0).mean()),
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
        gap = (f"{minus[0]:+.1%}", f"{minus[1]:+.1%} to {minus[2]:+.1%}") if minus else ("", "")
        dollars = format_usd(round(each["cost"])) if each["cost"] < NANOUSD_PER_USD else str(each["cost"])
        table.add_row(each["way"], f"{each['accuracy']:.1%}", f"{low:.0%} to {high:.0%}", dollars, *gap)
    Console(width=120).print(table)
    print(f"calls: {results['calls']}; oracle {results['oracle']:.1%}")


if __name__ == "__main__":
    main()
