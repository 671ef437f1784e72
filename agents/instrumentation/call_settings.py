"""What decides the cost of an agent's model call besides its texts: answers, limits, tiers and tools.

Settings stand in the request, in the model, and in the mappings that either sends on. What would make a call
dearer than what is held for it is refused by name. Leaves out the messages
(`viaticum.agents.integrations.sent_messages`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from viaticum.errors import InputError

_MAPPINGS = ("model_kwargs", "extra_body", "generation_config", "options")
_ANSWERS = ("n", "candidate_count", "candidateCount", "best_of", "num_return_sequences")
_LIMITS = (
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "maxOutputTokens",
    "max_new_tokens",
    "max_tokens_to_sample",
    "num_predict",
)
# Values that cost no more than the list price; None where the setting itself is what cannot be held.
_TIERS: dict[str, tuple[str, ...] | None] = {
    "service_tier": ("auto", "default", "flex", "standard", "standard_only", "on_demand"),
    "speed": ("standard",),
    "inference_geo": ("global", "not_available"),
    "prediction": None,
    "previous_response_id": None,
    "conversation": None,
    "prompt": None,
    "audio": None,
    # What the provider searches and reads by itself: OpenAI, xAI, Azure, OpenRouter, Anthropic.
    "web_search_options": None,
    "search_parameters": None,
    "data_sources": None,
    "plugins": None,
    "mcp_servers": None,
}
_OTHER_MODELS = ("models", "fallback_models")  # that a gateway may call instead, at prices of their own
_NAMES = ("model", "model_name")
_OWN_TOOLS = ("bash_", "text_editor_", "memory_")  # Anthropic's, which the agent runs
OWN_TOOL_TOKENS = 1024  # the provider's instructions of such a tool


class CallSettings:
    """All settings of a call, by where they stand.

    Args:
        model: a chat model with settings of its own; None where all are in the request.
        given: the settings of the request.
    """

    def __init__(self, model: object | None, given: Mapping[str, Any]) -> None:
        names = (*_ANSWERS, *_TIERS, "modalities", "response_modalities")
        own = {name: value for name in names if (value := getattr(model, name, None)) is not None}
        self._sources: list[Mapping[str, Any]] = [own]
        for owner in (_fields(model), given):
            self._sources += [value for name in _MAPPINGS if isinstance(value := owner.get(name), Mapping)]
        self._sources.append(given)
        self._model = model

    @property
    def sent(self) -> list[Mapping[str, Any]]:
        """Mappings that the model sends on with the messages."""
        return [source for source in self._sources[1:] if source]

    @property
    def answers(self) -> int:
        """The answers that one call makes."""
        given = [value for name in _ANSWERS for value in self._values(name)]
        return max((1, *(value for value in given if isinstance(value, int))))

    @property
    def tools(self) -> list[Any]:
        return [tool for each in self._values("tools") if isinstance(each, Sequence) for tool in each]

    def check_model(self) -> None:
        """Check that the model that is sent is the one that is held. Raises `InputError` for another one."""
        for source in self._sources[1:]:
            for name in _OTHER_MODELS:
                if source.get(name):
                    raise InputError(
                        f"{name} names models that may be called instead of the one that is held for; leave "
                        "it out"
                    )
        held = {str(each) for name in _NAMES if (each := getattr(self._model, name, None))}
        for source in self._sources[1:]:
            for name in _NAMES:
                if source.get(name) and held and str(source[name]) not in held:
                    raise InputError(
                        f"{name}={source[name]!r} in the settings of a call names another model than the one "
                        "that is held for; change the request's model instead"
                    )

    def check(self, limit: int, setting: str) -> None:
        """Check that nothing makes a call dearer than its hold.

        Args:
            limit: most new tokens of an answer, sent under the name `setting`.

        Raises:
            InputError: a setting does, or names another model; the message names it.
        """
        self.check_model()
        for source in self._sources[1:]:
            for name in source.keys() & set(_LIMITS):
                value = source[name]
                if source is self._sources[-1] and name == setting:
                    continue  # the held limit is sent in its place
                if value is not None and not (isinstance(value, int) and 0 < value <= limit):
                    raise InputError(
                        f"{name}={value!r} stands beside the {setting}={limit} that is held for the call; "
                        f"leave it out, or give max_tokens_setting={name!r}"
                    )
        for name, allowed in _TIERS.items():
            for value in self._values(name):
                if value and (allowed is None or value not in allowed):
                    raise InputError(f"{name}={value!r} changes what a call can cost; leave it out")
        for name in ("modalities", "response_modalities"):
            for value in self._values(name):
                other = [each for each in value if str(each).lower() != "text"] if value else []
                if other:
                    raise InputError(
                        f"{name}={other} cannot be budgeted: only text has a bound; leave it out"
                    )

    def _values(self, name: str) -> Iterator[Any]:
        return (source[name] for source in self._sources if source.get(name) is not None)


def provider_tools(tools: Collection[Any]) -> list[str]:
    """Names of the tools that the provider runs itself; what they read has no bound."""
    return [name for tool in tools if (name := _provider_name(tool)) is not None]


def own_tools(tools: Collection[Any]) -> int:
    """How many tools have instructions of the provider, and are run by the agent."""
    return sum(isinstance(tool, Mapping) and _type(tool).startswith(_OWN_TOOLS) for tool in tools)


def _provider_name(tool: Any) -> str | None:
    if not isinstance(tool, Mapping):
        return None
    kind = _type(tool)
    if kind in ("function", "custom") or kind.startswith(_OWN_TOOLS):
        return None
    if not kind and ("name" in tool or "title" in tool):
        return None
    return kind or next(iter(tool), "")


def _type(tool: Mapping[str, Any]) -> str:
    return str(tool.get("type") or "")


def _fields(model: object | None) -> dict[str, Any]:
    return {name: getattr(model, name, None) for name in _MAPPINGS}
