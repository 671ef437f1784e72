"""`viaticum serve`: OpenAI's API over HTTP, with keys, admission control and metrics."""
