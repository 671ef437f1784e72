"""`viaticum chat` from a pipe and with Ctrl-C, what a first run says, and shell completion."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from viaticum_server import WORD, write_catalogue

from viaticum.budgets import Ledger

COMMAND = [sys.executable, "-c", "from viaticum.cli import main; main()"]


def chat(folder: Path, lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *COMMAND,
            "chat",
            "--folder",
            str(folder),
            "--catalogue",
            str(write_catalogue(folder)),
            "--budget",
            "0.01",
            "--budget-name",
            "talk",
            *options,
        ],
        input=lines,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_conversation_from_a_pipe_is_metered_by_the_turn(tmp_path: Path) -> None:
    done = chat(
        tmp_path, "one two\n\n/route\n/budget\nthree\n/route\n/what\n/quit\nfour\n", "--model", "fast"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Seven times six is forty-two. The answer is 42.\n" * 2
    first, second = 2 + 9, (2 + 9 + 1) + 9
    assert f"$0.0000{first}, $0.0000{first} spent" in done.stderr
    assert done.stderr.count("fast\n") == 2
    assert "/quit" in done.stderr
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.budget("talk").posted_nanousd == (first + second) * WORD


def test_json_a_turn_with_a_strategy(tmp_path: Path) -> None:
    done = chat(tmp_path, "one?\n", "--model", "fast+cot", "--json", "--system", "Be brief.")
    payload = json.loads(done.stdout)
    assert (payload["answer"], payload["routes"]) == ("42", ["fast+cot"])
    assert payload["left_nanousd"] == 10**7 - payload["cost_nanousd"]


def test_a_turn_that_fails_says_why_and_the_exit_code_too(tmp_path: Path) -> None:
    done = chat(tmp_path, "one\ntwo\n", "--model", "fast", "--max-tokens", "8192")
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 2
    assert "Traceback" not in done.stderr
    unknown = chat(tmp_path, "one\n", "--model", "nobody")
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("error: unknown model 'nobody'")


@pytest.mark.parametrize("model", ["slow", "slow+cot"])
def test_ctrl_c_stops_the_answer_and_not_the_conversation(tmp_path: Path, model: str) -> None:
    process = subprocess.Popen(
        [
            *COMMAND,
            "chat",
            "--folder",
            str(tmp_path),
            "--catalogue",
            str(write_catalogue(tmp_path)),
            "--budget",
            "0.01",
            "--budget-name",
            "talk",
            "--model",
            model,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("count\n")
    process.stdin.flush()
    assert process.stdout.read(6) == "w0 w1 "
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate("/budget\n", timeout=240)
    assert process.returncode == 0, errors
    assert "stopped" in errors
    assert "w399" not in rest
    with Ledger(tmp_path / "ledger.db") as ledger:
        budget = ledger.budget("talk")
        assert budget.held_nanousd == 0
        assert 0 < budget.posted_nanousd < 10**6
        assert ledger.check() == []


def test_a_first_run_with_nothing_set_up_says_what_to_do(tmp_path: Path) -> None:
    bare = {**os.environ, "HOME": str(tmp_path), "VIATICUM_CACHE": str(tmp_path / "cache")}
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "VIATICUM_CATALOGUE"):
        bare.pop(name, None)
    done = subprocess.run(
        [*COMMAND, "solve", "What is 2 + 2?"],
        capture_output=True,
        text=True,
        env=bare,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: weights of ")
    assert "`viaticum models pull` without a name" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_shell_completes_commands() -> None:
    chat_body = {"_VIATICUM_COMPLETE": "complete_bash", "COMP_WORDS": "viaticum ser", "COMP_CWORD": "1"}
    program = "import sys; sys.argv[0] = 'viaticum'; from viaticum.cli import app; app(prog_name='viaticum')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | chat_body,
        timeout=240,
        check=False,
    )
    assert done.stdout.split() == ["serve"], done.stderr
