"""OpenAI's chat completions API as data: requests, responses, errors and their OpenAPI schema. No HTTP server."""
