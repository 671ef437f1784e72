"""OpenAI's chat completions API as data: requests, responses, errors, OpenAPI document. No HTTP server."""
