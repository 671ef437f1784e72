"""Progress of a command on stderr: bars, or plain lines where stderr is no terminal.

Leaves out results, which go to stdout, and what a step is: commands report a stage with done and total.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 10.0  # between two lines of one stage where stderr is no terminal


class ProgressBar:
    """A bar on stderr; one for each task where tasks are named.

    Args:
        label: what the bar says before the first report; "" shows none until then.
        unit: what is counted. Bars of bytes are also printed, as they end, where stderr is no terminal.
        lines: where stderr is no terminal, write a line every 10 s and at the end of a stage.
    """

    def __init__(
        self, label: str = "loading", *, unit: Literal["steps", "bytes"] = "steps", lines: bool = True
    ) -> None:
        console = Console(stderr=True)
        self._terminal = console.is_terminal
        self._lines = lines and not self._terminal and unit == "steps"
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *(
                (DownloadColumn(), TimeElapsedColumn())
                if unit == "bytes"
                else (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            ),
            console=console,
            disable=not self._terminal and unit == "steps",
        )
        self._tasks: dict[str, TaskID] = {}
        if label:
            self._tasks[""] = self._progress.add_task(label, total=None)
        self._stage, self._first_done, self._started, self._last_line = "", 0, 0.0, 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        _open_bars.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _open_bars.remove(self)
        self._progress.stop()

    def report(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is. Another stage starts the bar and its clock anew."""
        now = time.monotonic()
        if stage != self._stage:
            self._progress.reset(self._task(""), total=total, description=stage)
            self._stage, self._first_done, self._started, self._last_line = stage, done, now, 0.0
        self._progress.update(self._task(""), completed=done, total=total)
        if self._lines and (now - self._last_line > LINE_SECONDS or done == total):
            elapsed = now - self._started
            left = elapsed / (done - self._first_done) * (total - done) if done > self._first_done else None
            estimate = "" if left is None else f", {left:.0f} s left"
            sys.stderr.write(f"{stage}: {done}/{total}, {elapsed:.0f} s{estimate}\n")
            self._last_line = now

    def update(self, text: str, done: int, total: int, *, task: str = "") -> None:
        """Show a text beside the bar of a task, without starting its clock anew; total 0 is unknown."""
        self._progress.update(self._task(task), description=text, completed=done, total=total or None)

    def loading(self, name: str, size: int) -> Callable[[bool], None]:
        """Show that a model loads until what this returns is called; lines where stderr is no terminal."""
        self.line(f"loading {name}: {_megabytes(size)}")
        began = time.monotonic()
        task = self._progress.add_task(f"loading {name}, {_megabytes(size)}", total=None)

        def end(loaded: bool) -> None:
            self._progress.remove_task(task)
            after = f"is loaded, after {time.monotonic() - began:.1f} s" if loaded else "is not loaded"
            self.line(f"{name} {after}")

        return end

    def line(self, text: str) -> None:
        """Write a line where stderr is no terminal."""
        if not self._terminal:
            sys.stderr.write(text + "\n")

    def _task(self, name: str) -> TaskID:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=None)
        return self._tasks[name]


_open_bars: list[ProgressBar] = []


@contextmanager
def loading_shown() -> Iterator[None]:
    """Show on stderr which weights load meanwhile: in the bar that is shown, else in one of their own."""
    from viaticum.models.loading import watch_loading

    with watch_loading(_show_loading):
        yield


def _show_loading(name: str, size: int) -> Callable[[bool], None]:
    if _open_bars:
        return _open_bars[-1].loading(name, size)
    bar = ProgressBar("", lines=False)
    bar.__enter__()
    end_task = bar.loading(name, size)

    def end(loaded: bool) -> None:
        end_task(loaded)
        bar.__exit__()

    return end


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


class StatusLine:
    """One line on stderr that is overwritten on a terminal; lines below each other elsewhere."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self._width = 0  # columns of the text that the next one overwrites

    def write(self, text: str, *, last: bool) -> None:
        """Write a text; where it is the last, the next one stands below it."""
        if self.terminal:
            text = text[: max(20, Console(stderr=True).width - 1)]
            sys.stderr.write("\r" + text.ljust(self._width))
            self._width = 0 if last else len(text)
        else:
            sys.stderr.write(text)
        sys.stderr.write("\n" if last else "")
        sys.stderr.flush()

    def close(self) -> None:
        """End the line where one stands open."""
        if self._width:
            sys.stderr.write("\n")
