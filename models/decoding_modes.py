"""Choice of a pair's decoding mode on this machine: routed by its token router, or the fastest allowed.

`viaticum models measure` times the calls of a pair once (`viaticum.models.measure`); the times are kept in
the cache, beside the weights. `viaticum.decoders.cost` defines the modes and the cost model that compares
them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from viaticum.catalogue import ModelSpec
from viaticum.errors import DataError, InputError
from viaticum.weights import cache_dir

if TYPE_CHECKING:
    from viaticum.decoders import Stats
    from viaticum.decoders.cost import CostModel
    from viaticum.decoders.decoding_mode import DecodingMode, HandoffStats

MIN_TOKENS = 200  # tokens after which a pair's own handoff rates replace the typical ones
RATE_STEPS = 20  # handoff rates are rounded to multiples of 1 / RATE_STEPS


def costs_path(spec: ModelSpec) -> Path:
    """Return the file that holds the call times of a pair."""
    return cache_dir() / "costs" / f"{spec.name}.json"


def known_costs(spec: ModelSpec) -> CostModel | None:
    """Return the measured costs of a pair; None without any, or with another torch or number of threads."""
    from viaticum.decoders.cost import CostModel, conditions

    try:
        costs = CostModel.load(costs_path(spec))
    except (InputError, DataError):
        return None
    now = conditions()
    return costs if all(costs.conditions.get(name) == value for name, value in now.items()) else None


def handoff_stats(decoders: Iterable[Stats]) -> HandoffStats:
    """Return the handoff and draft acceptance rates of a pair from its decoders' counters.

    Typical rates stand in until `MIN_TOKENS` were counted. Rates are rounded, so that the fastest mode is
    searched for again only when they change by a step.
    """
    from viaticum.decoders.decoding_mode import TYPICAL, HandoffStats

    drop, back, accept = TYPICAL.drop, TYPICAL.back, TYPICAL.accept
    for stats in decoders:
        if stats.proposed >= MIN_TOKENS:
            measured = HandoffStats.from_stats(stats)
            drop, back = measured.drop, measured.back
        if stats.drafted >= MIN_TOKENS:
            accept = HandoffStats.from_stats(stats).accept
    return HandoffStats(*(round(rate * RATE_STEPS) / RATE_STEPS for rate in (drop, back, accept)))


def choose_mode(
    spec: ModelSpec, costs: CostModel | None, handoffs: HandoffStats, streams: int
) -> DecodingMode:
    """Return the mode in which a pair decodes `streams` texts at once.

    Routed, unless the entry's mode is "auto" and the pair was measured. "auto" takes the fastest of the
    routed modes and of those that write what the large model alone would write.
    """
    from viaticum.decoders.decoding_mode import LOSSLESS, ROUTED, DecodingMode

    if spec.mode != "auto" or costs is None:
        return DecodingMode(routed=True)
    return costs.fastest([*LOSSLESS, *ROUTED], handoffs, streams)[0]
