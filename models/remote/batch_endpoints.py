"""Opens the batch endpoint of a catalogue entry's provider.

Leaves out what each does (`models.remote.batch_openai`, `models.remote.batch_anthropic`).
"""

from __future__ import annotations

from viaticum.catalogue import ModelSpec
from viaticum.errors import InputError
from viaticum.models.api_keys import require_key
from viaticum.models.remote.batch_anthropic import AnthropicBatches
from viaticum.models.remote.batch_api import BatchAPI
from viaticum.models.remote.batch_openai import OpenAIBatches


def open_batch_api(spec: ModelSpec, key: str | None = None) -> BatchAPI:
    """The batch endpoint of an entry's provider.

    Args:
        spec: a remote entry with a `batch_form`.
        key: API key; by default the one in the environment variable that the entry names.

    Raises:
        InputError: the provider has none.
        MissingExtra: the provider's client is not installed.
        AuthenticationFailed: the key is not there.
    """
    if spec.batch_form is None:
        raise InputError(
            f"{spec.name} has no batch endpoint; set batch_api in its entry, to openai or anthropic"
        )
    if key is None:
        require_key(spec)
    return OpenAIBatches(spec, key) if spec.batch_form == "openai" else AnthropicBatches(spec, key)
