"""Remote models that think, through a real LiteLLM: fields, tags, usage, cost, stop strings and cut calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from openai_server import OpenAIServer, spec_for

from viaticum.agents.workflow.calls import Calls, SettledCall
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue
from viaticum.models.base import Generation
from viaticum.models.remote.model import RemoteModel
from viaticum.types import Completion, Message, ThinkingDelta

CHAT: list[Message] = [{"role": "user", "content": "What is 2 + 2?"}]
THOUGHT = "two and two \n\n make four"
PROVIDERS = pytest.mark.parametrize("litellm_model", ["openai/fake", "hosted_vllm/fake"])
STREAMS = pytest.mark.parametrize("streams", [True, False])


def ask(
    server: OpenAIServer, generation: Generation | None = None, **fields: Any
) -> tuple[str, str, Completion]:
    """(streamed text, streamed thought, completion)."""
    model = RemoteModel(spec_for(server, **fields), sleep=lambda _: None)
    *pieces, completion = model.stream(CHAT, generation or Generation(50))
    assert isinstance(completion, Completion)
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return text, "".join(piece.text for piece in pieces if isinstance(piece, ThinkingDelta)), completion


def check(got: tuple[str, str, Completion], text: str, thinking: str) -> None:
    assert (got[0], got[1]) == (text, thinking)
    assert (got[2].text, got[2].thinking) == (text, thinking)


@PROVIDERS
@STREAMS
@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking_blocks", "reasoning_details"])
def test_a_thought_in_a_field_of_its_own(
    server: OpenAIServer, litellm_model: str, streams: bool, name: str
) -> None:
    if streams and name in ("thinking_blocks", "reasoning_details"):
        pytest.skip(
            "LiteLLM drops the chunks of these fields; providers stream one of the others beside them"
        )
    server.thought, server.thought_as, server.text = THOUGHT, name, "\n\nThe answer is 4."
    got = ask(server, litellm_model=litellm_model, streams=streams)
    check(got, "The answer is 4.", THOUGHT)
    count = got[2].usage.models["far"]
    assert count.output_tokens == 9
    assert 0 < count.reasoning_tokens < 9  # this server does not count them: the thought's share


@STREAMS
@pytest.mark.parametrize("piece", [None, 1, 3])
def test_a_thought_between_tags(server: OpenAIServer, streams: bool, piece: int | None) -> None:
    server.thought, server.thought_as, server.text, server.piece = THOUGHT, "tags", "The answer is 4.", piece
    check(ask(server, streams=streams), "The answer is 4.", THOUGHT)
    check(ask(server, streams=streams, thinking=True), "The answer is 4.", THOUGHT)
    if streams:  # of a whole answer LiteLLM itself takes the tags away
        kept = ask(server, thinking=False)
        check(kept, f"<think>\n{THOUGHT}\n</think>\n\nThe answer is 4.", "")


@STREAMS
def test_only_a_closing_tag(server: OpenAIServer, streams: bool) -> None:
    server.thought, server.thought_as, server.text = THOUGHT, "closing tag", "The answer is 4."
    check(ask(server, streams=streams, thinking=True), "The answer is 4.", THOUGHT)
    check(ask(server, streams=streams, litellm_model="openai/deepseek-r1"), "The answer is 4.", THOUGHT)


@STREAMS
def test_an_unclosed_thought_leaves_no_text(server: OpenAIServer, streams: bool) -> None:
    server.thought, server.thought_as = THOUGHT, "unclosed"
    got = ask(server, streams=streams)
    check(got, "", THOUGHT)
    assert got[2].finish_reason == "length"


def test_a_model_of_a_thinking_family_that_did_not_think(server: OpenAIServer) -> None:
    server.text = "The answer is 4."
    assert ask(server, litellm_model="openai/deepseek-r1")[2].text == "The answer is 4."
    off = Generation(50, chat_template_kwargs={"enable_thinking": False})
    check(ask(server, off, litellm_model="openai/deepseek-r1"), "The answer is 4.", "")


@STREAMS
def test_stop_strings_are_not_looked_for_in_the_thought(server: OpenAIServer, streams: bool) -> None:
    server.thought, server.thought_as, server.text = THOUGHT, "tags", "The answer is 4.\n\nQuestion: more"
    got = ask(server, Generation(50, stop=("\n\nQuestion",)), streams=streams, thinking=True)
    check(got, "The answer is 4.", THOUGHT)
    assert got[2].finish_reason == "stop"
    assert "stop" not in server.requests[-1]
    assert got[2].usage.models["far"].output_tokens == 13  # all that the provider wrote is paid for
    ask(server, Generation(50, stop=("\n\nQuestion",)), streams=streams)
    assert server.requests[-1]["stop"] == ["\n\nQuestion"]  # a model that is not known to think


@STREAMS
def test_reasoning_tokens_that_the_provider_counts_are_priced_once(
    server: OpenAIServer, streams: bool
) -> None:
    server.thought, server.text = THOUGHT, "The answer is 4."
    server.usage = {"completion_tokens_details": {"reasoning_tokens": 5}}
    spec = spec_for(server, streams=streams, reasoning_price="10")
    with Ledger("memory:") as ledger:
        ledger.create("b", limit_nanousd=10**9)
        model = RemoteModel(spec)
        calls = Calls(Catalogue([spec]), ledger, lambda name: model)
        *_, done = calls.stream("b", "k", "far", CHAT, Generation(50))
        assert isinstance(done, SettledCall)
        # 5 words of prompt at 1, 4 of the answer at 2, and 5 of the thought at 10 dollars a million
        assert done.entry.nanousd == 5 * 1000 + 4 * 2000 + 5 * 10_000
        # the same key again: thought and text as they were, nothing charged
        again: Sequence[object] = list(calls.stream("b", "k", "far", CHAT, Generation(50)))
        assert again[:2] == [ThinkingDelta(THOUGHT), "The answer is 4."]
        assert ledger.budget("b").posted_nanousd == done.entry.nanousd


def test_a_cut_call_pays_for_its_thought(server: OpenAIServer) -> None:
    server.thought, server.thought_as = "word " * 50, "tags"
    spec = spec_for(server)
    with Ledger("memory:") as ledger:
        ledger.create("b", limit_nanousd=10**9)
        model = RemoteModel(spec)
        events = Calls(Catalogue([spec]), ledger, lambda name: model).stream(
            "b", "k", "far", CHAT, Generation(1000)
        )
        seen = [next(events) for _ in range(20)]
        assert all(isinstance(each, ThinkingDelta) for each in seen)
        events.close()  # type: ignore[attr-defined]
        (post,) = [entry for entry in ledger.entries(key="k") if entry.kind == "post"]
        written = "<think>\n" + "word " * 20
        assert post.usage["far"].output_tokens >= len(written.strip())


@STREAMS
def test_thirty_thousand_words_of_thought(server: OpenAIServer, streams: bool) -> None:
    server.thought = " ".join(str(number) for number in range(30_000))
    server.thought_as, server.text, server.piece = "tags", "The answer is 4.", 997
    text, thinking, completion = ask(server, Generation(32_000), context_length=40_000, streams=streams)
    assert (text, completion.thinking, thinking) == ("The answer is 4.", server.thought, server.thought)
    count = completion.usage.models["far"]
    assert count.output_tokens == 30_000 + 6
    assert 29_900 < count.reasoning_tokens < count.output_tokens
