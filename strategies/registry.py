"""Strategies by name. The built-in ones are registered here, one line each; `register` adds others.

`self-consistency:cot:5` is the majority vote of five samples of `cot`, and likewise for every registered
strategy; `think:512` and `think:2k` are `think` with a budget; `verify` answers no question, it checks an
answer. These are created on demand, and `names` does not list them. `load` registers strategies of the user's
own modules as `module:name`.
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
from viaticum.strategies.loading import is_module_name, load_strategy
from viaticum.strategies.pot import Pot
from viaticum.strategies.self_consistency import PREFIX as SAMPLED
from viaticum.strategies.self_consistency import SelfConsistency, parse_name
from viaticum.strategies.think import Think, parse_budget, think_within
from viaticum.strategies.verify import Verify
from viaticum.types import VERIFY

_strategies: dict[str, Strategy] = {}


def register(strategy: Strategy) -> None:
    """Register `strategy` under its name, in place of an earlier one of that name.

    Raises:
        InputError: name or description is missing (routers embed the description), the name has a `+`, which
            joins model and strategy in the name of a pair, or a setting is out of range.
    """
    name = getattr(strategy, "name", "")
    if not name or "+" in name or name != name.strip():
        raise InputError(f"a strategy cannot be named {name!r}; use a short word without '+'")
    _register(name, strategy)


def load(*names: str) -> None:
    """Import strategies by `module:name` and register each under that name; the same name is loaded once.

    The names of registered strategies are left as they are, so that a list may hold both.

    Raises:
        UnknownName: no such strategy, and no `module:name`.
        InputError: it cannot be imported, is no strategy, or has no description.
    """
    for name in names:
        sampled = parse_name(name)
        if sampled is not None:
            load(sampled[0])
        elif name not in _strategies and _is_own(name):
            _register(name, load_strategy(name))
        get(name)


def _is_own(name: str) -> bool:
    """Whether a name means a strategy of a user's module, not a built-in one with something behind it."""
    return is_module_name(name) and name.partition(":")[0] not in (*_strategies, SAMPLED)


def _register(name: str, strategy: Strategy) -> None:
    if not getattr(strategy, "description", "").strip():
        raise InputError(f"strategy {name!r} has no description; say in a sentence what it does")
    strategy.settings  # noqa: B018  raises for a setting that is out of range
    _strategies[name] = strategy


def get(name: str) -> Strategy:
    """Return the strategy of that name.

    Raises:
        UnknownName: no such strategy.
        InputError: self-consistency of a strategy or a number of samples that is not possible, or a thinking
            budget that is too large.
    """
    if name in _strategies:
        return _strategies[name]
    if name == VERIFY:
        return Verify()
    if (budget := parse_budget(name)) is not None:
        return think_within(budget)
    sampled = parse_name(name)
    if sampled is None:
        if _is_own(name):
            raise InputError(f"strategy {name!r} is not loaded; give it with --load {name}, or call load()")
        raise UnknownName("strategy", name, names())
    strategy, samples = sampled
    return SelfConsistency(get(strategy), samples)


def is_known(name: str) -> bool:
    """Whether `get` finds a strategy of that name, registered or made on demand."""
    try:
        get(name)
    except InputError:
        return False
    return True


def names() -> tuple[str, ...]:
    """The registered names, in the order of registration."""
    return tuple(_strategies)


register(Direct())
register(Cot())
register(Cod())
register(Pot())
register(LeastToMost())
register(FaithfulCot())
register(Think())
register(Chat())
