"""What a report says of one run, section by section: routes, calibration, forecasts, writers, budget, accounts, failures."""

from __future__ import annotations

from viaticum.reports import charts
from viaticum.reports.figures import Coverage
from viaticum.reports.formatting import (
    NONE,
    count,
    of_share,
    per_1000,
    percent,
    points,
    sentence,
    signed_usd,
    span,
    times,
    usd,
)
from viaticum.reports.numbers import RunNumbers
from viaticum.reports.parts import LEDGER, LEDGER_ROWS, ROWS, TABLE, Section, Table


def sections_of(told: RunNumbers) -> list[Section]:
    made = [
        _routes(told),
        _calibration(told),
        _forecasts(told),
        _writers(told),
        _budget(told),
        _accounts(told),
        _failures(told),
    ]
    return [section for section in made if section is not None]


def _routes(told: RunNumbers) -> Section:
    title = "Routes"
    source = (LEDGER_ROWS if told.trail else TABLE if told.run.job is None else ROWS) + (
        f"; {TABLE}" if told.plane and told.run.job else ""
    )
    if not told.routes or told.all is None:
        return Section(
            "routes", title, source, empty=sentence(told.missing.get("rows", "no route was taken"))
        )
    with_regret = any(each.regret is not None for each in told.routes)
    columns = [
        ("route", False),
        ("rows", True),
        ("share", True),
        ("right (95%)", True),
        ("per 1,000", True),
        ("p50 / p95", True),
        ("escalated", True),
    ]
    columns += [("regret", True)] if with_regret else []
    shown = [*told.routes, told.all] if len(told.routes) > 1 else list(told.routes)
    rows = [
        (
            each.route,
            f"{each.of.count:,}",
            percent(each.of.value),
            of_share(each.accuracy),
            per_1000(each.cost),
            times(each),
            percent(each.escalated.value) if each.escalated else NONE,
            *([percent(each.regret.value) if each.regret else NONE] if with_regret else []),
        )
        for each in shown
    ]
    notes = [
        "Escalated: rows that took more than one call. Cost is per 1,000 rows of the route; time is of a row's calls."
    ]
    notes += (
        ["Regret: rows not right though some single pair of the outcome table is right on that question."]
        if with_regret
        else [
            "Regret is not known: "
            + (told.missing.get("plane") or "the outcome table is about other questions")
            + "."
        ]
    )
    if told.all.overpaid is not None:
        notes.append(
            f"Right rows cost {per_1000(told.all.overpaid)} per 1,000 above the cheapest pair that is right."
        )
    return Section(
        "routes",
        title,
        source,
        tables=(Table("What each route got, cost and took", tuple(columns), tuple(rows)),),
        notes=tuple(notes),
    )


def _calibration(told: RunNumbers) -> Section:
    title, made = "Calibration", told.calibration
    if made is None:
        return Section("calibration", title, ROWS, empty=sentence(told.missing["calibration"]))
    lead = (
        f"Expected calibration error {percent(made.error)} over {count(made.of, 'row')}; Brier score {made.brier:.3f}. On average "
        f"{percent(made.predicted)} were predicted to be right and {percent(made.right)} were: {points(made.surplus)}.",
    )
    rows = tuple(
        (
            f"{each.begin:.0%} to {each.end:.0%}",
            f"{each.right.of:,}",
            percent(each.predicted),
            of_share(each.right),
        )
        for each in made.bins
    )
    columns = (("predicted", False), ("rows", True), ("mean predicted", True), ("right (95%)", True))
    data = Table("Right answers by predicted accuracy", columns, rows)
    notes = ("Of the rows that were tried and whose right answer is known.",)
    return Section(
        "calibration", title, ROWS, lead, (charts.calibration_chart(made),), data=(data,), notes=notes
    )


def _forecasts(told: RunNumbers) -> Section:
    title = "Predicted and real tokens"
    if told.tokens is None and told.costs is None:
        return Section(
            "forecasts", title, ROWS, empty=sentence(told.missing.get("tokens", "nothing was predicted"))
        )
    rows = [
        (
            name,
            _expected(each),
            of_share(each.within_p50),
            of_share(each.within_p90),
            f"{each.ratio:.2f}" if each.ratio else NONE,
        )
        for name, each in (("output tokens", told.tokens), ("cost", told.costs))
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
    made = (charts.tokens_chart(told.tokens),) if told.tokens and told.tokens.dots else ()
    notes = (
        "Of the rows that were tried, without those answered from an earlier identical call. Real by predicted: sums, against the median.",
    )
    lead = (sentence(told.missing["tokens"]),) if told.tokens is None else ()
    return Section("forecasts", title, LEDGER_ROWS if told.trail else ROWS, lead, made, (table,), notes=notes)


def _expected(each: Coverage) -> str:
    known = each.within_p50 or each.within_p90
    return f"{known.of:,}" if known else NONE


def _writers(told: RunNumbers) -> Section:
    title, made = "Who wrote", told.writers
    source = LEDGER if told.trail else TABLE if told.run.job is None else ROWS
    if made is None:
        return Section("writers", title, source, empty=sentence(told.missing["writers"]))
    columns: list[tuple[str, bool]] = [
        ("model", False),
        ("tokens read", True),
        ("tokens written", True),
        ("share written", True),
    ]
    columns += [("cost", True)] if told.trail else []
    rows = tuple(
        (
            each.model,
            f"{each.input_tokens:,}",
            f"{each.output_tokens:,}",
            percent(each.share),
            *([usd(each.nanousd)] if told.trail else []),
        )
        for each in made.models
    )
    lead, texts = [], told.texts
    if not texts.count:
        lead.append(sentence(told.missing["texts"]))
    else:
        wrote = {name: sum(parts) for name, parts in texts.parts.items()}
        share = (
            f"{made.large}, the larger model, wrote {percent(wrote[made.large] / sum(wrote.values()))}"
            if made.large
            else "; ".join(
                f"{name} wrote {percent(amount / sum(wrote.values()))}" for name, amount in wrote.items()
            )
        )
        lead.append(
            f"Of {count(texts.count, 'text')} that several models wrote together, {share}, counted in characters."
        )
    chart = charts.writers_chart(texts, made.large)
    return Section(
        "writers",
        title,
        source if not texts.count else f"{source}; {ROWS}",
        tuple(lead),
        (chart,) if chart else (),
        (Table("Tokens by model", tuple(columns), rows),),
        data=(_parts_table(told),) if chart else (),
        written=tuple(texts.shown),
        large=made.large,
    )


def _parts_table(told: RunNumbers) -> Table:
    parts = told.texts.parts
    names = list(parts)
    step = 100 // len(next(iter(parts.values())))
    rows = []
    for part in range(100 // step):
        total = sum(parts[name][part] for name in names) or 1.0
        rows.append(
            (
                f"{part * step}% to {part * step + step}%",
                *(percent(parts[name][part] / total) for name in names),
            )
        )
    return Table(
        "Share of the text by place",
        (("place in the text", False), *((name, True) for name in names)),
        tuple(rows),
    )


def _budget(told: RunNumbers) -> Section:
    title, trail = "Budget", told.trail
    if trail is None:
        return Section("budget", title, LEDGER, empty=sentence(told.missing["ledger"]))
    chart = charts.burn_chart(trail)
    lead = [
        f"{usd(trail.posted)} was spent in {count(trail.calls, 'call')}"
        + (
            f", {usd(trail.limit - trail.before - trail.posted - trail.held)} of {usd(trail.limit)} is left"
            if trail.limit
            else ""
        )
        + f"; at most {usd(trail.highest)} was spent and held at once."
    ]
    if trail.window:
        lead.append(f"The limit holds for each {trail.window}; the line shows spending since the job began.")
    rows = [
        ("spent", f"{trail.calls:,}", usd(trail.posted)),
        ("of it by calls that no row names", f"{trail.unnamed_calls:,}", usd(trail.unnamed)),
        ("spent in this budget before the job", NONE, usd(trail.before)),
        ("still held", f"{trail.held_calls:,}", usd(trail.held)),
        ("of it unknown: sent, and never heard of again", f"{trail.unknown_calls:,}", usd(trail.unknown)),
        ("overruns: above what was held", f"{trail.overrun_calls:,}", usd(trail.overrun)),
        ("freed: the call was not made, or cost nothing", f"{trail.voided:,}", NONE),
        ("expired: held and never sent", f"{trail.expired:,}", NONE),
    ]
    table = Table(
        "What became of the budget", (("entries", False), ("calls", True), ("amount", True)), tuple(rows)
    )
    data = [_moments_table(told)] if chart else []
    tables = [table]
    if trail.overruns:
        marks = tuple(
            (mark.key, span(max(0.0, mark.seconds)), usd(mark.nanousd)) for mark in trail.overruns[:5]
        )
        tables.append(
            Table("Largest overruns", (("call", False), ("after", True), ("above its hold", True)), marks)
        )
    note = (
        "The ledger was played again from its first entry and agrees with itself."
        if trail.checked and not trail.wrong
        else "The ledger is long and was not played again here: viaticum budget verify does."
        if not trail.checked
        else f"The ledger does not agree with itself: {'; '.join(trail.wrong)}."
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


def _moments_table(told: RunNumbers) -> Table:
    assert told.trail is not None
    moments = told.trail.moments
    step = max(1, len(moments) // 20)
    shown = [*moments[::step], *([moments[-1]] if (len(moments) - 1) % step else [])]
    rows = tuple(
        (span(max(0.0, each.seconds)), usd(each.posted), usd(each.committed - each.posted)) for each in shown
    )
    return Table(
        "Spent and held over time", (("after", False), ("spent", True), ("held at most", True)), rows
    )


def _accounts(told: RunNumbers) -> Section:
    title, trail = "Ledger against provider", told.trail
    source = f"{LEDGER}; {ROWS}"
    if trail is None:
        return Section("accounts", title, source, empty=sentence(told.missing["ledger"]))
    rows, lead = [], []
    if (rowed := told.against_rows) is not None:
        rows.append(
            (
                "what the rows say",
                f"{rowed.calls:,}",
                usd(rowed.rows),
                usd(rowed.posted),
                signed_usd(rowed.rows - rowed.posted),
                f"{rowed.differ:,}",
            )
        )
    if (made := told.provider) is not None:
        rows.append(
            (
                "what providers say",
                f"{made.calls:,}",
                usd(made.reported),
                usd(made.posted),
                signed_usd(made.reported - made.posted),
                f"{made.differ:,}",
            )
        )
        share = (made.reported - made.posted) / made.posted if made.posted else 0.0
        lead.append(
            f"Providers reported {usd(made.reported)} for calls that the ledger posted at {usd(made.posted)}: {100 * share:+.2f}%.".replace(
                "-", "−"
            )
        )
    else:
        lead.append(sentence(told.missing["provider"]))
    columns = (
        ("account", False),
        ("calls", True),
        ("they say", True),
        ("ledger", True),
        ("difference", True),
        ("calls that differ", True),
    )
    notes = ["A provider's cost differs where it is more than 1% off."] if made else []
    if trail.missing:
        notes.append(
            f"{count(trail.missing, 'call')} that the rows name {'has' if trail.missing == 1 else 'have'} no posted entry in the ledger."
        )
    return Section(
        "accounts",
        title,
        source,
        tuple(lead),
        tables=(Table("Accounts", columns, tuple(rows)),),
        notes=tuple(notes),
    )


def _failures(told: RunNumbers) -> Section:
    title = "Failures"
    source = TABLE if told.run.job is None else ROWS
    if not told.groups:
        return Section(
            "failures",
            title,
            source,
            empty=sentence(told.missing.get("rows", "no row failed, was skipped or is known to be wrong")),
        )
    order = {"failed": 0, "skipped": 1, "no answer": 2, "wrong": 3}
    groups = sorted(told.groups, key=lambda group: (order[group.state], -group.count))
    of = len(told.run.rows)
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
