"""Reasoning strategies: how to ask a question and how to read the answer.

`base` defines a strategy, `registry` finds strategies by name, `answers` reads and compares answers, and
`sandbox` runs programs written by models. Knows no models, routers or budgets.
"""

from viaticum.strategies.answers import agreement, equivalent, normalise, read_answer
from viaticum.strategies.base import Example, Strategy
from viaticum.strategies.registry import get, is_known, load, names, register

__all__ = [
    "Example",
    "Strategy",
    "agreement",
    "equivalent",
    "get",
    "is_known",
    "load",
    "names",
    "normalise",
    "read_answer",
    "register",
]
