"""Models whose weights are loaded, and the runners over them: caches planned together from what is free.

The two models of a pair share the memory: both are loaded, then both caches are planned from one sum. Leaves
out loading (`decoders.load`) and what a cache takes (`decoders.memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from viaticum.decoders.memory import CacheCost, MemoryPlan, free_bytes, plan_together
from viaticum.decoders.runner import Runner

CPU = torch.device("cpu")
GPU_MEMORY = 0.9  # of a GPU's memory, where nobody says how much may be used


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, and without a cache yet.

    Args:
        slots: given number of slots, or "auto".
        max_slots: upper limit of slots="auto".
        make: makes the runner, with its slots and blocks.
        cost: of its cache on `device`; None where it takes no memory here.
        device: that holds the cache.
        gpu_memory: fraction of a GPU's memory that may be filled.
        mapped: bytes of weights that the system counts as free, see `mapped_bytes`.
    """

    slots: int | Literal["auto"]
    max_slots: int
    make: Callable[[MemoryPlan], Runner]
    cost: CacheCost | None = None
    device: torch.device = CPU
    gpu_memory: float = GPU_MEMORY
    mapped: int = 0

    @property
    def given_slots(self) -> int | None:
        return None if self.slots == "auto" else self.slots


def make_runners(*models: LoadedModel) -> list[Runner]:
    """Runners over models that read the same sequences: one model, or a pair.

    Each gets as many slots as the other, those that were given apart, and models on one device share its free
    memory (`plan_together`).

    Raises:
        ModelError: the memory is not enough for one slot.
        InputError: a number of slots that the model cannot have.
    """
    at_most = min(each.given_slots or each.max_slots for each in models)
    by_device: dict[torch.device, list[LoadedModel]] = {}
    for each in models:
        if each.cost is not None:
            by_device.setdefault(each.device, []).append(each)
    plans = {device: _plan(group, at_most) for device, group in by_device.items()}
    if len(plans) > 1:  # a device with more memory has no use for more slots
        at_most = min(plan.slots for found in plans.values() for plan in found)
        plans = {device: _plan(group, at_most) for device, group in by_device.items()}
    left = {device: iter(found) for device, found in plans.items()}
    nothing = MemoryPlan(at_most, 0)
    return [each.make(nothing if each.cost is None else next(left[each.device])) for each in models]


def _plan(models: Sequence[LoadedModel], at_most: int) -> list[MemoryPlan]:
    free = usable_bytes(models[0].device, min(each.gpu_memory for each in models))
    return plan_together(
        [each.cost for each in models if each.cost is not None],
        max(0, free - sum(each.mapped for each in models)),
        slots=[each.given_slots for each in models],
        at_most=at_most,
    )


def usable_bytes(device: torch.device, gpu_memory: float) -> int:
    """Bytes for KV caches: what is free, less the part of a GPU that `gpu_memory` leaves to others."""
    free = free_bytes(device)
    if device.type != "cuda":
        return free
    return max(0, free - round((1 - gpu_memory) * torch.cuda.mem_get_info(device)[1]))
