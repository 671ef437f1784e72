"""The cost model's simulation of decoding against the engine with real models."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny_models import NEAR, Letters, build
from torch import Tensor

from viaticum.decoders import MixedDecoder, Request, Runner, Stats, TorchRunner
from viaticum.decoders.call_times import CallTimes
from viaticum.decoders.cost import CostModel, measure_pair
from viaticum.decoders.decoding_mode import LARGE_ALONE, LOSSLESS, ROUTED, DecodingMode, HandoffStats
from viaticum.errors import DataError, InputError
from viaticum.routers.token import AlwaysLarge, Step, TokenRouter

ROWS, TOKENS = (1, 2, 4), (1, 3)


def times(call: float, row: float, token: float) -> CallTimes:
    """A call costs `call`, each row of it `row` and each token that a row reads on average `token`."""
    return CallTimes(ROWS, TOKENS, tuple(tuple(call + r * row + t * token for t in TOKENS) for r in ROWS))


SMALL, LARGE = times(2.0, 0.2, 0.3), times(10.0, 0.5, 0.4)
COSTS = CostModel(SMALL, LARGE, {})


class Coins(TokenRouter):
    """Hands over at random; the decision depends on the request and the position alone."""

    depends_on_token = False

    def __init__(self, drop: float, back: float) -> None:
        self.drop, self.back = drop, back

    def keep_small(self, step: Step) -> Tensor:
        return self._coins(step, "keep", 1 - self.drop)

    def hand_back(self, step: Step) -> Tensor:
        return self._coins(step, "back", self.back)

    @staticmethod
    def _coins(step: Step, what: str, chance: float) -> Tensor:
        positions = zip(step.requests, step.positions, strict=True)
        return torch.tensor([random.Random(f"{what}{position}").random() < chance for position in positions])


class Clocked:
    """Adds up what the calls of two runners would have cost."""

    def __init__(self, decoder: MixedDecoder) -> None:
        self.seconds = 0.0
        for model, costs in ((0, SMALL), (1, LARGE)):
            if model in decoder.runners:
                self._watch(decoder.runners[model], costs)

    def _watch(self, runner: Runner, costs: CallTimes) -> None:
        call = runner._call

        def clocked(slots, tokens, keep, **options):  # type: ignore[no-untyped-def]
            self.seconds += costs(len(slots), sum(map(len, tokens)) / len(slots))
            return call(slots, tokens, keep, **options)

        runner._call = clocked  # type: ignore[method-assign]


@pytest.mark.parametrize("streams", [1, 3, 8])
@pytest.mark.parametrize(
    "way",
    [LARGE_ALONE, DecodingMode(False, 3), DecodingMode(True), DecodingMode(True, 2)],
    ids=lambda way: str(way),
)
def test_a_prediction_is_what_the_engine_then_takes(way: DecodingMode, streams: int) -> None:
    models = [TorchRunner(build(seed=seed), slots=streams) for seed in (NEAR + 1, 1)]
    decoder = MixedDecoder(
        models[1],
        models[0] if way.routed or way.draft else None,
        tokenizer=Letters(),
        router=Coins(0.25, 0.4) if way.routed else AlwaysLarge(),
        draft=way.draft,
        loop_guard=None,
    )
    clock = Clocked(decoder)
    # Texts of one length, so that all streams are busy to the end; prompts of one token cost next to nothing.
    results = decoder.generate_all([Request([n + 1], max_new_tokens=400) for n in range(streams)])
    habits = HandoffStats.from_stats(decoder.stats)
    assert decoder.stats.large_tokens == sum(sum(result.trace.made_by) for result in results)
    tokens = sum(len(result.trace.tokens) for result in results)
    assert COSTS.predict(way, habits, streams) == pytest.approx(tokens / clock.seconds, rel=0.08)
    if way.routed:
        assert habits.drop == pytest.approx(0.25, abs=0.06)
        assert habits.back == pytest.approx(0.4, abs=0.1)


def test_simple_cases_by_hand() -> None:
    never = HandoffStats(drop=0.0, back=1.0, accept=1.0)
    assert COSTS.predict(LARGE_ALONE, never, 1) == pytest.approx(1 / LARGE(1, 1))
    assert COSTS.predict(LARGE_ALONE, never, 4) == pytest.approx(4 / LARGE(4, 1))
    assert COSTS.predict(DecodingMode(True), never, 2) == pytest.approx(2 / SMALL(2, 1))
    # Four drafts are accepted: five tokens a pass; the small model first reads two, its last draft and the
    # one after it.
    a_pass = SMALL(1, 2) + 3 * SMALL(1, 1) + LARGE(1, 5)
    assert COSTS.predict(DecodingMode(False, 4), never, 1) == pytest.approx(5 / a_pass, rel=0.01)
    none = HandoffStats(drop=0.0, back=1.0, accept=0.0)
    assert COSTS.predict(DecodingMode(False, 4), none, 1) < COSTS.predict(LARGE_ALONE, none, 1)


def test_the_fastest_allowed_way_is_taken_and_routing_is_never_slower_than_not_routing() -> None:
    habits = HandoffStats(drop=0.1, back=0.5, accept=0.8)
    best, expected = COSTS.fastest([*LOSSLESS, *ROUTED], habits, 1)
    assert best.routed
    assert expected[best] == max(expected.values()) > 2 * expected[LARGE_ALONE]
    assert COSTS.fastest(LOSSLESS, habits, 1)[0].draft > 0
    # Models of one size, and rows that cost nothing: handing over only adds calls.
    close = CostModel(times(9.9, 0, 0), times(10, 0, 0), {})
    assert close.fastest([LARGE_ALONE, DecodingMode(True)], habits, 16)[0] == LARGE_ALONE
    with pytest.raises(InputError, match="at least one way"):
        COSTS.fastest([], habits, 1)


def test_waiting_for_a_batch_pays_where_a_call_costs_much_and_a_row_little() -> None:
    habits = HandoffStats(drop=0.2, back=1.0)
    dear = CostModel(times(1, 0, 0), times(50, 0, 0), {})
    assert dear.predict(DecodingMode(True), habits, 8, batch=4) > 1.2 * dear.predict(
        DecodingMode(True), habits, 8
    )


def test_habits_are_counted_from_what_was_done() -> None:
    stats = Stats(proposed=40, dropped=10, drafted=30, accepted=12, large_tokens=25)
    stats.large.rows = 10  # three drafts a pass, of which 1.2 are taken
    habits = HandoffStats.from_stats(stats)
    assert (habits.drop, habits.back) == (0.25, 0.4)
    assert sum(habits.accept**length for length in (1, 2, 3)) == pytest.approx(1.2)
    assert habits.large_share == pytest.approx(25 / (25 + 30))
    assert HandoffStats.from_stats(Stats(proposed=5)).large_share == 0.0
    assert HandoffStats.from_stats(Stats(large_tokens=5)).large_share == 1.0
    with pytest.raises(DataError, match="written nothing"):
        HandoffStats.from_stats(Stats())
    with pytest.raises(InputError, match="drop"):
        HandoffStats(1.5, 0.5)


def test_times_are_read_between_the_points_and_beyond_them() -> None:
    assert SMALL(1, 1) == pytest.approx(2.5)
    assert SMALL(3, 2) == pytest.approx(2 + 0.6 + 0.6)
    assert SMALL(8, 6) == pytest.approx(2 + 1.6 + 1.8)
    assert CallTimes((1,), (1,), ((3.0,),))(7, 9) == 3.0
    with pytest.raises(InputError, match="rise from 1"):
        CallTimes((2, 1), (1,), ((1.0,), (1.0,)))
    with pytest.raises(InputError, match="a line for every"):
        CallTimes((1, 2), (1,), ((1.0,),))


def test_measured_times_are_kept_in_a_file(tmp_path: Path) -> None:
    small, large = (TorchRunner(build(seed=seed), slots=4, context=64) for seed in (NEAR + 1, 1))
    costs = measure_pair(small, large, context=16, repeats=1)
    assert costs.small.rows == (1, 2, 4)
    assert all(value > 0 for line in costs.large.seconds for value in line)
    assert small.cached_tokens == large.cached_tokens == [[]] * 4, "the runners are as they were"
    costs.save(tmp_path / "costs.json")
    assert CostModel.load(tmp_path / "costs.json") == costs
    assert all(slope >= 0 for slope in costs.cached)
    older = json.loads((tmp_path / "costs.json").read_text())
    del older["cached"]
    assert CostModel.from_dict(older) == replace(costs, cached=(0.0, 0.0)), (
        "a file of before that was measured"
    )
    (tmp_path / "costs.json").write_text("{}")
    with pytest.raises(DataError, match="not a cost model"):
        CostModel.load(tmp_path / "costs.json")
    with pytest.raises(InputError, match="cannot read"):
        CostModel.load(tmp_path / "missing.json")
    small.free_slots.remove(2)
    with pytest.raises(InputError, match="in use"):
        measure_pair(small, large)


def test_a_round_trip_counts_for_calls_that_do_not_go_on() -> None:
    """A served model streams on as long as it is active; every hand-off and every draft asks anew."""
    flat = CallTimes((1,), (1,), ((0.010,),))
    near = CostModel(CallTimes((1,), (1,), ((0.001,),)), flat, {})
    far = replace(near, round_trip=0.008)
    handoff = HandoffStats(drop=0.2, back=0.4, accept=0.7)
    alone = far.predict(LARGE_ALONE, handoff, 1) / near.predict(LARGE_ALONE, handoff, 1)
    assert alone == pytest.approx(5, rel=0.01)
    routed = DecodingMode(True)
    gain = far.predict(routed, handoff, 1) / near.predict(routed, handoff, 1)
    assert 1.1 < gain < 2
    drafting = DecodingMode(False, 2)
    assert far.predict(drafting, handoff, 1) == near.predict(drafting, handoff, 1)
    assert CostModel.from_dict(asdict(far)) == far
