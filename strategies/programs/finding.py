"""Which part of a reply is its program.

Code stands in fences of backticks or tildes, in tags, after prompts (`>>> `), or bare. Of several blocks, the
last one that computes something is the program, with the earlier blocks whose names it uses. A thought's
drafts do not count: the text after it is searched.
"""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from viaticum.strategies.answers.markup import spoken
from viaticum.strategies.sandbox.base import PROGRAM_CHARACTERS, parse

TEXT_CHARACTERS = 60_000  # only the end of a reply is searched
MAX_BLOCKS = 20  # only the last blocks of a reply are looked at
MAX_FENCES = 50  # fences after one that are looked at for its end
MAX_STARTS = 6  # lines of prose tried as the start and as the end of a bare program

_FENCE = re.compile(r"^[ \t>]*(`{3,}|~{3,})[ \t]*(.*)$")
_INLINE_FENCE = re.compile(r"```[ \t]*+(?:python3?|py)[ \t]++([^`\n]++)```", re.IGNORECASE)
_LATE_OPENING = re.compile(r"(?m)(?<=[^\s`>])[ \t]+(```[ \t]*(?:python|py)\w*)[ \t]*$", re.IGNORECASE)
_LATE_CLOSING = re.compile(r"(?m)(?<=[^\s`>])[ \t]*(```+)(?=[ \t]*$)")
# Commands of a notebook, the name of the language on a line of its own, a closing fence that was cut, and
# tokens that end a turn.
_NO_CODE = re.compile(
    r"(?m)^[ \t]*[!%](?:pip|conda|matplotlib|apt|python|timeit|%time).*$|\A\s*(?i:python3?|py)[ \t]*$"
    r"|^`{1,2}\s*\Z|<\|[a-z_]{2,30}\|>|</s>\s*\Z|<end_code>\s*\Z"
)
_TAGS = (
    *((f"<{name}>", f"</{name}>") for name in ("program", "execute", "tool_code", "python", "code")),
    ("[python]", "[/python]"),
)
_PYTHON = re.compile(r"\W*(?:python|py|ipython|pycon|sage|tool_code|jupyter|code)[\d.]*\b.*", re.IGNORECASE)
_PROMPT = re.compile(r"^\s*(?:>>>|In \[\d+\]:)(?: |$)")
_CONTINUED = re.compile(r"^\s*(?:\.\.\.|   \.\.\.:)(?: |$)")
_USAGE = re.compile(
    r"\b(?:examples?(?: usage)?|usage|tests?(?: it| cases?)?|expected output|prints|outputs?)\b[^.\n]{0,60}$",
    re.IGNORECASE,
)
_CODE_START = re.compile(
    r"\s*(?:import |from \w|def |class |for |while |if |print\(|#|@|[A-Za-z_]\w*(?:, ?\w+)* ?=[^=])"
)
# What keyboards and LaTeX turn operators, quotes and spaces into.
_TYPOGRAPHY = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": "*",
        "·": "*",
        "⋅": "*",
        "÷": "/",
        "∕": "/",
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "≤": "<=",
        "≥": ">=",
        "≠": "!=",
        "，": ",",
        "（": "(",
        "）": ")",
        "：": ":",
        "＝": "=",
        "＋": "+",
        "；": ";",
        "【": "[",
        "】": "]",
        "²": "**2",
        "³": "**3",
    }
)
_INVISIBLE = str.maketrans(
    {
        "\u00a0": " ",
        "\u202f": " ",
        "\u2009": " ",
        "\u3000": " ",
        "\ufeff": None,
        "\u200b": None,
        "\u2060": None,
    }
)
_BUILTINS = frozenset(dir(builtins)) | {"exit", "quit", "__name__", "__file__", "__doc__"}


@dataclass(frozen=True, slots=True)
class Block:
    """Code of a reply. label: its language, lower case; before: the line of prose before it."""

    label: str
    code: str
    before: str = ""

    @property
    def is_python(self) -> bool:
        return _PYTHON.fullmatch(self.label) is not None


def find_program(text: str) -> str | None:
    """The program of a reply, cleaned of prompts, typography and outer indentation; None if it has none."""
    text = spoken(text[-TEXT_CHARACTERS:].replace("\r\n", "\n").replace("\r", "\n"))
    text = _INLINE_FENCE.sub(r"\n```python\n\1\n```\n", text)
    text = _LATE_CLOSING.sub(r"\n\1", _LATE_OPENING.sub(r"\n\1", text))
    blocks = list(_fenced(text))[-MAX_BLOCKS:]
    blocks = blocks or list(_tagged(text))[-1:]
    if not blocks:
        bare = _bare_program(text)
        return clean_code(bare) if bare else None
    blocks = [Block(each.label, clean_code(each.code), each.before) for each in blocks]
    python = [each for each in blocks if each.is_python and each.code.strip()]
    if not python:
        python = [each for each in blocks if not each.label and is_code(each.code)]
    if not python:
        bare = _bare_program(_outside_fences(text))
        return clean_code(bare) if bare else None
    return _choose(python)


def _choose(blocks: Sequence[Block]) -> str:
    """The program among Python blocks: the last that computes, with the earlier ones whose names it uses."""
    if len(blocks) > 1:
        whole = [each for each in blocks if parse(each.code) is not None]
        blocks = whole or blocks
    chosen = len(blocks) - 1
    while chosen > 0 and _is_demonstration(blocks, chosen):
        chosen -= 1
    program = blocks[chosen].code
    for earlier in reversed(blocks[:chosen]):
        defined = _defined(earlier.code)
        if defined and defined & _undefined(program):
            program = f"{earlier.code.rstrip()}\n{program}"
    return program


def _is_demonstration(blocks: Sequence[Block], index: int) -> bool:
    """Whether a block only tests or shows an earlier one that has an answer of its own."""
    tree = parse(blocks[index].code)
    if tree is None:
        return False
    if not _computes(tree):
        return True
    shown = _USAGE.search(blocks[index].before) is not None
    return shown and any(_prints(parse(each.code)) for each in blocks[:index])


def _computes(tree: ast.Module) -> bool:
    """Whether a program has statements that can make an answer, not only imports, tests and fixed texts."""
    return any(
        not isinstance(node, ast.Import | ast.ImportFrom | ast.Assert | ast.Pass)
        and not prints_constant(node)
        for node in tree.body
    )


def prints_constant(node: ast.stmt) -> bool:
    """Whether a statement prints a text that is written out in the program: "Done", "All tests passed"."""
    call = node.value if isinstance(node, ast.Expr) else None
    return (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "print"
        and all(isinstance(each, ast.Constant) and isinstance(each.value, str) for each in call.args)
    )


def _prints(tree: ast.Module | None) -> bool:
    """Whether a program shows a value where it stands: prints outside functions, or ends in an expression."""
    if tree is None or not tree.body:
        return False
    outside = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return isinstance(tree.body[-1], ast.Expr) or any(
        isinstance(node, ast.Name) and node.id == "print" for each in outside for node in ast.walk(each)
    )


def _defined(code: str) -> set[str]:
    """Names that a program binds at its top level."""
    tree = parse(code)
    names: set[str] = set()
    for node in tree.body if tree else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        else:
            names.update(
                each.id
                for each in ast.walk(node)
                if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
            )
    return names


def _undefined(code: str) -> set[str]:
    """Names that a program reads and never binds: those of an earlier block."""
    tree = parse(code)
    if tree is None:
        return set()
    bound = _defined(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler):
            bound.add(node.name or "")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    first_reads = _read_before_bound(tree)
    read = {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    return ((read - bound) | first_reads) - _BUILTINS


def _read_before_bound(tree: ast.Module) -> set[str]:
    """Names that a top-level statement changes before the program binds them: `total += 3`, `x = x + 1`."""
    bound: set[str] = set()
    found: set[str] = set()
    for node in tree.body:
        if (
            isinstance(node, ast.AugAssign)
            and isinstance(node.target, ast.Name)
            and node.target.id not in bound
        ):
            found.add(node.target.id)
        if isinstance(node, ast.Assign):
            read = {each.id for each in ast.walk(node.value) if isinstance(each, ast.Name)}
            stored = {each.id for each in node.targets if isinstance(each, ast.Name)}
            found |= (read & stored) - bound
        bound |= {
            each.id
            for each in ast.walk(node)
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
        } | ({node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set())
    return found


# --- blocks ---------------------------------------------------------------------------------------


def _fenced(text: str) -> Iterator[Block]:
    """The fenced blocks of a text; the last may be open."""
    lines = text.split("\n")
    fences = [(number, found) for number, line in enumerate(lines) if (found := _FENCE.match(line))]
    end = -1
    for index, (number, opened) in enumerate(fences):
        if number <= end:
            continue  # it closed the block before
        between = (line.strip() for line in reversed(lines[end + 1 : number]))
        before = next((line for line in between if line), "")
        end = _closing(lines, number, opened[1], fences[index + 1 : index + 1 + MAX_FENCES])
        yield Block(opened[2].strip().lower(), "\n".join([*lines[number + 1 : end], ""]), before)


def _closing(
    lines: Sequence[str], start: int, fence: str, fences: Sequence[tuple[int, re.Match[str]]]
) -> int:
    """Index of the line that closes a fence, among the next fences; the number of lines where none does."""
    ends = [number for number, found in fences if found[1].startswith(fence) and not found[2].strip()]
    if not ends:  # a cut or careless reply: another fence that opens ends the block too
        return fences[0][0] if fences else len(lines)
    first = "\n".join(lines[start + 1 : ends[0]])
    if ('"""' in first or "'''" in first) and parse(clean_code(first)) is None:
        for end in ends[1:4]:  # a fence inside a string of three quotes
            if parse(clean_code("\n".join(lines[start + 1 : end]))) is not None:
                return end
    return ends[0]


def _tagged(text: str) -> Iterator[Block]:
    """The last code between the tags of each kind."""
    lower = text.lower()
    for opening, closing in _TAGS:
        end = lower.rfind(closing)
        start = lower.rfind(opening, 0, max(end, 0))
        if start >= 0:
            yield Block("python", text[start + len(opening) : end])


def _outside_fences(text: str) -> str:
    """The text without its fenced blocks."""
    kept, inside = [], False
    for line in text.split("\n"):
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            kept.append(line)
    return "\n".join(kept)


def _bare_program(text: str) -> str | None:
    """A program without a fence: the whole text, or the lines of it that are code and print something."""
    bare = text.strip("\n`").rstrip()
    if is_code(bare) or is_code(clean_code(bare)):
        return bare
    lines = bare.split("\n")
    if "print(" not in bare:
        return None
    starts = [number for number, line in enumerate(lines) if _CODE_START.match(line)][:MAX_STARTS]
    ends = [number for number in range(len(lines), 0, -1) if lines[number - 1].strip()][:MAX_STARTS]
    for start in starts:
        for end in ends:
            code = "\n".join(lines[start:end])
            if end > start and is_code(code):
                return code
    return None


def is_code(text: str) -> bool:
    """Whether unfenced text is a program, not prose: it parses and assigns, calls or defines something."""
    tree = parse(text)
    does = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Call, ast.FunctionDef)
    return tree is not None and any(isinstance(node, does) for node in ast.walk(tree))


# --- cleaning -------------------------------------------------------------------------------------


def clean_code(code: str) -> str:
    """Code without prompts, invisible characters and outer indentation; in ASCII if it parses only then."""
    if len(code) > PROGRAM_CHARACTERS:
        return code
    code = _NO_CODE.sub("", code.translate(_INVISIBLE))
    if any(_PROMPT.match(line) for line in code.split("\n")):
        code = _without_prompts(code)
    if parse(code) is not None:
        return code
    attempts = (
        textwrap.dedent(code),
        *(textwrap.dedent(code.expandtabs(size)) for size in (4, 8)),
        _unquoted(code),
    )
    for attempt in (*attempts, *(each.translate(_TYPOGRAPHY) for each in attempts)):
        if parse(attempt) is not None:
            return attempt
    return code


def _unquoted(code: str) -> str:
    """Code out of a block quote, or with a first line that alone lacks the indentation of the others."""
    lines = code.split("\n")
    if all(line.lstrip().startswith(">") for line in lines if line.strip()):
        return textwrap.dedent("\n".join(line.lstrip().removeprefix(">") for line in lines))
    return f"{lines[0].lstrip()}\n" + textwrap.dedent("\n".join(lines[1:]))


def _without_prompts(code: str) -> str:
    """The statements of an interactive session, without what it showed."""
    kept: list[str] = []
    for line in code.split("\n"):
        for prompt in (_PROMPT, _CONTINUED):
            if found := prompt.match(line):
                kept.append(line[found.end() :])
                break
    return "\n".join(kept) + "\n"
