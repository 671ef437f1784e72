"""Measures a pair's call times on this machine, for the mode "auto" (`viaticum models measure`).

How the calls are timed is in `viaticum.decoders.cost`; which mode follows is in
`viaticum.models.decoding_modes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.local_settings import LocalSettings
from viaticum.models.decoding_modes import PairCosts
from viaticum.models.local import LocalModels

if TYPE_CHECKING:
    from viaticum.decoders.cost import CostModel


def measure_costs(
    catalogue: Catalogue, spec: ModelSpec, streams: int, report: Callable[[str], None]
) -> tuple[CostModel, dict[int, dict[str, float]]]:
    """Time the calls of a pair and keep the times (`PairCosts`).

    Args:
        streams: most texts at once to measure for.
        report: called with the name of each stage before it starts.

    Returns:
        The times, and the expected tokens per second by number of texts at once (1, 4, 16, 64), then by mode.

    Raises:
        WeightsError: weights are missing.
        MissingExtra: torch is not installed.
    """
    from viaticum.decoders.cost import measure_pair
    from viaticum.decoders.decoding_mode import LOSSLESS, ROUTED, TYPICAL

    pool = LocalModels(catalogue.with_local(LocalSettings(slots=streams)))
    pool.model(spec.name)  # checks weights and vocabularies
    report(f"loading {' and '.join(spec.members)}")
    small, large = pool.runners(spec.name)
    report("timing their calls")
    costs = measure_pair(small, large)
    PairCosts(spec, catalogue, (small, large)).keep(costs)
    counts = [count for count in (1, 4, 16, 64) if count <= streams]
    return costs, {
        count: {str(mode): costs.predict(mode, TYPICAL, count) for mode in (*LOSSLESS, *ROUTED)}
        for count in counts
    }
