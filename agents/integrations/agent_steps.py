"""Where an agent stands, read from its messages: steps, results of tools, and what a provider has cached.

Leaves out the choice of a model (`viaticum.routers.query.steps`).
"""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage

from viaticum.models.base import BYTES_PER_TOKEN
from viaticum.routers.query.steps import StepState


def step_state(messages: Sequence[BaseMessage]) -> StepState:
    """The state before the next step of a run, which goes on with the conversation before it.

    The prompt is what the provider counted at the last step, with an estimate of what came since.
    """
    answers = [message for message in messages if isinstance(message, AIMessage)]
    model = _noted(answers[-1]) if answers else None
    last = next((n for n in range(len(messages) - 1, -1, -1) if _is_counted(messages[n])), None)
    read = written = 0
    if last is not None:
        usage = messages[last].usage_metadata  # type: ignore[attr-defined]
        read, written = usage["input_tokens"], usage["output_tokens"]
    since = messages if last is None else messages[last + 1 :]
    new = sum(len(str(message.content).encode(errors="replace")) for message in since) // BYTES_PER_TOKEN
    results = [message.status != "error" for message in _run(messages) if isinstance(message, ToolMessage)]
    in_loop = bool(messages) and isinstance(messages[-1], ToolMessage)
    return StepState(model, read + written + new, read if model else 0, tuple(results), in_loop)


def note_model(messages: Sequence[BaseMessage], model: str) -> None:
    """Note in an answer which model the router chose for it, where `step_state` reads it."""
    for message in messages:
        if isinstance(message, AIMessage):
            message.response_metadata.setdefault("viaticum", {})["model"] = model


def steps_done(messages: Sequence[BaseMessage]) -> int:
    """Steps of the run that the last question began."""
    return sum(isinstance(message, AIMessage) for message in _run(messages))


def _noted(message: AIMessage) -> str | None:
    noted = message.response_metadata.get("viaticum")
    return noted.get("model") if isinstance(noted, dict) else None


def _run(messages: Sequence[BaseMessage]) -> Sequence[BaseMessage]:
    """The messages after the last one of the user."""
    begun = next((n for n in range(len(messages) - 1, -1, -1) if isinstance(messages[n], HumanMessage)), -1)
    return messages[begun + 1 :]


def _is_counted(message: BaseMessage) -> bool:
    return isinstance(message, AIMessage) and message.usage_metadata is not None
