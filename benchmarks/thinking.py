r"""Budget forcing on models that think because a system prompt asks for it: accuracy and tokens by budget.

    python benchmarks/thinking.py QUESTIONS.jsonl --limit 100 --budget 64 --budget 128 --budget 256

The prompt ends with the opening tag, the model thinks, the closing tag is forced once the budget is spent,
and the answer follows. This is the strategy `think` on a catalogue entry with `thinking` tags and a system
turn, as in docs/reference/thinking.md. Greedy. Finished answers go to --journal, so that a run that was
killed goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from viaticum.catalogue import Catalogue
from viaticum.model_spec import ThinkingTags
from viaticum.models.base import Generation
from viaticum.models.local import LocalModel, LocalModels
from viaticum.outcomes import accuracy_interval
from viaticum.questions import Question, read_questions
from viaticum.strategies import equivalent, get
from viaticum.types import Completion

SYSTEM = (
    "You think before you answer. Write your thought, the calculation step by step, between <think> and "
    "</think>. After </think> write nothing but the final answer in \\boxed{}."
)
TAGS = ThinkingTags(open="<think>", close="</think>", opened=True, cue="The final answer is \\boxed{")


@dataclass(frozen=True)
class Answer:
    """One answer: whether it is right, its tokens by part, and what closed the thought."""

    model: str
    budget: int
    id: str
    right: bool
    value: str | None
    thought_tokens: int
    answer_tokens: int
    forced: bool
    finish_reason: str


def load_model(name: str, slots: int, path: Path | None) -> LocalModel:
    """The model `name`, its entry completed with the tags of the thinking format."""
    catalogue = Catalogue.load(path)
    if catalogue[name].thinking == "auto":
        catalogue = catalogue.with_models(catalogue[name].model_copy(update={"thinking": TAGS}))
    return LocalModels(catalogue, slots=slots).model(name)


def answers(
    model: LocalModel, questions: list[Question], budget: int, limit: int, system: str
) -> Iterator[Answer]:
    """Answers to the questions as they end. limit: tokens of the answer after the thought."""
    strategy = get("think")
    chats = [[{"role": "system", "content": system}, *strategy.messages(each.query)] for each in questions]
    generation = Generation(max_new_tokens=budget + limit, thinking_budget=budget)
    for index, completion in model.generate_all(chats, generation):  # type: ignore[arg-type]
        yield scored(model.name, questions[index], budget, completion)


def scored(name: str, question: Question, budget: int, completion: Completion) -> Answer:
    reading = get("think").read(completion, question.query)
    counts = completion.usage.models.values()
    thought = sum(count.reasoning_tokens for count in counts)
    return Answer(
        model=name,
        budget=budget,
        id=question.id,
        right=reading.value is not None and equivalent(reading.value, question.gold, question.query.kind),
        value=reading.value,
        thought_tokens=thought,
        answer_tokens=sum(count.output_tokens for count in counts) - thought,
        forced=completion.trace is not None and any(completion.trace.forced),
        finish_reason=completion.finish_reason,
    )


def read_journal(path: Path | None) -> dict[tuple[str, int, str], Answer]:
    if path is None or not path.exists():
        return {}
    found = [Answer(**json.loads(line)) for line in path.read_text().splitlines()]
    return {(each.model, each.budget, each.id): each for each in found}


def run(options: argparse.Namespace, questions: list[Question]) -> dict[int, list[Answer]]:
    """The answers of every budget, those of the journal among them."""
    done = read_journal(options.journal)
    model: LocalModel | None = None
    for budget in options.budget:
        todo = [each for each in questions if (options.model, budget, each.id) not in done]
        if not todo:
            continue
        model = model or load_model(options.model, options.slots, options.catalogue)
        for answer in answers(model, todo, budget, options.answer, options.system):
            done[answer.model, budget, answer.id] = answer
            sys.stderr.write(f"{budget} {answer.id} {'right' if answer.right else 'wrong'}\n")
            if options.journal is not None:
                with options.journal.open("a") as file:
                    file.write(json.dumps(asdict(answer)) + "\n")
    return {budget: [done[options.model, budget, each.id] for each in questions] for budget in options.budget}


def summary(budget: int, rows: list[Answer]) -> dict[str, float]:
    right = sum(row.right for row in rows)
    low, high = accuracy_interval(right, len(rows))
    return {
        "budget": budget,
        "questions": len(rows),
        "right": right,
        "accuracy": right / len(rows),
        "low": low,
        "high": high,
        "thought_tokens": statistics.mean(row.thought_tokens for row in rows),
        "answer_tokens": statistics.mean(row.answer_tokens for row in rows),
        "forced": sum(row.forced for row in rows) / len(rows),
        "no_answer": sum(row.value is None for row in rows),
    }


def show(rows: list[dict[str, float]]) -> None:
    table = Table("budget", "right", "95% interval", "thought tokens", "answer tokens", "forced", "no answer")
    table.box = None
    for row in rows:
        table.add_row(
            str(row["budget"]),
            f"{row['right']}/{row['questions']} {row['accuracy']:.0%}",
            f"{row['low']:.0%} to {row['high']:.0%}",
            f"{row['thought_tokens']:.0f}",
            f"{row['answer_tokens']:.0f}",
            f"{row['forced']:.0%}",
            str(row["no_answer"]),
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", type=Path)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--budget", type=int, action="append", help="tokens of the thought; repeatable")
    parser.add_argument(
        "--answer", type=int, default=64, help="tokens after the budget, closing tag included"
    )
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--system", default=SYSTEM)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--catalogue", type=Path)
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.budget = options.budget or [64, 128, 256]
    questions = read_questions(options.questions, limit=options.limit)
    began = time.perf_counter()
    rows = [summary(budget, answers) for budget, answers in run(options, questions).items()]
    if options.json:
        print(json.dumps({"model": options.model, "rows": rows}))
        return
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, {options.model}, greedy, {options.slots} texts at once, "
        f"{time.perf_counter() - began:.0f} s"
    )
    show(rows)


if __name__ == "__main__":
    main()
