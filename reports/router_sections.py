"""The sections on a run's router: what it knew, how right it was, and what it foresaw of tokens and cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from viaticum.reports import run_charts
from viaticum.reports.formatting import NONE, count, percent, points, sentence, share_text
from viaticum.reports.numbers import RunNumbers
from viaticum.reports.run_metrics import Coverage
from viaticum.reports.sections import LEDGER_ROWS, ROWS, Section, Table

JOB = "settings of the job"
_KINDS = {
    "fitted": "fitted: a prediction for each question",
    "table": "a table: the same figures for every question",
    "prior": "prior: public figures, no outcome of the model",
    "given": "a router of the caller's own, which does not say",
}
MOST_NAMES = 4


def router_section(numbers: RunNumbers) -> Section | None:
    """None for an outcome table, which no router chose for."""
    job, title = numbers.run.job, "What the router knew"
    if job is None:
        return None
    known: list[Mapping[str, Any]] = job.memory.get("knowledge") or []
    if not known:
        return Section("router", title, JOB, empty="The job was made by a version that did not keep this.")
    rows = tuple(
        (
            _KINDS.get(str(each.get("kind")), str(each.get("kind"))),
            _names(each.get("models") or ()),
            _datasets(each),
            f"{each['questions']:,}" if each.get("questions") else NONE,
            str(each.get("date") or NONE),
        )
        for each in known
    )
    columns = (
        ("its predictions", False),
        ("of models", False),
        ("from", False),
        ("questions", True),
        ("date", True),
    )
    return Section(
        "router",
        title,
        JOB,
        tuple(_router_lead(numbers, known)),
        tables=(Table("What the router's predictions rest on", columns, rows),),
    )


def _router_lead(numbers: RunNumbers, known: list[Mapping[str, Any]]) -> list[str]:
    lines, seen = [], numbers.run.rows.seen
    known_rows = int((seen >= 0).sum())
    if known_rows:
        among = int((seen == 1).sum())
        lines.append(
            f"Of {count(known_rows, 'row')} of this run it was fitted on {among:,}"
            + ("." if among else ": none of these questions was known to it.")
        )
    errors = [each["calibration_error"] for each in known if each.get("calibration_error") is not None]
    if errors:
        lines.append(
            f"On questions that it was not fitted on, its calibration error was {percent(errors[0])}."
        )
    if numbers.calibration is not None:
        lines.append(f"{calibration_text(numbers)} See Calibration below.")
    return lines


def calibration_text(numbers: RunNumbers) -> str:
    """What was predicted, and what came of it, in one sentence."""
    found = numbers.calibration
    assert found is not None
    return (
        f"Here it predicted {percent(found.predicted)} right, and {percent(found.right)} of "
        f"{count(found.of, 'row')} were; calibration error {percent(found.error)}."
    )


def _names(names: Any) -> str:
    names = [str(name) for name in names]
    more = f" and {len(names) - MOST_NAMES + 1} more" if len(names) > MOST_NAMES else ""
    return (", ".join(names[: MOST_NAMES - 1] if more else names) + more) or NONE


def _datasets(each: Mapping[str, Any]) -> str:
    """Data sets with their questions, the largest first."""
    found = sorted((each.get("datasets") or {}).items(), key=lambda item: -item[1])
    several = len(found) > 1
    text = _names([f"{name} ({number:,})" if several else name for name, number in found])
    return f"{text} ({each['about']})" if each.get("about") and found else text


def calibration_section(numbers: RunNumbers) -> Section:
    title, calibration = "Calibration", numbers.calibration
    if calibration is None:
        return Section("calibration", title, ROWS, empty=sentence(numbers.missing["calibration"]))
    lead = (
        (
            f"Expected calibration error {percent(calibration.error)} over {count(calibration.of, 'row')};"
            f" Brier score {calibration.brier:.3f}. On average {percent(calibration.predicted)} were"
            f" predicted to be right and {percent(calibration.right)} were: {points(calibration.surplus)}."
        ),
    )
    rows = tuple(
        (
            f"{each.begin:.0%} to {each.end:.0%}",
            f"{each.right.of:,}",
            percent(each.predicted),
            share_text(each.right),
        )
        for each in calibration.bins
    )
    columns = (("predicted", False), ("rows", True), ("mean predicted", True), ("right (95%)", True))
    data = Table("Right answers by predicted accuracy", columns, rows)
    notes = ("Of the rows that were tried and whose right answer is known.",)
    return Section(
        "calibration",
        title,
        ROWS,
        lead,
        (run_charts.calibration_chart(calibration),),
        data=(data,),
        notes=notes,
    )


def forecasts_section(numbers: RunNumbers) -> Section:
    title = "Predicted and real tokens"
    if numbers.tokens is None and numbers.costs is None:
        return Section(
            "forecasts", title, ROWS, empty=sentence(numbers.missing.get("tokens", "nothing was predicted"))
        )
    rows = [
        (
            name,
            _expected(each),
            share_text(each.within_p50),
            share_text(each.within_p90),
            f"{each.ratio:.2f}" if each.ratio else NONE,
        )
        for name, each in (("output tokens", numbers.tokens), ("cost", numbers.costs))
        if each is not None
    ]
    columns = (
        ("measure", False),
        ("rows", True),
        ("within p50 (wanted: 50%)", True),
        ("within p90 (wanted: 90%)", True),
        ("real / predicted", True),
    )
    table = Table("How often what a row took stayed within what was predicted", columns, tuple(rows))
    charts = (run_charts.tokens_chart(numbers.tokens),) if numbers.tokens and numbers.tokens.dots else ()
    notes = (
        (
            "Of the rows that were tried, without those answered from an earlier identical call. Real by"
            " predicted: sums, against the median."
        ),
    )
    lead = (sentence(numbers.missing["tokens"]),) if numbers.tokens is None else ()
    return Section(
        "forecasts", title, LEDGER_ROWS if numbers.history else ROWS, lead, charts, (table,), notes=notes
    )


def _expected(each: Coverage) -> str:
    known = each.within_p50 or each.within_p90
    return f"{known.of:,}" if known else NONE
