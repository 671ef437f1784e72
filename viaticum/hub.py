"""Fetching weights from a model hub (`huggingface_hub`), after a short look at whether it can be reached.

HF_ENDPOINT names another hub, HF_HUB_OFFLINE keeps from asking any. Leaves out unpacking what was fetched
(`viaticum.weight_fetching`).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from viaticum.errors import WeightsError, one_line
from viaticum.gguf.file import read_header
from viaticum.gguf.merging import merge
from viaticum.weight_sources import Hub
from viaticum.wheels import DISK_FULL, FetchError, Report

LOOK_SECONDS = 3.0  # how long a hub may take to answer the first question
HUB = "https://huggingface.co"
LONGEST = 200  # characters of what the client said
_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]
_SHA256 = re.compile(r"[0-9a-f]{64}")

_Value = TypeVar("_Value")
_look_lock = threading.Lock()
_unreachable: dict[str, str] = {}  # reasons by endpoint, for the rest of this process


def fetch_hub(source: Hub, folder: Path, report: Report) -> None:
    """Leave a repository, or the GGUF file that the source names as model.gguf, in a folder.

    Shards of a GGUF file are joined.

    Raises:
        FetchError: the hub cannot be reached or has no such file, or the file has another hash.
        WeightsError: the shards do not belong together.
        OSError: the disk is full.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise FetchError("huggingface_hub is not installed; run: pip install 'viaticum[local]'") from None
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB
    _require_online(source, endpoint)
    if source.file is not None:
        with _look_lock:  # of several models that are fetched at once, one waits for the answer
            _require_online(source, endpoint)
            for name in source.hashes:
                _look(source, name, endpoint)
    if source.file is not None and source.file.endswith(".gguf"):
        _fetch_gguf(source, endpoint, folder, report)
    else:
        _fetch_repository(source, folder)


@dataclass(frozen=True)
class Repository:
    """What a repository holds.

    hashes: sha256 by the name of each GGUF file, "" where the hub does not say it. safetensors: whether it
    holds some. context: tokens that the GGUF files' model reads, where the hub says so.
    """

    hashes: Mapping[str, str]
    safetensors: bool
    context: int | None


def look_at(source: Hub) -> Repository:
    """What a repository holds, at the revision of the source.

    Raises:
        FetchError: the hub cannot be reached, or there is no such repository or revision.
    """
    with _asking(source) as endpoint:
        from huggingface_hub import HfApi

        info = _within(
            LOOK_SECONDS,
            lambda: HfApi(endpoint=endpoint).model_info(
                source.repo, revision=source.revision, timeout=LOOK_SECONDS, files_metadata=True
            ),
        )
    files = info.siblings or []
    hashes = {
        each.rfilename: "" if each.lfs is None else str(each.lfs.sha256)
        for each in files
        if each.rfilename.lower().endswith(".gguf")
    }
    context = (info.gguf or {}).get("context_length")
    return Repository(
        hashes,
        any(each.rfilename.endswith(".safetensors") for each in files),
        context if isinstance(context, int) and context > 0 else None,
    )


def fetch_config(source: Hub) -> dict[str, Any]:
    """The config.json of a repository.

    Raises:
        FetchError: the hub cannot be reached, or the repository has none.
    """
    with _asking(source) as endpoint, tempfile.TemporaryDirectory() as folder:
        from huggingface_hub import hf_hub_download

        path = _within(
            LOOK_SECONDS,
            lambda: hf_hub_download(
                source.repo,
                "config.json",
                revision=source.revision,
                local_dir=folder,
                endpoint=endpoint,
                etag_timeout=LOOK_SECONDS,
            ),
        )
        config = json.loads(Path(path).read_bytes())
    return config if isinstance(config, dict) else {}


@contextmanager
def _asking(source: Hub) -> Iterator[str]:
    """The hub's address, while it is asked; what goes wrong becomes a `FetchError`."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB
    try:
        _require_online(source, endpoint)
        with _hub_errors(source):
            yield endpoint
    except ImportError:
        raise FetchError("huggingface_hub is not installed; run: pip install 'viaticum[local]'") from None


def _require_online(source: Hub, endpoint: str) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise FetchError(f"hub {source.repo}: {name} is set")
    if endpoint in _unreachable:
        raise FetchError(f"hub {source.repo}: {_unreachable[endpoint]}")


def _look(source: Hub, name: str, endpoint: str) -> None:
    """Ask for a file's hash, before it is downloaded.

    Raises:
        FetchError: no answer in `LOOK_SECONDS`, no such file, or another hash.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    url = hf_hub_url(source.repo, name, revision=source.revision, endpoint=endpoint)
    try:
        facts = _within(
            LOOK_SECONDS, lambda: get_hf_file_metadata(url, timeout=LOOK_SECONDS, endpoint=endpoint)
        )
    except HfHubHTTPError as error:  # it answers, but not with this file
        raise FetchError(_reason(source, error)) from None
    except Exception as error:
        _unreachable[endpoint] = (
            f"{endpoint} cannot be reached ({one_line(error, LONGEST) or type(error).__name__})"
        )
        raise FetchError(f"hub {source.repo}: {_unreachable[endpoint]}") from None
    if _SHA256.fullmatch(facts.etag or "") and facts.etag != source.hashes[name]:
        raise FetchError(_other_hash(source, name, str(facts.etag)))


def _within(seconds: float, ask: Callable[[], _Value]) -> _Value:
    """The result of `ask`, which may hang where a name is resolved, whatever time-out it has of its own.

    Raises:
        TimeoutError: it took longer; its thread is left behind.
    """
    results: list[_Value] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            results.append(ask())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    return results[0]


def _fetch_gguf(source: Hub, endpoint: str, folder: Path, report: Report) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as kept:  # with the client's own records
        paths = [_download(source, name, endpoint, Path(kept), report) for name in source.hashes]
        if len(paths) == 1:
            paths[0].rename(folder / "model.gguf")
            return
        report_joining = partial(report, "joining")
        merge(read_header(paths[0]), folder / "model.gguf", report_joining)


def _download(source: Hub, name: str, endpoint: str, folder: Path, report: Report) -> Path:
    from huggingface_hub import hf_hub_download

    with _hub_errors(source):
        path = Path(
            hf_hub_download(
                source.repo,
                name,
                revision=source.revision,
                local_dir=folder,
                endpoint=endpoint,
                tqdm_class=_reporting_bar(report),
            )
        )
    size = path.stat().st_size  # the bar may have heard of less: it is told now and then
    report("downloading", size, size)
    _check_hash(source, name, path)
    return path


def _fetch_repository(source: Hub, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    with _hub_errors(source):
        snapshot_download(
            source.repo,
            revision=source.revision,
            local_dir=folder,
            allow_patterns=_FILES,
        )
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    if not list(folder.glob("*.safetensors")):
        raise FetchError(f"hub {source.repo} at {source.revision} holds no safetensors")
    if source.file is not None:
        _check_hash(source, source.file, folder / source.file)


class _hub_errors:
    """Whatever the client and its transport raise becomes a `FetchError`; a full disk stays an `OSError`."""

    def __init__(self, source: Hub) -> None:
        self._source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, WeightsError):
            return  # an interrupt, or nothing
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return
        if isinstance(error, ImportError):
            return
        raise FetchError(_reason(self._source, error)) from None


def _reason(source: Hub, error: Exception) -> str:
    """What a failed request to the hub means, and what to do about it."""
    from huggingface_hub import errors

    page = f"{os.environ.get('HF_ENDPOINT', '').rstrip('/') or HUB}/{source.repo}"
    named: list[tuple[type[Exception], str]] = [
        (errors.GatedRepoError, f"it is gated: accept its terms at {page} and put your token into HF_TOKEN"),
        (errors.RevisionNotFoundError, f"there is no revision {source.revision!r} of it"),
        (
            errors.RepositoryNotFoundError,
            "there is no such repository, or it is private: check the name, or put your token into HF_TOKEN",
        ),
    ]
    for kind, meaning in named:
        if isinstance(error, kind):
            return f"hub {source.repo}: {meaning}"
    return f"hub {source.repo}: {one_line(error, LONGEST) or type(error).__name__}"


def _check_hash(source: Hub, name: str, path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.hashes[name]:
        raise FetchError(_other_hash(source, name, found))


def _other_hash(source: Hub, name: str, found: str) -> str:
    return (
        f"hub {source.repo}: {name} has sha256 {found[:12]}..., and the catalogue says "
        f"{source.hashes[name][:12]}..."
    )


def _reporting_bar(report: Report) -> Any:
    """A class of progress bars for the client, which draws nothing and tells `report`."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options |= {"disable": False, "file": io.StringIO()}
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            drawn: bool | None = super().update(n)
            report("downloading", int(self.n), int(self.total or 0))
            return drawn

    return Bar
