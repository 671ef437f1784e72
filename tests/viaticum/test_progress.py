"""Progress on stderr, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from viaticum.commands import progress
from viaticum.commands.progress import ProgressBar, StatusLine, loading_shown
from viaticum.models.loading import loading_told


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_stage_writes_its_first_and_its_last_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 100.0))
    with ProgressBar() as bar:
        for done in (1, 2, 3):
            bar.report("texts", done, 3)
        bar.report("pairs", 1, 1)
    assert capsys.readouterr().err.splitlines() == [
        "texts: 1/3, 0 s",
        "texts: 3/3, 0 s, 0 s left",
        "pairs: 1/1, 0 s",
    ]


def test_without_lines_only_those_that_are_asked_for_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(lines=False) as bar:
        bar.report("texts", 1, 1)
        bar.update("other", 1, 1)
        bar.line("20/40")
    assert capsys.readouterr().err == "20/40\n"


def test_bytes_are_shown_a_bar_a_task_as_they_end(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("", unit="bytes") as bar:
        for name in ("tiny", "small"):
            bar.update(f"{name}: fetching", 500, 1000, task=name)
            bar.update(f"{name}: checking", 1000, 1000, task=name)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert [line.split()[0] for line in lines] == ["tiny:", "small:"]
    assert all("checking" in line and "1.0/1.0 kB" in line for line in lines)


def test_a_status_line_is_overwritten_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = StatusLine()
    line.write("one", last=True)
    line.write("two", last=True)
    line.close()
    assert capsys.readouterr().err == "one\ntwo\n"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    line = StatusLine()
    line.write("longer", last=False)
    line.write("short", last=False)
    line.close()
    assert terminal.getvalue() == "\rlonger\rshort \n"


def load(name: str, folder: Path) -> None:
    with loading_told(name, folder):
        pass


def test_weights_that_load_are_told_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(bytes(1_500_000))
    load("before", tmp_path)
    with loading_shown():
        load("alone", tmp_path)
        with ProgressBar(lines=False), pytest.raises(MemoryError), loading_told("failed", tmp_path):
            raise MemoryError
    load("after", tmp_path)
    assert [re.sub(r"\d+\.\d s", "0 s", line) for line in capsys.readouterr().err.splitlines()] == [
        "loading alone: 1.5 MB",
        "alone is loaded, after 0 s",
        "loading failed: 1.5 MB",
        "failed is not loaded",
    ]


def test_weights_that_load_have_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(bytes(1_500_000))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with loading_shown(), ProgressBar("reading", lines=False):
        load("in a bar", tmp_path)
    with loading_shown():
        load("alone", tmp_path)
    assert "loading in a bar, 1.5 MB" in terminal.getvalue()
    assert "loading alone, 1.5 MB" in terminal.getvalue()
