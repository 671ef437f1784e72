"""The worker process behind `expressions`: reads pairs of expressions and answers whether they are equal.

Input lines are JSON lists of two LaTeX texts; output lines are `1` or `0`, after one `ready`. It runs as a
script in a process of its own and imports nothing of Viaticum, so that it starts in about half a second; its
import path is its first argument, and its environment is empty. It exits after `MAX_COMPARISONS`, to bound
the growth of sympy's caches. The parent enforces the time limit; the memory limit, and an alarm that ends a
worker whose parent died during a comparison, are set here.

math-verify decides, except where values can be computed: its numeric comparison rounds 1/2^98 to 0, and it
gives up on equations that differ by a factor. So formulas are evaluated with `DIGITS` digits, at fixed points
if they have variables, and capital letters stay apart from small ones.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import signal
import sys
import warnings
from dataclasses import replace
from fractions import Fraction
from typing import Any

MEMORY_BYTES = 2**30  # address space; sympy takes 70 MB, and `2^{10^{10}}` would exhaust any memory
ALARM_SECONDS = 30
MAX_COMPARISONS = 5_000
DIGITS = 100  # of a computed value; two values that agree in 80 of them are equal
TOLERANCE = "1.000001e-6"  # relative, only where a decimal is written; 1/3 is 0.333333
# Values of variables, primes in part, so that two different formulas hardly agree at all of them.
_POSITIVE = (("17/13", "29/23", "41/19"), ("7/31", "53/37", "67/61"))
_NEGATIVE = (("-19/11", "43/29", "-13/17"), ("23/17", "-31/43", "5/47"))
_WHOLE = (("5", "8", "6"), ("6", "11", "9"))
_CONSTANT_TEXT = re.compile(r"\\(?:mathrm|text|operatorname)\s?\{\s?([ei])\s?\}")


def main() -> None:
    """Answer until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # prints of libraries are not answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the parent
    _limit_memory()
    sys.path[:] = json.loads(sys.argv[1])
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    _same("x^2+2x", r"x(x+2)\frac{2}{2}")  # triggers sympy's lazy imports before time is measured
    _same("y=x", r"y\pi\le x")
    print("ready", file=answers, flush=True)
    for _, line in zip(range(MAX_COMPARISONS), sys.stdin, strict=False):
        a, b = json.loads(line)
        _alarm(ALARM_SECONDS)
        verdict = _same(a, b)
        _alarm(0)
        print(int(verdict), file=answers, flush=True)


def _same(a: str, b: str) -> bool:
    """Whether two formulas are equal; math-verify's comparison is asymmetric, so both orders are tried."""
    from math_verify import verify

    # Without math-verify's own timeouts: they need signals in the main thread and do not interrupt C code.
    with contextlib.suppress(Exception):
        x, y = _parse(a), _parse(b)
        if x is None or y is None:
            return False
        verdict = _compare_values(x, y)
        if verdict is None:
            verdict = any(verify(gold, other, timeout_seconds=None) for gold, other in ((x, y), (y, x)))
        return bool(verdict)
    return False


def _parse(text: str) -> Any:
    """The sympy object of a LaTeX text, normalised as by math-verify; `i` is the imaginary unit."""
    from latex2sympy2_extended import latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify.parser import LatexExtractionConfig
    from sympy import Basic, I, MatrixBase, Symbol

    text = _CONSTANT_TEXT.sub(r" \1 ", text)
    settings = replace(LatexExtractionConfig().normalization_config, units=False)  # `M m` is a product
    parsed = latex2sympy(
        normalize_latex(text, settings),
        is_real=None,
        convert_degrees=True,
        normalization_config=None,
        conversion_config=ConversionConfig(lowercase_symbols=False),
    )
    if isinstance(parsed, (Basic, MatrixBase)):
        imaginary = [symbol for symbol in parsed.free_symbols if str(symbol) == "i"]
        return parsed.subs(dict.fromkeys(imaginary, I) | {Symbol("i"): I}) if imaginary else parsed
    return None


def _compare_values(x: Any, y: Any) -> bool | None:
    """Whether two formulas or two equations have the same values; None where no values can be computed."""
    from sympy import Eq, Expr

    if isinstance(x, Eq) and isinstance(y, Eq):
        # Equal up to a factor: 2x - y + 3 = 0 is y = 2x + 3.
        if _agree(x.lhs - x.rhs, y.lhs - y.rhs, as_multiples=True):
            return True
        return False if _counts(x) or _counts(y) else None  # to solve for a term of a sum takes minutes
    if isinstance(x, Expr) and isinstance(y, Expr):
        return _agree(x, y)
    return None


def _agree(x: Any, y: Any, *, as_multiples: bool = False) -> bool | None:
    """Whether two formulas have the same values at some points, or values in one proportion."""
    from sympy import Float

    symbols = sorted({str(symbol) for each in (x, y) for symbol in each.free_symbols})
    decimal = x.has(Float) or y.has(Float)
    points = _WHOLE if _counts(x) or _counts(y) else (*_POSITIVE, *_NEGATIVE) if symbols else ((),)
    ratio, decided = None, False
    for point in points:
        ours, theirs = (_value_at(each, point) for each in (x, y))
        if ours is None or theirs is None or (point in _NEGATIVE and not (ours.is_real and theirs.is_real)):
            continue
        decided = True
        if as_multiples:
            if not ours or not theirs:
                return False
            ours, theirs = ours / theirs, (ratio if ratio is not None else ours / theirs)
            ratio = theirs
        if not _close(ours, theirs, decimal=decimal):
            return False
    return True if decided else None


def _counts(formula: Any) -> bool:
    """Whether a formula's variables are whole numbers, as in sums, factorials and powers of -1."""
    from sympy import Pow, Product, Sum, binomial, ceiling, factorial, floor

    return bool(formula.has(Sum, Product, binomial, factorial, floor, ceiling)) or any(
        power.base.is_negative and power.exp.free_symbols for power in formula.atoms(Pow)
    )


def _value_at(formula: Any, point: tuple[str, ...]) -> Any:
    """The value of a formula where its variables have the values of a point; None if it has none."""
    from sympy import Rational, nan, oo, zoo

    with contextlib.suppress(Exception):
        symbols = sorted(formula.free_symbols, key=str)
        known = {symbol: Rational(_coordinate(str(symbol), point)) for symbol in symbols}
        value = formula.subs(known).doit()
        if value in (oo, -oo):
            return value
        if not value.is_Rational:
            value = value.evalf(DIGITS)
        if value.is_number and not value.has(nan, zoo, oo) and value.as_real_imag()[0].is_number:
            return value
    return None


def _coordinate(symbol: str, point: tuple[str, ...]) -> str:
    """A value for a variable that depends on its name alone, so that both formulas get the same."""
    spread = sum(ord(letter) * (position + 1) for position, letter in enumerate(symbol))
    base = Fraction(point[spread % len(point)])
    return str(base * (1 + Fraction(spread, 1009)) if base.denominator != 1 else base + spread % 5)


def _close(x: Any, y: Any, *, decimal: bool) -> bool:
    """Rational numbers are compared exactly, others in 80 digits, decimals with `TOLERANCE`."""
    from sympy import Abs, Rational, oo

    if x in (oo, -oo) or y in (oo, -oo) or (x.is_Rational and y.is_Rational):
        return bool(x == y)
    tolerance = Rational(TOLERANCE) if decimal else Rational(1, 10**80)
    size = max(Abs(x), Abs(y))
    return bool(Abs(x - y) <= tolerance * size) or bool(size < Rational(1, 10**90))


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def _alarm(seconds: int) -> None:
    if hasattr(signal, "alarm"):  # not on Windows; the default action ends the process, also in C code
        signal.alarm(seconds)


if __name__ == "__main__":
    main()
