"""Putting the parts together: models that answer, the workflow, the SDK, profiling.

Only this package imports langgraph and litellm. Import its modules by name; nothing loads here.
"""
