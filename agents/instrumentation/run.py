"""`viaticum run`: a budget around a program, whatever it is written in, and the processes that it starts.

Python programs hold their calls themselves, in the ledger of this budget (`child/sitecustomize.py`). Others,
and a Python that lacks Viaticum, go through a proxy on a loopback port, whose address OpenAI's and
Anthropic's clients read from the environment. Leaves out how calls are held (`scope`).
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shutil import which
from typing import Any

from viaticum.agents.instrumentation.holding import leave_to
from viaticum.agents.instrumentation.proxy import running_proxy
from viaticum.agents.instrumentation.scope import MAX_TOKENS, BudgetScope, budget
from viaticum.budgets import Budget, Ledger
from viaticum.errors import InputError
from viaticum.money import Price

SETTINGS = "VIATICUM_RUN"
PROXY = "VIATICUM_RUN_PROXY"
_CHILD = Path(__file__).with_name("child")


@dataclass(frozen=True)
class RunSettings:
    """What holds for the calls of a program.

    Attributes:
        name: the budget, which exists in the ledger.
        ledger: its address.
        prices: nano-dollars per million input and output tokens, by model.
    """

    name: str
    ledger: str
    prices: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    catalogue: str | None = None
    unpriced: tuple[str, ...] = ()
    max_tokens: int = MAX_TOKENS
    image_tokens: int | None = None
    holds: str = "bound"
    unheld: str = "refuse"

    def scope(self, ledger: Ledger | None = None) -> BudgetScope:
        """The budget as a context manager."""
        return budget(
            name=self.name,
            ledger=ledger or self.ledger,
            prices={name: Price(*rates) for name, rates in self.prices.items()},
            catalogue=self.catalogue,
            unpriced=self.unpriced,
            max_tokens=self.max_tokens,
            image_tokens=self.image_tokens,
            holds=self.holds,  # type: ignore[arg-type]
            unheld=self.unheld,  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class RunReport:
    """What became of a program.

    Attributes:
        code: its exit code; 128 and the signal that ended it.
        state: the budget afterwards.
        calls, refused, unheld: as of `BudgetScope`, of all its processes that ended by themselves.
    """

    code: int
    state: Budget
    seconds: float
    calls: Mapping[str, int]
    refused: Mapping[str, int]
    unheld: Mapping[str, int]


def run_program(command: Sequence[str], settings: RunSettings, ledger: Ledger) -> RunReport:
    """Run a program under a budget and wait for it. Signals to stop are passed on.

    Raises:
        InputError: there is no such program, or it cannot be run.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        notes = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="viaticum-run-")))
        scope = stack.enter_context(settings.scope(ledger))
        addresses = stack.enter_context(running_proxy())
        environment = {**os.environ, **_environment(settings, notes, addresses)}
        if not _starts_python(command):
            environment |= addresses
        try:
            child = subprocess.Popen(command, env=environment)
        except OSError as error:
            raise InputError(f"cannot run {command[0]}: {error.strerror}") from None
        code = _wait(child)
        counts = _read_notes(notes)
        for name, own in (("calls", scope.calls), ("refused", scope.refused), ("unheld", scope.unheld)):
            counts[name].update(own)
        scope.unheld.clear()  # told by whoever asked for the report
    return RunReport(
        code if code >= 0 else 128 - code,
        ledger.budget(settings.name),
        time.perf_counter() - started,
        counts["calls"],
        counts["refused"],
        counts["unheld"],
    )


def start_in_child() -> None:
    """Hold the calls of this process, as its environment says."""
    values = json.loads(os.environ[SETTINGS])
    notes = Path(values.pop("notes"))
    values["prices"] = {name: tuple(rates) for name, rates in values["prices"].items()}
    values["unpriced"] = tuple(values["unpriced"])
    for each in os.environ.get(PROXY, "").split():
        leave_to(each.partition("=")[2])
    scope = RunSettings(**values).scope()
    scope.__enter__()
    atexit.register(_write_notes, scope, notes)


def _environment(settings: RunSettings, notes: Path, addresses: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(_CHILD), os.environ.get("PYTHONPATH"))))
    return {
        SETTINGS: json.dumps({**asdict(settings), "notes": str(notes)}),
        PROXY: " ".join(f"{name}={address}" for name, address in addresses.items()),
        "PYTHONPATH": path,
    }


def _starts_python(command: Sequence[str]) -> bool:
    """Whether a program is a Python that runs `sitecustomize`, or a script that names Python."""
    if Path(command[0]).name.startswith("python"):
        options = itertools.takewhile(
            lambda each: each.startswith("-") and each not in ("-c", "-m"), command[1:]
        )
        return not any(set(each) & set("IES") for each in options if not each.startswith("--"))
    found = which(command[0])
    if found is None:
        return False
    try:
        with open(found, "rb") as file:
            first = file.readline(200)
    except OSError:
        return False
    return first.startswith(b"#!") and b"python" in first


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Wait for a program; what would end this process ends the program first."""

    def pass_on(number: int, _: Any) -> None:
        child.send_signal(number)

    before = {each: signal.signal(each, pass_on) for each in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_notes(scope: BudgetScope, folder: Path) -> None:
    """Leave for `viaticum run` what the ledger does not have. The folder is gone if nobody waits for it."""
    values = {"calls": scope.calls, "refused": scope.refused, "unheld": scope.unheld}
    if folder.is_dir() and any(values.values()):
        (folder / f"{os.getpid()}-{time.time_ns()}.json").write_text(json.dumps(values))


def _read_notes(folder: Path) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {"calls": Counter(), "refused": Counter(), "unheld": Counter()}
    for file in folder.glob("*.json"):
        for name, values in json.loads(file.read_text()).items():
            counts[name].update(values)
    return counts
