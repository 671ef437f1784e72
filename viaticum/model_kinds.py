"""What each kind of catalogue entry needs and takes: which fields go with which kind, engine and router.

Knows which fields are given, not their values. Leaves out the entry itself (`viaticum.model_spec`).
"""

from __future__ import annotations

from collections.abc import Set
from typing import Literal

from viaticum.local_settings import LOCAL_FIELDS

Kind = Literal["local", "pair", "remote", "scripted", "encoder"]

# Fields that these kinds need, and no other takes.
_NEEDED: dict[str, tuple[Kind, ...]] = {
    "sources": ("local", "encoder"),
    **dict.fromkeys(("small", "large", "router"), ("pair",)),
    "litellm_model": ("remote",),
}
# What each token router takes; a router that is not named here takes them all.
_ROUTER_FIELDS = {
    "r-stitch": ("tau",),
    "r-stitch+": ("router_path", "tau", "threshold"),
    "r2r": ("router_path", "threshold", "share", "drift"),
    "speculative": (),
}
_OF_ROUTERS = frozenset(field for fields in _ROUTER_FIELDS.values() for field in fields)
_OF_REMOTE = (
    *("api_base", "api_key_env", "timeout_seconds", "max_retries", "omit", "streams", "tools"),
    *("tokenizer", "holds", "json_schema", "vision", "image_tokens"),
    *("batch_api", "batch_discount", "batch_hours"),
)
# Fields that only these kinds take.
_TAKEN: dict[str, tuple[Kind, ...]] = {
    **dict.fromkeys(sorted(_OF_ROUTERS), ("pair",)),
    "chat_template": ("local",),
    "mode": ("pair",),
    "benchmarks": ("local", "pair", "remote", "scripted"),
    "generation": ("local", "pair", "remote", "scripted"),
    **dict.fromkeys(sorted(LOCAL_FIELDS), ("local", "pair")),
    **dict.fromkeys(_OF_REMOTE, ("remote",)),
    **dict.fromkeys(("text", "pause"), ("scripted",)),
}
_AFTER_NAME = {
    "generation": " settings",
    "chat_template": "; it is for local models",
    **dict.fromkeys(LOCAL_FIELDS, "; it is for local models and pairs"),
}
# Of local entries whose engine is "served": what they need, what they may have of remote ones.
_SERVED_NEEDED = ("api_base", "served_model")
_SERVED_TAKEN = ("api_base", "api_key_env", "timeout_seconds", "max_retries")


def check_fields(kind: Kind, given: Set[str], *, is_served: bool) -> None:
    """Check that an entry has what its kind needs, and nothing that its kind does not take.

    Args:
        given: the fields that are not at their defaults.
        is_served: whether its engine is "served".

    Raises:
        ValueError: it does not; the message names the field.
    """
    entry = f"an {kind} entry" if kind == "encoder" else f"a {kind} entry"
    for field, kinds in _NEEDED.items():
        if (field in given) != (kind in kinds):
            raise ValueError(f"{entry} {'needs' if kind in kinds else 'takes no'} {field}")
    for field, kinds in _TAKEN.items():
        if field in given and kind not in kinds and not (is_served and field in _SERVED_TAKEN):
            raise ValueError(f"{entry} takes no {field}{_AFTER_NAME.get(field, '')}")
    if kind == "pair" and is_served:
        raise ValueError('give engine = "served" to a model of the pair, not to both of them')
    for field in _SERVED_NEEDED:
        if is_served and field not in given:
            raise ValueError(f'engine = "served" needs {field}')
    for field in ("served_model", "top_logprobs"):
        if field in given and not is_served:
            raise ValueError(f'{field} goes with engine = "served"')


def check_router(router: str, given: Set[str]) -> None:
    """The same of what the token router of a pair needs and takes."""
    if router == "r-stitch" and "tau" not in given:
        raise ValueError("a pair entry needs tau where its router is r-stitch")
    strange = given & _OF_ROUTERS - set(_ROUTER_FIELDS.get(router, _OF_ROUTERS))
    if strange:
        raise ValueError(f"the router {router} takes no {sorted(strange)[0]}")
    if router == "speculative" and "mode" in given:
        raise ValueError("the router speculative takes no mode")
    if {"threshold", "share"} <= given:
        raise ValueError("give threshold or share, not both")
