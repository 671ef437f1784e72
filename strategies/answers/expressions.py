"""Compare mathematical expressions by math-verify (the extra `math`) in a process that can be killed.

Symbolic comparison may run forever (`10!!` is a factorial of a factorial), in C code that no signal handler
interrupts. So it runs in one worker process, started on first use from any thread, and killed when a
comparison exceeds `SECONDS`; the next comparison starts another. Verdicts are cached, timeouts included, for
both orders of a pair. Without math-verify, expressions are compared as text; `require` raises an error in
that case. Leaves out extracting expressions from text: see `answers`.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from viaticum.errors import MissingExtra

SECONDS = 2.0  # time limit of a comparison
START_SECONDS = 30.0  # time limit of a worker's start, which takes about 0.5 s on an idle machine
CHARACTERS = 300  # longest expression; longer ones are compared as text
VERDICTS = 10_000  # size of the cache
MAX_FAILED_STARTS = 3  # in a row, after which no worker is started any more

# All that a worker inherits: what some interpreters need to start. It reads models' text, so it has no keys.
_START_VARIABLES = ("SYSTEMROOT", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_WORKER = Path(__file__).with_name("expression_worker.py")

_WRAPPER = re.compile(r"\\[()\[\]]|\$|\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;:!]")
_SYMBOLS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "÷": "/",
        "π": r"\pi ",
        "∞": r"\infty ",
        "θ": r"\theta ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "±": r"\pm ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "°": r"^\circ ",
        "\u00a0": " ",
        "\u202f": " ",
        "\n": " ",
        "\t": " ",
        "\r": " ",
    }
)
_ROOT = re.compile(r"√\s?(\d{1,50}|[A-Za-z])?")
_RAISED = re.compile("[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,50}")
SUPERSCRIPTS = str.maketrans("⁻⁺⁰¹²³⁴⁵⁶⁷⁸⁹", "-+0123456789")
_FUNCTION = (
    r"arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp"
    r"|pi|theta|alpha|beta|gamma|lambda|infty"
)
_BARE_FUNCTION = re.compile(rf"(?<![\\A-Za-z])({_FUNCTION})(?![A-Za-z])")
_LATEX_ROOT_OF = re.compile(r"\\sqrt(?=\s?\()")
_POWER = re.compile(r"\^(-?\d{2,50}|-\d)")  # in plain notation, `x^10` is x to the 10th

# Only in formulas: a LaTeX command, a power, a variable next to an operator or number, a pair in brackets.
_SYMBOLIC = re.compile(
    r"^\s?[\[({][^,]{1,100},|\\[A-Za-z]|[\^√π∞±²³]|[A-Za-z]\s?[-+*/=<>(]|[-+*/=<>)\d]\s?[A-Za-z]"
)
_UNIT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s?\{[^{}]*\}")
_WORD = re.compile(r"\\(?:begin|end)\s?\{\w{1,20}\*?\}|\\[A-Za-z]+|[A-Za-z]{2,}")
_KNOWN_WORD = re.compile(rf"\\.*|(?:sqrt|{_FUNCTION})[xyn]?|[xyz]{{2,3}}", re.DOTALL)
_ALLOWED = re.compile(r"[ -~\s−–×·÷π∞θ≤≥≠±∪∩∈√²³⁰¹⁴-⁹⁻⁺\u00a0\u202f]+")


def same_expression(a: str, b: str) -> bool:
    """Whether two expressions, in LaTeX or plain notation, are mathematically equal. Never raises.

    False if one of them cannot be read, is longer than `CHARACTERS` or takes longer than `SECONDS`, or if
    math-verify is not installed and their texts differ.
    """
    first, second = sorted((to_latex(a), to_latex(b)))
    if first == second:
        return bool(first)
    if not (_is_formula(a) and _is_formula(b)):
        return False
    return _shared.same(first, second)


def is_symbolic(text: str) -> bool:
    """Whether a text is a formula, not words, a number, a range or a date.

    A formula has a variable, a power, a LaTeX command or a bracketed list, and no word that is not a
    function.
    """
    return _is_supported(text) and _SYMBOLIC.search(text) is not None and not _unknown_words(text)


def require() -> None:
    """Raise `MissingExtra` if expressions would be compared as text only."""
    if not _installed():
        raise MissingExtra("math-verify", "math")


def translate_symbols(text: str) -> str:
    """A text with its mathematical signs as LaTeX commands and plain spaces."""
    return text.translate(_SYMBOLS)


def to_latex(text: str) -> str:
    """Translate an expression to the LaTeX that math-verify reads, without math delimiters."""
    text = _WRAPPER.sub("", text[: CHARACTERS + 1].replace("{,}", ","))
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1]}}}" if match[1] else r"\sqrt", text)
    text = _RAISED.sub(lambda match: f"^{{{match[0].translate(SUPERSCRIPTS)}}}", text.translate(_SYMBOLS))
    text = text.replace("**", "^").replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    text = _BARE_FUNCTION.sub(r"\\\1 ", _LATEX_ROOT_OF.sub("sqrt", text))
    return " ".join(_POWER.sub(r"^{\1}", text).split()).rstrip(".,;: ")


def _is_supported(text: str) -> bool:
    return len(text) <= CHARACTERS and _ALLOWED.fullmatch(text) is not None


def _is_formula(text: str) -> bool:
    """Whether a text is an expression: math-verify would read "Paris" as a product of five variables."""
    text = _UNIT.sub("", text)
    return _is_supported(text) and bool(text.strip()) and all(len(word) < 4 for word in _unknown_words(text))


def _unknown_words(text: str) -> list[str]:
    """Words of a text that are neither functions nor LaTeX."""
    return [word for word in _WORD.findall(text) if not _KNOWN_WORD.fullmatch(word)]


def _installed() -> bool:
    try:
        return find_spec("math_verify") is not None
    except (ImportError, ValueError):
        return False


class _WorkerClient:
    """The worker process of this process and the cache of its verdicts. Callers take turns."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._verdicts: OrderedDict[tuple[str, str], bool] = OrderedDict()
        self._failed_starts = 0

    def same(self, a: str, b: str) -> bool:
        if not self._turn.acquire(timeout=START_SECONDS):
            return False
        try:
            if (a, b) not in self._verdicts:
                verdict = self._ask(a, b)
                if verdict is None:
                    return False
                self._verdicts[a, b] = verdict
                if len(self._verdicts) > VERDICTS:
                    self._verdicts.popitem(last=False)
            return self._verdicts[a, b]
        finally:
            self._turn.release()

    def _ask(self, a: str, b: str) -> bool | None:
        """The worker's verdict; False if it timed out or died twice; None if there is no worker."""
        question = json.dumps([a, b]).encode() + b"\n"
        for _ in range(2):  # the worker may have died while idle
            process = self._started()
            if process is None:
                return None
            asked = time.monotonic()
            line = self._line(process, SECONDS, question)
            if line or time.monotonic() - asked >= SECONDS:
                return line == b"1\n"
        return False

    def _started(self) -> subprocess.Popen[bytes] | None:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        if self._failed_starts >= MAX_FAILED_STARTS or not sys.executable or not _installed():
            return None
        # It has the import path of this process. -I keeps modules in its folder from shadowing others.
        paths = json.dumps([path for path in sys.path if path])
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_WORKER), paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={name: os.environ[name] for name in _START_VARIABLES if name in os.environ},
            )
        except (OSError, ValueError):
            self._failed_starts += 1
            return None
        ready = self._line(self._process, START_SECONDS) == b"ready\n"
        self._failed_starts = 0 if ready else self._failed_starts + 1
        return self._process if ready else None

    def _line(self, process: subprocess.Popen[bytes], seconds: float, question: bytes = b"") -> bytes:
        """The next line of the worker; empty if it died, or took longer and was killed.

        A timer kills the process, which ends the read on every platform and in any thread.
        """
        assert process.stdin is not None
        assert process.stdout is not None
        ended = time.monotonic() + seconds
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        line = b""
        try:
            timer.start()
            while question:  # a signal may interrupt a write
                question = question[process.stdin.write(question) :]
            while not line.endswith(b"\n") and (piece := process.stdout.read(64)):
                line += piece
            timer.cancel()
            timer.join()
        except (OSError, RuntimeError):  # the worker is gone, or no thread can be started
            line = b""
        finally:  # after an interrupt, a late answer would be taken for that of the next question
            timer.cancel()
            if not line.endswith(b"\n") or time.monotonic() >= ended:
                self.close()
        return line

    def close(self) -> None:
        """End the worker; the next comparison starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(OSError):
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def forget(self) -> None:
        """In a forked child, leave the worker to the parent."""
        process, self._process = self._process, None
        self._turn = threading.Lock()
        if process is not None:
            process.returncode = 0  # not a child of this process, so it must not be waited for
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


_shared = _WorkerClient()
atexit.register(_shared.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_shared.forget)
