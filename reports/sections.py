"""What a report says, in order, as plain records: a title, a source, sentences, tables, charts, or why a part is empty.

The page and the Markdown are written from these alone. Every text here is plain text: what writes it escapes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from viaticum.reports import charts
from viaticum.reports.drawing import Chart
from viaticum.reports.figures import Coverage, RouteFigures
from viaticum.reports.frontier import Plane, Point
from viaticum.reports.numbers import Numbers, RunNumbers
from viaticum.reports.plane import plane_chart
from viaticum.reports.runs import Group, Written
from viaticum.reports.words import (
    NONE,
    count,
    of_share,
    per_1000,
    percent,
    points,
    seconds,
    signed_usd,
    span,
    usd,
)

LEDGER, ROWS, TABLE, LEDGER_ROWS = "ledger", "rows of the job", "outcome table", "ledger and rows of the job"


@dataclass(frozen=True)
class Table:
    """columns: (label, is a number). The first column names its row. caption: what those hear who do not see it."""

    caption: str
    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """One part of a report. empty: why there is nothing; then there is nothing else. data: numbers behind the charts.

    failures: groups of the `of` rows; the page shows them in place of the table.
    """

    name: str
    title: str
    source: str
    lead: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    data: tuple[Table, ...] = ()
    written: tuple[Written, ...] = ()
    large: str = ""
    failures: tuple[Group, ...] = ()
    of: int = 0
    notes: tuple[str, ...] = ()
    empty: str = ""


@dataclass(frozen=True)
class Part:
    """A run's sections; `notices` come first: the job still runs, the ledger is gone."""

    name: str
    notices: tuple[str, ...]
    sections: tuple[Section, ...]
    facts: tuple[tuple[str, str], ...] = field(default=())


def notices(told: RunNumbers) -> tuple[str, ...]:
    found = []
    job, tally = told.run.job, told.tally
    if job is not None and job.ending == "running":
        found.append(
            f"This job has not ended: {tally.asked - tally.missing:,} of {count(tally.asked, 'row')} are done. It still runs, or was "
            "killed; the numbers are those of the rows that are done."
        )
    elif job is not None and tally.missing:
        found.append(
            f"{count(tally.missing, 'row')} of the input {'has' if tally.missing == 1 else 'have'} no line in the job's rows."
        )
    if job is not None and "ledger" in told.missing:
        found.append(f"No numbers of the ledger: {told.missing['ledger']}. Costs are what the rows say.")
    found += [f"{warning[:1].upper()}{warning[1:]}." for warning in told.run.warnings]
    if told.trail is not None and told.trail.wrong:
        found.append(f"The ledger does not agree with itself: {told.trail.wrong[0]}.")
    return tuple(found)


def parts(numbers: Numbers) -> list[Part]:
    return [Part(each.run.name, notices(each), tuple(_sections(each)), facts(each)) for each in numbers.runs]


def facts(told: RunNumbers) -> tuple[tuple[str, str], ...]:
    """Where the numbers are from."""
    run, job = told.run, told.run.job
    if job is None:
        return (("outcome table", run.path),)
    found = [
        ("job", run.path), ("input", job.input), ("policy", job.policy), ("engine", job.engine), ("budget", job.budget),
        ("ledger", told.trail.where if told.trail else f"{job.ledger} (not read)"),
        ("began", job.began), ("ended", job.ended or "not yet"), ("ending", job.ending.replace("_", " ")),
        *((f"fingerprint of {name}", value) for name, value in job.fingerprint.items()),
        ("made by", f"viaticum {job.version}" if job.version else ""),
    ]  # fmt: skip
    if told.plane is not None:
        found.append(("outcome table", told.plane.table))
    return tuple((name, value) for name, value in found if value)


def plane_section(numbers: Numbers) -> Section:
    """Of all runs: the plane is one."""
    runs = numbers.runs
    known = next((each.plane for each in runs if each.plane is not None), None)
    chart = plane_chart(runs)
    if chart is None:
        reason = runs[0].missing.get("rows") or runs[0].missing.get("accuracy") or "no run has an accuracy"
        return Section("plane", "Cost and accuracy", ROWS, empty=_sentence(reason))
    source = (
        f"{LEDGER if runs[0].trail else ROWS}; {TABLE}" if known else (LEDGER_ROWS if runs[0].trail else ROWS)
    )
    if known is None:
        lead = (_sentence(runs[0].missing.get("plane", "")),)
        return Section("plane", "Cost and accuracy", source, lead, (chart,), data=(_runs_table(runs),))
    return Section(
        "plane", "Cost and accuracy", source, _plane_lead(known, runs), (chart,), data=(_plane_table(known),),
        notes=_plane_notes(known, runs),
    )  # fmt: skip


def _plane_lead(known: Plane, runs: Sequence[RunNumbers]) -> tuple[str, ...]:
    told = []
    if known.more_right is not None and known.less_cost is not None and not runs[0].run.single:
        told.append(
            f"Against always asking {known.best.name}: {points(known.more_right)} right and {_times(known)} its cost, paired over "
            f"{count(known.of, 'question')}."
        )
    told.append(
        f"The line joins the best mixtures of single pairs, dealt by lot; a run above it is worth its router. The oracle, which "
        f"always asks the cheapest pair that is right, gets {percent(known.oracle.accuracy)} at {per_1000(known.oracle.cost)} per 1,000 "
        f"questions; a random pair {percent(known.random.accuracy)} at {per_1000(known.random.cost)}."
    )
    job = runs[0].run.job
    if len(runs) == 1 and job is not None and job.previews:
        told.append(
            "The dashed line is the planner's forecast from before anything was spent." + _forecast(runs[0])
        )
    return tuple(told)


def _forecast(told: RunNumbers) -> str:
    if told.forecast is None:
        return ""
    return f" For this budget it was {percent(told.forecast.accuracy)} right at {usd(told.forecast.cost_p50)} (p90 {usd(told.forecast.cost_p90)})."


def _times(known: Plane) -> str:
    return (
        f"{known.run.cost / known.best.cost:.2f} times"
        if known.run and known.best.cost
        else "an unknown share of"
    )


def _plane_notes(known: Plane, runs: Sequence[RunNumbers]) -> tuple[str, ...]:
    told = []
    if known.same_questions:
        told.append(
            f"On the {count(known.of, 'question')} of the run that the table knows, of {known.asked:,} whose right answer is known. "
            "Pairs and mixtures are the best in hindsight on these very questions, which favours them."
        )
    else:
        told.append(
            "The table is about other questions: its pairs were not asked what this run was asked, so nothing here is paired and "
            "what was saved is left out."
        )
    if len(runs) > 1:
        told.append(
            f"Pairs and mixtures are those on the questions of {runs[0].run.name}; every other run stands where it is on its own."
        )
    if known.left_out:
        told.append(
            f"Left out, because the table holds too few of the questions for them: {', '.join(known.left_out)}."
        )
    return tuple(told)


def _plane_table(known: Plane) -> Table:
    corners = {point.name for point in known.hull}
    rows = [(known.run.name, *_place(known.run), "run")] if known.run else []
    rows += [
        (point.name, *_place(point), "single pair, on the hull" if point.name in corners else "single pair")
        for point in sorted(known.singles, key=lambda point: -point.accuracy)
    ]
    extra = [(known.oracle, "the cheapest pair that is right"), (known.random, "each pair equally often")]
    extra += [(known.shuffled, "the run's pairs, dealt by lot")] if known.shuffled else []
    rows += [(point.name, *_place(point), what) for point, what in extra]
    columns = (("point", False), ("right (95%)", True), ("per 1,000 questions", True), ("what it is", False))
    return Table("Cost and accuracy of the run, of every single pair, and of mixtures", columns, tuple(rows))


def _place(point: Point) -> tuple[str, str]:
    told = percent(point.accuracy)
    if point.low is not None and point.high is not None:
        told += f" ({point.low:.0%} to {point.high:.0%})"
    return told, per_1000(point.cost)


def _runs_table(runs: Sequence[RunNumbers]) -> Table:
    rows = tuple((each.run.name, of_share(each.accuracy), per_1000(each.cost)) for each in runs)
    return Table(
        "Cost and accuracy", (("run", False), ("right (95%)", True), ("per 1,000 questions", True)), rows
    )


def comparison_section(numbers: Numbers) -> Section:
    """Side by side, then what differs on the questions they share."""
    runs, first = numbers.runs, numbers.runs[0].run.name
    side = [
        ("right (95%)", [of_share(each.accuracy) for each in runs]),
        ("right of those answered", [of_share(each.accuracy_answered) for each in runs]),
        ("answered / skipped / failed", [f"{t.answered:,} / {t.skipped:,} / {t.failed:,}" for t in (each.tally for each in runs)]),
        ("spent", [usd(each.spent) for each in runs]),
        ("per 1,000 questions", [per_1000(each.cost) for each in runs]),
        ("seconds a row, p50 / p95", [_times_told(each.all) for each in runs]),
        ("calibration error", [percent(each.calibration.error) if each.calibration else NONE for each in runs]),
    ]  # fmt: skip
    columns = (("measure", False), *((each.run.name, True) for each in runs))
    tables = [Table("Runs side by side", columns, tuple((name, *values) for name, values in side))]
    paired, notes = [], []
    for each in numbers.against:
        if not each.of:
            notes.append(f"{each.run} and {first} are not compared: {each.why}.")
            continue
        if each.unlike:
            notes.append(
                f"{count(each.unlike, 'id')} of {each.run} stand for another question in {first}; they are left out."
            )
        if each.why:
            notes.append(f"{each.run}: {each.why}.")
        cost = each.cost
        paired.append((
            each.run, f"{each.of:,}", points(each.accuracy), f"{each.won:,} / {each.lost:,}",
            f"{signed_usd(cost.value * 1000)} ({signed_usd(cost.low * 1000)} to {signed_usd(cost.high * 1000)})" if cost else NONE,
            f"{each.seconds.value:+.1f} s".replace("-", "−") if each.seconds else NONE,
        ))  # fmt: skip
    if paired:
        headings = (
            ("run", False),
            ("shared", True),
            ("right", True),
            ("won / lost", True),
            ("per 1,000 questions", True),
            ("seconds", True),
        )
        tables.append(
            Table(f"Differences to {first}, paired over the questions they share", headings, tuple(paired))
        )
        notes.append(f"Differences are paired; intervals are 95%, by a bootstrap over questions (seed {numbers.seed}). Won: right here alone; lost: right in {first} alone.")  # fmt: skip
    source = "; ".join(sorted({each.spent_source if each.spent_source != "rows" else ROWS for each in runs} | {ROWS if any(e.run.job for e in runs) else TABLE}))  # fmt: skip
    return Section("comparison", "Comparison", source, tables=tuple(tables), notes=tuple(notes))


def _times_told(told: RouteFigures | None) -> str:
    if told is None or told.seconds_p50 is None or told.seconds_p95 is None:
        return NONE
    if told.seconds_p95 < 100:
        return f"{told.seconds_p50:.1f} / {told.seconds_p95:.1f} s"
    return f"{seconds(told.seconds_p50)} / {seconds(told.seconds_p95)}"


def _sections(told: RunNumbers) -> list[Section]:
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
            "routes", title, source, empty=_sentence(told.missing.get("rows", "no route was taken"))
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
        (each.route, f"{each.of.count:,}", percent(each.of.value), of_share(each.accuracy), per_1000(each.cost), _times_told(each),
         percent(each.escalated.value) if each.escalated else NONE,
         *([percent(each.regret.value) if each.regret else NONE] if with_regret else []))
        for each in shown
    ]  # fmt: skip
    notes = [
        "Escalated: rows that took more than one call. Cost is per 1,000 rows of the route; time is of a row's calls."
    ]
    notes += (
        ["Regret: rows not right though some single pair of the outcome table is right on that question."]
        if with_regret else ["Regret is not known: " + (told.missing.get("plane") or "the outcome table is about other questions") + "."]
    )  # fmt: skip
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
        return Section("calibration", title, ROWS, empty=_sentence(told.missing["calibration"]))
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
    notes = (
        "Of the rows that were tried and whose right answer is known. Numbers above the points count their rows; ten bins of equal width.",
    )
    return Section(
        "calibration", title, ROWS, lead, (charts.calibration_chart(made),), data=(data,), notes=notes
    )


def _forecasts(told: RunNumbers) -> Section:
    title = "Predicted and real tokens"
    if told.tokens is None and told.costs is None:
        return Section(
            "forecasts", title, ROWS, empty=_sentence(told.missing.get("tokens", "nothing was predicted"))
        )
    rows = [
        (name, _expected(each), of_share(each.within_p50), of_share(each.within_p90), f"{each.ratio:.2f}" if each.ratio else NONE)
        for name, each in (("output tokens", told.tokens), ("cost", told.costs)) if each is not None
    ]  # fmt: skip
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
    lead = (_sentence(told.missing["tokens"]),) if told.tokens is None else ()
    return Section("forecasts", title, LEDGER_ROWS if told.trail else ROWS, lead, made, (table,), notes=notes)


def _expected(each: Coverage) -> str:
    known = each.within_p50 or each.within_p90
    return f"{known.of:,}" if known else NONE


def _writers(told: RunNumbers) -> Section:
    title, made = "Who wrote", told.writers
    source = LEDGER if told.trail else TABLE if told.run.job is None else ROWS
    if made is None:
        return Section("writers", title, source, empty=_sentence(told.missing["writers"]))
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
        lead.append(_sentence(told.missing["texts"]))
    else:
        wrote = {name: sum(parts) for name, parts in texts.parts.items()}
        share = f"{made.large}, the larger model, wrote {percent(wrote[made.large] / sum(wrote.values()))}" if made.large else "; ".join(
            f"{name} wrote {percent(amount / sum(wrote.values()))}" for name, amount in wrote.items()
        )  # fmt: skip
        lead.append(
            f"Of {count(texts.count, 'text')} that several models wrote together, {share}, counted in characters."
        )
    chart = charts.writers_chart(texts, made.large)
    return Section(
        "writers", title, source if not texts.count else f"{source}; {ROWS}", tuple(lead), (chart,) if chart else (),
        (Table("Tokens by model", tuple(columns), rows),), data=(_parts_table(told),) if chart else (),
        written=tuple(texts.shown), large=made.large,
    )  # fmt: skip


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
        return Section("budget", title, LEDGER, empty=_sentence(told.missing["ledger"]))
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
    notes = ["The line is what is left after what was spent; the shade below it is what was held at the time. Triangles are overruns, diamonds are unknown calls."] if chart else []  # fmt: skip
    notes.append(
        "The ledger was played again from its first entry and agrees with itself." if trail.checked and not trail.wrong
        else "The ledger is long and was not played again here: viaticum budget verify does." if not trail.checked
        else f"The ledger does not agree with itself: {'; '.join(trail.wrong)}."
    )  # fmt: skip
    return Section(
        "budget",
        title,
        LEDGER,
        tuple(lead),
        (chart,) if chart else (),
        tuple(tables),
        tuple(data),
        notes=tuple(notes),
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
        return Section("accounts", title, source, empty=_sentence(told.missing["ledger"]))
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
        lead.append(_sentence(told.missing["provider"]))
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
            empty=_sentence(told.missing.get("rows", "no row failed, was skipped or is known to be wrong")),
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


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!")) or not text else ".")
