"""The workflow on scripted models: routing, charging, escalation, and kills at any moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from workflow_client import LARGE, SMALL, TABLE, ScriptedModel, client, row

from viaticum import Answer, BudgetExceeded, InputError, Pair, Viaticum
from viaticum.agents.workflow.events import CallSettled, RouteChosen, TableMade, TextPiece
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue
from viaticum.errors import ModelError
from viaticum.models.base import Generation
from viaticum.routers.query import Best, Cheapest, StaticRouter, Weighted, choose, parse_policy
from viaticum.types import Completion, Message, RoutingTable, TokenCount

SUPPORT = Path(__file__).resolve().parents[2] / "support"


def test_answers_and_charges_the_true_cost(tmp_path: Path) -> None:
    with client(tmp_path, "The answer is 1.", "The answer is 72.", budget="0.01") as viaticum:
        answer = viaticum.solve("What is 48 + 24?")
        price = Catalogue.load()[LARGE].price
        assert price is not None
        assert (answer.value, answer.routes[0].pair.model) == ("72", LARGE)
        assert answer.cost == price.cost(100, 20)
        assert answer.held == price.cost(100, 400)
        budget = viaticum.budget()
        assert (budget.posted_nanousd, budget.held_nanousd) == (answer.cost, 0)


def test_no_answer_escalates_to_the_next_pair(tmp_path: Path) -> None:
    with client(tmp_path, "The answer is 5.", "I cannot tell", budget="0.01") as viaticum:
        answer = viaticum.solve("What is 2 + 3?", kind="number")
        assert answer.value == "5"
        assert [route.pair.model for route in answer.routes] == [LARGE, SMALL]
        assert viaticum.budget().posted_nanousd == answer.cost


def test_nobody_answers(tmp_path: Path) -> None:
    with client(tmp_path, "I cannot tell", "I cannot tell", budget="0.01") as viaticum:
        answer = viaticum.solve("What is 2 + 3?", kind="number")
        assert answer.value is None
        assert len(answer.routes) == 2
        assert answer.reason


def test_small_budget_takes_the_pair_that_fits_and_an_empty_one_refuses(tmp_path: Path) -> None:
    with client(tmp_path, "The answer is 5.", "The answer is 6.", budget="0.0001") as viaticum:
        answer = viaticum.solve("What is 2 + 3?", kind="number")
        assert answer.routes[0].pair.model == SMALL, "the large model's worst case does not fit"
        with pytest.raises(BudgetExceeded):
            [viaticum.solve("What is 2 + 3?", kind="number") for _ in range(50)]
        assert viaticum.ledger.check() == []
        assert viaticum.budget().held_nanousd == 0


def test_events_and_a_second_visit_to_a_thread(tmp_path: Path) -> None:
    with client(tmp_path, "The answer is 5.", "The answer is 6.") as viaticum:
        events = list(viaticum.stream("What is 3 + 3?", thread_id="t"))
        table, route, *texts, settled, answer = events
        assert isinstance(table, TableMade)
        assert table.table == TABLE
        assert isinstance(route, RouteChosen)
        assert route.route.pair == Pair(LARGE, "cot")
        assert [type(each) for each in texts] == [TextPiece] * 4
        assert (
            "".join(each.text for each in texts if isinstance(each, TextPiece)).strip() == "The answer is 6."
        )
        assert isinstance(answer, Answer)
        assert isinstance(settled, CallSettled)
        assert (settled.cost, settled.left) == (answer.cost, viaticum.budget().left_nanousd)
        spent = viaticum.budget().posted_nanousd
        assert viaticum.solve("What is 3 + 3?", thread_id="t").value == "6"
        assert viaticum.budget().posted_nanousd == spent
        with pytest.raises(InputError, match="another question"):
            viaticum.solve("What is 4 + 3?", thread_id="t")


class SamplingModel(ScriptedModel):
    """Says something else each time, by its seed."""

    def __init__(self, name: str, texts: list[str]) -> None:
        super().__init__(name, "")
        self.texts, self.temperatures = texts, []  # type: ignore[var-annotated]

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[str | Completion]:
        self.temperatures.append(generation.temperature)
        self.text = self.texts[generation.seed]
        yield from super().stream(messages, generation)


SAMPLED = "self-consistency:cot:5"


@pytest.mark.parametrize(
    ("texts", "answer", "calls"),
    [
        (["5", "5", "5", "6", "6"], "5", 3),  # settled: two more cannot change it
        (["6", "5", "7", "5", "6"], "6", 5),  # a tie goes to the first
        (["x", "x", "5", "x", "x"], "5", 4),  # a newcomer could only tie, and would lose
        (["x", "x", "x", "x", "x"], None, 5),
    ],
)
def test_samples_are_asked_for_until_the_vote_is_settled(
    tmp_path: Path, texts: list[str], answer: str | None, calls: int
) -> None:
    model = SamplingModel(
        LARGE, [f"The answer is {each}." if each != "x" else "I cannot tell" for each in texts]
    )
    table = RoutingTable((replace(row(LARGE, 0.7, 20_000), pair=Pair(LARGE, SAMPLED)),))
    with Viaticum(folder=tmp_path, router=StaticRouter(table), models={LARGE: model}) as viaticum:
        got = viaticum.solve("What is 2 + 3?", kind="number")
        assert (got.value, model.calls, len(got.routes)) == (answer, calls, 1)
        assert set(model.temperatures) == {0.7}
        price = viaticum.catalogue.prices([LARGE])[LARGE]
        assert got.cost == calls * price.cost(100, 20) == viaticum.budget().posted_nanousd
        assert got.usage.models[LARGE] == TokenCount(calls * 100, calls * 20)
        assert viaticum.ledger.check() == []


def test_a_run_is_as_long_as_its_samples(tmp_path: Path) -> None:
    model = SamplingModel(LARGE, [f"The answer is {number}." for number in range(40)])
    pair = Pair(LARGE, "self-consistency:cot:40")
    table = RoutingTable((replace(row(LARGE, 0.7, 20_000), pair=pair),))
    with Viaticum(folder=tmp_path, router=StaticRouter(table), models={LARGE: model}) as viaticum:
        assert viaticum.solve("What is 2 + 3?", kind="number").value == "0"  # the first of a tie
        assert model.calls == 40
        assert viaticum.ledger.check() == []


def test_samples_that_were_paid_for_decide_where_no_more_can_be(tmp_path: Path) -> None:
    model = SamplingModel(LARGE, ["The answer is 5.", "The answer is 6."] + ["The answer is 7."] * 3)
    table = RoutingTable((replace(row(LARGE, 0.7, 20_000), pair=Pair(LARGE, SAMPLED)),))
    with Viaticum("0.00018", folder=tmp_path, router=StaticRouter(table), models={LARGE: model}) as viaticum:
        got = viaticum.solve("What is 2 + 3?", kind="number")
        assert (got.value, model.calls) == ("5", 2)
        budget = viaticum.budget()
        assert budget.held_nanousd == 0
        assert budget.posted_nanousd <= 180_000


class FailingModel(ScriptedModel):
    """Fails in the middle of its first answer."""

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[str | Completion]:
        for piece in super().stream(messages, generation):
            yield piece
            if self.calls == 1:
                raise ModelError("logits are not finite")


def test_a_model_that_fails_midway_is_charged_for_what_it_wrote_and_can_be_asked_again(
    tmp_path: Path,
) -> None:
    models = {SMALL: FailingModel(SMALL, "The answer is 5."), LARGE: FailingModel(LARGE, "The answer is 6.")}
    with Viaticum(folder=tmp_path, router=StaticRouter(TABLE), models=dict(models)) as viaticum:
        with pytest.raises(ModelError):
            viaticum.solve("What is 3 + 3?", thread_id="t")
        budget, price = viaticum.budget(), viaticum.catalogue[LARGE].price
        assert price is not None
        wasted = price.cost(100, len("The "))
        assert (budget.posted_nanousd, budget.held_nanousd) == (wasted, 0)
        answer = viaticum.solve("What is 3 + 3?", thread_id="t")
        assert (answer.value, answer.routes[0].pair.model, models[LARGE].calls) == ("6", LARGE, 2)
        assert (answer.cost, answer.held) == (price.cost(100, 20) + wasted, price.cost(100, 400))
        assert viaticum.budget().posted_nanousd == answer.cost
        assert viaticum.ledger.check() == []


def test_a_call_whose_lease_ran_out_is_made_anew_and_the_old_one_stays_unknown(tmp_path: Path) -> None:
    """Killed while the model wrote, and taken up again after everyone's lease had ended."""
    run = (
        FORKING
        + """
def killed_while_writing():
    from viaticum.budgets import Ledger
    reserve = Ledger.reserve
    def last(*args, **kwargs):
        reserve(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    Ledger.reserve = last
assert code(child("t", killed_while_writing)) == -signal.SIGKILL
"""
    )
    command = [sys.executable, "-c", run, str(tmp_path), str(SUPPORT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    with Ledger(tmp_path / "ledger.db") as ledger:
        (hold,) = ledger.holds()
        assert (hold.tags, hold.state) == ({"model": LARGE, "strategy": "cot", "thread": "t"}, "dispatched")
        ledger.expire_leases(datetime(9000, 1, 1, tzinfo=UTC))
    settings = {"budget": "0.02", "budget_name": "b"}
    with client(tmp_path, "The answer is 5.", "The answer is 5.", **settings) as viaticum:  # type: ignore[arg-type]
        assert viaticum.solve("What is 2 + 3?", thread_id="t", kind="number").value == "5"
        states = {each.key: each.state for each in viaticum.ledger.holds()}
        assert states == {hold.key: "unknown", f"{hold.key}.2": "posted"}
        assert viaticum.budget().held_nanousd == hold.held_nanousd
        viaticum.ledger.void(hold.key)
        assert viaticum.ledger.check() == []


async def test_asolve(tmp_path: Path) -> None:
    with client(tmp_path, "The answer is 5.", "The answer is 6.") as viaticum:
        assert (await viaticum.asolve("What is 3 + 3?")).value == "6"


@pytest.mark.parametrize("budget", [0, -1, "nonsense"])
def test_bad_budget(tmp_path: Path, budget: object) -> None:
    with pytest.raises(InputError):
        Viaticum(budget=budget, folder=tmp_path)  # type: ignore[arg-type]


def test_policies() -> None:
    assert choose(TABLE, None, Best()).pair.model == LARGE
    assert choose(TABLE, 30_000, Best()).pair.model == SMALL
    assert choose(TABLE, None, Cheapest(0.3)).pair.model == SMALL
    assert choose(TABLE, None, Cheapest(0.9)).pair.model == LARGE
    assert choose(TABLE, None, Weighted(1e9)).pair.model == SMALL
    with pytest.raises(BudgetExceeded):
        choose(TABLE, 5, Best())
    assert parse_policy("cheapest:0.5") == Cheapest(0.5)
    for wrong in ("bset", "cheapest", "cheapest:2", "weighted:x", "best:1"):
        with pytest.raises(InputError):
            parse_policy(wrong)


# Imports once and forks a child for each run: what is killed is the run, not the imports.
FORKING = """
import os, random, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from workflow_client import client
from langgraph.checkpoint.sqlite import SqliteSaver
from viaticum.budgets import Ledger

def run(thread):
    texts = "The answer is 5.", "I cannot tell"
    with client(Path(sys.argv[1]), *texts, pause=0.005, budget="0.02", budget_name="b") as viaticum:
        return viaticum.solve("What is 2 + 3?", thread_id=thread, kind="number").value

def child(thread, before=lambda: None):
    pid = os.fork()
    if pid == 0:
        try:
            before()
            os._exit(0 if run(thread) == "5" else 1)
        finally:
            os._exit(2)
    return pid

def code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def test_cli_names_errors_in_one_line(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_DATA_HOME": str(tmp_path), "VIATICUM_CACHE": str(tmp_path / "cache")}
    for arguments, message in [
        (["solve", " "], "question is empty"),
        (["solve", "2+2?", "--budget", "-1"], "above zero"),
        (["solve", "2+2?", "--policy", "bset"], "policy"),
        (["solve", "2+2?"], "models pull"),
    ]:
        done = subprocess.run(
            [sys.executable, "-c", "from viaticum.cli import main; main()", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    shown = subprocess.run(
        [sys.executable, "-c", "from viaticum.cli import main; main()", "budget", "show", "--json"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=True,
    )
    assert all(each["posted_nanousd"] == 0 for each in json.loads(shown.stdout))
