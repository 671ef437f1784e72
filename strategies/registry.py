"""Strategies by name. Those that ship are registered here, one line each; a user's own join with `register`.

`self-consistency:cot:5` names the majority of five samples of `cot`, and so for every registered strategy; these
names are made when they are asked for, and `names` does not list them.
"""

from __future__ import annotations

from viaticum.errors import InputError, UnknownName
from viaticum.strategies.base import Strategy
from viaticum.strategies.chat import Chat
from viaticum.strategies.cod import Cod
from viaticum.strategies.cot import Cot
from viaticum.strategies.direct import Direct
from viaticum.strategies.faithful_cot import FaithfulCot
from viaticum.strategies.least_to_most import LeastToMost
from viaticum.strategies.pot import Pot
from viaticum.strategies.self_consistency import SelfConsistency, parse_name

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
    """The strategy of that name. Raises `UnknownName`, and `InputError` for self-consistency that cannot be."""
    if name in _strategies:
        return _strategies[name]
    sampled = parse_name(name)
    if sampled is None:
        raise UnknownName("strategy", name, names())
    of, samples = sampled
    return SelfConsistency(get(of), samples)


def names() -> tuple[str, ...]:
    """The registered names, in the order of registration."""
    return tuple(_strategies)


register(Direct())
register(Cot())
register(Cod())
register(Pot())
register(LeastToMost())
register(FaithfulCot())
register(Chat())
