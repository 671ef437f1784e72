"""Spans and metrics by the conventions for generative AI: the SDK's exporters in memory, and real OTLP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai_server import served
from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from viaticum_server import serving
from workflow_client import LARGE, SMALL, client

from viaticum import Allowance
from viaticum.agents.workflow import telemetry
from viaticum.errors import BudgetExceeded, DeadlineExceeded

QUESTION = "What is 2 + 3?"
ANSWER = "The answer is 5."


@pytest.fixture(scope="module")
def provider() -> TracerProvider:
    """A program sets its provider up once."""
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())
    found = trace.get_tracer_provider()
    assert isinstance(found, TracerProvider)
    return found


@pytest.fixture
def spans(provider: TracerProvider) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    processor = SimpleSpanProcessor(exporter)
    provider.add_span_processor(processor)
    yield exporter
    exporter.shutdown()


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryMetricReader]:
    """Instruments of a provider of this test's own."""
    reader = InMemoryMetricReader()
    meters = MeterProvider([reader])
    monkeypatch.setattr(metrics, "get_meter", meters.get_meter)
    telemetry._instruments.cache_clear()
    yield reader
    telemetry._instruments.cache_clear()
    meters.shutdown()


def named(spans: InMemorySpanExporter, start: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name.startswith(start)]


def points(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    data = reader.get_metrics_data()
    assert data is not None
    found = [each for scope in data.resource_metrics[0].scope_metrics for each in scope.metrics]
    return {each.name: list(each.data.data_points) for each in found}


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_run_and_its_calls(tmp_path: Path, spans: InMemorySpanExporter, reader: Any) -> None:
    with client(tmp_path, ANSWER, "I cannot tell", budget="1", policy="best") as viaticum:
        answer = viaticum.solve(QUESTION, kind="number", allowance=Allowance(session="talk"))
        assert answer.value == "5"
        viaticum.feedback(QUESTION, answer, correct=True)
        name, left = viaticum.budget_name, viaticum.budget().left_nanousd
    (run,) = named(spans, "invoke_workflow")
    first, second = named(spans, "chat")
    assert [first.name, second.name] == [f"chat {LARGE}", f"chat {SMALL}"]
    assert all(call.parent.span_id == run.context.span_id for call in (first, second))  # type: ignore[union-attr]
    assert attributes(run)["gen_ai.operation.name"] == "invoke_workflow"
    assert attributes(run)["gen_ai.conversation.id"] == "talk"
    assert attributes(run)["viaticum.cost_usd"] == pytest.approx(float(answer.cost_usd))
    assert attributes(run)["viaticum.routes"] == (f"{LARGE}+cot", f"{SMALL}+cot")
    told = attributes(second)
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.provider.name"] == "viaticum"
    assert told["gen_ai.request.model"] == SMALL
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (100, 20)
    assert told["gen_ai.response.finish_reasons"] == ("stop",)
    assert told["viaticum.route"] == f"{SMALL}+cot"
    assert told["viaticum.candidates"] == (f"{SMALL}+cot", f"{LARGE}+cot")
    assert told["viaticum.expected_accuracy"] == 0.4
    assert told["viaticum.expected_cost_usd"] == pytest.approx(1e-5)
    assert told["viaticum.held_usd"] > told["viaticum.cost_usd"] > 0
    assert told["viaticum.left_usd"] == pytest.approx((left or 0) / 1e9)
    assert told["viaticum.budget"] == name
    assert told["viaticum.why"] == answer.routes[-1].why
    assert not any(QUESTION in str(value) or ANSWER in str(value) for value in told.values())
    (judged,) = named(spans, "evaluate")
    assert attributes(judged)["gen_ai.evaluation.score.value"] == 1.0
    measured = points(reader)
    tokens = {p.attributes["gen_ai.token.type"]: p.sum for p in measured["gen_ai.client.token.usage"]}
    assert set(tokens) == {"input", "output"}
    durations = measured["gen_ai.client.operation.duration"]
    assert sum(point.count for point in durations) == 2
    assert sum(point.value for point in measured["viaticum.cost"]) == pytest.approx(float(answer.cost_usd))
    assert [point.value for point in measured["viaticum.answers"]] == [1]


def test_what_fails_says_so(tmp_path: Path, spans: InMemorySpanExporter, reader: Any) -> None:
    slow = " ".join(["word"] * 200)
    opened = client(tmp_path, slow, slow, pause=0.02, budget="1", max_seconds=2)
    with opened as viaticum, pytest.raises(DeadlineExceeded):
        viaticum.solve(QUESTION)
    (run,), (call,) = named(spans, "invoke_workflow"), named(spans, "chat")
    for span in (run, call):
        assert attributes(span)["error.type"] == "DeadlineExceeded"
        assert span.status.status_code == StatusCode.ERROR
    (duration,) = points(reader)["gen_ai.client.operation.duration"]
    assert duration.attributes["error.type"] == "DeadlineExceeded"
    spans.clear()
    with client(tmp_path, ANSWER, ANSWER, budget="0.000001") as viaticum, pytest.raises(BudgetExceeded):
        viaticum.solve(QUESTION)
    (run,) = named(spans, "invoke_workflow")
    assert attributes(run)["error.type"] == "BudgetExceeded"
    assert named(spans, "chat") == [], "nothing was called"


def test_a_stored_answer_is_not_counted_again(
    tmp_path: Path, spans: InMemorySpanExporter, reader: Any
) -> None:
    with client(tmp_path, ANSWER, ANSWER, budget="1") as viaticum:
        viaticum.solve(QUESTION, thread_id="t")
        viaticum.solve(QUESTION, thread_id="t")
    assert len(named(spans, "chat")) == 1
    assert sum(point.count for point in points(reader)["gen_ai.client.operation.duration"]) == 1


async def test_the_span_of_the_caller_is_the_parent(
    tmp_path: Path, spans: InMemorySpanExporter, provider: TracerProvider
) -> None:
    """Also of asynchronous runs, whose work is done in other threads, and of streams closed early."""
    tracer = provider.get_tracer("test")
    opened, span = client(tmp_path, ANSWER, ANSWER, budget="1"), tracer.start_as_current_span("mine")
    with opened as viaticum, span as mine:
        await viaticum.asolve(QUESTION)
        viaticum.solve(QUESTION)
        list(viaticum.stream(QUESTION))
        events = viaticum.stream(QUESTION)
        next(events)
        await asyncio.to_thread(events.close)  # type: ignore[attr-defined]
    runs = named(spans, "invoke_workflow")
    assert len(runs) == 4
    assert {run.parent.span_id for run in runs} == {mine.get_span_context().span_id}  # type: ignore[union-attr]
    ids = {run.context.span_id for run in runs}
    assert {call.parent.span_id for call in named(spans, "chat")} <= ids  # type: ignore[union-attr]


def test_the_server_s_calls_have_spans_of_their_kind(tmp_path: Path, spans: InMemorySpanExporter) -> None:
    with serving(tmp_path) as server:
        assert server.ask("fast").status_code == 200
        assert server.ask("auto").status_code == 200
        server.assert_settled()
    plain, routed = named(spans, "chat fast")
    assert plain.kind == SpanKind.INTERNAL
    assert "viaticum.route" not in attributes(plain)
    assert attributes(routed)["viaticum.route"] == "fast+cot"


def test_langsmith_sees_the_route(tmp_path: Path) -> None:
    from langchain_core.callbacks import BaseCallbackHandler

    class Seen(BaseCallbackHandler):
        metadata: dict[str, Any] = {}  # noqa: RUF012

        def on_chat_model_start(self, *args: Any, metadata: Any = None, **kwargs: Any) -> None:
            type(self).metadata = metadata

    with client(tmp_path, ANSWER, ANSWER, budget="1", policy="best") as viaticum:
        viaticum.graph.invoke(
            {"question": QUESTION}, {"callbacks": [Seen()], "configurable": {"thread_id": "t"}}
        )
    seen = Seen.metadata
    assert seen["ls_model_name"] == LARGE
    assert seen["viaticum_route"] == f"{LARGE}+cot"
    assert seen["viaticum_expected_accuracy"] == 0.7
    assert "highest expected accuracy" in seen["viaticum_why"]


def test_spans_arrive_at_a_collector(tmp_path: Path, provider: TracerProvider) -> None:
    """A receiver of OTLP over HTTP on loopback, and the real exporter."""
    bodies: list[bytes] = []

    async def receive(request: Request) -> Response:
        bodies.append(await request.body())
        return Response(media_type="application/x-protobuf")

    with served(Starlette(routes=[Route("/v1/traces", receive, methods=["POST"])])) as port:
        exporter = OTLPSpanExporter(f"http://127.0.0.1:{port}/v1/traces", timeout=60)
        processor = SimpleSpanProcessor(exporter)
        provider.add_span_processor(processor)
        with client(tmp_path, ANSWER, ANSWER, budget="1") as viaticum:
            viaticum.solve(QUESTION)
        processor.shutdown()
    arrived = [ExportTraceServiceRequest.FromString(body) for body in bodies]
    names = [
        span.name
        for request in arrived
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert "invoke_workflow viaticum" in names
    assert f"chat {SMALL}" in names or f"chat {LARGE}" in names


def test_without_the_package_nothing_is_recorded(
    tmp_path: Path, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "trace", None)
    with client(tmp_path, ANSWER, ANSWER, budget="1") as viaticum:
        answer = viaticum.solve(QUESTION, kind="number")
        viaticum.feedback(QUESTION, answer, correct=False)
    assert answer.value == "5"
    assert spans.get_finished_spans() == ()
    assert telemetry.current() is None
