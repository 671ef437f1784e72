"""Log-probabilities, penalties and biases of local models, as the SDK and the server ask for them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from viaticum.catalogue import Catalogue
from viaticum.errors import InputError
from viaticum.models.base import Generation
from viaticum.models.local import LocalModels
from viaticum.models.logprobs import token_bytes
from viaticum.types import Completion, Message

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

        def __init__(self) -> None:
            self.added_tokens_decoder = {3: "<|end|>"}

        def convert_ids_to_tokens(self, token: int) -> str | None:
            return {0: "\u2581to", 1: "<0xE2>", 2: "\u00e9t", 3: "<|end|>"}.get(token)

        def decode(self, ids: list[int]) -> str:
            return {0: "to", 1: "\ufffd", 2: "\u00e9t", 3: "<|end|>"}[ids[0]]

    found = [token_bytes(Pieces(), token) for token in range(5)]
    assert found == [b" to", b"\xe2", "\u00e9t".encode(), b"<|end|>", b""]
