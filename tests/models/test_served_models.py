"""Catalogue entries with engine "served": a model at a server writes what it writes here, also in a pair."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inference_server import InferenceServer, serving
from tiny_catalogue import write_tiny_model
from transformers import AutoTokenizer

from viaticum.catalogue import Catalogue
from viaticum.decoders import load_runner
from viaticum.decoders.served_runner import ServedRunner
from viaticum.errors import AuthenticationFailed, InputError, ModelError, VocabularyMismatch
from viaticum.models.base import Generation
from viaticum.models.decoding_modes import in_measured_modes
from viaticum.models.local import LocalModels
from viaticum.types import Completion

ENTRIES = """
[models.slm]
description = "Small."
kind = "local"
context_length = 512
dtype = "float32"
sources = [{{type = "path", path = "{root}/slm"}}]

[models.here]
description = "Large, here."
kind = "local"
context_length = 512
dtype = "float32"
sources = [{{type = "path", path = "{root}/llm"}}]

[models.there]
description = "Large, at a server."
kind = "local"
context_length = 512
engine = "served"
api_base = "{url}"
served_model = "big"
api_key_env = "SERVER_KEY"
timeout_seconds = 20
max_retries = 1
top_logprobs = 300
sources = [{{type = "path", path = "{root}/tokenizer"}}]
{served}

[models.pair-here]
description = "Both here."
kind = "pair"
small = "slm"
large = "here"
router = "r-stitch"
tau = 0.4

[models.pair-there]
description = "The large one at a server."
kind = "pair"
small = "{small}"
large = "there"
router = "{router}"
{tau}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("slm", "llm")):
        write_tiny_model(root / name, seed)
    shutil.copytree(root / "llm", root / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[InferenceServer]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    runner = load_runner(folder / "llm", slots=4, dtype="float32")

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    with serving(InferenceServer(runner, key="secret", encode=encode)) as running:
        yield running


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", "secret")


def catalogue(
    folder: Path,
    server: InferenceServer,
    tmp_path: Path,
    served: str = "",
    small: str = "slm",
    router: str = "r-stitch",
) -> Catalogue:
    tau = "tau = 0.4" if router == "r-stitch" else ""
    path = tmp_path / "catalogue.toml"
    path.write_text(
        ENTRIES.format(root=folder, url=server.url, served=served, small=small, router=router, tau=tau)
    )
    return Catalogue.load(path)


def answer(pool: LocalModels, name: str, **settings: Any) -> Completion:
    messages = [{"role": "user", "content": "How many?"}]
    *_, last = pool.model(name).stream(messages, Generation(40, **settings))  # type: ignore[arg-type]
    assert isinstance(last, Completion)
    return last


@pytest.mark.parametrize(("here", "there"), [("here", "there"), ("pair-here", "pair-there")])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
def test_a_served_model_writes_and_costs_what_it_does_here(
    folder: Path, server: InferenceServer, tmp_path: Path, here: str, there: str, settings: dict[str, Any]
) -> None:
    pool = LocalModels(in_measured_modes(catalogue(folder, server, tmp_path)))
    expected, got = answer(pool, here, **settings), answer(pool, there, **settings)
    assert got.text == expected.text
    assert expected.trace is not None
    assert got.trace is not None
    assert got.trace.tokens == expected.trace.tokens
    assert got.trace.made_by == expected.trace.made_by
    # Billed are the tokens of each model, not what went over the wire.
    assert list(got.usage.models.values()) == list(expected.usage.models.values())
    runner = pool.runners(there)[-1]
    assert isinstance(runner, ServedRunner)
    assert runner.context == 511
    assert runner.weight_bytes > 10_000
    assert runner.stop_ids
    runner.close()


def test_a_served_model_stays_served_whatever_the_command_line_says(
    folder: Path, server: InferenceServer, tmp_path: Path
) -> None:
    entries = catalogue(folder, server, tmp_path)
    forced = entries.with_local(entries["slm"].local.of(engine="torch", slots=2))
    pool = LocalModels(forced)
    small, large = pool.runners("pair-there")
    assert isinstance(large, ServedRunner)
    assert (small.slots, large.slots) == (2, 2)  # what is said of a pair holds for both
    large.close()


def test_routers_that_read_hidden_states_need_the_small_model_here(
    folder: Path, server: InferenceServer, tmp_path: Path
) -> None:
    for router in ("r2r", "r-stitch+"):
        assert catalogue(folder, server, tmp_path, router=router)["pair-there"].router == router
        far = '[models.far]\ndescription = "x"\nkind = "local"\ncontext_length = 512\nengine = "served"\n'
        far += f'api_base = "{server.url}"\nserved_model = "big"\n'
        far += f'sources = [{{type = "path", path = "{folder}/slm"}}]\n'
        with pytest.raises(InputError, match=r"reads hidden states of the small model.*run far here"):
            catalogue(folder, server, tmp_path, served=far, small="far", router=router)


@pytest.mark.parametrize(
    ("line", "message"),
    [('engine = "torch"', "takes no api_base"), ("", "served_model goes with engine")],
)
def test_fields_of_a_server_need_the_engine(
    folder: Path, server: InferenceServer, tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "one.toml"
    place = f'api_base = "{server.url}"' if line else ""
    path.write_text(
        f'[models.one]\ndescription = "x"\nkind = "local"\ncontext_length = 9\n{line}\n{place}\n'
        + ("" if line else 'served_model = "x"\n')
        + f'sources = [{{type = "path", path = "{folder}/llm"}}]\n'
    )
    with pytest.raises(InputError, match=message):
        Catalogue.load(path)


def test_what_is_wrong_with_a_server_is_said_before_a_text_begins(
    folder: Path, server: InferenceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = catalogue(folder, server, tmp_path)
    monkeypatch.delenv("SERVER_KEY")
    with pytest.raises(AuthenticationFailed, match="there needs a key; put it into the variable SERVER_KEY"):
        answer(LocalModels(entries), "there")
    monkeypatch.setenv("SERVER_KEY", "other")
    with pytest.raises(AuthenticationFailed, match="status 401"):
        answer(LocalModels(entries), "there")
    monkeypatch.setenv("SERVER_KEY", "secret")
    encode = server.encode
    server.encode = lambda text: [1, *encode(text)]
    try:
        with pytest.raises(VocabularyMismatch, match="token 0"):
            answer(LocalModels(entries), "there")
    finally:
        server.encode = encode
    with pytest.raises(InputError, match="give api_base"):
        load_runner(folder / "tokenizer", engine="served")


def test_a_text_that_the_server_fails_costs_nothing_and_says_why(
    folder: Path, server: InferenceServer, tmp_path: Path
) -> None:
    pool = LocalModels(in_measured_modes(catalogue(folder, server, tmp_path)))
    answer(pool, "there")
    server.script = [(503, {}, "overloaded")] * 2
    pool.runners("there")[0].reset(0)
    with pytest.raises(ModelError, match=r"there: .*overloaded"):
        answer(pool, "there")
    assert answer(pool, "there").text
