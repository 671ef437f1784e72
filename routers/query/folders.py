"""A fitted router from its folder, where the extra that it needs is installed.

Leaves out what the folder holds (`storage`) and the router itself (`rtr`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from viaticum.errors import MissingExtra

if TYPE_CHECKING:
    from viaticum.routers.query.rtr import RTRRouter


def load_router(folder: str | Path) -> RTRRouter:
    """The router that `viaticum router fit` or `tune` wrote.

    Raises:
        MissingExtra: torch or its companions are not installed.
        InputError: there is no router in the folder.
        DataError: it is damaged, or of a later format.
    """
    try:
        from viaticum.routers.query.rtr import RTRRouter
    except ImportError as error:
        raise MissingExtra(error.name or "torch", "local") from None
    return RTRRouter.load(folder)
