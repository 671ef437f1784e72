"""The generation APIs of vLLM and SGLang over token ids: request bodies, and what answers say.

vLLM: its OpenAI-compatible `/v1/completions` with `return_token_ids`. SGLang: its own `/generate`. Both are
asked for greedy tokens with the log probabilities of the most probable ones; penalties that a server would
take from the model's generation config are switched off. Leaves out HTTP (`decoders.served_connection`) and
slots (`decoders.served_runner`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from viaticum.errors import ModelError

Json = dict[str, Any]
GIVEN_UP = (
    "abort",
    "error",
)  # why a text ends that the server did not finish; what comes with it is left out
TOKEN_ID = "token_id:"  # how vLLM writes a token where asked for ids
CUMULATIVE_STREAM = 32  # tokens: a stream that repeats itself grows with the square of its length


@dataclass(frozen=True, slots=True)
class Position:
    """What a server says about the token after a prefix.

    Args:
        token: the server's greedy choice.
        ids: the most probable tokens, which may include `token` out of order.
        logprobs: of `ids`; NaN where the server's logits were not finite.
    """

    token: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class ServedAPI(ABC):
    """One server's way to ask for greedy tokens.

    Args:
        model: its name on the server.
        top: log probabilities a position.
    """

    name: str
    path: str

    def __init__(self, model: str, top: int) -> None:
        self.model, self.top = model, top
        self.longest_stream: int | None = None  # tokens that a stream is best limited to

    @abstractmethod
    def body(
        self, prompts: Sequence[Sequence[int]], tokens: int, *, stream: bool, ignore_eos: bool = False
    ) -> Json:
        """A request for `tokens` greedy tokens after each prompt; a stream takes one prompt."""

    @abstractmethod
    def stream_positions(self, event: Json, seen: int) -> tuple[list[Position], str | None]:
        """The new positions of an event of a stream of which `seen` have come, and why it ends, if it does.

        Raises:
            ModelError: the answer lacks token ids or log probabilities.
        """

    @abstractmethod
    def first_positions(self, answer: Any) -> list[Position]:
        """The first position of each prompt of a whole answer; raises as `stream_positions`.

        Returns none where the server gave the answer up.
        """


class VllmAPI(ServedAPI):
    """vLLM's `/v1/completions`; also of servers that speak it."""

    name, path = "vllm", "/v1/completions"

    def body(
        self, prompts: Sequence[Sequence[int]], tokens: int, *, stream: bool, ignore_eos: bool = False
    ) -> Json:
        return {
            "model": self.model,
            "prompt": list(prompts[0]) if stream else [list(prompt) for prompt in prompts],
            "max_tokens": tokens,
            "stream": stream,
            "ignore_eos": ignore_eos,
            "logprobs": self.top,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
            "temperature": 0,
            "top_p": 1,
            "top_k": 0,
            "min_p": 0,
            "repetition_penalty": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0,
        }

    def stream_positions(self, event: Json, seen: int) -> tuple[list[Position], str | None]:
        choices = event.get("choices") or []
        if not choices:  # the usage
            return [], None
        finish = choices[0].get("finish_reason")
        return [] if finish in GIVEN_UP else self._positions(choices[0]), finish

    def first_positions(self, answer: Any) -> list[Position]:
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        if any(choice.get("finish_reason") in GIVEN_UP for choice in choices):
            return []
        return [self._positions(choice)[0] for choice in choices]

    @staticmethod
    def _positions(choice: Json) -> list[Position]:
        logprobs = choice.get("logprobs") or {}
        tokens = choice.get("token_ids")
        if tokens is None:
            names = logprobs.get("tokens") or []
            tokens = [int(name.removeprefix(TOKEN_ID)) for name in names if name.startswith(TOKEN_ID)]
            if len(tokens) < len(names) or (choice.get("text") and not names):
                raise ModelError(
                    "the server gives no token ids; it has to know return_token_ids (vLLM 0.10.2)"
                )
        if not tokens:
            return []
        tops = logprobs.get("top_logprobs") or []
        if len(tops) != len(tokens):
            raise ModelError(f"the server gives log probabilities of {len(tops)} of {len(tokens)} tokens")
        if any(not key.startswith(TOKEN_ID) for top in tops for key in top or ()):
            raise ModelError("the server names tokens by text; it has to know return_tokens_as_token_ids")
        return [_position(token, top) for token, top in zip(tokens, tops, strict=True)]


def _position(token: int, top: dict[str, float | None] | None) -> Position:
    """`top` is None, or has None in it, where logits were not finite: JSON knows no NaN."""
    values = {int(key.removeprefix(TOKEN_ID)): value for key, value in (top or {str(token): None}).items()}
    return Position(
        token, tuple(values), tuple(math.nan if value is None else value for value in values.values())
    )


class SglangAPI(ServedAPI):
    """SGLang's own `/generate`."""

    name, path = "sglang", "/generate"

    def body(
        self, prompts: Sequence[Sequence[int]], tokens: int, *, stream: bool, ignore_eos: bool = False
    ) -> Json:
        return {
            "input_ids": list(prompts[0]) if stream else [list(prompt) for prompt in prompts],
            "sampling_params": {
                "max_new_tokens": tokens,
                "ignore_eos": ignore_eos,
                "skip_special_tokens": False,
                "temperature": 0,
                "top_p": 1,
                "top_k": -1,
                "min_p": 0,
                "repetition_penalty": 1,
                "presence_penalty": 0,
                "frequency_penalty": 0,
            },
            "stream": stream,
            "return_logprob": True,
            "top_logprobs_num": self.top,
            "return_text_in_logprobs": False,
        }

    def stream_positions(self, event: Json, seen: int) -> tuple[list[Position], str | None]:
        meta = event.get("meta_info") or {}
        finish = _finish_type(meta)
        if finish in GIVEN_UP:  # tells of tokens that it does not list
            return [], finish
        positions, total = self._positions(meta), int(meta.get("completion_tokens", 0))
        if len(positions) == total > 1 and seen:
            # Without --incremental-streaming-output every event repeats what came before.
            self.longest_stream = CUMULATIVE_STREAM
        if total - seen > len(positions):
            raise ModelError(
                f"the server gives log probabilities of {len(positions)} of {total - seen} tokens"
            )
        return positions[len(positions) - (total - seen) :], finish

    def first_positions(self, answer: Any) -> list[Position]:
        metas = [each.get("meta_info") or {} for each in answer]
        if any(_finish_type(meta) in GIVEN_UP for meta in metas):
            return []
        found = [self._positions(meta) for meta in metas]
        if not all(found):
            raise ModelError("the server gives no log probabilities; it has to know return_logprob")
        return [positions[0] for positions in found]

    @staticmethod
    def _positions(meta: Json) -> list[Position]:
        chosen, tops = meta.get("output_token_logprobs") or [], meta.get("output_top_logprobs") or []
        if len(tops) != len(chosen):
            raise ModelError(f"the server gives top log probabilities of {len(tops)} of {len(chosen)} tokens")
        return [
            Position(
                int(token),
                tuple(int(entry[1]) for entry in top),
                tuple(math.nan if entry[0] is None else float(entry[0]) for entry in top),
            )
            for (_, token, *_), top in zip(chosen, tops, strict=True)
        ]


def _finish_type(meta: Json) -> str | None:
    reason = meta.get("finish_reason")
    return str(reason["type"]) if isinstance(reason, dict) else reason
