"""Pages of the documentation as programs: their blocks in order, Python and shell, in one folder.

    python tests/support/doc_pages.py docs/index.md    # in the environment of this Python, whichever it is

Leaves out what a page finds on the machine that it runs on (`doc_machine`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parent.parent
# What the first word of an indented block is where that is shell; any other is output or a drawing.
PROGRAMS = ("viaticum", "pip", "curl", "python", "make", "export", "echo", "cd", "docker", "lm_eval", "ray")
PROGRAMS += ("vllm", "datasette", "source")
GPU = Path("/dev/nvidia0")
INLINE = re.compile(r"(?<!`)`(viaticum [^`\n]+|--[a-z][^`\n]*)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A block of code.

    language: the first word of its fence, or what it is taken for. line: its first, from 0. info: the rest of
    the fence's line.
    """

    language: str
    text: str
    line: int
    info: str = ""


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page, fenced and indented."""
    for token in MarkdownIt("commonmark").parse(page):
        if token.map is None or token.type not in ("fence", "code_block"):
            continue
        fenced = token.type == "fence"
        language, _, info = token.info.partition(" ")
        if language in ("", "bash", "console") and token.content.split()[:1] != []:
            language = "sh" if token.content.split()[0] in PROGRAMS else language
        yield Block(language, token.content, token.map[0] + fenced, info)


def commands(text: str) -> list[str]:
    """The commands of a block of shell, lines that go on joined; comments left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", each).rstrip() for each in lines) if line.strip()]


def program(page: str, *, shell: bool = True, before: str = "") -> str:
    """A page as one Python program.

    Every block is at its line of the page, so that a traceback names that line. A block of shell is one call
    of `doc_machine.sh`, a catalogue one of `doc_machine.toml`. What asks for a GPU is left out where there is
    none.

    Args:
        shell: with the blocks of shell and the catalogues.
        before: statements in one line, which come first.
    """
    lines = [""] * (page.count("\n") + 2)
    for block in blocks(page):
        if block.language == "python" and ('device="cuda' not in block.text or GPU.exists()):
            code = block.text.splitlines()
            lines[block.line : block.line + len(code)] = code
        elif shell and block.language in ("sh", "toml"):
            lines[block.line] = f"doc_machine.{block.language}({block.text!r})"
    lines[0] = f"import doc_machine; {before}"
    return "\n".join(lines) + "\n"


def inline_commands(page: str) -> Iterator[str]:
    """Commands and options of the command line that a page names in its text."""
    fences = {
        line
        for token in MarkdownIt("commonmark").parse(page)
        if token.type in ("fence", "code_block") and token.map is not None
        for line in range(*token.map)
    }
    for number, line in enumerate(page.splitlines()):
        if number not in fences:
            yield from INLINE.findall(line)


def main(*pages: str) -> None:
    sys.path.insert(0, str(SUPPORT))
    for page in pages:
        text = Path(page).read_text(encoding="utf-8")
        exec(compile(program(text), page, "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main(*sys.argv[1:])
