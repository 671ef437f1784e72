"""Plain data used everywhere: Query, Pair, RoutingTable, Route, Completion, Answer, Usage, Outcome.

Standard library only: no torch, no pydantic, no I/O, so that decoders run on a bare CUDA image. Money is an
integer of nano-dollars; times are seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal, NotRequired, TypedDict

from viaticum.checks import checked_text, checked_type, shown
from viaticum.display import cut, html_facts, html_table, text_table
from viaticum.errors import InputError
from viaticum.money import as_usd, format_usd, short_usd

AnswerKind = Literal["auto", "number", "choice", "boolean", "date", "expression", "text"]
ANSWER_KINDS: tuple[AnswerKind, ...] = ("auto", "number", "choice", "boolean", "date", "expression", "text")
ROLES = ("system", "user", "assistant")
FinishReason = Literal["stop", "length", "aborted", "loop", "error", "tool_calls", "refused"]


class Message(TypedDict):
    """One turn of a chat, in the form of chat templates and OpenAI-compatible APIs.

    Attributes:
        tool_calls: calls that an assistant's turn asks for.
        tool_call_id: the call that a tool's turn answers.
        parts: what is sent in place of `content`, which is their text: parts of OpenAI's form, text with
            marks for the cache of a provider (`cache_control`), and images (`image_url`).
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    parts: NotRequired[list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Query:
    """A question, the kind of its answer, and metadata of the caller.

    Args:
        text: the question.
        kind: how the answer is read and compared.
        metadata: kept beside the question, not read.
        messages: the conversation before the question: system turns, and turns of user and assistant.

    Raises:
        InputError: the text is none or empty, the kind is unknown, or an item of messages is no message.
    """

    text: str
    kind: AnswerKind = "auto"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        if not checked_text("the question", self.text, blank=True).strip():
            raise InputError("the question is empty; write what you want answered")
        if self.kind not in ANSWER_KINDS:
            raise InputError(f"unknown answer kind {shown(self.kind)}; known: {', '.join(ANSWER_KINDS)}")
        checked_type("metadata", self.metadata, Mapping, "a dict")
        object.__setattr__(self, "messages", checked_messages(self.messages))


def checked_messages(messages: Any) -> tuple[Message, ...]:
    """The turns of a conversation as a tuple. Raises `InputError` where there is something else."""
    if not isinstance(messages, list | tuple):
        raise InputError(
            f"messages is a list of dicts with role and content, got {shown(messages)}; give [] where there "
            "is no conversation before the question"
        )
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise InputError(
                f"not a message: {shown(message)}; write a dict with a role ({', '.join(ROLES)}) and content"
            )
        checked_text("the content of a message", message.get("content"), blank=True)
    return tuple(messages)


def split_model(text: str) -> tuple[str, str]:
    """Split `model+strategy` in two; the strategy is empty where there is none.

    A plus at the end belongs to the name of the model.
    """
    model, _, strategy = text.rpartition("+")
    return (model, strategy) if model and strategy else (text, "")


VERIFY = "verify"  # the strategy of a pair that says whether the answer before it is right


@dataclass(frozen=True, slots=True, order=True)
class Pair:
    """One way to answer: a model of the catalogue and a strategy. Written `model+strategy`."""

    model: str
    strategy: str

    @property
    def is_check(self) -> bool:
        """Whether it gives no answer, but says whether another one is right."""
        return self.strategy == VERIFY

    def __str__(self) -> str:
        return f"{self.model}+{self.strategy}"

    @classmethod
    def parse(cls, text: str) -> Pair:
        """Read `model+strategy`. Raises `InputError` for any other form."""
        model, strategy = split_model(checked_text("a pair", text))
        if not strategy:
            raise InputError(f"not a pair: {text!r}; write model+strategy")
        return cls(model, strategy)


@dataclass(frozen=True, slots=True)
class Row:
    """What a router predicts of one pair on one query.

    Attributes:
        accuracy: probability of a right answer, 0 to 1.
        tokens_p50, tokens_p90: median and 90% quantile of output tokens.
            Quantiles count outputs that were cut as longer.
        cost_p50, cost_p90: median and 90% quantile of the cost in nano-dollars, prompt included.
        cost_mean: mean cost in nano-dollars; None where it is unknown.
        cut_at: tokens at which the known outputs were cut; what is longer is extrapolated. None: none was
            cut.
        accuracy_low, accuracy_high: 90% interval of the accuracy, where a prior estimated it.
        average: accuracy over all questions, where a prior's `accuracy` is a view of this one.
        origin: where the row comes from, in words; empty for the router's own table.
        seconds: expected from the first token to the last, of all samples; None where it is unknown.
    """

    pair: Pair
    accuracy: float
    tokens_p50: int
    tokens_p90: int
    cost_p50: int
    cost_p90: int
    cost_mean: int | None = None
    cut_at: int | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    average: float | None = None
    origin: str = ""
    seconds: float | None = None

    @property
    def expected_cost(self) -> int:
        """The mean cost in nano-dollars, the median where no mean is known."""
        return self.cost_p50 if self.cost_mean is None else self.cost_mean

    @property
    def cost_usd(self) -> Decimal:
        """The expected cost in dollars."""
        return as_usd(self.expected_cost)

    @property
    def _cells(self) -> tuple[str, ...]:
        return (
            str(self.pair),
            f"{self.accuracy:.0%}",
            f"{self.tokens_p50} / {self.tokens_p90}",
            f"{short_usd(self.cost_p50)} / {short_usd(self.cost_p90)}",
        )


_ROW_COLUMNS = ("pair", "right", "tokens p50 / p90", "cost p50 / p90")


@dataclass(frozen=True, slots=True, repr=False)
class RoutingTable:
    """A row for every pair that could answer (RTR, arXiv 2505.19435, section 3).

    `print` shows it as a table, as do notebooks.
    """

    rows: tuple[Row, ...]

    def __repr__(self) -> str:
        rows = (f"{row.pair} {row.accuracy:.0%} {short_usd(row.expected_cost)}" for row in self.rows)
        return f"RoutingTable({len(self.rows)} pairs: {', '.join(rows)})"

    def __str__(self) -> str:
        return text_table(_ROW_COLUMNS, [row._cells for row in self.rows])

    def _repr_html_(self) -> str:
        return html_table(_ROW_COLUMNS, [row._cells for row in self.rows])

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def without(self, *pairs: Pair) -> RoutingTable:
        """The table without some pairs, such as those already tried."""
        return RoutingTable(tuple(row for row in self.rows if row.pair not in pairs))


@dataclass(frozen=True, slots=True, repr=False)
class Route:
    """The pair chosen for one call, the row it was chosen by, and the reason in words."""

    pair: Pair
    row: Row
    why: str

    def __repr__(self) -> str:
        return f"Route({self.pair}, {short_usd(self.row.expected_cost)} expected: {self.why})"

    def _repr_html_(self) -> str:
        return html_table((*_ROW_COLUMNS, "why"), [(*self.row._cells, self.why)])


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Tokens that one model read and wrote, and its working time where that is billed.

    Attributes:
        input_tokens: the prompt, counted once. In a pair, each model reads the prompt.
        output_tokens: in a pair, tokens count for the model that wrote the one kept at that position.
        cached_input_tokens: part of input_tokens.
        reasoning_tokens: part of output_tokens.
        milliseconds: working time.
        cache_write_tokens: part of input_tokens that the provider wrote into its cache.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    reasoning_tokens: int = 0
    milliseconds: int = 0
    cache_write_tokens: int = 0

    def __add__(self, other: TokenCount) -> TokenCount:
        return TokenCount(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cached_input_tokens + other.cached_input_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.milliseconds + other.milliseconds,
            self.cache_write_tokens + other.cache_write_tokens,
        )

    @property
    def total(self) -> int:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Usage:
    """Usage of a call: tokens by model, and wall-clock seconds."""

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

    @property
    def reasoning_tokens(self) -> int:
        """Part of the output tokens."""
        return sum(count.reasoning_tokens for count in self.models.values())


@dataclass(frozen=True, slots=True)
class Trace:
    """Which model wrote which token; tuples of one item per output token, empty if not recorded.

    Attributes:
        models: names that `made_by` indexes.
        entropies: normalised, H = -sum p ln p / ln|V|, at the model that wrote the token; NaN where not
            computed.
        accepted: the large model wrote the token by accepting the small one's draft.
        scores: a learned token router's score of the small model's proposal at that position, whether it was
            kept or not; NaN where there was none.
        forced: neither model chose the token: it closes a thought whose budget was used up.
    """

    models: tuple[str, ...]
    tokens: tuple[int, ...]
    made_by: tuple[int, ...]
    entropies: tuple[float, ...]
    accepted: tuple[bool, ...] = ()
    scores: tuple[float, ...] = ()
    forced: tuple[bool, ...] = ()

    def share(self, model: str) -> float:
        """Fraction of the tokens that `model` wrote; 0.0 for an empty text."""
        if not self.tokens:
            return 0.0
        return self.made_by.count(self.models.index(model)) / len(self.tokens)


@dataclass(frozen=True, slots=True)
class ThinkingDelta:
    """A piece of a model's thought, in a stream beside the pieces of its text, which are plain strings."""

    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote.

    Attributes:
        text: without the thought. Empty where the thought was not closed.
        thinking: what it thought before the text, without tags; empty for a model that does not think.
        trace: of local models.
        tool_calls: of remote models, in the form of the OpenAI API.
        logprobs: of the tokens of the text, in the form of the OpenAI API, where they were asked for.
        reported_nanousd: cost of the call as the provider reports it.
        warnings: accounts that are not as they should be: a reported cost more than 1% off the price list,
            missing usage.
        stop_string: the one that ended the text, where it was found here and not by a provider; "" for none.
    """

    text: str
    usage: Usage
    finish_reason: FinishReason
    trace: Trace | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    logprobs: tuple[Mapping[str, Any], ...] = ()
    reported_nanousd: int | None = None
    warnings: tuple[str, ...] = ()
    thinking: str = ""
    stop_string: str = ""


@dataclass(frozen=True, slots=True)
class Reading:
    """The answer that a strategy read from a completion, or None and the reason."""

    value: str | None
    reason: str = ""

    @property
    def answered(self) -> bool:
        return self.value is not None


@dataclass(frozen=True, slots=True, repr=False)
class Answer:
    """Result of the workflow: the answer, the text it was read from, and what it used.

    Attributes:
        value: None where no route gave an answer.
        thinking: what the last call thought before its text.
        cost: nano-dollars posted, summed over the calls; in dollars: `cost_usd`.
        held: nano-dollars held for the worst case before each call, summed over the calls.
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
    thinking: str = ""

    @property
    def cost_usd(self) -> Decimal:
        """Dollars posted, exactly."""
        return as_usd(self.cost)

    @property
    def held_usd(self) -> Decimal:
        """Dollars held before the calls, exactly."""
        return as_usd(self.held)

    def __repr__(self) -> str:
        value = f"no answer: {cut(self.reason, 80)}" if self.value is None else ascii(cut(self.value, 80))
        pairs = " then ".join(str(route.pair) for route in self.routes) or "nobody"
        return f"Answer({value} by {pairs} for {format_usd(self.cost)}, {self.seconds:.1f} s)"

    def _repr_html_(self) -> str:
        facts = [
            ("answer", f"none: {self.reason}" if self.value is None else self.value),
            *((f"call {number}", f"{each.pair}: {each.why}") for number, each in enumerate(self.routes, 1)),
            ("cost", f"{format_usd(self.cost)} of {format_usd(self.held)} held"),
            *(
                (f"tokens of {name}", f"{count.input_tokens} read, {count.output_tokens} written")
                for name, count in self.usage.models.items()
            ),
            ("time", f"{self.seconds:.1f} s"),
            ("ended", self.finish_reason),
        ]
        return html_facts(facts, ("text", self.text), ("thinking", self.thinking))


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row of the outcome table: the result of one pair on one question.

    Profiling writes it, routers are fitted on it, evaluation and reports read it. The last five fields may be
    unknown (None); cost is in nano-dollars.
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
    def cost_usd(self) -> Decimal | None:
        """The cost in dollars, exactly; None where it is unknown."""
        return None if self.cost_nanousd is None else as_usd(self.cost_nanousd)

    @property
    def pair(self) -> Pair:
        return Pair(self.model, self.strategy)
