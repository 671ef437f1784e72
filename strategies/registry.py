"""Strategies by name. The four that ship are registered here, one line each; a user's own join with `register`."""

from __future__ import annotations

from viaticum.errors import InputError, UnknownName
from viaticum.strategies.base import Strategy
from viaticum.strategies.cod import Cod
from viaticum.strategies.cot import Cot
from viaticum.strategies.direct import Direct
from viaticum.strategies.pot import Pot

_strategies: dict[str, Strategy] = {}


def register(strategy: Strategy) -> None:
    """Make `strategy` known under its name; one of the same name is replaced.

    Raises `InputError` where the name or the description is missing: routers embed the description, and
    `+` joins model and strategy in the name of a pair.
    """
    name, description = getattr(strategy, "name", ""), getattr(strategy, "description", "")
    if not name or "+" in name or name != name.strip():
        raise InputError(f"a strategy cannot be named {name!r}; use a short word without '+'")
    if not description.strip():
        raise InputError(f"strategy {name!r} has no description; say in a sentence what it does")
    _strategies[name] = strategy


def get(name: str) -> Strategy:
    """The strategy of that name. Raises `UnknownName`."""
    try:
        return _strategies[name]
    except KeyError:
        raise UnknownName("strategy", name, names()) from None


def names() -> tuple[str, ...]:
    """The registered names, in the order of registration."""
    return tuple(_strategies)


register(Direct())
register(Cot())
register(Cod())
register(Pot())
