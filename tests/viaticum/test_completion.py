"""Completion in shells: the protocol that each shell's script speaks, the scripts, and a real bash."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def run(command: list[str], home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HOME": str(home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=home,
        env=environment | variables,
    )


def words(shell: str, line: str, home: Path) -> list[str]:
    """What a shell is offered for the last word of a line; zsh and fish get a help text with each."""
    if shell == "bash":
        variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    else:
        variables = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = run(["viaticum"], home, _VIATICUM_COMPLETE=f"complete_{shell}", **variables)
    assert done.stderr == ""
    if shell == "zsh":
        return re.findall(r'"([^"]+)":"', done.stdout)
    return [each.split("\t")[0] for each in done.stdout.split("\n") if each]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_and_options_are_completed(shell: str, tmp_path: Path) -> None:
    assert words(shell, "viaticum so", tmp_path) == ["solve"]
    assert {"create", "verify", "export"} <= set(words(shell, "viaticum budget ", tmp_path))
    assert words(shell, "viaticum batch --dead", tmp_path) == ["--deadline"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_names_are_completed_from_the_catalogue_of_the_line(shell: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        '[models.my-own]\nkind = "scripted"\ndescription = "It\'s \\"mine\\"; $HOME."\n'
        "context_length = 4096\ninput_price = 1\noutput_price = 1\n"
    )
    line = "viaticum solve --catalogue mine.toml --model "
    assert words(shell, f"{line}my", tmp_path) == ["my-own"]
    found = words(shell, line, tmp_path)
    assert "my-own" in found
    assert "qwen2.5-coder-r-stitch" in found
    assert "all-minilm-l6-v2" not in found, "it answers no question"
    assert words(shell, "viaticum models pull all", tmp_path) == ["all-minilm-l6-v2"]
    assert sorted(words(shell, "viaticum solve --strategy co", tmp_path)) == ["cod", "cot"]
    assert words(shell, "viaticum solve --catalogue none.toml --model ", tmp_path) == []


def test_a_real_bash_completes_with_the_script_that_the_page_writes(tmp_path: Path) -> None:
    """Also from a shell that is not recognised, as in a container's build."""
    script = run(["sh", "-c", "_VIATICUM_COMPLETE=source_bash viaticum > completion.bash"], tmp_path)
    assert script.returncode == 0, script.stderr
    line = (
        'COMP_WORDS=(viaticum models pu); COMP_CWORD=2; _viaticum_completion viaticum; echo "${COMPREPLY[@]}"'
    )
    done = run(["bash", "--norc", "-c", f"source ./completion.bash && {line}"], tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("pull", "")
    registered = run(["bash", "--norc", "-c", "source ./completion.bash && complete -p viaticum"], tmp_path)
    assert "_viaticum_completion" in registered.stdout


@pytest.mark.parametrize(
    ("shell", "file"),
    [
        ("bash", ".bash_completions/viaticum.sh"),
        ("zsh", ".zfunc/_viaticum"),
        ("fish", ".config/fish/completions/viaticum.fish"),
    ],
)
def test_installing_adds_to_what_is_there(shell: str, file: str, tmp_path: Path) -> None:
    startup = tmp_path / {"bash": ".bashrc", "zsh": ".zshrc", "fish": ".profile"}[shell]
    startup.write_text("alias ll='ls -l'\n")
    for _ in range(2):
        named = run(
            ["viaticum", "--install-completion", shell],
            tmp_path,
            _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1",
        )
        assert named.returncode == 0, named.stderr
    assert "viaticum" in (tmp_path / file).read_text()
    assert startup.read_text().startswith("alias ll='ls -l'\n")
    assert startup.read_text().count(".bash_completions/viaticum.sh") == (1 if shell == "bash" else 0)


def test_a_shell_that_is_not_supported_is_named(tmp_path: Path) -> None:
    done = run(
        ["viaticum", "--install-completion", "tcsh"],
        tmp_path,
        _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1",
    )
    assert done.returncode != 0
    assert "tcsh" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
