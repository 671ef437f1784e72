"""The worker behind `expressions`: reads pairs of expressions, says of each whether they are equal.

A line in is a JSON list of two LaTeX texts, a line out `1`, `0` or, after the start, `ready`. It is run by its path
in a process of its own and imports nothing of Viaticum, so that it starts in about half a second, and it ends after
`MAX_COMPARISONS`, so that what sympy keeps does not grow for ever. Time is kept from outside; limits on memory, and a last
alarm that ends a worker whose parent died in mid-comparison, are set here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import warnings
from typing import Any

MEMORY_BYTES = 2**30  # address space: sympy takes 70 MB of it, `2^{10^{10}}` would take more than there is
ALARM_SECONDS = 30
MAX_COMPARISONS = 5_000


def main() -> None:
    """Answer until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the parent
    _limit_memory()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    _same("x^2+2x", r"x(x+2)\frac{2}{2}")  # loads what sympy loads late, before time is kept
    print("ready", file=answers, flush=True)
    for _, line in zip(range(MAX_COMPARISONS), sys.stdin, strict=False):
        a, b = json.loads(line)
        _alarm(ALARM_SECONDS)
        verdict = _same(a, b)
        _alarm(0)
        print(int(verdict), file=answers, flush=True)


def _same(a: str, b: str) -> bool:
    """Whether the two are equal by math-verify, whose comparison takes sides: either side may be the gold answer."""
    from math_verify import verify

    # No timeouts of its own: they need the main thread's signals, and do not stop what runs in C.
    with contextlib.suppress(Exception):
        x, y = _parse(a), _parse(b)
        return bool(x and y) and any(
            verify(gold, other, timeout_seconds=None) for gold, other in ((x, y), (y, x))
        )
    return False


def _parse(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    return list(
        parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    )


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def _alarm(seconds: int) -> None:
    if hasattr(signal, "alarm"):  # not on Windows; its default action ends the process, in C code too
        signal.alarm(seconds)


if __name__ == "__main__":
    main()
