"""The LangGraph workflow: route, reserve, generate, settle, read, check; with checkpoints."""
