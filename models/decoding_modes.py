"""What a pair knows of its speed on this machine: call times and hand-off rates, kept in the cache.

A pair in mode "auto" measures its calls briefly when it is first used; `viaticum models measure` does it
thoroughly (`viaticum.models.measure`). Which mode follows is in `viaticum.decoders.auto_mode`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import DataError, InputError, WeightsError
from viaticum.files import atomic_write
from viaticum.models.token_routers import SPECULATIVE
from viaticum.weights import cache_dir, fingerprint

if TYPE_CHECKING:
    from viaticum.decoders import Runner
    from viaticum.decoders.auto_mode import ModeChooser, Rates
    from viaticum.decoders.cost import CostModel
    from viaticum.routers.token import TokenRouter

# Fields of an entry that decide how often its router hands over.
_ROUTER_FIELDS = ("router", "tau", "router_path", "threshold", "share", "drift")


def costs_path(spec: ModelSpec) -> Path:
    """Return the file that holds call times and hand-off rates of a pair."""
    return cache_dir() / "costs" / f"{spec.file_name}.json"


def thorough_costs(spec: ModelSpec) -> CostModel | None:
    """Return the times that `viaticum models measure` took of a pair.

    None without any, or with another torch or number of threads.
    """
    from viaticum.decoders.cost import CostModel, conditions

    try:
        costs = CostModel.load(costs_path(spec))
    except (InputError, DataError):
        return None
    holds = all(costs.conditions.get(name) == value for name, value in conditions().items())
    return costs if holds and not costs.conditions.get("quick") else None


class PairCosts:
    """The file of one pair. What was measured under other conditions, or with other weights, is not used.

    Args:
        runners: of the small and the large model, loaded.
    """

    def __init__(self, spec: ModelSpec, catalogue: Catalogue, runners: Sequence[Runner]) -> None:
        from viaticum.decoders.cost import conditions

        self.path = costs_path(spec)
        weights = [_weights_of(catalogue[member]) for member in spec.members]
        self._conditions = conditions(*runners) | {"weights": weights}
        self._router = json.dumps({name: getattr(spec, name) for name in _ROUTER_FIELDS})

    def times(self) -> CostModel | None:
        """The call times, if there are any that hold."""
        from viaticum.decoders.cost import CostModel

        values = self._read()
        try:
            costs = CostModel.from_dict(values)
        except (KeyError, TypeError, ValueError, InputError):
            return None
        holds = all(costs.conditions.get(name) == value for name, value in self._conditions.items())
        return costs if holds else None

    def rates(self) -> Rates | None:
        """The hand-off rates of the pair's router, if they are known."""
        from viaticum.decoders.auto_mode import Rates

        values = self._read()
        try:
            if values["conditions"]["weights"] != self._conditions["weights"]:
                return None
            return Rates.from_dict(values["rates"][self._router])
        except (KeyError, TypeError, InputError):
            return None

    def keep(self, costs: CostModel, rates: Rates | None = None) -> None:
        """Write times, and rates where they are known. A file that cannot be written is left as it is."""
        values: dict[str, Any] = asdict(costs)
        values["conditions"] |= self._conditions
        values["rates"] = self._read().get("rates", {})
        if rates is not None:
            values["rates"][self._router] = rates.to_dict()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path, json.dumps(values, indent=1) + "\n")
        except (InputError, OSError):
            return  # measured again next time

    def _read(self) -> dict[str, Any]:
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}


def _weights_of(spec: ModelSpec) -> str:
    """The hash of a model's weights, or its name where they are not here."""
    try:
        return fingerprint(spec)
    except WeightsError:
        return spec.served_model or spec.name


def in_measured_modes(catalogue: Catalogue, names: Collection[str] | None = None) -> Catalogue:
    """A catalogue whose pairs run as outcomes of them are measured: routed, where an entry names no mode.

    names: of the pairs that are changed; None for all.
    """
    pairs = [
        spec.model_copy(update={"mode": "routed"})
        for spec in catalogue.values()
        if spec.kind == "pair" and spec.router != SPECULATIVE and spec.mode is None
        if names is None or spec.name in names
    ]
    return catalogue.with_models(*pairs) if pairs else catalogue


def mode_chooser(
    spec: ModelSpec, catalogue: Catalogue, runners: Sequence[Runner], router: TokenRouter
) -> ModeChooser:
    """Return what chooses the mode of a pair, with all that is known of it on this machine."""
    from viaticum.decoders.auto_mode import ModeChooser

    costs = PairCosts(spec, catalogue, runners)
    return ModeChooser(router, costs.times(), rates=costs.rates(), keep=costs.keep)
