"""The words used everywhere: Query, Pair, RoutingTable, Route, Completion, Answer, Usage, Outcome.

Plain data, standard library only: no torch, no pydantic, no I/O, so that decoders run on a bare CUDA
image. Money is an integer of nano-dollars; times are seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

from viaticum.errors import InputError

AnswerKind = Literal["auto", "number", "choice", "boolean", "date", "expression", "text"]
ANSWER_KINDS: tuple[AnswerKind, ...] = ("auto", "number", "choice", "boolean", "date", "expression", "text")
ROLES = ("system", "user", "assistant")
FinishReason = Literal["stop", "length", "aborted", "loop", "error", "tool_calls", "refused"]


class Message(TypedDict):
    """One turn of a chat, as chat templates and OpenAI-compatible APIs take it.

    tool_calls: what an assistant wanted called; a tool's turn says by tool_call_id which call it answers.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]


@dataclass(frozen=True, slots=True)
class Query:
    """A question, the kind of answer it wants, and whatever the caller wants to keep beside it.

    messages: the conversation before the question: system turns, and turns of user and assistant. Raises
    `InputError` where the text is empty, the kind unknown, or a message is none.
    """

    text: str
    kind: AnswerKind = "auto"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise InputError("the question is empty; write what you want answered")
        if self.kind not in ANSWER_KINDS:
            raise InputError(f"unknown answer kind {self.kind!r}; known: {', '.join(ANSWER_KINDS)}")
        for message in self.messages:
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise InputError(
                    f"not a message: {message!r}; write a dict with a role ({', '.join(ROLES)}) and content"
                )
            if not isinstance(message.get("content"), str):
                raise InputError(f"the content of a message is a text, got {message.get('content')!r}")


def split_model(text: str) -> tuple[str, str]:
    """`model` or `model+strategy` in two; the strategy is empty where there is none. A plus at the end is the model's own."""
    model, _, strategy = text.rpartition("+")
    return (model, strategy) if model and strategy else (text, "")


@dataclass(frozen=True, slots=True, order=True)
class Pair:
    """One way to answer: a model of the catalogue and a strategy. Written `model+strategy`."""

    model: str
    strategy: str

    def __str__(self) -> str:
        return f"{self.model}+{self.strategy}"

    @classmethod
    def parse(cls, text: str) -> Pair:
        model, strategy = split_model(text)
        if not strategy:
            raise InputError(f"not a pair: {text!r}; write model+strategy")
        return cls(model, strategy)


@dataclass(frozen=True, slots=True)
class Row:
    """What a router expects of one pair on one query.

    accuracy: probability of a right answer, 0 to 1. Tokens are output tokens; costs are nano-dollars,
    prompt included. p50 is the median, p90 what nine calls of ten stay under.
    """

    pair: Pair
    accuracy: float
    tokens_p50: int
    tokens_p90: int
    cost_p50: int
    cost_p90: int


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """A row for every pair that could answer (RTR, arXiv 2505.19435, section 3)."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def without(self, *pairs: Pair) -> RoutingTable:
        """The table less some pairs, e.g. those already tried."""
        return RoutingTable(tuple(row for row in self.rows if row.pair not in pairs))


@dataclass(frozen=True, slots=True)
class Route:
    """The pair chosen for one call, the row it was chosen by, and why, in words."""

    pair: Pair
    row: Row
    why: str


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Tokens that one model read and made, and how long it worked where time is billed.

    Input counts the prompt once. With a pair, each model reads the prompt, and output tokens count for
    the model that made the token kept at that position. Cached tokens are among the input tokens,
    reasoning tokens among the output tokens.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    reasoning_tokens: int = 0
    milliseconds: int = 0

    def __add__(self, other: TokenCount) -> TokenCount:
        return TokenCount(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cached_input_tokens + other.cached_input_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.milliseconds + other.milliseconds,
        )

    @property
    def total(self) -> int:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call used: tokens per model name, and wall-clock seconds."""

    models: Mapping[str, TokenCount] = field(default_factory=dict)
    seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        models = dict(self.models)
        for name, count in other.models.items():
            models[name] = models.get(name, TokenCount()) + count
        return Usage(models, self.seconds + other.seconds)

    @property
    def input_tokens(self) -> int:
        return sum(count.input_tokens for count in self.models.values())

    @property
    def output_tokens(self) -> int:
        return sum(count.output_tokens for count in self.models.values())


@dataclass(frozen=True, slots=True)
class Trace:
    """Who wrote which token. The tuples have one item per output token, or none where nothing was recorded.

    models: names that `made_by` indexes; entropies: normalised (H = -sum p ln p / ln|V|) at the model
    that made the token, NaN where nobody asked for it. accepted: True where the large model made the token by
    accepting the small one's draft. scores: what a learned token router said of the small model's proposal
    at that place, kept or not; NaN where there was none.
    """

    models: tuple[str, ...]
    tokens: tuple[int, ...]
    made_by: tuple[int, ...]
    entropies: tuple[float, ...]
    accepted: tuple[bool, ...] = ()
    scores: tuple[float, ...] = ()

    def share(self, model: str) -> float:
        """The fraction of the tokens that `model` made; 0.0 for an empty text."""
        if not self.tokens:
            return 0.0
        return self.made_by.count(self.models.index(model)) / len(self.tokens)


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote: text, usage per model, why it ended, and, for local models, the trace.

    Of remote models: tool_calls, the functions it wants called, and logprobs, as OpenAI's API gives them;
    reported_nanousd, what the provider says that the call cost; warnings, what about its accounts is not as it
    should be (a cost that differs from the price list by more than 1%, usage that is missing).
    """

    text: str
    usage: Usage
    finish_reason: FinishReason
    trace: Trace | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    logprobs: tuple[Mapping[str, Any], ...] = ()
    reported_nanousd: int | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """What a strategy read out of a completion: the answer, or None and the reason."""

    value: str | None
    reason: str = ""

    @property
    def answered(self) -> bool:
        return self.value is not None


@dataclass(frozen=True, slots=True)
class Answer:
    """What the workflow returns: the answer, the text it was read from, and what it took.

    value is None where no route gave an answer. cost and held are nano-dollars: what was posted, and
    what was held in the worst case before each call, summed over the calls.
    """

    value: str | None
    text: str
    routes: tuple[Route, ...]
    usage: Usage
    cost: int
    held: int
    finish_reason: str
    seconds: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row of the outcome table: how one pair did on one question.

    The last five may be unknown (None). Cost is in nano-dollars. This is the common currency: profiling
    writes it, routers are fitted on it, evaluation and reports read it.
    """

    dataset: str
    question_id: str
    question: str
    model: str
    strategy: str
    answer: str | None
    correct: bool
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_nanousd: int | None = None
    seconds: float | None = None
    finish_reason: str | None = None

    @property
    def pair(self) -> Pair:
        return Pair(self.model, self.strategy)
