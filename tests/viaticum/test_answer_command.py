"""`viaticum answer explain`: the table, JSON and the comparison with a gold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, "-c", "from viaticum.cli import main; main()", "answer", "explain"]
TEXT = "At first \\boxed{12}.\nThe answer is $7$.\nDouble check the answer: 2 eggs.\n"


def explain(*options: str, text: str = TEXT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "-", *options], input=text, capture_output=True, text=True, timeout=240, check=False
    )


def test_the_table_shows_each_candidate_within_80_columns() -> None:
    done = explain("--kind", "number", text=TEXT + "x" * 500)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["rule", "written", "read", "verdict"]
    assert any(line.startswith("the answer is") and line.rstrip().endswith("the answer") for line in lines)
    assert any("a remark" in line for line in lines)
    assert lines[-1] == "answer (number): 7"
    assert max(map(len, lines)) <= 80


def test_a_gold_is_compared() -> None:
    assert explain("--kind", "number", "--gold", "7.0").returncode == 0
    done = explain("--kind", "number", "--gold", "12")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "gold: 12, not equal"


def test_json_has_the_same_and_never_fails_for_a_wrong_answer() -> None:
    done = explain("--kind", "number", "--gold", "12", "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert (found["value"], found["right"], found["kind"]) == ("7", False, "number")
    assert found["candidates"][0]["rule"] == "the answer is"


def test_control_characters_reach_the_terminal_as_escapes() -> None:
    done = explain("--kind", "text", text="The answer is \x1b[31mred\x07.")
    assert "\x1b" not in done.stdout
    assert "\\x1b[31mred\\x07" in done.stdout


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    assert "no candidate" in explain(text="<think>only a thought").stdout
    done = explain("--kind", "numeral")
    assert (done.returncode, "no answer kind 'numeral'" in done.stderr) == (1, True)
    missing = subprocess.run(
        [*COMMAND, str(tmp_path / "none.txt")], capture_output=True, text=True, timeout=240, check=False
    )
    assert missing.returncode == 1
    assert "cannot be read" in missing.stderr
