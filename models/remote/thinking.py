"""How a provider learns how long to think: parameters of `litellm.completion` by provider.

A budget in tokens goes to providers that take one (Anthropic, Gemini, OpenRouter); others take an effort.
Leaves out how thoughts are found in a reply (`viaticum.thinking`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from viaticum.models.base import Generation

_NO_SAMPLING: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
LEAST_ANTHROPIC = 1024  # tokens; Anthropic's API refuses smaller budgets
# Effort by budget: up to so many tokens, as LiteLLM translates efforts back into budgets.
EFFORTS = ((1024, "low"), (4096, "medium"))
# Efforts for a budget of 0, by model: the least that it knows. gpt-5.1 and later know "none".
_LEAST_EFFORT = ((r"\bo\d(-|$)", "low"), (r"\bgpt-5(?![.\d])", "minimal"), (r"gpt-oss", "low"))


# Providers whose API says how long to think, at whatever address it is served.
_OWN_APIS = ("anthropic", "azure", "azure_ai", "bedrock", "gemini", "openrouter", "vertex_ai")


def has_own_api(litellm_model: str) -> bool:
    """Whether LiteLLM speaks a provider's own API for this model, also at another address (a gateway)."""
    return litellm_model.partition("/")[0] in _OWN_APIS


def thinking_parameters(litellm_model: str, generation: Generation, *, own_server: bool) -> dict[str, Any]:
    """The parameters that say how long to think; None stands for a parameter to leave out.

    An effort that was set wins over the budget. Without either nothing is said, and the model thinks as it
    likes within max_new_tokens.

    Args:
        litellm_model: the model's name for LiteLLM; its first part names the provider.
        own_server: the model is served at an address of its own, as by vLLM or SGLang.
    """
    effort, budget = generation.reasoning_effort, generation.thinking_budget
    if effort is not None:
        # LiteLLM makes it a budget for Claude, which takes no sampling settings beside one.
        alone = _NO_SAMPLING if "claude" in litellm_model and effort != "none" else {}
        return {"reasoning_effort": effort, **alone}
    if budget is None:
        return {}
    if own_server:
        # No parameter is understood by all servers; templates that can switch thinking off know this one.
        return {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}} if budget == 0 else {}
    provider = litellm_model.partition("/")[0]
    if provider == "openrouter":
        return {"extra_body": {"reasoning": {"max_tokens": budget} if budget else {"enabled": False}}}
    if "claude" in litellm_model:
        return _anthropic(budget, generation)
    if "gemini" in litellm_model:
        return {"thinking": {"type": "enabled", "budget_tokens": budget}}
    return {"reasoning_effort": _effort(litellm_model, budget)}


def with_thinking(
    request: Mapping[str, Any], generation: Generation, supported: Collection[str], *, own_server: bool
) -> dict[str, Any]:
    """The arguments of `litellm.completion` and those that say how long to think.

    A budget is left out where LiteLLM knows that the model takes no such parameter; an effort that was set is
    sent anyway, so that the provider's refusal is seen. What `request` says of its extra body stays. Nothing
    is said in a chain of tool calls of Claude, which wants the signed thought before the calls back, while no
    thought is sent again.

    Args:
        request: the arguments so far.
        supported: parameters that the model takes, by LiteLLM.
    """
    if "claude" in request["model"] and _is_in_tool_chain(request.get("messages", ())):
        return dict(request)
    parameters = thinking_parameters(request["model"], generation, own_server=own_server)
    if generation.reasoning_effort is None and not own_server:
        unknown = {"thinking", "reasoning_effort"} & set(parameters) - set(supported)
        parameters = {} if unknown else parameters
    body = _merged(parameters.pop("extra_body", {}), request.get("extra_body", {}))
    merged = {**request, **parameters, **({"extra_body": body} if body else {})}
    return {name: value for name, value in merged.items() if value is not None or name not in parameters}


def _is_in_tool_chain(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the assistant's last turn calls tools."""
    turns = [message for message in messages if message["role"] == "assistant"]
    return bool(turns) and bool(turns[-1].get("tool_calls"))


def _merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Two bodies as one, table by table; `high` wins."""
    both = {
        name: _merged(low[name], high[name])
        for name in low.keys() & high.keys()
        if isinstance(low[name], Mapping) and isinstance(high[name], Mapping)
    }
    return {**low, **high, **both}


def _anthropic(budget: int, generation: Generation) -> dict[str, Any]:
    """Anthropic takes budgets below max_tokens, and no sampling settings beside them."""
    tokens = min(max(budget, LEAST_ANTHROPIC), generation.max_new_tokens - 1)
    if budget == 0 or tokens < LEAST_ANTHROPIC:
        return {"thinking": {"type": "disabled"}}
    thinking = {"type": "enabled", "budget_tokens": tokens}
    return {"thinking": thinking, **_NO_SAMPLING}


def _effort(litellm_model: str, budget: int) -> str:
    if budget == 0:
        return next((effort for name, effort in _LEAST_EFFORT if re.search(name, litellm_model)), "none")
    return next((effort for most, effort in EFFORTS if budget <= most), "high")
