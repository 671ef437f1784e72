"""Accuracy against speed of the ways in which a small and a large model write a text together, on questions with answers.

The 1.5B and the 0.5B model of the catalogue, cot, greedy: the large model alone, with drafts of the small one
(speculative), the small one alone, and R-Stitch with thresholds on entropy from one that calls the large model for
nearly everything to one that hardly does. Many questions are written at once, for this asks what is written; the
tokens a second of one stream are what the cost model expects of the hand-overs and accepted drafts that were seen
(`--costs`: what `viaticum models measure` kept; without it there is no such column). Prints for each way its
accuracy with a 95% Wilson interval, and marks those that no other beats in both accuracy and expected seconds a
question.

    viaticum models pull && viaticum models measure qwen2.5-coder-r-stitch
    python benchmarks/pareto.py QUESTIONS.jsonl --limit 100 --journal pareto.jsonl [--json]

Finished answers go to --journal, so that a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from viaticum.agents.local import stop_ids
from viaticum.agents.questions import Question, read_questions
from viaticum.agents.ways import known_costs
from viaticum.catalogue import Catalogue
from viaticum.decoders import MixedDecoder, Request, Result, Runner, Stats
from viaticum.decoders.cost import CostModel, Habits, Way
from viaticum.errors import DataError, ModelError
from viaticum.outcomes import accuracy_interval
from viaticum.routers.token import AlwaysLarge, Entropy
from viaticum.strategies import equivalent
from viaticum.strategies import get as get_strategy
from viaticum.types import Completion, Usage
from viaticum.weights import locate

SMALL, LARGE, PAIR = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "qwen2.5-coder-r-stitch"
TAUS = (0.01, 0.03, 0.06, 0.12, 0.25)
DRAFT = 3
COT = get_strategy("cot")


@dataclass(frozen=True)
class Arm:
    """A way to write, under the name that the journal has. tau: of R-Stitch, where it is routed."""

    name: str
    way: Way | None  # None: the small model alone
    tau: float | None = None


ARMS = (
    Arm("large", Way(False)),
    Arm("speculative", Way(False, DRAFT)),
    *(Arm(f"r-stitch {tau:g}", Way(True), tau) for tau in TAUS),
    Arm("small", None),
)


@dataclass(frozen=True)
class Done:
    """One question answered: whether rightly, and what the pair did for it."""

    arm: str
    question: str
    right: bool
    tokens: int
    large: int
    finish: str
    counts: dict[str, int]  # of the whole batch that it was written in: see `Stats`
    batch: int


class Pair:
    """The two models, loaded once."""

    def __init__(self, slots: int) -> None:
        folders = [locate(Catalogue.load()[name]) for name in (SMALL, LARGE)]
        self.tokenizer = AutoTokenizer.from_pretrained(folders[-1], local_files_only=True)
        self.small, self.large = (Runner.load(folder, slots=slots, context=1536) for folder in folders)

    def decoder(self, arm: Arm) -> MixedDecoder:
        large = self.large if arm.way else self.small
        both = arm.way is not None and (arm.way.routed or arm.way.draft > 0)
        return MixedDecoder(
            large,
            self.small if both else None,
            tokenizer=self.tokenizer,
            router=Entropy(arm.tau) if arm.tau is not None else AlwaysLarge(),
            stop_ids=stop_ids(large, self.tokenizer),
            draft=arm.way.draft if arm.way else 0,
        )

    def write(self, decoder: MixedDecoder, questions: Sequence[Question]) -> list[Result]:
        requests = [
            Request(
                self.tokenizer.apply_chat_template(
                    COT.messages(question.query), add_generation_prompt=True, return_dict=False
                ),
                max_new_tokens=COT.max_new_tokens,
                stop=COT.stop,
            )
            for question in questions
        ]
        return decoder.write_all(requests)


def answers(
    pair: Pair, arm: Arm, questions: Sequence[Question], slots: int, first_batch: int
) -> Iterator[Done]:
    decoder = pair.decoder(arm)
    for batch, at in enumerate(range(0, len(questions), slots), first_batch):
        asked = questions[at : at + slots]
        decoder.stats = Stats()
        for question, result in zip(asked, pair.write(decoder, asked), strict=True):
            if result.error is not None:
                raise ModelError(f"{arm.name}, question {question.id}: {result.error}")
            read = COT.read(
                Completion(result.text, Usage(result.usage, 0.0), result.finish_reason), question.query
            )
            stats = decoder.stats
            yield Done(
                arm.name,
                question.id,
                equivalent(read.value, question.gold, "number"),
                len(result.trace.made_by),
                sum(result.trace.made_by),
                result.finish_reason,
                {
                    "proposed": stats.proposed,
                    "dropped": stats.dropped,
                    "drafted": stats.drafted,
                    "accepted": stats.accepted,
                    "large_tokens": stats.large_tokens,
                    "large_rows": stats.large.rows,
                },
                batch,
            )


def run(questions: list[Question], arms: Sequence[Arm], slots: int, journal: Path) -> list[Done]:
    done: list[Done] = []
    if journal.exists():
        done = [Done(**json.loads(line)) for line in journal.read_text(encoding="utf-8").splitlines()]
    wanted = {question.id for question in questions}
    done = [each for each in done if each.question in wanted]
    pair: Pair | None = None
    with journal.open("a", encoding="utf-8") as file:
        for arm in arms:
            mine = {each.question for each in done if each.arm == arm.name}
            left = [question for question in questions if question.id not in mine]
            if not left:
                continue
            pair = pair or Pair(slots)
            batch = 1 + max((each.batch for each in done if each.arm == arm.name), default=-1)
            for each in answers(pair, arm, left, slots, batch):
                file.write(json.dumps(vars(each)) + "\n")
                file.flush()
                os.fsync(file.fileno())
                done.append(each)
                mine.add(each.question)
                sys.stderr.write(f"\r{arm.name}: {len(mine)} of {len(questions)} ")
            sys.stderr.write("\n")
    return done


def habits(rows: Sequence[Done]) -> Habits:
    """How the models handed over, from the sums of all batches."""
    batches = {each.batch: each.counts for each in rows}.values()
    total = {name: sum(counts[name] for counts in batches) for name in next(iter(batches))}
    stats = Stats()
    stats.proposed, stats.dropped = total["proposed"], total["dropped"]
    stats.drafted, stats.accepted = total["drafted"], total["accepted"]
    stats.large_tokens, stats.large.rows = total["large_tokens"], total["large_rows"]
    return Habits.seen(stats)


def table(done: Sequence[Done], arms: Sequence[Arm], costs: CostModel | None) -> list[dict[str, Any]]:
    found = []
    for arm in arms:
        rows = [each for each in done if each.arm == arm.name]
        if not rows:
            continue
        right = sum(each.right for each in rows)
        low, high = accuracy_interval(right, len(rows))
        tokens = sum(each.tokens for each in rows)
        line: dict[str, Any] = {
            "way": arm.name,
            "right": right,
            "questions": len(rows),
            "accuracy": round(right / len(rows), 4),
            "low": round(low, 3),
            "high": round(high, 3),
            "llm_share": round(sum(each.large for each in rows) / tokens, 3) if arm.way else 0.0,
            "tokens_mean": round(statistics.mean(each.tokens for each in rows), 1),
            "cut": sum(each.finish != "stop" for each in rows),
        }
        if costs is not None:
            speed = 1 / costs.small(1, 1)
            if arm.way is not None:
                seen = habits(rows)
                speed = costs.predict(arm.way, seen, 1)
                line |= {"drop": round(seen.drop, 3), "back": round(seen.back, 3)}
                line |= {"accept": round(seen.accept, 3)} if arm.way.draft else {}
            line |= {"tok_s_1": round(speed, 1), "seconds_1": round(line["tokens_mean"] / speed, 2)}
        found.append(line)
    for line in found if costs is not None else ():
        line["pareto"] = not any(
            other["accuracy"] >= line["accuracy"]
            and other["seconds_1"] <= line["seconds_1"]
            and (other["accuracy"], other["seconds_1"]) != (line["accuracy"], line["seconds_1"])
            for other in found
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", type=Path)
    parser.add_argument("--limit", type=int, default=100, help="the first so many questions (default 100)")
    parser.add_argument("--slots", type=int, default=20, help="questions written at once (default 20)")
    parser.add_argument("--journal", type=Path, default=Path("pareto.jsonl"), help="finished answers")
    parser.add_argument("--arm", action="append", choices=[arm.name for arm in ARMS], help="default: all")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    questions = list(read_questions(arguments.questions, limit=arguments.limit))
    if any(question.gold is None for question in questions):
        raise DataError("every question needs its answer, to compare with")
    arms = [arm for arm in ARMS if not arguments.arm or arm.name in arguments.arm]
    done = run(questions, arms, arguments.slots, arguments.journal)
    costs = known_costs(Catalogue.load()[PAIR])
    found = table(done, arms, costs)
    conditions = {"torch": torch.__version__, "slots": arguments.slots} | (
        costs.conditions if costs is not None else {}
    )
    if arguments.json:
        print(json.dumps({"conditions": conditions, "ways": found}))
        return
    shown = Table(*found[0], box=None, pad_edge=False)
    for line in found:
        shown.add_row(*("" if line.get(name) is None else str(line.get(name)) for name in found[0]))
    Console(width=150).print(shown)
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))


if __name__ == "__main__":
    main()
