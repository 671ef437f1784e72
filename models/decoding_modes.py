"""Which way a small/large pair decodes on this machine: as its token router says, or the fastest that is allowed.

The times of the pair's calls are measured once (`viaticum models measure`) and kept beside the weights. How they are
measured, and what they tell: see `viaticum.decoders.cost`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import DataError, InputError
from viaticum.weights import cache_dir

if TYPE_CHECKING:
    from viaticum.decoders import Stats
    from viaticum.decoders.cost import CostModel, DecodingMode, HandoffStats

ENOUGH = 200  # tokens after which a pair's own habits are known well enough
STEPS = 20  # habits are rounded to so many parts of 1


def costs_path(spec: ModelSpec) -> Path:
    """Where the times of a pair's calls are kept."""
    return cache_dir() / "costs" / f"{spec.name}.json"


def known_costs(spec: ModelSpec) -> CostModel | None:
    """What was measured for the pair; None where nothing was, or with another torch, or other threads."""
    from viaticum.decoders.cost import CostModel, conditions

    try:
        costs = CostModel.load(costs_path(spec))
    except (InputError, DataError):
        return None
    now = conditions()
    return costs if all(costs.conditions.get(name) == value for name, value in now.items()) else None


def measure_costs(
    catalogue: Catalogue, spec: ModelSpec, streams: int, report: Callable[[str], None]
) -> tuple[CostModel, dict[int, dict[str, float]]]:
    """Time the calls of a pair for up to so many texts at once, and keep the times.

    Returns them, and the tokens a second to expect of each way at 1, 4, 16 ... texts at once. report is told what
    comes next. Raises `WeightsError` for missing weights, `MissingExtra` without torch.
    """
    from viaticum.decoders.cost import LOSSLESS, ROUTED, TYPICAL, measure_pair
    from viaticum.models.local import LocalModels

    pool = LocalModels(catalogue, slots=streams)
    pool.model(spec.name)  # checks weights and vocabularies
    report(f"loading {' and '.join(spec.members)}")
    small, large = (pool.runner(member) for member in spec.members)
    report("timing their calls")
    costs = measure_pair(small, large)
    path = costs_path(spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    costs.save(path)
    counts = [count for count in (1, 4, 16, 64) if count <= streams]
    return costs, {
        count: {str(way): costs.predict(way, TYPICAL, count) for way in (*LOSSLESS, *ROUTED)}
        for count in counts
    }


def habits_of(seen: Iterable[Stats]) -> HandoffStats:
    """How a pair hands over and takes drafts, from what its decoders did; typical values until they did enough.

    Rounded, so that the way that is fastest with them has to be looked for only now and then.
    """
    from viaticum.decoders.cost import TYPICAL, HandoffStats

    drop, back, accept = TYPICAL.drop, TYPICAL.back, TYPICAL.accept
    for stats in seen:
        if stats.proposed >= ENOUGH:
            own = HandoffStats.seen(stats)
            drop, back = own.drop, own.back
        if stats.drafted >= ENOUGH:
            accept = HandoffStats.seen(stats).accept
    return HandoffStats(*(round(chance * STEPS) / STEPS for chance in (drop, back, accept)))


def choose_way(spec: ModelSpec, costs: CostModel | None, habits: HandoffStats, streams: int) -> DecodingMode:
    """The way a pair decodes so many texts at once: routed, unless its mode is "auto" and its calls were measured.

    "auto" chooses among all ways that write what the large model alone would write, and the routed ones.
    """
    from viaticum.decoders.cost import LOSSLESS, ROUTED, DecodingMode

    if spec.mode != "auto" or costs is None:
        return DecodingMode(routed=True)
    return costs.fastest([*LOSSLESS, *ROUTED], habits, streams)[0]
