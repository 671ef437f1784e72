"""The worker of `expressions`, with a soft limit on the processor time of a comparison.

Python code is interrupted at the limit, so that the worker goes on with the next comparison. C code is not:
there, the parent kills the worker at its own limit, as it does with the real one. For tests that compare many
endless expressions: a worker takes longer to start than most comparisons.
"""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path

SOFT_SECONDS = 0.3  # of processor time
WORKER = Path(__file__).resolve().parents[2] / "strategies" / "answers" / "expression_worker.py"


class Interrupted(BaseException):
    """A comparison took longer than its soft limit. No `Exception`, which sympy may catch."""


def interrupt(*_: object) -> None:
    raise Interrupted


def main() -> None:
    spec = importlib.util.spec_from_file_location("expression_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    same = worker._same
    limits = iter([0.0])  # the first comparison loads sympy

    def limited(a: str, b: str) -> bool:
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, next(limits, SOFT_SECONDS))
            return bool(same(a, b))
        except Interrupted:
            return False
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    signal.signal(signal.SIGVTALRM, interrupt)
    worker._same = limited
    worker.main()


if __name__ == "__main__":
    main()
