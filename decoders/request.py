"""What a caller asks of a decoder and what comes back. Plain data; no torch.

Knows nothing of models: a prompt is token ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from viaticum.errors import InputError, ModelError
from viaticum.types import FinishReason, TokenCount, Trace


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy; top_k 0 and top_p 1 cut nothing.

    seed: any integer; the same seed gives the same text, whatever else is written beside it. The same values
    apply to both models of a pair. Raises `InputError` for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 or more, got {self.top_k}")


@dataclass(frozen=True, slots=True)
class Request:
    """One text to write: prompt token ids, how long, how sampled, and what ends it.

    stop: strings that end the text and are cut from it. Raises `InputError` for an empty prompt, a
    length below 1 or an empty stop string.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 400
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InputError("the prompt is empty")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop must be a tuple of non-empty strings, got {self.stop!r}")


@dataclass(frozen=True, slots=True)
class Result:
    """A text that ended.

    finish_reason: "stop" (a stop id or string), "length", "loop" (see `LoopGuard`), "aborted", or "error",
    with `error` saying why; what was written until then is there in every case.
    usage: for each model that was called the tokens of the prompt, and the tokens of the text that it made. A draft that
    the large model accepts is made by the large one; what a model drafted in vain, or read twice, is in the
    decoder's stats and on nobody's bill. seconds: from admission to the end.
    """

    text: str
    finish_reason: FinishReason
    trace: Trace
    usage: dict[str, TokenCount]
    seconds: float
    error: ModelError | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One kept token of one request, or its end, or both.

    index: the request's place in the list, or the number that `Engine.add` gave; token: None, and model "",
    where a text ends without one (aborted, error); text: new text that is safe to show (may be empty while a
    character or a stop string is incomplete); result: set on the last event of a request.
    """

    index: int
    token: int | None
    model: str
    text: str
    result: Result | None = None
