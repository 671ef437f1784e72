"""How a call is generated: `resolve` finds every setting from call, strategy, catalogue entry and defaults.

In this order: what the call or the command line sets, what the strategy sets, the entry's `generation` table,
the default. Everything that calls a model asks here, so that what is reserved, cached and written agree.
"""

from __future__ import annotations

from typing import Any

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.messages import fold_system, refuse_parts
from viaticum.models.base import Generation
from viaticum.models.remote.prices import thinks_by_default
from viaticum.strategies import get as get_strategy
from viaticum.strategies.base import Strategy, messages_for, system_turn
from viaticum.strategies.verify import SETTINGS
from viaticum.types import VERIFY, Message, Query

ANSWER_TOKENS = 400  # limit of an answer where nobody sets one
THOUGHT_TOKENS = 8192  # limit of a thought where nobody sets one, if the context holds it
# Most tokens of a local model's thought by effort: the budgets that remote models are told as that effort.
# Other efforts set no limit.
EFFORT_BUDGETS = {"none": 0, "minimal": 128, "low": 1024, "medium": 4096}
_DIRECT = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "reasoning_effort",
)


def resolve(
    catalogue: Catalogue,
    model: str,
    strategy: Strategy | None = None,
    call: GenerationSettings = NO_SETTINGS,
    *,
    sample: int = 0,
    default_limit: int = ANSWER_TOKENS,
) -> Generation:
    """The settings of a call of a model.

    A temperature of 0 in the call does not hold for a strategy that votes over samples: these would be equal.

    Args:
        model: its name in the catalogue.
        strategy: None for a plain chat.
        call: what the call or the command line sets; its max_new_tokens counts thought and answer together.
        sample: index among the samples of the strategy, added to the seed.
        default_limit: tokens of the answer where nobody sets a limit.
    """
    spec = catalogue[model]
    own = strategy.settings if strategy is not None else NO_SETTINGS
    if strategy is not None and strategy.samples > 1 and call.temperature == 0:
        call = call.model_copy(update={"temperature": None})
    merged = call.over(own).over(spec.generation)
    budget = merged.thinking_budget
    if budget is None and spec.kind != "remote" and merged.reasoning_effort is not None:
        budget = EFFORT_BUDGETS.get(merged.reasoning_effort)
    values: dict[str, Any] = {name: value for name, value in merged.given.items() if name in _DIRECT}
    total, thought = _limits(spec, _thinks(catalogue, model, merged), own, call, budget, default_limit)
    return Generation(
        max_new_tokens=total,
        thinking_budget=thought,
        seed=(merged.seed or 0) + sample,
        stop=tuple(merged.stop),
        chat_template_kwargs=dict(merged.chat_template_kwargs),
        extra_body=dict(merged.extra_body),
        logit_bias=dict(merged.logit_bias),
        **values,
    )


def judge_settings(catalogue: Catalogue, model: str) -> GenerationSettings:
    """Those of `verify` for a plain chat with a model, with room for its thought."""
    limit = resolve(catalogue, model, get_strategy(VERIFY)).max_new_tokens
    return SETTINGS.model_copy(update={"max_new_tokens": limit})


def prompt(
    spec: ModelSpec, strategy: Strategy, query: Query, call: GenerationSettings = NO_SETTINGS
) -> list[Message]:
    """The chat in which a strategy asks a model, with the system turn that call, strategy or entry set."""
    return messages_for(strategy, query, entry=spec.generation.system, call=call.system)


def chat_messages(
    spec: ModelSpec, messages: list[Message], call: GenerationSettings = NO_SETTINGS
) -> list[Message]:
    """A plain chat with the system turn of call or entry at its start, or without one where it is "".

    A chat that has a system turn keeps it. Raises `InputError` for images where the model is not remote.
    """
    system = call.system if call.system is not None else spec.generation.system
    if spec.kind != "remote":
        refuse_parts(spec.name, messages)
    if system == "":
        return fold_system(messages)
    if system is None or any(each["role"] == "system" for each in messages):
        return messages
    return [*system_turn(system), *messages]


def _thinks(catalogue: Catalogue, model: str, settings: GenerationSettings) -> bool:
    """Whether a thought needs room: by the model's family, by LiteLLM's list, or because it is asked for."""
    if catalogue.thinking_format(model).thinks:
        return True
    spec, effort = catalogue[model], settings.reasoning_effort
    if spec.kind != "remote" or effort == "none":
        return False
    return bool(settings.thinking_budget or effort) or thinks_by_default(spec)


def _limits(
    spec: ModelSpec,
    thinks: bool,
    own: GenerationSettings,
    call: GenerationSettings,
    budget: int | None,
    default: int,
) -> tuple[int, int | None]:
    """Most tokens in all, and of the thought as the model is told (None: it is told nothing).

    On a model that thinks, a limit of the strategy counts the answer and the thought comes on top; one of the
    call, or of the entry alone, counts both.
    """
    entry = spec.generation.max_new_tokens
    if budget == 0 or not thinks:
        return call.max_new_tokens or own.max_new_tokens or entry or default, 0 if budget == 0 else None
    answer = own.max_new_tokens or default
    total = call.max_new_tokens or (entry if own.max_new_tokens is None else None)
    if total is not None:
        thought = max(total - min(answer, total // 2), 0)
        thought = thought if budget is None else min(budget, thought)
    else:
        longest = max((spec.usable_context - answer) // 2, 0)
        thought = budget if budget is not None else _default_thought(entry, answer, longest)
        total = answer + thought
    return total, budget if spec.kind == "remote" and budget is None else thought


def _default_thought(entry: int | None, answer: int, longest: int) -> int:
    """What the entry's limit leaves for the thought, else `THOUGHT_TOKENS`, if the context holds them."""
    return entry - answer if entry is not None and entry > answer else min(THOUGHT_TOKENS, longest)
