"""Keys of servers and providers, from the environment. A key is in no catalogue, cache or message."""

from __future__ import annotations

import os

from viaticum.catalogue import ModelSpec
from viaticum.errors import AuthenticationFailed


def api_key(spec: ModelSpec) -> str | None:
    """Return the key that an entry's api_key_env names; None where it names none.

    Raises:
        AuthenticationFailed: the variable is empty.
    """
    if spec.api_key_env is None:
        return None
    key = os.environ.get(spec.api_key_env)
    if not key:
        raise AuthenticationFailed(f"{spec.name} needs a key; put it into the variable {spec.api_key_env}")
    return key
