"""The request of a remote model: the arguments that LiteLLM is called with.

Leaves out the call itself and its tries (`models.remote.model`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from viaticum.catalogue import ModelSpec
from viaticum.errors import InputError, MissingExtra
from viaticum.models.api_keys import api_key
from viaticum.models.base import Generation
from viaticum.models.remote.prices import check_cache_writes
from viaticum.models.remote.thinking import has_own_api, with_thinking
from viaticum.types import Message

TIMEOUT = 60.0  # seconds
ACCOUNT = {
    "OpenAI-Organization": ("OPENAI_ORGANIZATION", "OPENAI_ORG_ID"),
    "OpenAI-Project": ("OPENAI_PROJECT_ID",),
}
EXTRA = {
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "logprobs",
    "top_logprobs",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "reasoning_effort",
    "service_tier",
    "verbosity",
    "user",
}
TIERS = ("auto", "default", "flex")  # that cost no more than the price of the catalogue


def load_litellm() -> Any:
    """Import LiteLLM, and on its first import switch off its network access and its output.

    Raises:
        MissingExtra: LiteLLM is not installed.
    """
    first = "litellm" not in sys.modules
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    try:
        import litellm
    except ImportError as error:
        raise MissingExtra(error.name or "litellm", "remote") from None
    if first:  # a program that uses LiteLLM itself keeps its own settings
        litellm.suppress_debug_info = True
        litellm.telemetry = False
        litellm.disable_aiohttp_transport = True  # one HTTP client, whose errors have one meaning
        litellm.disable_streaming_logging = True  # a thread and an event loop for every chunk
    return litellm


class RequestBuilder:
    """Builds the requests of one catalogue entry.

    Args:
        spec: the entry.
        key: API key; by default the one in the environment variable that the entry names.
    """

    def __init__(self, spec: ModelSpec, key: str | None = None) -> None:
        self.spec, self._key = spec, key

    def build(self, messages: Sequence[Message], generation: Generation) -> dict[str, Any]:
        """Return the arguments of `litellm.acompletion`.

        Raises:
            InputError: `generation.extra` has a parameter that is not passed on.
        """
        if unknown := sorted(set(generation.extra) - EXTRA):
            raise InputError(
                f"{self.spec.name} is not asked for {', '.join(unknown)}; known: {', '.join(sorted(EXTRA))}"
            )
        self.check_price(messages, generation)
        spec = self.spec
        if spec.tools is False and generation.extra.get("tools"):
            raise InputError(f"{self.spec.name} cannot call tools, as its entry in the catalogue says")
        form = generation.extra.get("response_format")
        if spec.json_schema is False and isinstance(form, dict) and form.get("type") == "json_schema":
            raise InputError(f"{spec.name} answers by no JSON schema, as its entry in the catalogue says")
        request: dict[str, Any] = {
            "model": spec.litellm_model,
            "messages": [_sent(message) for message in messages],
            "max_tokens": generation.max_new_tokens,
            "timeout": spec.timeout_seconds or TIMEOUT,
            "num_retries": 0,
            "max_retries": 0,
            "drop_params": False,
            **self._sampling(generation),
            **generation.extra,
        }
        if request.get("service_tier") != "flex" and "service_tier" not in self._supported_parameters:
            request.pop("service_tier", None)  # it has the default tier alone
        if body := _body(generation):
            request["extra_body"] = body
        if generation.stop and not self.cuts_stops:
            request["stop"] = list(generation.stop)
        if generation.extra.get("tools"):
            # Else LiteLLM imports its gateway, which needs packages of its own.
            request["_skip_mcp_handler"] = True
        if spec.streams is not False:
            request |= {"stream": True, "stream_options": {"include_usage": True}}
        if spec.api_base is not None:
            # A server without a key of its own gets none: the user's key for OpenAI is not meant for it.
            request |= {"api_base": spec.api_base, "api_key": self._key or api_key(spec) or "none"}
        elif (key := self._key or api_key(spec)) is not None:
            request["api_key"] = key
        if headers := _without_account(spec):
            request["extra_headers"] = headers | dict(request.get("extra_headers") or {})
        own_server = spec.api_base is not None and not has_own_api(spec.litellm_model or "")
        return with_thinking(request, generation, self._supported_parameters, own_server=own_server)

    def check_price(self, messages: Sequence[Message], generation: Generation) -> None:
        """Check that the entry's price covers the call. Raises `InputError` for what makes it dearer."""
        tier = generation.extra.get("service_tier")
        if tier is not None and tier not in TIERS:
            raise InputError(
                f"service_tier {tier!r} may cost more than the price of {self.spec.name}; "
                f"use {', '.join(TIERS)}"
            )
        marked = [message["parts"] for message in messages if "parts" in message]
        check_cache_writes([marked, generation.extra, generation.extra_body], self.spec.price, self.spec.name)

    @property
    def cuts_stops(self) -> bool:
        """Whether stop strings are cut here.

        A provider may stop inside a thought, and some models, such as gpt-5, take no stop strings.
        """
        supported = self._supported_parameters
        return self.spec.thinking_format.thinks or (bool(supported) and "stop" not in supported)

    @cached_property
    def _supported_parameters(self) -> list[str]:
        return load_litellm().get_supported_openai_params(self.spec.litellm_model) or []

    def _sampling(self, generation: Generation) -> dict[str, Any]:
        """The sampling parameters that this provider supports."""
        parameters: dict[str, Any] = {
            "temperature": generation.temperature if generation.temperature or self._takes_greedy else None,
            "top_p": generation.top_p if generation.top_p < 1 else None,
            "top_k": generation.top_k or None,
            "seed": generation.seed,
        }
        supported = {*self._supported_parameters, "top_k"} - set(self.spec.omit)
        taken = {name: value for name, value in parameters.items() if value is not None and name in supported}
        changes = {  # refused by name where the provider does not support them
            "frequency_penalty": generation.frequency_penalty,
            "presence_penalty": generation.presence_penalty,
            "logit_bias": {str(token): bias for token, bias in generation.logit_bias.items()},
        }
        return taken | {name: value for name, value in changes.items() if value}

    @cached_property
    def _takes_greedy(self) -> bool:
        """Whether LiteLLM takes temperature 0 for this model; it refuses it for OpenAI's reasoning models.

        It is the default, not a wish; another temperature is sent, and refused by name.
        """
        litellm = load_litellm()
        try:
            name, provider, _, _ = litellm.get_llm_provider(self.spec.litellm_model)
            litellm.utils.get_optional_params(
                model=name, custom_llm_provider=provider, temperature=0.0, drop_params=False
            )
        except litellm.UnsupportedParamsError:
            return False
        except Exception:  # an unknown provider: the call itself says what is wrong
            return True
        return True


def _without_account(spec: ModelSpec) -> dict[str, str]:
    """Empty headers in place of the user's organisation and project at OpenAI.

    OpenAI's client, which LiteLLM calls many providers with, takes them from the environment for any server.
    """
    headers = {header: "" for header, names in ACCOUNT.items() if any(map(os.environ.get, names))}
    if not headers:
        return {}
    litellm = load_litellm()
    try:
        _, provider, _, _ = litellm.get_llm_provider(spec.litellm_model)
    except Exception:  # an unknown provider: the call itself says what is wrong
        return {}
    if provider == "openai":
        return {} if spec.api_base is None else headers
    return headers if provider in ("custom_openai", *litellm.openai_compatible_providers) else {}


def _body(generation: Generation) -> dict[str, Any]:
    """Fields beside OpenAI's, as vLLM and SGLang take them: template variables and sampling parameters."""
    body = dict(generation.extra_body)
    if generation.chat_template_kwargs:
        given = body.get("chat_template_kwargs", {})
        body["chat_template_kwargs"] = {**given, **generation.chat_template_kwargs}
    if generation.min_p:
        body["min_p"] = generation.min_p
    if generation.repetition_penalty != 1:
        body["repetition_penalty"] = generation.repetition_penalty
    return body


def _sent(message: Message) -> dict[str, Any]:
    """A message as it is sent, its content in parts where these have marks."""
    sent: dict[str, Any] = dict(message)
    if parts := sent.pop("parts", None):
        sent["content"] = parts
    return sent
