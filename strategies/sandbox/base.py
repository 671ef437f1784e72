"""The contract of a sandbox: run a program that a model wrote, with limits, never in this process."""

from __future__ import annotations

import ast
import asyncio
import math
import re
import warnings
from abc import ABC, abstractmethod
from dataclasses import astuple, dataclass
from types import TracebackType
from typing import Self

from viaticum.errors import InputError, SandboxError
from viaticum.valid_text import valid_text

PROGRAM_CHARACTERS = 20_000  # longer programs are not parsed

# Importable beside the standard library, if the back end is CPython.
PACKAGES = ("numpy", "sympy", "mpmath")
_MENTIONS = re.compile(rf"\b({'|'.join(PACKAGES)})\b")

CLOSED = "this sandbox is closed; open a new one"
FORKED = (
    "this process was forked from one that had started a sandbox; start processes with the 'spawn' method"
)

# Hide syntax warnings of programs, which are parsed under the file name `<program>`.
warnings.filterwarnings("ignore", module="<program>")


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource limits of one program: wall-clock seconds, bytes of memory, bytes of output.

    Raises `InputError` for a limit that is not positive and finite.
    """

    seconds: float = 2.0
    memory_bytes: int = 64 * 2**20
    output_bytes: int = 16 * 2**10

    def __post_init__(self) -> None:
        if not all(0 < limit < math.inf for limit in astuple(self)):
            raise InputError(f"a program's limits are above zero and finite, not {self}")


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """The result of one program.

    Attributes:
        stdout: its output, or the value of its last expression if it printed nothing.
        error: why it did not finish within its limits, in words; "" if it did.
        backend: name of the back end that ran it.
        seconds: wall-clock time, including the wait for a worker.
    """

    stdout: str
    error: str
    backend: str
    seconds: float

    def __post_init__(self) -> None:
        """Programs can spell halves of characters, which no text of ours has."""
        object.__setattr__(self, "stdout", valid_text(self.stdout))
        object.__setattr__(self, "error", valid_text(self.error))

    @property
    def ok(self) -> bool:
        """Whether it finished within its limits."""
        return not self.error


class Sandbox(ABC):
    """Runs untrusted programs. Thread-safe.

    Attributes:
        backend: short name, repeated in every result.
        strength: how a program is isolated from this machine, in a sentence.
    """

    backend: str
    strength: str

    @abstractmethod
    def run(self, program: str, limits: Limits = LIMITS) -> ProgramResult:
        """Run one program from a clean state.

        Raises:
            SandboxError: the sandbox itself is broken or closed. Never because of what the program does.
        """

    async def arun(self, program: str, limits: Limits = LIMITS) -> ProgramResult:
        """`run` without blocking the event loop. A cancelled caller's program still ends at its limit."""
        return await asyncio.to_thread(self.run, program, limits)

    @abstractmethod
    def close(self) -> None:
        """End all workers. Idempotent."""

    def self_test(self) -> None:
        """Run programs that must work, must be stopped and must be refused. Raises `SandboxError`."""
        works = self.run("total = 6 * 7\nprint(total)", Limits(seconds=10.0))
        if not works.ok or works.stdout.strip() != "42":
            raise SandboxError(
                f"the {self.backend} sandbox computes 6 * 7 wrong: {works.error or works.stdout!r}"
            )
        stopped = self.run("while True:\n    pass", Limits(seconds=0.05))
        if stopped.ok:
            raise SandboxError(f"the {self.backend} sandbox does not stop an endless loop")
        escaped = self.run("open('/etc/passwd').read()", Limits(seconds=10.0))
        if escaped.ok:
            raise SandboxError(f"the {self.backend} sandbox lets a program read files")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_self_test(sandbox: Sandbox) -> Sandbox:
    """Return the sandbox after its self-test; close it if the test fails. Raises `SandboxError`."""
    try:
        sandbox.self_test()
    except BaseException:
        sandbox.close()
        raise
    return sandbox


def mentioned_packages(program: str) -> list[str]:
    """The `PACKAGES` that a program may be about to import."""
    return sorted(set(_MENTIONS.findall(program)))


def parse(program: str) -> ast.Module | None:
    """The syntax tree of a program; None if it is too long, too deep or not valid for this Python."""
    if len(program) > PROGRAM_CHARACTERS:
        return None
    try:
        return ast.parse(program, "<program>")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def name_last_value(program: str, name: str) -> str | None:
    """Bind the value of a program's last expression to `name`; None if it does not end in an expression."""
    program = program.replace("\r\n", "\n").replace("\r", "\n")
    tree = parse(program)
    if tree is None or not tree.body or not isinstance(last := tree.body[-1], ast.Expr):
        return None
    lines = program.encode().split(b"\n")  # column offsets count bytes
    line = lines[last.lineno - 1]
    lines[last.lineno - 1] = line[: last.col_offset] + f"{name} = ".encode() + line[last.col_offset :]
    return b"\n".join(lines).decode()
