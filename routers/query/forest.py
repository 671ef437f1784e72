"""A forest head: extremely randomised trees (Geurts et al. 2006), grown by scikit-learn and kept as arrays.

A tree reads principal components of the embedding, what can be counted in the text, and components of the
nearest known questions' outcomes. The leaf-mates of a question are known questions that are alike in what
matters for outcomes; their means, averaged over trees, are its accuracy and cost for every column. Trees
split on a few components of all outcomes, so that many columns cost little.

Shapes: T trees, N nodes of a tree at most, C features, and as in `heads`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from viaticum.routers.query.heads import NeighboursHead, log_odds, mean_known

TREES = 60
LEAF = 5  # questions of a leaf at least
TRIED = 0.3  # share of the features that a split is tried on
COMPONENTS, OUTCOMES, TARGETS = 60, 15, 16
NEAREST = 40  # known questions whose outcomes are read
COST_SCALE = 0.3  # weight of the cost beside the outcome, in standard deviations
PRIOR = 0.1  # weight of a column's mean beside the questions of a leaf
NO_SPREAD = 1e-4  # of the largest deviation: smaller ones are those of rounding
CHUNK = 128  # questions whose leaves are averaged together
Array = np.ndarray[Any, Any]
PATTERNS = (
    r"\w+",
    r"\d+",
    r"[A-Z]",
    r"\n",
    r"[.!?]",
    r",",
    r"\?",
    r"[=+*/^<>]",
    r"[$%]",
    r"[()\[\]{}]",
    r"\\",
)
WORDS = (
    "how many|how much",
    "each|every|per",
    "more|less|than|fewer",
    "if|then|when|unless",
    "not|no|never|except|none",
    "all|some|any",
    "is|are|was|were",
    "he|she|his|her|him",
    "why|because|therefore",
    "which|what|who",
    "half|twice|third|quarter|percent|ratio",
    "hour|day|week|year|minute|month|date",
)
_COUNTED = [re.compile(each) for each in (*PATTERNS, *(rf"\b(?i:{words})\b" for words in WORDS))]


def lexical_counts(texts: Sequence[str]) -> Tensor:
    """Logarithms of one more than what is counted in each text [Q, F]."""
    counts = [[len(text), *(len(each.findall(text)) for each in _COUNTED)] for text in texts]
    return torch.from_numpy(np.log1p(np.array(counts, dtype=np.float64))).float()


@dataclass(frozen=True)
class Features:
    """What a tree reads.

    Args:
        centre, basis: of the embeddings [D], [D, components].
        of_outcomes: basis of the neighbours' outcomes [M, components].
        usual: mean lexical counts, for questions without a text [F].
    """

    centre: Tensor
    basis: Tensor
    of_outcomes: Tensor
    usual: Tensor

    def __call__(self, embeddings: Tensor, lexical: Tensor | None, nearby: Tensor) -> Tensor:
        """[N, C]; nearby: mean outcomes of the nearest known questions [N, M]."""
        counts = self.usual.expand(len(embeddings), -1) if lexical is None else lexical
        return torch.cat(((embeddings - self.centre) @ self.basis, counts, nearby @ self.of_outcomes), 1)


@dataclass(frozen=True)
class ForestHead:
    """A fitted forest.

    Args:
        features: what the trees read.
        feature, threshold: of each node [T, N].
        children: nodes where the feature is at most the threshold, and above; a leaf has itself [T, N, 2].
        leaf_of: leaf of each known question [T, Q].
        correct, cost: outcomes of the known questions, NaN where unknown [Q, M].
    """

    features: Features
    feature: Tensor
    threshold: Tensor
    children: Tensor
    leaf_of: Tensor
    correct: Tensor
    cost: Tensor

    @classmethod
    def fit(cls, embeddings: Tensor, lexical: Tensor, correct: Tensor, cost: Tensor, seed: int) -> ForestHead:
        """Grow the trees.

        Args:
            embeddings: of the known questions [Q, D].
            lexical: `lexical_counts` of them [Q, F].
            correct, cost: their outcomes, NaN where unknown [Q, M].
            seed: of the trees.
        """
        from sklearn.ensemble import ExtraTreesRegressor

        neighbours = NeighboursHead(embeddings, correct)
        nearby = neighbours.mean(*_nearest_others(neighbours, embeddings))
        features = Features(
            embeddings.mean(0),
            _read_basis(embeddings, COMPONENTS),
            _read_basis(nearby, OUTCOMES),
            lexical.mean(0),
        )
        x = features(embeddings, lexical, nearby).numpy()
        model = ExtraTreesRegressor(TREES, min_samples_leaf=LEAF, max_features=TRIED, random_state=seed)
        model.fit(x, _targets(correct, cost).numpy())
        feature, threshold, children = (
            torch.from_numpy(np.stack(each)) for each in zip(*_nodes(model.estimators_), strict=True)
        )
        leaf_of = torch.from_numpy(model.apply(x).T.copy())
        return cls(features, feature, threshold, children, leaf_of, correct, cost)

    @cached_property
    def _means(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean correct and dollars of the known questions of each leaf, and the leaf's row there by node.

        [leaves of all trees, M] twice, and [T * N].
        """
        trees, nodes = self.feature.shape
        found, leaves = torch.unique(self.leaf_of + nodes * torch.arange(trees)[:, None], return_inverse=True)
        rows = torch.zeros(trees * nodes, dtype=torch.long)
        rows[found] = torch.arange(len(found))
        means = []
        for values in (self.correct, self.cost):
            known, sums = (~values.isnan()).to(values.dtype), torch.zeros(len(found), values.shape[1])
            counts = torch.zeros_like(sums)
            for of_tree in leaves:
                sums.index_add_(0, of_tree, values.nan_to_num(0.0))
                counts.index_add_(0, of_tree, known)
            means.append((sums + PRIOR * mean_known(values)) / (counts + PRIOR))
        return means[0], means[1], rows

    @cached_property
    def _outcomes(self) -> NeighboursHead:
        """Means of known outcomes; which questions are near is found by the caller."""
        return NeighboursHead(torch.zeros(len(self.correct), 1), self.correct)

    @cached_property
    def _depth(self) -> int:
        """Splits on the way to the deepest leaf."""
        children, depth = self.children.long(), 0
        own = torch.arange(children.shape[1])
        reached = torch.zeros(children.shape[:2], dtype=torch.bool)
        reached[:, 0] = True
        while bool((inner := reached & (children[..., 0] != own)).any()):
            tree, node = inner.nonzero(as_tuple=True)
            reached = torch.zeros_like(reached)
            for side in (0, 1):
                reached[tree, children[tree, node, side]] = True
            depth += 1
        return depth

    def __call__(
        self, embeddings: Tensor, lexical: Tensor | None, nearest: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Log-odds and dollars, each [N, M].

        Args:
            embeddings: [N, D].
            lexical: `lexical_counts` of the questions [N, F]; None for usual ones.
            nearest: cosines and indices of the nearest known questions, each [N, K].
        """
        nearby = self._outcomes.mean(nearest[0][:, :NEAREST], nearest[1][:, :NEAREST])
        x = self.features(embeddings, lexical, nearby)
        correct, cost, rows = self._means
        leaves = torch.split(rows[self._leaves(x)], CHUNK)
        found = [(correct[each].mean(1), cost[each].mean(1)) for each in leaves]
        return log_odds(torch.cat([each for each, _ in found])), torch.cat([each for _, each in found])

    def _leaves(self, x: Tensor) -> Tensor:
        """The leaf of each question in each tree, numbered through all trees [N, T]; x: features [N, C]."""
        trees, nodes = self.feature.shape
        first = nodes * torch.arange(trees)
        feature, threshold, children = (
            each.reshape(-1) for each in (self.feature, self.threshold, self.children)
        )
        at = first.expand(len(x), trees)
        for _ in range(self._depth):
            above = x.gather(1, feature[at].long()) > threshold[at]
            at = first + children[2 * at + above]
        return at


def _targets(correct: Tensor, cost: Tensor) -> Tensor:
    """What trees split on: components of all outcomes and costs together [Q, components]."""
    right, dollars = (torch.where(each.isnan(), mean_known(each), each) for each in (correct, cost))
    joint = torch.cat((right, COST_SCALE * dollars / dollars.std(0).clamp_min(1e-12)), 1)
    return (joint - joint.mean(0)) @ _basis(joint, TARGETS)


def _nodes(trees: Sequence[Any]) -> Iterator[tuple[Array, Array, Array]]:
    """Feature [N], threshold [N] and children [N, 2] of each tree, padded to equal length."""
    count = max(tree.tree_.node_count for tree in trees)
    for each in trees:
        tree = each.tree_
        inner = np.flatnonzero(tree.children_left >= 0)
        feature, threshold = np.zeros(count, dtype=np.int32), np.zeros(count, dtype=np.float32)
        children = np.tile(np.arange(count, dtype=np.int32)[:, None], 2)
        feature[inner], threshold[inner] = tree.feature[inner], _floor32(tree.threshold[inner])
        children[inner, 0], children[inner, 1] = tree.children_left[inner], tree.children_right[inner]
        yield feature, threshold, children


def _floor32(values: Array) -> Array:
    """The largest float32 at most as large: what float32 features are above, they are above in float64."""
    rounded = values.astype(np.float32)
    return np.asarray(np.where(rounded > values, np.nextafter(rounded, np.float32(-np.inf)), rounded))


def _nearest_others(head: NeighboursHead, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and indices of the nearest known questions but the question itself, each [Q, K]."""
    cosines, indices = head.nearest(embeddings, NEAREST + 1)
    own = indices == torch.arange(len(embeddings))[:, None]
    own[~own.any(1), -1] = True  # of equal texts another one may stand for itself
    kept = ~own
    size = indices.shape[1] - 1
    return cosines[kept].view(-1, size), indices[kept].view(-1, size)


def _basis(values: Tensor, size: int) -> Tensor:
    """The first principal directions [columns, at most size]."""
    centred = values - values.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    found: Tensor = vectors.flip(1)[:, : min(size, len(values) - 1, values.shape[1])].contiguous()
    return found


def _read_basis(values: Tensor, size: int) -> Tensor:
    """As `_basis`, of what trees read: without directions along which values differ by rounding alone.

    A tree that splits on that predicts otherwise on another machine, and of a question that is asked alone.
    """
    found = _basis(values, size)
    spread = ((values - values.mean(0)) @ found).square().mean(0).sqrt()
    kept = spread > NO_SPREAD * spread[:1]
    kept[:1] = True
    return found[:, kept].contiguous()
