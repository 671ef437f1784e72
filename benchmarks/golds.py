r"""Put real gold answers in `\boxed{}`, read them back, and compare each with itself and with others.

A gold must equal what is read, and two different golds must differ. Prints a table by kind of gold, then
every gold that is not read back and every pair taken for equal, for a human to look at: 1/2 and 0.5 are
equal, and the pairs that were judged so go into a file (tab-separated, one pair a line) for the next run.

    python benchmarks/golds.py golds.jsonl train.parquet answers.txt --pairs 20000 --equal judged.tsv

Reads the first of the columns `gold`, `answer`, `target`, `solution` of JSONL and Parquet files (`--column`
names another), and the lines of text files. What follows `####`, or is in the last `\boxed{}`, is the gold.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from viaticum.strategies import equivalent, read_answer
from viaticum.strategies.answers.dates import whole_date
from viaticum.strategies.answers.expressions import is_symbolic
from viaticum.strategies.answers.numbers import whole_number
from viaticum.strategies.answers.structures import Collection, Equation, Matrix, Union, Value, parse
from viaticum.strategies.answers.units import split_unit
from viaticum.types import AnswerKind

COLUMNS = ("gold", "answer", "target", "solution")
KINDS = (
    "integer",
    "decimal",
    "fraction",
    "with unit",
    "formula",
    "equation",
    "interval",
    "list",
    "matrix",
    "text",
    "choice",
    "date",
)
_BOX = re.compile(r"\\boxed\s?\{")


def main() -> None:
    arguments = _parser().parse_args()
    golds = sorted({gold for path in arguments.files for gold in read_golds(path, arguments.column)})
    rng = random.Random(arguments.seed)
    if len(golds) > arguments.limit:
        golds = sorted(rng.sample(golds, arguments.limit))
    by_kind: dict[str, list[str]] = defaultdict(list)
    for gold in golds:
        by_kind[kind_of(gold)].append(gold)
    started = time.perf_counter()
    missed = [(gold, read) for gold in golds if not equivalent(read := read_back(gold), gold, "auto")]
    judged = read_pairs(arguments.equal) if arguments.equal else set()
    pairs = list(sample_pairs(by_kind, arguments.pairs, rng))
    same = [pair for pair in pairs if pair not in judged and equivalent(*pair, "auto")]
    print_table(by_kind, missed, pairs, same)
    seconds = time.perf_counter() - started
    print(f"{len(golds)} golds, {len(pairs)} pairs, {seconds:.0f} s, seed {arguments.seed}")
    print(f"judged equal by a human and left out: {sum(pair in judged for pair in pairs)} pairs")
    for gold, read in missed:
        print(f"not read back: {gold!r} is read as {read!r}")
    for one, other in same:
        print(f"taken for equal: {one!r} and {other!r}")


def read_golds(path: Path, column: str | None) -> Iterator[str]:
    """The golds of a file, each as written."""
    for value in read_column(path, column):
        text = value if isinstance(value, str) else "" if value is None else str(value)
        text = text.rpartition("####")[2] if "####" in text else last_box(text)
        if text.strip() and len(text) <= 300:
            yield text.strip()


def read_column(path: Path, column: str | None) -> Iterable[object]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        names = pyarrow.parquet.read_schema(path).names
        name = column or next(name for name in COLUMNS if name in names)
        return list(pyarrow.parquet.read_table(path, columns=[name])[name].to_pylist())
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return lines
    rows = [json.loads(line) for line in lines]
    return [row[column or next(name for name in COLUMNS if name in row)] for row in rows]


def last_box(text: str) -> str:
    r"""The inside of the last `\boxed{}`, or the whole text."""
    start = max((match.end() for match in _BOX.finditer(text)), default=None)
    if start is None:
        return text
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place]
    return text


def kind_of(gold: str) -> str:
    """The kind of a gold, for the table."""
    if re.fullmatch(r"(?:\\text)?[({]{0,2}[A-Z][)}]{0,2}", gold):
        return "choice"
    if whole_date(gold):
        return "date"
    node = parse(gold)
    if isinstance(node, Equation):
        return "equation"
    if isinstance(node, Matrix):
        return "matrix"
    if isinstance(node, Union) or (isinstance(node, Collection) and node.brackets in ("[)", "(]")):
        return "interval"
    if isinstance(node, Collection):
        in_brackets = node.brackets in ("[]", "()") and len(node.items) == 2
        return "interval" if (in_brackets and "infty" in gold) or node.brackets == "[]" else "list"
    assert isinstance(node, Value)
    return kind_of_value(node.text)


def kind_of_value(text: str) -> str:
    plain, unit = split_unit(text)
    number = whole_number(plain)
    if number is not None:
        if unit is not None or whole_number(plain, units=False) is None:
            return "with unit"
        return "fraction" if "/" in plain or "frac" in plain else "decimal" if "." in plain else "integer"
    return "formula" if is_symbolic(text.replace("⦃", "{").replace("⦄", "}")) else "text"


def read_back(gold: str) -> str | None:
    kind: AnswerKind = "auto"
    return read_answer(f"Adding it all up, we find the answer: $\\boxed{{{gold}}}$. This completes it.", kind)


def sample_pairs(by_kind: dict[str, list[str]], count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Pairs of different golds, half of one kind, where mistakes are likelier, half of any."""
    every = [gold for golds in by_kind.values() for gold in golds]
    kinds = [kind for kind, golds in by_kind.items() if len(golds) > 1]
    for turn in range(count if len(every) > 1 else 0):
        pool = by_kind[kinds[turn // 2 % len(kinds)]] if turn % 2 and kinds else every
        one, other = rng.sample(pool, 2)
        yield (one, other) if one < other else (other, one)


def read_pairs(path: Path) -> set[tuple[str, str]]:
    pairs = (line.split("\t")[:2] for line in path.read_text(encoding="utf-8").splitlines() if "\t" in line)
    return {(min(pair), max(pair)) for pair in pairs}


def print_table(
    by_kind: dict[str, list[str]],
    missed: list[tuple[str, str | None]],
    pairs: list[tuple[str, str]],
    same: list[tuple[str, str]],
) -> None:
    """One row a kind; a pair of two kinds counts in both."""
    kinds = {gold: kind for kind, golds in by_kind.items() for gold in golds}
    lost = Counter(kinds[gold] for gold, _ in missed)
    compared, wrong = (
        Counter(kind for pair in each for kind in {kinds[pair[0]], kinds[pair[1]]}) for each in (pairs, same)
    )
    print(f"{'kind':<10}{'golds':>7}{'read back':>11}{'pairs':>9}{'taken for equal':>17}")
    for kind in KINDS:
        if golds := by_kind.get(kind):
            kept = 1 - lost[kind] / len(golds)
            share = wrong[kind] / compared[kind] if compared[kind] else 0
            print(f"{kind:<10}{len(golds):>7}{kept:>11.2%}{compared[kind]:>9}{share:>17.3%}")
    total, kept = len(kinds), 1 - len(missed) / max(1, len(kinds))
    print(f"{'all':<10}{total:>7}{kept:>11.2%}{len(pairs):>9}{len(same) / max(1, len(pairs)):>17.3%}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Read golds back from boxes and compare them in pairs.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--column", help="the column of the golds")
    parser.add_argument("--limit", type=int, default=20_000, help="at most so many golds, sampled")
    parser.add_argument("--pairs", type=int, default=20_000, help="pairs of different golds, sampled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--equal", type=Path, help="pairs that a human judged equal, tab-separated")
    return parser


if __name__ == "__main__":
    main()
