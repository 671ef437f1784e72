"""The files of the container and of the release name what exists.

What they do is tried by `.ci/dist` and by hand.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from doc_commands import find_problem
from viaticum_server import serving

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of the Dockerfile, lines that go on joined."""
    lines = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M).replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


def last(instruction: str) -> str:
    return [rest for name, rest in instructions() if name == instruction][-1]


def test_the_image_is_built_from_what_a_wheel_needs() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    needed = {*wheel, "pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert kept == needed | {"constraints.txt"}
    assert all((ROOT / name).exists() for name in kept)
    for secret in (".env", ".git", ".venv", "ledger.db", "tests", "docs"):
        assert not any(fnmatch(secret, name) for name in kept)


def test_the_image_runs_a_server_that_is_not_root() -> None:
    user, entry, command = last("USER"), json.loads(last("ENTRYPOINT")), json.loads(last("CMD"))
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert find_problem(shlex.join([*entry, *command])) == ""
    extras = re.search(r"EXTRAS=(\S+)", DOCKERFILE)
    assert extras
    assert set(extras[1].split(",")) <= set(PROJECT["project"]["optional-dependencies"])
    volumes = json.loads(last("VOLUME"))
    assert all(f"={folder}" in DOCKERFILE for folder in volumes), "what is written is in a volume"


def test_the_health_check_asks_what_the_server_answers(tmp_path: Path) -> None:
    """The image's own command, against a real server; and where there is none."""
    check = last("HEALTHCHECK")
    _, program, source = json.loads(check[check.index("[") :])

    def ends(port: str) -> int:
        code = source.replace(":8000", f":{port}")
        return subprocess.run([sys.executable, program, code], capture_output=True, check=False).returncode

    with serving(tmp_path) as server:
        port = server.url.rpartition(":")[2]
        assert ends(port) == 0
        server.service.draining = True
        assert server.http.get("/health").status_code == 503
        assert ends(port) != 0
    assert ends(port) != 0


@pytest.fixture(scope="module")
def release() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    loaded: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    return loaded


def test_only_the_upload_may_prove_who_it_is(release: dict[str, Any]) -> None:
    jobs = release["jobs"]
    assert release["permissions"] == {}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["environment"]["name"] == "pypi"
    assert jobs["publish"]["needs"] == "build"
    assert not any("run" in step for step in jobs["publish"]["steps"]), (
        "nothing is built where it is uploaded"
    )
    assert jobs["build"]["permissions"] == {"contents": "read"}
    assert "secrets." not in json.dumps(release)
    uses = [step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", each) for each in uses), "a tag can be moved"


def test_a_release_builds_as_the_project_builds(release: dict[str, Any]) -> None:
    runs = [step["run"] for step in release["jobs"]["build"]["steps"] if "run" in step]
    assert "make dist" in runs
    assert re.search(r"^dist:", (ROOT / "Makefile").read_text(), re.M)
    assert ".ci/dist" in (ROOT / ".ci" / "run").read_text()
    assert "twine check --strict" in (ROOT / ".ci" / "dist").read_text()
    tags = release[True]["push"]["tags"]  # `on` is true in YAML 1.1
    assert [each for each in tags if fnmatch(f"v{PROJECT['project']['version']}", each.replace("+", ""))]


def test_the_tag_has_to_be_the_version(release: dict[str, Any]) -> None:
    (check,) = (step for step in release["jobs"]["build"]["steps"] if "TAG" in step.get("env", {}))
    for tag, code in ((f"v{PROJECT['project']['version']}", 0), ("v9.9.9", 1)):
        done = subprocess.run(
            ["bash", "-c", check["run"].replace("python ", "python3 ")],
            cwd=ROOT,
            env={**os.environ, "TAG": tag},
            capture_output=True,
            check=False,
        )
        assert (done.returncode != 0) == bool(code)
