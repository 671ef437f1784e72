"""Requests to a decoder and their results. Plain data without torch; a prompt is token ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from viaticum.errors import InputError, ModelError
from viaticum.thinking import PLAIN, ThinkingFormat
from viaticum.types import FinishReason, TokenCount, Trace

ThoughtEnd = Literal["model", "budget", "stop", "loop"]
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-6, 1e6
BIAS_LIMIT = 100.0  # a bias of this much forces its token, one of minus this much bans it
MAX_LOGPROBS = 20  # likeliest tokens whose log-probabilities a request may ask for


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is sampled, by either model of a pair.

    Args:
        temperature: below 1e-6 it is 0, greedy; above 1e6, where all tokens are equally likely, it is 1e6.
        top_p: probability of the nucleus; 1 keeps every token.
        top_k: tokens that are kept; 0 keeps every token.
        seed: any integer; the same seed gives the same text, whatever else is in the batch.
        min_p: tokens less probable than this times the most probable one are dropped; 0 drops none.
        frequency_penalty, presence_penalty: subtracted from a token's logit, the one as often as the token
            stands in the output, the other once; -2 to 2.
        repetition_penalty: divides positive and multiplies negative logits of tokens of prompt and output; 1
            changes nothing.
        logit_bias: (token, added to its logit), -100 to 100; -100 bans a token, 100 bans all others.

    Raises:
        InputError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be 0 or more, got {self.temperature}")
        # Logits over numbers beyond these would not be finite.
        usable = 0.0 if self.temperature < LOWEST_TEMPERATURE else min(self.temperature, HIGHEST_TEMPERATURE)
        object.__setattr__(self, "temperature", usable)
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 or more, got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be between 0 and 1, got {self.min_p}")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise InputError(f"{name} must be between -2 and 2, got {getattr(self, name)}")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        for token, bias in self.logit_bias:
            if not -BIAS_LIMIT <= bias <= BIAS_LIMIT:
                raise InputError(f"a logit_bias must be between -100 and 100, got {bias} for token {token}")

    @property
    def adjusts_logits(self) -> bool:
        """Whether it has penalties or biases (`decoders.logits`)."""
        return bool(
            self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1 or self.logit_bias
        )


@dataclass(frozen=True, slots=True)
class ThinkingLimit:
    """How long the thought before an answer may be, and how it is closed.

    The closing tag is forced, as output tokens of the active model, once the budget is used up, in place of a
    stop id inside the thought, and when the thought loops.

    Args:
        close_ids: tokens that close the thought; their text has to contain its closing tag.
        budget: most tokens of thought before the closing tag is forced; None: no limit.
        empty_ids: tokens of an empty thought, written first if the budget is 0 and the prompt does not end
            inside a thought; none: nothing is forced then.
        cue_ids: tokens that begin the answer in place of a stop id right after a thought that was closed by
            the model; none: the text ends there without an answer.
        answer: output tokens to leave for the answer: the thought is closed earlier than its budget says
            where `max_new_tokens` would leave fewer.

    Raises:
        InputError: no `close_ids`, or a negative number.
    """

    close_ids: tuple[int, ...]
    budget: int | None = None
    empty_ids: tuple[int, ...] = ()
    cue_ids: tuple[int, ...] = ()
    answer: int = 0

    def __post_init__(self) -> None:
        if not self.close_ids:
            raise InputError("a thought is closed by at least one token; give close_ids")
        if (self.budget is not None and self.budget < 0) or self.answer < 0:
            raise InputError(
                f"a thinking budget and its answer are 0 tokens or more, got {self.budget} and {self.answer}"
            )


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to decode.

    Args:
        prompt: token ids, at least one.
        max_new_tokens: maximum output tokens.
        sampling: how tokens are sampled.
        stop: strings that end the text and are cut from it; not looked for in the thought.
        thinking: the tags around the thought; by default the text is not split.
        inside_thought: whether the prompt ends inside a thought; None if that is not known.
        thinking_limit: how long the thought may be, and how it is closed; None: nothing is forced.
        logprobs: number of likeliest tokens whose log-probabilities are kept at each position, beside that of
            the token itself; None: none are computed.
        small_prompt: what the small model of a pair reads instead of `prompt`, where its chat template is
            another one; None: the same. Positions of each model follow its own prompt.

    Raises:
        InputError: an empty prompt, a length below 1, an empty stop string or too many log-probabilities.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 400
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    thinking: ThinkingFormat = PLAIN
    inside_thought: bool | None = None
    thinking_limit: ThinkingLimit | None = None
    logprobs: int | None = None
    small_prompt: Sequence[int] | None = None

    @property
    def prompts(self) -> tuple[Sequence[int], Sequence[int]]:
        """The prompts of the small and of the large model."""
        return (self.prompt if self.small_prompt is None else self.small_prompt, self.prompt)

    def __post_init__(self) -> None:
        if not all(self.prompts):
            raise InputError("the prompt is empty")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop must be a tuple of non-empty strings, got {self.stop!r}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise InputError(f"logprobs must be 0 to {MAX_LOGPROBS} likeliest tokens, got {self.logprobs}")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, by the model that made the token, before penalties and temperature.

    Args:
        token: its id.
        logprob: of the token.
        top: likeliest tokens and their log-probabilities, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """A finished sequence; text and trace hold what was decoded until then, whatever the finish reason.

    Args:
        text: without thought, stop ids and stop strings.
        finish_reason: "stop" (a stop id or string), "length", "loop" (see `LoopGuard`), "aborted", or
            "error".
        trace: output tokens, and which model made each.
        usage: by model that was called: prompt tokens, and output tokens that it made. An accepted draft
            token counts for the large model, a forced token for the active one. Rejected draft tokens and
            repeated reads are in the decoder's stats, not here. Tokens of the thought, its tags among them,
            are reasoning tokens.
        seconds: from admission to the end.
        error: why, if the finish reason is "error".
        thinking: the thought, without tags.
        thought_closed_by: "model", or why the closing tag of the last thought was forced: "budget", "stop" (a
            stop id inside the thought) or "loop"; None if there was no thought or it was not closed.
        logprobs: of the tokens of the text, if the request asked for them: those of the thought, forced ones
            and stop ids have none. The last ones may lie behind a stop string that the text was cut at.
        stop_string: the one that ended the text, "" for none.
    """

    text: str
    finish_reason: FinishReason
    trace: Trace
    usage: dict[str, TokenCount]
    seconds: float
    error: ModelError | None = None
    thinking: str = ""
    thought_closed_by: ThoughtEnd | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    stop_string: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """One token of one request, or its end, or both.

    Args:
        index: of the request in the list, or the one that `Engine.add` returned.
        token: its id; None if the request ends without one (aborted, error).
        model: name of the model that made it; "" without a token.
        text: new text that is safe to show; may be empty while a character or a stop string is incomplete.
        result: set on the last event of a request.
        thinking: new thought; it comes before the text.
    """

    index: int
    token: int | None
    model: str
    text: str
    result: Result | None = None
    thinking: str = ""
