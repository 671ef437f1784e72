"""Tags for every call of a block of code, or of a process: for which team, project or customer it is.

They are stored with the entries of the calls, so that spending can be told by them afterwards
(`viaticum.reports.spending`). Leaves out the tags that say how a call was made, which Viaticum sets itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

from viaticum.budgets.records import checked_tags
from viaticum.errors import InputError

VARIABLE = "VIATICUM_TAGS"
# Set by Viaticum itself: what choices and latencies are read from is not for callers to change.
OWN_TAGS = frozenset(
    (
        *("model", "strategy", "plan", "door", "host", "tool", "thread", "session", "switched_from"),
        *("expected", "provider_batch"),
    )
)

_tags: ContextVar[Mapping[str, str]] = ContextVar("viaticum_tags", default={})  # noqa: B039 - never changed


@contextmanager
def tagged(**tags: str) -> Iterator[None]:
    """Tag every call that this block holds, in tasks and in threads that take over its context.

    Inside another block its tags are added to those of the outer one; of one name the inner one counts. Tags
    of a whole process are in VIATICUM_TAGS, such as `team=search,customer=acme`.

    Args:
        tags: texts by name, such as `team="search"`.

    Raises:
        InputError: a name or value is empty or not printable, or the name is one that Viaticum sets itself.
    """
    token = _tags.set({**_tags.get(), **_own_excluded(checked_tags(tags))})
    try:
        yield
    finally:
        _tags.reset(token)


def current_tags() -> dict[str, str]:
    """The tags of the process and of the blocks around this call. Raises `InputError` as `tagged` does."""
    return {**_of_process(os.environ.get(VARIABLE, "")), **_tags.get()}


@lru_cache(maxsize=8)
def _of_process(text: str) -> Mapping[str, str]:
    tags = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"{VARIABLE} holds NAME=VALUE, separated by commas; got {part!r}")
        tags[name.strip()] = value.strip()
    return _own_excluded(checked_tags(tags))


def _own_excluded(tags: dict[str, str]) -> dict[str, str]:
    for name in tags:
        if name in OWN_TAGS:
            raise InputError(f"Viaticum itself sets the tag {name!r}; take another name")
    return tags
