"""Log-probabilities, penalties and biases of local models, as the SDK and the server ask for them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from viaticum.catalogue import Catalogue
from viaticum.decoders import Result
from viaticum.decoders.request import TokenLogprobs
from viaticum.errors import InputError
from viaticum.models.base import Generation
from viaticum.models.local import LocalModels
from viaticum.models.logprobs import openai_logprobs, token_bytes
from viaticum.types import Completion, Message, Trace

CHAT: list[Message] = [{"role": "user", "content": "How many?"}]
ASKED = {"logprobs": True, "top_logprobs": 2}


def written(entries: Any) -> bytes:
    return b"".join(bytes(each["bytes"]) for each in entries)


@pytest.mark.parametrize("name", ["tiny-small", "tiny-pair"])
def test_the_bytes_of_the_tokens_make_the_text(tiny_catalogue: Catalogue, name: str) -> None:
    model = LocalModels(tiny_catalogue).model(name)
    plain = model.generate(CHAT, Generation(60, temperature=1, seed=2))
    assert plain.logprobs == ()
    found = model.generate(CHAT, Generation(60, temperature=1, seed=2, extra=ASKED))
    assert found.text == plain.text
    assert written(found.logprobs).decode(errors="replace") == found.text
    assert max(each["logprob"] for each in found.logprobs) <= 0
    for each in found.logprobs:
        first, second = each["top_logprobs"]
        assert first["logprob"] >= max(second["logprob"], each["logprob"])
        assert bytes(first["bytes"]).decode(errors="replace") == first["token"]
    assert json.loads(json.dumps(found.logprobs, allow_nan=False)) == list(found.logprobs)


def test_a_stop_string_is_cut_from_the_tokens_too(tiny_catalogue: Catalogue) -> None:
    model = LocalModels(tiny_catalogue).model("tiny-small")
    whole = model.generate(CHAT, Generation(60, temperature=1, seed=2))
    stop = next(
        text for at in range(10, 50) if (text := whole.text[at : at + 2]).isascii() and len(text) == 2
    )
    cut = model.generate(CHAT, Generation(60, temperature=1, seed=2, stop=(stop,), extra={"logprobs": True}))
    assert cut.finish_reason == "stop"
    assert written(cut.logprobs).decode(errors="replace") == cut.text == whole.text[: whole.text.index(stop)]
    assert all(each["top_logprobs"] == [] for each in cut.logprobs)


def test_settings_reach_the_decoder(tiny_catalogue: Catalogue) -> None:
    model = LocalModels(tiny_catalogue).model("tiny-pair")

    def tokens(**settings: Any) -> tuple[int, ...]:
        completion = model.generate(CHAT, Generation(50, **settings))
        assert isinstance(completion, Completion)
        assert completion.trace is not None
        return completion.trace.tokens

    plain = tokens()
    assert len(set(tokens(frequency_penalty=2.0, presence_penalty=2.0))) > len(set(plain))
    assert len(set(tokens(repetition_penalty=5.0))) > len(set(plain))
    assert plain[0] not in tokens(logit_bias={plain[0]: -100.0})
    with pytest.raises(InputError, match="logit_bias"):
        tokens(logit_bias={100_000: 1.0})
    with pytest.raises(InputError, match="runs locally and cannot do: tools"):
        tokens(extra={"tools": []})


def test_bytes_of_tokens_of_any_vocabulary() -> None:
    class Pieces:
        """As a SentencePiece tokenizer: it drops the space before the first word."""

        def convert_ids_to_tokens(self, token: int) -> str | None:
            return {0: "\u2581to", 1: "<0xE2>", 2: "\u00e9t", 3: "<|end|>"}.get(token)

        def decode(self, ids: list[int]) -> str:
            return {0: "to", 1: "\ufffd", 2: "\u00e9t", 3: "<|end|>"}[ids[0]]

    found = [token_bytes(Pieces(), token, {3}) for token in range(5)]
    assert found == [b" to", b"\xe2", "\u00e9t".encode(), b"<|end|>", b""]


def test_no_token_is_lost_where_a_text_ends_within_a_character(tiny_catalogue: Catalogue) -> None:
    tokenizer = LocalModels(tiny_catalogue).model("tiny-small").tokenizer
    tokens = tokenizer.encode("a\u65e5")[:-1]  # two of its three bytes, then a stop id
    trace = Trace(("s", "l"), (*tokens, tokenizer.eos_token_id), (1,) * 4, (0.0,) * 4)
    entries = tuple(TokenLogprobs(token, -0.5) for token in tokens)
    result = Result(tokenizer.decode(tokens), "stop", trace, {}, 1.0, logprobs=entries)
    assert written(openai_logprobs(result, tokenizer)) == "a\u65e5".encode()[:-1]


def test_added_tokens_are_asked_for_once_a_text() -> None:
    """A tokenizer lists them anew each time, which took longer than writing the text."""

    class Listing:
        listed = 0

        def convert_ids_to_tokens(self, token: int) -> str:
            return "\u0120" if token == 1 else "a"

        def decode(self, ids: list[int]) -> str:
            return " " if ids == [1] else "a"

        @property
        def added_tokens_decoder(self) -> dict[int, str]:
            self.listed += 1
            return {}

    tokenizer = Listing()
    entry = TokenLogprobs(0, -0.5, ((0, -0.5), (1, -1.0)))
    result = Result(
        "aaa", "length", Trace(("s", "l"), (0,) * 3, (1,) * 3, (0.0,) * 3), {}, 1.0, logprobs=(entry,) * 3
    )
    items = openai_logprobs(result, tokenizer)
    assert [item["token"] for item in items] == ["a"] * 3
    assert [each["token"] for each in items[0]["top_logprobs"]] == ["a", " "]
    assert tokenizer.listed == 1
