"""The agents' three tools: Python in Viaticum's sandbox, one read-only SQL query, and a search in text files.

What goes wrong is a `ToolException`, which an agent reads as an error of the tool.
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

from langchain_core.tools import BaseTool, StructuredTool, ToolException

from viaticum.strategies.sandbox import Limits, Sandbox

ROWS, LINES, CHARACTERS = 40, 6, 600  # most of each in a result
BYTES = 100_000  # of a value in SQLite
STEPS = 2_000_000  # of SQLite's virtual machine, after which a query ends
READS = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)


def make_tools(folder: Path, sandbox: Sandbox) -> list[BaseTool]:
    """The tools over a folder that `Harbour.write` wrote."""

    def sql(text: str) -> str:
        """one SELECT query over boats(name, kind, seats) and trips(id, boat, month, passengers, price)"""
        return query(folder / "harbour.db", text)

    def search(text: str) -> str:
        """words; finds lines of the notes about captains, engineers and repairs that have all of them"""
        return find(folder / "files", text)

    def python(text: str) -> str:
        """a program that prints its result"""
        result = sandbox.run(text, Limits(seconds=5.0))
        if not result.ok:
            raise ToolException(cut(result.error))
        if not result.stdout.strip():
            raise ToolException("the program printed nothing; print the result")
        return cut(result.stdout)

    return [
        StructuredTool.from_function(each, handle_tool_error=True, handle_validation_error=True)
        for each in (sql, search, python)
    ]


def query(database: Path, text: str) -> str:
    """The rows of one query, one a line; a single column in one line.

    The file is opened for reading, and SQLite is allowed nothing but to select, so that no other file is
    attached either.
    """
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            connection.set_authorizer(
                lambda action, *_: sqlite3.SQLITE_OK if action in READS else sqlite3.SQLITE_DENY
            )
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, BYTES)
            connection.set_progress_handler(lambda: 1, STEPS)
            rows = connection.execute(text.strip().rstrip(";")).fetchmany(ROWS)
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise ToolException(f"{error}; the tables are boats and trips") from None
    if not rows or rows == [(None,)]:
        raise ToolException("no rows; boats and months begin with a capital letter")
    between = ", " if len(rows[0]) == 1 else "\n"
    return cut(between.join(", ".join(str(value) for value in row) for row in rows))


def find(folder: Path, text: str) -> str:
    """Lines with all words, as `file: line`."""
    words = [word.lower() for word in re.findall(r"\w+", text)]
    lines = [
        f"{file.relative_to(folder)}: {line}"
        for file in sorted(folder.rglob("*.txt"))
        for line in file.read_text().splitlines()
        if words and all(word in re.findall(r"\w+", line.lower()) for word in words)
    ]
    if not lines:
        raise ToolException("no line has all of these words; use fewer")
    return cut("\n".join(lines[:LINES]))


def cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} ... (cut)"
