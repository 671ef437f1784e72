"""Keys of servers and providers, from the environment. A key is in no catalogue, cache or message."""

from __future__ import annotations

import os
from collections.abc import Mapping

from viaticum.catalogue import ModelSpec
from viaticum.errors import AuthenticationFailed

# Variables of the best-known providers, by LiteLLM's name for them; one of them is enough.
KEY_VARIABLES: Mapping[str, tuple[str, ...]] = {
    "anthropic": ("ANTHROPIC_API_KEY",),
    "azure": ("AZURE_API_KEY", "AZURE_AD_TOKEN"),
    "cerebras": ("CEREBRAS_API_KEY",),
    "cohere": ("COHERE_API_KEY",),
    "cohere_chat": ("COHERE_API_KEY",),
    "deepseek": ("DEEPSEEK_API_KEY",),
    "fireworks_ai": ("FIREWORKS_AI_API_KEY", "FIREWORKS_API_KEY"),
    "gemini": ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
    "groq": ("GROQ_API_KEY",),
    "mistral": ("MISTRAL_API_KEY",),
    "moonshot": ("MOONSHOT_API_KEY",),
    "openai": ("OPENAI_API_KEY",),
    "openrouter": ("OPENROUTER_API_KEY",),
    "perplexity": ("PERPLEXITYAI_API_KEY", "PERPLEXITY_API_KEY"),
    "together_ai": ("TOGETHERAI_API_KEY", "TOGETHER_API_KEY"),
    "xai": ("XAI_API_KEY",),
}


def key_variables(litellm_model: str, provider: str = "") -> tuple[str, ...]:
    """Environment variables of which one holds the key of a model's provider; () where they are unknown."""
    return KEY_VARIABLES.get(litellm_model.partition("/")[0]) or KEY_VARIABLES.get(provider, ())


def require_key(spec: ModelSpec) -> None:
    """Check that the key of a remote model is set, also where its entry names no variable.

    Raises:
        AuthenticationFailed: it is not.
    """
    api_key(spec)
    variables = key_variables(spec.litellm_model or "")
    is_looked_up = spec.api_key_env is None and spec.api_base is None and variables
    if is_looked_up and not any(os.environ.get(variable, "").strip() for variable in variables):
        raise AuthenticationFailed(f"{spec.name} needs a key; put it into the variable {variables[0]}")


def api_key(spec: ModelSpec) -> str | None:
    """Return the key that an entry's api_key_env names, without space around it; None where it names none.

    Raises:
        AuthenticationFailed: the variable is empty.
    """
    if spec.api_key_env is None:
        return None
    key = os.environ.get(spec.api_key_env, "").strip()  # files of keys end with a newline
    if not key:
        raise AuthenticationFailed(f"{spec.name} needs a key; put it into the variable {spec.api_key_env}")
    return key
