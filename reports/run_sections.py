"""The sections of one run: routes, losses, writers, budget, accounts, failures.

Those of the router are in `router_sections`, those of other budgets in `other_budgets_section`.
"""

from __future__ import annotations

from pathlib import Path

from viaticum.reports import run_charts
from viaticum.reports.formatting import (
    NONE,
    count,
    per_1000,
    percent,
    sentence,
    share_text,
    signed_usd,
    span,
    times,
    usd,
)
from viaticum.reports.numbers import RunNumbers
from viaticum.reports.other_budgets_section import other_budgets_section
from viaticum.reports.router_sections import calibration_section, forecasts_section, router_section
from viaticum.reports.runs import PARTS, PHASES, THINKING, Texts
from viaticum.reports.sections import LEDGER, LEDGER_ROWS, ROWS, TABLE, Section, Table
from viaticum.reports.shadow import shadow_section


def sections_of(numbers: RunNumbers) -> list[Section]:
    sections = [
        _routes(numbers),
        router_section(numbers),
        calibration_section(numbers),
        other_budgets_section(numbers),
        _losses(numbers),
        forecasts_section(numbers),
        _writers(numbers),
        _budget(numbers),
        _accounts(numbers),
        shadow_section(Path(numbers.run.path)),
        _failures(numbers),
    ]
    return [section for section in sections if section is not None]


def _routes(numbers: RunNumbers) -> Section:
    title = "Routes"
    source = (LEDGER_ROWS if numbers.history else TABLE if numbers.run.job is None else ROWS) + (
        f"; {TABLE}" if numbers.plane and numbers.run.job else ""
    )
    if not numbers.routes or numbers.all is None:
        return Section(
            "routes", title, source, empty=sentence(numbers.missing.get("rows", "no route was taken"))
        )
    with_regret = any(each.regret is not None for each in numbers.routes)
    with_predicted = any(each.predicted is not None for each in numbers.routes)
    columns = [
        ("route", False),
        ("rows", True),
        ("share", True),
        ("right (95%)", True),
        *([("predicted", True)] if with_predicted else []),
        ("per 1,000", True),
        ("p50 / p95", True),
        ("escalated", True),
    ]
    columns += [("regret", True)] if with_regret else []
    shown = [*numbers.routes, numbers.all] if len(numbers.routes) > 1 else list(numbers.routes)
    rows = [
        (
            each.route,
            f"{each.of.count:,}",
            percent(each.of.value),
            share_text(each.accuracy),
            *([percent(each.predicted)] if with_predicted else []),
            per_1000(each.cost),
            times(each),
            percent(each.escalated.value) if each.escalated else NONE,
            *([percent(each.regret.value) if each.regret else NONE] if with_regret else []),
        )
        for each in shown
    ]
    notes = [
        "Escalated: rows that took more than one call. Cost is per 1,000 rows of the route; time is of a"
        " row's calls."
    ]
    notes += (
        ["Regret: rows not right though some single pair of the outcome table is right on that question."]
        if with_regret
        else [
            "Regret is not known: "
            + (numbers.missing.get("plane") or "the outcome table is about other questions")
            + "."
        ]
    )
    if numbers.all.overpaid is not None:
        notes.append(
            f"Right rows cost {per_1000(numbers.all.overpaid)} per 1,000 above the cheapest pair that is"
            " right."
        )
    return Section(
        "routes",
        title,
        source,
        tables=(Table("What each route got, cost and took", tuple(columns), tuple(rows)),),
        notes=tuple(notes),
    )


def _losses(numbers: RunNumbers) -> Section | None:
    plane = numbers.plane
    if not numbers.losses or plane is None:
        return None
    rows = tuple(
        (
            each.id,
            each.route,
            "right" if each.right else f"wrong, {each.pairs_right} of {len(plane.singles)} right",
            usd(each.cost),
            each.better,
            usd(each.better_cost),
        )
        for each in numbers.losses
    )
    columns = (
        ("row", False),
        ("route", False),
        ("it was", False),
        ("paid", True),
        ("cheapest right pair", False),
        ("its cost", True),
    )
    return Section(
        "losses",
        "Where it lost most",
        f"{LEDGER_ROWS if numbers.history else ROWS}; {TABLE}",
        tables=(Table("Rows that lost most against the cheapest right pair", columns, rows),),
        notes=(
            "Rows that are wrong or have no answer come first, with how many single pairs are right; then"
            " right rows that were paid too much for. The cheapest right pair is known in hindsight alone.",
        ),
    )


def _writers(numbers: RunNumbers) -> Section:
    title, writers = "Who wrote", numbers.writers
    source = LEDGER if numbers.history else TABLE if numbers.run.job is None else ROWS
    if writers is None:
        return Section("writers", title, source, empty=sentence(numbers.missing["writers"]))
    columns: list[tuple[str, bool]] = [
        ("model", False),
        ("tokens read", True),
        ("tokens written", True),
        ("share written", True),
    ]
    columns += [("cost", True)] if numbers.history else []
    rows = tuple(
        (
            each.model,
            f"{each.input_tokens:,}",
            f"{each.output_tokens:,}",
            percent(each.share),
            *([usd(each.nanousd)] if numbers.history else []),
        )
        for each in writers.models
    )
    texts = numbers.texts
    lead = _texts_lead(texts, writers.large) if texts.phases else [sentence(numbers.missing["texts"])]
    chart = run_charts.writers_chart(texts)
    return Section(
        "writers",
        title,
        source if not texts.phases else f"{source}; {ROWS}",
        tuple(lead),
        (chart,) if chart else (),
        (Table("Tokens by model", tuple(columns), rows),),
        data=(_parts_table(numbers),) if chart else (),
        written=tuple(texts.shown),
        large=writers.large,
    )


def _texts_lead(texts: Texts, large: str) -> list[str]:
    """Who wrote how much: of texts by several models, and of thinking and answers."""
    lead = []
    if texts.count:
        wrote = {name: sum(parts) for name, parts in texts.parts.items()}
        total = sum(wrote.values())
        share = (
            f"{large}, the larger model, wrote {percent(wrote[large] / total)}"
            if large
            else "; ".join(f"{name} wrote {percent(amount / total)}" for name, amount in wrote.items())
        )
        lead.append(
            f"Of {count(texts.count, 'text')} that several models wrote together, {share}, counted in"
            " characters."
        )
    if texts.thought:
        wrote = dict.fromkeys(PHASES, 0.0)
        for (phase, _), parts in texts.phases.items():
            wrote[phase] += sum(parts)
        share = percent(wrote[THINKING] / sum(wrote.values()))
        lead.append(f"{count(texts.thought, 'text')} with thinking; {share} of all characters are thinking.")
    return lead


def _parts_table(numbers: RunNumbers) -> Table:
    strips = run_charts.labelled_phases(numbers.texts)
    step = 100 // PARTS
    rows = []
    for part in range(PARTS):
        total = sum(parts[part] for _, parts in strips) or 1.0
        shares = (percent(parts[part] / total) for _, parts in strips)
        rows.append((f"{part * step}% to {part * step + step}%", *shares))
    columns = (("position in the text", False), *((name, True) for name, _ in strips))
    return Table("Share of the text by position", columns, tuple(rows))


def _budget(numbers: RunNumbers) -> Section:
    title, history = "Budget", numbers.history
    if history is None:
        return Section("budget", title, LEDGER, empty=sentence(numbers.missing["ledger"]))
    chart = run_charts.burn_chart(history)
    lead = [
        f"{usd(history.posted)} was spent in {count(history.calls, 'call')}"
        + (
            f", {usd(history.limit - history.before - history.posted - history.held)} of {usd(history.limit)}"
            " is left"
            if history.limit
            else ""
        )
        + f"; at most {usd(history.highest)} was spent and held at once."
    ]
    if history.window:
        lead.append(
            f"The limit holds for each {history.window}; the line shows spending since the job began."
        )
    rows = [
        ("spent", f"{history.calls:,}", usd(history.posted)),
        ("of it by calls that no row names", f"{history.unnamed_calls:,}", usd(history.unnamed)),
        ("spent in this budget before the job", NONE, usd(history.before)),
        ("still held", f"{history.held_calls:,}", usd(history.held)),
        ("of it unknown: sent, and never heard of again", f"{history.unknown_calls:,}", usd(history.unknown)),
        ("overruns: above what was held", f"{history.overrun_calls:,}", usd(history.overrun)),
        ("freed: the call was not made, or cost nothing", f"{history.voided:,}", NONE),
        ("expired: held and never sent", f"{history.expired:,}", NONE),
    ]
    table = Table(
        "What became of the budget", (("entries", False), ("calls", True), ("amount", True)), tuple(rows)
    )
    data = [_moments_table(numbers)] if chart else []
    tables = [table]
    if history.overruns:
        marks = tuple(
            (mark.key, span(max(0.0, mark.seconds)), usd(mark.nanousd)) for mark in history.overruns[:5]
        )
        tables.append(
            Table("Largest overruns", (("call", False), ("after", True), ("above its hold", True)), marks)
        )
    note = (
        "The ledger was played again from its first entry and agrees with itself."
        if history.checked and not history.wrong
        else (
            "The ledger is long and was not played again here: viaticum budget verify does."
            if not history.checked
            else f"The ledger does not agree with itself: {'; '.join(history.wrong)}."
        )
    )
    return Section(
        "budget",
        title,
        LEDGER,
        tuple(lead),
        (chart,) if chart else (),
        tuple(tables),
        tuple(data),
        notes=(note,),
    )


def _moments_table(numbers: RunNumbers) -> Table:
    assert numbers.history is not None
    moments = numbers.history.moments
    step = max(1, len(moments) // 20)
    shown = [*moments[::step], *([moments[-1]] if (len(moments) - 1) % step else [])]
    rows = tuple(
        (span(max(0.0, each.seconds)), usd(each.posted), usd(each.committed - each.posted)) for each in shown
    )
    return Table(
        "Spent and held over time", (("after", False), ("spent", True), ("held at most", True)), rows
    )


def _accounts(numbers: RunNumbers) -> Section:
    title, history = "Ledger against provider", numbers.history
    source = f"{LEDGER}; {ROWS}"
    if history is None:
        return Section("accounts", title, source, empty=sentence(numbers.missing["ledger"]))
    rows, lead = [], []
    if (from_rows := numbers.against_rows) is not None:
        rows.append(
            (
                "what the rows say",
                f"{from_rows.calls:,}",
                usd(from_rows.rows),
                usd(from_rows.posted),
                signed_usd(from_rows.rows - from_rows.posted),
                f"{from_rows.differ:,}",
            )
        )
    if (provider := numbers.provider) is not None:
        rows.append(
            (
                "what providers say",
                f"{provider.calls:,}",
                usd(provider.reported),
                usd(provider.posted),
                signed_usd(provider.reported - provider.posted),
                f"{provider.differ:,}",
            )
        )
        share = (provider.reported - provider.posted) / provider.posted if provider.posted else 0.0
        lead.append(
            f"Providers reported {usd(provider.reported)} for calls that the ledger posted at"
            f" {usd(provider.posted)}: {100 * share:+.2f}%.".replace("-", "−")
        )
    else:
        lead.append(sentence(numbers.missing["provider"]))
    columns = (
        ("account", False),
        ("calls", True),
        ("they say", True),
        ("ledger", True),
        ("difference", True),
        ("calls that differ", True),
    )
    notes = ["A provider's cost differs where it is more than 1% off."] if provider else []
    if history.missing:
        notes.append(
            f"{count(history.missing, 'call')} that the rows name {'has' if history.missing == 1 else 'have'}"
            " no posted entry in the ledger."
        )
    return Section(
        "accounts",
        title,
        source,
        tuple(lead),
        tables=(Table("Accounts", columns, tuple(rows)),),
        notes=tuple(notes),
    )


def _failures(numbers: RunNumbers) -> Section:
    title = "Failures"
    source = TABLE if numbers.run.job is None else ROWS
    if not numbers.groups:
        return Section(
            "failures",
            title,
            source,
            empty=sentence(numbers.missing.get("rows", "no row failed, was skipped or is known to be wrong")),
        )
    order = {"failed": 0, "skipped": 1, "no answer": 2, "wrong": 3}
    groups = sorted(numbers.groups, key=lambda group: (order[group.state], -group.count))
    of = len(numbers.run.rows)
    rows = tuple(
        (f"{group.state}: {group.reason}", f"{group.count:,}", percent(group.count / of))
        for group in groups[:20]
    )
    notes = [f"{len(groups) - 20} rarer reasons are in the JSON."] if len(groups) > 20 else []
    table = Table(
        "What came to nothing, and why", (("what and why", False), ("rows", True), ("share", True)), rows
    )
    return Section(
        "failures", title, source, tables=(table,), failures=tuple(groups[:20]), of=of, notes=tuple(notes)
    )
