"""OpenTelemetry: spans and metrics of runs and calls, by the conventions for generative AI.

Without the package `opentelemetry-api` (the extra `otel`), or without a provider that the program has set up,
nothing is recorded. A run is a span `invoke_workflow viaticum`; each call in it a span `chat MODEL` below it,
with the route and what was expected of it, and with the hold, the cost and what was left. What the answer was
worth is known later: `feedback` is a span of its own. Texts are never
recorded. A span is begun and ended by hand: a stream may be closed in another context than it was begun in.

Conventions: https://opentelemetry.io/docs/specs/semconv/gen-ai/ ; names of our own begin with `viaticum.`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import TracebackType
from typing import Any, Self

from viaticum.budgets import Entry, Hold
from viaticum.catalogue import ModelSpec
from viaticum.models.base import Generation
from viaticum.money import NANOUSD_PER_USD
from viaticum.types import Completion

try:
    from opentelemetry import context as otel_context
    from opentelemetry import metrics
    from opentelemetry import trace as otel_trace
    from opentelemetry.trace import SpanKind, Status, StatusCode
except ImportError:  # the extra is not installed
    trace: Any = None
else:
    trace = otel_trace

NAME = "viaticum"
TOKEN_BUCKETS = [4**power for power in range(14)]  # as the conventions advise, also for seconds
SECOND_BUCKETS = [0.01 * 2**power for power in range(14)]
MOST_CANDIDATES = 32  # of a route, in its span


def current() -> Any:
    """The context of the caller, in which its span is the current one; None without OpenTelemetry."""
    return None if trace is None else otel_context.get_current()


class RunSpan:
    """The span of a run. parent: the context of its caller, from `current`."""

    def __init__(self, parent: Any, *, budget: str, session: str | None = None) -> None:
        self._span = None
        if trace is None:
            return
        self._span = _tracer().start_span(f"invoke_workflow {NAME}", context=parent, kind=SpanKind.INTERNAL)
        self._span.set_attributes(
            {
                "gen_ai.operation.name": "invoke_workflow",
                "gen_ai.workflow.name": NAME,
                "viaticum.budget": budget,
                **({} if session is None else {"gen_ai.conversation.id": session}),
            }
        )

    @property
    def context(self) -> Any:
        """The context of the calls of this run."""
        return None if self._span is None else trace.set_span_in_context(self._span)

    def end(self, cost: int | None = None, routes: Sequence[str] = (), finish_reason: str = "") -> None:
        """cost: nano-dollars; None where the run did not come to an answer."""
        if self._span is None:
            return
        if cost is not None:
            self._span.set_attribute("viaticum.cost_usd", cost / NANOUSD_PER_USD)
            self._span.set_attribute("viaticum.routes", list(routes))
        if finish_reason:
            self._span.set_attribute("gen_ai.response.finish_reasons", [finish_reason])
        self._span.end()
        self._span = None

    def fail(self, error: BaseException) -> None:
        """Without effect once the run has ended."""
        if self._span is not None:
            _fail(self._span, error)
            self._span.end()
            self._span = None


class CallSpan:
    """The span of one call: from its hold to its settlement.

    Args:
        parent: the context of the run, or of the caller.
        hold: of the call.
        route: of the workflow, as in the state; None for a call whose model was named.
        candidates: returns the pairs that the route was chosen among; called if the span is recorded.
    """

    def __init__(
        self,
        parent: Any,
        spec: ModelSpec,
        generation: Generation,
        hold: Hold,
        *,
        route: Mapping[str, Any] | None = None,
        candidates: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._span, self._began, self._labels = None, time.perf_counter(), dict[str, Any]()
        if trace is None:
            return
        self._labels = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": provider_name(spec),
            "gen_ai.request.model": spec.name,
        }
        remote = spec.kind == "remote" or spec.engine == "served"
        kind = SpanKind.CLIENT if remote else SpanKind.INTERNAL
        self._span = _tracer().start_span(f"chat {spec.name}", context=parent, kind=kind)
        if not self._span.is_recording():
            return
        self._span.set_attributes(
            {
                **self._labels,
                "gen_ai.request.max_tokens": generation.max_new_tokens,
                "gen_ai.request.temperature": float(generation.temperature),
                "gen_ai.request.top_p": float(generation.top_p),
                "gen_ai.request.seed": generation.seed,
                "viaticum.budget": hold.budget,
                "viaticum.key": hold.key,
                "viaticum.held_usd": hold.held_nanousd / NANOUSD_PER_USD,
                **{
                    f"viaticum.{name}": hold.tags[name]
                    for name in ("session", "switched_from")
                    if name in hold.tags
                },
                **_route_attributes(route, candidates()),
            }
        )

    @property
    def is_recording(self) -> bool:
        return self._span is not None and bool(self._span.is_recording())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.fail(error)

    def end(self, completion: Completion, entry: Entry, left: int | None, *, stored: bool = False) -> None:
        """The call is settled.

        Args:
            left: nano-dollars of the budget after it; None without a limit.
            stored: no call was made: its text was there already, and is counted where it came from.
        """
        if self._span is None:
            return
        if stored:
            self._span.set_attribute("viaticum.stored", True)
            self._span.end()
            return
        counts = list(completion.usage.models.values())
        usage = {
            "gen_ai.usage.input_tokens": completion.usage.input_tokens,
            "gen_ai.usage.output_tokens": completion.usage.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": sum(each.cached_input_tokens for each in counts),
            "gen_ai.usage.cache_creation.input_tokens": sum(each.cache_write_tokens for each in counts),
            "gen_ai.usage.reasoning.output_tokens": completion.usage.reasoning_tokens,
        }
        self._span.set_attributes(
            {
                **usage,
                "gen_ai.response.finish_reasons": [completion.finish_reason],
                "viaticum.cost_usd": entry.nanousd / NANOUSD_PER_USD,
                **({} if left is None else {"viaticum.left_usd": left / NANOUSD_PER_USD}),
            }
        )
        instruments = _instruments()
        for kind in ("input", "output"):
            labels = {**self._labels, "gen_ai.token.type": kind}
            instruments["tokens"].record(usage[f"gen_ai.usage.{kind}_tokens"], labels)
        instruments["cost"].add(entry.nanousd / NANOUSD_PER_USD, self._labels)
        self._finish({})

    def fail(self, error: BaseException) -> None:
        """The call ended without an answer; what it cost is in the ledger."""
        if self._span is not None:
            _fail(self._span, error)
            self._finish({"error.type": type(error).__name__})

    def _finish(self, more: Mapping[str, Any]) -> None:
        assert self._span is not None
        seconds = time.perf_counter() - self._began
        _instruments()["seconds"].record(seconds, {**self._labels, **more})
        self._span.end()


def record_feedback(pair: str, correct: bool, expected: float | None) -> None:
    """Whether an answer was right, as an evaluation, beside what the router had expected.

    pair: the last one that was asked, as model+strategy.
    """
    if trace is None:
        return
    span = _tracer().start_span("evaluate answer")
    span.set_attributes(
        {
            "gen_ai.evaluation.name": "correct",
            "gen_ai.evaluation.score.value": float(correct),
            "gen_ai.evaluation.score.label": "pass" if correct else "fail",
            "viaticum.route": pair,
            **({} if expected is None else {"viaticum.expected_accuracy": expected}),
        }
    )
    span.end()
    labels = {"viaticum.route": pair, "gen_ai.evaluation.score.label": "pass" if correct else "fail"}
    _instruments()["answers"].add(1, labels)


def provider_name(spec: ModelSpec) -> str:
    """The provider of a remote model as LiteLLM names it, such as openai; else `viaticum`."""
    provider, slash, _ = (spec.litellm_model or "").partition("/")
    return (provider if slash else "openai") if spec.kind == "remote" else NAME


def route_metadata(route: Mapping[str, Any] | None, generation: Generation) -> dict[str, Any]:
    """What LangSmith shows of a call: its limits, its route, and what was expected of it."""
    limits = {"ls_max_tokens": generation.max_new_tokens, "ls_temperature": float(generation.temperature)}
    named = {"viaticum_route": "viaticum.route", "viaticum_why": "viaticum.why"}
    named |= {f"viaticum_{name}": f"viaticum.{name}" for name in ("expected_accuracy", "expected_cost_usd")}
    attributes = _route_attributes(route, ())
    return limits | {name: attributes[key] for name, key in named.items() if key in attributes}


def _route_attributes(route: Mapping[str, Any] | None, candidates: Sequence[str]) -> dict[str, Any]:
    if route is None:
        return {}
    row = route["row"]
    expected = row["cost_p50"] if row.get("cost_mean") is None else row["cost_mean"]
    return {
        "viaticum.route": route["pair"],
        "viaticum.why": route["why"],
        "viaticum.candidates": list(candidates)[:MOST_CANDIDATES],
        "viaticum.expected_accuracy": float(row["accuracy"]),
        "viaticum.expected_cost_usd": expected / NANOUSD_PER_USD,
    }


def _fail(span: Any, error: BaseException) -> None:
    span.set_attribute("error.type", type(error).__name__)
    span.set_status(Status(StatusCode.ERROR, str(error)))


def _tracer() -> Any:
    return trace.get_tracer(NAME)


@cache
def _instruments() -> dict[str, Any]:
    """The instruments; those of a provider that is set up later take over what they record."""
    meter = metrics.get_meter(NAME)
    return {
        "tokens": meter.create_histogram(
            "gen_ai.client.token.usage",
            unit="{token}",
            description="Tokens of a call that were billed.",
            explicit_bucket_boundaries_advisory=TOKEN_BUCKETS,
        ),
        "seconds": meter.create_histogram(
            "gen_ai.client.operation.duration",
            unit="s",
            description="From the hold of a call to its settlement.",
            explicit_bucket_boundaries_advisory=SECOND_BUCKETS,
        ),
        "cost": meter.create_counter(
            "viaticum.cost", unit="{USD}", description="Dollars posted for calls that gave an answer."
        ),
        "answers": meter.create_counter(
            "viaticum.answers", unit="{answer}", description="Answers that are known to be right or wrong."
        ),
    }
