"""All numbers of a report, as frozen records and as JSON with stable keys: every format shows these alone.

Each part names its source, or says why it is missing. Leaves out text (`formatting`, `overview`,
`run_sections`) and drawing.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from viaticum import __version__
from viaticum.errors import DataError, InputError
from viaticum.outcomes import read_outcomes
from viaticum.reports import run_metrics
from viaticum.reports.comparison import RunComparison, compare
from viaticum.reports.frontier import CostAccuracyPlane, plane
from viaticum.reports.intervals import SEED, Share
from viaticum.reports.ledger_history import LedgerHistory, read_ledger_history
from viaticum.reports.other_budgets import OtherBudgets, other_budgets
from viaticum.reports.run_metrics import Calibration, Coverage, Loss, RouteMetrics, Tally, Writers
from viaticum.reports.run_reader import read_run
from viaticum.reports.runs import Group, Run, Texts
from viaticum.types import Outcome

Array = np.ndarray[Any, Any]
FORMAT = 1
NO_TABLE = (
    "no outcome table was given, so what single pairs do on these questions is not known; give one with"
    " --outcomes"
)


@dataclass(frozen=True, slots=True)
class Provider:
    """Calls whose cost the provider reported, and what the ledger posted for them, in nano-dollars."""

    calls: int
    reported: int
    posted: int
    differ: int


@dataclass(frozen=True, slots=True)
class RowsAgainstLedger:
    """What the rows say their calls cost, and what the ledger posted under the same keys."""

    calls: int
    rows: int
    posted: int
    differ: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """The planner's preview before the job spent anything, at its own budget; costs are of the whole job."""

    accuracy: float
    cost_p50: int
    cost_p90: int


@dataclass(frozen=True)
class RunNumbers:
    """All numbers of one run.

    Attributes:
        spent: nano-dollars; spent_source says whether the ledger, the rows or a table counted them.
        cost: mean nano-dollars a row.
        history: what the ledger says; None where it cannot be read.
        missing: by part, why it is not there.
        row_costs: nano-dollars [rows].
    """

    run: Run
    tally: Tally
    accuracy: Share | None
    accuracy_answered: Share | None
    spent: int
    spent_source: str
    cost: float | None
    all: RouteMetrics | None
    plane: CostAccuracyPlane | None
    forecast: Forecast | None
    routes: tuple[RouteMetrics, ...]
    calibration: Calibration | None
    tokens: Coverage | None
    costs: Coverage | None
    writers: Writers | None
    texts: Texts
    history: LedgerHistory | None
    against_rows: RowsAgainstLedger | None
    provider: Provider | None
    groups: tuple[Group, ...]
    losses: tuple[Loss, ...]
    other_budgets: OtherBudgets | None
    missing: dict[str, str]
    row_costs: Array


@dataclass(frozen=True)
class Numbers:
    """The numbers of a report: its runs, and each further run compared with the first."""

    runs: tuple[RunNumbers, ...]
    comparisons: tuple[RunComparison, ...]
    seed: int = SEED

    def to_json(self) -> dict[str, Any]:
        """Amounts are nano-dollars, times are seconds; a number that is not known is null."""
        return {
            "format": FORMAT,
            "version": __version__,
            "seed": self.seed,
            "runs": [_run_json(each) for each in self.runs],
            "comparison": [_plain(each) for each in self.comparisons],
        }


def read_numbers(
    runs: Sequence[str | Path],
    *,
    outcomes: str | Path | Sequence[str | Path] | None = None,
    ledger: str | None = None,
) -> Numbers:
    """Read runs and count.

    Args:
        runs: folders of jobs, their RESULTS files, or outcome tables.
        outcomes: a table, or several, with every single pair's answers to these questions.
        ledger: where the jobs' ledger is, in place of what they say.

    Raises:
        InputError: a path is no run.
        DataError: a run or the table is damaged.
    """
    if not runs:
        raise InputError("no run to report on; name a job's folder or an outcome table")
    tables = [outcomes] if isinstance(outcomes, str | Path) else list(outcomes or ())
    where = ", ".join(map(str, tables))
    with _collector_paused():
        table = tuple(read_outcomes(*tables))
        if tables and not table:
            raise DataError(f"the outcome table {where} is empty; profile at least one question")
        read = _named([read_run(path) for path in runs])
        first, *others = [_numbers(run, table, where, ledger) for run in read]
    comparisons = tuple(compare(first.run, first.row_costs, each.run, each.row_costs) for each in others)
    return Numbers((first, *others), comparisons)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection: it would look at hundreds of thousands of rows again and again, in vain."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _named(runs: list[Run]) -> list[Run]:
    """Runs of one name get the name of their folder in front, then a number."""
    from dataclasses import replace

    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    longer = [f"{Path(run.path).resolve().parent.name}/{run.name}" for run in runs]
    if len(set(longer)) < len(longer):
        longer = [f"{name} ({n})" for n, name in enumerate(names, 1)]
    return [replace(run, name=name) for run, name in zip(runs, longer, strict=True)]


def _numbers(run: Run, table: Sequence[Outcome], where: str, ledger: str | None) -> RunNumbers:
    missing: dict[str, str] = {}
    history = _history(run, ledger, missing)
    costs, from_ledger = run_metrics.row_costs(run, history)
    if not len(run.rows):
        missing["rows"] = "no row is finished yet"
    position, known = None, None
    outcomes, where = (table, where) if table else (run.outcomes, run.path)
    if outcomes:
        position, known = plane(run, costs, outcomes, where)
    else:
        missing["plane"] = NO_TABLE
    accuracy = run_metrics.accuracy(run.rows)
    if accuracy is None and "rows" not in missing:
        missing["accuracy"] = "no row has a known right answer; give the input a column `answer` or `gold`"
    count = run_metrics.tally(run)
    spent = history.posted if history else int(costs.sum())
    rows = run.rows
    calibration = run_metrics.calibration(rows)
    if calibration is None:
        missing["calibration"] = _why_no_prediction(run, "accuracy was predicted")
    tokens = run_metrics.coverage(rows.tokens, rows.tokens_p50, rows.tokens_p90, rows)
    if tokens is None:
        missing["tokens"] = _why_no_prediction(run, "output tokens were predicted")
    writers = run_metrics.writers(run, history)
    if writers is None:
        missing["writers"] = "no call was made yet"
    if not run.texts.phases:
        missing["texts"] = (
            "no text of this run was written by several models or has thinking, or the job keeps no texts"
        )
    provider = _provider(run, history)
    if provider is None and "ledger" not in missing:
        missing["provider"] = (
            "no call of this run came with a cost of its provider's: local models have none, and not every"
            " provider says"
        )
    return RunNumbers(
        run=run,
        tally=count,
        accuracy=accuracy,
        accuracy_answered=run_metrics.accuracy(rows, answered_only=True),
        spent=spent,
        spent_source="ledger" if history else "outcome table" if run.kind == "outcome table" else "rows",
        cost=float(costs.mean()) if len(rows) else None,
        all=run_metrics.in_all(run, costs, known),
        plane=position,
        forecast=_forecast(run),
        routes=tuple(run_metrics.by_route(run, costs, known)),
        calibration=calibration,
        tokens=tokens,
        costs=run_metrics.coverage(costs.astype(float), rows.cost_p50, rows.cost_p90, rows),
        writers=writers,
        texts=run.texts,
        history=history,
        against_rows=_against_rows(run, history) if from_ledger else None,
        provider=provider,
        groups=run.groups,
        other_budgets=other_budgets(run, costs, known, spent),
        losses=() if known is None or run.single else tuple(run_metrics.losses(run, costs, known)),
        missing=missing,
        row_costs=costs,
    )


def _history(run: Run, ledger: str | None, missing: dict[str, str]) -> LedgerHistory | None:
    if run.job is None:
        missing["ledger"] = "an outcome table has no ledger"
        return None
    try:
        return read_ledger_history(run.job, run.calls.keys(), run.path, ledger, run.cached)
    except InputError as error:
        missing["ledger"] = str(error)
        return None


def _why_no_prediction(run: Run, what: str) -> str:
    if not len(run.rows):
        return "no row is finished yet"
    if run.kind == "outcome table":
        return "an outcome table holds no predictions"
    return f"no row that was tried says what {what}"


def _forecast(run: Run) -> Forecast | None:
    if run.job is None or run.job.limit_nanousd is None:
        return None
    own = [each for each in run.job.previews if each.budget_nanousd == run.job.limit_nanousd]
    return Forecast(own[0].accuracy, own[0].cost_p50, own[0].cost_p90) if own else None


def _provider(run: Run, history: LedgerHistory | None) -> Provider | None:
    if history is None:
        return None
    both = [
        (reported, history.posted_for[key])
        for key, (_, _, reported) in run.calls.items()
        if reported is not None and key in history.posted_for
    ]
    if not both:
        return None
    differ = sum(abs(one - other) > max(1, other // 100) for one, other in both)
    return Provider(len(both), sum(one for one, _ in both), sum(other for _, other in both), differ)


def _against_rows(run: Run, history: LedgerHistory | None) -> RowsAgainstLedger | None:
    if history is None:
        return None
    both = [
        (cost, history.posted_for[key])
        for key, (_, cost, _) in run.calls.items()
        if key in history.posted_for
    ]
    differ = sum(one != other for one, other in both)
    return RowsAgainstLedger(len(both), sum(one for one, _ in both), sum(other for _, other in both), differ)


def _run_json(each: RunNumbers) -> dict[str, Any]:
    run, history = each.run, each.history
    numbers = {
        field.name: _plain(getattr(each, field.name))
        for field in fields(each)
        if field.name not in ("run", "history", "texts", "groups", "row_costs", "all")
    }
    ledger = _plain(history)
    if ledger is not None:
        del ledger["posted_for"]
    return {
        "name": run.name,
        "path": run.path,
        "kind": run.kind,
        "single": run.single or None,
        "job": _plain(run.job),
        "warnings": list(run.warnings),
        **numbers,
        "in_all": _plain(each.all),
        "texts": {
            "count": each.texts.count,
            "thought": each.texts.thought,
            "parts": _plain(each.texts.parts),
            "phases": [
                {"phase": phase, "model": model, "parts": parts}
                for (phase, model), parts in each.texts.phases.items()
            ],
        },
        "ledger": ledger,
        "failures": [_plain(group) for group in each.groups],
    }


def _plain(value: Any) -> Any:
    """As JSON holds it: records as objects, what is no number as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(each) for name, each in asdict(value).items()}
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Iterable):
        return [_plain(each) for each in value]
    return value
