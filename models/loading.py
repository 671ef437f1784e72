"""What is told while weights load: at INFO, the model with its size and folder, then the seconds it took.

Commands hear of it too (`watch_loading`), to show a bar. Leaves out how weights are read (`decoders.load`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Called with the model and the bytes of its weights; what it returns gets whether they were loaded.
LoadingWatcher = Callable[[str, int], Callable[[bool], None]]

_log = logging.getLogger("viaticum")
_watchers: list[LoadingWatcher] = []


@contextmanager
def watch_loading(watcher: LoadingWatcher) -> Iterator[None]:
    """Tell `watcher` of every model whose weights load meanwhile, in whatever thread."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextmanager
def loading_told(name: str, weights: Path) -> Iterator[None]:
    """Log the beginning and the end of the loading of a model. weights: its file or folder."""
    files = weights.iterdir() if weights.is_dir() else [weights]
    size = sum(each.stat().st_size for each in files if each.is_file())
    began = time.monotonic()
    _log.info("loading %s: %.1f MB from %s", name, size / 1e6, weights)
    ends, loaded = [watcher(name, size) for watcher in list(_watchers)], False
    try:
        yield
        loaded = True
    finally:
        for end in ends:
            end(loaded)
    _log.info("%s is loaded, after %.1f s", name, time.monotonic() - began)
