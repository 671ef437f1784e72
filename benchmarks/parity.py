"""Programs that models really wrote, run in the sandbox and in a plain Python: do they print the same?

The programs come from what `viaticum profile` kept:

    viaticum profile QUESTIONS.jsonl --limit 300 --strategy pot --out O.parquet --completions TEXTS.jsonl
    python benchmarks/parity.py TEXTS.jsonl --run-unsandboxed

The plain Python is a subprocess with a folder and an environment of its own and nothing else around it: a
model's program can do there whatever you can. That is why it has to be asked for by name. Two programs agree
where both print the same, or where both fail. A program that failed in one of the two alone, or printed
something else, is shown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from viaticum.files import read_jsonl
from viaticum.strategies.programs import end_in_answer, find_program
from viaticum.strategies.sandbox import Limits, open_sandbox

SECONDS = (
    10.0  # for one program, many times what the slowest takes: a limit that bites would count as a difference
)

# What a notebook would show: what was printed, or else the value of the last expression.
PLAIN = """
import ast, contextlib, io, sys
tree = ast.parse(sys.stdin.read())
last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
space, printed = {"__name__": "__main__"}, io.StringIO()
with contextlib.redirect_stdout(printed):
    exec(compile(tree, "program", "exec"), space)
    value = eval(compile(last, "program", "eval"), space) if last else None
sys.stdout.write(printed.getvalue() or ("" if value is None else f"{value}\\n"))
"""


@dataclass(frozen=True)
class Compared:
    """One program: what each of the two printed, None where it failed."""

    model: str
    program: str
    backend: str
    sandbox: str | None
    plain: str | None
    error: str

    @property
    def same(self) -> bool:
        return self.sandbox == self.plain


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("completions", type=Path, help="JSONL that `viaticum profile --completions` wrote")
    parser.add_argument("--run-unsandboxed", action="store_true", help="needed: run them in a plain Python")
    parser.add_argument("--backend", default="auto", help="auto (the default), monty or bwrap")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args()
    if not asked.run_unsandboxed:
        parser.error("this runs programs that models wrote without a sandbox; say --run-unsandboxed")
    compared, without = compare(asked.completions, asked.backend)
    report(compared, without, asked.json)
    return 0 if compared and share(compared) >= 0.99 else 1


def compare(path: Path, backend: str) -> tuple[list[Compared], int]:
    """Every program in the texts, and how many texts held none."""
    compared, without = [], 0
    with open_sandbox(backend) as sandbox:
        for _, row in read_jsonl(path):
            for text in row["texts"]:
                program = find_program(text)
                if program is None:
                    without += 1
                    continue
                program = end_in_answer(program)
                result = sandbox.run(program, Limits(seconds=SECONDS))
                compared.append(
                    Compared(
                        row["model"],
                        program,
                        result.backend,
                        result.stdout if result.ok else None,
                        run_plain(program),
                        result.error,
                    )
                )
    return compared, without


def run_plain(program: str) -> str | None:
    """What the program prints in a Python of its own, or None where it fails or does not end."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", PLAIN],
                input=program,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                cwd=folder,
                env={},
            )
        except subprocess.TimeoutExpired:
            return None
    return done.stdout if done.returncode == 0 else None


def share(compared: list[Compared]) -> float:
    return sum(each.same for each in compared) / len(compared)


def report(compared: list[Compared], without: int, as_json: bool) -> None:
    counts = {
        "programs": len(compared),
        "texts_without_program": without,
        "same": sum(each.same for each in compared),
        "same_and_printed": sum(each.same and each.sandbox is not None for each in compared),
        "share": round(share(compared), 4) if compared else None,
        "backends": dict(Counter(each.backend for each in compared)),
        "models": {
            model: round(share([each for each in compared if each.model == model]), 4)
            for model in sorted({each.model for each in compared})
        },
    }
    if as_json:
        print(json.dumps(counts))
        return
    for name, value in counts.items():
        print(f"{name}: {value}")
    for each in compared:
        if not each.same:
            print(
                f"\n--- {each.model} ({each.backend})\n{each.program}\nsandbox: {each.sandbox!r} {each.error}"
                f"\nplain: {each.plain!r}"
            )


if __name__ == "__main__":
    sys.exit(main())
