"""Tables of the commands on terminals of several widths, in pipes, and with hostile cells."""

from __future__ import annotations

import re

import pytest

from viaticum.commands.table import print_table, usd

COLUMNS = ("pair", "right", "95%", "tokens", "cost")
ROWS = [
    ("qwen2.5-coder-1.5b+cot", "61.2%", "57% to 65%", "120/310", "$0.00001545"),
    ("a-large-model-with-a-long-name+pot", "7.0%", "5% to 9%", "80/120", "$12.35"),
]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    monkeypatch.setenv("TERM", "xterm")
    return monkeypatch


@pytest.mark.parametrize("width", [30, 44, 60, 80, 200])
def test_no_number_is_cut_at_any_width(
    terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    terminal.setenv("COLUMNS", str(width))
    print_table(COLUMNS, ROWS, spare=("tokens", "95%"))
    text = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
    table, _, left_out = text.partition("left out, for the terminal is narrow: ")
    assert all(len(line) <= width for line in table.splitlines())
    for name, *cells in zip(COLUMNS, *ROWS, strict=True):
        if name not in left_out.strip().split(", ") and name != "pair":
            assert all(cell in table for cell in cells)
    assert (left_out == "") == (width >= 80)


def test_without_spare_columns_no_number_is_cut_either(
    terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.setenv("COLUMNS", "40")
    print_table(COLUMNS, ROWS)
    text = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
    assert all(cell in text for row in ROWS for cell in row[1:])


def test_a_pipe_gets_every_column_on_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    print_table(COLUMNS, ROWS, spare=("tokens", "95%"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(cell in line for line, row in zip(lines[1:], ROWS, strict=True) for cell in row)


def test_cells_are_taken_literally(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "is"), [("[red]a[/red]\x1b[31m", "two\nlines"), ("数", "1")])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()][1:] == [
        "[red]a[/red]\\x1b[31m  two\\nlines",
        "数                    1",
    ]


def test_numbers_stand_right_and_without_rows_there_is_the_head(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("a", "count"), [("x", "1"), ("y", "-"), ("z", "1,000")])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "a  count",
        "x      1",
        "y      -",
        "z  1,000",
    ]
    print_table(("a", "count"), [])
    assert capsys.readouterr().out.split() == ["a", "count"]


def test_small_amounts_keep_their_digits() -> None:
    assert [usd(each) for each in (0.00001545, 7.5e-06, 0.0, 1234.5)] == [
        "$0.00001545",
        "$0.0000075",
        "$0",
        "$1,234.50",
    ]
