"""What is told while weights load: at INFO, the model with its size and folder, then the seconds it took."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger("viaticum")


@contextmanager
def loading_logged(name: str, weights: Path) -> Iterator[None]:
    """Log the beginning and the end of the loading of a model. weights: its file or folder."""
    files = weights.iterdir() if weights.is_dir() else [weights]
    size = sum(each.stat().st_size for each in files if each.is_file())
    began = time.monotonic()
    _log.info("loading %s: %.1f MB from %s", name, size / 1e6, weights)
    yield
    _log.info("%s is loaded, after %.1f s", name, time.monotonic() - began)
