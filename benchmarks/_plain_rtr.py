"""Route-To-Reason as in the paper (arXiv 2505.19435), as a baseline for the extensions.

Dual representation: a model and a strategy are each the embedding of a description plus a learned one of
equal size; question, model and strategy are concatenated before one hidden layer of 768 (ReLU). Accuracy: two
logits, cross-entropy. Tokens: softplus, squared error on raw tokens. Adam 1e-3, batches of 32 questions with
all their pairs, at most 100 epochs, patience 5, here on validation questions that share no near-duplicate
with the others (the paper stops on test data). The heads are trained one after the other, each with its own
learned embeddings, since the squared error would drown the cross-entropy. The choice is by accuracy - lambda
* tokens; lambda is set on the validation questions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from _baselines import Curve, Predict, Split, curve, operating_points
from torch import Tensor, nn
from torch.nn import functional as F

from viaticum.routers.query.outcome_matrix import Array

WIDTH, BATCH, EPOCHS, PATIENCE = 768, 32, 100, 5
LAMBDAS = np.geomspace(1e-7, 1.0, 120)  # accuracy a token
COST_WEIGHTS = np.geomspace(0.1, 1e5, 120)  # accuracy a dollar, for the variant with prices


@dataclass(frozen=True)
class Descriptions:
    """Embeddings of descriptions [A, D], [B, D]; indices of the model and strategy of each pair [P, 2]."""

    models: Tensor
    strategies: Tensor
    of_pair: Tensor


class Head(nn.Module):
    """One hidden layer over question, model and strategy.

    Its first product is computed per input, with equal results and much less work, since there are few pairs.
    """

    def __init__(self, descriptions: Descriptions, outputs: int) -> None:
        super().__init__()
        size = descriptions.models.shape[1]
        self.descriptions = descriptions
        self.model = nn.Parameter(0.02 * torch.randn_like(descriptions.models))
        self.strategy = nn.Parameter(0.02 * torch.randn_like(descriptions.strategies))
        self.first, self.last = nn.Linear(3 * size, WIDTH), nn.Linear(WIDTH, outputs)

    def pairs(self) -> Tensor:
        """First-layer activations of every pair [P, WIDTH]."""
        descriptions = self.descriptions
        _, of_model, of_strategy = self.first.weight.chunk(3, 1)
        models = (descriptions.models + self.model) @ of_model.T
        strategies = (descriptions.strategies + self.strategy) @ of_strategy.T
        return models[descriptions.of_pair[:, 0]] + strategies[descriptions.of_pair[:, 1]] + self.first.bias

    def forward(self, questions: Tensor) -> Tensor:
        """Every pair for every question: [N, D] -> [N, P, outputs]."""
        hidden = questions @ self.first.weight.chunk(3, 1)[0].T
        out: Tensor = self.last(torch.relu(hidden[:, None] + self.pairs()))
        return out

    @torch.no_grad()
    def table(self, questions: Tensor) -> Tensor:
        return torch.cat([self(part) for part in torch.split(questions, 256)])


Loss = Callable[[Tensor, Tensor], Tensor]


def correct_loss(logits: Tensor, correct: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, 2), correct.reshape(-1).long())


def token_loss(predicted: Tensor, tokens: Tensor) -> Tensor:
    return F.mse_loss(F.softplus(predicted[..., 0]), tokens)


def train_head(
    head: Head,
    loss: Loss,
    x: Tensor,
    target: Tensor,
    validation: tuple[Tensor, Tensor],
    report: Callable[[int], None],
) -> int:
    """Train until `validation` (questions, targets) no longer improves; return the best epoch."""
    optimiser = torch.optim.Adam(head.parameters(), lr=1e-3, fused=True)
    best, best_epoch, best_state = float("inf"), 0, {}
    for epoch in range(EPOCHS):
        for rows in torch.split(torch.randperm(len(x)), BATCH):
            optimiser.zero_grad()
            loss(head(x[rows]), target[rows]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        value = float(loss(head.table(validation[0]), validation[1]))
        report(epoch + 1)
        if value < best:
            best, best_epoch = value, epoch + 1
            best_state = {name: each.clone() for name, each in head.state_dict().items()}
        if epoch + 1 - best_epoch >= PATIENCE:
            break
    head.load_state_dict(best_state)
    return best_epoch


def plain_rtr(
    split: Split, descriptions: Descriptions, price: Array, report: Callable[[str], None]
) -> tuple[Curve, Curve, dict[str, int]]:
    """The curve by tokens, the curve of the same heads with priced tokens, and the epochs.

    price: dollars a token of each pair [P].
    """
    torch.manual_seed(split.seed)
    inner, train = split.inner, split.train
    x, x_inner = torch.from_numpy(split.x_train[~inner]), torch.from_numpy(split.x_train[inner])
    accuracy, tokens = Head(descriptions, 2), Head(descriptions, 1)
    epochs = {}
    for name, head, loss, target in (
        ("accuracy", accuracy, correct_loss, train.correct),
        ("tokens", tokens, token_loss, train.tokens),
    ):
        known = torch.from_numpy(target).float()
        epochs[name] = train_head(
            head,
            loss,
            x,
            known[~inner],
            (x_inner, known[inner]),
            lambda epoch, name=name: report(f"plain RTR, {name}, epoch {epoch}"),  # type: ignore[misc]
        )

    def by_tokens(asked: Array) -> tuple[Array, Array]:
        questions = torch.from_numpy(asked)
        return (
            accuracy.table(questions).softmax(-1)[..., 1].numpy(),
            F.softplus(tokens.table(questions)[..., 0]).numpy(),
        )

    def by_price(asked: Array) -> tuple[Array, Array]:
        probabilities, length = by_tokens(asked)
        return probabilities, length * price

    def tuned_curve(predict: Predict, cost_weights: Array) -> Curve:
        weights = cost_weights.tolist()
        points = operating_points(*predict(split.x_train[inner]), train.select(inner), weights, split.budgets)
        return curve(predict, split, points, weights)

    return tuned_curve(by_tokens, LAMBDAS), tuned_curve(by_price, COST_WEIGHTS), epochs
