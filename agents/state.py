"""What the workflow's checkpoints hold: plain JSON-like values, no objects of ours.

So a checkpoint stays readable across versions and never needs pickle.
"""

from __future__ import annotations

from typing import Any, TypedDict


class State(TypedDict, total=False):
    """One question on its way. Calls are numbered from 0; `call` is the one at hand.

    tried: pairs already used, as model+strategy; route: the pair chosen and its row; completion: the text
    of the call at hand; samples: what was read from the calls of this pair so far, as [value, reason],
    while its strategy wants more; plan: pairs to ask, as model+strategy, and the equal answers that settle it; votes:
    what they answered, as [pair, value]; routes, costs and usage gather over all calls; done: an answer was
    accepted, or no pair is left.
    """

    question: str
    kind: str
    plan: dict[str, Any] | None
    votes: list[list[str]]
    call: int
    tried: list[str]
    route: dict[str, Any] | None
    routes: list[dict[str, Any]]
    held: int
    cost: int
    usage: dict[str, list[int]]
    seconds: float
    text: str
    finish_reason: str
    completion: dict[str, Any] | None
    samples: list[list[str | None]]
    value: str | None
    reason: str
    done: bool
