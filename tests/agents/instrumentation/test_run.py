"""`viaticum run`: programs in Python and others, their processes, exit codes and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest
from forms_server import FormsServer

from viaticum.budgets import Ledger

COST = Decimal("0.000022")
ASK = """
import os, sys, openai
with openai.OpenAI(api_key="k", base_url=os.environ["STUB"] + "/v1") as client:
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 1):
        done = client.chat.completions.create(model="small", messages=[{"role": "user", "content": "2+2?"}])
        print(done.choices[0].message.content, flush=True)
"""
RAW = """
import json, os, urllib.request
ask = {"model": "small", "messages": [{"role": "user", "content": "2+2?"}], "stream": STREAM}
address = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
headers = {"content-type": "application/json", "authorization": "Bearer k"}
request = urllib.request.Request(address, json.dumps(ask).encode(), headers)
print(urllib.request.urlopen(request, timeout=30).read().decode())
"""


class Runs:
    """Runs programs under `viaticum run` with a ledger and a folder of their own."""

    def __init__(self, folder: Path, server: FormsServer) -> None:
        self.folder, self.server = folder, server
        self.environment = {
            **os.environ,
            "STUB": server.url,
            "OPENAI_BASE_URL": f"{server.url}/v1",
            "VIATICUM_LEDGER": str(folder / "ledger.db"),
            "PYTHONUNBUFFERED": "1",
        }

    def command(self, *arguments: str, budget: str = "1") -> list[str]:
        own = ("--budget", budget, "--budget-name", "agent", "--price", "small=1,2")
        return [sys.executable, "-m", "viaticum", "run", *own, *arguments]

    def run(self, *arguments: str, budget: str = "1") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments, budget=budget),
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def script(self, text: str, name: str = "agent.py") -> str:
        (self.folder / name).write_text(text)
        return str(self.folder / name)

    def spent(self) -> Decimal:
        with Ledger(self.folder / "ledger.db") as ledger:
            assert ledger.check() == []
            return ledger.budget("agent").posted_usd


@pytest.fixture
def runs(server: FormsServer, tmp_path: Path) -> Runs:
    return Runs(tmp_path, server)


def test_a_python_program_is_held_and_its_exit_code_kept(runs: Runs) -> None:
    script = runs.script(ASK + "sys.exit(7)\n")
    done = runs.run("--", sys.executable, script, "3")
    assert done.returncode == 7
    assert done.stdout == "It is four.\n" * 3
    assert done.stderr == "agent: $0.000066 of $1 spent; 3 calls (small 3)\n"
    assert runs.spent() == 3 * COST


def test_what_does_not_fit_is_an_error_of_the_provider_to_the_program(runs: Runs) -> None:
    done = runs.run("--", sys.executable, runs.script(ASK), budget="0.0001")
    assert done.returncode == 1
    assert "openai.APIStatusError: Error code: 402" in done.stderr
    assert "not sent, the budget is used up: 1" in done.stderr
    assert runs.server.calls == []


def test_processes_that_it_starts_share_the_budget(runs: Runs) -> None:
    child = runs.script(ASK, "child.py")
    more = f"""
import multiprocessing, subprocess
def work(_):
    subprocess.run([sys.executable, {child!r}], check=True)
if __name__ == "__main__":
    for way in ("fork", "spawn"):
        with multiprocessing.get_context(way).Pool(2) as pool:
            pool.map(work, range(2))
"""
    done = runs.run("--", sys.executable, runs.script("import sys\n" + more))
    assert done.returncode == 0, done.stderr
    assert len(runs.server.calls) == 4
    assert "4 calls (small 4)" in done.stderr
    assert runs.spent() == 4 * COST


def test_a_forked_process_holds_its_own_calls(runs: Runs) -> None:
    script = runs.script(ASK + "pid = os.fork()\n" + ASK + "os.waitpid(pid, 0) if pid else None\n")
    assert runs.run("--", sys.executable, script).returncode == 0
    assert runs.spent() == len(runs.server.calls) * COST == 3 * COST


@pytest.mark.parametrize("streams", [False, True])
def test_other_programs_go_through_the_proxy(runs: Runs, streams: bool) -> None:
    script = runs.script(RAW.replace("STREAM", str(streams)))
    done = runs.run("--", "sh", "-c", f"{sys.executable} -I {script} && {sys.executable} -I {script}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("four.") == 2
    assert "2 calls (small 2)" in done.stderr
    assert runs.spent() == len(runs.server.calls) * COST == 2 * COST
    assert ('"usage"' in done.stdout) is not streams  # which the program did not ask for


def test_python_inside_another_program_is_held_once(runs: Runs) -> None:
    script = runs.script(ASK.replace('base_url=os.environ["STUB"] + "/v1"', "max_retries=0"))
    done = runs.run("--", "sh", "-c", f"{sys.executable} {script}")
    assert done.returncode == 0, done.stderr
    assert runs.spent() == len(runs.server.calls) * COST == COST


def test_a_python_without_its_site_goes_through_the_proxy(runs: Runs) -> None:
    done = runs.run("--", sys.executable, "-I", runs.script(RAW.replace("STREAM", "False")))
    assert done.returncode == 0, done.stderr
    assert runs.spent() == COST


def test_a_sitecustomize_of_the_environment_still_runs(runs: Runs) -> None:
    (runs.folder / "own").mkdir()
    own = "import os\nif 'VIATICUM_RUN' in os.environ:\n    print('mine')\n"
    (runs.folder / "own" / "sitecustomize.py").write_text(own)
    runs.environment["PYTHONPATH"] = str(runs.folder / "own")
    done = runs.run("--", sys.executable, runs.script(ASK))
    assert done.stdout == "mine\nIt is four.\n"
    assert runs.spent() == COST


def test_a_killed_program_leaves_its_calls_held(runs: Runs) -> None:
    runs.server.pause = 30
    script = runs.script(ASK.replace('2+2?"}])', '2+2?"}], stream=True)\n        list(done)'))
    with subprocess.Popen(
        runs.command("--", sys.executable, script), env=runs.environment, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not runs.server.calls and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(120) == 128 + signal.SIGTERM
    assert "still held" in said
    with Ledger(runs.folder / "ledger.db") as ledger:
        assert ledger.budget("agent").held_nanousd > 0
        assert ledger.check() == []


def test_mistakes_are_told(runs: Runs) -> None:
    assert "no-such-program: No such file" in runs.run("--", "no-such-program").stderr
    wrong = runs.run("--price", "small", "--", "true")
    assert wrong.returncode == 1
    assert "NAME=INPUT,OUTPUT" in wrong.stderr
