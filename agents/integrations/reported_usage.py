"""The tokens that a provider reports with an answer of a LangChain model.

Leaves out what is posted where it reports none (`viaticum.agents.integrations.middleware`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.messages import AIMessage

from viaticum.types import TokenCount


def is_cached(answer: AIMessage) -> bool:
    """Whether an answer is from LangChain's own cache, which says so by a cost of zero."""
    usage: Mapping[str, Any] = answer.usage_metadata or {}
    return usage.get("total_cost") == 0


def reported_count(answer: AIMessage) -> TokenCount | None:
    """The tokens that the provider reports with an answer; None for none, or impossible ones.

    A provider that reports none at all for a prompt, or for an answer that is there, counted nothing.
    """
    usage: Mapping[str, Any] = answer.usage_metadata or {}
    read, written = usage.get("input_tokens", 0), usage.get("output_tokens", 0)
    has_content = bool(answer.content or answer.tool_calls or answer.invalid_tool_calls)
    if read <= 0 or written < 0 or (has_content and written == 0):
        return None
    details: Mapping[str, Any] = usage.get("input_token_details") or {}
    cached = min(max(0, details.get("cache_read") or 0), read)
    # Anthropic's are told by how long they are kept, and then are not in the sum.
    kept = [
        value for name, value in details.items() if name == "cache_creation" or name.startswith("ephemeral_")
    ]
    cache_written = min(sum(max(0, each or 0) for each in kept), read - cached)
    reasoning = (usage.get("output_token_details") or {}).get("reasoning") or 0
    reasoning = min(max(0, reasoning), written)
    return TokenCount(read, written, cached, reasoning, cache_write_tokens=cache_written)
