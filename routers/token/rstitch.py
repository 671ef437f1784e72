"""R-Stitch's rule (arXiv 2507.17307, section 3.2): one entropy threshold both ways. Training-free."""

from __future__ import annotations

from torch import Tensor

from viaticum.errors import InputError
from viaticum.routers.token.base import Step, TokenRouter


class EntropyRouter(TokenRouter):
    """Switches at an entropy threshold.

    SLM with H > tau: its token is dropped and the LLM decodes that position. LLM with H <= tau: its token is
    kept and the SLM continues.

    Args:
        tau: normalised entropy in [0, 1]; the paper uses 0.001, 0.02 and 0.03.

    Raises:
        InputError: tau outside [0, 1].
    """

    depends_on_token = False

    def __init__(self, tau: float = 0.03) -> None:
        if not 0 <= tau <= 1:
            raise InputError(f"tau is a normalised entropy between 0 and 1, got {tau}")
        self.tau = tau

    def keep_small(self, step: Step) -> Tensor:
        return step.entropy <= self.tau

    def hand_back(self, step: Step) -> Tensor:
        return step.entropy <= self.tau
