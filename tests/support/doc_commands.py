"""Whether a command that a page shows is one of `viaticum`, with the options that it shows. Runs nothing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from viaticum.cli import app

ROOT_COMMAND: Any = typer.main.get_command(app)
# A file that a page names need not be here; what no parser can know is in other words.
AT_ONCE = ("--help", "--install-completion", "--show-completion")  # act as soon as they are parsed
ABSENT = re.compile(r"does not exist|is not readable|No such file")


def find_problem(line: str) -> str:
    """What the command line has against a command of a block; empty where it takes it."""
    words = shlex.split(line.replace("...", "WORDS"))
    if any(word in AT_ONCE for word in words):
        return find_unknown(line)
    command, name, rest = ROOT_COMMAND, "viaticum", words[1:]
    context = None
    while True:
        try:
            context = command.make_context(name, list(rest), parent=context)
        except Exception as error:  # of typer's own click or of click
            problem = str(getattr(error, "message", "") or error)
            return "" if ABSENT.search(problem) else f"{line}: {problem}"
        if not hasattr(command, "commands"):
            return ""
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        if not rest:
            return ""
        if rest[0] not in command.commands:
            return f"{line}: no command {rest[0]}"
        name, command, rest = rest[0], command.commands[rest[0]], rest[1:]


def find_unknown(text: str) -> str:
    """What of a command in a sentence does not exist; its arguments may be missing."""
    words = text.split()
    if words[0].startswith("--"):
        return "" if option(words[0]) in ALL_OPTIONS else f"no option {words[0]}"
    command = ROOT_COMMAND
    for word in words[1:]:
        if word.startswith("-"):
            break
        if not hasattr(command, "commands"):
            break
        if word not in command.commands:
            return "" if word in ("...", "COMMAND") else f"{text}: no command {word}"
        command = command.commands[word]
    wrong = [word for word in words if word.startswith("--") and option(word) not in options(command)]
    return f"{text}: no option {', '.join(wrong)}" if wrong and words[1] not in ("run", "...") else ""


def option(word: str) -> str:
    return word.partition("=")[0].rstrip(",.;:")


def options(command: Any) -> set[str]:
    """The options of a command, `--help` among them; of a group those of all its commands."""
    names = {"--help", "--"}
    for parameter in command.params:
        names |= {*parameter.opts, *parameter.secondary_opts}
    for inner in getattr(command, "commands", {}).values():
        names |= options(inner)
    return names


def every_command(command: Any = ROOT_COMMAND, path: Sequence[str] = ()) -> Iterator[tuple[str, ...]]:
    """The words of each command, groups left out."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield tuple(path)
        return
    for name, each in inner.items():
        yield from every_command(each, (*path, name))


ALL_OPTIONS = options(ROOT_COMMAND)
