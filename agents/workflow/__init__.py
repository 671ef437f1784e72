"""The LangGraph workflow: route, reserve, generate, settle, parse, approve; with checkpoints."""
