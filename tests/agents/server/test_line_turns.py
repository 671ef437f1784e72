"""Lines of batches that are in memory at once: a bound over all batches, fair to keys."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai_batches import create, ended, jsonl, line, rows, sdk
from viaticum_server import serving, wait_until

from viaticum.agents.server.line_turns import LineTurns


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Taker:
    """Takes turns of a name, and knows how many it has."""

    def __init__(self, turns: LineTurns, name: str) -> None:
        self.turns, self.name, self.has = turns, name, 0
        self.tasks: list[asyncio.Task[None]] = []

    def want(self, count: int) -> None:
        self.tasks += [asyncio.create_task(self._take()) for _ in range(count)]

    async def _take(self) -> None:
        await self.turns.take(self.name)
        self.has += 1

    def end(self, count: int = 1) -> None:
        for _ in range(count):
            self.has -= 1
            self.turns.release(self.name)


async def test_a_name_alone_has_all_turns_and_one_that_comes_its_part_at_once() -> None:
    turns = LineTurns(8)
    first, second, third = (Taker(turns, name) for name in "abc")
    first.want(20)
    await settle()
    assert first.has == turns.taken == 8
    second.want(20)
    await settle()
    assert (first.has, second.has) == (8, 4), "the lines of the other may wait for hours"
    third.want(20)
    await settle()
    assert (first.has, second.has, third.has) == (8, 4, 2)
    first.end(6)  # those that are free go to nobody until no more are taken than there are
    await settle()
    assert (first.has, second.has, third.has) == (2, 4, 2)
    second.end(2)
    await settle()
    assert turns.taken == 8
    assert sorted((first.has, second.has, third.has)) == [2, 3, 3]


async def test_free_turns_go_to_whom_has_the_fewest_the_first_of_them_first() -> None:
    turns, order = LineTurns(2), list[str]()

    async def work(name: str) -> None:
        await turns.take(name)
        order.append(name)
        await asyncio.sleep(0.001)
        turns.release(name)

    names = [*("a" * 12), *("b" * 4)]
    await asyncio.gather(*(work(name) for name in names))
    assert Counter(order) == Counter(names)
    assert "b" in order[:3]
    assert order[-6:] == ["a"] * 6, "who has less to do is not held up"
    assert turns.taken == 0


async def test_with_more_names_than_turns_each_has_one() -> None:
    turns = LineTurns(3)
    takers = [Taker(turns, f"key{n}") for n in range(10)]
    for taker in takers:
        taker.want(5)
    await settle()
    assert [taker.has for taker in takers] == [1] * 10 or (
        min(taker.has for taker in takers) == 1 and turns.taken <= 3 + 10
    )
    for taker in takers[:9]:
        for task in taker.tasks:
            task.cancel()
        await settle()
        taker.end(taker.has)
    await settle()
    assert takers[9].has == turns.taken == 3


async def test_a_waiter_that_goes_away_takes_no_turn_with_it() -> None:
    turns = LineTurns(1)
    await turns.take("a")
    leaving, waiting = asyncio.create_task(turns.take("a")), asyncio.create_task(turns.take("a"))
    await settle()
    leaving.cancel()
    await settle()
    turns.release("a")
    await settle()
    assert waiting.done()
    handed = asyncio.create_task(turns.take("a"))
    await settle()
    turns.release("a")  # hands over, and is cancelled before it knows
    handed.cancel()
    await settle()
    assert turns.taken == 0


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LineTurns]]:
    """The turns of servers; `peak` of each is the most that were taken at once."""
    found: list[LineTurns] = []
    make, take = LineTurns.__init__, LineTurns.take

    def noted(self: LineTurns, most: int) -> None:
        make(self, most)
        self.peak = 0  # type: ignore[attr-defined]
        found.append(self)

    async def taking(self: LineTurns, name: str) -> None:
        await take(self, name)
        self.peak = max(self.peak, self.taken)  # type: ignore[attr-defined]

    monkeypatch.setattr(LineTurns, "__init__", noted)
    monkeypatch.setattr(LineTurns, "take", taking)
    return found


def test_the_lines_of_all_batches_are_bounded_together(tmp_path: Path, made: list[LineTurns]) -> None:
    keys, lines = 5, 25
    with serving(tmp_path, concurrency=4) as server:
        tokens = [server.keys.create(f"key{n}")[0] for n in range(keys)]
        clients = [sdk(server, token) for token in tokens]
        content = jsonl(*(line(f"{n}", max_tokens=9) for n in range(lines)))
        batches = [(client, create(client, content)) for client in clients for _ in range(3)]
        for client, batch in batches:
            done = ended(client, batch)
            assert done.status == "completed"
            assert rows(client, done.output_file_id).keys() == {str(n) for n in range(lines)}
        (turns,) = made
        assert turns.most == server.service.limiter.max_background == 3
        assert 1 < turns.peak <= turns.most + keys  # type: ignore[attr-defined]
        assert turns.taken == 0
        server.assert_settled()
        for client in clients:
            client.close()


def test_lines_that_wait_for_their_rate_hold_up_no_other_key(tmp_path: Path, made: list[LineTurns]) -> None:
    with serving(tmp_path, concurrency=4) as server:
        slow = sdk(server, server.keys.create("slow", per_minute=2)[0])
        waiting = create(slow, jsonl(*(line(f"{n}", max_tokens=9) for n in range(40))))
        wait_until(lambda: made[0].taken == made[0].most)
        began = time.monotonic()
        with sdk(server, server.keys.create("quick")[0]) as quick:
            done = ended(quick, create(quick, jsonl(*(line(f"{n}", max_tokens=9) for n in range(40)))))
            assert done.status == "completed"
            assert done.request_counts.completed == 40
        assert time.monotonic() - began < 20
        assert slow.batches.retrieve(waiting.id).request_counts.completed <= 3
        slow.batches.cancel(waiting.id)
        assert ended(slow, waiting).status == "cancelled"
        wait_until(lambda: made[0].taken == 0)
        slow.close()
        server.assert_settled()
