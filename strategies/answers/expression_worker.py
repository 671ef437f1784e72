"""The worker process behind `expressions`: reads pairs of expressions and answers whether they are equal.

Input lines are JSON lists of two LaTeX texts; output lines are `1` or `0`, after one `ready`. It runs as a
script in a process of its own and imports nothing of Viaticum, so that it starts in about half a second. It
exits after `MAX_COMPARISONS`, to bound the growth of sympy's caches. The parent enforces the time limit; the
memory limit, and an alarm that ends a worker whose parent died during a comparison, are set here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import warnings
from typing import Any

MEMORY_BYTES = 2**30  # address space; sympy takes 70 MB, and `2^{10^{10}}` would exhaust any memory
ALARM_SECONDS = 30
MAX_COMPARISONS = 5_000


def main() -> None:
    """Answer until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # prints of libraries are not answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the parent
    _limit_memory()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    _same("x^2+2x", r"x(x+2)\frac{2}{2}")  # triggers sympy's lazy imports before time is measured
    print("ready", file=answers, flush=True)
    for _, line in zip(range(MAX_COMPARISONS), sys.stdin, strict=False):
        a, b = json.loads(line)
        _alarm(ALARM_SECONDS)
        verdict = _same(a, b)
        _alarm(0)
        print(int(verdict), file=answers, flush=True)


def _same(a: str, b: str) -> bool:
    """Whether math-verify finds them equal; its comparison is asymmetric, so both directions are tried."""
    from math_verify import verify

    # Without math-verify's own timeouts: they need signals in the main thread and do not interrupt C code.
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
    if hasattr(signal, "alarm"):  # not on Windows; the default action ends the process, also in C code
        signal.alarm(seconds)


if __name__ == "__main__":
    main()
