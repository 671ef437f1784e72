"""Anthropic's messages API as data: requests, responses, events, errors. No HTTP server."""
