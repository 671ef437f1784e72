"""The graph that examples/langgraph.json names: LangGraph's own tools serve it, and bring the checkpoints."""

from __future__ import annotations

from viaticum import build_graph

graph = build_graph("0.05", budget_name="langgraph-dev")
