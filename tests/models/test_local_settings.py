"""What the catalogue, a pair and the command line say of devices reaches the loading of every model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_catalogue import write_tiny_model
from typer.testing import CliRunner

from viaticum import Viaticum
from viaticum.catalogue import Catalogue
from viaticum.cli import app
from viaticum.errors import InputError
from viaticum.local_settings import LocalFields, LocalSettings
from viaticum.model_spec import ModelSpec
from viaticum.models.local import LocalModels

Loads = list[tuple[str, dict[str, Any]]]
ENTRY = """
[models.{name}]
description = "Tiny."
kind = "local"
context_length = 8192
input_price = 1
output_price = 2
{more}
[[models.{name}.sources]]
type = "path"
path = "{folder}"
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a catalogue of a tiny pair; the fields of small, large and pair are given as TOML."""

    def write(small: str = "", large: str = "", pair: str = "") -> Path:
        text = ""
        for seed, (name, more) in enumerate({"small": small, "large": large}.items()):
            if not (tmp_path / name).exists():
                write_tiny_model(tmp_path / name, seed)
            text += ENTRY.format(name=name, more=more, folder=tmp_path / name)
        text += f'[models.both]\ndescription = "d"\nkind = "pair"\nsmall = "small"\nlarge = "large"\n{pair}\n'
        text += 'router = "r-stitch"\ntau = 0.5\nmode = "routed"\n'
        (tmp_path / "catalogue.toml").write_text(text)
        return tmp_path / "catalogue.toml"

    return write


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    """Every loading of weights: the name of their folder, and the options. A GPU is replaced by the CPU."""
    from viaticum import decoders

    seen: Loads = []
    load = decoders.load_weights

    def spy(path: Path, **options: Any) -> Any:
        seen.append((Path(path).name, options))
        return load(path, **{**options, "device": "cpu"})

    monkeypatch.setattr(decoders, "load_weights", spy)
    return seen


def options_of(loads: Loads, name: str = "device") -> dict[str, Any]:
    return {folder: options.get(name) for folder, options in loads}


def test_an_entry_says_where_its_model_runs_and_a_pair_says_it_for_both(
    write: Callable[..., Path], loads: Loads
) -> None:
    file = write(
        'device = "cuda:1"\ncontext = 100\nslots = 3', 'dtype = "float32"', 'device = "mps"\nslots = 2'
    )
    catalogue = Catalogue.load(file)
    assert catalogue["both"].context_length == catalogue["small"].usable_context == 100
    pool = LocalModels(catalogue)
    pool.runner("small")
    first = {"device": "cuda:1", "context": 100, "slots": 3}
    assert loads[0][1].items() >= first.items()
    assert "dtype" not in loads[0][1], "what nobody said is left to the loading"
    loads.clear()
    pool.runners("both")
    assert options_of(loads) == {"large": "mps", "small": "mps"}
    assert options_of(loads, "dtype") == {"large": "float32", "small": None}
    assert options_of(loads, "slots") == {"large": 2, "small": 2}
    pool.runners("both")
    assert len(loads) == 2, "loaded once"


def test_a_model_alone_and_in_a_pair_is_loaded_once(write: Callable[..., Path], loads: Loads) -> None:
    pool = LocalModels(Catalogue.load(write('device = "cuda"', 'device = "cuda:1"')), slots=2)
    small, large = pool.runners("both")
    assert (pool.runner("small"), pool.runner("large")) == (small, large)
    assert options_of(loads) == {"large": "cuda:1", "small": "cuda"}


def test_the_sdk_and_its_settings_reach_the_loading(
    write: Callable[..., Path], loads: Loads, tmp_path: Path
) -> None:
    local = LocalSettings(device="cuda:1", dtype="float32", context=512)
    with Viaticum(
        "1",
        catalogue=write('device = "cpu"'),
        folder=tmp_path,
        model="both",
        strategy="direct",
        local=local,
    ) as client:
        client.solve("2+2?", max_tokens=4)
        assert client.catalogue["both"].usable_context == 512
    assert options_of(loads) == {"large": "cuda:1", "small": "cuda:1"}
    assert options_of(loads, "context") == {"large": 512, "small": 512}
    assert options_of(loads, "slots") == {"large": 4, "small": 4}


@pytest.mark.parametrize(
    "command",
    [
        ["solve", "2+2?", "--model", "both", "--strategy", "direct", "--max-tokens", "3", "--budget", "1"],
        [
            *("batch", "{questions}", "--out", "{out}.jsonl", "--model", "both", "--strategy", "direct"),
            *("--max-tokens", "3", "--budget", "1", "--ledger", "{out}.db"),
        ],
        ["profile", "{questions}", "--out", "{out}.jsonl", "--model", "both", "--strategy", "direct"],
        ["tokens", "label", "{questions}", "--pair", "both", "--out", "{out}", "--strategy", "direct"],
    ],
    ids=lambda command: " ".join(command[: 1 + (command[0] == "tokens")]),
)
def test_every_command_reaches_the_loading(
    write: Callable[..., Path],
    loads: Loads,
    tmp_path: Path,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VIATICUM_HOME", str(tmp_path))
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"question": "2+2?", "answer": "4"}) + "\n")
    filled = [part.format(questions=questions, out=tmp_path / "out") for part in command]
    options = ["--catalogue", str(write()), "--device", "cuda:1", "--dtype", "float32", "--slots", "2"]
    CliRunner().invoke(app, [*filled, *options])
    assert loads, "nothing was loaded"
    assert set(options_of(loads).values()) == {"cuda:1"}
    assert set(options_of(loads, "dtype").values()) == {"float32"}
    assert set(options_of(loads, "slots").values()) == {2}


def test_a_gpu_that_is_not_there_ends_a_command_with_a_line(write: Callable[..., Path]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="a CUDA GPU was asked for, and torch"):
        LocalModels(Catalogue.load(write('device = "cuda"'))).runner("small")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('device = "gpu"', "models.small.device"),
        ("slots = 0", "models.small.slots"),
        ("slots = true", "models.small.slots"),
        ("gpu_memory = 1.5", "models.small.gpu_memory"),
        ("context = 9000", "context is 9000, more than context_length"),
        ('served_model = "x"', 'served_model goes with engine = "served"'),
        ('engine = "served"', 'engine = "served" needs api_base'),
    ],
)
def test_a_wrong_field_is_named(write: Callable[..., Path], fields: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Catalogue.load(write(fields))


def test_a_wrong_setting_says_what_may_stand_there() -> None:
    with pytest.raises(
        InputError, match='device is "auto", "cpu", "mps", "cuda" or "cuda:NUMBER", got \'gpu\''
    ):
        LocalSettings.of(device="gpu")


def test_where_a_model_runs_is_no_part_of_the_keys_of_its_answers(write: Callable[..., Path]) -> None:
    plain = Catalogue.load(write())
    placed = plain.with_local(LocalSettings(device="cuda", dtype="bfloat16", slots="auto", gpu_memory=0.5))
    for name in ("small", "both"):
        assert placed[name].identity == plain[name].identity
    assert plain.with_local(LocalSettings(context=50))["small"].identity != plain["small"].identity


def test_entries_and_settings_take_the_same_fields(write: Callable[..., Path]) -> None:
    """Written once: an entry inherits them, and its key has them where it had them."""
    assert not set(LocalFields.model_fields) & set(ModelSpec.__annotations__)
    assert LocalSettings.model_fields.keys() == LocalFields.model_fields.keys()
    file = write('engine = "served"\ncontext = 50\nserved_model = "m"\napi_base = "http://localhost:1"')
    spec = Catalogue.load(file)["small"]
    assert list(spec.identity)[-3:] == ["default", "context", "served_model"]


def test_both_models_of_a_pair_are_loaded_before_memory_is_planned(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first takes all that is free, and nothing is left for the other."""
    from viaticum import decoders

    planned: list[int] = []
    make = decoders.make_runners
    monkeypatch.setattr(
        decoders, "make_runners", lambda *models: (planned.append(len(models)), make(*models))[1]
    )
    local = LocalSettings(slots="auto", context=256, device="cpu")
    pool = LocalModels(Catalogue.load(write()).with_local(local), max_slots=4)
    small, large = pool.runners("both")
    assert pool.runners("both") == [small, large]
    assert planned == [2]
    assert small.slots == large.slots == 4
