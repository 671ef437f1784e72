"""Training of R-Stitch+'s policy by DAPO (arXiv 2503.14476), on the policy's decisions only.

Several texts a question, each with sampled decisions. The advantage of a text is its reward relative to its
group, in standard deviations; groups with equal rewards carry no signal and are left out. The ratio of new to
old probability is clipped, higher above than below, and the loss is the mean over all decisions of the batch,
so that a long text counts for more. Pure torch; leaves out models and questions.
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
EQUAL_REWARDS = 1e-6  # rewards that differ by less are equal


@dataclass(frozen=True, slots=True)
class LearnerSettings:
    """Hyperparameters of the policy update.

    Args:
        rate: learning rate of Adam.
        low, high: clip range of the probability ratio, 1 - low to 1 + high.
        epochs: passes over a batch.
        minibatches: of each pass.
        longest_gradient: norm to which gradients are clipped.
        scale: of the advantages, see `group_advantages`.

    Raises:
        InputError: a value out of range.
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
    """N decisions of the policy.

    features: [N, F]. called: whether the large model was called, bool [N]. logps: log probability when
    sampled [N]. advantages: [N].
    """

    features: Tensor
    called: Tensor
    logps: Tensor
    advantages: Tensor

    @classmethod
    def of(
        cls,
        policy: Policy,
        rewards: Sequence[Sequence[float]],
        decisions: Sequence[Sequence[PolicyDecisions]],
        scale: str = "group",
    ) -> Batch:
        """All decisions of groups of texts; each decision has the advantage of its text.

        Args:
            policy: computes the features.
            rewards: of each text of each group.
            decisions: of each text of each group.
            scale: see `group_advantages`.
        """
        advantages, _ = group_advantages(torch.tensor(rewards, dtype=torch.float64), scale)
        texts = [each for group in decisions for each in group]
        joined, device = PolicyDecisions.concatenate(texts), policy.mean.device
        lengths = torch.tensor([len(each) for each in texts])
        inputs = (joined.hidden, joined.entropy, joined.positions)
        with torch.no_grad():
            features = policy.features(*(each.to(device) for each in inputs))
        return cls(
            features,
            joined.called,
            joined.logps,
            advantages.float().flatten().repeat_interleave(lengths),
        )


def reward(correct: bool, latency: float, weight: float = LATENCY_WEIGHT) -> float:
    """Reward of a text: correct - weight * correct * latency (R-Stitch, section 3.3); 0 for a wrong text.

    latency in seconds. The paper's weight of 5e-6 is for a unit of its own; with 0.01 an answer ten seconds
    later is worth a tenth less, which for the default pair on two cores is the duration of a usual text.
    """
    return float(correct) - weight * float(correct) * latency


def check_latency_weight(weight: float) -> None:
    if not 0 <= weight < math.inf:
        raise InputError(f"lambda, what a second of latency costs, must be 0 or more, got {weight}")


def group_advantages(rewards: Tensor, scale: str = "group") -> tuple[Tensor, Tensor]:
    """Advantages [Q, G] of rewards [Q, G]; bool [Q]: whose rewards differ, the others' advantages are 0.

    scale: "group" is DAPO's (reward - mean) / std of the group. If all texts of a group are right, only
    latency differs, and then weighs as much as right and wrong do elsewhere, whatever lambda is. "batch"
    divides by the standard deviation over all groups that differ, so that lambda keeps its meaning.
    """
    differ = rewards.amax(1) - rewards.amin(1) > EQUAL_REWARDS
    centred = rewards - rewards.mean(1, keepdim=True)
    variance = (centred**2).mean(1, keepdim=True)
    if scale == "batch":
        variance = variance[differ].mean().expand_as(variance)
    return torch.where(differ[:, None], centred / variance.sqrt(), 0.0), differ


def dapo_loss(
    logps: Tensor, old: Tensor, advantages: Tensor, *, low: float = 0.2, high: float = 0.28, of: float = 0
) -> Tensor:
    """-sum(min(r A, clip(r, 1 - low, 1 + high) A)) / of, r = exp(logps - old): the negated DAPO objective.

    logps, old, advantages: [N]; of: the divisor, by default N.
    """
    ratio = (logps - old).exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    return -objective.sum() / (of or len(logps))


class Learner:
    """A policy and its Adam optimiser; `state` and `restore` allow an exact resume."""

    def __init__(self, policy: Policy, settings: LearnerSettings) -> None:
        self.policy, self.settings = policy.train().requires_grad_(True), settings
        self._optimiser = torch.optim.Adam(policy.parameters(), lr=settings.rate)

    def update(self, batch: Batch, seed: int) -> dict[str, float]:
        """Train for several epochs on a batch, its minibatches sampled by the seed.

        Returns the loss and the share of clipped decisions, as means over the epochs.
        """
        settings, device = self.settings, self.policy.mean.device
        batch = Batch(*(getattr(batch, name).to(device) for name in Batch.__slots__))
        count = len(batch.logps)
        if not count:
            return {"loss": 0.0, "clipped": 0.0}
        parts = min(settings.minibatches, count)
        rng = torch.Generator().manual_seed(seed)
        totals = torch.zeros(2, device=device)  # loss, share of clipped decisions
        for _ in range(settings.epochs):
            for rows in torch.randperm(count, generator=rng).to(device).tensor_split(parts):
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
                    is_clipped = (ratio < 1 - settings.low) | (ratio > 1 + settings.high)
                    totals += torch.stack((loss / parts, is_clipped.sum() / count))
        mean_loss, clipped = (totals / settings.epochs).tolist()
        return {"loss": mean_loss, "clipped": clipped}

    def state(self) -> dict[str, Tensor]:
        """Weights and the state of Adam on the host, by name."""
        found = {f"policy.{name}": each for name, each in self.policy.state_dict().items()}
        for number, values in self._optimiser.state_dict()["state"].items():
            found |= {f"adam.{number}.{name}": torch.as_tensor(each) for name, each in values.items()}
        return {name: each.detach().cpu().clone().contiguous() for name, each in found.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` returned.

        Raises:
            RuntimeError, KeyError: the state is of another policy.
        """
        self.policy.load_state_dict(
            {name.removeprefix("policy."): each for name, each in state.items() if name.startswith("policy.")}
        )
        kept: dict[int, dict[str, Tensor]] = {}
        for name, each in state.items():
            if name.startswith("adam."):
                _, number, key = name.split(".")
                kept.setdefault(int(number), {})[key] = each.clone()
        self._optimiser.load_state_dict({**self._optimiser.state_dict(), "state": kept})
