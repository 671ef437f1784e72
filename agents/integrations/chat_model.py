"""`ChatViaticum`: a LangChain chat model within a budget.

`model` is a name of the catalogue, for a plain chat with that model; `auto`, for the workflow, which routes
the last message of the user, and with tools or a schema for a plain chat with a model that can do it; or
`model+strategy`, for the workflow with that pair alone. Every call reserves its worst case in the ledger and
settles its actual cost, streamed or whole, sync or async.

Leaves out the conversion of messages (`agents.integrations.langchain_messages`) and how calls are paid
(`agents.workflow.calls`, `agents.workflow.graph`).
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, model_validator

from viaticum.agents.capable import first_that_answers, is_plain, models_in_order, settings_for
from viaticum.agents.client import Viaticum
from viaticum.agents.integrations.chat_clients import ChatClients, models_with
from viaticum.agents.integrations.chat_identity import identity
from viaticum.agents.integrations.chat_response import (
    answer_metadata,
    call_metadata,
    cut_at,
    text_with_answer,
)
from viaticum.agents.integrations.chat_streams import StreamedChatModel
from viaticum.agents.integrations.langchain_messages import (
    final_chunk,
    from_langchain,
    query_from_langchain,
    thinking_chunk,
)
from viaticum.agents.integrations.structured_output import Method, structured, tool_choice_of, with_raw
from viaticum.agents.integrations.token_counts import CountingChatModel
from viaticum.agents.workflow.calls import Calls, SettledCall
from viaticum.agents.workflow.deadlines import Deadline
from viaticum.agents.workflow.sessions import count_tokens
from viaticum.agents.workflow.settings import AUTO
from viaticum.agents.workflow.state import Allowance
from viaticum.agents.workflow.threads import in_own_context
from viaticum.budgets import Budget
from viaticum.catalogue import Catalogue
from viaticum.errors import InputError
from viaticum.generation import GenerationSettings
from viaticum.messages import refuse_cache_marks, refuse_parts
from viaticum.models.base import Model
from viaticum.models.settings import chat_messages, resolve
from viaticum.residency import Residency
from viaticum.routers.query import DEFAULT_POLICY, Policy, QueryRouter
from viaticum.types import Answer, Message, Pair, Query, ThinkingDelta, split_model
from viaticum.valid_text import valid_json

MAX_TOKENS = 1024  # default of a plain chat: some number has to be reserved
_SETTINGS = (
    "model",
    "temperature",
    "max_tokens",
    "top_p",
    "seed",
    "reasoning_effort",
    "thinking_budget",
    "chat_template_kwargs",
    "extra_body",
)


class ChatViaticum(StreamedChatModel, CountingChatModel):
    """A chat model that never spends more than its budget. Raises as `Calls.stream` and `Viaticum.stream`.

    Args:
        model: `auto`, a name of the catalogue, or `model+strategy`.
        budget, budget_name, catalogue, router, policy, folder, models: settings of the `Viaticum` that is
            opened at the first call and closed by `close`.
        client: an open `Viaticum` instead of those, whose budget is then shared.
        budget_name: one for this object and its copies where none is given.
        temperature, max_tokens, top_p, seed, stop, reasoning_effort, thinking_budget, chat_template_kwargs,
            extra_body: of every call, see `viaticum.generation.GenerationSettings`; None for those of the
            strategy and the catalogue entry. max_tokens counts thought and answer; where neither a plain chat
            nor its entry has one, 1024 are reserved.
        only: labels of models, one of which a model has to have to be used; beside what the client allows.
        max_seconds: that each call may take, all of its tries together.
        session: of `auto`, the name of the conversation, which keeps its model while that is worth it.
        timeout, max_retries, api_key: of remote models, in place of those of their catalogue entries; timeout
            in seconds.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True, extra="forbid")

    model_name: str = Field(default=AUTO, alias="model")
    budget: str | int | float | Decimal | None = None
    budget_name: str | None = None
    catalogue: Catalogue | str | Path | None = Field(default=None, exclude=True)
    router: QueryRouter | str | Path | None = Field(default=None, exclude=True)
    policy: str | Policy = Field(default=DEFAULT_POLICY, exclude=True)
    folder: str | Path | None = None
    models: Mapping[str, Model] | None = Field(default=None, exclude=True)
    only: str | tuple[str, ...] | None = None
    client: Viaticum | None = Field(default=None, exclude=True)
    temperature: float | None = Field(default=None, ge=0, le=2)
    max_tokens: int | None = Field(default=None, gt=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    reasoning_effort: str | None = Field(default=None, min_length=1)
    thinking_budget: int | None = Field(default=None, ge=0)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    extra_body: dict[str, Any] = Field(default_factory=dict)
    stop: list[str] | str | None = None
    api_key: SecretStr | None = Field(default=None, exclude=True)
    timeout: float | None = Field(default=None, gt=0)
    max_seconds: float | None = Field(default=None, gt=0)
    session: str | None = Field(default=None, min_length=1, max_length=200)
    max_retries: int | None = Field(default=None, ge=0)

    _clients: ChatClients = PrivateAttr(default_factory=ChatClients)

    @property
    def _llm_type(self) -> str:
        return "viaticum"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        given = {
            name: getattr(self, "model_name" if name == "model" else name) for name in (*_SETTINGS, "stop")
        }
        limit = {"only": str(residency)} if (residency := Residency.of(self.only)) else {}
        return given | limit | identity(self.client, self.catalogue, self.router, self.policy, self.models)

    # Copies: each opens a client of its own, on the same budget

    @model_validator(mode="after")
    def _name_budget(self) -> Self:
        """A budget without a name gets one here, so that copies spend from the same one."""
        Residency.of(self.only)
        if self.client is None and self.budget_name is None:
            self.budget_name = f"chat-{uuid.uuid4().hex[:12]}"
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy with the same client, router, catalogue and models, whose other settings are its own."""
        shared = {id(each): each for each in (self.client, self.router, self.catalogue, self.models)}
        copied = type(self).model_construct(_fields_set=set(self.model_fields_set))
        copied.__dict__.update(copy.deepcopy(self.__dict__, {**(memo or {}), **shared}))
        return copied

    def __copy__(self) -> Self:
        copied = type(self).model_construct(_fields_set=set(self.model_fields_set))
        copied.__dict__.update(self.__dict__)
        return copied

    def __getstate__(self) -> dict[Any, Any]:
        """Raises `InputError` for a chat with an open client, which no other process can use."""
        if self.client is not None:
            raise InputError(
                "a chat with an open client cannot be pickled; give it budget, budget_name and folder instead"
            )
        return {**super().__getstate__(), "__pydantic_private__": None}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self.model_post_init(None)

    def _counting_model(self) -> Model | None:
        return None if self.model_name == AUTO else self._client().model(split_model(self.model_name)[0])

    # Calls

    def _chunks(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        kwargs: Mapping[str, Any],
        *,
        whole: bool = False,
    ) -> Generator[AIMessageChunk, None, None]:
        extra = dict(kwargs)
        settings = {name: extra.pop(name) for name in _SETTINGS if extra.get(name) is not None}
        name = str(settings.get("model", self.model_name))
        stops = tuple([stop] if isinstance(stop, str) else stop if stop is not None else self._own_stops())
        if is_routed(name):
            converted = from_langchain(messages)
            if name == AUTO and is_plain(converted, extra):
                refuse_cache_marks(name, converted)
                return self._routed_chat(converted, self._settings(settings, stops), extra, whole=whole)
            refuse_parts(name, converted)
            _refuse_extra(name, extra)
            given = self._settings(settings, ())
            return in_own_context(self._answer(name, query_from_langchain(messages), given, stops))
        return self._chat(name, from_langchain(messages), self._settings(settings, stops), extra)

    def _settings(self, given: Mapping[str, Any], stops: tuple[str, ...]) -> GenerationSettings:
        """The settings of a call: those given to it, then those of this object."""
        values = {name: given.get(name, getattr(self, name, None)) for name in _SETTINGS if name != "model"}
        return GenerationSettings.from_keywords({**values, "stop": stops})

    def _chat(
        self,
        name: str,
        messages: list[Message],
        settings: GenerationSettings,
        extra: Mapping[str, Any],
        deadline: Deadline | None = None,
    ) -> Generator[AIMessageChunk, None, None]:
        """One call of one model, under a key of its own."""
        client, deadline = self._client(), deadline or self._deadline()
        self._check_can(client, name, messages, extra)
        settings = settings.over(client.settings)
        messages = chat_messages(client.catalogue[name], messages, settings)
        generation = resolve(client.catalogue, name, call=settings, default_limit=MAX_TOKENS)
        generation = replace(generation, extra=valid_json(extra))
        secret = None if self.api_key is None else self.api_key.get_secret_value()
        model = models_with(client, secret, timeout_seconds=self.timeout, max_retries=self.max_retries)
        calls = Calls(client.catalogue, client.ledger, model, deadline, client.labels)
        key = f"chat-{uuid.uuid4().hex}"
        events = calls.stream(client.budget_name, key, name, messages, generation, tags={"door": "langchain"})
        with closing(client.chatting(events)) as stream:
            for event in stream:
                if isinstance(event, SettledCall):
                    done, metadata = event.completion, call_metadata(name, event, client.budget())
                    yield final_chunk(done.usage, metadata, done.tool_calls)
                elif isinstance(event, ThinkingDelta):
                    yield thinking_chunk(event.text)
                elif event:
                    yield AIMessageChunk(content=event)

    def _routed_chat(
        self, messages: list[Message], settings: GenerationSettings, extra: Mapping[str, Any], *, whole: bool
    ) -> Generator[AIMessageChunk, None, None]:
        """One call of the model that the router prefers of those that can, or of the next one."""
        client, deadline = self._client(), self._deadline()
        limit = settings.over(client.settings).max_new_tokens or MAX_TOKENS
        names = models_in_order(
            client,
            messages,
            extra,
            scope=client.budget_name,
            limit=limit,
            deadline=deadline,
            session=self.session,
        )

        def ask(name: str, position: int) -> Generator[AIMessageChunk, None, None]:
            return self._chat(name, messages, settings_for(client, name, settings), extra, deadline)

        for chunk in first_that_answers(names, ask, shows=lambda chunk: True, whole=whole):
            if self.session is not None and (model := chunk.response_metadata.get("model_name")):
                client.sessions.note(self.session, model, count_tokens(messages), answered=True)
            yield chunk

    def _deadline(self) -> Deadline | None:
        """Of a call that begins now: its own, else that of the client's settings."""
        seconds = self.max_seconds or self._client().max_seconds
        return None if seconds is None else Deadline.after(seconds)

    def _answer(
        self, name: str, question: Query, settings: GenerationSettings, stops: tuple[str, ...]
    ) -> Generator[AIMessageChunk, None, None]:
        """Answer a question by the workflow.

        Text and thought are yielded once the text is accepted, since a pair may give no answer.
        """
        client = self._client()
        if name != AUTO:
            client = self._clients.of_pair(client, Pair.parse(name), Residency.of(self.only))
        allowance = Allowance(settings=settings, max_seconds=self.max_seconds, session=self.session)
        events = client.stream(question, allowance=allowance)
        try:
            for event in events:
                if isinstance(event, Answer):
                    if event.thinking:
                        yield thinking_chunk(event.thinking)
                    yield AIMessageChunk(content=cut_at(text_with_answer(event), stops))
                    yield final_chunk(event.usage, answer_metadata(name, event, client.budget()))
        finally:
            events.close()  # type: ignore[attr-defined]

    # Tools and schemas

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """A chat that may call tools. Raises `InputError` for models that cannot: all but remote ones.

        With `auto` each call goes to the model that the router prefers of those that can.
        """
        self._check_binding({"tools": tools})
        wanted = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        bound: dict[str, Any] = {"tools": wanted, **kwargs}
        if tool_choice is not None and tool_choice is not False:
            bound["tool_choice"] = tool_choice_of(tool_choice, [tool["function"]["name"] for tool in wanted])
        if parallel_tool_calls is not None:
            bound["parallel_tool_calls"] = parallel_tool_calls
        return self.bind(**bound)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: Method = "function_calling",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answers that fit a schema, parsed.

        Args:
            schema: a pydantic class, a TypedDict or a JSON schema.
            include_raw: also return the message and the parsing error.
            method: call the schema as a tool, use the provider's JSON schemas, or its JSON mode, for which
                the prompt has to ask for JSON.

        Raises:
            InputError: the model cannot do that, or a keyword or the method is unknown.
        """
        if kwargs:
            raise InputError(
                f"unknown: {', '.join(kwargs)}; structured output takes method, strict and include_raw"
            )
        bind, parser = structured(schema, method, strict)
        if "tools" in bind:
            model = self.bind_tools(bind.pop("tools"), **bind)
        else:
            self._check_binding({"response_format": bind["response_format"]})
            model = self.bind(**bind)
        return with_raw(model, parser) if include_raw else model | parser

    # The client

    def left(self) -> Budget:
        """The state of the budget."""
        return self._client().budget()

    def close(self) -> None:
        """Close the ledger if it was opened here. The next call opens it again."""
        self._clients.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _client(self) -> Viaticum:
        """The client under the restrictions of this chat and of its budget."""
        client = self._clients.own(self._open_client) if self.client is None else self.client
        return self._clients.restricted(client, Residency.of(self.only))

    def _open_client(self) -> Viaticum:
        return Viaticum(
            self.budget,
            budget_name=self.budget_name,
            catalogue=self.catalogue,
            router=self.router,
            policy=self.policy,
            folder=self.folder,
            models=self.models,
        )

    def labels(self) -> frozenset[str]:
        """Where the data of its calls goes: of `auto`, what all models have that it may use."""
        client, (model, _) = self._client(), split_model(self.model_name)
        if model != AUTO:
            return client.labels(model)
        found = [client.labels(spec.name) for spec in client.catalogue.models() if client.allows(spec.name)]
        return frozenset.intersection(*found) if found else frozenset()

    def _check_can(
        self, client: Viaticum, name: str, messages: Sequence[Message], extra: Mapping[str, Any]
    ) -> None:
        kind = client.catalogue[name].kind
        if kind == "encoder":
            raise InputError(f"{name} is an encoder and answers nothing; name another model")
        if kind != "remote":
            refuse_parts(name, messages)
        if kind in ("local", "pair"):
            if remote := [each for each in extra if each not in ("logprobs", "top_logprobs")]:
                raise InputError(f"{name} runs locally and takes no {', '.join(remote)}; name a remote model")
            if any(message["role"] == "tool" or "tool_calls" in message for message in messages):
                raise InputError(f"{name} runs locally and reads no tool calls; name a remote model")

    def _check_binding(self, extra: Mapping[str, Any]) -> None:
        if not is_routed(self.model_name):
            self._check_can(self._client(), self.model_name, [], extra)
        elif self.model_name != AUTO:
            _refuse_extra(self.model_name, extra)

    def _own_stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


def is_routed(name: str) -> bool:
    return name == AUTO or bool(split_model(name)[1])


def _refuse_extra(name: str, extra: Mapping[str, Any]) -> None:
    if extra:
        raise InputError(
            f"{name} routes to strategies, which take no {', '.join(extra)}; name a model instead"
        )
