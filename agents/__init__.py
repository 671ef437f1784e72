"""The workflow graph and what is built on it: the SDK, integrations, the OpenAI API, the server, batches.

Only this package imports langgraph. Import its modules by name; nothing loads here.
"""
