"""`@priced`: tools that cost money count in the budget around them, like model calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from viaticum.agents.instrumentation import context
from viaticum.agents.instrumentation.context import Payer
from viaticum.errors import InputError
from viaticum.money import nanousd

Dollars = str | int | float
F = TypeVar("F", bound=Callable[..., Any])


def priced(
    price: Dollars | Callable[[Any], Dollars], *, most: Dollars | None = None, name: str | None = None
) -> Callable[[F], F]:
    """A decorator: each call of a function, sync or async, is held in the budget around it and then charged.

    Outside a budget the function is as it was. A call that raises is not charged; where the price cannot be
    told from its result, all that was held is, and the error is raised. Below a decorator that makes a tool
    of the function (`@tool` of LangChain), not above it.

    Args:
        price: dollars of a call; or a function of the result that returns them.
        most: dollars of a call at most, which are held; needed where the price depends on the result.
        name: in the ledger; the function's by default.

    Raises:
        InputError: a price is below zero, or `most` is missing or below a fixed price.
        BudgetExceeded, BudgetClosed: by a call that the budget has no money for; the function is not called.
    """
    if callable(price):
        if most is None:
            raise InputError("a price that depends on the result needs most, the dollars that are held")
        fixed = None
    else:
        fixed = _amount("price", price)
    held = _amount("most", most) if most is not None else fixed or 0
    if fixed is not None and held < fixed:
        raise InputError(f"most is below the price of a call: {most} < {price}")

    def cost(result: Any) -> int:
        return fixed if fixed is not None else _amount("price", price(result))  # type: ignore[operator]

    def post(settle: Callable[[int | None], None], result: Any) -> None:
        try:
            amount = cost(result)
        except BaseException:  # the call was made, and nobody knows what it cost
            settle(held)
            raise
        settle(amount)

    def decorate(function: F) -> F:
        tool = name or str(getattr(function, "__name__", type(function).__name__))

        def reserve() -> Callable[[int | None], None] | None:
            payer: Payer | None = context.current()
            return None if payer is None else payer.reserve_amount(tool, held)

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def call_async(*args: Any, **kwargs: Any) -> Any:
                settle = reserve()
                if settle is None:
                    return await function(*args, **kwargs)
                try:
                    result = await function(*args, **kwargs)
                except BaseException:
                    settle(None)
                    raise
                post(settle, result)
                return result

            return call_async  # type: ignore[return-value]

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            settle = reserve()
            if settle is None:
                return function(*args, **kwargs)
            try:
                result = function(*args, **kwargs)
            except BaseException:
                settle(None)
                raise
            post(settle, result)
            return result

        return call  # type: ignore[return-value]

    return decorate


def _amount(name: str, dollars: Any) -> int:
    amount = nanousd(dollars)
    if amount < 0:
        raise InputError(f"{name} is below zero dollars: {dollars}")
    return amount
