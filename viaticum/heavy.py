"""Importing and loading what is heavy, one thread at a time.

Libraries that import their parts when they are first used (transformers) can be met half imported by a
second thread, which then sees an ImportError though everything is installed.
"""

from __future__ import annotations

import threading

LOADING = threading.RLock()
