"""Keep the large model's share of the tokens at a target when prompts change; optional.

A threshold calibrated on some prompts sends more or fewer tokens to the large model on others. Integral
control of the threshold's log-odds corrects that: every token that goes to the large model raises it a
little, every other token lowers it, so that it is stationary at the target share. Computed on the device of
the scores; nothing is read on the host. The offset persists across texts, so that a text depends on what the
router saw before it; the same stream of steps gives the same decisions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from viaticum.errors import InputError

GAIN = 0.02  # log-odds a token
BOUND = 4.0  # log-odds either way: a share may be unreachable, and the threshold must recover from it
EPSILON = 1e-7  # scores are kept this far from 0 and 1, where log-odds are infinite


class ShareController:
    """Adjusts a threshold so that the share of dropped tokens approaches a target.

    Args:
        target: share of the small model's tokens that are dropped.
        gain: change of the log-odds a token.
        bound: maximum change of the log-odds in total.

    Raises:
        InputError: a value out of range.
    """

    def __init__(self, target: float, *, gain: float = GAIN, bound: float = BOUND) -> None:
        if not 0 < target < 1:
            raise InputError(f"the target is a share between 0 and 1, got {target}")
        if not 0 < gain <= 1 or not 0 < bound < math.inf:
            raise InputError(f"gain is above 0 and at most 1, bound above 0; got {gain} and {bound}")
        self.target, self.gain, self.bound = target, gain, bound
        self._offset: Tensor | None = None

    @property
    def offset(self) -> float:
        """Change of the threshold's log-odds so far. Reads the device."""
        return 0.0 if self._offset is None else float(self._offset)

    def reset(self) -> None:
        self._offset = None

    def keep(self, scores: Tensor, threshold: float) -> Tensor:
        """Which small tokens to keep, bool [B] of scores [B]; updates the offset. Drops NaN scores."""
        if self._offset is None:
            self._offset = torch.zeros((), device=scores.device)
        base = math.log(max(threshold, EPSILON) / max(1 - threshold, EPSILON))
        log_odds = torch.logit(scores.float(), eps=EPSILON)
        keep = log_odds <= base + self._offset
        dropped = len(scores) - keep.sum()
        offset = self._offset + self.gain * (dropped - self.target * len(scores))
        self._offset = offset.clamp(-self.bound, self.bound)
        return keep
