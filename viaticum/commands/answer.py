"""`viaticum answer`: how the final answer of a text is read, candidate by candidate.

Results go to stdout. Leaves out asking models: see `solve`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from viaticum.commands.table import print_table
from viaticum.commands.terminal import literal
from viaticum.display import cut
from viaticum.errors import InputError, reason
from viaticum.types import ANSWER_KINDS, AnswerKind

if TYPE_CHECKING:
    from viaticum.strategies.answers import Explanation

app = typer.Typer(no_args_is_help=True, help="Look at how answers are read.")

_SHOWN = 200  # characters of a candidate


@app.command()
def explain(
    file: Annotated[Path, typer.Argument(help="What a model wrote; - reads from stdin.")],
    kind: Annotated[str, typer.Option(help=f"Kind of answer: {', '.join(ANSWER_KINDS)}.")] = "auto",
    gold: Annotated[str | None, typer.Option(help="The right answer, to compare with.")] = None,
    truncated: Annotated[
        bool, typer.Option("--truncated", help="The text was cut off: only a stated answer counts.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Show every statement of a text that could give its answer, what was read from it, and which one counts.

    With --gold, exit code 1 if the answer is not equal to it, except with --json.
    """
    from viaticum.strategies.answers import equivalent
    from viaticum.strategies.answers import explain as explain_text

    asked = _kind(kind)
    explained = explain_text(_read(file), asked, marked_only=truncated)
    right = None if gold is None else equivalent(explained.value, gold, asked)
    if as_json:
        found = asdict(explained) | ({} if gold is None else {"gold": gold, "right": right})
        typer.echo(json.dumps(found, ensure_ascii=False, indent=2))
        return
    _print(explained)
    if gold is not None:
        typer.echo(f"gold: {gold}, {'equal' if right else 'not equal'}")
        if not right:
            raise typer.Exit(1)


def _print(explained: Explanation) -> None:
    if explained.candidates:
        rows = [
            (each.rule, cut(" ".join(each.text.split()), _SHOWN), each.value or "-", each.verdict)
            for each in explained.candidates
        ]
        print_table(("rule", "written", "read", "verdict"), rows, spare=("written",))
    else:
        typer.echo("no candidate: the text is empty, or all of it is a thought")
    answer = "none" if explained.value is None else explained.value
    typer.echo(f"answer ({explained.kind}): {literal(answer)}")


def _kind(kind: str) -> AnswerKind:
    for each in ANSWER_KINDS:
        if each == kind:
            return each
    raise InputError(f"no answer kind {kind!r}; it is one of {', '.join(ANSWER_KINDS)}")


def _read(file: Path) -> str:
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {reason(error)}") from error
    return data.decode("utf-8", errors="replace")
