"""Python runs this at its start in what `viaticum run` starts: calls are held from the first one on.

A program that imports no HTTP client pays nothing for it. Where Viaticum is not installed, clients that read
an address from the environment go through the proxy of `viaticum run` instead. A `sitecustomize` of the
environment runs afterwards.
"""

import os
import sys

_CLIENTS = ("httpx", "httpx2", "urllib3.connectionpool", "aiohttp.client")
_begun = False


def _start() -> None:
    from importlib.util import find_spec

    if find_spec("viaticum") is None or find_spec("wrapt") is None:
        _use_proxy()
        return
    from wrapt import register_post_import_hook

    for name in _CLIENTS:
        register_post_import_hook(_hold, name)


def _hold(module: object) -> None:
    global _begun
    if _begun:
        return
    _begun = True
    try:
        from viaticum.agents.instrumentation.run import start_in_child
    except ImportError:
        _use_proxy()
    else:
        start_in_child()


def _use_proxy() -> None:
    for each in os.environ.get("VIATICUM_RUN_PROXY", "").split():
        name, _, address = each.partition("=")
        os.environ[name] = address


def _next() -> None:
    """Run the `sitecustomize` that would have run without this one."""
    folder = os.path.dirname(os.path.abspath(__file__))
    before = list(sys.path)
    sys.path[:] = [each for each in before if os.path.abspath(each) != folder]
    ours = sys.modules.pop("sitecustomize", None)
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
        if ours is not None:
            sys.modules["sitecustomize"] = ours
    finally:
        sys.path[:] = before


if "VIATICUM_RUN" in os.environ:
    _start()
    _next()
