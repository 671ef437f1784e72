"""Viaticum inside other frameworks: LangChain chat model, middleware and tool, LiteLLM provider."""
