"""Counts what the host reads from the device: each read waits until all work that was enqueued is done.

On a CPU the same operations run, so that a test without a GPU finds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Reads of one number (`item`, `bool(...)`, `int(...)`, `if tensor:`), and shapes that depend on numbers. In
# `torch.inference_mode` only the outer operation is seen: `item` and `is_nonzero`, not their one part.
READS = {
    "_local_scalar_dense",
    "is_nonzero",
    "item",
    "equal",
    "nonzero",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
}
# Methods that copy a whole tensor to the host, which on a CPU is no operation.
COPIES = {"tolist", "numpy", "cpu", "__array__"}


class HostReads(TorchDispatchMode):
    """What the host read within this context.

    reads: names of operations that wait for a number. copies: names of methods that copy a tensor to the
    host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.copies: list[str] = []
        self._methods = _Methods(self.copies)

    def __enter__(self) -> HostReads:
        self._methods.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        by_flags = any(each is not None and each.dtype == torch.bool for each in indices)
        if name in READS or by_flags or (name == "where" and len(args) == 1):
            self.reads.append(name)  # an index of flags has the length of their sum
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, copies: list[str]) -> None:
        super().__init__()
        self._copies = copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) in COPIES:
            self._copies.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_reads() -> Iterator[HostReads]:
    """Fail if the host waits for a number; copies are only counted."""
    with HostReads() as seen:
        yield seen
    assert not seen.reads, f"the host waited for {seen.reads}"
