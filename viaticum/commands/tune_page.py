"""The report page of `viaticum tune`, in the form of all reports: what was found, and what was paid for it.

Leaves out the figures (`viaticum.agents.batch.tune_report`) and how a page is made (`viaticum.reports.page`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from viaticum.errors import MissingExtra
from viaticum.files import atomic_write
from viaticum.money import short_usd
from viaticum.outcomes import accuracy_interval
from viaticum.reports.chart_rendering import Chart
from viaticum.reports.cost_accuracy_chart import router_chart
from viaticum.reports.formatting import percent, signed
from viaticum.reports.formatting import sentence as capital
from viaticum.reports.frontier import Point
from viaticum.reports.sections import LEDGER, TABLE, Section, Table
from viaticum.types import Pair

if TYPE_CHECKING:
    from viaticum.agents.batch.tune import Forecast
    from viaticum.agents.batch.tune_judge import Judged
    from viaticum.agents.batch.tune_report import Figure, Found
    from viaticum.agents.batch.tune_rounds import Bought


def write_tuning_page(out: Path, forecast: Forecast, bought: Bought, found: Found) -> Path | None:
    """Write the page beside the router; None where the extra `reports` is not installed."""
    from viaticum.reports.page import write_sections

    path = out.with_name(out.name + ".html")
    notices = [] if bought.judged is None else [judge_sentence(bought.judged, bought.pairs)]
    if bought.late:
        notices.append("The time was up before the money: more --hours buy more.")
    sections = [_found_section(found), _pairs_section(bought), _money_section(forecast, bought)]
    facts = (("Router", str(out)), ("Outcomes", str(out.with_name(out.name + ".outcomes.parquet"))))
    try:
        page = write_sections(f"{out.name}: a router tuned", sentence(found), notices, sections, facts)
    except MissingExtra:
        return None
    atomic_write(path, page)
    return path


def sentence(found: Found) -> str:
    """What was found, in a sentence."""
    if found.router is None or found.best is None or found.cheap is None or found.interval is None:
        return capital(why_sentence(found))
    low, high = found.interval
    mark = "*" if found.judged else ""

    def figure(each: Figure, interval: str = "") -> str:
        return f"{percent(each.accuracy)}{mark}{interval} at {short_usd(each.cost_nanousd)}"

    pays = "" if not found.why else f" {capital(why_sentence(found))}"
    return (
        f"{found.cheap.name} answers {figure(found.cheap)}; with this router "
        f"{figure(found.router, f' [{percent(low)}, {percent(high)}]')}; the best single pair, "
        f"{found.best.name}, has {figure(found.best)}.{pays}"
    )


def why_sentence(found: Found) -> str:
    """Why there is no router, or why routing does not pay."""
    if found.best is None:
        return found.why
    if found.gain is not None and found.gain["high"] > 0:
        return f"not shown that routing pays here: {found.why}"
    return f"routing does not pay here: {found.why}"


def judge_sentence(judged: Judged, pairs: Sequence[Pair]) -> str:
    """What rests on a judge or on agreement, and how far it agrees with known answers."""
    if judged.checked:
        low, high = accuracy_interval(judged.agreeing, judged.checked)
        agrees = (
            f"it agrees with known answers on {judged.agreeing} of {judged.checked} "
            f"({percent(low)} to {percent(high)})"
        )
    else:
        agrees = "how far it agrees with known answers is unknown: no question has one"
    own = {each.model for each in pairs}.intersection(judged.models)
    owned = f", answers of {' and '.join(sorted(own))}, which it rests on, among them" if own else ""
    left = f"; {judged.ungraded} answers have no verdict" if judged.ungraded else ""
    if judged.mute:
        left += f", and buying ended, as no call of it gave one: {judged.mute}"
    return f"{judged.grader} graded {judged.outcomes} outcomes{owned}; {agrees}{left}"


def mark_sentence(found: Found) -> str:
    """What the mark of a figure means."""
    return f"* {found.grader} graded {found.judged} of these {found.questions} held-out questions"


def left_out_sentence(pair: Pair, other: Pair) -> str:
    """Why a pair is asked nothing."""
    return (
        f"{pair} is left out: by the public figures of both, {other} costs no more and is right more often, "
        "and no first outcome could change that."
    )


def _found_section(found: Found) -> Section:
    mark = "*" if found.judged else ""
    rows = []
    named: list[tuple[str, Figure | None]] = [
        ("best pair of the cheapest model", found.cheap),
        ("router", found.router),
        ("best single pair", found.best),
    ]
    for name, figure in named:
        if figure is not None:
            low, high = accuracy_interval(round(figure.accuracy * found.questions), found.questions)
            accuracy = f"{percent(figure.accuracy)}{mark} ({percent(low)} to {percent(high)})"
            label = name if figure.name == "router" else f"{name}: {figure.name}"
            rows.append(
                (label, accuracy, short_usd(figure.cost_nanousd), short_usd(1000 * figure.cost_nanousd))
            )
    columns = (("", False), ("right", True), ("$ a question", True), ("$ per 1,000", True))
    notes = []
    if found.gain is not None:
        points = [signed(100 * found.gain[name]) for name in ("difference", "low", "high")]
        notes.append(
            f"The router against single pairs mixed at its cost, paired by question: {points[0]}{mark} "
            f"points ({points[1]} to {points[2]})."
        )
    if found.judged:
        notes.append(f"{mark_sentence(found)}.")
    if found.why:
        notes.append(capital(why_sentence(found)))
    if not rows:
        return Section("found", "What was found", TABLE, empty=capital(found.why or "nothing"))
    table = Table(f"On {found.questions} held-out questions", columns, tuple(rows))
    charts = (_chart(found),) if found.pairs else ()
    return Section("found", "What was found", TABLE, charts=charts, tables=(table,), notes=tuple(notes))


def _chart(found: Found) -> Chart:
    mark = "*" if found.judged else ""

    def point(figure: Figure) -> Point:
        interval = accuracy_interval(round(figure.accuracy * found.questions), found.questions)
        return Point(figure.name + mark, figure.cost_nanousd, figure.accuracy, *interval)

    curve = [Point("", each.cost_nanousd, each.accuracy) for each in found.curve]
    router = None if found.router is None else point(found.router)
    return router_chart(router, curve, [point(each) for each in found.pairs])


def _pairs_section(bought: Bought) -> Section:
    rows, judged = [], frozenset[str]() if bought.judged is None else bought.judged.questions
    for pair in bought.pairs:
        own = [each for each in bought.outcomes if each.pair == pair]
        if not own:
            rows.append((str(pair), "0", "–", "–"))
            continue
        right = sum(each.correct for each in own)
        low, high = accuracy_interval(right, len(own))
        cost = sum(each.cost_nanousd or 0 for each in own) / len(own)
        mark = "*" if any(each.question_id in judged for each in own) else ""
        accuracy = f"{percent(right / len(own))}{mark} ({percent(low)} to {percent(high)})"
        rows.append((str(pair), f"{len(own):,}", accuracy, short_usd(cost)))
    columns = (("pair", False), ("outcomes", True), ("right", True), ("$ an answer", True))
    asked = {
        frozenset(each.question_id for each in bought.outcomes if each.pair == pair) for pair in bought.pairs
    }
    notes = []
    if bought.judged is not None and bought.judged.outcomes:
        notes.append(f"* {bought.judged.grader} graded {bought.judged.outcomes:,} of these outcomes.")
    if len(asked) > 1:
        notes.append("Pairs were asked different questions: those where the choice was still open.")
    notes += [left_out_sentence(pair, other) for pair, other in bought.left_out]
    for each in bought.dropped:
        notes.append(
            f"{bought.pairs[each.pair]} was dropped: {bought.pairs[each.by]} costs no more and is right on "
            f"{percent(each.difference)} more ({percent(each.low)} to {percent(each.high)}) of "
            f"{each.questions} questions."
        )
    notes += [f"{count} calls without an outcome: {why}." for why, count in bought.unanswered.items()]
    table = Table("Outcomes that were bought", columns, tuple(rows))
    return Section("pairs", "The pairs", TABLE, tables=(table,), notes=tuple(notes))


def _money_section(forecast: Forecast, bought: Bought) -> Section:
    whole = f"{short_usd(forecast.cost_p50)} to {short_usd(forecast.cost_p90)}"
    rows = (
        ("spent", short_usd(bought.cost_nanousd)),
        ("budget", short_usd(forecast.budget_nanousd)),
        ("forecast for every pair on every question, p50 to p90", whole),
        ("outcomes bought", f"{len(bought.outcomes):,} of {forecast.answers:,}"),
        ("questions to learn from, held out", f"{forecast.learning:,}, {forecast.held_out:,}"),
    )
    table = Table("Money", (("", False), ("", True)), rows)
    return Section("money", "What it cost", LEDGER, tables=(table,))
