"""R2R's router (arXiv 2505.21600, section 3.2): a network from the SLM's features to a divergence logit.

Inputs: the last hidden state, the largest logits, sorted, the small model's input embedding of its next
token, and, not in R2R, its entropy and the embedding of its second choice: " the" against " a" matters less
than "7" against "8". Hidden state and embeddings are projected; all inputs are concatenated and pass through
residual pre-norm MLP blocks. Several small networks, trained on different questions, are averaged: with some
ten thousand tokens that generalises better than one large network. All members are computed together. Needs
torch, safetensors and numpy only; leaves out training (`routers.token.train`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from viaticum.errors import InputError
from viaticum.routers.token.artefact import Artefact
from viaticum.routers.token.base import TOP, Step, second_choice, top_tokens
from viaticum.routers.token.divergence import DivergenceRouter
from viaticum.routers.token.drift import ShareController

INPUTS = ("entropy", "logits", "hidden", "embedding", "second")
VECTORS = ("hidden", "embedding", "second")  # inputs that are projected
SUBSETS: Mapping[str, tuple[str, ...]] = {
    "all": INPUTS,
    "r2r": ("logits", "hidden", "embedding"),
    **{name: (name,) for name in INPUTS},
}
ARTEFACT = Artefact(
    "router",
    format=1,
    missing="no token router in {folder}; make one with: viaticum tokens train LABELS --out {folder}",
    repair="train the router again",
    mismatch="label and train with these weights",
)
EXPANSION = 4  # of an MLP block
PROBABILITIES = 10  # most likely tokens whose probabilities are inputs besides their logits
MAX_DEVIATION = 10.0  # standard deviations; features beyond were not seen in training and are clamped
MIN_ENTROPY = 1e-4  # lower bound of entropies, whose logarithm is an input


class Inputs(NamedTuple):
    """Inputs of a network for B positions; those that it does not use may be None.

    entropy: normalised [B]. top: largest logits, descending [B, top]. hidden: last hidden states [B, D].
    embedding, second: the small model's input embeddings of its token and of its second choice [B, D].
    """

    entropy: Tensor
    top: Tensor
    hidden: Tensor | None = None
    embedding: Tensor | None = None
    second: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """Hyperparameters of a network. The paper's: width 1024, depth 6, rank 0, members 1.

    Args:
        hidden: D, hidden size of the small model and of its embeddings.
        top: number of logits.
        inputs: some of INPUTS.
        width: of the MLP blocks.
        depth: number of MLP blocks; 0 is logistic regression.
        rank: principal components that hidden states and embeddings are projected to; 0: no projection.
        members: networks that are averaged.
        dropout: in training.

    Raises:
        InputError: a value out of range.
    """

    hidden: int
    top: int = TOP
    inputs: tuple[str, ...] = INPUTS
    width: int = 64
    depth: int = 2
    rank: int = 64
    members: int = 5
    dropout: float = 0.3

    def __post_init__(self) -> None:
        unknown = [name for name in self.inputs if name not in INPUTS]
        if unknown or not self.inputs:
            raise InputError(f"inputs are some of {', '.join(INPUTS)}; got {', '.join(unknown) or 'none'}")
        if min(self.hidden, self.top, self.width, self.members) < 1 or min(self.depth, self.rank) < 0:
            raise InputError(f"sizes are 1 or more, depth and rank 0 or more; got {self}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is from 0 to below 1, got {self.dropout}")

    @property
    def projected(self) -> int:
        return min(self.rank, self.hidden) or self.hidden

    @property
    def features(self) -> int:
        """F, the length of the concatenated inputs."""
        sizes = {
            "entropy": 2,
            "logits": self.top + min(PROBABILITIES, self.top),
            **dict.fromkeys(VECTORS, self.projected),
        }
        return sum(sizes[name] for name in self.inputs)


def parse_inputs(text: str) -> tuple[str, ...]:
    """Parse "all", "r2r" (logits, hidden, embedding) or names joined by + or commas.

    Raises:
        InputError: an unknown name.
    """
    if text in SUBSETS:
        return SUBSETS[text]
    names = [name.strip() for name in text.replace("+", ",").split(",")]
    unknown = [name for name in names if name not in INPUTS]
    if unknown:
        raise InputError(f"unknown input {unknown[0]!r}; inputs are {', '.join((*INPUTS, 'r2r', 'all'))}")
    return tuple(name for name in INPUTS if name in names)


class _Linear(nn.Module):
    """A linear layer of each of K members: x [K, B, in] -> [K, B, out]."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class _Block(nn.Module):
    """x + MLP(norm(x)); the norm has no weights, which the layer after it would absorb."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = _Linear(shape.members, shape.width, EXPANSION * shape.width)
        self.down = _Linear(shape.members, EXPANSION * shape.width, shape.width)
        self.dropout = shape.dropout

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.up(F.layer_norm(x, x.shape[-1:])))
        return x + F.dropout(self.down(inner), self.dropout, self.training)


class Projection(nn.Module):
    """Vectors [B, D] to whitened principal components [B, rank]; rank 0 only standardises them, [B, D]."""

    mean: Tensor
    matrix: Tensor

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("matrix", torch.ones(size, rank) if 0 < rank < size else torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        centred = x.float() - self.mean
        return centred @ self.matrix if self.matrix.dim() == 2 else centred * self.matrix

    def fit(self, x: Tensor) -> None:
        """Fit to vectors [N, D]. Dimensions are standardised first: a few are far larger than all others."""
        x = x.float()
        self.mean.copy_(x.mean(0))
        scale = 1 / x.std(0).clamp_min(1e-6)
        if self.matrix.dim() == 1:
            self.matrix.copy_(scale)
            return
        centred = (x - self.mean) * scale
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        rank = self.matrix.shape[1]
        values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
        # The sign of an eigenvector is arbitrary, and may differ between machines.
        vectors = vectors * torch.sign(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)))
        self.matrix.copy_(scale[:, None] * vectors / values.clamp_min(1e-6).sqrt())


class DivergenceNetwork(nn.Module):
    """Estimates the logit that the small model's token diverges; see `Shape`."""

    mean: Tensor
    scale: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.projections = nn.ModuleDict(
            {name: Projection(shape.hidden, shape.rank) for name in VECTORS if name in shape.inputs}
        )
        self.register_buffer("mean", torch.zeros(shape.features))
        self.register_buffer("scale", torch.ones(shape.features))
        self.stem = _Linear(shape.members, shape.features, shape.width) if shape.depth else None
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.depth))
        self.head = _Linear(shape.members, shape.width if shape.depth else shape.features, 1)

    def features(self, inputs: Inputs) -> Tensor:
        """All inputs concatenated and standardised, float32 [B, F]."""
        return ((self._raw(inputs) - self.mean) * self.scale).clamp(-MAX_DEVIATION, MAX_DEVIATION)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of all members, [K, B], for shared features [B, F] or each member's own [K, B, F]."""
        members = self.shape.members
        x = features.expand(members, *features.shape) if features.dim() == 2 else features
        x = F.dropout(x, self.shape.dropout if self.shape.depth else 0.0, self.training)
        if self.stem is not None:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            x = F.layer_norm(x, x.shape[-1:])
        out: Tensor = self.head(x)
        return out.squeeze(-1)

    def logits(self, inputs: Inputs) -> Tensor:
        """The mean logit of the members, float32 [B]."""
        members: Tensor = self(self.features(inputs))
        return members.mean(0)

    @torch.no_grad()
    def fit_features(self, inputs: Inputs) -> None:
        """Fit projections and standardisation to inputs of the training data."""
        for name, projection in self.projections.items():
            assert isinstance(projection, Projection), "only projections are kept there"
            projection.fit(_vector(inputs, name))
        raw = self._raw(inputs)
        self.mean.copy_(raw.mean(0))
        self.scale.copy_(1 / raw.std(0).clamp_min(1e-4))

    def _raw(self, inputs: Inputs) -> Tensor:
        parts: list[Tensor] = []
        if "entropy" in self.shape.inputs:
            entropy = inputs.entropy.float()[:, None]
            parts += [entropy, entropy.clamp_min(MIN_ENTROPY).log()]
        if "logits" in self.shape.inputs:
            top = inputs.top[:, : self.shape.top].float()
            parts += [top[:, :1], top[:, 1:] - top[:, :1], torch.softmax(top, -1)[:, :PROBABILITIES]]
        parts += [projection(_vector(inputs, name)) for name, projection in self.projections.items()]
        return torch.cat(parts, 1)


def _vector(inputs: Inputs, name: str) -> Tensor:
    values: Tensor | None = getattr(inputs, name)
    assert values is not None, f"the network's input {name} is missing"
    return values


class LearnedDivergenceRouter(DivergenceRouter):
    """Routes with a trained network: its score is the probability that the small model's token diverges.

    Args:
        network: moved to the device of the embeddings.
        embeddings: input embeddings of the small model [vocabulary, D] (`Runner.embeddings`), on its device.
        threshold: of the probability above which a token is dropped.
        drift: keeps the large model's share at a target; None: the threshold is constant.

    Raises:
        InputError: the network was made for embeddings of another size.
    """

    def __init__(
        self,
        network: DivergenceNetwork,
        embeddings: Tensor,
        threshold: float = 0.5,
        drift: ShareController | None = None,
    ) -> None:
        super().__init__(threshold)
        used = network.shape.inputs
        if embeddings.shape[1] != network.shape.hidden and ("embedding" in used or "second" in used):
            raise InputError(
                f"the router was made for embeddings of {network.shape.hidden} numbers, and the model has "
                f"{embeddings.shape[1]}; train it on labels of this pair"
            )
        self.network = network.to(embeddings.device).eval().requires_grad_(False)
        self.embeddings, self.drift = embeddings, drift
        self.needs_hidden = "hidden" in used

    def score(self, step: Step) -> Tensor:
        used = self.network.shape.inputs
        top = best = step.logits
        if "logits" in used or "second" in used:
            top, best = top_tokens(step.logits, max(self.network.shape.top, 2))
        inputs = Inputs(
            step.entropy,
            top,
            step.hidden,
            self.embeddings[step.tokens] if "embedding" in used else None,
            self.embeddings[second_choice(best, step.tokens)] if "second" in used else None,
        )
        return torch.sigmoid(self.network.logits(inputs))

    def keep_small(self, step: Step) -> Tensor:
        if self.drift is None:
            return super().keep_small(step)
        scores = self.score(step) if step.scores is None else step.scores
        return self.drift.keep(scores, self.threshold)


@dataclass(frozen=True)
class TrainedRouter:
    """A trained network and its metadata.

    metadata: pair, small and large (name and sha256 of the weights), verifier (of its labels), threshold,
    calibration, quantiles, metrics, split, digests (of the training questions), versions; plain JSON.
    """

    network: DivergenceNetwork
    metadata: Mapping[str, Any]

    @property
    def threshold(self) -> float:
        return float(self.metadata["threshold"])

    @property
    def verifier(self) -> str:
        """The verifier of its labels; empty if unknown."""
        return str(self.metadata.get("verifier", ""))

    def threshold_for(self, share: float) -> float:
        """The threshold above which `share` of the tokens scored in the last calibration.

        Raises:
            InputError: a share outside [0, 1].
        """
        if not 0 <= share <= 1:
            raise InputError(f"a share is between 0 and 1, got {share}")
        quantiles: Sequence[float] = self.metadata["quantiles"]
        position = (1 - share) * (len(quantiles) - 1)
        low = int(position)
        high = min(low + 1, len(quantiles) - 1)
        return quantiles[low] + (position - low) * (quantiles[high] - quantiles[low])

    def check_weights(self, role: str, name: str, sha256: str) -> None:
        """Raise `InputError` unless the router was made for these weights; role: small or large."""
        ARTEFACT.check_weights(self.metadata, role, name, sha256)

    def save(self, folder: str | Path) -> None:
        """Write `router.safetensors` and `router.json`, each atomically."""
        ARTEFACT.save(folder, compact(self.network.state_dict()), asdict(self.network.shape), self.metadata)

    @classmethod
    def load(cls, folder: str | Path) -> TrainedRouter:
        """Read a saved router.

        Raises:
            InputError: there is none.
            DataError: it is damaged or of another format.
        """

        def make(shape: dict[str, Any], metadata: dict[str, Any]) -> TrainedRouter:
            return cls(DivergenceNetwork(Shape(**{**shape, "inputs": tuple(shape["inputs"])})), metadata)

        return ARTEFACT.load(folder, make, lambda made: made.network)


def compact(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the stored precision: float16, but means and scales in float32."""
    exact = ("mean", "scale", "matrix")
    return {
        name: (tensor if name.rpartition(".")[2] in exact else tensor.half()).contiguous()
        for name, tensor in state.items()
    }


def round_weights(network: DivergenceNetwork) -> None:
    """Round the weights to the stored precision, so that metrics hold for the network once loaded."""
    network.load_state_dict({name: tensor.float() for name, tensor in compact(network.state_dict()).items()})
