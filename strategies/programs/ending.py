"""Make a program end in the expression of its answer, which the sandbox prints if nothing else was printed.

The program is changed where it would fail or stay silent for reasons that have nothing to do with its answer:
a `return` or `await` outside a function, a chart, a trailing `exit()`. Leaves out running it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable

from viaticum.strategies.sandbox.base import parse

PREFERRED = ("solution", "solve", "main", "answer")  # functions of the answer, as in PAL
_PLOTTING = frozenset({"matplotlib", "seaborn", "plotly"})
_EXITS = frozenset({"exit", "quit", "sys.exit", "os._exit"})
# Methods that change an object and return nothing.
_CHANGES = frozenset(
    {"append", "extend", "sort", "reverse", "insert", "add", "update", "remove", "clear", "discard"}
)
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def end_in_answer(program: str) -> str:
    """Make a program end in the expression of its answer.

    The expression is a call of `solution()` (as in PAL), `solve`, `main` or `answer`, if such a function is
    defined and never called; else the variable `answer` or `result`; else a call of the function, or of the
    method of the class, that the program ends in, if nobody calls it and it needs no arguments; else the last
    variable assigned. A program that already ends in an expression is returned unchanged.
    """
    tree = parse(program)
    if tree is None or not tree.body:
        return program
    try:
        return _ended(program, tree)
    except (RecursionError, ValueError):  # nested too deep to be written anew
        return program


def _ended(program: str, tree: ast.Module) -> str:
    if _repair(tree):
        program = ast.unparse(ast.fix_missing_locations(tree))
        if not tree.body:
            return program
    last = tree.body[-1]
    if isinstance(last, ast.Expr) and not _returns_nothing(last.value):
        return _run_coroutine(program, tree, last)
    expression = (
        _uncalled_preferred(tree) or _named_variable(tree) or _any_uncalled(tree) or _last_variable(tree)
    )
    return f"{program.rstrip()}\n{expression}\n" if expression else program


# --- repairs --------------------------------------------------------------------------------------


def _repair(tree: ast.Module) -> bool:
    """Change the tree where its program could not run or show its answer; whether anything was changed."""
    before = len(tree.body)
    plotting = _plotting_names(tree)
    if plotting:
        tree.body = [node for node in tree.body if not _plots(node, plotting)]
    while tree.body and _is_tail(tree.body[-1]):
        tree.body.pop()
    changed = len(tree.body) != before
    return _wrap_outer_return(tree) or changed


def _plotting_names(tree: ast.Module) -> set[str]:
    return {
        (alias.asname or alias.name).partition(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (alias.name if isinstance(node, ast.Import) else node.module or "").partition(".")[0] in _PLOTTING
    }


def _plots(node: ast.stmt, names: set[str]) -> bool:
    """Whether a statement imports a plotting library or calls one; charts are no answers."""
    if isinstance(node, ast.Import):
        return all(alias.name.partition(".")[0] in _PLOTTING for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").partition(".")[0] in _PLOTTING
    if not isinstance(node, ast.Expr | ast.Assign | ast.For | ast.With | ast.If):
        return False
    called = [each for each in ast.walk(node) if isinstance(each, ast.Call)]
    prints = any(_dotted(each.func) == "print" for each in called)
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if called and _dotted(called[0].func).partition(".")[0] in names:
                names.update(each.id for each in ast.walk(target) if isinstance(each, ast.Name))
    return not prints and any(_dotted(each.func).partition(".")[0] in names for each in called)


def _is_tail(node: ast.stmt) -> bool:
    """Whether a last statement shows nothing: a comment as a string, `exit()`, `pass`."""
    if isinstance(node, ast.Pass):
        return True
    if not isinstance(node, ast.Expr):
        return False
    value = node.value
    if isinstance(value, ast.Constant):
        return value.value is Ellipsis or (isinstance(value.value, str) and "\n" in value.value)
    return (
        isinstance(value, ast.Call)
        and _dotted(value.func) in _EXITS
        and all(isinstance(each, ast.Constant) and each.value in (0, None) for each in value.args)
    )


def _dotted(node: ast.expr) -> str:
    """`plt.show` as text; "" for what is no name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _wrap_outer_return(tree: ast.Module) -> bool:
    """Put a program with `return` or `await` outside functions into a function that is called."""
    outer = [node for statement in tree.body for node in _outside_functions(statement)]
    awaits = any(isinstance(node, ast.Await | ast.AsyncFor | ast.AsyncWith) for node in outer)
    if not awaits and not any(isinstance(node, ast.Return) for node in outer):
        return False
    imports: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    body = [node for node in tree.body if node not in imports]
    keyword = "async def" if awaits else "def"
    call = "import asyncio\nasyncio.run(_program())" if awaits else "_program()"
    wrapper = ast.parse(f"{keyword} _program():\n    pass\n{call}")
    function = wrapper.body[0]
    assert isinstance(function, _FUNCTION)
    function.body = body
    if not any(isinstance(node, ast.Return) for node in outer):
        function.body = _return_last(body)
    tree.body = [*imports, *wrapper.body]
    return True


def _return_last(body: list[ast.stmt]) -> list[ast.stmt]:
    last = body[-1]
    return [*body[:-1], ast.Return(last.value)] if isinstance(last, ast.Expr) else body


def _outside_functions(node: ast.AST) -> Iterable[ast.AST]:
    """A statement's nodes, those in functions and classes left out."""
    if isinstance(node, (*_FUNCTION, ast.ClassDef, ast.Lambda)):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _outside_functions(child)


def _run_coroutine(program: str, tree: ast.Module, last: ast.Expr) -> str:
    """Run the call of an async function that ends a program; other programs are returned unchanged."""
    functions = {node.name for node in tree.body if isinstance(node, ast.AsyncFunctionDef)}
    call = last.value
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in functions):
        return program
    source = ast.unparse(ast.Module(tree.body[:-1], []))
    return f"{source}\nimport asyncio\nasyncio.run({ast.unparse(call)})\n"


# --- the answer -----------------------------------------------------------------------------------


def _returns_nothing(value: ast.expr) -> bool:
    return (
        isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in _CHANGES
    )


def _uncalled_preferred(tree: ast.Module) -> str | None:
    """A call of a function with a name of the answer."""
    functions = {node.name: node for node in tree.body if isinstance(node, _FUNCTION)}
    called = _called([node for node in tree.body if not isinstance(node, (*_FUNCTION, ast.ClassDef))])
    for name in PREFERRED:
        if name in functions and name not in called and _callable_bare(functions[name].args):
            return _call(functions[name])
    return None


def _any_uncalled(tree: ast.Module) -> str | None:
    """A call of the function or method that a program ends in, if nobody calls it and it needs no arguments.

    None where the program prints outside functions: then it shows its answer itself.
    """
    outside = [node for statement in tree.body for node in _outside_functions(statement)]
    if any(isinstance(node, ast.Name) and node.id == "print" for node in outside):
        return None
    called = _called(tree.body)
    for node in reversed(tree.body):
        if _assigned([node]):
            return None
        if isinstance(node, _FUNCTION) and node.name not in called and _callable_bare(node.args):
            return _call(node)
        if isinstance(node, ast.ClassDef) and (method := _method(node)):
            return f"{node.name}().{method}()"
    return None


def _method(node: ast.ClassDef) -> str | None:
    """The method of a class that gives its answer, if the class and it need no arguments."""
    methods = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
    start = methods.get("__init__")
    if start is not None and not _callable_bare(start.args, bound=True):
        return None
    public = [
        name for name, each in methods.items() if name[0] != "_" and _callable_bare(each.args, bound=True)
    ]
    return next((name for name in PREFERRED if name in public), public[0] if len(public) == 1 else None)


def _call(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    call = f"{function.name}()"
    return f"__import__('asyncio').run({call})" if isinstance(function, ast.AsyncFunctionDef) else call


def _called(nodes: Iterable[ast.stmt]) -> set[str]:
    """Names of functions and classes that are called."""
    return {
        node.func.id
        for statement in nodes
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


def _callable_bare(arguments: ast.arguments, *, bound: bool = False) -> bool:
    """Whether a function can be called without arguments; bound: apart from its `self`."""
    positional = len(arguments.posonlyargs) + len(arguments.args)
    return positional - bound <= len(arguments.defaults) and None not in arguments.kw_defaults


def _named_variable(tree: ast.Module) -> str | None:
    return next((name for name in ("answer", "result") if name in _assigned(tree.body)), None)


def _last_variable(tree: ast.Module) -> str | None:
    return next(reversed(_assigned(tree.body)), None)


def _assigned(nodes: Iterable[ast.stmt]) -> list[str]:
    """Variables that these statements assign, in order."""
    return [
        target.id
        for node in nodes
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    ]
