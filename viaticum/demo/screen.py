"""What the demo prints: rows as they come, and the lanes beside each other below them.

On a terminal the lanes are redrawn in their own lines; in a pipe they are printed after each wave. Columns
fit 80. Without colours verdicts are words and authors are brackets, so nothing is lost. Leaves out what is
measured.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from viaticum.commands.terminal import visible
from viaticum.demo.authorship import AuthoredAnswer
from viaticum.demo.interruption import Interruption
from viaticum.demo.lanes import Lane, LaneAnswer
from viaticum.demo.questions import TOPIC
from viaticum.errors import one_line
from viaticum.money import format_usd, short_usd
from viaticum.questions import Question

WIDTH = 80  # columns of a pipe, and the most on a terminal
REDRAWS = 4  # a second
ROUTE_COLUMNS = 13
ROW_COLUMNS = 2 + 1 + 10 + 1 + ROUTE_COLUMNS + 1  # of a question's row, without lanes and question
AUTHORS = ("cyan", "bold yellow")  # of the small and the large model's text


class Screen:
    """Prints on a console.

    Args:
        total: questions in all.
        names: of the models, whose common beginning is left out.
    """

    def __init__(self, total: int, names: Sequence[str], console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, emoji=False)
        if not self.console.is_terminal or self.console.width > WIDTH:
            self.console.width = WIDTH
        # FORCE_COLOR makes a terminal of a pipe, for colours; nothing can be redrawn there.
        self._redraws = self.console.is_interactive and self.console.file.isatty()
        self.total, self._prefix = total, _common_prefix(names)
        self._lanes: Sequence[Lane] = ()
        self._live: Live | None = None
        self._number = 0

    @property
    def has_colours(self) -> bool:
        return self.console.color_system is not None and not self.console.no_color

    def short(self, route: str) -> str:
        """A pair without what the models' names have in common: `0.5b+cot`."""
        return route.replace(self._prefix, "") if self._prefix else route

    # Text

    def heading(self, text: str) -> None:
        self.console.print()
        self.console.print(Rule(Text(text, "bold"), align="left", characters="-", style="dim"))

    def line(self, text: str = "", style: str = "", *, wrap: bool = True) -> None:
        """Print a text. wrap: False for paths and commands, which are to be copied whole."""
        self.console.print(Text(self._safe(text), style), soft_wrap=not wrap)

    def _safe(self, text: str) -> str:
        return visible(text, cast(TextIO, self.console.file))

    # Lanes

    def show_lanes(self, lanes: Sequence[Lane]) -> None:
        """Begin to show lanes: on a terminal they are redrawn until `hide_lanes`."""
        self._lanes = lanes
        if self._redraws:
            self._live = Live(
                get_renderable=self._standing,
                console=self.console,
                refresh_per_second=REDRAWS,
                transient=True,
                redirect_stderr=False,
            )
            self._live.start()

    def hide_lanes(self) -> None:
        """End that, and print where the lanes stand; nothing where none are shown."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._lanes:
            self.console.print(self._standing())
            self._lanes = ()

    def wave(self, questions: Sequence[Question]) -> None:
        """Print the rows of questions, and in a pipe where the lanes stand."""
        self.console.print(self._rows(questions))
        for (lane, reason), numbers in self._reasons(questions).items():
            text = f"   {lane} has no answer to {', '.join(map(str, numbers))}: {reason}"
            self.console.print(_cut(self._safe(text), self.console.width), style="yellow")
        if self._live is None and self._number < self.total:
            self.console.print(self._standing())

    def _reasons(self, questions: Sequence[Question]) -> dict[tuple[str, str], list[int]]:
        """Why lanes have no answers, with the numbers of the questions that were just printed."""
        found: dict[tuple[str, str], list[int]] = {}
        for number, each in enumerate(questions, self._number - len(questions) + 1):
            for lane in self._lanes:
                answer = lane.answers.get(each.id)
                if answer is not None and answer.value is None:
                    found.setdefault((lane.name, one_line(answer.reason)), []).append(number)
        return found

    def _rows(self, questions: Sequence[Question]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="dim")
        table.add_column("", justify="right", width=2)
        table.add_column("kind", width=10, no_wrap=True)
        for lane in self._lanes:
            table.add_column(lane.name.removeprefix("always "), width=8, no_wrap=True)
        table.add_column("routed to", width=ROUTE_COLUMNS, no_wrap=True)
        table.add_column("question", no_wrap=True)
        left = max(10, self.console.width - ROW_COLUMNS - 9 * len(self._lanes))
        for each in questions:
            self._number += 1
            answers = [lane.answers.get(each.id) for lane in self._lanes]
            routes = answers[-1].routes if answers[-1] is not None else ()
            table.add_row(
                str(self._number),
                str(each.columns.get(TOPIC, each.query.kind)),
                *map(_mark, answers),
                _cut(", ".join(map(self.short, routes)) or "-", ROUTE_COLUMNS),
                _cut(self._safe(each.query.text.split("\n")[0]), left),
            )
        return table

    def _standing(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=True, header_style="bold")
        table.add_column("", width=9)
        for lane in self._lanes:
            table.add_column(Text(lane.name), width=20, no_wrap=True)
        lanes = self._lanes
        table.add_row("asks", *(Text(self.short(lane.way)) for lane in lanes))
        table.add_row("right", *(f"{lane.right} of {len(lane.answers)}" for lane in lanes))
        table.add_row("cost", *(short_usd(lane.cost) for lane in lanes))
        table.add_row("seconds", *(f"{lane.seconds:.1f}{' ...' if lane.is_busy else ''}" for lane in lanes))
        return Group(Text(), table, Text())

    # The answer of two models

    def authored(self, authored: AuthoredAnswer) -> None:
        """The text by author: in colours, or with the large model's parts in brackets."""
        text = Text()
        for part, author in authored.parts:
            safe = self._safe(part)
            text.append(safe if self.has_colours or not author else f"[{safe}]", AUTHORS[author])
        small, large = (
            f"{model} {count} tokens" for model, count in zip(authored.models, authored.tokens, strict=True)
        )
        legend = Text.assemble(
            (f"{small}, ", AUTHORS[0]), (large, AUTHORS[1]), "" if self.has_colours else " [in brackets]"
        )
        self.line(f"Q: {authored.question.query.text}")
        self.console.print(Padding(text, (0, 0, 0, 2)))
        self.console.print(legend)
        verdict = "right" if authored.right else f"wrong, the right one is {authored.question.gold}"
        self.line(
            f"answer {authored.answer.value}: {verdict}; {format_usd(authored.answer.cost)}, "
            f"{authored.answer.seconds:.1f} s"
        )

    # The job that is killed

    def job_event(self, event: Mapping[str, Any]) -> None:
        """One line for the beginning, the kill and the end of a job's processes."""
        kind = event["event"]
        if kind == "started":
            self.line(f"a process of its own begins: {event['done']} of {event['rows']} rows are done")
        elif kind == "killed":
            self.line(
                f"killed (SIGKILL): {short_usd(event['spent_nanousd'])} spent, "
                f"{event['under_way']} calls under way",
                "bold red",
            )

    def interruption(self, found: Interruption, limit: int) -> None:
        figures = found.figures
        if found.rows_at_kill is None:
            self.line("The job ended before it could be killed, so that nothing was resumed.")
        else:
            self.line(f"resumed: {figures['done']} of {figures['rows']} rows, in {found.seconds:.1f} s")
        self.line(
            f"{figures['right']} of {figures['graded']} right, {figures['skipped']} left out for want of "
            f"money, {figures['failed']} without an answer; "
            f"{format_usd(found.after.spent)} of {format_usd(limit)} spent"
        )
        self.line(
            f"{len(found.after.posted)} calls were paid for, {len(found.before.posted)} of them before the "
            f"kill; paid twice: {found.paid_twice}; the ledger's audit finds "
            f"{'nothing' if not found.findings else '; '.join(found.findings)}"
        )


def open_in_browser(path: Path) -> bool:
    """Open a file in a graphical browser, where this is a terminal on a desktop; returns whether it was."""
    import webbrowser

    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    desktop = display or sys.platform in ("darwin", "win32")
    if not (desktop and sys.stdout.isatty()):
        return False
    try:
        return webbrowser.open(path.absolute().as_uri())
    except (webbrowser.Error, OSError):
        return False


def _mark(answer: LaneAnswer | None) -> Text:
    if answer is None:
        return Text("-", "dim")
    if answer.value is None:
        return Text("none", "yellow")
    return Text("right", "green") if answer.right else Text("wrong", "red")


def _cut(text: str, columns: int) -> Text:
    cut = Text(text)
    cut.truncate(columns, overflow="ellipsis")
    return cut


def _common_prefix(names: Sequence[str]) -> str:
    """What names begin with, up to a hyphen: `qwen2.5-coder-`."""
    prefix = names[0]
    while not all(name.startswith(prefix) for name in names):
        prefix = prefix[:-1]
    return prefix[: prefix.rfind("-") + 1]
