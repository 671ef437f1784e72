"""`with viaticum.budget(...)`: calls of unchanged clients are held, whatever thread or task makes them."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from typing import Any

import httpx
import openai
import pytest
from forms_server import FormsServer
from langchain_openai import ChatOpenAI

import viaticum
from viaticum.agents.instrumentation.scope import BudgetScope
from viaticum.agents.instrumentation.usage import UsageReader
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue
from viaticum.errors import BudgetError, InputError
from viaticum.models.remote.request import load_litellm
from viaticum.types import TokenCount

PRICES = {"small": ("1", "2")}
COST = Decimal("0.000022")  # 12 tokens read and 5 written


ASK = [{"role": "user", "content": "2+2?"}]


def chat(server: FormsServer) -> str:
    done = server.openai().chat.completions.create(model="small", messages=ASK)  # type: ignore[arg-type]
    return done.choices[0].message.content or ""


def chat_stream(server: FormsServer) -> str:
    stream = server.openai().chat.completions.create(model="small", messages=ASK, stream=True)  # type: ignore[arg-type]
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)  # without an empty last chunk


def raw_stream(server: FormsServer) -> str:
    with server.openai().chat.completions.with_streaming_response.create(model="small", messages=ASK) as got:  # type: ignore[arg-type]
        return got.parse().choices[0].message.content or ""


def responses(server: FormsServer) -> str:
    return server.openai().responses.create(model="small", input="2+2?").output_text


def responses_stream(server: FormsServer) -> str:
    events = server.openai().responses.create(model="small", input="2+2?", stream=True)
    return "".join(each.delta for each in events if each.type == "response.output_text.delta")


def messages(server: FormsServer) -> str:
    done = server.anthropic().messages.create(model="small", messages=ASK, max_tokens=50)  # type: ignore[arg-type]
    return done.content[0].text  # type: ignore[union-attr]


def messages_stream(server: FormsServer) -> str:
    with server.anthropic().messages.stream(model="small", messages=ASK, max_tokens=50) as stream:  # type: ignore[arg-type]
        return "".join(stream.text_stream)


def by_litellm(server: FormsServer) -> str:
    done = load_litellm().completion("openai/small", ASK, api_base=f"{server.url}/v1", api_key="k")
    return done.choices[0].message.content


def by_litellm_async(server: FormsServer) -> str:
    async def ask() -> str:
        done = await load_litellm().acompletion("openai/small", ASK, api_base=f"{server.url}/v1", api_key="k")
        return done.choices[0].message.content

    return asyncio.run(ask())


def by_litellm_anthropic(server: FormsServer) -> str:
    done = load_litellm().completion("anthropic/small", ASK, api_base=server.url, api_key="k")
    return done.choices[0].message.content


def by_langchain(server: FormsServer) -> str:
    model = ChatOpenAI(model="small", base_url=f"{server.url}/v1", api_key="k")  # type: ignore[arg-type]
    return str(model.invoke("2+2?").text)


WAYS = [
    chat,
    chat_stream,
    raw_stream,
    responses,
    responses_stream,
    messages,
    messages_stream,
    by_litellm,
    by_litellm_async,
    by_litellm_anthropic,
    by_langchain,
]


@pytest.mark.parametrize("way", WAYS)
def test_a_call_of_any_client_is_held_and_costs_what_its_provider_reports(
    server: FormsServer, way: Callable[[FormsServer], str]
) -> None:
    with viaticum.budget("0.50", prices=PRICES) as budget:
        assert way(server) == "It is four."
    assert len(server.calls) == 1
    assert budget.calls == {"small": 1}
    state = budget.left()
    assert state.posted_usd == COST
    assert state.held_nanousd == 0
    assert budget.ledger.check() == []


@pytest.mark.parametrize("way", WAYS)
def test_what_does_not_fit_is_not_sent_and_not_tried_again(
    server: FormsServer, way: Callable[[FormsServer], str]
) -> None:
    with viaticum.budget("0.0001", prices=PRICES) as budget, pytest.raises(Exception, match="left"):
        way(server)
    assert server.calls == []
    assert budget.left().posted_nanousd == 0
    assert budget.refused == {"the budget is used up": 1}


def test_outside_a_budget_nothing_changes(server: FormsServer) -> None:
    with viaticum.budget("1", prices=PRICES):
        pass
    chat_stream(server)
    assert "stream_options" not in server.calls[0][1]
    assert "max_tokens" not in server.calls[0][1]


def test_a_call_without_a_limit_gets_one_that_can_be_paid_for(server: FormsServer) -> None:
    with viaticum.budget("0.003", prices=PRICES, max_tokens=4096):
        chat(server)
    sent = server.calls[0][1]["max_tokens"]
    assert 256 <= sent < 4096
    with viaticum.budget("1", prices=PRICES, max_tokens=4096):
        chat(server)
        server.openai().chat.completions.create(model="small", messages=ASK, max_tokens=7)  # type: ignore[arg-type]
    assert [body["max_tokens"] for _, body in server.calls[1:]] == [4096, 7]


def test_threads_pools_and_tasks_inside_belong_to_the_budget(server: FormsServer) -> None:
    async def both() -> None:
        async with openai.AsyncOpenAI(api_key="k", base_url=f"{server.url}/v1") as asking:

            async def ask() -> None:
                await asking.chat.completions.create(model="small", messages=ASK)  # type: ignore[arg-type]

            await asyncio.gather(ask(), ask())
            await asyncio.to_thread(chat, server)
            await asyncio.get_running_loop().run_in_executor(None, chat, server)

    with viaticum.budget("1", prices=PRICES) as outer, viaticum.budget("1", prices=PRICES) as inner:
        threads = [threading.Thread(target=chat, args=(server,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(chat, [server, server]))
        asyncio.run(both())
    assert len(server.calls) == 9
    assert inner.calls == {"small": 9}
    assert inner.left().posted_usd == outer.left().posted_usd == 9 * COST
    assert outer.calls == {}


def test_a_budget_inside_takes_over_what_it_is_not_given(
    server: FormsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    load = Catalogue.load.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Catalogue, "load", classmethod(lambda cls, path=None: loaded.append(path) or load(cls, path))
    )
    image: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with viaticum.budget("1", prices=PRICES, unpriced=["free"], image_tokens=500, count=len) as outer:
        with viaticum.budget("0.5") as inner, viaticum.budget("0.4", prices={"other": (1, 1)}) as third:
            chat(server)
            server.openai().chat.completions.create(model="free", messages=ASK)  # type: ignore[arg-type]
            server.openai().chat.completions.create(
                model="other", messages=[{"role": "user", "content": [image]}], max_tokens=9
            )
        with viaticum.budget("0.5", prices={"small": ("2", "4")}) as dearer:
            chat(server)
        with viaticum.budget("0.5", prices={"free": ("1", "2")}, unpriced=["small"]) as swapped:
            chat(server)
            server.openai().chat.completions.create(model="free", messages=ASK)  # type: ignore[arg-type]
    other = Decimal("0.000017")
    assert third.calls == {"small": 1, "free": 1, "other": 1}
    assert third.left().posted_usd == inner.left().posted_usd == COST + other
    assert dearer.left().posted_usd == 2 * COST
    assert swapped.left().posted_usd == COST
    assert outer.left().posted_usd == 4 * COST + other
    assert outer.refused == inner.refused == third.refused == {}
    assert loaded == [None], "the catalogue is read once"


def test_budgets_side_by_side_pay_for_their_own_calls(server: FormsServer) -> None:
    async def one(number: int) -> BudgetScope:
        async with (
            viaticum.budget("1", prices=PRICES) as budget,
            openai.AsyncOpenAI(api_key="k", base_url=f"{server.url}/v1") as asking,
        ):
            for _ in range(number):
                await asking.chat.completions.create(model="small", messages=ASK)  # type: ignore[arg-type]
                await asyncio.sleep(0.01)
        return budget

    async def all_of_them() -> list[BudgetScope]:
        return await asyncio.gather(*(one(number) for number in (1, 2, 3)))

    assert [budget.calls.total() for budget in asyncio.run(all_of_them())] == [1, 2, 3]


def test_a_client_and_its_thread_of_before_are_held_too(server: FormsServer) -> None:
    asking, go, done = server.openai(), threading.Event(), threading.Event()

    def work() -> None:
        go.wait(60)
        asking.chat.completions.create(model="small", messages=ASK)  # type: ignore[arg-type]
        done.set()

    threading.Thread(target=work, daemon=True).start()
    with viaticum.budget("1", prices=PRICES) as budget:
        go.set()
        assert done.wait(60)
    assert budget.left().posted_usd == COST


def test_an_inner_budget_stops_before_the_outer_one(server: FormsServer) -> None:
    with viaticum.budget("1", prices=PRICES) as outer:
        with viaticum.budget("0.0001", prices=PRICES), pytest.raises(openai.APIStatusError):
            chat(server)
        chat(server)
    assert outer.left().posted_usd == COST
    assert len(server.calls) == 1


@pytest.mark.parametrize("status", [400, 429, 500])
def test_an_error_of_the_provider_costs_nothing(server: FormsServer, status: int) -> None:
    server.script = [status]
    with viaticum.budget("1", prices=PRICES) as budget, pytest.raises(openai.APIStatusError):
        server.openai(max_retries=0).chat.completions.create(model="small", messages=ASK)  # type: ignore[arg-type]
    assert (budget.left().posted_nanousd, budget.left().held_nanousd) == (0, 0)


def test_each_try_of_a_client_is_held_by_itself(server: FormsServer) -> None:
    server.script = ["drop", 500]
    with viaticum.budget("1", prices=PRICES, max_tokens=256) as budget:
        chat(server)
    assert len(server.calls) == 3
    assert budget.calls == {"small": 3}
    assert budget.left().posted_usd > COST  # the dropped try may have been charged for
    assert budget.left().held_nanousd == 0


def test_a_server_that_cannot_be_reached_costs_nothing() -> None:
    nobody = openai.OpenAI(api_key="k", base_url="http://127.0.0.1:9/v1", max_retries=0)
    with viaticum.budget("1", prices=PRICES) as budget, pytest.raises(openai.APIConnectionError):
        nobody.chat.completions.create(model="small", messages=ASK)  # type: ignore[arg-type]
    assert (budget.left().posted_nanousd, budget.left().held_nanousd) == (0, 0)


def test_a_stream_that_is_left_early_costs_what_was_held(server: FormsServer) -> None:
    server.pause = 0.05
    with viaticum.budget("1", prices=PRICES) as budget:
        stream = server.openai().chat.completions.create(
            model="small",
            messages=ASK,
            stream=True,
            max_tokens=1000,  # type: ignore[arg-type]
        )
        next(iter(stream))
        stream.close()
    assert Decimal("0.002") < budget.left().posted_usd < Decimal("0.0025")
    assert budget.left().held_nanousd == 0


def left_at_its_end(server: FormsServer, way: str) -> None:
    """Read a stream up to the event that ends the answer, as many callers do, and no further."""
    settings: Any = {"model": "small", "messages": ASK, "stream": True, "max_tokens": 1000}
    if way == "openai":
        for chunk in server.openai().chat.completions.create(**settings):
            if chunk.choices[0].finish_reason:
                break
    elif way == "openai async":

        async def read() -> None:
            async with openai.AsyncOpenAI(api_key="k", base_url=f"{server.url}/v1") as client:
                async for chunk in await client.chat.completions.create(**settings):
                    if chunk.choices[0].finish_reason:
                        break

        asyncio.run(read())
    elif way == "anthropic":
        for event in server.anthropic().messages.create(**settings):
            if event.type == "message_delta":
                break
    else:
        with (
            httpx.Client() as client,
            client.stream("POST", f"{server.url}/v1/chat/completions", json=settings) as response,
        ):
            next(line for line in response.iter_lines() if '"finish_reason": "stop"' in line)


@pytest.mark.parametrize("way", ["openai", "openai async", "anthropic", "httpx"])
def test_a_stream_that_is_left_at_the_end_of_its_answer_costs_what_is_reported(
    server: FormsServer, way: str
) -> None:
    """The report comes right after it; without it all that was held would be charged."""
    server.pause = 0.02
    with viaticum.budget("1", prices=PRICES) as budget:
        left_at_its_end(server, way)
        gc.collect()
        assert budget.left().posted_usd == COST
        assert budget.left().held_nanousd == 0


def test_a_stream_that_nobody_closes_is_settled_once_nobody_has_it(server: FormsServer) -> None:
    settings = {"model": "small", "messages": ASK, "stream": True, "max_tokens": 1000}
    with viaticum.budget("1", prices=PRICES) as budget, httpx.Client() as client:
        request = client.build_request("POST", f"{server.url}/v1/chat/completions", json=settings)
        lines = client.send(request, stream=True).iter_lines()
        next(lines)
        assert budget.left().held_nanousd > 0
        del lines
        gc.collect()
        assert budget.left().held_nanousd == 0
        assert Decimal("0.002") < budget.left().posted_usd < Decimal("0.0025")


def test_the_end_of_an_answer_waits_for_the_event_after_it() -> None:
    """Of each of several choices; and where no report comes, it passes with the end of the stream."""

    def event(**chunk: Any) -> bytes:
        return b"data: " + json.dumps(chunk).encode() + b"\n\n"

    first, second = (event(choices=[{"index": n, "delta": {}, "finish_reason": "stop"}]) for n in (0, 1))
    report = event(choices=[], usage={"prompt_tokens": 12, "completion_tokens": 5})
    reader = UsageReader("chat", hides_usage=True)
    assert reader.feed(first) == b""
    assert reader.feed(b": still there\n\n") == b": still there\n\n"
    assert reader.feed(second) == first
    assert not reader.is_complete
    assert reader.feed(report) == second
    assert reader.is_complete
    assert reader.count() == TokenCount(12, 5)
    assert reader.feed(b"data: [DONE]\n\n") == b"data: [DONE]\n\n"
    reader = UsageReader("chat")
    usage = {"prompt_tokens": 12, "completion_tokens": 5}
    reader.feed(event(choices=[{"index": 0, "delta": {"content": "It"}, "finish_reason": None}], usage=usage))
    assert not reader.is_complete, "a sum of what was written so far"
    assert reader.feed(first) == b""
    last = event(choices=[{"index": 0, "delta": {"content": ""}, "finish_reason": None}], usage=usage)
    assert reader.feed(last) == first + last
    assert reader.is_complete, "a report in an event with a choice, as OpenRouter sends it"
    early = UsageReader("chat")
    early.feed(event(choices=[], usage=usage))
    assert not early.is_complete, "before any choice"
    pair = UsageReader("chat", answers=2)
    pair.feed(event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}], usage=usage))
    assert not pair.is_complete, "the second one has not begun"
    pair.feed(event(choices=[{"index": 1, "delta": {}, "finish_reason": "stop"}], usage=usage))
    assert pair.is_complete
    unreported = UsageReader("chat")
    assert unreported.feed(first) == b""
    assert unreported.finish() == first
    assert unreported.count() is None


@pytest.mark.parametrize(("read", "written"), [(0, 0), (12, 0), (-3, 5)])
def test_a_report_that_cannot_be_true_costs_what_was_held(
    server: FormsServer, read: int, written: int
) -> None:
    server.read, server.written = read, written
    with viaticum.budget("1", prices=PRICES) as budget:
        server.openai().chat.completions.create(model="small", messages=ASK, max_tokens=1000)  # type: ignore[arg-type]
    assert Decimal("0.002") < budget.left().posted_usd < Decimal("0.0025")


def test_what_a_request_refers_to_is_counted_from_earlier_reports(server: FormsServer) -> None:
    with viaticum.budget("1", prices=PRICES) as budget:
        first = server.openai().responses.create(model="small", input="2+2?")
        server.read = 40
        server.openai().responses.create(model="small", input="and 3+3?", previous_response_id=first.id)
        kept = [each.model_dump() for each in first.output]
        server.openai().responses.create(model="small", input=[*kept, {"role": "user", "content": "more"}])
        with pytest.raises(openai.BadRequestError, match="lies with the provider"):
            server.openai().responses.create(model="small", input="x", previous_response_id="resp_of_others")
    assert len(server.calls) == 3
    assert budget.calls == {"small": 3}
    assert budget.ledger.check() == []


UNBOUND: list[tuple[str, dict[str, Any], str]] = [
    ("an unknown price", {"model": "other"}, "no price of 'other'"),
    (
        "an image",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}]},
        "image_tokens",
    ),
    ("sound", {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input_audio"),
    ("the provider's search", {"web_search_options": {"user_location": None}}, "web_search_options"),
    ("a dearer tier", {"service_tier": "priority"}, "service_tier"),
    ("sound as an answer", {"modalities": ["text", "audio"], "audio": {"voice": "a"}}, "audio"),
]


@pytest.mark.parametrize(
    ("given", "said"), [(given, said) for _, given, said in UNBOUND], ids=[n for n, *_ in UNBOUND]
)
def test_what_has_no_bound_is_refused_or_told(
    server: FormsServer, caplog: pytest.LogCaptureFixture, given: dict[str, Any], said: str
) -> None:
    request: dict[str, Any] = {"model": "small", "messages": ASK, **given}
    with viaticum.budget("1", prices=PRICES) as budget, pytest.raises(openai.BadRequestError, match=said):
        server.openai().chat.completions.create(**request)
    assert server.calls == []
    assert budget.refused.total() == 1
    with viaticum.budget("1", prices=PRICES, unheld="allow", name="open") as budget:
        server.openai().chat.completions.create(**request)
    assert len(server.calls) == 1
    assert budget.unheld.total() == 1
    assert "the budget open did not hold" in caplog.text
    assert said in caplog.text


def test_images_are_held_by_a_stated_bound(server: FormsServer) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    with viaticum.budget("0.01", prices=PRICES, image_tokens=1500, max_tokens=256) as budget:
        server.openai().chat.completions.create(
            model="small",
            messages=[{"role": "user", "content": [{"type": "text", "text": "?"}, image]}],  # type: ignore[list-item,misc]
        )
    assert budget.left().posted_usd == COST
    assert server.calls[0][1]["messages"][0]["content"][1] == image


def test_embeddings_are_held(server: FormsServer) -> None:
    with viaticum.budget("1", prices=PRICES) as budget:
        server.openai().embeddings.create(model="small", input=["a", "b"])
    assert budget.left().posted_usd == Decimal("0.000012")


def test_several_answers_are_held_together(server: FormsServer) -> None:
    with viaticum.budget("0.003", prices=PRICES), pytest.raises(openai.APIStatusError):
        server.openai().chat.completions.create(model="small", messages=ASK, n=2, max_tokens=1000)  # type: ignore[arg-type]
    assert server.calls == []


def test_estimated_holds_learn_from_reports(server: FormsServer) -> None:
    long: Any = [{"role": "user", "content": "word " * 2000}]
    server.read = 2000

    def calls(holds: Any) -> int:
        with viaticum.budget("0.25", prices={"small": ("10", "10")}, holds=holds) as budget:
            for _ in range(10):
                with suppress(openai.APIStatusError):
                    server.openai().chat.completions.create(model="small", messages=long, max_tokens=10)
        assert budget.ledger.check() == []
        return budget.calls.total()

    assert calls("bound") == 8  # each is held at ten cents and costs two
    assert calls("estimated") == 10


def test_a_budget_of_a_ledger_goes_on(server: FormsServer, tmp_path: Any) -> None:
    for _ in range(2):
        with (
            Ledger(tmp_path / "l.db") as ledger,
            viaticum.budget("1", name="job", ledger=ledger, prices=PRICES),
        ):
            chat(server)
    with Ledger(tmp_path / "l.db") as ledger:
        assert ledger.budget("job").posted_usd == 2 * COST
        with pytest.raises(BudgetError):
            viaticum.budget("2", name="job", ledger=ledger)
        with viaticum.budget(name="job", ledger=ledger, prices=PRICES):
            chat(server)
        assert ledger.budget("job").posted_usd == 3 * COST


def test_wrong_settings_say_so() -> None:
    for wrong in ({"limit": "0"}, {"limit": 1, "unheld": "x"}, {"limit": 1, "max_tokens": 0}):
        with pytest.raises(InputError):
            viaticum.budget(**wrong)  # type: ignore[arg-type]


def test_prices_of_known_providers_come_from_the_list() -> None:
    from viaticum.agents.instrumentation.prices import CallPrices
    from viaticum.agents.instrumentation.requests import model_call

    prices = CallPrices({}, None, ())
    for host, model, rate in (
        ("api.openai.com", "gpt-4o-mini", 150_000_000),
        ("api.anthropic.com", "claude-sonnet-4-5", 3_000_000_000),
    ):
        call = model_call(
            "POST", f"https://{host}/v1/messages", b'{"model": "%s", "messages": []}' % model.encode()
        )
        assert call is not None
        assert prices.price(call).input_nanousd_per_million == rate
    foreign = model_call(
        "POST", "https://proxy.example/v1/messages", b'{"model": "gpt-4o-mini", "messages": []}'
    )
    assert foreign is not None
    with pytest.raises(viaticum.ViaticumError, match=r"proxy\.example"):
        prices.price(foreign)
