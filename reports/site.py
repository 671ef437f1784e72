"""A folder of pages over many jobs: a report on each, an index with trends, and what was spent.

A page is made anew where what it shows changed since (rows, ledger, shadow samples, feedback, tables), so
that a site over a year of jobs is kept up in seconds; one whose ledger could not be read is made each time.
`site.json` says what was made from what, `spending.json` what is counted of each ledger. A copy of a job's
folder is the same job. Leaves out the pages themselves (`build`, `site_index`, `spending_page`).
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from viaticum import __version__
from viaticum.budgets import Ledger
from viaticum.budgets.records import digest
from viaticum.errors import BudgetError, InputError, MissingExtra, ViaticumError
from viaticum.files import atomic_write
from viaticum.jobs import JOB, ROWS, Job
from viaticum.reports.kept_spending import KeptSpending
from viaticum.reports.ledger_history import found_ledger
from viaticum.reports.numbers import read_numbers
from viaticum.reports.page import write_page, write_sections
from viaticum.reports.shadow import LIVE_OUTCOMES
from viaticum.reports.site_index import INDEX_LINKS, RUN_LINKS, SUMMARY, index_page, summary_of
from viaticum.reports.spending_page import NOTE, facts_of, spending_sections
from viaticum.shadow_samples import SHADOWS

FORMAT = 1
SITE, INDEX, SPENDING, SPENDING_CSV, RUNS = "site.json", "index.html", "spending.html", "spending.csv", "runs"
COUNTED = "spending.json"  # what was counted of each ledger
CSV_BY = ("week", "team", "key", "budget", "model")
FIELDS = {"path", "page", "state", *SUMMARY}  # of a run in `site.json`
_UNREADABLE = (BudgetError, MissingExtra, InputError, OSError, sqlite3.Error)  # a ledger
_SKIPPED = ("node_modules", "__pycache__")  # and hidden folders: no jobs are there


@dataclass(frozen=True)
class Site:
    """A site that was written.

    Attributes:
        index: its first page.
        runs: what `site.json` says of each job, the newest first.
        made: how many of their pages were made, the others being there already.
        warnings: jobs and ledgers that could not be read, and copies of jobs.
    """

    index: Path
    runs: list[dict[str, Any]]
    made: int
    warnings: tuple[str, ...]


def build_site(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    outcomes: Sequence[str | Path] | None = None,
    ledger: str | None = None,
    force: bool = False,
    report: Callable[[str, int, int], object] = lambda stage, done, total: None,
) -> Site:
    """Write or update a site of all jobs in some folders and below them.

    Args:
        folders: where jobs are looked for; hidden folders are left out, links are not followed.
        out: the folder of the site, made where it is missing.
        outcomes: tables with every single pair's answers.
        ledger: where the jobs' ledger is, in place of what they say.
        force: make every page anew, also in a folder that holds other files.
        report: called with a stage, how many are done, and of how many.

    Raises:
        InputError: no job is there, or the folder holds other files.
        MissingExtra: the extra `reports` is not installed.
    """
    site = Path(out)
    before = _read_before(site, force)
    found = [path for folder in folders for path in find_jobs(Path(folder), site)]
    found = list(dict.fromkeys(path.resolve() for path in found))
    if not found:
        raise InputError(
            f"no job in {', '.join(map(str, folders))}; name a folder that holds RESULTS.jsonl.job"
        )
    (site / RUNS).mkdir(parents=True, exist_ok=True)
    found, warnings = _without_copies(found, ledger)
    records, made, heads = list[dict[str, Any]](), 0, cache(_heads)
    for number, folder in enumerate(found):
        report("reports", number, len(found))
        state = _state_of(folder, outcomes, ledger, heads)
        record = before.get(str(folder))
        is_kept = record is not None and state and record["state"] == state
        if record is None or not is_kept or not (site / record["page"]).is_file():
            try:
                record = _write_run(folder, site, outcomes, ledger, state)
            except MissingExtra:
                raise
            except ViaticumError as error:
                warnings.append(f"left out: {folder}: {error}")
                continue
            made += 1
        records.append({**record, "path": str(folder)})
    report("reports", len(found), len(found))
    records.sort(key=lambda each: (each["began"], each["path"]), reverse=True)
    spending, more = _write_spending(found, site, ledger, force)
    warnings += more
    index = site / INDEX
    atomic_write(index, index_page(records, warnings, spending))
    document = {"format": FORMAT, "version": __version__, "runs": records}
    atomic_write(site / SITE, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    _remove_pages({each["page"] for each in before.values()} - {each["page"] for each in records}, site)
    return Site(index, records, made, tuple(warnings))


def find_jobs(folder: Path, site: Path | None = None) -> Iterator[Path]:
    """The folders of jobs in a folder and below it, or the job itself, in the order of their names.

    Args:
        site: left out.

    Raises:
        InputError: there is no such folder.
    """
    whole = folder.resolve()
    beside = whole.with_name(whole.name + ".job")
    if (beside / JOB).is_file():  # its RESULTS
        yield beside
        return
    if not folder.is_dir():
        raise InputError(f"no folder {folder} to look for jobs in")
    left_out = site.resolve() if site is not None else None
    for name, below, files in os.walk(folder):
        here = Path(name)
        if JOB in files and here.resolve().name.endswith(".job"):
            below.clear()
            yield here
        below[:] = sorted(
            each
            for each in below
            if not each.startswith(".") and each not in _SKIPPED and (here / each).resolve() != left_out
        )


def _read_before(site: Path, force: bool) -> dict[str, dict[str, Any]]:
    """By job, what the last site says; empty where there is none, or it is to be made anew."""
    if site.exists() and not site.is_dir():
        raise InputError(f"{site} is a file; name a folder for the pages")
    known = site / SITE
    if not known.is_file():
        if site.is_dir() and any(site.iterdir()) and not force:
            raise InputError(
                f"{site} holds other files; name an empty or a new folder, or write into it with --force"
            )
        return {}
    try:
        document = json.loads(known.read_text(encoding="utf-8"))
        if document["format"] != FORMAT or document["version"] != __version__:
            return {}
        runs = {each["path"]: each for each in document["runs"] if each.keys() >= FIELDS}
        return {path: {**each, "state": ""} for path, each in runs.items()} if force else runs
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # damaged: every page is made anew


def _address(job: Job, folder: Path, ledger: str | None) -> str:
    """The address or the whole path of a job's ledger; raises `InputError` where it is gone."""
    address = ledger or found_ledger(job.ledger, folder)
    return address if "://" in address else str(Path(address).resolve())


def _without_copies(folders: Sequence[Path], ledger: str | None) -> tuple[list[Path], list[str]]:
    """The folders, of copies of a job the one that changed last, and a warning of each other copy.

    Jobs are the same where one budget of one ledger pays.
    """
    same = dict[tuple[str, str], list[Path]]()
    for folder in folders:
        try:
            job = Job.load(folder)
        except ViaticumError:  # told where its page is made
            same["", str(folder)] = [folder]
            continue
        try:
            address = _address(job, folder, ledger)
        except InputError:
            address = job.ledger
        same.setdefault((address, job.budget), []).append(folder)
    newest = {max(copies, key=_changed_at): copies for copies in same.values()}
    warnings = [
        f"left out: {each}: it is the same job as {kept}, which changed last; both are of one budget in one"
        " ledger"
        for kept, copies in newest.items()
        for each in copies
        if each != kept
    ]
    return [each for each in folders if each in newest], warnings


def _changed_at(folder: Path) -> int:
    """When a job's rows or settings changed last, in ns."""
    return max(path.stat().st_mtime_ns for path in (folder / JOB, folder / ROWS) if path.is_file())


def _heads(address: str) -> dict[str, tuple[int, str]]:
    """By budget, the end of the chain its entries are in, which each entry moves; none if not readable."""
    try:
        with Ledger(address, read_only=True) as ledger:
            heads = ledger.chain_heads()
            above = {each.name: each.parent for each in ledger.budgets()}
    except _UNREADABLE:
        return {}
    found = {}
    for name in above:
        root = name
        while (parent := above.get(root)) is not None:
            root = parent
        if root in heads:
            found[name] = heads[root]
    return found


def _state_of(
    folder: Path,
    outcomes: Sequence[str | Path] | None,
    ledger: str | None,
    heads: Callable[[str], dict[str, tuple[int, str]]],
) -> str:
    """Changes when the job does, or what its report is made of; "" where the ledger does not tell."""
    try:
        job = Job.load(folder)
        address = _address(job, folder, ledger)
    except ViaticumError:
        return ""
    head = heads(address).get(job.budget)
    if head is None:
        return ""
    own = (folder / name for name in (JOB, ROWS, SHADOWS, LIVE_OUTCOMES))
    states = []
    for path in (*own, *map(Path, outcomes or ())):
        try:
            found = path.stat()
            states.append(f"{path} {found.st_size} {found.st_mtime_ns}")
        except OSError:
            states.append(f"{path} -")
    return digest([*states, address, *head])[:16]


def _write_run(
    folder: Path, site: Path, outcomes: Sequence[str | Path] | None, ledger: str | None, state: str
) -> dict[str, Any]:
    numbers = read_numbers([folder], outcomes=list(outcomes) if outcomes else None, ledger=ledger)
    (run,) = numbers.runs
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", run.run.name)[:60].strip("-.") or "run"
    page = f"{RUNS}/{kept}-{digest(str(folder))[:8]}.html"
    atomic_write(site / page, write_page(numbers, run.run.name, RUN_LINKS))
    return {"page": page, "state": state if run.history else "", **summary_of(run)}


def _write_spending(
    folders: Sequence[Path], site: Path, ledger: str | None, force: bool
) -> tuple[bool, list[str]]:
    """Write the page and the CSV of what the jobs' ledgers posted; whether there is one, and warnings.

    force: count all of it anew.
    """
    addresses, warnings = dict[str, None](), list[str]()
    for folder in folders:
        try:
            addresses[_address(Job.load(folder), folder, ledger)] = None
        except ViaticumError as error:
            warnings.append(f"not in the spending: {folder.name}: {error}")
    with ExitStack() as stack:
        ledgers = dict[str, Ledger]()
        for address in addresses:
            try:
                ledgers[address] = stack.enter_context(Ledger(address, read_only=True))
            except _UNREADABLE as error:
                warnings.append(f"not in the spending: the ledger at {address}: {error}")
        if not ledgers:
            for name in (SPENDING, SPENDING_CSV, COUNTED):
                (site / name).unlink(missing_ok=True)
            return False, warnings
        if force:
            (site / COUNTED).unlink(missing_ok=True)
        kept = KeptSpending(site / COUNTED, ledgers)
        (lines,) = kept.tables([CSV_BY])
        sections, sentence, notices = spending_sections(kept.tables)
        facts = (*(("ledger", address) for address in addresses), *facts_of({}))
        page = write_sections("Spending", sentence, notices, sections, facts, NOTE, INDEX_LINKS)
        atomic_write(site / SPENDING, page)
        atomic_write(site / SPENDING_CSV, lines.to_csv())
        kept.save()
    return True, warnings


def _remove_pages(pages: set[str], site: Path) -> None:
    """Remove the pages of jobs that are gone, as `site.json` named them; nothing outside their folder."""
    for page in pages:
        path = site / page
        if path.parent == site / RUNS and path.suffix == ".html":
            path.unlink(missing_ok=True)
