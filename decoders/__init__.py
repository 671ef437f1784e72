"""Local decoding with torch: a runner for one model, a mixed decoder for a small and a large one.

See docs/explanation/decoding.md. Needs only torch, transformers, safetensors and numpy, so that it runs on a
bare CUDA image. Leaves out budgets, strategies and the catalogue: it takes folders, token ids and a
`TokenRouter`.
"""

from viaticum.decoders.config import DecoderConfig
from viaticum.decoders.engine import Engine
from viaticum.decoders.load import load_runner, load_weights
from viaticum.decoders.loaded_model import make_runners
from viaticum.decoders.loop import LoopGuard
from viaticum.decoders.memory import free_bytes, plan_memory
from viaticum.decoders.mixed import MixedDecoder
from viaticum.decoders.request import Event, Request, Result, Sampling, ThinkingLimit
from viaticum.decoders.runner import Runner, RunnerOutput
from viaticum.decoders.served_load import Server
from viaticum.decoders.stats import CallStats, Stats
from viaticum.decoders.torch_runner import TorchRunner

__all__ = [
    "CallStats",
    "DecoderConfig",
    "Engine",
    "Event",
    "LoopGuard",
    "MixedDecoder",
    "Request",
    "Result",
    "Runner",
    "RunnerOutput",
    "Sampling",
    "Server",
    "Stats",
    "ThinkingLimit",
    "TorchRunner",
    "free_bytes",
    "load_runner",
    "load_weights",
    "make_runners",
    "plan_memory",
]
