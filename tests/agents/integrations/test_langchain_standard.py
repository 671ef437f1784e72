"""LangChain's own tests of chat models, on a scripted model and on a remote one behind a real server."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from openai_server import OpenAIServer, running_server

from viaticum import ChatViaticum, ScriptedModel, Viaticum
from viaticum.catalogue import Catalogue, ModelSpec


@pytest.fixture(scope="module")
def server() -> Iterator[OpenAIServer]:
    with running_server() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: OpenAIServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viaticum]:
    """A budget, two scripted models and two remote ones."""
    remote = [
        ModelSpec(
            name=name,
            description="Far away.",
            kind="remote",
            context_length=100_000,
            input_price=Decimal(1),
            output_price=Decimal(2),
            litellm_model=f"openai/{name}",
            api_base=server.url,
        )
        for name in ("far", "farther")
    ]
    models = {name: ScriptedModel("Hello to you too.", name=name) for name in ("near", "nearer")}
    folder = tmp_path_factory.mktemp("langchain")
    with Viaticum("1", catalogue=Catalogue(remote), models=models, folder=folder) as client:  # type: ignore[arg-type]
        yield client
        assert client.ledger.check() == []


@pytest.fixture(autouse=True)
def _told(request: pytest.FixtureRequest, client: Viaticum, server: OpenAIServer) -> None:
    """LangChain's classes ask for parameters through properties, which cannot take fixtures."""
    if request.instance is not None:
        request.instance.client, request.instance.server = client, server
    server.reset()


class Scripted:
    """One that says what its script says: no tools and no schemas, which ask for a model that reads them.

    Skipped in both classes, by LangChain's own switches: initialisation from the environment, which there is
    none of, and cassettes of HTTP calls, which the loopback server stands in for.
    """

    client: Viaticum
    chat_model_class = ChatViaticum
    has_tool_calling = False
    has_tool_choice = False
    has_structured_output = False
    supports_json_mode = False
    model_override_value = "nearer"

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "near", "client": self.client}


class Remote:
    """A model behind LiteLLM.

    Images, sound and files are refused: their tokens are unknown before the call.
    """

    client: Viaticum
    server: OpenAIServer
    chat_model_class = ChatViaticum
    supports_json_mode = True
    model_override_value = "farther"

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "far", "client": self.client}

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:
        return {kind: ["reasoning_output", "cache_read_input"] for kind in ("invoke", "stream")}

    def _invoke(self, stream: bool, usage: dict[str, Any]) -> AIMessage:
        self.server.usage = {"prompt_tokens": 50, "completion_tokens": 20, "total_tokens": 70, **usage}
        model: BaseChatModel = self.chat_model_class(**self.chat_model_params)
        if not stream:
            return model.invoke("Hello")
        chunks = list(model.stream("Hello"))
        message = chunks[0]
        for chunk in chunks[1:]:
            message = message + chunk
        return message

    def invoke_with_reasoning_output(self, *, stream: bool = False) -> AIMessage:
        message = self._invoke(stream, {"completion_tokens_details": {"reasoning_tokens": 7}})
        assert message.usage_metadata is not None
        assert message.usage_metadata["output_token_details"]["reasoning"] == 7
        return message

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        message = self._invoke(stream, {"prompt_tokens_details": {"cached_tokens": 30}})
        assert message.usage_metadata is not None
        assert message.usage_metadata["input_token_details"]["cache_read"] == 30
        return message


class TestScriptedUnit(Scripted, ChatModelUnitTests):  # type: ignore[misc]
    pass


class TestScriptedIntegration(Scripted, ChatModelIntegrationTests):  # type: ignore[misc]
    pass


class TestRemoteUnit(Remote, ChatModelUnitTests):  # type: ignore[misc]
    pass


class TestRemoteIntegration(Remote, ChatModelIntegrationTests):  # type: ignore[misc]
    pass
