"""Models behind an API, called through LiteLLM."""
