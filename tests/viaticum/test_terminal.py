"""What a model writes reaches a terminal as text, never as a command to it."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from viaticum.commands.terminal import literal, visible
from viaticum.commands.thoughts import DIM, RESET, ThoughtPrinter

COMMAND = [sys.executable, "-c", "import sys; sys.path.pop(0); from viaticum.cli import main; main()"]
# The title of the window, a colour, the clipboard, a carriage return that hides a line, a C1 control.
ATTACK = r"Ha\u001b]0;owned\u0007 \u001b[31mred\u001b]52;c;ZXZpbA==\u0007\rhidden \u009b2J. The answer is 42."
CATALOGUE = f"""
[models.fast]
kind = "scripted"
description = "Attacks the terminal."
context_length = 4096
text = "{ATTACK}"
input_price = 1
output_price = 1
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext, caf\u00e9 \u4e09 \U0001f469\u200d\U0001f52c", None),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\rb", r"a\rb"),
        ("\x9b2J", r"\x9b2J"),
        ("\u202eevil", r"\u202eevil"),
        ("\ud800", r"\ud800"),
    ],
)
def test_controls_are_shown_as_escapes(text: str, shown: str | None) -> None:
    assert visible(text, Terminal()) == (text if shown is None else shown)


def test_a_pipe_gets_the_text_as_it_is_but_for_what_cannot_be_encoded() -> None:
    assert visible("\x1b[2J\ud800", io.StringIO()) == "\x1b[2J\\ud800"
    assert literal("a\nb\x1b") == r"a\nb\x1b"


@pytest.mark.parametrize(("kind", "dims"), [("xterm-256color", True), ("dumb", False)])
def test_a_dumb_terminal_gets_no_escapes(monkeypatch: pytest.MonkeyPatch, kind: str, dims: bool) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", kind)
    show = ThoughtPrinter(None)
    show.thought("six times seven")
    show.text("42")
    show.close()
    assert ("\x1b" in screen.getvalue()) is dims
    assert screen.getvalue().replace(DIM, "").replace(RESET, "") == "six times seven\n\n42\n"


@pytest.mark.parametrize("arguments", [["solve", "6*7?"], ["chat"]])
def test_a_hostile_text_on_a_real_terminal(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "catalogue.toml").write_text(CATALOGUE)
    options = ["--catalogue", "catalogue.toml", "--model", "fast"]
    home = {"VIATICUM_HOME": str(tmp_path / "home"), "XDG_DATA_HOME": str(tmp_path / "data")}
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, *arguments, *options],
        cwd=tmp_path,
        env={**os.environ, **home, "TERM": "xterm"},
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        assert process.stdin is not None
        process.stdin.write(b"6*7?\n")
        process.stdin.close()
        shown = b""
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0, shown
    assert b"answer is 42" in shown
    assert rb"\x1b]52;c;" in shown
    assert b"\x1b]" not in shown
    assert b"\x1b[31m" not in shown
    assert "\u009b".encode() not in shown
    assert b"\rhidden" not in shown
