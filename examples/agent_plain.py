"""A small ReAct agent in LangGraph, offline: agent_plain.py on one model, agent_budget.py within a budget."""

from __future__ import annotations

from _offline import QUESTIONS, act, after_thinking, expensive
from langgraph.graph import START, MessagesState, StateGraph

from viaticum.money import format_usd

builder = StateGraph(MessagesState)
builder.add_node("think", lambda state: {"messages": [expensive.invoke(state["messages"])]})
builder.add_node("act", act)
builder.add_edge(START, "think")
builder.add_conditional_edges("think", after_thinking)
builder.add_edge("act", "think")
agent = builder.compile()

for question in QUESTIONS:
    messages = agent.invoke({"messages": [("user", question)]})["messages"]
    print(f"{question} {messages[-1].content}")
print(f"cost: {format_usd(expensive.spent)}")
