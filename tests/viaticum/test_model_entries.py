"""`viaticum models add`, `where` and `test`: a user's own catalogue, from the first model on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from openai_server import KEY, OpenAIServer
from tiny_gguf import write_tiny_gguf
from tiny_models import build
from typer.testing import CliRunner

from viaticum.catalogue import Catalogue
from viaticum.catalogue_file import add_entry
from viaticum.commands.models import app
from viaticum.errors import AuthenticationFailed, InputError, ViaticumError
from viaticum.models.added import new_entry
from viaticum.models.api_keys import KEY_VARIABLES
from viaticum.models.usable import UsableModels

pytest.importorskip("litellm")

MINE = """# my models\r
strategies = []\r
\r
[models.old]  # keep me\r
kind = "scripted"\r
description = "Ünïcode \U0001f600 stays."\r
context_length = 100\r
input_price = 1.50\r
output_price = 2"""


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("VIATICUM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path / "cache"))
    for variable in ("VIATICUM_CATALOGUE", *(name for names in KEY_VARIABLES.values() for name in names)):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> tuple[str, str]:
    """stdout and stderr of a command that succeeds; what it raises otherwise."""
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_a_model_of_the_list_is_shown_and_pinned(tmp_path: Path) -> None:
    out, err = run("add", "openai/gpt-5-mini")
    file = tmp_path / "config" / "viaticum" / "catalogue.toml"
    assert file.read_text() == out
    assert str(file) in err
    assert "OPENAI_API_KEY" in err
    spec = Catalogue.load()["openai/gpt-5-mini"]
    assert spec.kind == "remote"
    assert spec.litellm_model == "openai/gpt-5-mini"
    assert spec.price is not None
    assert spec.price.version.startswith("litellm ")
    assert (spec.price.input_nanousd_per_million, spec.price.output_nanousd_per_million) == (
        250_000_000,
        2_000_000_000,
    )
    assert spec.context_length == 272_000
    assert (spec.tools, spec.json_schema) == (True, True)
    assert "thinks before it answers" in spec.description
    assert spec.api_key_env == "OPENAI_API_KEY"


def test_rates_of_caches_are_part_of_the_price() -> None:
    run("add", "anthropic/claude-sonnet-4-5")
    price = Catalogue.load()["anthropic/claude-sonnet-4-5"].price
    assert price is not None
    assert price.cached_nanousd_per_million == 300_000_000
    assert price.cache_write_nanousd_per_million == 3_750_000_000
    run("add", "deepseek/deepseek-chat")  # its list says 0, which means none
    price = Catalogue.load()["deepseek/deepseek-chat"].price
    assert price is not None
    assert price.cache_write_nanousd_per_million is None


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("anthropic/claude-sonnet-4.5", "anthropic/claude-sonnet-4-5"),
        ("claude-sonet-4-5", "anthropic/claude-sonnet-4-5"),
        ("openai/gpt4o", "openai/gpt-4o"),
    ],
)
def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(wrong: str, right: str) -> None:
    with pytest.raises(InputError, match=right):
        run("add", wrong)


def test_a_free_model_of_ones_own_server_needs_no_key() -> None:
    with pytest.raises(InputError, match="0 if it is free"):
        run("add", "ollama/llama3.1")
    run("add", "ollama/llama3.1", "--input-price", "0", "--output-price", "0")
    assert "ollama/llama3.1" in UsableModels(Catalogue.load())


def test_adding_twice_changes_nothing_and_shows_what_differs(tmp_path: Path) -> None:
    run("add", "openai/gpt-4o-mini")
    file = tmp_path / "config" / "viaticum" / "catalogue.toml"
    before = file.read_bytes()
    _, err = run("add", "openai/gpt-4o-mini")
    assert "unchanged" in err
    assert "would be" not in err
    _, err = run("add", "openai/gpt-4o-mini", "--input-price", "7", "--output-price", "0.6")
    assert "input_price is 0.15 there and would be 7.0 now" in err
    assert "output_price" not in err
    assert file.read_bytes() == before


def test_the_rest_of_the_file_stays_byte_for_byte(tmp_path: Path) -> None:
    real = tmp_path / "dotfiles" / "mine.toml"
    real.parent.mkdir()
    real.write_bytes(MINE.encode())
    link = tmp_path / "link.toml"
    link.symlink_to(real)
    run("add", "openai/gpt-4o-mini", "--catalogue", str(link))
    after = real.read_bytes()
    assert after.startswith(MINE.encode() + b"\r\n\r\n")
    assert b"\n" not in after.replace(b"\r\n", b"")
    assert link.is_symlink()
    assert {"old", "openai/gpt-4o-mini"} <= set(Catalogue.load(link))


def test_a_file_that_is_no_catalogue_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    for text in ("[models.a\n", "models = {}\n", 'modles = "x"\n'):
        file.write_text(text)
        with pytest.raises(InputError, match=r"mine\.toml"):
            run("add", "openai/gpt-4o-mini", "--catalogue", str(file))
        assert file.read_text() == text


@pytest.mark.parametrize("name", ["openai/gpt-4o", "gpt:latest", "team@gpt", "a.b-c_d", "x+"])
def test_names_with_the_marks_of_apis(tmp_path: Path, name: str) -> None:
    run("add", "openai/gpt-4o", "--name", name)
    out, _ = run("show", name)
    assert f"name: {name}" in out


@pytest.mark.parametrize("name", ["", "/etc", "a b", "auto", "é", "a+b", "-x"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(InputError, match="name"):
        new_entry("openai/gpt-4o", name=name or " ")


def test_all_kinds_of_values_are_read_back(tmp_path: Path) -> None:
    fields = {
        "kind": "remote",
        "description": 'quotes " and \\ and \x7f and \U0001f600\nlines',
        "context_length": 10,
        "litellm_model": "a/b",
        "input_price": 3e-7,
        "output_price": 12,
        "price_tiers": [{"above_tokens": 5, "input_price": 1, "output_price": 2.5}],
        "generation": {"stop": ["a", "b"], "extra_body": {"x": {"y": True}}},
        "omit": ["seed"],
        "streams": False,
    }
    file = tmp_path / "new" / "mine.toml"
    added = add_entry(file, "far", fields)
    there = tomllib.loads(file.read_text())["models"]["far"]
    assert there == fields
    assert added.is_new
    assert not add_entry(file, "far", fields).is_new


def test_a_file_on_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "Tiny Model.Q4.gguf"
    write_tiny_gguf(path, build())
    _, err = run("add", "Tiny Model.Q4.gguf")
    assert "viaticum models pull tiny-model.q4" in err
    spec = Catalogue.load()["tiny-model.q4"]
    assert spec.kind == "local"
    assert spec.sources[0].model_dump() == {"type": "path", "path": str(path)}
    assert spec.price is not None
    with pytest.raises(InputError, match=r"there is no file .*gone\.gguf"):
        run("add", "gone.gguf")
    (tmp_path / "text.gguf").write_text("no weights")
    with pytest.raises(ViaticumError, match="GGUF"):
        run("add", "text.gguf")


def test_a_repository_of_a_hub_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="give --context"):
        run("add", "hub:some.one/a-model")
    run("add", "hub:some.one/a-model@v1", "--context", "4096", "--name", "mine")
    spec = Catalogue.load()["mine"]
    assert spec.context_length == 4096
    assert spec.sources[0].model_dump() == {"type": "hub", "repo": "some.one/a-model", "revision": "v1"}
    with pytest.raises(InputError, match="hub:OWNER/NAME"):
        run("add", "hub:nothing")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("openai/gpt-5-minii",), "did you mean openai/gpt-5-mini"),
        (("nowhere/x",), "give --context, --input-price and --output-price"),
        (("openai/text-embedding-3-small",), "is for embedding, not for chat"),
        (("openai/gpt-4o", "--input-price", "1"), "both"),
        (("openai/gpt-4o", "--input-price", "cheap", "--output-price", "1"), "--input-price is dollars"),
        (("openai/gpt-4o", "--input-price", "-1", "--output-price", "1"), "input_price"),
        (("openai/gpt-4o", "--api-base", "nowhere"), "api_base"),
    ],
)
def test_what_cannot_be_added(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run("add", *words)
    assert not (tmp_path / "config" / "viaticum" / "catalogue.toml").exists()


def test_an_unlisted_model_with_all_that_is_needed() -> None:
    run("add", "mine/x", "--context", "500", "--input-price", "0", "--output-price", "0.5", "--json")
    spec = Catalogue.load()["mine/x"]
    assert (spec.context_length, spec.price_version, spec.api_key_env) == (500, "", None)


def test_where_everything_is(tmp_path: Path) -> None:
    out, _ = run("where")
    assert f"catalogue  {tmp_path / 'config' / 'viaticum' / 'catalogue.toml'}" in out
    assert str(tmp_path / "home") in out
    assert str(tmp_path / "cache") in out
    (tmp_path / "catalogue.toml").write_text("")
    out, _ = run("where")
    assert f"not used: {tmp_path / 'catalogue.toml'}" in out
    assert json.loads(run("where", "--catalogue", "catalogue.toml", "--json")[0])["catalogue"]["exists"]


def test_a_catalogue_in_the_current_folder_is_taken_only_where_it_is_named(tmp_path: Path) -> None:
    add_entry(tmp_path / "catalogue.toml", "here", new_entry("openai/gpt-4o").fields)
    assert "here" not in Catalogue.load()
    assert "here" in Catalogue.load("catalogue.toml")


def test_the_home_is_read_by_all(tmp_path: Path) -> None:
    from viaticum.budgets import default_path

    assert default_path() == tmp_path / "home" / "ledger.db"


def test_keys_are_looked_for_where_litellm_does() -> None:
    import litellm

    for provider, variables in KEY_VARIABLES.items():
        missing = litellm.validate_environment(f"{provider}/some-model")["missing_keys"]
        assert not missing or set(missing) & set(variables), (provider, missing)


def test_trying_an_api_model(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.text = "The answer is 42."
    run("add", "openai/gpt-4o", "--name", "far", "--api-base", server.url, "--api-key-env", "FAR_KEY")
    with pytest.raises(AuthenticationFailed, match="FAR_KEY"):
        run("test", "far")
    assert server.requests == []
    monkeypatch.setenv("FAR_KEY", KEY)
    out, _ = run("test", "far")
    assert "far: The answer is 42." in out
    assert "tokens a second" in out
    assert " held" in out
    assert all(len(line) <= 80 for line in out.splitlines())
    facts = json.loads(run("test", "far", "--json")[0])
    assert facts["answer"] == "42"
    assert facts["cost_nanousd"] > 0
    assert len(server.requests) == 2


def test_a_new_user_gets_an_answer_without_naming_a_model(server: OpenAIServer, tmp_path: Path) -> None:
    """Two API models, no weights, nothing else; every interface of the command line takes the cheaper."""
    server.text = "The answer is 4."
    for model, name in (("openai/gpt-4o", "openai/dear"), ("openai/gpt-4o-mini", "gpt:cheap")):
        run("add", model, "--name", name, "--api-base", server.url, "--api-key-env", "FAR_KEY")

    def viaticum(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "import sys; sys.path.pop(0); from viaticum.cli import main; main()"]
        return subprocess.run(
            [*command, *words],
            cwd=tmp_path,
            env={**os.environ, "FAR_KEY": KEY},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    solved = viaticum("solve", "2+2?", "--budget", "0.05", "--json")
    answer = json.loads(solved.stdout)
    assert (answer["answer"], answer["model"]) == ("4", "gpt:cheap")
    assert "prior only: no outcomes" in answer["route"]["why"]
    (tmp_path / "q.csv").write_text("id,question,answer\na,2+2?,4\nb,1+3?,4\n")
    done = viaticum("batch", "q.csv", "--out", "r.jsonl", "--budget", "0.05")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["4", "4"]


def test_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(b"\xef\xbb\xbf" + MINE.encode())
    run("add", "openai/gpt-4o-mini", "--catalogue", str(file))
    assert file.read_bytes().startswith(b"\xef\xbb\xbf# my models")
    assert {"old", "openai/gpt-4o-mini"} <= set(Catalogue.load(file))


def test_a_key_with_a_newline_is_that_key(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    run("add", "openai/gpt-4o", "--name", "far", "--api-base", server.url, "--api-key-env", "FAR_KEY")
    monkeypatch.setenv("FAR_KEY", " \n")
    assert ["far", "remote", "$2.5", "$10", "128000", "no", "key"] in [
        line.split() for line in run("list")[0].splitlines()
    ]
    monkeypatch.setenv("FAR_KEY", f"{KEY}\n")
    server.text = "The answer is 42."
    assert json.loads(run("test", "far", "--json")[0])["answer"] == "42"
