"""Local decoding with torch: a runner for one model, a mixed decoder for a small and a large one ([docs/explanation/decoding.md]).

Needs torch, transformers, safetensors and numpy and nothing else, so that it runs on a bare CUDA image.
Knows no budget, no strategy and no catalogue: it is handed folders, token ids and a `TokenRouter`.
"""

from viaticum.decoders.engine import Engine
from viaticum.decoders.loop import LoopGuard
from viaticum.decoders.memory import free_bytes, plan_slots
from viaticum.decoders.mixed import MixedDecoder
from viaticum.decoders.request import Event, Request, Result, Sampling
from viaticum.decoders.runner import Runner, RunnerOutput
from viaticum.decoders.stats import CallStats, Stats

__all__ = [
    "CallStats",
    "Engine",
    "Event",
    "LoopGuard",
    "MixedDecoder",
    "Request",
    "Result",
    "Runner",
    "RunnerOutput",
    "Sampling",
    "Stats",
    "free_bytes",
    "plan_slots",
]
