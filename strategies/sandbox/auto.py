"""Run programs in Monty, and in CPython under bubblewrap if they need a feature that Monty lacks.

Most programs that models write are a few lines of arithmetic, which Monty runs in about a millisecond. A
missing feature (a module, a statement, a method) shows as an error, and the program, which had no effects,
runs again under bubblewrap. Its own errors and exceeded limits are results: running it again would only cost
twice.

Leaves out distinguishing a missing feature from a program that raises the same error text itself; such a
program runs twice with the same result.
"""

from __future__ import annotations

import ast
import builtins
import collections
import importlib
import re
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import replace

from viaticum.errors import SandboxError
from viaticum.strategies.sandbox.base import (
    CLOSED,
    LIMITS,
    PACKAGES,
    Limits,
    ProgramResult,
    Sandbox,
    parse,
    run_self_test,
)

# Modules that Monty implements in part. Only these are imported for comparison: other imports may have
# effects.
PARTIAL_MODULES = frozenset(
    {
        "asyncio",
        "base64",
        "bisect",
        "collections",
        "copy",
        "dataclasses",
        "datetime",
        "decimal",
        "functools",
        "gc",
        "hashlib",
        "itertools",
        "json",
        "math",
        "operator",
        "os",
        "os.path",
        "pathlib",
        "random",
        "re",
        "sys",
        "textwrap",
        "time",
        "tomllib",
        "typing",
        "urllib",
        "urllib.parse",
        "uuid",
    }
)
_CLASSES: dict[str, type] = {
    "function": types.FunctionType,
    "module": types.ModuleType,
    "list_iterator": type(iter([])),
}
_LAZY = frozenset({"map", "filter", "zip", "enumerate", "reversed"})


class AutoSandbox(Sandbox):
    """Monty with bubblewrap as fallback, started when a program first needs it; each is tested before use.

    workers: number of programs at once, in each. A result names the back end that ran it.
    Raises `SandboxError`, which names what to install, if neither works.
    """

    backend = "auto"

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers
        self._lock = threading.Lock()
        self._closed = False
        self._bwrap: Sandbox | None = None
        self._bwrap_error: SandboxError | None = None
        self._monty: Sandbox | None = None
        try:
            self._monty = open_monty(workers)
        except SandboxError as no_monty:
            try:
                self._bwrap = open_bwrap(workers)
            except SandboxError as no_bwrap:
                raise SandboxError(f"no sandbox for programs: {no_monty}; {no_bwrap}") from no_bwrap
            self.strength = self._bwrap.strength
        else:
            self.strength = f"{self._monty.strength} What that lacks runs in CPython under bubblewrap."

    def run(self, program: str, limits: Limits = LIMITS) -> ProgramResult:
        started = time.perf_counter()
        result: ProgramResult | None = None
        if self._monty is not None:
            result = self._monty.run(program, limits)
            if result.ok or not lacks_feature(program, result.error):
                return result
        try:
            second = self._start_bwrap()
        except SandboxError as error:
            if result is None or self._closed:
                raise
            return replace(result, error=f"{result.error}; monty lacks this, and {error}")
        result = second.run(program, limits)
        return replace(result, seconds=time.perf_counter() - started)

    def _start_bwrap(self) -> Sandbox:
        """Start bubblewrap once; if that fails, raise the same error each time without trying again."""
        with self._lock:
            if self._closed:
                raise SandboxError(CLOSED)
            if self._bwrap_error is not None:
                raise self._bwrap_error
            if self._bwrap is None:
                try:
                    self._bwrap = open_bwrap(self._workers)
                except SandboxError as error:
                    self._bwrap_error = error
                    raise
            return self._bwrap

    def close(self) -> None:
        with self._lock:
            self._closed = True
        for sandbox in (self._monty, self._bwrap):
            if sandbox is not None:
                sandbox.close()


def open_monty(workers: int | None = None) -> Sandbox:
    """Start and test Monty. Raises `SandboxError`, which names what to install."""
    try:
        from viaticum.strategies.sandbox.monty import MontySandbox
    except ImportError as error:
        raise SandboxError(f"no monty ({error}); run: pip install 'pydantic-monty>=1.4,<2'") from error
    return run_self_test(MontySandbox(workers))


def open_bwrap(workers: int | None = None) -> Sandbox:
    """Start and test bubblewrap. Raises `SandboxError`, which names what to install."""
    if sys.platform != "linux":
        raise SandboxError(f"bubblewrap needs Linux, this is {sys.platform}")
    from viaticum.strategies.sandbox.bubblewrap import BubblewrapSandbox

    return run_self_test(BubblewrapSandbox(workers))


def lacks_feature(program: str, error: str) -> bool:
    """Whether this error of Monty means a feature that CPython has."""
    tree = parse(program)
    if tree is None:
        return False
    if error.startswith("the program is not valid Python: "):
        return True  # CPython's parser accepted it above
    for pattern, is_lack in _MISSING_FEATURES:
        found = pattern.match(error)
        if found:
            return is_lack(tree, *found.groups())
    return False


def _imports(tree: ast.Module) -> set[str]:
    """The top-level packages that a program imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def _names(tree: ast.Module) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _defines(tree: ast.Module, *methods: str) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name in methods for node in ast.walk(tree))


def _is_not_raised(tree: ast.Module, error: str) -> bool:
    # A program that raises this itself contains the name.
    return error not in _names(tree)


def _is_cpython_module(tree: ast.Module, module: str) -> bool:
    package = module.partition(".")[0]
    return package in _imports(tree) and (package in PACKAGES or package in sys.stdlib_module_names)


def _module_has(tree: ast.Module, module: str, name: str) -> bool:
    return module in PARTIAL_MODULES and hasattr(importlib.import_module(module), name)


def _import_has(tree: ast.Module, name: str, module: str) -> bool:
    return _module_has(tree, module, name)


def _is_builtin(tree: ast.Module, name: str) -> bool:
    return hasattr(builtins, name) or name in ("exit", "quit")


def _class_has(tree: ast.Module, class_name: str, name: str) -> bool:
    if _defines(tree, "__getattr__", "__getattribute__", "__setattr__"):
        return True
    known = _class(class_name)
    return hasattr(known, name) if known else hasattr(object, name) or hasattr(type, name)


def _class(name: str) -> type | None:
    """The class that an error message names, if it is one of CPython's."""
    module, _, last = name.rpartition(".")
    if module in PARTIAL_MODULES:
        found = getattr(importlib.import_module(module), last, None)
    else:
        found = _CLASSES.get(name) or getattr(builtins, name, None) or getattr(collections, name, None)
    return found if isinstance(found, type) else None


def _needs_iterator(tree: ast.Module) -> bool:
    # Monty returns lists where CPython returns iterators.
    return bool(_LAZY & _names(tree)) or any(isinstance(node, ast.GeneratorExp) for node in ast.walk(tree))


def _has_operator(tree: ast.Module, message: str) -> bool:
    """Whether the error concerns a class with special methods, of which Monty calls only some."""
    named = set(re.findall(r"'(\w+)'", message))
    return any(
        isinstance(node, ast.ClassDef)
        and node.name in named
        and any(isinstance(each, ast.FunctionDef) and _is_special(each.name) for each in node.body)
        for node in ast.walk(tree)
    )


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__") and name != "__init__"


def _always(tree: ast.Module) -> bool:
    return True


def _is_endless(tree: ast.Module) -> bool:
    # Monty runs `map`, `filter` and generators to their end, which an endless iterator has not.
    names = _names(tree) | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return (
        "itertools" in _imports(tree) and bool(names & {"count", "cycle", "repeat"}) and _needs_iterator(tree)
    )


_RAISED = r"the program raised "
_MISSING_FEATURES: tuple[tuple[re.Pattern[str], Callable[..., bool]], ...] = (
    (re.compile(_RAISED + r"(NotImplementedError)"), _is_not_raised),
    (re.compile(_RAISED + r"ModuleNotFoundError: No module named '([\w.]+)'"), _is_cpython_module),
    (re.compile(_RAISED + r"ImportError: cannot import name '(\w+)' from '([\w.]+)'"), _import_has),
    (re.compile(_RAISED + r"AttributeError: module '([\w.]+)' has no attribute '(\w+)'"), _module_has),
    (
        re.compile(
            _RAISED + r"AttributeError: (?:type object )?'([\w.]+)'(?: object)? has no attribute '(\w+)'"
        ),
        _class_has,
    ),
    (re.compile(_RAISED + r"NameError: name '(\w+)' is not defined"), _is_builtin),
    (re.compile(_RAISED + r"TypeError: 'list' object is not an iterator"), _needs_iterator),
    (re.compile(_RAISED + r"TypeError: cannot create 'object' instances"), _always),
    (re.compile(_RAISED + r"(RecursionError|PermissionError)\b"), _is_not_raised),
    (re.compile(_RAISED + r"RuntimeError: '[\w.]+' is not supported in this environment"), _always),
    (re.compile(_RAISED + r"ValueError: pow\(\) 2nd argument cannot be negative"), _always),
    (re.compile(_RAISED + r"TypeError: (.*)"), _has_operator),
    (re.compile(r"the program (?:needed more than|was stopped after)"), _is_endless),
)
