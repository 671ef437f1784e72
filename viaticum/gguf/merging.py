"""One GGUF file of the shards that a model is cut into.

What follows (a folder of weights, the kernels of 4-bit blocks, llama.cpp) then knows one file, `model.gguf`.
The metadata is copied byte for byte, but for the entries about shards.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from viaticum.gguf.blocks import check_complete, tensor_bytes
from viaticum.gguf.file import Header, Tensor, read_header

_COPIED = 1 << 22  # bytes at a time


def merge(header: Header, target: Path, report: Callable[[int, int], None]) -> None:
    """Write the tensors and the metadata of all shards into one file.

    Args:
        header: of the whole model.
        target: the file; it is not synced.
        report: called with the bytes written so far and in all.

    Raises:
        WeightsError: a shard is cut short.
        OSError: a file cannot be read or written.
    """
    check_complete(header)
    spans = [tensor_bytes(tensor) for tensor in header.tensors]
    total = sum(end - begin for begin, end in spans)
    done = 0
    with target.open("wb") as out:
        out.write(_head(header, [end - begin for begin, end in spans]))
        for tensor, (begin, end) in zip(header.tensors, spans, strict=True):
            out.write(bytes(-out.tell() % header.alignment))
            with tensor.path.open("rb") as shard:
                shard.seek(begin)
                _copy(shard, out, end - begin)
            done += end - begin
            report(done, total)


def bring(path: Path, target: Path, report: Callable[[int, int], None], *, link: bool = False) -> None:
    """Copy a file, or `merge` where it is one of several shards.

    Args:
        path, target: the file or shard, and its new place.
        report: see `merge`.
        link: leave a single file where it is and link to it, where the system can.
    """
    header = read_header(path)
    if len(header.paths) > 1:
        merge(header, target, report)
        return
    if link:
        with suppress(OSError, NotImplementedError):
            target.symlink_to(path.absolute())
            return
    shutil.copyfile(path, target)


def _head(header: Header, sizes: list[int]) -> bytes:
    """Everything before the tensors' data."""
    kept = [span for key, span in header.spans.items() if not key.startswith("split.")]
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(header.tensors), len(kept))]
    with header.path.open("rb") as first:
        for begin, end in kept:
            first.seek(begin)
            parts.append(first.read(end - begin))
    offset = 0
    for tensor, size in zip(header.tensors, sizes, strict=True):
        parts.append(_entry(tensor, offset))
        offset += size + -size % header.alignment
    head = b"".join(parts)
    return head + bytes(-len(head) % header.alignment)


def _entry(tensor: Tensor, offset: int) -> bytes:
    name = tensor.name.encode()
    dimensions = len(tensor.shape)
    return (
        struct.pack("<Q", len(name))
        + name
        + struct.pack(f"<I{dimensions}Q", dimensions, *reversed(tensor.shape))
        + struct.pack("<IQ", tensor.type, offset)
    )


def _copy(source: BinaryIO, out: BinaryIO, size: int) -> None:
    while size:
        block = source.read(min(size, _COPIED))
        if not block:
            raise OSError(f"{source.name} became shorter while it was read")
        out.write(block)
        size -= len(block)
