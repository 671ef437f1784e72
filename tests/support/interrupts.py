"""Interrupts at every step of a piece of code: a Ctrl-C raised before the Nth call or turn of a loop."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_CALLS = ("CALL", "CALL_KW", "CALL_FUNCTION_EX")


@cache
def _offsets(code: CodeType) -> frozenset[int]:
    """Where Python looks for signals: calls, turns of loops and the start of a function.

    Not the call by which a `with` is left, which has begun whenever a signal is heard.
    """
    found, before = set[int](), list[str]()
    for each in dis.get_instructions(code):
        if each.opname in ("PRECALL", "CACHE"):
            continue
        leaves_with = each.opname == "CALL" and before[-3:] == ["LOAD_CONST None"] * 3
        if (each.opname in _CALLS and not leaves_with) or each.opname in ("RESUME", "JUMP_BACKWARD"):
            found.add(each.offset)
        before.append(f"{each.opname} {each.argrepr}")
    return frozenset(found)


@cache
def _is_ours(code: CodeType) -> bool:
    path = Path(code.co_filename)
    if not path.is_relative_to(ROOT):
        return False
    return not {"tests", ".venv"} & set(path.relative_to(ROOT).parts)


class Interrupt:
    """Raises `KeyboardInterrupt` in the project's code, once. where: the line where it did, else empty."""

    def __init__(self, at: int) -> None:
        self.left, self.where = at, ""

    def begin(self, frame: FrameType, event: str, argument: Any) -> Any:
        if self.where or not _is_ours(frame.f_code):
            return None
        frame.f_trace_opcodes = True
        return self.step

    def step(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode" and not self.where and frame.f_lasti in _offsets(frame.f_code):
            self.left -= 1
            if self.left == 0:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
                raise KeyboardInterrupt
        return self.step


@contextmanager
def interrupted(at: int) -> Iterator[Interrupt]:
    """Interrupt what runs in the context, in this thread, at its step number `at`, from 1."""
    interrupt, before = Interrupt(at), sys.gettrace()
    sys.settrace(interrupt.begin)
    try:
        yield interrupt
    finally:
        sys.settrace(before)
