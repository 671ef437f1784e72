"""What callers of the SDK give, checked and put into one form: questions, conversations, threads, settings.

Leaves out running a question (`viaticum.agents.client`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from viaticum.agents.workflow.state import Allowance
from viaticum.checks import checked_text, checked_type, shown
from viaticum.errors import InputError
from viaticum.generation import GenerationKeywords, GenerationSettings
from viaticum.types import AnswerKind, Message, Query, checked_messages

# Nodes of one run: two a call, up to a hundred calls a pair. Never reached: a run ends when its pairs are
# used up.
RECURSION_LIMIT = 100_000


def thread_config(thread_id: str) -> Any:
    """LangGraph's configuration of a run. Raises `InputError` where the id is no text."""
    checked_text("thread_id", thread_id)
    return {"configurable": {"thread_id": thread_id}, "recursion_limit": RECURSION_LIMIT}


def as_query(question: str | Query, kind: AnswerKind, messages: Sequence[Message]) -> Query:
    """A question with its kind and the conversation before it.

    Raises:
        InputError: the question is neither text nor `Query`, or a `Query` and terms that it has itself.
    """
    if not isinstance(question, Query):
        checked_type("a question", question, str, "a text or a Query")
        return Query(question, kind, messages=checked_messages(messages))
    if kind != "auto" or messages:
        raise InputError("a Query has a kind and messages of its own; set them there, or give its text")
    return question


def as_questions(questions: Any, kinds: type[Any] | tuple[type[Any], ...]) -> Any:
    """Raises `InputError` for what is no collection of questions, a single text above all."""
    if isinstance(questions, str | bytes | Query | Mapping):
        raise InputError(
            f"a batch takes a list of questions, got {shown(questions)}; solve answers a single one"
        )
    return checked_type("questions", questions, kinds, "a list of texts or queries")


def with_settings(allowance: Allowance | None, settings: GenerationKeywords) -> Allowance | None:
    """The allowance with settings of one call over its own. Raises `InputError` where one cannot be used."""
    if allowance is not None:
        checked_type("allowance", allowance, Allowance, "an Allowance")
    if not settings:
        return allowance
    given = allowance or Allowance()
    return replace(given, settings=GenerationSettings.from_keywords(settings).over(given.settings))
