"""An agent with a deadline whose person decides, for a process of its own: `python asked_agent.py FOLDER DO`.

FOLDER has the checkpoints and the ledger. DO is "begin", "go on", or a decision as JSON. With MONEY in the
environment the budget is that many dollars. With DIE the process ends without a word in a call of that model.
Prints one JSON object: the question, or the last words, and the calls of each model in this
process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from fake_chat import Fake, call, says
from langchain.agents import create_agent
from langchain_core.outputs import ChatResult
from langchain_core.tools import tool
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command

from viaticum.agents.integrations.middleware import BudgetMiddleware

PRICES = {"worker": (10, 20), "small": (1, 2)}
SECONDS = 2.0


@tool
def nap() -> str:
    """Take longer than a run may."""
    time.sleep(SECONDS + 0.2)
    return "rested"


class Mortal(Fake):
    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        if os.environ.get("DIE") == self.model:
            time.sleep(0.5)  # LangGraph writes what the person answered beside the step
            os._exit(9)
        return super()._generate(*args, **kwargs)


def main(folder: Path, do: str) -> None:
    begins = do == "begin"
    steps = [says("tired", call(1, "nap"))] if begins else []
    again = [says("again", call(2, "nap")), says("done")] if "TWICE" in os.environ else [says("done")]
    worker = Mortal(model="worker", messages=iter([*steps, *again]), settings=[])
    small = Mortal(model="small", messages=iter([says("by the small one")]), settings=[])
    budget = BudgetMiddleware(
        os.environ.get("MONEY", "1"),
        prices=PRICES,
        ledger=folder / "ledger.db",
        budget_name="agent",
        max_tokens=100,
        on_cap="ask",
        cheaper=[small],
        max_seconds=None if "MONEY" in os.environ else SECONDS,
    )
    given: Any = {"messages": [("user", "go")]} if begins else None
    if not begins and do != "go on":
        given = Command(resume=json.loads(do))
    with SqliteSaver.from_conn_string(str(folder / "checkpoints.db")) as saver:
        agent = create_agent(worker, [nap], middleware=[budget], checkpointer=saver)
        config: Any = {"configurable": {"thread_id": "t"}}
        out = agent.invoke(given, config, durability="sync")
    asked = [each.value for each in out.get("__interrupt__", ())]
    said = out["messages"][-1].text
    calls = {"worker": len(worker.settings), "small": len(small.settings)}
    held = budget.left().held_nanousd
    print(json.dumps({"asked": asked, "words": said, "calls": calls, "held": held}))
    budget.ledger.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
