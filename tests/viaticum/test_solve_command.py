"""`viaticum solve` with a model, a strategy and settings of its own; strategies of the user's modules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openai_server import running_server

COMMAND = [sys.executable, "-c", "import sys; sys.path.pop(0); from viaticum.cli import main; main()"]
CATALOGUE = """
[models.fast]
kind = "scripted"
description = "Says the same to everything."
context_length = 4096
text = "Seven times six is forty-two. The answer is 42."
input_price = 1
output_price = 1

[models.fast.generation]
max_new_tokens = 300
"""
MODULE = """
from dataclasses import replace
from viaticum.strategies.cot import Cot

class Mine(Cot):
    name = "mine"
    description = "As cot, with a limit of its own."
    max_new_tokens = 700

class Silent(Cot):
    description = ""

def made():
    return replace(Cot(), name="short", max_new_tokens=20)

broken = 3
"""


def solve(folder: Path, *options: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "catalogue.toml").write_text(CATALOGUE, encoding="utf-8")
    (folder / "own_strategies.py").write_text(MODULE, encoding="utf-8")
    return subprocess.run(
        [*COMMAND, "solve", "--catalogue", "catalogue.toml", *options],
        cwd=folder,
        env={**os.environ, "VIATICUM_HOME": str(folder / "home"), "XDG_DATA_HOME": str(folder / "data")},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def payload_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    payload: dict[str, Any] = json.loads(done.stdout)
    return payload


def output_held(payload: dict[str, Any]) -> int:
    """Output tokens of the worst case that was held, at 1 nano-dollar a thousandth of a token."""
    held: int = payload["held_nanousd"] // 1000 - payload["usage"]["fast"]["input_tokens"]
    return held


def test_a_model_and_a_strategy_are_asked_with_the_settings_of_the_command(tmp_path: Path) -> None:
    options = [
        "--model",
        "fast",
        "--strategy",
        "cot",
        "--kind",
        "number",
        "--max-tokens",
        "50",
        "--temperature",
        "0.2",
        "--json",
    ]
    payload = payload_of(solve(tmp_path, "6 * 7?", *options, "--system", ""))
    assert (payload["answer"], payload["routes"]) == ("42", ["fast+cot"])
    assert payload["settings"] == {"max_new_tokens": 50, "temperature": 0.2, "system": ""}
    assert output_held(payload) == 50


def test_without_a_limit_that_of_the_entry_or_of_the_strategy_is_held(tmp_path: Path) -> None:
    entry = payload_of(solve(tmp_path, "-", "--model", "fast", "--strategy", "cot", "--json", stdin="6 * 7?"))
    assert output_held(entry) == 300
    assert entry["routes"] == ["fast+cot"]
    strategy = payload_of(solve(tmp_path, "6 * 7?", "--model", "fast", "--strategy", "direct", "--json"))
    assert output_held(strategy) == 32


@pytest.mark.parametrize(("name", "held"), [("Mine", 700), ("made", 20)])
def test_a_strategy_of_a_module_in_the_folder_is_asked(tmp_path: Path, name: str, held: int) -> None:
    strategy = f"own_strategies:{name}"
    payload = payload_of(solve(tmp_path, "6 * 7?", "--model", "fast", "--strategy", strategy, "--json"))
    assert payload["routes"] == [f"fast+{strategy}"]
    assert output_held(payload) == held


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategy", "own_strategies:Mien"], "did you mean 'Mine'?"),
        (["--strategy", "own_strategies:broken"], "is int, not a strategy"),
        (["--strategy", "own_strategies:Silent"], "has no description"),
        (["--strategy", "no_such_module:Mine"], "there is no module 'no_such_module'"),
        (["--strategy", "cto"], "did you mean 'cot'?"),
        (["--model", "fats"], "did you mean 'fast'?"),
        (["--kind", "numbre"], "known: auto, number"),
        (["--model", "fast", "--top-p", "0"], "top_p: Input should be greater than 0, got 0.0"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, options: list[str], message: str) -> None:
    done = solve(tmp_path, "6 * 7?", *options)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_answer_that_breaks_off_leaves_the_error_a_line_of_its_own(tmp_path: Path) -> None:
    with running_server() as server:
        server.script = ["break"] * 5
        entry = f"""
[models.far]
kind = "remote"
description = "Breaks off."
context_length = 4096
input_price = 1
output_price = 1
litellm_model = "openai/fake"
api_base = "{server.url}"
"""
        (tmp_path / "far.toml").write_text(entry)
        options = ("--model", "far", "--strategy", "cot", "--budget", "0.1")
        done = solve(tmp_path, "6 * 7?", *options, "--catalogue", "far.toml")
    assert done.returncode == 1
    *_, text, error = done.stderr.splitlines()
    assert error.startswith("error: the provider of far cannot be reached or failed"), done.stderr
    assert not text.startswith("far+cot:"), "a part of the answer came before"


def test_without_an_answer_a_script_gets_none(tmp_path: Path) -> None:
    options = ("Is it so?", "--model", "fast", "--strategy", "cot", "--kind", "boolean", "--budget", "0.1")
    done = solve(tmp_path, *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no answer: " in done.stderr
    done = solve(tmp_path, *options, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["answer"] is None
