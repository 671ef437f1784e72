"""`viaticum tokens`: label a pair's tokens, train a token router on them, see how good it is, set its threshold.

Results go to stdout, progress to stderr. Leaves out errors and exit codes: `viaticum.cli` turns a `ViaticumError` into
one line and exit code 1.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from viaticum.commands.models import CatalogueFile, JsonFlag

app = typer.Typer(no_args_is_help=True, help="Learn which tokens a small model may write (R2R).")

Labels = Annotated[Path, typer.Argument(help="A folder of labels.", metavar="LABELS")]
RouterFolder = Annotated[Path, typer.Argument(help="The folder of a token router.", metavar="DIR")]
Slots = Annotated[int, typer.Option(help="Texts written at once.", min=1)]


@app.command()
def label(
    questions: Annotated[Path, typer.Argument(help="JSONL with a question a line; answers are not needed.")],
    pair: Annotated[str, typer.Option(help="A pair of the catalogue.")],
    out: Annotated[
        Path, typer.Option(help="The folder of labels; one that was begun goes on.", metavar="LABELS")
    ],
    strategy: Annotated[str, typer.Option(help="How the questions are asked.")] = "cot",
    verifier: Annotated[str, typer.Option(help="outcome, semantic, llm or llm:MODEL")] = "outcome",
    also: Annotated[
        str, typer.Option(help="More verifiers, with commas; their labels are kept beside.")
    ] = "",
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions.", min=1)] = None,
    skip: Annotated[int, typer.Option(help="Leave out the first so many questions.", min=0)] = 0,
    slots: Slots = 16,
    seed: Annotated[int, typer.Option(help="Of strategies that sample.")] = 0,
    sentence_cap: Annotated[
        int, typer.Option(help="Most tokens of a continuation that need not end.", min=1)
    ] = 128,
    step_tokens: Annotated[int, typer.Option(help="Tokens a call of the small model reads.", min=1)] = 4,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Find the tokens at which the small model would leave the large one's path; goes on after a kill."""
    from viaticum.agents.questions import read_questions
    from viaticum.agents.token_labels import Settings
    from viaticum.agents.token_labels import label as run
    from viaticum.catalogue import Catalogue

    asked = read_questions(questions, limit=None if limit is None else limit + skip)[skip:]
    with _Bar() as bar:
        run(
            asked, pair, out,
            catalogue=Catalogue.load(catalogue), verifiers=_names(verifier, also), slots=slots,
            settings=Settings(strategy, seed, sentence_cap, step_tokens), report=bar.report,
        )  # fmt: skip
    _tell(out, as_json)


@app.command()
def verify(
    labels: Labels,
    verifier: Annotated[str, typer.Option(help="outcome, semantic, llm or llm:MODEL, with commas")],
    slots: Slots = 16,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Let more verifiers judge what was labelled, to see how far they agree."""
    from viaticum.agents.token_labels import verify as run
    from viaticum.catalogue import Catalogue

    with _Bar() as bar:
        run(labels, _names(verifier), catalogue=Catalogue.load(catalogue), slots=slots, report=bar.report)
    _tell(labels, as_json)


@app.command()
def stats(labels: Labels, as_json: JsonFlag = False) -> None:
    """Shares of identical, neutral and divergent tokens, their entropies, and how far verifiers agree."""
    _tell(labels, as_json)


def _names(*texts: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for text in texts for name in text.split(",") if name.strip()))


def _tell(labels: Path, as_json: bool) -> None:
    from viaticum.routers.token.label_stats import KINDS, statistics

    told = statistics(labels)
    if as_json:
        typer.echo(json.dumps(told))
        return
    table = Table("verifier", "tokens are", "count", "share", "entropy", "nats", box=None, pad_edge=False)
    for verifier, of in told["verifiers"].items():
        for kind in KINDS:
            facts = of[kind]
            table.add_row(
                verifier, kind, str(facts["tokens"]), f"{facts['share']:.1%}",
                _number(facts["entropy"], 4), _number(facts["nats"], 2),
            )  # fmt: skip
    Console(width=max(90, Console().width)).print(table)
    for each in told["agreement"]:
        a, b = each["verifiers"]
        typer.echo(
            f"{a} and {b} agree on {_number(each['share'], 3)} of {each['differences']} differences, "
            f"kappa {_number(each['kappa'], 2)}"
        )
    typer.echo(f"{told['questions']} texts, {told['tokens']} tokens, {told['differing']} differ")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


class _Bar:
    """The stage at hand on stderr; where that is no terminal, a line now and then with the time that is left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("loading", total=None)
        self._stage, self._first, self._began, self._said = "", 0, 0.0, 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def report(self, stage: str, done: int, of: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._progress.reset(self._task, total=of, description=stage)
            self._stage, self._first, self._began, self._said = stage, done, now, 0.0
        self._progress.update(self._task, completed=done, total=of)
        if not self._console.is_terminal and (now - self._said > 10 or done == of):
            left = (now - self._began) / (done - self._first) * (of - done) if done > self._first else None
            estimate = "" if left is None else f", {left:.0f} s left"
            sys.stderr.write(f"{stage}: {done}/{of}, {now - self._began:.0f} s{estimate}\n")
            self._said = now
