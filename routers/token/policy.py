"""R-Stitch+ (arXiv 2507.17307, section 3.3): a policy decides if an uncertain small model calls the large.

It decides only where the small model's normalised entropy is above tau; handing back keeps R-Stitch's
threshold. Inputs: the last hidden state (whitened principal components, or layer-normed), the entropy, and
the output length. It starts as R-Stitch: its last layer is zero and its bias favours the call. In training
decisions are sampled (`Recorder`), afterwards the more likely one is taken. Needs torch, safetensors and
numpy only; leaves out training (`routers.token.policy_train`).
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
from viaticum.routers.token.base import Step, TokenRouter, to_device
from viaticum.routers.token.neural import MIN_ENTROPY, Projection
from viaticum.routers.token.rstitch import EntropyRouter

ARTEFACT = Artefact(
    "policy",
    format=1,
    missing="no policy in {folder}; learn one with: "
    "viaticum tokens policy QUESTIONS.jsonl --pair PAIR --out {folder}",
    repair="learn the policy again",
    mismatch="learn one with these weights: viaticum tokens policy",
)
SCALARS = 3  # the entropy, its logarithm, and that of the number of output tokens
MAX_DEVIATION = 5.0  # standard deviations; features beyond are clamped
# Bytes of hidden states that a recorder holds before it drops the positions at which the policy did not
# decide.
COMPACT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class PolicyShape:
    """Hyperparameters of a policy.

    Args:
        hidden: D, hidden size of the small model.
        rank: principal components of the hidden state; 0: all dimensions, layer-normed.
        width: of the hidden layers.
        start: initial logit of calling the large model; above 0, so that the policy starts as R-Stitch.

    Raises:
        InputError: a value out of range.
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
                "start is a logit above 0 and below 20, so that the policy begins by calling the large "
                f"model; got {self.start}"
            )

    @property
    def features(self) -> int:
        """F, the length of the concatenated inputs."""
        return (min(self.rank, self.hidden) or self.hidden) + SCALARS


class Policy(nn.Module):
    """Estimates the logit of calling the large model; the same seed gives the same initial weights."""

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
        """Inputs concatenated and standardised, float32 [B, F].

        hidden: [B, D]; entropy: normalised [B]; positions: number of output tokens before [B].
        """
        projected = (
            F.layer_norm(hidden.float(), hidden.shape[-1:])
            if self.projection is None
            else self.projection(hidden)
        )
        scalars = (_scalars(entropy, positions) - self.mean) * self.scale
        return torch.cat((projected, scalars), 1).clamp(-MAX_DEVIATION, MAX_DEVIATION)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, F] -> logits [B]."""
        inner = F.gelu(self.middle(F.gelu(self.stem(features))))
        out: Tensor = self.head(inner)
        return out.squeeze(-1)

    @torch.no_grad()
    def fit(self, hidden: Tensor, entropy: Tensor, positions: Tensor) -> None:
        """Fit projection and standardisation to N positions; fewer than two change nothing.

        To be called before training: until then the decisions do not depend on the features.
        """
        if len(hidden) < 2:
            return
        if self.projection is not None:
            self.projection.fit(hidden)
            if self.projection.matrix.dim() == 2:
                self.projection.matrix[:, len(hidden) - 1 :] = 0  # N positions span no more dimensions
        raw = _scalars(entropy, positions)
        self.mean.copy_(raw.mean(0))
        self.scale.copy_(1 / raw.std(0).clamp_min(1e-3))

    def fit_decisions(self, texts: Sequence[PolicyDecisions]) -> None:
        """`fit` to the positions at which it decided."""
        if decisions := PolicyDecisions.concatenate(texts):
            inputs = (decisions.hidden, decisions.entropy, decisions.positions)
            self.fit(*(each.to(self.mean.device) for each in inputs))


def _scalars(entropy: Tensor, positions: Tensor) -> Tensor:
    """[B] each -> [B, SCALARS]."""
    entropy = entropy.float()
    return torch.stack((entropy, entropy.clamp_min(MIN_ENTROPY).log(), torch.log1p(positions.float())), 1)


class RStitchPlus(TokenRouter):
    """R-Stitch's rule, but where the small model has H > tau a policy decides whether its token is dropped.

    Args:
        policy: on the small model's device.
        tau: normalised entropy in [0, 1].
        threshold: of the probability to call, above which the large model is called.
        recorder: samples the decisions instead, and keeps them.

    Raises:
        InputError: tau or threshold out of range.
    """

    needs_hidden = True
    depends_on_token = False

    def __init__(
        self, policy: Policy, tau: float, threshold: float = 0.5, recorder: Recorder | None = None
    ) -> None:
        self._entropy_router = EntropyRouter(tau)
        if not 0 <= threshold <= 1:
            raise InputError(f"the threshold is a probability between 0 and 1, got {threshold}")
        self.policy, self.tau, self.threshold, self.recorder = policy, tau, threshold, recorder

    def score(self, step: Step) -> Tensor:
        """Probability of calling the large model, float32 [B]; NaN where the policy does not decide."""
        return torch.sigmoid(self._logits(step)).masked_fill(step.entropy <= self.tau, float("nan"))

    def keep_small(self, step: Step) -> Tensor:
        confident = step.entropy <= self.tau
        if self.recorder is not None:
            return confident | ~self.recorder.sample(step, self._logits(step), ~confident)
        scores = self.score(step) if step.scores is None else step.scores
        return confident | (scores <= self.threshold)

    def hand_back(self, step: Step) -> Tensor:
        return self._entropy_router.hand_back(step)

    def _logits(self, step: Step) -> Tensor:
        hidden = step.hidden
        assert hidden is not None, "the decoder gives hidden states to a router that needs them"
        if hidden.shape[1] != self.policy.shape.hidden:
            raise InputError(
                f"the policy was made for hidden states of {self.policy.shape.hidden} numbers, and the model "
                f"has {hidden.shape[1]}; learn one for this pair"
            )
        positions = to_device(step.positions, hidden.device)
        logits: Tensor = self.policy(self.policy.features(hidden, step.entropy, positions))
        return logits


@dataclass(frozen=True, slots=True)
class PolicyDecisions:
    """N sampled decisions of one text, in the order of their positions; on the host.

    positions: output tokens before each, int64 [N]. hidden: [N, D] in the model's dtype. entropy: normalised
    [N]. called: whether the large model was called, bool [N]. logps: log probability of the decision when
    sampled [N].
    """

    positions: Tensor
    hidden: Tensor
    entropy: Tensor
    called: Tensor
    logps: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    @classmethod
    def concatenate(cls, texts: Sequence[PolicyDecisions]) -> PolicyDecisions:
        """The decisions of several texts, one text after the other."""
        parts = [each for each in texts if len(each)]
        if not parts:
            return _no_decisions()
        return cls(*(torch.cat([getattr(each, name) for each in parts]) for name in cls.__slots__))


class Recorder:
    """Samples the policy's decisions, each text with its own generator, and keeps them on the device.

    The policy decides at most once a position of a text, and the sample depends on seed and position only,
    not on the other rows.

    Args:
        seeds: of each text, in the order of the engine's request indices.
        longest: maximum tokens of a text.
    """

    def __init__(self, seeds: Sequence[int], longest: int) -> None:
        self._uniforms = torch.stack(
            [torch.rand(longest, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )  # [texts, longest]
        # Of each step: request, position, decides, called, logp, entropy, hidden.
        self._parts: list[tuple[Tensor, ...]] = []
        self._bytes = 0

    def sample(self, step: Step, logits: Tensor, decides: Tensor) -> Tensor:
        """Whether to call the large model, bool [B], for the policy's logits [B].

        The decision is kept where `decides`, bool [B]. Does not wait for the device.
        """
        assert step.hidden is not None, "the decoder gives hidden states to a router that needs them"
        self._uniforms = self._uniforms.to(logits.device)
        requests, positions = (to_device(each, logits.device) for each in (step.requests, step.positions))
        called = self._uniforms[requests, positions] < torch.sigmoid(logits)
        logps = log_probability(logits, called)
        # Hidden states may be in a buffer that the next call of the model overwrites (`decoders.graphs`).
        part = (requests, positions, decides, called, logps, step.entropy.clone(), step.hidden.clone())
        self._parts.append(part)
        self._bytes += part[-1].nbytes
        if self._bytes > COMPACT_BYTES:
            self._compact()
        return called

    def read(self) -> list[PolicyDecisions]:
        """The sampled decisions of each text.

        Raises:
            ModelError: features are not finite.
        """
        texts = len(self._uniforms)
        if not self._parts:
            return [_no_decisions() for _ in range(texts)]
        self._compact()
        owner, positions, _, called, logps, entropy, hidden = (each.cpu().clone() for each in self._parts[0])
        finite = torch.isfinite(logps) & torch.isfinite(entropy) & torch.isfinite(hidden).all(1)
        if not bool(finite.all()):
            raise ModelError(
                "hidden states, or what the policy makes of them, are not finite at "
                f"{int((~finite).sum())} of {len(finite)} places; the weights of the small model or of the "
                "policy are damaged"
            )
        order = (owner * self._uniforms.shape[1] + positions).argsort()
        counts = torch.bincount(owner, minlength=texts).tolist()
        columns = (positions, hidden, entropy, called, logps)
        split = [torch.split(each[order], counts) for each in columns]
        return [PolicyDecisions(*each) for each in zip(*split, strict=True)]

    def _compact(self) -> None:
        columns = [torch.cat(each) for each in zip(*self._parts, strict=True)]
        decides = columns[2]
        self._parts = [tuple(each[decides] for each in columns)]
        self._bytes = 0


def log_probability(logits: Tensor, called: Tensor) -> Tensor:
    """Log probability [B] of decisions `called`, bool [B], by a policy with logits [B]."""
    return F.logsigmoid(torch.where(called, logits, -logits))


def _no_decisions() -> PolicyDecisions:
    empty = torch.empty(0)
    return PolicyDecisions(empty.long(), torch.empty(0, 0), empty, empty.bool(), empty)


@dataclass(frozen=True)
class TrainedPolicy:
    """A trained policy and its metadata.

    metadata: pair, small and large (name and sha256 of the weights), tau, threshold, settings, steps,
    evaluation, versions; plain JSON.
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
        """Raise `InputError` unless the policy was trained with these weights; role: small or large."""
        ARTEFACT.check_weights(self.metadata, role, name, sha256)

    def save(self, folder: str | Path) -> None:
        """Write `policy.safetensors` and `policy.json`, each atomically."""
        state = {name: each.cpu().contiguous() for name, each in self.policy.state_dict().items()}
        ARTEFACT.save(folder, state, asdict(self.policy.shape), self.metadata)

    @classmethod
    def load(cls, folder: str | Path) -> TrainedPolicy:
        """Read a saved policy.

        Raises:
            InputError: there is none.
            DataError: it is damaged or of another format.
        """

        def make(shape: dict[str, Any], metadata: dict[str, Any]) -> TrainedPolicy:
            trained = cls(Policy(PolicyShape(**shape)), metadata)
            RStitchPlus(trained.policy, trained.tau, trained.threshold)  # checks both
            _ = [metadata[role][name] for role in ("small", "large") for name in ("name", "sha256")]
            return trained

        trained = ARTEFACT.load(folder, make, lambda trained: trained.policy)
        trained.policy.requires_grad_(False)
        return trained
