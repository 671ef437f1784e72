"""Score the reading and comparing of answers on a file of cases, and print each miss with what was read.

    python benchmarks/answers.py CASES.jsonl --call read --kind number

A case is a JSON object a line. Its `call` says what is tried, its `kind` is an answer kind:

    {"call": "read", "text": ..., "kind": ..., "want": ...}
    {"call": "equivalent", "a": ..., "b": ..., "kind": ..., "want": true or false}
    {"call": "strategy", "strategy": "cot", "text": ..., "kind": ..., "finish_reason": ..., "want": ...}

A reading is right if it equals `want` under its kind, or if both are null. Two texts must compare the same in
both orders. Programs run in the sandbox that this machine offers. Leaves out choosing cases.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from viaticum.strategies import equivalent, get, read_answer
from viaticum.types import Completion, Query, Usage


def try_case(case: dict[str, Any]) -> tuple[bool, Any]:
    """Whether a case is right, and what was read or decided."""
    want, kind = case["want"], case["kind"]
    if case["call"] == "equivalent":
        verdicts = [equivalent(case["a"], case["b"], kind), equivalent(case["b"], case["a"], kind)]
        return verdicts == [want, want], verdicts[0] if verdicts[0] == verdicts[1] else verdicts
    if case["call"] == "read":
        read = read_answer(case["text"], kind)
    else:
        completion = Completion(case["text"], Usage(), case.get("finish_reason", "stop"))
        read = get(case["strategy"]).read(completion, Query("Which?", kind)).value
    return equivalent(read, want, kind), read


def score(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each case with `number` (its line), `right`, `got` and `seconds`; an exception is a miss."""
    scored = []
    for case in cases:
        started = time.perf_counter()
        try:
            right, got = try_case(case)
        except Exception as error:
            right, got = False, f"raised {error!r}"
        scored.append({**case, "right": right, "got": got, "seconds": time.perf_counter() - started})
    return scored


def print_misses(scored: list[dict[str, Any]], width: int) -> None:
    for case in scored:
        if not case["right"]:
            asked = case["text"] if "text" in case else f"{case['a']}  vs  {case['b']}"
            what = case.get("strategy", case["call"])
            print(f"line {case['number']}  {what} {case['kind']}  {asked[-width:]!r}")
            print(f"    want {case['want']!r}, got {str(case['got'])[:width]!r}")


def print_totals(scored: list[dict[str, Any]]) -> None:
    total, right = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for case in scored:
        for group in (case["call"], case["kind"]), (case["call"], "all"), ("all", "all"):
            total[group] += 1
            right[group] += case["right"]
    for group in sorted(total):
        share = right[group] / total[group]
        print(f"{group[0]:<12}{group[1]:<12}{right[group]:>4} of {total[group]:>4}  {share:7.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="+", help="JSONL files of cases")
    parser.add_argument("--call", help="only cases of this call")
    parser.add_argument("--kind", help="only cases of this kind")
    parser.add_argument("--strategy", help="only cases of this strategy")
    parser.add_argument("--width", type=int, default=160, help="characters shown of a text (default 160)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    cases = []
    for file in arguments.file:
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                cases.append({"number": number, **json.loads(line)})
    for name in ("call", "kind", "strategy"):
        if wanted := getattr(arguments, name):
            cases = [case for case in cases if case.get(name) == wanted]
    scored = score(cases)
    if arguments.json:
        misses = [case for case in scored if not case["right"]]
        print(json.dumps({"cases": len(scored), "right": len(scored) - len(misses), "misses": misses}))
        return
    print_misses(scored, arguments.width)
    print_totals(scored)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the table has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
