"""Options that several commands share: a group of them in place of one parameter of a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

Command = Callable[..., None]


def with_options(
    parameter: str, options: Mapping[str, Any], combine: Callable[..., Any]
) -> Callable[[Command], Command]:
    """Decorate a command: it gets options in place of a parameter. One that it has itself stays its own.

    Args:
        parameter: of the command; it is called with the options' values as one object.
        options: typer's annotations by name; None is the default of each.
        combine: the object from the values of the options, by name.
    """

    def decorate(command: Command) -> Command:
        signature, parameters = inspect.signature(command, eval_str=True), list[inspect.Parameter]()
        added = {name: each for name, each in options.items() if name not in signature.parameters}

        @wraps(command)
        def run(**given: Any) -> None:
            combined = combine(**{name: given.pop(name, None) for name in added})
            command(**given, **{parameter: combined})

        for each in signature.parameters.values():
            if each.name != parameter:
                parameters.append(each)
                continue
            parameters += [
                each.replace(name=name, default=None, annotation=annotation)
                for name, annotation in added.items()
            ]
        # typer reads both.
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate
