"""A ReAct agent on sixty tasks in four ways: always small, always large, routed per run, and per step.

    python examples/agent/compare.py                              # scripted models, some seconds
    python examples/agent/compare.py --models local --limit 6     # the local pair, some minutes
    python examples/agent/compare.py --models local --journal runs.jsonl

The last one takes some ten minutes on two cores and goes on after a kill. Every answer is checked by a
program. The router predicts from the runs of both models on other tasks. Each way has a budget of its own in
one ledger. Figures of scripted models are arithmetic of money: what models of the stated abilities and prices
would cost, and no result about real ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from agent_tools import make_tools
from harbour import SEED, Harbour
from langchain.agents import create_agent
from langchain.agents.middleware import ModelCallLimitMiddleware
from langchain_core.messages import AIMessage
from neighbours import NeighbourRouter, Outcome
from scripted_agents import ABILITIES, ScriptedAgent
from task_set import Task, make_tasks
from text_tools import TextTools

from viaticum import ChatViaticum, FakeRouter, Viaticum
from viaticum.agents.integrations.router_middleware import RouterMiddleware
from viaticum.errors import BudgetExceeded, DataError
from viaticum.files import atomic_write
from viaticum.money import as_usd, format_usd
from viaticum.reports.intervals import Estimate, mean, share
from viaticum.strategies.sandbox import open_sandbox

WAYS = ("always small", "always large", "per run", "per step")
LOCAL = {"small": "qwen2.5-coder-0.5b", "large": "qwen2.5-coder-1.5b"}
MOST_CALLS, MOST_TOKENS = 6, 160  # of a run, and of a call
SYSTEM = "You answer questions about a harbour. Use tools; do not guess."


@dataclass(frozen=True)
class Run:
    """One task in one way. cost: nano-dollars that its budget was charged; tokens: written."""

    way: str
    task: str
    solved: bool
    cost: int
    steps: int
    switches: int
    tokens: int
    models: list[str]
    answer: str
    seconds: float


class Journal:
    """Runs that were made, in a JSONL file; a line that a kill cut off is left out.

    Raises `DataError` for a file of other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.runs = path, list[Run]()
        if path is not None and path.is_file():
            kept = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            if kept and json.loads(kept[0]) != settings:
                raise DataError(f"{path} was written with other settings: {kept[0].strip()}")
            self.runs = [Run(**json.loads(line)) for line in kept[1:]]
            atomic_write(path, "".join(kept))  # without a line that was cut
        if path is not None and not self.runs:
            path.write_text(json.dumps(settings) + "\n")

    def add(self, run: Run) -> None:
        self.runs.append(run)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(run)) + "\n")


class Comparison:
    """The four ways over some tasks.

    Args:
        client: whose models answer, and whose ledger holds the budget of each way.
        names: of the small and the large model.
        tools: of the agent.
        budget: nano-dollars of a way.
        policy: of the routed ways.
    """

    def __init__(
        self, client: Viaticum, names: Mapping[str, str], tools: Sequence[Any], *, budget: int, policy: str
    ) -> None:
        self.client, self.names, self.tools, self.policy = client, names, tools, policy
        for way in WAYS:
            client.ledger.create(way, limit_nanousd=budget, parent=client.budget_name)

    def run(self, tasks: Sequence[Task], journal: Journal) -> None:
        """Run what the journal does not have."""
        for way in WAYS:
            done = {run.task for run in journal.runs if run.way == way}
            agent = self._agent(way, tasks, journal.runs)
            for task in tasks:
                if task.id not in done:
                    journal.add(self._run(agent, way, task))

    def _agent(self, way: str, tasks: Sequence[Task], runs: Sequence[Run]) -> Any:
        client = self.client.derive(budget=way)
        chats = {
            name: TextTools(
                chat=ChatViaticum(model=name, client=client, max_tokens=MOST_TOKENS, temperature=0),
                model_name=name,
            )
            for name in self.names.values()
        }
        calls = ModelCallLimitMiddleware(run_limit=MOST_CALLS, exit_behavior="end")
        if way in WAYS[:2]:
            return create_agent(
                chats[self.names[way.removeprefix("always ")]],
                self.tools,
                system_prompt=SYSTEM,
                middleware=[calls],
            )
        routed = RouterMiddleware(
            chats,
            NeighbourRouter(self._outcomes(tasks, runs)),
            policy=self.policy,
            per="step" if way == "per step" else "run",
            prices=self.client.catalogue,
        )
        return create_agent(
            next(iter(chats.values())), self.tools, system_prompt=SYSTEM, middleware=[calls, routed]
        )

    def _outcomes(self, tasks: Sequence[Task], runs: Sequence[Run]) -> list[Outcome]:
        questions = {task.id: task.question for task in tasks}
        return [
            Outcome(questions[run.task], run.models[0], run.solved, run.cost, run.tokens, run.steps)
            for run in runs
            if run.way in WAYS[:2] and run.models and run.task in questions
        ]

    def _run(self, agent: Any, way: str, task: Task) -> Run:
        before, began = self.client.ledger.budget(way).posted_nanousd, time.perf_counter()
        try:
            messages = agent.invoke({"messages": [{"role": "user", "content": task.question}]})["messages"]
        except BudgetExceeded:  # what the run did until then is lost, and paid
            messages = []
        said = [each for each in messages if isinstance(each, AIMessage) and each.usage_metadata]
        models = [str(each.response_metadata["model_name"]) for each in said]
        # A run that its limit ended has a message about that, which is no answer.
        answer = said[-1].text if said and not said[-1].tool_calls else ""
        run = Run(
            way,
            task.id,
            task.is_solved(answer),
            self.client.ledger.budget(way).posted_nanousd - before,
            len(said),
            sum(first != second for first, second in itertools.pairwise(models)),
            sum(each.usage_metadata["output_tokens"] for each in said if each.usage_metadata),
            models,
            answer if messages else "out of money",
            round(time.perf_counter() - began, 1),
        )
        sys.stderr.write(
            f"{way}, {task.id} {task.family}: {'solved' if run.solved else 'not solved'}, {run.steps}\n"
        )
        return run


def report(tasks: Sequence[Task], runs: Sequence[Run]) -> list[str]:
    """Lines with what each way solved and cost, and its paired differences to the large model."""
    by = {way: {run.task: run for run in runs if run.way == way} for way in WAYS}
    ids = [task.id for task in tasks if all(task.id in by[way] for way in WAYS)]
    lines = [f"{len(ids)} tasks; intervals of 95%, differences paired by task", ""]
    lines.append(f"{'':14}{'solved':>24}{'$ a task':>34}{'calls':>7}{'switches':>10}")
    large = [by["always large"][each] for each in ids]
    for way in WAYS:
        own = [by[way][each] for each in ids]
        solved = share(sum(run.solved for run in own), len(own))
        if solved is None:
            return [*lines, "no task was run in all four ways"]
        shown = f"{solved.count}/{solved.of} [{solved.low:.0%}, {solved.high:.0%}]"
        cost = _interval([float(as_usd(run.cost)) for run in own], "{:.6f}")
        lines.append(
            f"{way:14}{shown:>24}{cost:>34}{sum(run.steps for run in own):>7}"
            f"{sum(run.switches for run in own):>10}"
        )
    lines += ["", f"{'minus always large':24}{'solved':>28}{'$ a task':>38}"]
    for way in (each for each in WAYS if each != "always large"):
        own = [by[way][each] for each in ids]
        pairs = list(zip(own, large, strict=True))
        solved_more = _interval([100.0 * (a.solved - b.solved) for a, b in pairs], "{:+.0f}")
        cost_more = _interval([float(as_usd(a.cost) - as_usd(b.cost)) for a, b in pairs], "{:+.6f}")
        lines.append(f"{way:24}{solved_more + ' points':>28}{cost_more:>38}")
    return lines


def _interval(values: Sequence[float], form: str) -> str:
    found: Estimate | None = mean(np.array(values))
    assert found is not None, "there are tasks"
    return f"{form.format(found.value)} [{form.format(found.low)}, {form.format(found.high)}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", choices=("scripted", "local"), default="scripted")
    parser.add_argument("--limit", type=int, default=60, help="tasks; the first ten are one of each family")
    parser.add_argument("--journal", type=Path, help="a file of the runs made; its ledger stands beside it")
    parser.add_argument("--budget", default="1", help="dollars of each way")
    parser.add_argument("--policy", default="within:0.15", help="of the routed ways")
    parser.add_argument("--seed", type=int, default=0, help="of the scripted models")
    options = parser.parse_args(arguments)
    settings = {name: str(getattr(options, name)) for name in ("models", "limit", "budget", "policy", "seed")}
    world = Harbour.make(SEED)
    everything = make_tasks(world)
    tasks = everything[: max(1, options.limit)]
    names = LOCAL if options.models == "local" else {name: name for name in ABILITIES}
    scripted = {
        name: ScriptedAgent(name, ability, everything, options.seed) for name, ability in ABILITIES.items()
    }
    with ExitStack() as opened:
        journal = Journal(options.journal, settings)
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="harbour-")))
        kept = folder if options.journal is None else options.journal.with_suffix(".ledger")
        kept.mkdir(parents=True, exist_ok=True)
        world.write(folder)
        client = opened.enter_context(
            Viaticum(
                budget=4 * float(options.budget),
                budget_name="comparison",
                folder=kept,
                models=scripted if options.models == "scripted" else None,
                router=FakeRouter(*(f"{name}+chat" for name in names.values())),
            )
        )
        tools = make_tools(folder, opened.enter_context(open_sandbox()))
        budget = client.budget().limit_nanousd or 0
        comparison = Comparison(client, names, tools, budget=budget // 4, policy=options.policy)
        comparison.run(tasks, journal)
        print(f"Models: {options.models}; policy of the routed ways {options.policy}\n")
        if options.models == "scripted":
            print("Scripted models: this is arithmetic of money, no result about real models.")
            for name, ability in ABILITIES.items():
                print(f"- {name}: {ability}")
            print()
        print("\n".join(report(tasks, journal.runs)))
        print("\nledger, with what killed runs cost:")
        for way in WAYS:
            state = client.ledger.budget(way)
            print(f"  {way:14} {format_usd(state.posted_nanousd)} of {format_usd(state.limit_nanousd or 0)}")


if __name__ == "__main__":
    main()
