"""Building a report: numbers are read, a format is written, and the file appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from viaticum.errors import InputError
from viaticum.files import atomic_write
from viaticum.reports.numbers import Numbers, read_numbers

Format = Literal["html", "md", "json", "png"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Report:
    """A report that was written: where, how, and its numbers."""

    path: Path
    format: Format
    numbers: Numbers


def build(
    runs: Sequence[str | Path] | str | Path,
    out: str | Path,
    *,
    format: Format | None = None,
    outcomes: str | Path | Sequence[str | Path] | None = None,
    ledger: str | None = None,
    title: str | None = None,
    force: bool = False,
) -> Report:
    """Write a report on runs, the first of which the others are compared with.

    Args:
        runs: folders of jobs, their RESULTS files, or outcome tables.
        out: the file to write; it appears whole or not at all.
        format: by default what the name of `out` ends in; HTML where it ends in none.
        outcomes: a table, or several, with every single pair's answers to these questions, to compare with.
        ledger: where the jobs' ledger is, in place of what they say.
        title: by default the runs' names.
        force: write over a file that is there.

    Raises:
        InputError: a path is no run, or the file is there or cannot be written.
        DataError: a run is damaged.
        MissingExtra: the extra `reports` is not installed; JSON and Markdown need none.
    """
    asked = [runs] if isinstance(runs, str | Path) else list(runs)
    path = Path(out)
    kind = _format(path, format)
    _refuse(path, force)
    numbers = read_numbers(asked, outcomes=outcomes, ledger=ledger)
    atomic_write(path, render(numbers, kind, title=title))
    return Report(path, kind, numbers)


def render(numbers: Numbers, format: Format = "html", *, title: str | None = None) -> bytes:
    """The report as the bytes of a file."""
    named = title or _title([each.run.name for each in numbers.runs])
    if format == "json":
        return (json.dumps(numbers.to_json(), ensure_ascii=False, allow_nan=False, indent=1) + "\n").encode()
    if format == "md":
        from viaticum.reports.markdown import write_markdown

        return write_markdown(numbers, named).encode()
    if format == "png":
        from viaticum.reports.cost_accuracy_chart import cost_accuracy_chart

        chart = cost_accuracy_chart(numbers.runs)
        if chart is None:
            raise InputError(
                "no run has an accuracy yet, so there is no plane to draw; ask for html, md or json"
            )
        return chart.png()
    from viaticum.reports.page import write_page

    return write_page(numbers, named).encode()


def _title(names: Sequence[str]) -> str:
    others = " and ".join(filter(None, [", ".join(names[1:-1]), *names[-1:]])) if len(names) > 1 else ""
    return f"{names[0]} against {others}" if others else names[0]


def _format(path: Path, asked: str | None) -> Format:
    if asked is None:
        endings: dict[str, Format] = {"": "html", ".htm": "html", **{f".{each}": each for each in FORMATS}}
        suffix = path.suffix.lower()
        if suffix not in endings:
            raise InputError(
                f"no report ends in {suffix}: end {path.name} in .html, .md, .json or .png, or say --format"
            )
        return endings[suffix]
    for each in FORMATS:
        if asked == each:
            return each
    raise InputError(f"unknown format {asked!r}; use {', '.join(FORMATS)}")


def _refuse(path: Path, force: bool) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file, such as {path / 'report.html'}")
    if path.exists() and not force:
        raise InputError(f"{path} is there already; name another file, or write over it with --force")
    if not path.parent.is_dir():
        raise InputError(f"no folder {path.parent} to write {path.name} to; make it first")
