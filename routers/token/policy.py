"""R-Stitch+ (arXiv 2507.17307, section 3.3): a learned policy says whether an unsure small model calls the large one.

It is asked only where the small model's normalised entropy is above tau; the way back keeps R-Stitch's threshold. Inputs: the
last hidden state (standardised principal components, or layer-normed), the entropy, and how much has been written. It begins
as R-Stitch: its last layer is zero and its bias says "call". While it learns it draws its answers (`Recorder`), afterwards
it takes the likelier one. Needs torch, safetensors and numpy alone; leaves out learning (`routers.token.policy_train`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from viaticum.errors import InputError, ModelError
from viaticum.routers.token.artefact import Artefact
from viaticum.routers.token.base import Step, TokenRouter
from viaticum.routers.token.neural import SMALLEST, Projection
from viaticum.routers.token.rstitch import EntropyRouter

ARTEFACT = Artefact(
    "policy",
    format=1,
    missing="no policy in {folder}; learn one with: viaticum tokens policy QUESTIONS.jsonl --pair PAIR --out {folder}",
    again="learn the policy again",
    other="learn one with these weights: viaticum tokens policy",
)
SCALARS = 3  # the entropy, its logarithm, and that of the tokens written
FARTHEST = 5.0  # standard deviations; what lies beyond is cut
COMPACT_BYTES = (
    64 << 20
)  # of hidden states that a recorder holds before it lets go of the places where nobody asked


@dataclass(frozen=True, slots=True)
class PolicyShape:
    """hidden: the small model's hidden size; rank: principal components of it that are looked at, 0: all of it, layer-normed.

    start: the logit of calling the large model before anything was learned; above 0, so that the policy begins as R-Stitch.
    Raises `InputError` for what cannot be.
    """

    hidden: int
    rank: int = 32
    width: int = 64
    start: float = 2.5

    def __post_init__(self) -> None:
        if min(self.hidden, self.width) < 1 or self.rank < 0:
            raise InputError(f"sizes are 1 or more, the rank 0 or more; got {self}")
        if not 0 < self.start < 20:
            raise InputError(
                f"start is a logit above 0 and below 20, so that the policy begins by calling the large model; got {self.start}"
            )

    @property
    def features(self) -> int:
        return (min(self.rank, self.hidden) or self.hidden) + SCALARS


class Policy(nn.Module):
    """The logit of calling the large model, from what the small one knows at a place. The same seed gives the same weights."""

    mean: Tensor
    scale: Tensor

    def __init__(self, shape: PolicyShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.projection = Projection(shape.hidden, shape.rank) if shape.rank else None
        self.register_buffer("mean", torch.zeros(SCALARS))
        self.register_buffer("scale", torch.ones(SCALARS))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Linear(shape.features, shape.width)
            self.middle = nn.Linear(shape.width, shape.width)
            self.head = nn.Linear(shape.width, 1)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.bias.fill_(shape.start)

    def features(self, hidden: Tensor, entropy: Tensor, positions: Tensor) -> Tensor:
        """hidden [B, D], entropy (normalised) [B] and tokens written [B] as one standardised vector, float32 [B, F]."""
        known = (
            F.layer_norm(hidden.float(), hidden.shape[-1:])
            if self.projection is None
            else self.projection(hidden)
        )
        scalars = (_scalars(entropy, positions) - self.mean) * self.scale
        return torch.cat((known, scalars), 1).clamp(-FARTHEST, FARTHEST)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, F] -> logits [B]."""
        inner = F.gelu(self.middle(F.gelu(self.stem(features))))
        out: Tensor = self.head(inner)
        return out.squeeze(-1)

    @torch.no_grad()
    def fit(self, hidden: Tensor, entropy: Tensor, positions: Tensor) -> None:
        """Set projection and standardisation from places [N] as they come; fewer than two change nothing.

        To be called before anything was learned: until then the answers do not depend on the features.
        """
        if len(hidden) < 2:
            return
        if self.projection is not None:
            self.projection.fit(hidden)
            if self.projection.matrix.dim() == 2:
                self.projection.matrix[:, len(hidden) - 1 :] = 0  # so few places span no more dimensions
        raw = _scalars(entropy, positions)
        self.mean.copy_(raw.mean(0))
        self.scale.copy_(1 / raw.std(0).clamp_min(1e-3))

    def fit_choices(self, choices: Sequence[PolicyDecisions]) -> None:
        """`fit` on the places at which it was asked."""
        if seen := PolicyDecisions.joined(choices):
            self.fit(*(each.to(self.mean.device) for each in (seen.hidden, seen.entropy, seen.positions)))


def _scalars(entropy: Tensor, positions: Tensor) -> Tensor:
    chance = entropy.float()
    return torch.stack((chance, chance.clamp_min(SMALLEST).log(), torch.log1p(positions.float())), 1)


class RStitchPlus(TokenRouter):
    """R-Stitch's rule, but where the small model has H > tau the policy decides whether its token is dropped.

    policy: on the small model's device. threshold: of the probability to call above which the large model is called. recorder:
    draws the answers instead, and keeps them. Raises `InputError` for tau or threshold out of range.
    """

    needs_hidden = True
    depends_on_token = False

    def __init__(
        self, policy: Policy, tau: float, threshold: float = 0.5, recorder: Recorder | None = None
    ) -> None:
        self._back = EntropyRouter(tau)
        if not 0 <= threshold <= 1:
            raise InputError(f"the threshold is a probability between 0 and 1, got {threshold}")
        self.policy, self.tau, self.threshold, self.recorder = policy, tau, threshold, recorder

    def score(self, step: Step) -> Tensor:
        """The probability of calling the large model; NaN where the policy is not asked."""
        return torch.sigmoid(self._odds(step)).masked_fill(step.entropy <= self.tau, float("nan"))

    def keep_small(self, step: Step) -> Tensor:
        sure = step.entropy <= self.tau
        if self.recorder is not None:
            return sure | ~self.recorder.draw(step, self._odds(step), ~sure)
        scores = self.score(step) if step.scores is None else step.scores
        return sure | (scores <= self.threshold)

    def hand_back(self, step: Step) -> Tensor:
        return self._back.hand_back(step)

    def _odds(self, step: Step) -> Tensor:
        hidden = step.hidden
        assert hidden is not None, "the decoder gives hidden states to a router that needs them"
        if hidden.shape[1] != self.policy.shape.hidden:
            raise InputError(
                f"the policy was made for hidden states of {self.policy.shape.hidden} numbers, and the model has "
                f"{hidden.shape[1]}; learn one for this pair"
            )
        positions = _to_device(step.positions, hidden.device)
        odds: Tensor = self.policy(self.policy.features(hidden, step.entropy, positions))
        return odds


@dataclass(frozen=True, slots=True)
class PolicyDecisions:
    """The places of a text at which the policy was asked, in their order, and what it drew; on the host.

    positions: tokens before each place, int64 [N]; hidden [N, D] in the model's dtype; entropy: normalised [N]; called: whether
    the large model was called, bool [N]; logps: logarithm of that answer's probability when it was drawn, [N].
    """

    positions: Tensor
    hidden: Tensor
    entropy: Tensor
    called: Tensor
    logps: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    @classmethod
    def joined(cls, choices: Sequence[PolicyDecisions]) -> PolicyDecisions:
        """Those of several texts one after the other."""
        asked = [each for each in choices if len(each)]
        if not asked:
            return _no_choices()
        return cls(*(torch.cat([getattr(each, name) for each in asked]) for name in cls.__slots__))


class Recorder:
    """Draws the policy's answers, each text with its own generator, and keeps them on the device.

    seeds: one a text, in the order of the engine's numbers; longest: the most tokens of a text. A text is asked once a place at most,
    and its draw there depends on seed and place alone, not on its neighbours.
    """

    def __init__(self, seeds: Sequence[int], longest: int) -> None:
        self._dice = torch.stack(
            [torch.rand(longest, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        self._parts: list[
            tuple[Tensor, ...]
        ] = []  # (request, position, asked, called, logp, entropy, hidden)
        self._bytes = 0

    def draw(self, step: Step, odds: Tensor, asked: Tensor) -> Tensor:
        """Whether to call the large model, bool [B], for logits [B]; kept where `asked`. Waits for no device."""
        assert step.hidden is not None, "the decoder gives hidden states to a router that needs them"
        self._dice = self._dice.to(odds.device)
        requests, positions = (_to_device(each, odds.device) for each in (step.requests, step.positions))
        called = self._dice[requests, positions] < torch.sigmoid(odds)
        logps = log_probability(odds, called)
        # Hidden states may lie in a buffer that the next call of the model writes to (`decoders.graphs`).
        part = (requests, positions, asked, called, logps, step.entropy.clone(), step.hidden.clone())
        self._parts.append(part)
        self._bytes += part[-1].nbytes
        if self._bytes > COMPACT_BYTES:
            self._compact()
        return called

    def read(self) -> list[PolicyDecisions]:
        """What was drawn for each text. Raises `ModelError` for features that are not finite."""
        texts = len(self._dice)
        if not self._parts:
            return [_no_choices() for _ in range(texts)]
        self._compact()
        owner, positions, _, called, logps, entropy, hidden = (each.cpu().clone() for each in self._parts[0])
        finite = torch.isfinite(logps) & torch.isfinite(entropy) & torch.isfinite(hidden).all(1)
        if not bool(finite.all()):
            raise ModelError(
                f"hidden states, or what the policy makes of them, are not finite at {int((~finite).sum())} of {len(finite)} "
                "places; the weights of the small model or of the policy are damaged"
            )
        order = (owner * self._dice.shape[1] + positions).argsort()
        counts = torch.bincount(owner, minlength=texts).tolist()
        columns = (positions, hidden, entropy, called, logps)
        split = [torch.split(each[order], counts) for each in columns]
        return [PolicyDecisions(*each) for each in zip(*split, strict=True)]

    def _compact(self) -> None:
        joined = [torch.cat(each) for each in zip(*self._parts, strict=True)]
        kept = joined[2]
        self._parts = [tuple(each[kept] for each in joined)]
        self._bytes = 0


def log_probability(odds: Tensor, called: Tensor) -> Tensor:
    """Of answers [B] by a policy with logits [B]."""
    return F.logsigmoid(torch.where(called, odds, -odds))


def _no_choices() -> PolicyDecisions:
    none = torch.empty(0)
    return PolicyDecisions(none.long(), torch.empty(0, 0), none, none.bool(), none)


def _to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of the host on a device, without waiting for what the device is doing."""
    return torch.tensor(list(values), pin_memory=device.type == "cuda").to(device, non_blocking=True)


@dataclass(frozen=True)
class TrainedPolicy:
    """A policy and what is known of it: the weights it is for, tau, how it was learned, how good it is.

    facts: pair, small and large (name and sha256 of the weights), tau, threshold, settings, steps, evaluation, versions;
    plain JSON.
    """

    policy: Policy
    metadata: Mapping[str, Any]

    @property
    def tau(self) -> float:
        return float(self.metadata["tau"])

    @property
    def threshold(self) -> float:
        return float(self.metadata["threshold"])

    def check_weights(self, role: str, name: str, sha256: str) -> None:
        """Raise `InputError` unless the policy was learned with these weights; role: small or large."""
        ARTEFACT.check_weights(self.metadata, role, name, sha256)

    def save(self, folder: str | Path) -> None:
        """Write `policy.safetensors` and `policy.json`, each whole or not at all."""
        state = {name: each.cpu().contiguous() for name, each in self.policy.state_dict().items()}
        ARTEFACT.save(folder, state, asdict(self.policy.shape), self.metadata)

    @classmethod
    def load(cls, folder: str | Path) -> TrainedPolicy:
        """Raises `InputError` where there is none, `DataError` for one that is damaged or of another version."""

        def make(shape: dict[str, Any], facts: dict[str, Any]) -> TrainedPolicy:
            made = cls(Policy(PolicyShape(**shape)), facts)
            RStitchPlus(made.policy, made.tau, made.threshold)  # checks both
            _ = [facts[role][name] for role in ("small", "large") for name in ("name", "sha256")]
            return made

        made = ARTEFACT.load(folder, make, lambda made: made.policy)
        made.policy.requires_grad_(False)
        return made
