"""Keeps the large model's share of the tokens at its target when prompts change (off unless asked for).

A threshold that was calibrated on some prompts sends more or fewer tokens to the large model on others. Integral control
on the threshold's log-odds corrects that: every token that goes to the large model raises it a little, every other lowers it, such
that it rests where the share is the target's. All on the scores' device: nothing is read on the host.
The offset runs on from text to text, so a text then depends on what the router saw before it; the same stream of
steps gives the same decisions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from viaticum.errors import InputError

GAIN = 0.02  # log-odds a token
BOUND = 4.0  # log-odds either way: a share may lie out of reach, and the threshold must come back from there
NEAR = 1e-7  # scores keep this distance from 0 and 1, where log-odds are infinite


class ShareController:
    """target: the share of the small model's tokens that are dropped. Raises `InputError` for values out of range."""

    def __init__(self, target: float, *, gain: float = GAIN, bound: float = BOUND) -> None:
        if not 0 < target < 1:
            raise InputError(f"the target is a share between 0 and 1, got {target}")
        if not 0 < gain <= 1 or not 0 < bound < math.inf:
            raise InputError(f"gain is above 0 and at most 1, bound above 0; got {gain} and {bound}")
        self.target, self.gain, self.bound = target, gain, bound
        self._offset: Tensor | None = None

    @property
    def offset(self) -> float:
        """How far the threshold's log-odds are from where they began. Reads the device."""
        return 0.0 if self._offset is None else float(self._offset)

    def reset(self) -> None:
        self._offset = None

    def keep(self, scores: Tensor, threshold: float) -> Tensor:
        """Which of the small model's tokens are kept, bool [B]; learns from what it says. A NaN is not kept."""
        if self._offset is None:
            self._offset = torch.zeros((), device=scores.device)
        base = math.log(max(threshold, NEAR) / max(1 - threshold, NEAR))
        odds = torch.logit(scores.float(), eps=NEAR)
        keep = odds <= base + self._offset
        dropped = len(scores) - keep.sum()
        moved = self._offset + self.gain * (dropped - self.target * len(scores))
        self._offset = moved.clamp(-self.bound, self.bound)
        return keep
