"""Weights on this machine: fetched once, found from then on.

`pull` fetches and publishes, `locate` finds, `check` reads every byte. A published folder,
`<cache>/models/<name>`, is what transformers and sentence-transformers read from a path, plus the file the
weights came in (model.gguf) and a manifest. It appears whole, by one rename, or not at all. Once it is there
nothing needs the network. Leaves out fetching from a source (`viaticum.weight_fetching`) and loading a model
(`viaticum.decoders`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import platformdirs

from viaticum.catalogue import ModelSpec
from viaticum.errors import InputError, WeightsError
from viaticum.files import run_lock, sync
from viaticum.weight_fetching import fetch_source, room_for
from viaticum.weight_sources import Hub, LocalPath, Source, Wheels
from viaticum.wheels import DISK_FULL, FetchError, Report

MANIFEST = "manifest.json"
GGUF = "model.gguf"
WEIGHTS = ("*.safetensors", GGUF, "pytorch_model*.bin")


@dataclass(frozen=True, slots=True)
class Pulled:
    """Weights on this machine: the folder, and the size in bytes and hash of the file they came in."""

    name: str
    path: Path
    bytes: int
    sha256: str

    def as_json(self) -> dict[str, str | int]:
        return {"name": self.name, "path": str(self.path), "bytes": self.bytes, "sha256": self.sha256}


def cache_dir() -> Path:
    """The folder that weights are kept in: VIATICUM_CACHE, or the user's cache folder."""
    return Path(os.environ.get("VIATICUM_CACHE") or platformdirs.user_cache_dir("viaticum")).absolute()


def locate(spec: ModelSpec) -> Path:
    """The folder that `AutoModel.from_pretrained` or `SentenceTransformer` reads, sizes checked.

    Raises:
        WeightsError: the weights are not on this machine, are from another source than the catalogue names,
            or a file is missing or differs in size from the manifest.
    """
    own = _own_folder(spec)
    if own is not None:
        return own
    folder = _published(spec)
    for name, facts in _manifest(spec)["files"].items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            raise WeightsError(f"{folder / name} is missing; run: viaticum models pull {spec.name}") from None
        if size != facts["bytes"]:
            raise WeightsError(
                f"{folder / name} is damaged: {size} bytes, not {facts['bytes']}; run: viaticum models pull"
                f" {spec.name}"
            )
    return folder


def check(spec: ModelSpec, report: Report | None = None) -> Pulled:
    """`locate`, and compare the hash of every file with the manifest. Takes seconds, not milliseconds.

    Raises:
        WeightsError: as `locate`, or a hash differs.
    """
    folder = locate(spec)
    if _own_folder(spec) is not None:
        return _describe_own(spec, folder)
    manifest, done = _manifest(spec), 0
    total = sum(facts["bytes"] for facts in manifest["files"].values())
    for name, facts in manifest["files"].items():
        if _sha256(folder / name) != facts["sha256"]:
            raise WeightsError(
                f"{folder / name} is damaged: its sha256 is not that of the manifest; "
                f"run: viaticum models pull --check {spec.name}"
            )
        done += facts["bytes"]
        if report is not None:
            report("checking", done, total)
    return Pulled(spec.name, folder, manifest["bytes"], manifest["sha256"])


def pull(spec: ModelSpec, report: Report | None = None, *, full_check: bool = False) -> Pulled:
    """Fetch the weights of a model unless they are here and whole.

    Of two processes that pull the same model the second waits and finds the result of the first. A killed
    pull leaves at most a temporary folder, which the next pull removes.

    Args:
        report: called with a stage, the bytes done and the bytes in all.
        full_check: hash what is here, instead of comparing sizes alone.

    Raises:
        WeightsError: no source can be reached, the bytes are not those the catalogue names, or the disk is
            full.
        MissingExtra: the weights need unpacking and the extra `local` is not installed.
    """
    report = report or (lambda stage, done, total: None)
    own = _own_folder(spec)
    if own is not None:
        return _describe_own(spec, own)
    try:
        with _lock(spec, report):
            with suppress(WeightsError):  # missing or damaged: fetched below
                return check(spec, report) if full_check else _find(spec)
            return _fetch(spec, report)
    except OSError as error:
        raise _explain(spec, error) from None


def pull_all(
    specs: Sequence[ModelSpec],
    report: Callable[[str, str, int, int], None] | None = None,
    *,
    full_check: bool = False,
    at_once: int = 2,
) -> list[Pulled]:
    """`pull` several models, `at_once` at a time: one downloads while another is unpacked.

    Threads suffice: pip is a process of its own, and inflating, hashing and unpacking run outside the
    interpreter lock. An interrupt ends all of them within moments.

    Args:
        report: called with the name, a stage, the bytes done and the bytes in all.
    """
    interrupted = threading.Event()

    def work(spec: ModelSpec) -> Pulled:
        def report_stage(stage: str, done: int, total: int) -> None:
            if interrupted.is_set():
                raise WeightsError(f"pulling {spec.name} was interrupted")
            if report is not None:
                report(spec.name, stage, done, total)

        return pull(spec, report_stage, full_check=full_check)

    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(work, spec) for spec in specs]
        try:
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            interrupted.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _require_weights(spec: ModelSpec) -> None:
    if spec.kind == "pair":
        raise InputError(f"{spec.name} is a pair: its weights are those of {' and '.join(spec.members)}")
    if spec.kind == "remote":
        raise InputError(f"{spec.name} is a remote model: it has no weights on this machine")


def _own_folder(spec: ModelSpec) -> Path | None:
    """The user's own folder, where the entry names one; it is used in place."""
    _require_weights(spec)
    for source in spec.sources:
        if isinstance(source, LocalPath) and (folder := Path(source.path).expanduser()).is_dir():
            _require_own_weights(spec, folder)
            return folder.absolute()
    return None


def _require_own_weights(spec: ModelSpec, folder: Path) -> None:
    """Check that transformers reads a user's folder, and that a local model's weights are in it.

    Of a model that a server holds only the tokenizer is read.
    """
    files = sorted(folder.glob("*.gguf"))
    hint = f"; give the file itself as path: {files[0]}" if files else ""
    if not any((folder / name).is_file() for name in ("config.json", GGUF)):
        raise WeightsError(
            f"{folder} holds neither config.json nor {GGUF}; {spec.name} needs a folder that"
            f" transformers reads, or a GGUF file and its tokenizer.json{hint}"
        )
    if (
        spec.kind == "local"
        and spec.engine != "served"
        and not any(any(folder.glob(each)) for each in WEIGHTS)
    ):
        raise WeightsError(f"{folder} holds no weights ({', '.join(WEIGHTS)}){hint}")


def _describe_own(spec: ModelSpec, folder: Path) -> Pulled:
    size, sha256 = _weigh(folder)
    return Pulled(spec.name, folder, size, sha256)


def _published(spec: ModelSpec) -> Path:
    return cache_dir() / "models" / spec.file_name


def _manifest(spec: ModelSpec) -> dict[str, Any]:
    path = _published(spec) / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        source = manifest["source"]
    except FileNotFoundError:
        raise WeightsError(
            f"weights of {spec.name} are not on this machine; run: viaticum models pull {spec.name}"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise WeightsError(f"{path} is damaged; run: viaticum models pull {spec.name}") from None
    if source not in [_plain(each) for each in spec.sources]:
        raise WeightsError(
            f"the weights of {spec.name} on this machine are not from a source that the catalogue names; "
            f"run: viaticum models pull {spec.name}"
        )
    return manifest


def _find(spec: ModelSpec) -> Pulled:
    folder, manifest = locate(spec), _manifest(spec)
    return Pulled(spec.name, folder, manifest["bytes"], manifest["sha256"])


def _lock(spec: ModelSpec, report: Report) -> AbstractContextManager[None]:
    """One pull of a model at a time on this machine."""
    path = cache_dir() / "locks" / f"{spec.file_name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return run_lock(path, waiting=lambda: report("waiting", 0, 0))


def _fetch(spec: ModelSpec, report: Report) -> Pulled:
    """Try the sources in order. Needs the lock: temporary folders are then those of killed pulls."""
    own = cache_dir() / "tmp" / spec.file_name
    shutil.rmtree(own, ignore_errors=True)
    reasons = []
    try:
        for source in spec.sources:
            workspace = own / uuid.uuid4().hex
            folder = workspace / "folder"
            folder.mkdir(parents=True)
            try:
                _require_room_for(spec, source)
                unpack = spec.engine != "llama"
                fetch_source(spec.name, source, folder, workspace, report, unpack=unpack)
                return _publish(spec, source, folder)
            except FetchError as error:
                reasons.append(str(error))
            finally:
                shutil.rmtree(workspace, ignore_errors=True)
    finally:
        shutil.rmtree(own, ignore_errors=True)
    raise WeightsError(f"cannot fetch the weights of {spec.name}: {'; '.join(reasons)}")


def _publish(spec: ModelSpec, source: Source, folder: Path) -> Pulled:
    """Write the manifest, sync every file to disk, then rename the folder to its name."""
    files: dict[str, dict[str, Any]] = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    if isinstance(source, Hub) and "model.gguf" not in files:
        size, sha256 = _weigh(folder)
    else:
        came_in = files[source.file if isinstance(source, Wheels) else GGUF]
        size, sha256 = came_in["bytes"], came_in["sha256"]
    manifest = {
        "name": spec.name,
        "source": _plain(source),
        "bytes": size,
        "sha256": sha256,
        "files": files,
        "versions": _versions(),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (*folder.rglob("*"), folder):
        sync(path)
    target = _published(spec)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # damaged, or from another source
        target.rename(folder.parent / "old")
    folder.rename(target)
    sync(target.parent)
    return Pulled(spec.name, target, size, sha256)


def _require_room_for(spec: ModelSpec, source: Source) -> None:
    if shutil.disk_usage(cache_dir()).free < room_for(source, unpack=spec.engine != "llama"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _explain(spec: ModelSpec, error: OSError) -> WeightsError:
    cache = cache_dir()
    if error.errno not in DISK_FULL:
        return WeightsError(
            f"cannot keep the weights of {spec.name} in {cache}: {error.strerror or error}; "
            "VIATICUM_CACHE names another folder"
        )
    needed = max(map(room_for, spec.sources))
    amount = f"about {needed} bytes" if needed else "more room"
    return WeightsError(
        f"disk full: pulling {spec.name} needs {amount} in {cache}, where {shutil.disk_usage(cache).free} are"
        " free; nothing was kept; VIATICUM_CACHE names another folder"
    )


def _weigh(folder: Path) -> tuple[int, str]:
    """Size and sha256 of a folder's weights files, concatenated in the order of their names."""
    digest, size = hashlib.sha256(), 0
    for path in _weight_files(folder):
        size += path.stat().st_size
        _sha256(path, digest)
    return size, digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    """Its safetensors files, or GGUF files where there are none."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf"))


def _sha256(path: Path, digest: Any = None) -> str:
    digest = digest or hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return str(digest.hexdigest())


def _plain(source: Source) -> dict[str, Any]:
    return source.model_dump(mode="json")


def _versions() -> dict[str, str]:
    """Versions of the packages that wrote the folder, for debugging."""
    found = {}
    for package in ("viaticum", "transformers", "gguf", "huggingface-hub"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


_own_hashes: dict[tuple[str, tuple[tuple[str, int, int], ...]], str] = {}


def fingerprint(spec: ModelSpec) -> str:
    """The sha256 of a model's weights on this machine: from the manifest, or of the user's own folder.

    What is learned from a model's outputs holds for these weights alone. Hashing a folder of the user's own
    takes seconds, once a process. The weights of a served model are not here; its name there stands for them.

    Raises:
        WeightsError: as `locate`.
    """
    if spec.engine == "served":
        return hashlib.sha256(f"served {spec.served_model}".encode()).hexdigest()
    folder = locate(spec)
    if _own_folder(spec) is None:
        return str(_manifest(spec)["sha256"])
    files = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _weight_files(folder))
    key = str(folder), files
    if key not in _own_hashes:
        _own_hashes[key] = _weigh(folder)[1]
    return _own_hashes[key]
