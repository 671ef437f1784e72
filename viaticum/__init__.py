"""Viaticum: an allowance for every question.

The public names load on first use, so that `import viaticum` stays cheap: no torch, no network, no key.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from viaticum.agents.build import build_graph
    from viaticum.agents.client import Viaticum
    from viaticum.agents.instrumentation.scope import budget
    from viaticum.agents.instrumentation.tools import priced
    from viaticum.agents.integrations.chat_model import ChatViaticum
    from viaticum.agents.integrations.tool import as_tool
    from viaticum.agents.workflow.state import Allowance
    from viaticum.budgets.tagging import tagged
    from viaticum.errors import BudgetExceeded, DecisionNeeded, Draining, InputError, ViaticumError
    from viaticum.models.scripted import ScriptedModel
    from viaticum.routers.query.fake import FakeRouter
    from viaticum.types import Answer, Completion, Outcome, Pair, Query, Route, RoutingTable, Usage

__version__ = "0.1.0"

_HOME = {
    "ChatViaticum": "viaticum.agents.integrations.chat_model",
    "Viaticum": "viaticum.agents.client",
    "Allowance": "viaticum.agents.workflow.state",
    "budget": "viaticum.agents.instrumentation.scope",
    "as_tool": "viaticum.agents.integrations.tool",
    "build_graph": "viaticum.agents.build",
    "priced": "viaticum.agents.instrumentation.tools",
    "tagged": "viaticum.budgets.tagging",
    "FakeRouter": "viaticum.routers.query.fake",
    "ScriptedModel": "viaticum.models.scripted",
    "BudgetExceeded": "viaticum.errors",
    "DecisionNeeded": "viaticum.errors",
    "Draining": "viaticum.errors",
    "InputError": "viaticum.errors",
    "ViaticumError": "viaticum.errors",
    "Answer": "viaticum.types",
    "Completion": "viaticum.types",
    "Outcome": "viaticum.types",
    "Pair": "viaticum.types",
    "Query": "viaticum.types",
    "Route": "viaticum.types",
    "RoutingTable": "viaticum.types",
    "Usage": "viaticum.types",
}

__all__ = [
    "Allowance",
    "Answer",
    "BudgetExceeded",
    "ChatViaticum",
    "Completion",
    "DecisionNeeded",
    "Draining",
    "FakeRouter",
    "InputError",
    "Outcome",
    "Pair",
    "Query",
    "Route",
    "RoutingTable",
    "ScriptedModel",
    "Usage",
    "Viaticum",
    "ViaticumError",
    "__version__",
    "as_tool",
    "budget",
    "build_graph",
    "priced",
    "tagged",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'viaticum' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
