"""Arms of one model that differ in how much they spend: a thinking budget, a number of samples, an effort.

More of it is dearer and rarely worse, so that an arm that nobody profiled lies on the curve of those that
were: log-odds and log tokens are linear in the logarithm of the level between two known arms. Beyond them
tokens go on as they rose, accuracy is that of the nearest arm above and falls as it fell below. Known arms of
one curve share what is predicted of a question: a local linear smoother over levels (Fan, JASA 87, 1992)
takes part of the noise of each arm's own outcomes away. Leaves out how wide it is
(`viaticum.routers.query.fit`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from viaticum.types import Pair

EFFORTS = ("minimal", "low", "medium", "high", "xhigh")
FIRST_TOKENS = 64  # added to a thinking budget: none of it is a level too
BANDWIDTHS = (0.5, 1.0, 2.0)  # of the smoother, in mean distances between two arms
FEWEST = 3  # arms that share: through two every line goes
FURTHEST = 1.0  # distances between the two nearest arms that a curve goes on beyond them
_THINK = re.compile(r"think:(\d+)(k?)")
_SAMPLES = re.compile(r"self-consistency:(.+):(\d+)")
_EFFORT = re.compile(rf"(.+)[-:@]({'|'.join(EFFORTS)})")


class Arm(NamedTuple):
    """Which curve a pair lies on, and where. level: logarithmic."""

    curve: tuple[str, str]
    level: float


def arms_of(pair: Pair) -> list[Arm]:
    """The curves that a pair may lie on: by its strategy, and by the effort that its model's name ends in.

    A strategy is the arm of one sample of its own self-consistency.
    """
    found = []
    if match := _THINK.fullmatch(pair.strategy):
        tokens = int(match[1]) * (1024 if match[2] else 1)
        found.append(Arm((pair.model, "think"), math.log(tokens + FIRST_TOKENS)))
    elif match := _SAMPLES.fullmatch(pair.strategy):
        found.append(Arm((pair.model, f"samples of {match[1]}"), math.log(max(1, int(match[2])))))
    else:
        found.append(Arm((pair.model, f"samples of {pair.strategy}"), 0.0))
    if match := _EFFORT.fullmatch(pair.model):
        found.append(Arm((f"efforts of {match[1]}", pair.strategy), float(EFFORTS.index(match[2]))))
    return found


def curve_weights(pair: Pair, known: Sequence[Pair]) -> tuple[Tensor, Tensor] | None:
    """Weights of the known pairs' log-odds and log tokens for a new arm, each summing to 1 [P].

    None where fewer than two arms of its curve are known.
    """
    for arm in arms_of(pair):
        on_curve = {
            each.level: number
            for number, other in enumerate(known)
            for each in arms_of(other)
            if each.curve == arm.curve
        }
        levels = sorted(on_curve)
        if len(levels) < 2:
            continue
        right = min(max(1, sum(level < arm.level for level in levels)), len(levels) - 1)
        low, high = levels[right - 1], levels[right]
        share = min(max((arm.level - low) / (high - low), -FURTHEST), 1 + FURTHEST)
        tokens, accuracy = torch.zeros(len(known)), torch.zeros(len(known))
        for weights, part in ((tokens, share), (accuracy, min(share, 1.0))):
            weights[on_curve[low]], weights[on_curve[high]] = 1 - part, part
        return accuracy, tokens
    return None


def smoother(pairs: Sequence[Pair], columns: int, bandwidth: float) -> Tensor | None:
    """Weights of all columns' log-odds in that of each one [M, M]; None where no curve has enough arms.

    Args:
        pairs: the first columns; others keep their own.
        columns: how many there are, M.
        bandwidth: standard deviation of the weights of other arms, in mean distances between two arms.
    """
    curves: dict[tuple[str, str], dict[float, int]] = {}
    for number, pair in enumerate(pairs):
        for arm in arms_of(pair):
            curves.setdefault(arm.curve, {})[arm.level] = number
    weights, taken = torch.eye(columns), set[int]()
    for curve in curves.values():
        numbers = list(curve.values())
        if len(curve) < FEWEST or taken.intersection(numbers):
            continue
        taken.update(numbers)
        levels = torch.tensor(list(curve), dtype=torch.float64)
        width = bandwidth * float(levels.max() - levels.min()) / (len(curve) - 1)
        for level, number in curve.items():
            distances = levels - level
            kernel = torch.exp(-0.5 * (distances / width).square())
            design = torch.stack((torch.ones_like(distances), distances), 1)
            fitted = torch.linalg.solve(design.T @ (kernel[:, None] * design), (kernel[:, None] * design).T)
            weights[number, numbers] = fitted[0].float()
    return weights if taken else None
