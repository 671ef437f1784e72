"""Token routers: which model of a small/large pair decodes the next token.

Needs torch, safetensors and numpy only.

A router is one class with two methods. `EntropyRouter` is R-Stitch's rule (arXiv 2507.17307),
`DivergenceRouter` is R2R's (arXiv 2505.21600) for any estimate of divergence; the others are end points,
baselines and tools to measure with.
"""

from viaticum.routers.token.base import Step, TokenRouter, entropy
from viaticum.routers.token.divergence import DivergenceRouter
from viaticum.routers.token.fixed import AlwaysLarge, AlwaysSmall, RandomRouter, ReplayRouter
from viaticum.routers.token.rstitch import EntropyRouter

__all__ = [
    "AlwaysLarge",
    "AlwaysSmall",
    "DivergenceRouter",
    "EntropyRouter",
    "RandomRouter",
    "ReplayRouter",
    "Step",
    "TokenRouter",
    "entropy",
]
