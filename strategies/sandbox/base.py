"""What a sandbox is: a place to run a program that a model wrote, with limits, never in this process."""

from __future__ import annotations

import ast
import asyncio
import re
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from viaticum.errors import SandboxError

SECONDS = 2.0
MEMORY_BYTES = 64 * 2**20
OUTPUT_BYTES = 16 * 2**10
PROGRAM_CHARACTERS = 20_000  # the longest program whose syntax tree is looked at

# What programs may import beside the standard library, where the back end is CPython.
PACKAGES = ("numpy", "sympy", "mpmath")
MENTIONS = re.compile(rf"\b({'|'.join(PACKAGES)})\b")

# A program's invalid escapes and the like are its own business. `<program>` is the file name it is parsed under.
warnings.filterwarnings("ignore", module="<program>")


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """How one program went.

    ok: it ran to its end within its limits. stdout: what it printed, or the value of its last expression where it
    printed nothing. error: why not ok, in words, else empty. seconds: wall-clock time, waiting for a worker included.
    """

    ok: bool
    stdout: str
    error: str
    backend: str
    seconds: float


class Sandbox(ABC):
    """Runs programs that nobody has read. Safe to use from many threads at once.

    backend: a short name, repeated in every result. strength: what separates a program from this machine, in a
    sentence.
    """

    backend: str
    strength: str

    @abstractmethod
    def run(
        self,
        program: str,
        *,
        seconds: float = SECONDS,
        memory_bytes: int = MEMORY_BYTES,
        output_bytes: int = OUTPUT_BYTES,
    ) -> ProgramResult:
        """Run one program from a clean state.

        Never raises for what the program does; raises `SandboxError` where the sandbox itself is broken or closed.
        """

    async def arun(
        self,
        program: str,
        *,
        seconds: float = SECONDS,
        memory_bytes: int = MEMORY_BYTES,
        output_bytes: int = OUTPUT_BYTES,
    ) -> ProgramResult:
        """`run` without holding up the event loop. A program whose caller is cancelled still ends at its limit."""
        return await asyncio.to_thread(
            self.run, program, seconds=seconds, memory_bytes=memory_bytes, output_bytes=output_bytes
        )

    @abstractmethod
    def close(self) -> None:
        """End all workers. Closing twice is fine."""

    def self_test(self) -> None:
        """Run a program that must work and one that must be stopped. Raises `SandboxError`."""
        works = self.run("total = 6 * 7\nprint(total)", seconds=10.0)
        if not works.ok or works.stdout.strip() != "42":
            raise SandboxError(
                f"the {self.backend} sandbox computes 6 * 7 wrong: {works.error or works.stdout!r}"
            )
        stopped = self.run("while True:\n    pass", seconds=0.05)
        if stopped.ok:
            raise SandboxError(f"the {self.backend} sandbox does not stop an endless loop")
        escaped = self.run("open('/etc/passwd').read()", seconds=10.0)
        if escaped.ok:
            raise SandboxError(f"the {self.backend} sandbox lets a program read files")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def parse(program: str) -> ast.Module | None:
    """The syntax tree of a program, or None where it is too long, too deep or no Python of this version."""
    if len(program) > PROGRAM_CHARACTERS:
        return None
    try:
        return ast.parse(program, "<program>")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def name_last_value(program: str, name: str) -> str | None:
    """The program with the value of its last expression bound to `name`; None where it ends in no expression."""
    program = program.replace("\r\n", "\n").replace("\r", "\n")
    tree = parse(program)
    if tree is None or not tree.body or not isinstance(last := tree.body[-1], ast.Expr):
        return None
    lines = program.encode().split(b"\n")  # column offsets count bytes
    line = lines[last.lineno - 1]
    lines[last.lineno - 1] = line[: last.col_offset] + f"{name} = ".encode() + line[last.col_offset :]
    return b"\n".join(lines).decode()
