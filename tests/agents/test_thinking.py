"""A provider that thinks, behind every way to ask: solve, batch, serve, LangChain, LiteLLM, the command line.

In each way it shows its thought: fields, tags, a closing tag alone, and a thought that never ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai_server import OpenAIServer, spec_for
from typer.testing import CliRunner
from viaticum_server import RunningServer, serving

from viaticum import ChatViaticum, FakeRouter, ScriptedModel, Viaticum
from viaticum.agents.batch.results import paid_calls
from viaticum.agents.batch.run import run_batch
from viaticum.agents.integrations.litellm_provider import register
from viaticum.agents.workflow.events import TextPiece, ThinkingPiece
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue
from viaticum.cli import app
from viaticum.jobs import read_rows
from viaticum.models.base import Generation
from viaticum.models.remote.request import load_litellm
from viaticum.types import Answer

QUESTION = "What is 2 + 2?"
THOUGHT = "Maybe the answer is 5.\n\nNo: two and two make four."
TEXT = "The answer is 4."
WAYS = pytest.mark.parametrize("shown", ["reasoning_content", "reasoning", "tags", "closing tag"])
PROGRAM = "```python\nanswer = 2 + 2\nprint(answer)\n```"


def a_client(server: OpenAIServer, folder: Path, pair: str = "far+cot", **fields: object) -> Viaticum:
    spec = spec_for(server, thinking=True, **fields)
    return Viaticum("1", catalogue=Catalogue([spec]), router=FakeRouter(pair), folder=folder)


def think(server: OpenAIServer, shown: str, thought: str = THOUGHT, text: str = TEXT) -> None:
    server.thought, server.thought_as, server.text = thought, shown, text


def cost_of(server: OpenAIServer, extra: int = 0) -> int:
    """Nano-dollars of the last call: 1 for a word of the prompt, 2 for one that was written, in thousands."""
    read = sum(len(each["content"].split()) for each in server.requests[-1]["messages"])
    return 1000 * read + 2000 * (len(f"{server.thought} {server.text}".split()) + extra)


@WAYS
def test_solve(server: OpenAIServer, tmp_path: Path, shown: str) -> None:
    think(server, shown)
    with a_client(server, tmp_path) as client:
        *events, answer = client.stream(QUESTION, kind="number")
        assert isinstance(answer, Answer)
        assert (answer.value, answer.text, answer.thinking) == ("4", TEXT, THOUGHT)
        assert "".join(each.text for each in events if isinstance(each, TextPiece)) == TEXT
        assert "".join(each.text for each in events if isinstance(each, ThinkingPiece)) == THOUGHT
        tags = {"tags": 2, "closing tag": 1}.get(shown, 0)
        assert answer.cost == cost_of(server, tags) == client.budget().posted_nanousd
        assert 0 < answer.usage.reasoning_tokens < answer.usage.output_tokens
        assert client.ledger.check() == []


@pytest.mark.parametrize("thinking", [True, "auto"])
def test_a_thought_that_is_not_closed_is_no_answer(
    server: OpenAIServer, tmp_path: Path, thinking: Any
) -> None:
    think(server, "unclosed", "The answer is 5.")
    spec = spec_for(server, thinking=thinking)
    with Viaticum("1", catalogue=Catalogue([spec]), router=FakeRouter("far+cot"), folder=tmp_path) as client:
        answer = client.solve(QUESTION, kind="number")
        assert (answer.value, answer.text, answer.thinking) == (None, "", "The answer is 5.")
        assert answer.finish_reason == "length"
        assert "thought" in answer.reason
        assert answer.cost == client.budget().posted_nanousd > 0


def test_thirty_thousand_words_of_thought(server: OpenAIServer, tmp_path: Path) -> None:
    thought = " ".join(f"step{number}" for number in range(30_000))
    think(server, "tags", thought)
    server.piece = 1009
    with a_client(server, tmp_path, "far+chat", context_length=64_000) as client:
        answer = client.solve(QUESTION)
        assert (answer.value, answer.thinking) == (TEXT, thought)
        assert client.ledger.check() == []


@WAYS
def test_a_program_after_a_thought_with_programs_in_it(
    server: OpenAIServer, tmp_path: Path, shown: str
) -> None:
    think(server, shown, "Perhaps\n\n```python\nprint(5)\n```\n\nno.", PROGRAM)
    with a_client(server, tmp_path, "far+pot") as client:
        answer = client.solve(QUESTION, kind="number")
        assert (answer.value, answer.text) == ("4", PROGRAM)


def test_a_program_in_an_unclosed_thought_is_not_run(server: OpenAIServer, tmp_path: Path) -> None:
    think(server, "unclosed", f"Perhaps\n\n{PROGRAM}\n")
    with a_client(server, tmp_path, "far+pot") as client:
        assert client.solve(QUESTION, kind="number").value is None


@WAYS
def test_batch(server: OpenAIServer, tmp_path: Path, shown: str) -> None:
    think(server, shown)
    questions = [{"id": f"q{number}", "question": QUESTION, "kind": "number"} for number in range(3)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in questions))
    settings: dict[str, Any] = {
        "budget": "1",
        "catalogue": Catalogue([spec_for(server, thinking=True)]),
        "router": FakeRouter("far+cot"),
        "ledger": tmp_path / "ledger.db",
        "keep_texts": True,
    }
    run_batch(source, tmp_path / "out.jsonl", **settings)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["4"] * 3
    assert [(row["text"], row["thinking"]) for row in rows] == [(TEXT, THOUGHT)] * 3
    assert rows[0]["cost_nanousd"] == cost_of(server, {"tags": 2, "closing tag": 1}.get(shown, 0))
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.check() == []


@pytest.fixture
def ours(server: OpenAIServer, tmp_path: Path) -> Iterator[RunningServer]:
    with serving(tmp_path, catalogue=Catalogue([spec_for(server, thinking=True)])) as running:
        yield running


@WAYS
@pytest.mark.parametrize("model", ["far", "far+cot"])
def test_serve(server: OpenAIServer, ours: RunningServer, shown: str, model: str) -> None:
    think(server, shown)
    whole = ours.ask(model).json()
    message = whole["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == (TEXT, THOUGHT)
    usage = whole["usage"]
    reasoning = usage["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < reasoning < usage["completion_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    lines = ours.ask(model, stream=True).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(each.get("content", "") for each in deltas) == TEXT
    assert "".join(each.get("reasoning_content", "") for each in deltas) == THOUGHT
    ours.assert_settled()


def test_thoughts_that_a_client_sends_back_are_dropped(server: OpenAIServer, ours: RunningServer) -> None:
    thought = {"type": "thinking", "thinking": "aha"}
    assistants: list[dict[str, Any]] = [
        {"role": "assistant", "content": "4", "reasoning_content": "aha"},
        {"role": "assistant", "content": "4", "reasoning": "aha"},
        {"role": "assistant", "content": [thought, {"type": "text", "text": "4"}]},
    ]
    for assistant in assistants:
        user = {"role": "user", "content": QUESTION}
        assert ours.ask("far", messages=[user, assistant, user]).status_code == 200
        assert server.requests[-1]["messages"][1] == {"role": "assistant", "content": "4"}
    cut = {"role": "assistant", "content": None, "reasoning_content": "aha"}
    assert ours.ask("far", messages=[user, cut, user]).status_code == 200
    refused = ours.ask("far", messages=[{"role": "user", "content": [thought]}])
    assert (refused.status_code, "only an assistant" in refused.text) == (400, True)


@WAYS
@pytest.mark.parametrize("name", ["far", "far+cot"])
async def test_langchain(server: OpenAIServer, tmp_path: Path, shown: str, name: str) -> None:
    think(server, shown)
    catalogue = Catalogue([spec_for(server, thinking=True)])
    with ChatViaticum(model=name, budget="1", catalogue=catalogue, folder=tmp_path) as chat:
        message = chat.invoke(QUESTION)
        assert message.additional_kwargs["reasoning_content"] == THOUGHT
        assert message.content_blocks == [
            {"type": "reasoning", "reasoning": THOUGHT},
            {"type": "text", "text": TEXT},
        ]
        assert message.usage_metadata is not None
        assert message.usage_metadata["output_token_details"]["reasoning"] > 0
        chunks = [chunk async for chunk in chat.astream(QUESTION)]
        assert "".join(str(chunk.content) for chunk in chunks) == TEXT
        thoughts = [chunk.additional_kwargs.get("reasoning_content", "") for chunk in chunks]
        assert "".join(thoughts) == THOUGHT
        chat.invoke([("user", QUESTION), message, ("user", "Sure?")])
        assert "two and two" not in json.dumps(server.requests[-1]["messages"])


def test_litellm(server: OpenAIServer, tmp_path: Path) -> None:
    think(server, "tags")
    litellm = load_litellm()
    register(budget="1", catalogue=Catalogue([spec_for(server, thinking=True)]), folder=tmp_path)
    asked: dict[str, Any] = {
        "model": "viaticum/far",
        "messages": [{"role": "user", "content": QUESTION}],
    }
    whole = litellm.completion(**asked)
    message = whole.choices[0].message
    assert (message.content, message.reasoning_content) == (TEXT, THOUGHT)
    assert whole.usage.completion_tokens_details.reasoning_tokens > 0
    deltas = [chunk.choices[0].delta for chunk in litellm.completion(**asked, stream=True) if chunk.choices]
    assert "".join(each.content or "" for each in deltas) == TEXT
    assert "".join(getattr(each, "reasoning_content", None) or "" for each in deltas) == THOUGHT


CATALOGUE = """
[models.thinker]
kind = "scripted"
description = "d"
context_length = 8192
input_price = 1
output_price = 1
text = "<think>\\nMaybe 5.\\n</think>\\n\\nThe answer is 4."
"""


@pytest.mark.parametrize("flag", [[], ["--thinking"], ["--hide-thinking"]])
def test_the_command_line_writes_thoughts_to_stderr(tmp_path: Path, flag: list[str]) -> None:
    file = tmp_path / "catalogue.toml"
    file.write_text(CATALOGUE)
    options = [*flag, "--catalogue", str(file), "--model", "thinker", "--folder", str(tmp_path)]
    ran = CliRunner().invoke(app, ["chat", *options], input="What is 2 + 2?\n")
    assert ran.exit_code == 0, ran.output
    assert ran.stdout == "The answer is 4.\n"
    assert ("Maybe 5." in ran.stderr) == (flag == ["--thinking"])  # by default on a terminal alone


def test_a_scripted_model_thinks() -> None:
    model = ScriptedModel("<think>\none two\n\nthree\n</think>\n\nfour\n\nfive")
    *_, done = model.stream([{"role": "user", "content": "?"}], Generation(stop=("\n\n",)))
    assert (done.text, done.thinking) == ("four", "one two\n\nthree")  # type: ignore[union-attr]
    count = done.usage.models["scripted"]  # type: ignore[union-attr]
    assert (count.output_tokens, count.reasoning_tokens) == (4, 3)
    cut = ScriptedModel("<think>one two three").generate([], Generation(2))
    assert (cut.text, cut.thinking, cut.finish_reason) == ("", "one two", "length")


def test_a_batch_in_openai_s_format_says_how_many_tokens_were_thought(
    server: OpenAIServer, tmp_path: Path
) -> None:
    think(server, "reasoning_content")
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked = {"model": "far", "messages": [{"role": "user", "content": QUESTION}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": asked}
    source.write_text(json.dumps(line) + "\n")
    catalogue, router = Catalogue([spec_for(server, thinking=True)]), FakeRouter("far+cot")
    ended = run_batch(
        source, out, budget="1", catalogue=catalogue, router=router, ledger=tmp_path / "ledger.db"
    )
    body = json.loads(out.read_text())["response"]["body"]
    (row,) = read_rows(ended.folder)
    reasoning = body["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert body["choices"][0]["message"]["reasoning_content"] == THOUGHT
    assert 0 < reasoning == sum(call.reasoning_tokens for call in row.calls)
    assert reasoning < body["usage"]["completion_tokens"]
    with Ledger(tmp_path / "ledger.db") as ledger:
        (hold,) = ledger.holds()
        (rebuilt,), _ = paid_calls(ledger, hold.key.removesuffix("/0"))
    assert rebuilt.reasoning_tokens == reasoning
