"""Pieces of a text on stderr as they come: thoughts dimmed on a terminal, apart from the answer."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from viaticum.commands.terminal import visible

ShowThinking = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--hide-thinking",
        help="Show what the model thinks on stderr, dimmed on a terminal. By default on a terminal alone.",
        show_default=False,
    ),
]
DIM, RESET = "\x1b[2m", "\x1b[0m"


class ThoughtPrinter:
    """Writes the pieces of thoughts and texts to stderr. show: thoughts; None for a terminal alone."""

    def __init__(self, show: bool | None) -> None:
        terminal = sys.stderr.isatty()
        self._show = terminal if show is None else show
        dims = terminal and not Console(stderr=True).is_dumb_terminal
        self._dim, self._reset = (DIM, RESET) if dims else ("", "")
        self._open = self._in_line = False

    def thought(self, text: str) -> None:
        if self._show:
            text = visible(text, sys.stderr)
            sys.stderr.write(text if self._open else self._dim + text)
            sys.stderr.flush()
            self._open = True

    def end(self) -> None:
        """End a thought before something else is written."""
        if self._open:
            sys.stderr.write(f"{self._reset}\n\n")
            self._open = False

    def text(self, text: str) -> None:
        self.end()
        text = visible(text, sys.stderr)
        sys.stderr.write(text)
        sys.stderr.flush()
        self._in_line = not text.endswith("\n")

    def close(self) -> None:
        """End the line of a text that broke off, so that what went wrong is told on a line of its own."""
        self.end()
        if self._in_line:
            sys.stderr.write("\n")
            self._in_line = False
