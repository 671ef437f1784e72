"""A small ReAct agent in LangGraph, offline: agent_plain.py on one model, agent_budget.py within a budget."""

from __future__ import annotations

from _offline import MODELS, QUESTIONS, act, after_thinking, router
from langgraph.graph import START, MessagesState, StateGraph

from viaticum import build_graph
from viaticum.budgets import Ledger
from viaticum.money import format_usd

ledger = Ledger("memory:")
answer = build_graph("0.01", budget_name="agent", models=MODELS, router=router, ledger=ledger)
builder = StateGraph(MessagesState)
builder.add_node("think", answer)
builder.add_node("act", act)
builder.add_edge(START, "think")
builder.add_conditional_edges("think", after_thinking)
builder.add_edge("act", "think")
agent = builder.compile()

for question in QUESTIONS:
    messages = agent.invoke({"messages": [("user", question)]})["messages"]
    print(f"{question} {messages[-1].content}")
print(f"cost: {format_usd(ledger.budget('agent').posted_nanousd)}")
