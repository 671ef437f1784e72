"""Cost model of a small/large pair on one machine: throughput of decoding modes, latency of a sequence.

Built from measured call times (`decoders.call_times`). Throughput comes from a simulation of the engine's
steps with these times and the pair's hand-off statistics (`decoders.simulation`). Leaves out quality: the
caller says which modes are allowed.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from viaticum.decoders.call_times import CONTEXT, QUICK_CONTEXT, CallTimes, measure, measure_within
from viaticum.decoders.decoding_mode import DecodingMode, HandoffStats
from viaticum.decoders.runner import Runner
from viaticum.decoders.simulation import SIMULATED_TOKENS, Simulation
from viaticum.errors import DataError, InputError
from viaticum.files import atomic_write

QUICK_SECONDS = 6.0  # of a measurement at first use


@dataclass(frozen=True, slots=True)
class Calls:
    """The model calls of one sequence: for each call (new tokens, cached tokens).

    small, large: calls of each model. tokens: of the output.
    """

    small: tuple[tuple[int, int], ...]
    large: tuple[tuple[int, int], ...]
    tokens: int

    @classmethod
    def from_trace(
        cls,
        made_by: Sequence[int],
        dropped: Sequence[bool],
        prompt: int,
        cached: int = 0,
        small_prompt: int | None = None,
    ) -> Calls:
        """The calls of a sequence that `Engine` decoded without drafts.

        Args:
            made_by: model of each output token, 0 small or 1 large.
            dropped: whether a token of the small model was dropped at each position.
            prompt: number of prompt tokens.
            cached: prompt tokens that both models had cached before.
            small_prompt: number of prompt tokens of the small model; None: as `prompt`.

        Raises:
            InputError: `cached` is not below the length of a prompt.
        """
        prompts = (prompt if small_prompt is None else small_prompt, prompt)
        if not 0 <= cached < min(prompts):
            raise InputError(
                f"at most all but the last token of a prompt of {min(prompts)} are cached, got {cached}"
            )
        calls: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        read = [cached, cached]
        for position, (maker, was_dropped) in enumerate(zip(made_by, dropped, strict=True)):
            for model in (0, 1) if was_dropped else (maker,):
                end = prompts[model] + position
                calls[model].append((end - read[model], read[model]))
                read[model] = end
        return cls(tuple(calls[0]), tuple(calls[1]), len(made_by))


@dataclass(frozen=True, slots=True)
class CostModel:
    """Call times of both models of a pair on one machine.

    Args:
        small, large: call times.
        conditions: what they were measured with; "context": cached positions of each row.
        cached: of each model, additional seconds of a call for every cached position of a row beyond
            conditions["context"]; 0 if not measured.
        round_trip: seconds that a call of the large model takes less where all its rows go on where it wrote
            the last token itself (a served model streams ahead).
    """

    small: CallTimes
    large: CallTimes
    conditions: dict[str, Any]
    cached: tuple[float, float] = (0.0, 0.0)
    round_trip: float = 0.0

    def predict(
        self,
        mode: DecodingMode,
        handoff: HandoffStats,
        streams: int,
        *,
        batch: int = 1,
        tokens: int = SIMULATED_TOKENS,
    ) -> float:
        """Expected tokens a second, all streams together.

        Args:
            mode: how the pair decodes.
            handoff: how often it hands off and accepts drafts.
            streams: sequences decoded at once.
            batch: rows that the large model waits for (`MixedDecoder(llm_batch=...)`).
            tokens: tokens to simulate; fewer are faster and less exact.

        Raises:
            InputError: `streams` is below 1.
        """
        if streams < 1:
            raise InputError(f"streams must be 1 or more, got {streams}")
        padded = str(self.conditions.get("device", "cpu")).startswith("cuda")
        simulation = Simulation(
            self.small, self.large, padded, mode, handoff, streams, batch, tokens, self.round_trip
        )
        return simulation.tokens_per_second()

    def latency(self, calls: Calls, streams: int = 1) -> float:
        """Expected seconds of a sequence from start to end, of `streams` such sequences decoded at once.

        One stream: the sum of its calls. More: a step serves each row of either model once; the rows of a
        call are binomially distributed, as if every stream needed each model independently as often as this
        one; and every sequence waits for the step, and for the prefill of the others.

        Raises:
            InputError: `streams` is below 1.
        """
        if streams < 1:
            raise InputError(f"streams must be 1 or more, got {streams}")
        context = self.conditions.get("context", CONTEXT)
        seconds = 0.0
        for times, model_calls, slope in zip(
            (self.small, self.large), (calls.small, calls.large), self.cached, strict=True
        ):
            if not model_calls:
                continue
            first, rest = model_calls[0], model_calls[1:]
            seconds += streams * max(0.0, times(1, first[0]) + slope * (first[1] - context))
            if not rest:
                continue
            rate = len(rest) / calls.tokens
            new_counts = Counter(new for new, _ in rest)
            mean_cached = sum(cached for _, cached in rest) / len(rest)
            for rows in range(1, streams + 1):
                probability = math.comb(streams, rows) * rate**rows * (1 - rate) ** (streams - rows)
                mean = sum(times(rows, new) * count for new, count in new_counts.items()) / len(rest)
                seconds += (
                    calls.tokens * probability * max(0.0, mean + rows * slope * (mean_cached - context))
                )
        return seconds

    def fastest(
        self, modes: Sequence[DecodingMode], handoff: HandoffStats, streams: int
    ) -> tuple[DecodingMode, dict[DecodingMode, float]]:
        """The mode with the highest expected throughput, the first of equals, and the throughput of each.

        With `LARGE_ALONE` among the modes, routing is never chosen where the model predicts it to be slower.

        Raises:
            InputError: no mode is given.
        """
        if not modes:
            raise InputError("name at least one way to decode")
        expected = {mode: self.predict(mode, handoff, streams) for mode in modes}
        return max(expected, key=lambda mode: expected[mode]), expected

    def save(self, path: str | Path) -> None:
        """Write it as JSON, atomically; raises `InputError` if the system refuses."""
        atomic_write(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CostModel:
        """From plain data, as `asdict` gives it and a file contains it."""
        small, large = values.get("cached", (0.0, 0.0))
        return cls(
            _call_times(values["small"]),
            _call_times(values["large"]),
            dict(values["conditions"]),
            (float(small), float(large)),
            float(values.get("round_trip", 0.0)),
        )

    @classmethod
    def load(cls, path: str | Path) -> CostModel:
        """Read a saved cost model.

        Raises:
            InputError: there is no such file.
            DataError: the file is not a cost model.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(f"cannot read the cost model {path}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a cost model ({error}); measure it again") from None


def _call_times(values: Mapping[str, Any]) -> CallTimes:
    seconds = tuple(tuple(map(float, line)) for line in values["seconds"])
    return CallTimes(tuple(values["rows"]), tuple(values["tokens"]), seconds)


def conditions(*runners: Runner) -> dict[str, Any]:
    """What call times depend on; they are valid as long as this is unchanged.

    runners: of the pair; without them only what depends on the machine.
    """
    machine = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    return machine | ({"models": [runner.description for runner in runners]} if runners else {})


def measure_pair(small: Runner, large: Runner, *, context: int = CONTEXT, repeats: int = 3) -> CostModel:
    """Measure the cost model of a pair on this machine, which should be idle; takes seconds to minutes.

    Args:
        small, large: runners none of whose slots are in use.
        context: cached positions of each row.
        repeats: calls per measured point.

    Raises:
        InputError: slots are in use, or a context is too short.
    """
    times = (
        measure(small, context=context, repeats=repeats),
        measure(large, context=context, repeats=repeats, verifies=True),
    )
    return CostModel(
        *times,
        conditions(small, large) | {"device": str(large.device), "context": context},
        (_slope(small, times[0], context, repeats), _slope(large, times[1], context, repeats)),
        large.round_trip,
    )


def measure_quickly(small: Runner, large: Runner, *, seconds: float = QUICK_SECONDS) -> CostModel:
    """A rough cost model, measured in about `seconds` or in a few calls of each model if these take longer.

    Raises:
        InputError: slots are in use, or a context is too short.
    """
    details = {"device": str(large.device), "context": QUICK_CONTEXT, "quick": True}
    return CostModel(
        measure_within(small, seconds / 2),
        measure_within(large, seconds / 2, verifies=True),
        conditions(small, large) | details,
        round_trip=large.round_trip,
    )


def _slope(runner: Runner, times: CallTimes, context: int, repeats: int) -> float:
    """Additional seconds of a 1-row, 1-token call per cached position; 0 if the context is too short."""
    longer = min(4 * context, runner.context - 1)
    if longer <= context:
        return 0.0
    far = measure(runner, rows=(1,), tokens=(1,), context=longer, repeats=repeats)
    return max(0.0, (far(1, 1) - times(1, 1)) / (longer - context))
