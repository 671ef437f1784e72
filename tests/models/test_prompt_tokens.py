"""How prompts are counted for holds: by a named tokenizer, by bytes, or by a ratio whose overruns show."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from openai_server import KEY, OpenAIServer, running_server
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers

from viaticum.agents.server.admission import ConcurrencyLimiter
from viaticum.agents.server.metrics import Metrics
from viaticum.agents.workflow.calls import Calls, SettledCall
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import BudgetExceeded, InputError
from viaticum.models.base import Generation
from viaticum.models.remote.model import RemoteModel
from viaticum.models.remote.prompt_tokens import (
    FIRST_CALLS,
    LAST_CALLS,
    LONGEST_FILE,
    PromptRatio,
    named_counter,
    ratio_file,
)
from viaticum.types import Message

CHAT: list[Message] = [{"role": "user", "content": "word " * 200}]


@pytest.fixture(scope="module")
def running() -> Iterator[OpenAIServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def server(running: OpenAIServer) -> OpenAIServer:
    running.reset()
    return running


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path / "cache"))


def spec_for(server: OpenAIServer | None = None, **fields: Any) -> ModelSpec:
    values: dict[str, Any] = {
        "name": "far",
        "description": "Far away.",
        "kind": "remote",
        "context_length": 10_000,
        "input_price": Decimal(1),
        "output_price": Decimal(1),
        "litellm_model": "openai/far",
        "api_base": "http://127.0.0.1:1" if server is None else server.url,
    }
    return ModelSpec(**{**values, **fields})


def write_tokenizer(folder: Path) -> Path:
    """Words are tokens; a special token spells a whole text, which a provider may read as its letters."""
    tokenizer = Tokenizer(models.WordLevel({"word": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["a b c d"])
    tokenizer.enable_truncation(5)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_named_tokenizer_counts_a_prompt(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path)
    known = RemoteModel(spec_for(tokenizer=str(path)), key=KEY)
    assert known.count("word " * 200) == 210  # and a twentieth more; truncation is not heeded
    assert known.count("a b c d") == 5  # four, not the special token's one
    assert known.counting_hint == ""
    unknown = RemoteModel(spec_for(), key=KEY)
    assert unknown.count("word " * 200) == 1000
    assert "every byte counts" in unknown.counting_hint
    assert RemoteModel(spec_for(tokenizer="o200k_base"), key=KEY).count("word " * 200) < 250


def test_an_encoding_of_openai_counts_special_tokens_as_text() -> None:
    for name in ("cl100k_base", "o200k_base"):
        assert named_counter(name)("<|endoftext|>") > 1


def test_a_tokenizer_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        spec_for(tokenizer="tokenizer.json")  # beside what?
    with pytest.raises(InputError, match=r"cannot read the tokenizer .*nowhere"):
        RemoteModel(spec_for(tokenizer=str(tmp_path / "nowhere")), key=KEY).count("x")
    broken = tmp_path / "tokenizer.json"
    for text in ("{", "[]", json.dumps({"model": 5})):
        broken.write_text(text)
        named_counter.__globals__["_from_file"].cache_clear()
        with pytest.raises(InputError, match=r"is no tokenizer\.json"):
            named_counter(str(broken))("x")


def test_how_a_prompt_is_counted_is_no_part_of_an_answer(tmp_path: Path) -> None:
    assert spec_for(tokenizer="o200k_base", holds="estimated").identity == spec_for().identity
    with pytest.raises(ValidationError, match="takes no"):
        ModelSpec(name="s", description="s", kind="scripted", context_length=10, holds="estimated")


def test_a_ratio_is_believed_after_some_calls_and_never_above_the_bytes() -> None:
    ratio = PromptRatio()
    for _ in range(FIRST_CALLS):
        assert ratio.estimate(1000) == 1000
        ratio.learn(1000, 250)
    assert ratio.estimate(1000) == 300  # and a fifth more
    ratio.learn(0, 5)
    ratio.learn(1000, 0)
    assert ratio.estimate(1000) == 300
    ratio.learn(1000, 900)
    assert ratio.estimate(1000) == 1000


def test_ratios_are_kept_for_later_processes(tmp_path: Path) -> None:
    file = tmp_path / "ratios" / "a.txt"
    for _ in range(FIRST_CALLS):  # a process a call, as the command line has them
        PromptRatio(file).learn(1000, 250)
    assert PromptRatio(file).estimate(1000) == 300
    file.write_text("nonsense\nnan\n-1\n" + file.read_text() + "0.4")  # the end of one that was killed
    assert PromptRatio(file).estimate(1000) == 480
    file.write_text("0.9\n" + "0.1\n" * LONGEST_FILE)
    assert PromptRatio(file).estimate(1000) == 120
    assert len(file.read_text().splitlines()) == LAST_CALLS
    file.write_bytes(b"\xff\xfe")
    assert PromptRatio(file).estimate(1000) == 1000
    folder = PromptRatio(tmp_path)  # which cannot be written
    folder.learn(1000, 250)
    assert folder.estimate(1000) == 1000


def test_ratios_are_kept_a_model_and_address_and_only_where_they_hold(
    tmp_path: Path,
) -> None:
    RemoteModel(spec_for(), key=KEY)._ratio.learn(1000, 250)
    assert not list(tmp_path.rglob("*.txt"))
    for _ in range(FIRST_CALLS):
        RemoteModel(spec_for(holds="estimated"), key=KEY)._ratio.learn(1000, 250)
    assert RemoteModel(spec_for(holds="estimated"), key=KEY)._ratio.estimate(1000) == 300
    assert ratio_file("openai/x", None) != ratio_file("openai/x", "http://127.0.0.1") != ratio_file("x", None)


def test_estimated_holds_are_small_and_their_overruns_are_reported(
    server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_for(server, holds="estimated")
    model = RemoteModel(spec, key=KEY)
    with Ledger("memory:") as ledger:
        ledger.create("b", limit_nanousd=10**9)
        calls = Calls(Catalogue([spec]), ledger, lambda name: model)

        def ask(number: int, tokens: int) -> SettledCall:
            server.usage = {"prompt_tokens": tokens, "total_tokens": tokens + 5}
            *_, last = calls.stream("b", f"k{number}", "far", CHAT, Generation(50))
            assert isinstance(last, SettledCall)
            return last

        first = model.worst_case_of(CHAT, Generation(50))["far"].input_tokens
        for number in range(FIRST_CALLS):
            assert ask(number, 220).entry.overrun == 0
        later = model.worst_case_of(CHAT, Generation(50))["far"]
        assert later.input_tokens < first / 3
        assert later.output_tokens == 50  # the provider is told this limit, so it stays
        with caplog.at_level(logging.WARNING, "viaticum"):
            entry = ask(FIRST_CALLS, 900).entry
        assert entry.overrun == entry.nanousd - (later.input_tokens + later.output_tokens) * 1000 > 0
        assert "more than was held for it" in caplog.text
        assert ledger.overruns == {entry.key: entry.overrun}
        page = Metrics(ConcurrencyLimiter(1, 1)).render(ledger).decode()
        assert f"viaticum_overrun_dollars {entry.overrun / 1e9}" in page
        assert model.worst_case_of(CHAT, Generation(50))["far"].input_tokens >= 900  # it has learned
        assert ledger.check() == []


def test_a_refusal_says_what_is_large_and_what_would_help(server: OpenAIServer) -> None:
    spec = spec_for(server)
    model = RemoteModel(spec, key=KEY)
    with Ledger("memory:") as ledger:
        ledger.create("b", limit_nanousd=1_000)
        calls = Calls(Catalogue([spec]), ledger, lambda name: model)
        with pytest.raises(BudgetExceeded) as refused:
            list(calls.stream("b", "k", "far", [{"role": "user", "content": "2+2"}], Generation(1024)))
    assert str(refused.value) == (
        "budget 'b' has $0.000001 left, the call may cost $0.001107: far $0.000083 for a prompt of up to 83 "
        "tokens, $0.001024 for up to 1024 new ones; no tokenizer of far is known, so every byte counts as a "
        "token, which is several times too many: name one in its entry (tokenizer), or hold by estimates "
        '(holds = "estimated"); raise the limit, allow fewer new tokens (max_tokens) or choose a cheaper '
        "model"
    )
    assert (refused.value.needed, refused.value.left, refused.value.budget) == (1_107_000, 1_000, "b")
    assert server.requests == []
