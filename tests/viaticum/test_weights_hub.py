"""A hub's file is the first source where the hub answers, wheels are the fallback; over a loopback hub."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from viaticum import hub
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import InputError, WeightsError
from viaticum.hub import fetch_hub
from viaticum.weight_sources import Hub, LocalPath, Wheels
from viaticum.weights import locate, pull
from viaticum.wheels import FetchError

CONTENT = b"a model in one file, " * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    """Answers as a hub does for `some.one/a.model`, file `dir/tiny.q4.gguf`, at the revision `v1.0`."""

    content, etag, seconds = CONTENT, SHA256, 0.0
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        if self._answer():
            self.wfile.write(self.content)

    def _answer(self) -> bool:
        self.asked.append(f"{self.command} {self.path}")
        time.sleep(self.seconds)
        known = self.path == "/some.one/a.model/resolve/v1.0/dir/tiny.q4.gguf"
        self.send_response(200 if known else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        if not known:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("ETag", f'"{self.etag}"')
        self.send_header("Content-Length", str(len(self.content) if known else 0))
        self.end_headers()
        return known

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[HubHandler]]:
    """A hub on this machine; the class is this test's own, so that it can be changed."""

    class Handler(HubHandler):
        asked: list[str] = []  # noqa: RUF012 - one list a test

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub, "_unreachable", {})
        yield Handler
        server.shutdown()
        thread.join()


def hub_source(**changes: str) -> Hub:
    fields = {
        "type": "hub",
        "repo": "some.one/a.model",
        "revision": "v1.0",
        "file": "dir/tiny.q4.gguf",
        "sha256": SHA256,
    }
    return Hub.model_validate(fields | changes)


def no_report(stage: str, done: int, total: int) -> None:
    pass


def test_the_file_of_a_hub_becomes_the_model_file(handler: type[HubHandler], tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    fetch_hub(hub_source(), tmp_path, lambda *stage: stages.append(stage))
    assert (tmp_path / "model.gguf").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert stages[-1] == ("downloading", len(CONTENT), len(CONTENT))


def test_a_file_with_another_hash_is_not_even_downloaded(handler: type[HubHandler], tmp_path: Path) -> None:
    handler.etag = "0" * 64
    with pytest.raises(FetchError, match=r"tiny\.q4\.gguf has sha256 000000000000\.\.\., and the catalogue"):
        fetch_hub(hub_source(), tmp_path, no_report)
    assert not any(line.startswith("GET") for line in handler.asked)


def test_a_hub_that_says_one_hash_and_sends_another_file_is_caught(
    handler: type[HubHandler], tmp_path: Path
) -> None:
    handler.content = CONTENT.replace(b"model", b"trick")
    with pytest.raises(FetchError, match="has sha256"):
        fetch_hub(hub_source(), tmp_path, no_report)
    assert not (tmp_path / "model.gguf").exists()


def test_a_file_that_is_not_there_does_not_make_the_hub_unreachable(
    handler: type[HubHandler], tmp_path: Path
) -> None:
    with pytest.raises(FetchError, match=r"hub some\.one/a\.model: .*404"):
        fetch_hub(hub_source(file="other.gguf"), tmp_path, no_report)
    fetch_hub(hub_source(), tmp_path, no_report)


def test_a_slow_hub_is_asked_once_for_a_short_time(
    handler: type[HubHandler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "LOOK_SECONDS", 1.0)
    handler.seconds = 5.0
    for _ in range(2):
        with pytest.raises(FetchError, match="cannot be reached"):
            fetch_hub(hub_source(), tmp_path, no_report)
    assert len(handler.asked) == 1


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_means_that_no_hub_is_asked(
    handler: type[HubHandler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    for source in (hub_source(), Hub(type="hub", repo="some.one/a.model")):
        with pytest.raises(FetchError, match=f"{variable} is set"):
            fetch_hub(source, tmp_path, no_report)
    assert handler.asked == []


def test_the_next_source_is_tried_where_the_hub_has_another_file(
    handler: type[HubHandler], tmp_path: Path
) -> None:
    handler.etag = "0" * 64
    spec = ModelSpec(
        name="a.model.b",
        description="Tiny.",
        kind="local",
        context_length=8,
        sources=(hub_source(), LocalPath(type="path", path=str(tmp_path / "absent.gguf"))),
    )
    with pytest.raises(WeightsError, match=r"has sha256 000000000000.*; .*absent\.gguf does not exist"):
        pull(spec)
    with pytest.raises(WeightsError, match=r"viaticum models pull a\.model\.b"):
        locate(spec)


def test_the_packaged_hub_files_are_those_of_the_wheels() -> None:
    """The same bytes from either: what was learned from a model's outputs holds for both."""
    catalogue = Catalogue.load()
    for name in ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"):
        first, second, *_ = catalogue[name].sources
        assert isinstance(first, Hub)
        assert isinstance(second, Wheels)
        assert first.sha256 == second.sha256
        assert first.repo.startswith("Qwen/")
        kept = catalogue[name].model_copy(update={"sources": catalogue[name].sources[1:]})
        assert catalogue[name].identity == kept.identity, "keys of answers stay"


def test_a_hub_source_needs_file_and_hash_together() -> None:
    for wrong in ({"file": "a.gguf"}, {"sha256": SHA256}, {"file": "../a.gguf", "sha256": SHA256}):
        with pytest.raises(ValueError, match=r"both file and sha256|not a path inside"):
            Hub.model_validate({"type": "hub", "repo": "a.b/c.d", **wrong})
    assert Hub(type="hub", repo="a.b/c.d").model_dump() == {
        "type": "hub",
        "repo": "a.b/c.d",
        "revision": "main",
    }


def test_a_name_with_a_dot_that_is_not_quoted_is_explained(tmp_path: Path) -> None:
    file = tmp_path / "catalogue.toml"
    file.write_text('[models.my-2.5b]\ndescription = "d"\nkind = "local"\ncontext_length = 8\n')
    with pytest.raises(InputError, match=r'quote names with dots: \[models\."my-2\.5b"\]'):
        Catalogue.load(file)
