"""`viaticum models add hub:...` and `pull` against a hub on loopback, and what can be wrong with it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from gguf_files import Written, byte_level, tiny_model, write_gguf
from transformers import Qwen2Config

from viaticum import hub
from viaticum.catalogue import ModelSpec
from viaticum.errors import InputError, WeightsError
from viaticum.gguf.file import read_header
from viaticum.gguf.split_patterns import SPLITTINGS
from viaticum.models.added import new_entry
from viaticum.weights import locate, pull

pytest.importorskip("huggingface_hub")


SIZES: dict[str, Any] = {
    "vocab_size": 360,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


class TinyHub(BaseHTTPRequestHandler):
    """A hub with one repository `some.one/a-model`; every answer may be made wrong.

    files: contents by name. context: of its GGUF files, as the hub says it. status, code: of every answer,
    and what it says is wrong. cut: bytes that a file lacks at its end.
    """

    files: dict[str, bytes]
    context: int | None = 512
    status, code, cut = 200, "", 0
    says_hashes = True

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path, _, _ = self.path.partition("?")
        start = "/some.one/a-model/resolve/main/"
        if self.status != 200:
            self._send(self.status, b"", self.code)
        elif path == "/api/models/some.one/a-model/revision/main":
            self._send(200, json.dumps(self._facts()).encode())
        elif path.startswith("/api/models/some.one/a-model/revision/"):
            self._send(404, b"", "RevisionNotFound")
        elif path.startswith(start) and (content := self.files.get(path.removeprefix(start))) is not None:
            self._send(200, content, body=with_body, cut=self.cut)
        else:
            self._send(404, b"", "EntryNotFound" if path.startswith(start) else "RepoNotFound")

    def _facts(self) -> dict[str, Any]:
        siblings = [
            {"rfilename": name, "size": len(content)}
            | (
                {"lfs": {"sha256": digest(content), "size": len(content), "pointerSize": 130}}
                if self.says_hashes
                else {}
            )
            for name, content in self.files.items()
        ]
        gguf = {} if self.context is None else {"gguf": {"context_length": self.context}}
        return {"id": "some.one/a-model", "sha": "0" * 40, "siblings": siblings} | gguf

    def _send(self, status: int, content: bytes, code: str = "", *, body: bool = True, cut: int = 0) -> None:
        self.send_response(status)
        self.send_header("X-Repo-Commit", "0" * 40)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("ETag", f'"{digest(content)}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) - cut])

    def log_message(self, format: str, *args: object) -> None:
        pass


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[TinyHub]]:
    """A hub of this test's own."""

    class Handler(TinyHub):
        files: dict[str, bytes] = {}  # noqa: RUF012 - one a test

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.02,))
        thread.start()
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.server_port}")
        monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub, "_unreachable", {})
        yield Handler
        listener.shutdown()
        thread.join()


def no_report(*stage: object) -> None:
    pass


def tiny_gguf(folder: Path, written: Written | None = None) -> bytes:
    words = byte_level("qwen2", SPLITTINGS["qwen2"].patterns[0], nfc=True)
    model = tiny_model(Qwen2Config(**SIZES))
    return write_gguf(folder / "tiny.gguf", "qwen2", model, words, written).read_bytes()


def spec_of(source: str, **given: Any) -> ModelSpec:
    entry = new_entry(source, **given)
    return ModelSpec.model_validate({**entry.fields, "name": entry.name})


def test_the_one_gguf_file_of_a_repository_is_added_by_its_hash_and_pulled(
    server: type[TinyHub], tmp_path: Path
) -> None:
    content = tiny_gguf(tmp_path)
    server.files |= {"README.md": b"hello", "a-model-Q4_K_M.gguf": content, "mmproj-F16.gguf": b"images"}
    spec = spec_of("hub:some.one/a-model")
    assert (spec.name, spec.context_length) == ("some.one/a-model-Q4_K_M", 512)
    assert spec.sources[0].model_dump() == {
        "type": "hub",
        "repo": "some.one/a-model",
        "revision": "main",
        "file": "a-model-Q4_K_M.gguf",
        "sha256": digest(content),
    }
    pull(spec, no_report)
    assert locate(spec).is_dir()


def test_of_several_gguf_files_one_has_to_be_named(server: type[TinyHub]) -> None:
    server.files |= {f"q/a-{name}.gguf": name.encode() for name in ("Q4_K_M", "Q8_0")}
    with pytest.raises(
        InputError, match=r"2 GGUF files \(q/a-Q4_K_M.gguf, q/a-Q8_0.gguf\); name one: hub:some"
    ):
        new_entry("hub:some.one/a-model")
    entry = new_entry("hub:some.one/a-model/q/a-Q8_0.gguf", context=64)
    assert entry.fields["sources"][0]["file"] == "q/a-Q8_0.gguf"
    assert entry.fields["context_length"] == 64
    with pytest.raises(InputError, match=r"holds no file q/a-Q8.gguf; did you mean q/a-Q8_0.gguf\?"):
        new_entry("hub:some.one/a-model/q/a-Q8.gguf")


@pytest.mark.parametrize("named", ["", "/q/tiny-00001-of-00003.gguf", "/q/tiny-00002-of-00003.gguf"])
def test_shards_are_added_as_one_file_and_joined(server: type[TinyHub], tmp_path: Path, named: str) -> None:
    tiny_gguf(tmp_path)
    tiny_gguf(tmp_path, Written(split=12))
    server.files |= {f"q/{each.name}": each.read_bytes() for each in tmp_path.glob("tiny-*.gguf")}
    spec = spec_of(f"hub:some.one/a-model{named}")
    assert spec.name == "some.one/tiny"
    pull(spec, no_report)
    folder = locate(spec)
    assert sorted(each.name for each in folder.glob("*.gguf")) == ["model.gguf"]
    assert not [each for each in folder.iterdir() if each.is_dir()]
    joined, original = read_header(folder / "model.gguf"), read_header(tmp_path / "tiny.gguf")
    assert [each.name for each in joined.tensors] == [each.name for each in original.tensors]
    assert [each.shape for each in joined.tensors] == [each.shape for each in original.tensors]
    server.files["q/tiny-00003-of-00003.gguf"] += b"x"
    with pytest.raises(WeightsError, match=r"q/tiny-00003-of-00003\.gguf has sha256"):
        pull(spec.model_copy(update={"name": "again"}), no_report)


def test_a_repository_of_safetensors_is_added_as_it_is(server: type[TinyHub]) -> None:
    server.files |= {"model.safetensors": b"w", "config.json": b'{"max_position_embeddings": 4096}'}
    entry = new_entry("hub:some.one/a-model")
    assert (entry.name, entry.fields["context_length"]) == ("some.one/a-model", 4096)
    assert entry.fields["sources"] == [{"type": "hub", "repo": "some.one/a-model", "revision": "main"}]


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({"pytorch_model.bin": b"w"}, "hub:some.one/a-model", "neither safetensors nor a GGUF file"),
        ({"a.gguf": b"w"}, "hub:some.one/other", "no such repository, or it is private: .* HF_TOKEN"),
        ({"a.gguf": b"w"}, "hub:some.one/a-model@v9", "there is no revision 'v9' of it"),
        (
            {f"q/a-0000{n}-of-00003.gguf": b"w" for n in (1, 2)},
            "hub:some.one/a-model",
            r"lacks a shard of q/a-00001-of-00003\.gguf: q/a-00003-of-00003\.gguf",
        ),
        (
            {"a.gguf": b"w", "mmproj-a.gguf": b"p"},
            "hub:some.one/a-model/mmproj-a.gguf",
            "is no language model",
        ),
        ({"model.safetensors": b"w"}, "hub:some.one/a-model", "cannot look at .*404.*; give --context"),
        ({"model.safetensors": b"w", "config.json": b"{"}, "hub:some.one/a-model", "give --context"),
        (
            {"model.safetensors": b"w", "config.json": b"{}"},
            "hub:some.one/a-model",
            "names no context length",
        ),
    ],
)
def test_what_a_repository_lacks_is_said(
    server: type[TinyHub], files: dict[str, bytes], source: str, message: str
) -> None:
    server.files |= files
    with pytest.raises(InputError, match=message):
        new_entry(source)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (
            401,
            "GatedRepo",
            "it is gated: accept its terms at http://127.0.0.1:.*/some.one/a-model and put .*HF_TOKEN",
        ),
        (403, "GatedRepo", "it is gated"),
        (401, "RepoNotFound", "no such repository, or it is private"),
        (500, "", "500"),
    ],
)
def test_a_hub_that_refuses(server: type[TinyHub], status: int, code: str, message: str) -> None:
    server.files["a.gguf"] = b"w"
    server.status, server.code = status, code
    with pytest.raises(InputError, match=message):
        new_entry("hub:some.one/a-model")
    with pytest.raises(InputError, match=message):
        new_entry("hub:some.one/a-model/a.gguf", context=64)
    assert new_entry("hub:some.one/a-model", context=64).fields["context_length"] == 64


def test_a_gguf_file_of_which_the_hub_knows_too_little(server: type[TinyHub]) -> None:
    server.files["a.gguf"], server.context = b"w", None
    with pytest.raises(InputError, match=r"does not say how much a.gguf reads; give --context"):
        new_entry("hub:some.one/a-model")
    server.says_hashes = False
    with pytest.raises(InputError, match=r"does not say the hash of a.gguf; fetch the file and add its path"):
        new_entry("hub:some.one/a-model", context=64)


def test_a_file_that_is_cut_off_or_another_one_is_not_taken(
    server: type[TinyHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tiny_gguf(tmp_path)
    server.files["a.gguf"] = content
    spec = spec_of("hub:some.one/a-model")
    server.cut = len(content) // 2
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    with pytest.raises(WeightsError, match=r"hub some\.one/a-model: "):
        pull(spec, no_report)
    server.cut, server.files["a.gguf"] = 0, content[:-1] + b"x"
    with pytest.raises(WeightsError, match=r"a\.gguf has sha256"):
        pull(spec, no_report)
    with pytest.raises(WeightsError, match="not on this machine"):
        locate(spec)
    server.files["a.gguf"] = content
    pull(spec, no_report)


def test_a_gated_file_says_what_to_do_when_it_is_pulled(server: type[TinyHub]) -> None:
    server.files["a.gguf"] = b"w"
    spec = spec_of("hub:some.one/a-model")
    server.status, server.code = 401, "GatedRepo"
    with pytest.raises(WeightsError, match=r"it is gated: accept its terms .* HF_TOKEN"):
        pull(spec, no_report)
