"""Five grade-school maths questions within one small allowance, on the local models.

Prints for each: the pair and why it was chosen, answer and gold, tokens per model, cost and what is left.
The questions come from a JSONL file given as the first argument, or from the list below.
"""

from __future__ import annotations

import sys
import time

from viaticum import Answer, Query, Viaticum
from viaticum.money import format_usd
from viaticum.questions import Question, read_questions
from viaticum.strategies import equivalent

BUDGET_USD = "0.002"
_OWN = [
    (
        "A tram has 36 seats. At the first stop 14 people get on, at the second 9 more and 5 get off. "
        "How many seats are free?",
        "18",
    ),
    (
        "Lea reads 12 pages on Monday and twice as many on each of the next 3 days. "
        "How many pages has she read?",
        "84",
    ),
    (
        "Eggs cost $3 a dozen. A bakery needs 90 eggs and buys whole dozens only. "
        "How many dollars does it pay?",
        "24",
    ),
    ("A 240 km trip takes 4 hours. How many km would 7 hours at the same speed make?", "420"),
    ("Of 80 bulbs 15% are broken and a quarter of the rest are sold. How many good bulbs are left?", "51"),
]
OWN_QUESTIONS = [Question(str(n), Query(text, "number"), gold) for n, (text, gold) in enumerate(_OWN, 1)]


def main() -> None:
    questions = read_questions(sys.argv[1], limit=5) if len(sys.argv) > 1 else OWN_QUESTIONS
    began, right = time.perf_counter(), 0
    with Viaticum(budget=BUDGET_USD) as client:
        for question in questions:
            right += ask(client, question)
        budget = client.budget()
        print(
            f"total: {right} of {len(questions)} right, "
            f"{format_usd(budget.posted_nanousd)} of ${BUDGET_USD} spent, "
            f"{format_usd(budget.left_nanousd or 0)} left, {time.perf_counter() - began:.0f} s"
        )


def ask(client: Viaticum, question: Question) -> bool:
    print(f"\nQ: {question.query.text}")
    for event in client.stream(question.query.text, kind=question.query.kind):
        if isinstance(event, Answer):
            break
    assert isinstance(event, Answer)
    for route in event.routes:
        print(f"  {route.pair}: {route.why}")
    right = equivalent(event.value, question.gold, question.query.kind)
    print(f"  answer {event.value}, gold {question.gold}: {'right' if right else 'wrong'}")
    for name, count in event.usage.models.items():
        print(f"  {name}: {count.input_tokens} tokens read, {count.output_tokens} made")
    left = client.budget().left_nanousd or 0
    print(f"  cost {format_usd(event.cost)}, left {format_usd(left)}, {event.seconds:.1f} s")
    return right


if __name__ == "__main__":
    main()
