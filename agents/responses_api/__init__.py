"""OpenAI's Responses API as data: requests, responses, events, the store of conversations. No HTTP server."""
