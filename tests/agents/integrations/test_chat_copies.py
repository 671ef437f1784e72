"""Copies, pickles, token counts and cache keys of the chat model."""

from __future__ import annotations

import copy
import pickle
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.messages import HumanMessage
from langchain_core.runnables import ConfigurableField
from openai_server import OpenAIServer, spec_for
from viaticum_server import write_catalogue

from viaticum import BudgetExceeded, ChatViaticum, FakeRouter, InputError, Viaticum
from viaticum.catalogue import Catalogue


def chat_in(folder: Path, **settings: Any) -> ChatViaticum:
    folder.mkdir(exist_ok=True)
    given = {"model": "fast", "budget": "0.01", "catalogue": write_catalogue(folder), "folder": folder}
    return ChatViaticum(**{**given, **settings})


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, copy.copy, lambda chat: chat.model_copy(), lambda chat: pickle.loads(pickle.dumps(chat))],
    ids=["deepcopy", "copy", "model_copy", "pickle"],
)
def test_a_copy_answers_and_spends_from_the_same_budget(tmp_path: Path, again: Any, opened: bool) -> None:
    with chat_in(tmp_path) as chat:
        if opened:
            chat.invoke("hi")
        copied = again(chat)
        assert copied.model_name == "fast"
        before = chat.left().posted_nanousd
        assert copied.invoke("hi").content
        assert chat.left().posted_nanousd > before
        copied.close()
        assert chat.invoke("hi").content


def test_a_copy_of_a_chat_with_an_open_client_shares_it_and_a_pickle_is_refused(tmp_path: Path) -> None:
    with Viaticum("0.01", catalogue=write_catalogue(tmp_path), folder=tmp_path) as client:
        chat = ChatViaticum(client=client, model="fast", stop=["x"])
        copied = copy.deepcopy({"chat": [chat]})["chat"][0]
        assert copied.client is client
        copied.stop.append("y")
        assert chat.stop == ["x"]
        with pytest.raises(InputError, match="cannot be pickled; give it budget"):
            pickle.dumps(chat)


def test_configured_copies_do_not_renew_the_budget(tmp_path: Path) -> None:
    chat = chat_in(tmp_path, budget="0.0025", max_tokens=1000)
    configured = chat.configurable_fields(temperature=ConfigurableField(id="temperature"))
    answers = 0
    with suppress(BudgetExceeded):
        for answers in range(200):  # noqa: B007
            configured.with_config(configurable={"temperature": 0.5}).invoke("hi")
    assert answers < 199
    assert chat.left().posted_nanousd <= 2_500_000
    chat.close()


def test_tokens_are_counted_without_a_network(
    tmp_path: Path, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network is not to be used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    catalogue = Catalogue.load(write_catalogue(tmp_path)).with_models(spec_for(server))
    for model, tokens in (("fast", 2), ("fast+cot", 2), ("far", 8), ("auto", 8)):
        with chat_in(tmp_path / model, model=model, catalogue=catalogue) as chat:
            assert chat.get_num_tokens("hi there") == tokens
            few = chat.get_num_tokens_from_messages([HumanMessage("hi")])
            assert 0 < few < chat.get_num_tokens_from_messages([HumanMessage("hi " * 50)])
            with pytest.raises(InputError, match="use get_num_tokens"):
                chat.get_token_ids("hi")
    with chat_in(tmp_path / "own", custom_get_token_ids=lambda text: [1] * len(text)) as chat:
        assert (chat.get_num_tokens("hi"), chat.get_token_ids("hi")) == (2, [1, 1])


def test_a_cache_of_answers_knows_the_router_and_the_catalogue(tmp_path: Path) -> None:
    cache, catalogue = InMemoryCache(), Catalogue.load(write_catalogue(tmp_path))

    def ask(**settings: Any) -> str:
        given = {"model": "auto", "catalogue": catalogue, "router": FakeRouter("fast+cot")}
        with chat_in(tmp_path, cache=cache, **{**given, **settings}) as chat:
            return str(chat.invoke("What is 6 times 7?").content)

    assert "42" in ask()
    mute = FakeRouter("mute+cot")
    assert "I cannot tell" in ask(router=mute)
    assert len(cache._cache) == 2
    assert "I cannot tell" in ask(router=mute)
    assert len(cache._cache) == 2
    ask(router=mute, policy="best")
    assert len(cache._cache) == 3
    other = catalogue.with_models(catalogue["fast"].model_copy(update={"text": "Forty-two."}))
    assert ask(model="fast", catalogue=catalogue) != ask(model="fast", catalogue=other)
