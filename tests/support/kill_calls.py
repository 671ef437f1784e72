"""Driver of the kill tests: forks a child for each run of the workflow and kills it at a chosen moment.

    python kill_calls.py FOLDER STORE HOW WHAT

STORE is an address or "-" for files in FOLDER; HOW is solve, asolve, ainvoke (the graph itself, with
LangGraph's asynchronous checkpointer), check (solve by a plan with a check, which says no: three calls) or
nested (three questions in another graph: one as a subgraph, two by `Send`); WHAT is `steps` (before and after
each node and each write of the ledger), `writes` (each write of a checkpoint and of the ledger) or `random`.
One more process then takes all threads up again; prints their names where each gave its answer.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import operator
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.types import Send
from workflow_client import LARGE, SMALL, TABLE, ScriptedModel

from viaticum import Viaticum, build_graph
from viaticum.agents.workflow.graph import Workflow
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue
from viaticum.routers.query import Plan, PlanRow, QueryRouter, StaticRouter
from viaticum.types import Pair, Query, RoutingTable

FOLDER, STORE, HOW, WHAT = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
ADDRESS = None if STORE == "-" else STORE
QUESTION = "What is 2 + 3?"
CATALOGUE = Catalogue.load()
JUDGE = "smollm2-135m"
NODES = ("start", "route", "call", "parse")  # start calls route
WRITES = ("reserve", "dispatch", "settle")
FUSES = 1000


class Checking(QueryRouter):
    """Ask the small model, check, ask the large one."""

    def table(self, query: Query) -> RoutingTable:
        return TABLE

    def plans_for(self, query: Query) -> list[PlanRow]:
        pairs = Pair(SMALL, "cot"), Pair(JUDGE, "verify"), Pair(LARGE, "cot")
        return [PlanRow(Plan(pairs, 1), 0.9, 30_000, 60_000)]


def settings() -> dict[str, Any]:
    """The large model's answer cannot be parsed, so the small one is called too: two calls per question."""
    pause = 0.005 if WHAT == "random" else 0.0
    models = {
        SMALL: ScriptedModel(SMALL, "The answer is 5.", pause),
        LARGE: ScriptedModel(LARGE, "Who knows", pause),
    }
    router: QueryRouter = StaticRouter(TABLE)
    if HOW == "check":
        router = Checking()
        texts = {SMALL: "The answer is 4.", JUDGE: "No, it is 5.\nWRONG", LARGE: "The answer is 5."}
        models = {name: ScriptedModel(name, text, pause) for name, text in texts.items()}
    return {
        "budget": "0.02",
        "budget_name": "b",
        "folder": FOLDER,
        "store": ADDRESS,
        "models": models,
        "router": router,
        "catalogue": CATALOGUE,
        "concurrency": 2,
    }


def run(threads: Sequence[str]) -> list[str | None]:
    """The answers of these threads, one after the other in this process."""
    if HOW == "ainvoke":
        return asyncio.run(invoke(threads))
    if HOW == "nested":
        return nested(threads)
    with Viaticum(**settings()) as viaticum:
        if HOW == "asolve":
            return asyncio.run(asolve(viaticum, threads))
        return [viaticum.solve(QUESTION, kind="number", thread_id=thread).value for thread in threads]


async def asolve(viaticum: Viaticum, threads: Sequence[str]) -> list[str | None]:
    return [(await viaticum.asolve(QUESTION, kind="number", thread_id=thread)).value for thread in threads]


class Outer(TypedDict, total=False):
    question: str
    value: str
    found: Annotated[list[str], operator.add]


def nested(threads: Sequence[str]) -> list[str | None]:
    """Of each thread the answer to all three questions, where it is the same."""
    answering = build_graph(**settings() | {"router": StaticRouter(TABLE.without(Pair(LARGE, "cot")))})

    def ask(state: Outer) -> Outer:
        return {"found": [answering.invoke({"question": state["question"], "kind": "number"})["value"]]}

    builder = StateGraph(Outer)
    builder.add_node("first", answering)
    builder.add_node("ask", ask)
    builder.add_edge(START, "first")
    builder.add_conditional_edges(
        "first", lambda state: [Send("ask", {"question": f"{n} + 5?"}) for n in (1, 2)], ["ask"]
    )
    with SqliteSaver.from_conn_string(str(FOLDER / "own-checkpoints.db")) as saver:
        graph = builder.compile(checkpointer=saver)
        answers: list[str | None] = []
        for thread in threads:
            config: Any = {"configurable": {"thread_id": thread}}
            seen = graph.get_state(config)
            if not seen.values or seen.tasks:
                graph.invoke(None if seen.values else {"question": QUESTION}, config, durability="sync")
            values = graph.get_state(config).values
            answers.append(values["value"] if values["found"] == [values["value"]] * 2 else None)
        return answers


async def invoke(threads: Sequence[str]) -> list[str | None]:
    async with AsyncExitStack() as opened:
        if ADDRESS is not None:
            from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver

            saver: Any = await opened.enter_async_context(AsyncPostgresSaver.from_conn_string(ADDRESS))
            await saver.setup()
        else:
            file = str(FOLDER / "own-checkpoints.db")
            saver = await opened.enter_async_context(AsyncSqliteSaver.from_conn_string(file))
        graph = build_graph(**settings(), checkpointer=saver)
        answers: list[str | None] = []
        for thread in threads:
            config: Any = {"configurable": {"thread_id": thread}}
            seen = await graph.aget_state(config)
            start: Any = None if seen.values else {"question": QUESTION, "kind": "number"}
            if not seen.values or seen.tasks:
                await graph.ainvoke(start, config, durability="sync")
            answers.append((await graph.aget_state(config)).values["value"])
        return answers


def child(threads: Sequence[str], before: Callable[[], None] = lambda: None) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            before()
            os._exit(0 if run(threads) == ["5"] * len(threads) else 1)
        finally:
            import traceback

            traceback.print_exc()
            os._exit(2)
    return pid


def code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(moment: int) -> None:
    """Count the moments before and after each step; kill the process at the given one."""
    # LangGraph writes from several threads; nothing may be written between a write and the kill.
    gate = threading.RLock()

    def pass_by() -> None:
        nonlocal moment
        if moment == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        moment -= 1

    def count(kind: type, name: str) -> None:
        method = getattr(kind, name)

        @functools.wraps(method)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with gate:
                pass_by()
                result = method(*args, **kwargs)
                pass_by()
                return result

        @functools.wraps(method)
        async def acounted(*args: Any, **kwargs: Any) -> Any:
            pass_by()
            result = await method(*args, **kwargs)
            pass_by()
            return result

        setattr(kind, name, acounted if inspect.iscoroutinefunction(method) else counted)

    for name in WRITES:
        count(Ledger, name)
    if WHAT == "steps":
        for name in NODES:
            count(Workflow, name)
        return
    for kind, names in ((SqliteSaver, ("put", "put_writes")), (AsyncSqliteSaver, ("aput", "aput_writes"))):
        for name in names:
            count(kind, name)


def killed_at_every_moment() -> Iterator[str]:
    for moment in range(FUSES):
        thread = f"w{moment}"
        ended = code(child([thread], functools.partial(die_at, moment)))
        if ended == 0:
            return  # past the last one
        assert ended == -signal.SIGKILL, (thread, ended)
        yield thread


def killed_at_random() -> Iterator[str]:
    began = time.monotonic()
    assert code(child(["warm"])) == 0
    whole = time.monotonic() - began
    rng = random.Random(7)
    for number in range(25):
        thread = f"t{number}"
        while True:  # until the kill came before the end of the run
            pid = child([thread])
            time.sleep(rng.random() * whole)
            os.kill(pid, signal.SIGKILL)
            if code(pid) == -signal.SIGKILL:
                break
            thread += "again"
            whole *= 0.8  # the run that was timed took longer than others
        yield thread


if __name__ == "__main__":
    killed = list(killed_at_random() if WHAT == "random" else killed_at_every_moment())
    assert code(child(killed)) == 0  # one process takes all of them up again
    print(*killed)
