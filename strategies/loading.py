"""Strategies of the user's own modules, by `module:name`: a class, an object, or a function that returns one.

Loading runs the module's code, so only names that the user gives are loaded (command line, catalogue,
`Viaticum(strategies=...)`), never a name in a request or in a row of a file.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from difflib import get_close_matches
from typing import Any

from viaticum.errors import InputError
from viaticum.strategies.base import Strategy

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_module_name(name: str) -> bool:
    """Whether a name has the form `module:name`."""
    return _NAME.fullmatch(name) is not None


def load_strategy(name: str) -> Strategy:
    """The strategy that `module:name` stands for. The module may lie in the current folder.

    Raises:
        InputError: there is no such module or name, importing it fails, or it is no strategy.
    """
    if not is_module_name(name):
        raise InputError(f"{name!r} names no strategy of a module; write MODULE:NAME, such as my.module:Mine")
    module_name, _, path = name.partition(":")
    found: Any = _import(module_name, name)
    for part in path.split("."):
        if not hasattr(found, part):
            near = get_close_matches(part, dir(found), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{name}: {module_name} has no {part!r}{hint}")
        found = getattr(found, part)
    return _strategy(found, name)


def _import(module: str, name: str) -> Any:
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise InputError(
                f"{name}: there is no module {error.name!r}, neither installed nor in {folder}"
            ) from None
        raise InputError(f"{name}: importing {module} failed: {error}") from error
    except Exception as error:
        raise InputError(f"{name}: importing {module} failed: {type(error).__name__}: {error}") from error


def _strategy(found: Any, name: str) -> Strategy:
    """The object itself, or what the class or function returns."""
    made = found
    if not isinstance(found, Strategy) and callable(found):
        try:
            made = found()
        except Exception as error:
            raise InputError(
                f"{name}: {name.partition(':')[2]}() failed: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(made, Strategy):
        raise InputError(
            f"{name} is {type(made).__name__}, not a strategy; give a subclass of "
            "viaticum.strategies.Strategy, an object of one, or a function without arguments that returns one"
        )
    return made
