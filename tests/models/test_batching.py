"""Many callers of local models at once: the texts are those written alone, and nothing is left behind."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Letters, build, empty, requests_of, single, tokens_of

from viaticum.catalogue import Catalogue
from viaticum.decoders import Event, MixedDecoder, Request, TorchRunner
from viaticum.decoders.blocks import BLOCK
from viaticum.errors import InputError, ModelError
from viaticum.models.base import Generation
from viaticum.models.batching import BatchScheduler
from viaticum.models.local import LocalModels
from viaticum.types import Completion, Message

pytestmark = pytest.mark.usefixtures("one_thread")


def until(condition: Callable[[], bool], seconds: float = 200.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def chat(number: int) -> list[Message]:
    return [{"role": "user", "content": f"How many are {number} and {number * 7}?"}]


def slow_down(monkeypatch: pytest.MonkeyPatch, runner: Any, seconds: float) -> None:
    """Let each step of a model take so much longer: what is done beside it comes in time."""
    forward = runner.forward

    def slow(*given: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return forward(*given, **options)

    monkeypatch.setattr(runner, "forward", slow)


def free(pool: LocalModels) -> bool:
    return all(sorted(each.free_slots) == list(range(pool.slots)) for each in pool._runners.values())


@pytest.fixture
def pool(tiny_catalogue: Catalogue) -> Iterator[LocalModels]:
    pool = LocalModels(tiny_catalogue, slots=3)
    yield pool
    pool.scheduler.close()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_fifty_callers_get_what_each_would_get_alone(
    tiny_catalogue: Catalogue, pool: LocalModels, temperature: float
) -> None:
    names = ["tiny-small", "tiny-large", "tiny-pair"]

    def ask(pool: LocalModels, number: int) -> str:
        generation = Generation(max_new_tokens=4 + number % 9, temperature=temperature, seed=number)
        return pool.model(names[number % 3]).generate(chat(number), generation).text

    alone = LocalModels(tiny_catalogue)
    expected = [ask(alone, number) for number in range(50)]
    assert len(set(expected)) > 25, "else nothing can be told apart"
    with ThreadPoolExecutor(50) as callers:
        assert list(callers.map(lambda number: ask(pool, number), range(50))) == expected
    until(lambda: free(pool))


def test_callers_share_the_calls_of_the_model(
    tiny_catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four texts at once take about the steps of one."""
    pool = LocalModels(tiny_catalogue, slots=4)
    model = pool.model("tiny-small")
    generation = Generation(max_new_tokens=150)
    lengths = [model.generate(chat(number), generation).usage.output_tokens for number in range(4)]
    decoder = model._loaded
    assert decoder is not None
    before = decoder.stats.large.steps
    streams = [model.stream(chat(number), generation) for number in range(4)]
    scheduler, go_on, runner = pool.scheduler, threading.Event(), pool.runner("tiny-small")
    forward = runner.forward

    def held(*given: Any, **options: Any) -> Any:
        assert go_on.wait(200)
        return forward(*given, **options)

    def asked() -> int:
        running = sum(len(queue.running) for queue in list(scheduler._engines.values()))
        return running + len(scheduler._waiting) + len(scheduler._submitted)

    monkeypatch.setattr(runner, "forward", held)
    with ThreadPoolExecutor(4) as callers:
        reading = [callers.submit(list, stream) for stream in streams]
        until(lambda: asked() == 4)
        go_on.set()
        for each in reading:
            each.result()
    assert max(lengths) <= decoder.stats.large.steps - before < 0.75 * sum(lengths)
    until(lambda: free(pool))


def test_a_closed_stream_frees_its_slot_and_the_others_continue(pool: LocalModels) -> None:
    model = pool.model("tiny-pair")
    generation = Generation(max_new_tokens=400)
    expected = model.generate(chat(1), generation).text
    leaving = [model.stream(chat(number), generation) for number in (5, 6)]
    for stream in leaving:
        assert next(stream) is not None
    staying = model.stream(chat(1), generation)
    first = next(staying)
    for stream in leaving:
        stream.close()  # type: ignore[attr-defined]
    until(lambda: all(len(runner.free_slots) >= pool.slots - 1 for runner in pool._runners.values()))
    *pieces, completion = staying
    assert isinstance(completion, Completion)
    assert str(first) + "".join(map(str, pieces)) == completion.text == expected
    until(lambda: free(pool))


def test_no_slot_leaks_when_callers_close_at_random(pool: LocalModels) -> None:
    names = ["tiny-small", "tiny-large", "tiny-pair"]
    expected = {
        name: pool.model(name).generate(chat(0), Generation(max_new_tokens=30)).text for name in names
    }

    def visit(number: int) -> None:
        rng = random.Random(number)
        name = rng.choice(names)
        stays, text = rng.randrange(1, 40), ""
        stream = pool.model(name).stream(chat(0), Generation(max_new_tokens=30))
        for piece in stream:
            stays -= 1
            if isinstance(piece, Completion):
                assert piece.text == expected[name]
                return
            text += piece
            assert expected[name].startswith(text)
            if stays == 0:
                break
        stream.close()  # type: ignore[attr-defined]

    with ThreadPoolExecutor(12) as callers:
        list(callers.map(visit, range(60)))
    until(lambda: free(pool))


def test_a_failed_text_ends_no_other(pool: LocalModels) -> None:
    model = pool.model("tiny-large")
    odd = next(
        iter(set(model.prompt([{"role": "user", "content": "\N{BULLET}"}])) - set(model.prompt(chat(1))))
    )
    with torch.no_grad():
        pool.runner("tiny-large").model.get_input_embeddings().weight[odd] = float("nan")
    generation = Generation(max_new_tokens=20)
    expected = model.generate(chat(1), generation).text

    def ask(number: int) -> str:
        try:
            content = "\N{BULLET}" if number % 3 == 0 else chat(1)[0]["content"]
            return model.generate([{"role": "user", "content": content}], generation).text
        except ModelError as error:
            return type(error).__name__

    with ThreadPoolExecutor(9) as callers:
        got = list(callers.map(ask, range(9)))
    assert got == ["ModelError" if number % 3 == 0 else expected for number in range(9)]
    until(lambda: free(pool))


def test_a_broken_engine_fails_its_callers_and_the_next_one_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder, scheduler = single(1, slots=2), BatchScheduler()
    (request,) = requests_of(0, 1)
    with monkeypatch.context() as broken:
        broken.setattr(decoder.runners[1], "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ModelError, match="ZeroDivisionError"):
            list(scheduler.generate(decoder, [request]))
    assert empty(decoder)
    events = list(scheduler.generate(decoder, [request]))
    assert events[-1][1] is not None
    assert events[-1][1].result is not None
    scheduler.close()


def test_an_impossible_request_is_refused_at_once() -> None:
    decoder, scheduler = single(1), BatchScheduler()
    with pytest.raises(InputError, match="token 97"):
        next(scheduler.generate(decoder, [Request([97], 4)]))
    assert scheduler._thread is None


def test_closing_fails_waiting_requests_and_a_later_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, scheduler = single(1, slots=1), BatchScheduler()
    slow_down(monkeypatch, decoder.runners[1], 0.01)
    requests = requests_of(0, 3, max_new_tokens=2000)
    texts = [scheduler.generate(decoder, [request]) for request in requests]
    for text in texts[:1]:
        next(text)
    with ThreadPoolExecutor(2) as callers:
        waits = [callers.submit(list, text) for text in texts[1:]]
        until(lambda: len(scheduler._waiting) == 2)
        scheduler.close()
        for wait in waits:
            with pytest.raises(ModelError, match="closed"):
                wait.result(200)
    assert empty(decoder)
    assert len(list(scheduler.generate(decoder, requests_of(0, 1)))) >= 12
    scheduler.close()
    assert empty(decoder)


def test_the_thread_ends_when_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("viaticum.models.batching.IDLE_SECONDS", 0.01)
    decoder, scheduler = single(1), BatchScheduler()
    list(scheduler.generate(decoder, requests_of(0, 2)))
    until(lambda: scheduler._thread is None)
    assert len([event for _, event in scheduler.generate(decoder, requests_of(0, 1)) if event]) == 12


def test_a_text_that_waits_for_memory_finds_its_slot_free_again() -> None:
    """Two engines share a runner; short texts keep coming while one of two long ones waits for the other."""
    runner = TorchRunner(build(seed=1), slots=2, context=6 * BLOCK, blocks=6)
    decoders = [MixedDecoder(runner, tokenizer=Letters(), loop_guard=None) for _ in range(2)]
    requests = [*requests_of(3, 2, max_new_tokens=140), *requests_of(4, 6, max_new_tokens=3)]
    one = MixedDecoder(TorchRunner(build(seed=1)), tokenizer=Letters(), loop_guard=None)
    expected, scheduler = tokens_of(one.generate_all(requests)), BatchScheduler()
    texts = [scheduler.generate(decoders[number % 2], [each]) for number, each in enumerate(requests)]

    def read(text: Iterator[tuple[int, Event | None]]) -> tuple[int, ...]:
        (result,) = [event.result for _, event in text if event is not None and event.result is not None]
        return result.trace.tokens

    for text in texts[:2]:
        next(text)
    with ThreadPoolExecutor(8) as callers:
        assert list(callers.map(read, texts)) == expected
    scheduler.close()
    assert all(map(empty, decoders))


def test_an_abandoned_text_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, scheduler = single(1), BatchScheduler()
    slow_down(monkeypatch, decoder.runners[1], 0.005)
    decoder.config = replace(decoder.config, loop_guard=None)
    text = scheduler.generate(decoder, requests_of(0, 1, max_new_tokens=3000))
    assert next(text)[1] is not None
    text.close()  # type: ignore[attr-defined]
    until(lambda: empty(decoder) and not scheduler._engines)
    assert decoder.stats.large.rows < 1000


def test_a_pair_does_not_starve_while_its_two_slots_are_never_free_together(
    tiny_catalogue: Catalogue,
) -> None:
    """Callers of either model keep coming; the pair's text is written all the same."""
    pool, stop = LocalModels(tiny_catalogue, slots=1), threading.Event()

    def keep_asking(number: int) -> None:
        name = ("tiny-small", "tiny-large")[number % 2]
        while not stop.is_set():
            pool.model(name).generate(chat(number), Generation(max_new_tokens=5 + number))

    with ThreadPoolExecutor(9) as callers:
        busy = [callers.submit(keep_asking, number) for number in range(8)]
        pair = callers.submit(lambda: pool.model("tiny-pair").generate(chat(1), Generation(10)).text)
        try:
            assert pair.result(200)
        finally:
            stop.set()
        for each in busy:
            each.result(200)


FIRST_USE = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from viaticum.models.local import LocalModels
from viaticum.models.base import Generation
from viaticum.catalogue import Catalogue

pool, start = LocalModels(Catalogue.load(sys.argv[1]), slots=4), threading.Barrier(12)

def ask(number):
    start.wait()
    if number % 3 == 0:
        import sentence_transformers  # as a router's encoder does
    names = ["tiny-small", "tiny-large", "tiny-pair"]
    chat = [{"role": "user", "content": "hi"}]
    model = pool.model(names[number % 3])
    return model.worst_case(chat, 3), model.generate(chat, Generation(max_new_tokens=3)).text

with ThreadPoolExecutor(12) as callers:
    print(len(list(callers.map(ask, range(12)))))
pool.scheduler.close()
"""


def test_the_first_use_by_many_threads_at_once(tiny_catalogue_file: Path) -> None:
    """Libraries with late imports are seen half imported, unless one thread at a time imports them."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE, str(tiny_catalogue_file)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "12"), done.stderr[-2000:]
