"""The workflow as a LangChain tool, for agents that answer some questions by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.tools import BaseTool, StructuredTool

from viaticum.agents.workflow.graph import Graph
from viaticum.agents.workflow.state import Allowance


def as_tool(
    graph: Graph,
    *,
    name: str = "solve",
    description: str = (
        "Answers a question that needs careful reasoning or calculation. Ask one whole question."
    ),
    context: Allowance | None = None,
) -> BaseTool:
    """The graph as a LangChain tool: it takes `question` and returns the answer, or why there is none."""

    def solve(question: str) -> str:
        return _answer_text(graph.invoke({"question": question}, context=context))

    async def asolve(question: str) -> str:
        return _answer_text(await graph.ainvoke({"question": question}, context=context))

    return StructuredTool.from_function(solve, coroutine=asolve, name=name, description=description)


def _answer_text(answer: Mapping[str, Any]) -> str:
    value = answer.get("value")
    return str(value) if value is not None else f"no answer: {answer.get('reason', '')}"
