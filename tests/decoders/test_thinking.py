"""Budget forcing against its definition on uncached models: lengths, tags, stop ids, loops, pairs, drafts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import NEAR, VOCABULARY, Letters, a_prompt, build, empty, plain_logits

from viaticum.decoders import LoopGuard, MixedDecoder, Request, Result, Sampling, ThinkingLimit, TorchRunner
from viaticum.errors import InputError
from viaticum.routers.token import EntropyRouter, ReplayRouter, TokenRouter
from viaticum.thinking import Tags, ThinkingFormat

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = NEAR + 1
OPEN, CLOSE = "WX", "YZ"  # tokens 22 to 25
FORMAT = ThinkingFormat((Tags((OPEN,), (CLOSE,)),), thinks=True)
LIMIT = ThinkingLimit((24, 25))
Next = Callable[[list[int], int], int]


def greedy(seed: int) -> Next:
    return lambda tokens, _: int(plain_logits(tokens, seed=seed).argmax())


def defined(
    request: Request, next_token: Next, stops: Sequence[int] = ()
) -> tuple[list[int], list[bool], str | None]:
    """Budget forcing as it is defined, on whole texts: tokens, which were forced, and what closed it."""
    prompt, length, limit = list(request.prompt), request.max_new_tokens, request.thinking_limit
    tokens, forced = list(prompt), []
    opened, closed_by = bool(request.inside_thought), None
    if limit is None:
        limit, opened = ThinkingLimit((99,)), False

    def force(ids: Sequence[int], reason: str) -> str:
        tokens.extend(ids)
        forced.extend([True] * len(ids))
        return reason

    def begin() -> int | None:
        """Output tokens before the thought, with its opening tag but for the last token of that."""
        text = Letters().decode(tokens[len(prompt) :])
        if opened:
            return 0
        return len(OPEN) - 1 if request.thinking.tags and text.startswith(OPEN) else None

    if limit.budget == 0 and (ids := limit.close_ids if opened else limit.empty_ids):
        closed_by = force(ids, "budget")
    while len(forced) < length:
        token = next_token(tokens, len(forced))
        room = length - len(forced) > len(limit.close_ids)
        if closed_by is None and begin() is not None and token in stops and room:
            closed_by = force(limit.close_ids, "stop")
            continue
        tokens.append(token)
        forced.append(False)
        if token in stops:
            break
        first = begin()
        if closed_by is not None or first is None:
            continue
        if Letters().decode(tokens[len(prompt) :]).find(CLOSE, 0 if opened else len(OPEN)) >= 0:
            closed_by = "model"
        elif limit.budget is not None and length - len(forced) > len(limit.close_ids):
            left = length - len(forced) - len(limit.close_ids) - max(1, limit.answer)
            if len(forced) - first >= limit.budget or left <= 0:
                closed_by = force(limit.close_ids, "budget")
    return tokens[len(prompt) :], forced, closed_by


def decoder(router: TokenRouter | None = None, *, alone: bool = False, **values: Any) -> MixedDecoder:
    slots = values.pop("slots", 1)
    large = TorchRunner(build(seed=1), slots=slots)
    small = None if alone else TorchRunner(build(seed=SMALL), slots=slots)
    return MixedDecoder(
        large, small, **{"tokenizer": Letters(), "draft_cost": 0.1, "router": router, **values}
    )


def of(result: Result) -> tuple[list[int], list[bool], str | None]:
    trace = result.trace
    forced = list(trace.forced) or [False] * len(trace.tokens)
    return list(trace.tokens), forced, result.thought_closed_by


def thinking(prompt: Sequence[int], length: int, limit: ThinkingLimit, inside: bool = True) -> Request:
    return Request(prompt, length, thinking=FORMAT, inside_thought=inside or None, thinking_limit=limit)


def requests(seed: int, count: int, length: int = 24) -> list[Request]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        limit = replace(LIMIT, budget=rng.choice([0, 1, 2, 5, 9, 30, None]), answer=rng.choice([0, 0, 4]))
        request = thinking(a_prompt(rng), length, limit)
        if rng.random() < 0.3:
            limit = replace(limit, empty_ids=(22, 23, 24, 25))
            request = replace(request, inside_thought=None, thinking_limit=limit)
        made.append(rng.choice([request, request, Request(request.prompt, length)]))
    return made


def expected(request: Request, stops: Sequence[int] = ()) -> tuple[list[int], list[bool], str | None]:
    return defined(request, greedy(1), stops)


def shown(tokens: Sequence[int], end: int | None = None) -> str:
    return Letters().decode(list(tokens[:end]))


@pytest.mark.parametrize("draft", [0, 1, 3, 20, None])
def test_a_lossless_pair_forces_as_the_large_model_alone(draft: int | None) -> None:
    """Unlike requests in one batch, thoughts of every budget beside texts without one."""
    under_test = decoder(alone=draft == 0, slots=3, draft=draft)
    todo = requests(draft or 0, 8)
    results = under_test.generate_all(todo)
    for request, result in zip(todo, results, strict=True):
        assert of(result) == expected(request)
        assert sum(count.output_tokens for count in result.usage.values()) == len(result.trace.tokens)
    assert any(result.thought_closed_by == "budget" for result in results)
    assert empty(under_test)


@pytest.mark.parametrize("draft", [0, 2, None])
@pytest.mark.parametrize("kind", ["r-stitch", "r2r", "replay"])
def test_a_routed_pair_reads_what_was_forced(kind: str, draft: int | None) -> None:
    """The tokens are those that each of the two models writes after the whole text, uncached."""
    rng = random.Random(kind)
    routers: dict[str, TokenRouter] = {
        "r-stitch": EntropyRouter(0.75),
        "r2r": ReplayRouter([[rng.random() < 0.3 for _ in range(40)] for _ in range(8)]),
        "replay": ReplayRouter([[rng.random() < 0.6 for _ in range(40)] for _ in range(8)]),
    }
    under_test = decoder(routers[kind], slots=3, draft=draft)
    todo = requests(7, 6, 16)
    for request, result in zip(todo, under_test.generate_all(todo), strict=True):
        made_by, forced = result.trace.made_by, result.trace.forced or (False,) * 99
        tokens = list(request.prompt)
        for position, token in enumerate(result.trace.tokens):
            if not forced[position]:
                assert token == greedy(1 if made_by[position] else SMALL)(tokens, 0)
            tokens.append(token)
        limit = request.thinking_limit
        if limit and request.inside_thought and result.thought_closed_by == "budget":
            budget = min(limit.budget or 0, 16 - 2 - max(1, limit.answer))
            assert forced.index(True) == budget
            assert len(result.thinking) == budget
            reasoning = sum(count.reasoning_tokens for count in result.usage.values())
            assert reasoning == (budget + 2 if budget else 0)
    assert empty(under_test)


def test_a_stop_id_inside_the_thought_closes_it_once() -> None:
    """Whoever writes it; after the thought it ends the text as ever."""
    request = thinking([3, 1, 4], 24, LIMIT)
    for stop in set(expected(request)[0][:6]):
        goal = expected(request, [stop])
        for draft in (0, 3):
            result = decoder(stop_ids=[stop], draft=draft).generate(request)
            assert of(result) == goal
            assert result.thinking == shown(goal[0], goal[1].index(True))
        stitched = decoder(EntropyRouter(1.0), stop_ids=[stop]).generate(request)
        assert chr(0x41 + stop) not in stitched.thinking


def test_sampled_drafts_leave_the_distribution_and_the_budget() -> None:
    """A greedy-like sample: the top token only, so that the text is known though every step is sampled."""
    sampling = Sampling(temperature=1.0, top_k=1, seed=5)
    for request in requests(3, 5):
        sampled = replace(request, sampling=sampling)
        for draft in (0, 4):
            assert of(decoder(draft=draft).generate(sampled)) == expected(request)
    free = thinking([1, 2, 3], 30, replace(LIMIT, budget=7))
    free = replace(free, sampling=Sampling(1.0, seed=8))
    alone, batched = decoder(draft=2), decoder(draft=2, slots=4)
    same = [result.trace for result in batched.generate_all([free, *requests(1, 5), free])]
    assert same[0].tokens == same[-1].tokens == alone.generate(free).trace.tokens
    assert same[0].forced == (False,) * 7 + (True, True) + (False,) * 21


def test_a_loop_in_the_thought_closes_it_and_a_loop_in_the_answer_ends_the_text() -> None:
    model = build()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # always token 0
    under_test = MixedDecoder(TorchRunner(model), tokenizer=Letters(), loop_guard=LoopGuard(4, 2, 10))
    result = under_test.generate(thinking([1], 100, LIMIT))
    assert (result.thinking, result.text) == ("A" * 10, "A" * 10)
    assert (result.finish_reason, result.thought_closed_by) == ("loop", "loop")
    assert result.usage["large"].reasoning_tokens == 12
    no_room = under_test.generate(thinking([1], 12, LIMIT))
    assert (no_room.thinking, no_room.text, no_room.finish_reason) == ("A" * 10, "", "loop")
    assert no_room.thought_closed_by is None


def test_a_model_that_opens_thought_after_thought_ends() -> None:
    """Thoughts share the budget, so that each further one is closed at once; after three the text ends."""
    model = build()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # always token 0
    under_test = MixedDecoder(TorchRunner(model), tokenizer=Letters(), loop_guard=None)
    request = replace(
        thinking([1], 1000, replace(LIMIT, budget=5)),
        thinking=ThinkingFormat((Tags(("A",), (CLOSE,)),), thinks=True),
    )
    result = under_test.generate(request)
    assert result.finish_reason == "loop"
    assert sum(result.trace.forced) == 3 * len(CLOSE)
    assert len(result.trace.tokens) == 5 + 3 * len(CLOSE) + 3


@pytest.mark.parametrize("draft", [0, 3])
def test_a_stop_id_right_after_the_thought_is_replaced_by_the_cue(draft: int) -> None:
    """The thought is closed by the model's own fourth token, which is the closing tag here."""
    plain = thinking([3, 1, 4], 24, LIMIT)
    tokens = expected(plain)[0]
    at = next(n for n in range(1, 20) if tokens[n] not in tokens[:n] and tokens[n + 1] not in tokens[: n + 1])
    tag, stop = shown(tokens[at : at + 1]), tokens[at + 1]
    request = replace(plain, thinking=ThinkingFormat((Tags((OPEN,), (tag,)),), thinks=True))
    ended = decoder(draft=draft, stop_ids=[stop]).generate(request)
    assert (ended.text, ended.finish_reason, ended.thought_closed_by) == ("", "stop", "model")
    cued = replace(request, thinking_limit=replace(LIMIT, cue_ids=(60, 61)))
    result = decoder(draft=draft, stop_ids=[stop]).generate(cued)
    assert result.trace.tokens[: at + 3] == (*tokens[: at + 1], 60, 61)
    assert result.text.startswith(shown([60, 61]))
    assert result.thought_closed_by == "model"


def test_events_tell_the_forced_tokens_and_an_abort_keeps_them() -> None:
    engine = decoder(draft=2).engine()
    index = engine.add(thinking([5, 6], 20, replace(LIMIT, budget=0)))
    events = engine.step()
    assert [event.token for event in events][:2] == [24, 25]
    engine.abort(index)
    (*_, last) = [*events, *engine]
    assert last.result is not None
    assert last.result.finish_reason == "aborted"
    assert last.result.thought_closed_by == "budget"
    assert last.result.trace.tokens == tuple(event.token for event in events)
    assert last.result.text == shown(last.result.trace.tokens[2:])


def test_stop_strings_hold_outside_of_the_thought() -> None:
    request = thinking([3, 1, 4], 24, replace(LIMIT, budget=6))
    tokens = expected(request)[0]
    thought, answer = shown(tokens, 6), shown(tokens[8:])
    inside = thought[2:4]
    stopped = decoder(draft=2).generate(replace(request, stop=(inside,)))
    assert (stopped.thinking, stopped.text) == (thought, answer.partition(inside)[0])
    after = decoder().generate(replace(request, stop=(answer[4:6],)))
    assert (after.thinking, after.text) == (thought, answer.partition(answer[4:6])[0])


def test_no_room_for_an_answer_leaves_the_thought_open() -> None:
    for length in (1, 2):
        result = decoder().generate(thinking([3, 1], length, replace(LIMIT, budget=0)))
        assert (result.finish_reason, result.thought_closed_by) == ("length", None)
        assert len(result.trace.tokens) == length
    result = decoder().generate(thinking([3, 1], 3, replace(LIMIT, budget=0)))
    assert result.trace.forced == (True, True, False)


@pytest.mark.parametrize(
    "values",
    [{"close_ids": ()}, {"budget": -1}, {"answer": -1}],
)
def test_a_limit_that_makes_no_sense(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        replace(LIMIT, **values)


def test_a_closing_tag_that_is_not_in_the_vocabulary() -> None:
    with pytest.raises(InputError, match=str(VOCABULARY)):
        decoder().check(thinking([1], 9, replace(LIMIT, close_ids=(VOCABULARY,))))
