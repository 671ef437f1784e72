"""`viaticum models test` and what engine "auto" makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_catalogue import write_tiny_model
from typer.testing import CliRunner

from viaticum.catalogue import Catalogue
from viaticum.commands.models import app
from viaticum.errors import InputError, WeightsError
from viaticum.models import engine_choice
from viaticum.models.engine_choice import EngineFigures, measured_engine, save_figures
from viaticum.models.engine_trial import engines_of
from viaticum.models.local import LocalModels

pytestmark = pytest.mark.usefixtures("one_thread")

ENTRY = """
[models.tiny]
description = "random"
kind = "local"
context_length = 400
input_price = 0.1
output_price = 0.1
sources = [{{ type = "path", path = "{path}" }}]
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalogue with one model, whose folder holds safetensors and a GGUF file of the same weights."""
    from tiny_gguf import write_tiny_gguf
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tiny"
    write_tiny_model(folder, 0)
    write_tiny_gguf(folder / "model.gguf", AutoModelForCausalLM.from_pretrained(folder))
    path = tmp_path / "mine.toml"
    path.write_text(ENTRY.format(path=folder))
    return path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["test", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_engine_is_timed_and_the_fastest_is_taken(file: Path) -> None:
    figures = json.loads(run("tiny", "--catalogue", str(file), "--json"))
    assert list(figures) == ["torch", "llama"]
    for each in figures.values():
        assert each["load"] > 0
        assert each["prefill"] > 0
        assert list(each["steps"]) == ["1", "4"]
    chosen = measured_engine(Catalogue.load(file)["tiny"], 1)
    runner = LocalModels(Catalogue.load(file)).runner("tiny")
    assert type(runner).__name__.lower().startswith(str(chosen))


def test_one_engine_is_tried_where_one_is_named(file: Path) -> None:
    shown = run("tiny", "--catalogue", str(file), "--local-engine", "llama", "--rows", "16")
    assert "16 at once" in shown
    assert "torch" not in shown
    assert measured_engine(Catalogue.load(file)["tiny"], 1) is None, "nothing to compare it with"


def figures(prefill: float, *steps: float) -> EngineFigures:
    return EngineFigures(1.0, None, prefill, dict(zip((1, 4, 16), steps, strict=False)))


def test_the_engine_depends_on_the_answers_at_once(file: Path) -> None:
    spec = Catalogue.load(file)["tiny"]
    assert measured_engine(spec, 1) is None
    save_figures(spec, {"torch": figures(0.2, 0.04, 0.06, 0.1), "llama": figures(0.5, 0.03, 0.1, 0.3)})
    assert [measured_engine(spec, slots) for slots in (1, 2, 4, 64, "auto")] == [
        "llama",
        "llama",
        "torch",
        "torch",
        "torch",
    ]
    loaded = [
        LocalModels(Catalogue.load(file), slots=4, streams=streams).runner("tiny") for streams in (None, 1)
    ]
    assert [type(each).__name__ for each in loaded] == ["TorchRunner", "LlamaRunner"], (
        "one text in four slots"
    )
    save_figures(spec, {"torch": figures(0.2, 0.04), "llama": figures(9.0, 0.03)})
    assert measured_engine(spec, 1) == "torch", "a prompt counts too"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "{",
        lambda text: "[]",
        lambda text: text.replace("prefill", "x"),
        lambda text: text.replace('"threads": 1', '"threads": 64'),
        lambda text: text.replace("llama", "engine of another version"),
    ],
)
def test_figures_that_do_not_hold_are_not_used(file: Path, damage: Callable[[str], str]) -> None:
    spec = Catalogue.load(file)["tiny"]
    save_figures(spec, {"torch": figures(0.2, 0.04), "llama": figures(0.1, 0.03)})
    assert measured_engine(spec, 1) == "llama"
    path = engine_choice._path(spec)
    path.write_text(damage(path.read_text()))
    assert measured_engine(spec, 1) is None


def test_a_named_engine_or_device_is_not_replaced(file: Path) -> None:
    save_figures(Catalogue.load(file)["tiny"], {"torch": figures(0.2, 0.04), "llama": figures(0.1, 0.03)})
    text = file.read_text()
    for line, name in (("", "llama"), ('engine = "torch"', "torch"), ('device = "cpu"', "torch")):
        file.write_text(text + line + "\n")
        runner = LocalModels(Catalogue.load(file)).runner("tiny")
        assert type(runner).__name__.lower().startswith(name)


def test_what_has_no_engines_is_refused(file: Path, tmp_path: Path) -> None:
    file.write_text(file.read_text().replace(str(tmp_path / "tiny"), str(tmp_path / "gone")))
    with pytest.raises(WeightsError):
        engines_of(Catalogue.load(file)["tiny"])
    with pytest.raises(WeightsError, match=r"models pull qwen2\.5-coder"):
        run("qwen2.5-coder-r-stitch", "--catalogue", str(file))
    with pytest.raises(InputError, match="is an encoder: it answers no questions"):
        run("all-minilm-l6-v2", "--catalogue", str(file))
