"""`viaticum outcomes`: import, show, merge, split and reprice outcome tables.

Leaves out the formats (`viaticum.outcome_imports`) and learning from tables (`viaticum.commands.router`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from viaticum.commands.budget import Where
from viaticum.commands.models import CatalogueFile, JsonFlag
from viaticum.commands.table import print_table
from viaticum.errors import DataError, InputError
from viaticum.files import check_is_no_input
from viaticum.money import format_usd

app = typer.Typer(no_args_is_help=True, help="Import, show, merge, split and reprice outcome tables.")

Tables = Annotated[list[Path], typer.Argument(help="Outcome tables: .parquet, .csv or .jsonl.")]
Out = Annotated[Path, typer.Option(help="The table to write: .parquet, .csv or .jsonl.")]
Keep = Annotated[
    str,
    typer.Option(help="Of rows of one pair on one question the first or last; error refuses contradictions."),
]


@app.command("import")
def import_(
    out: Out,
    sources: Annotated[
        list[Path] | None, typer.Argument(help="Files; for live by default that of the feedback so far.")
    ] = None,
    source_format: Annotated[
        str,
        typer.Option(
            "--from", help="table (CSV, JSONL, Parquet), batch, lm-eval, langsmith, promptfoo, live."
        ),
    ] = "table",
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--map", help="COLUMN=SOURCE, where SOURCE is a column or a path such as inputs.question."
        ),
    ] = None,
    constants: Annotated[
        list[str] | None, typer.Option("--set", help="COLUMN=VALUE for every row, such as strategy=cot.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Least score that counts as right, where correct is a score.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="Questions with right answers, by which answers are graded.")
    ] = None,
    filter: Annotated[str | None, typer.Option(help="Which filter of lm-eval's logs counts.")] = None,
    keep: Keep = "error",
    ledger: Where = None,
    as_json: JsonFlag = False,
) -> None:
    """Make an outcome table of your own files, of batches, of live calls, or of another tool's export."""
    from viaticum.outcome_imports import Importer, ImportSettings, unique
    from viaticum.questions import read_questions
    from viaticum.strategies.answers import is_right

    settings = ImportSettings(
        _assignments(columns, "--map"),
        _assignments(constants, "--set"),
        threshold,
        filter,
        {each.id: each for each in read_questions(questions)} if questions is not None else {},
        is_right,
    )
    live = source_format == "live"
    if live:  # a later verdict on an answer counts
        sources, keep = sources or [_feedback_file()], "last" if keep == "error" else keep
    elif not sources:
        raise InputError("nothing to import; name the files")
    check_is_no_input(out, sources)
    importer = Importer("table" if live else source_format, settings, _from_ledger(ledger) if live else None)
    summary = _write(out, unique(chain.from_iterable(_numbered(importer, each) for each in sources), keep))
    left_out = dict(importer.left_out)
    if as_json:
        typer.echo(json.dumps({"path": str(out), **summary, "left_out": left_out}))
        return
    for reason, count in left_out.items():
        typer.echo(f"left out: {count} rows that {reason}", err=True)
    typer.echo(_words(out, summary))


@app.command()
def show(tables: Tables, as_json: JsonFlag = False) -> None:
    """What tables hold: questions by data set, and accuracy, tokens, cost and holes by pair."""
    from viaticum.outcome_imports import unique
    from viaticum.outcome_summary import Summary
    from viaticum.outcomes import accuracy_interval, parse_outcome

    summary = Summary()
    for values in unique(_rows(tables), "last"):
        summary.add(parse_outcome(values, "table"))
    result = summary.result()
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    names = ("pair", "answers", "holes", "right", "95%", "no answer", "tokens p50/p90", "$ mean")
    rows = []
    for row in (*result["pairs"], *result.get("verdicts", ())):
        low, high = accuracy_interval(row["right"], row["answers"])
        tokens = "-" if row["tokens_p50"] is None else f"{row['tokens_p50']}/{row['tokens_p90']}"
        cost = "-" if row["cost_mean"] is None else format_usd(row["cost_mean"])
        counts = (row["pair"], str(row["answers"]), str(row.get("holes", "-")))
        shares = (f"{row['accuracy']:.1%}", f"{low:.0%} to {high:.0%}", str(row["without_answer"]))
        rows.append((*counts, *shares, tokens, cost))
    print_table(names, rows, spare=("no answer", "tokens p50/p90", "holes", "95%"))
    sets = ", ".join(f"{name} {count}" for name, count in result["datasets"].items())
    typer.echo(
        f"{result['outcomes']} outcomes on {result['questions']} questions ({sets}); {result['complete']} "
        "were given to every pair"
    )
    if result["without_text"]:
        typer.echo(f"{result['without_text']} questions have no text: a router cannot learn from them")


@app.command()
def merge(tables: Tables, out: Out, keep: Keep = "error", as_json: JsonFlag = False) -> None:
    """Put several tables into one, each pair once on each question."""
    from viaticum.outcome_imports import unique

    check_is_no_input(out, tables)
    summary = _write(out, unique(_rows(tables), keep))
    typer.echo(json.dumps({"path": str(out), **summary}) if as_json else _words(out, summary))


@app.command()
def split(
    tables: Tables,
    train: Annotated[Path, typer.Option(help="The table to learn from.")],
    held_out: Annotated[Path, typer.Option(help="The table to evaluate on.")],
    share: Annotated[float, typer.Option(help="Share of the questions that is held out, 0 to 1.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Decides which questions.", min=0)] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Split by question: all pairs of a question, and near-duplicate questions, are on the same side."""
    from viaticum.outcome_imports import unique
    from viaticum.routers.query.outcome_matrix import held_out as draw
    from viaticum.routers.query.outcome_matrix import near_duplicates
    from viaticum.routers.query.shared_text import without_shared

    if not 0 < share < 1:
        raise InputError(f"--share is above 0 and below 1, got {share:g}")
    if train.absolute() == held_out.absolute():
        raise InputError(f"both parts would be {train}; name a table for each")
    for part in (train, held_out):
        check_is_no_input(part, tables)
    texts: dict[tuple[str, str], str] = {}
    for values in unique(_rows(tables), "last"):
        texts.setdefault(_key(values), values["question"])
    groups = near_duplicates(without_shared([*texts.values()]))  # one without a text is like no other
    aside = {key for key, taken in zip(texts, draw(groups, share, seed), strict=True) if taken}
    if not aside or len(aside) == len(texts):
        raise DataError(
            f"{len(texts)} questions in {groups.max() + 1} groups of near-duplicates cannot be split at "
            f"{share:g}; take another share, or more questions"
        )
    sizes = {}
    for path, wanted in ((train, False), (held_out, True)):
        rows = (values for values in unique(_rows(tables), "last") if (_key(values) in aside) is wanted)
        sizes[str(path)] = _write(path, rows)
    if as_json:
        typer.echo(json.dumps({"tables": sizes, "groups": int(groups.max()) + 1, "seed": seed}))
        return
    for table, summary in sizes.items():
        typer.echo(_words(Path(table), summary))


@app.command()
def reprice(
    table: Annotated[Path, typer.Argument(help="An outcome table: .parquet, .csv or .jsonl.")],
    out: Out,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Write a table anew at the catalogue's prices of today; a router is then fitted on it again.

    Rows without tokens, and those of models without a price, such as pairs, keep their costs.
    """
    from viaticum.catalogue import Catalogue
    from viaticum.models.remote.prices import with_litellm_prices
    from viaticum.outcomes import parse_outcome
    from viaticum.repricing import Repricing

    check_is_no_input(out, [table])
    specs = with_litellm_prices(Catalogue.load(catalogue)).values()
    done = Repricing({spec.name: spec.price for spec in specs if spec.price is not None})
    rows = [
        {**values, "cost_nanousd": done.cost(parse_outcome(values, where))}
        for where, values in _rows([table])
    ]
    if not done.rows:
        raise DataError(
            f"no row of {table} can be priced: its models ({', '.join(sorted(done.kept)) or 'none'}) have no "
            "price in the catalogue, or its rows no tokens; nothing was written"
        )
    summary = _write(out, iter(rows))
    if as_json:
        models = {
            name: {"outcomes": done.rows[name], "before": done.before[name], "after": done.after[name]}
            for name in done.rows
        }
        typer.echo(json.dumps({"path": str(out), **summary, "models": models, "kept": done.kept}))
        return
    for name, count in done.rows.items():
        costs = f"{format_usd(done.before[name])} before, {format_usd(done.after[name])} now"
        typer.echo(f"{name}: {count} outcomes, {costs}")
    for name, count in done.kept.items():
        typer.echo(f"{name}: {count} outcomes keep their costs: no price of it, or no tokens in the row")
    typer.echo(_words(out, summary))


def _feedback_file() -> Path:
    """Where the SDK's `feedback` writes."""
    from viaticum.budgets import default_path

    return default_path().parent / "outcomes.jsonl"


def _from_ledger(where: str | None) -> Callable[[str], dict[str, Any] | None]:
    """Returns what the ledger knows of a settled call by its key: pair, tokens, cost, seconds and end."""
    from viaticum.budgets import Ledger

    def find(key: str) -> dict[str, Any] | None:
        with Ledger(where, read_only=True) as ledger:
            hold = ledger.hold(key)
            posts = [entry.nanousd for entry in ledger.entries(key=key) if entry.kind == "post"]
        if hold is None or not posts:
            return None
        result = json.loads(hold.result) if hold.result else {}
        usage = list(result.get("usage", {}).values())
        return {
            "model": hold.tags.get("model"),
            "strategy": hold.tags.get("strategy"),
            "input_tokens": sum(each[0] for each in usage) if usage else None,
            "output_tokens": sum(each[1] for each in usage) if usage else None,
            "cost_nanousd": sum(posts),
            "seconds": result.get("seconds"),
            "finish_reason": result.get("finish_reason"),
            "answer": result.get("text"),
        }

    return find


def _key(values: dict[str, Any]) -> tuple[str, str]:
    return values["dataset"], values["question_id"]


def _rows(tables: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    from viaticum.outcomes import outcome_rows

    for path in tables:
        yield from outcome_rows(path)


def _numbered(importer: Any, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from dataclasses import asdict

    for number, outcome in enumerate(importer.read(path), 1):
        yield f"{path}, outcome {number}", asdict(outcome)


def _write(out: Path, rows: Iterator[dict[str, Any]]) -> dict[str, int]:
    """Write a table, further columns included; returns how many outcomes, questions and pairs it has.

    Verdicts on answers are counted apart, where there are some.
    """
    from viaticum.outcomes import COLUMNS, VERDICT, write_rows

    first = list(_take(rows, 4096))
    if not first:
        raise DataError("no outcomes; nothing was written")
    others = list(dict.fromkeys(name for row in first for name in row if name not in COLUMNS))
    questions, pairs, counts = set(), set(), Counter[str]()

    def counted() -> Iterator[dict[str, Any]]:
        for row in chain(first, rows):
            is_verdict = row["strategy"].startswith(VERDICT)
            counts["verdicts" if is_verdict else "outcomes"] += 1
            questions.add((row["dataset"], row["question_id"]))
            if not is_verdict:
                pairs.add((row["model"], row["strategy"]))
            yield {name: row.get(name) for name in (*COLUMNS, *others)}

    write_rows(out, counted(), others)
    verdicts = {"verdicts": counts["verdicts"]} if counts["verdicts"] else {}
    return {"outcomes": counts["outcomes"], "questions": len(questions), "pairs": len(pairs), **verdicts}


def _take(rows: Iterator[dict[str, Any]], most: int) -> Iterator[dict[str, Any]]:
    for _, row in zip(range(most), rows, strict=False):
        yield row


def _words(out: Path, summary: dict[str, int]) -> str:
    pairs, questions = summary["pairs"], summary["questions"]
    verdicts = f", and {summary['verdicts']} verdicts," if "verdicts" in summary else ""
    return f"{summary['outcomes']} outcomes of {pairs} pairs{verdicts} on {questions} questions in {out}"


def _assignments(given: Sequence[str] | None, option: str) -> dict[str, str]:
    found = {}
    for each in given or ():
        name, equals, value = each.partition("=")
        if not (name and equals and value):
            raise InputError(f"{option} {each!r}: write COLUMN=VALUE, such as {option} question=prompt")
        found[name.strip()] = value.strip()
    return found
