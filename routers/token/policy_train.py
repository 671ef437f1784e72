"""How R-Stitch+'s policy learns from texts it took part in: DAPO (arXiv 2503.14476), on its answers alone.

Several texts a question, each with answers drawn by the policy. A text's advantage is its reward against those of its group, in
standard deviations; groups whose rewards are equal teach nothing and are left out. The ratio of new to old probability is clipped,
higher above than below, and the loss is the mean over all answers of the batch, so that a long text counts for more.
Pure torch: knows neither models nor questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from viaticum.errors import InputError
from viaticum.routers.token.policy import Policy, PolicyDecisions, log_probability

LATENCY_WEIGHT = 0.01
EQUAL_REWARDS = 1e-6  # rewards that are nearer than this are equal


@dataclass(frozen=True, slots=True)
class LearnerSettings:
    """low, high: how far a probability ratio may fall and rise. epochs: passes over a batch, each in so many minibatches.

    scale: see `group_advantages`.
    """

    rate: float = 3e-3
    low: float = 0.2
    high: float = 0.28
    epochs: int = 4
    minibatches: int = 4
    longest_gradient: float = 1.0
    scale: Literal["group", "batch"] = "group"

    def __post_init__(self) -> None:
        if not (self.rate > 0 and 0 < self.low < 1 and self.high > 0 and self.longest_gradient > 0):
            raise InputError(
                f"rate, low, high and the longest gradient are above 0, low is below 1; got {self}"
            )
        if min(self.epochs, self.minibatches) < 1:
            raise InputError(f"epochs and minibatches must be 1 or more; got {self}")
        if self.scale not in ("group", "batch"):
            raise InputError(f"advantages are scaled by group or batch, got {self.scale!r}")


@dataclass(frozen=True, slots=True)
class Batch:
    """Answers of the policy, N in all: features [N, F], called bool [N], logps when they were drawn [N], advantages [N]."""

    features: Tensor
    called: Tensor
    logps: Tensor
    advantages: Tensor

    @classmethod
    def of(
        cls,
        policy: Policy,
        rewards: Sequence[Sequence[float]],
        choices: Sequence[Sequence[PolicyDecisions]],
        scale: str = "group",
    ) -> Batch:
        """All answers of the texts of groups: rewards and choices of each text of each group. Every answer has its text's advantage."""
        gained, _ = group_advantages(torch.tensor(rewards, dtype=torch.float64), scale)
        texts = [each for group in choices for each in group]
        seen, device = PolicyDecisions.joined(texts), policy.mean.device
        lengths = torch.tensor([len(each) for each in texts])
        with torch.no_grad():
            features = policy.features(
                *(each.to(device) for each in (seen.hidden, seen.entropy, seen.positions))
            )
        return cls(features, seen.called, seen.logps, gained.float().flatten().repeat_interleave(lengths))


def reward(correct: bool, latency: float, weight: float = LATENCY_WEIGHT) -> float:
    """correct - weight * correct * latency (R-Stitch, section 3.3); a wrong text is worth 0 however fast it was.

    latency in seconds. The paper's weight of 5e-6 is for a unit of its own; 0.01 says that an answer ten seconds later is worth a
    tenth less, which for the default pair on two cores is what the whole of a usual text takes.
    """
    return float(correct) - weight * float(correct) * latency


def check_latency_weight(weight: float) -> None:
    if not 0 <= weight < math.inf:
        raise InputError(f"lambda, what a second of latency costs, must be 0 or more, got {weight}")


def group_advantages(rewards: Tensor, scale: str = "group") -> tuple[Tensor, Tensor]:
    """Rewards [Q, G] -> advantages [Q, G], and which groups have rewards that differ, bool [Q]; others have advantage 0.

    scale: "group", DAPO's (reward - mean) / std of the group. Where all texts of a group are right only latency differs, and weighs as
    much as right and wrong do elsewhere, whatever lambda is. "batch" divides by the deviation of all groups that differ, so
    that lambda keeps its meaning.
    """
    differ = rewards.amax(1) - rewards.amin(1) > EQUAL_REWARDS
    centred = rewards - rewards.mean(1, keepdim=True)
    squares = (centred**2).mean(1, keepdim=True)
    if scale == "batch":
        squares = squares[differ].mean().expand_as(squares)
    return torch.where(differ[:, None], centred / squares.sqrt(), 0.0), differ


def dapo_loss(
    logps: Tensor, old: Tensor, advantages: Tensor, *, low: float = 0.2, high: float = 0.28, of: float = 0
) -> Tensor:
    """-sum(min(r A, clip(r, 1 - low, 1 + high) A)) / of, with r = exp(logps - old); of: by default their number [N]."""
    ratio = (logps - old).exp()
    gained = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    return -gained.sum() / (of or len(logps))


class Learner:
    """A policy and its Adam. `state` and `restore` let a run go on elsewhere as if it had never stopped."""

    def __init__(self, policy: Policy, settings: LearnerSettings) -> None:
        self.policy, self.settings = policy.train().requires_grad_(True), settings
        self._optimiser = torch.optim.Adam(policy.parameters(), lr=settings.rate)

    def update(self, batch: Batch, seed: int) -> dict[str, float]:
        """Several epochs over a batch, the minibatches drawn by the seed. Returns what happened, as means over the passes."""
        settings, device = self.settings, self.policy.mean.device
        batch = Batch(*(getattr(batch, name).to(device) for name in Batch.__slots__))
        count = len(batch.logps)
        if not count:
            return {"loss": 0.0, "clipped": 0.0}
        parts = min(settings.minibatches, count)
        dice = torch.Generator().manual_seed(seed)
        told = torch.zeros(2, device=device)  # loss, answers beyond the clip
        for _ in range(settings.epochs):
            for rows in torch.randperm(count, generator=dice).to(device).tensor_split(parts):
                logps = log_probability(self.policy(batch.features[rows]), batch.called[rows])
                loss = dapo_loss(
                    logps,
                    batch.logps[rows],
                    batch.advantages[rows],
                    low=settings.low,
                    high=settings.high,
                    of=count / parts,
                )
                self._optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), settings.longest_gradient)
                self._optimiser.step()
                with torch.no_grad():
                    ratio = (logps - batch.logps[rows]).exp()
                    beyond = (ratio < 1 - settings.low) | (ratio > 1 + settings.high)
                    told += torch.stack((loss / parts, beyond.sum() / count))
        loss_, clipped = (told / settings.epochs).tolist()
        return {"loss": loss_, "clipped": clipped}

    def state(self) -> dict[str, Tensor]:
        """Weights and Adam's state, on the host, by name."""
        found = {f"policy.{name}": each for name, each in self.policy.state_dict().items()}
        for number, values in self._optimiser.state_dict()["state"].items():
            found |= {f"adam.{number}.{name}": torch.as_tensor(each) for name, each in values.items()}
        return {name: each.detach().cpu().clone().contiguous() for name, each in found.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Raises `RuntimeError` or `KeyError` where the state is that of another policy."""
        self.policy.load_state_dict(
            {name.removeprefix("policy."): each for name, each in state.items() if name.startswith("policy.")}
        )
        kept: dict[int, dict[str, Tensor]] = {}
        for name, each in state.items():
            if name.startswith("adam."):
                _, number, key = name.split(".")
                kept.setdefault(int(number), {})[key] = each.clone()
        self._optimiser.load_state_dict({**self._optimiser.state_dict(), "state": kept})
