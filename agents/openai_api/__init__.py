"""OpenAI's API as data: requests, responses, errors, and what the server asks of an API. No HTTP server."""
