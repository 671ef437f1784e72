"""Local decoding with torch: a runner for one model, a mixed decoder for a small and a large one.

Needs torch, transformers, safetensors and numpy and nothing else, so that it runs on a bare CUDA image.
Knows no budget, no strategy and no catalogue: it is handed folders, token ids and a `TokenRouter`.
"""

from viaticum.decoders.mixed import MixedDecoder
from viaticum.decoders.request import Event, Request, Result, Sampling
from viaticum.decoders.runner import Runner

__all__ = ["Event", "MixedDecoder", "Request", "Result", "Runner", "Sampling"]
