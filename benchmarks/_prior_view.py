"""What the wording of a question says of how easy it is: learned on one table, checked on others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from _prior_fit import Answers, Array
from scipy.stats import spearmanr

from viaticum.routers.query.outcome_matrix import assign_folds, held_out, near_duplicates

PENALTY = 10.0  # of the ridge regression
CENTRES = 64
FOLDS = 5
SHARE = 0.35  # of the questions is held out
NEAR = 0.1  # quantile of the nearness of unseen questions of the kind
Embed = Callable[[Sequence[str]], Array]


def mean_ease(table: Answers) -> tuple[list[str], Array]:
    """Questions, and how much more often each is answered rightly than the models' mean shares say [Q]."""
    named, inverse = np.unique(table.question, return_inverse=True)
    _, of_model = np.unique(table.model, return_inverse=True)
    shares = np.bincount(of_model, table.correct) / np.bincount(of_model)
    rest = table.correct - shares[of_model]
    return named.tolist(), np.bincount(inverse, rest) / np.bincount(inverse)


def ridge(embeddings: Array, target: Array) -> tuple[Array, float]:
    """Weights [D] and constant of a ridge regression."""
    mean, centre = target.mean(), embeddings.mean(0)
    centred = embeddings - centre
    left = centred.T @ centred + PENALTY * np.eye(centred.shape[1])
    weights = np.linalg.solve(left, centred.T @ (target - mean))
    return weights, float(mean - centre @ weights)


def centres(embeddings: Array) -> Array:
    """Centres of clusters of the questions, of length 1 [CENTRES, D]."""
    from sklearn.cluster import KMeans

    found = KMeans(CENTRES, n_init=1, random_state=0).fit(embeddings).cluster_centers_
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def logistic_slope(base: Array, ease: Array, correct: Array) -> float:
    """The slope c that fits P(correct) = logistic(base + c * ease) best, by Newton's method."""
    slope = 0.0
    for _ in range(30):
        share = 1 / (1 + np.exp(-(base + slope * ease)))
        slope += float((ease @ (correct - share)) / (ease**2 @ (share * (1 - share)) + 1e-9))
    return slope


def model_log_odds(table: Answers) -> Array:
    """Log-odds of the mean share of each row's model [N]."""
    _, of_model = np.unique(table.model, return_inverse=True)
    shares = np.bincount(of_model, table.correct) / np.bincount(of_model)
    return np.asarray(np.log(shares / (1 - shares))[of_model])


def measured_slope(table: Answers, named: Sequence[str], unseen: Array) -> float:
    """What an expected ease is worth in log-odds; `unseen` [Q] was expected out of fold."""
    row = {name: number for number, name in enumerate(named)}
    of_row = unseen[[row[name] for name in table.question.tolist()]]
    return logistic_slope(model_log_odds(table), of_row, table.correct)


def out_of_fold(embeddings: Array, ease: Array, folds: Array) -> Array:
    """The ease of each question as expected without its fold [Q]."""
    unseen = np.zeros(len(ease))
    for fold in range(FOLDS):
        weights, constant = ridge(embeddings[folds != fold], ease[folds != fold])
        unseen[folds == fold] = embeddings[folds == fold] @ weights + constant
    return unseen


def fit_view(table: Answers, texts: Mapping[str, str], embed: Embed) -> dict[str, Array]:
    """The arrays of prior_questions.npz; slope and nearness are measured on questions out of fold."""
    named, ease = mean_ease(table)
    embeddings = embed([texts[name] for name in named]).astype(np.float64)
    folds = assign_folds(near_duplicates([texts[name] for name in named]), FOLDS, 0)
    nearness = np.zeros(len(named))
    for fold in range(FOLDS):
        nearness[folds == fold] = (embeddings[folds == fold] @ centres(embeddings[folds != fold]).T).max(1)
    weights, constant = ridge(embeddings, ease)
    return {
        "weights": weights.astype(np.float32),
        "constant": np.float32(constant),
        "slope": np.float32(measured_slope(table, named, out_of_fold(embeddings, ease, folds))),
        "near": np.float32(np.quantile(nearness, NEAR)),
        "centres": np.round(centres(embeddings) * 127).astype(np.int8),
    }


def view_figures(
    table: Answers,
    texts: Mapping[str, str],
    others: Mapping[str, tuple[Answers, Mapping[str, str]]],
    embed: Embed,
) -> dict[str, Any]:
    """AUC and log loss on held-out questions of models left out; ranks of ease on other data sets."""
    from sklearn.metrics import log_loss, roc_auc_score

    everything = sorted({*table.question.tolist()})
    groups = near_duplicates([texts[name] for name in everything])
    test = held_out(groups, SHARE, 0)
    of_test = np.isin(table.question, np.array(everything)[test])
    group = dict(zip(everything, groups.tolist(), strict=True))
    rows = []
    for model in np.unique(table.model).tolist():
        train = table.select(~of_test & (table.model != model))
        named, ease = mean_ease(train)
        embeddings = embed([texts[name] for name in named]).astype(np.float64)
        folds = assign_folds(np.array([group[name] for name in named]), FOLDS, 0)
        slope = measured_slope(train, named, out_of_fold(embeddings, ease, folds))
        weights, constant = ridge(embeddings, ease)
        own = table.select(of_test & (table.model == model))
        known = table.select(~of_test & (table.model == model)).correct.mean()
        shift = slope * (embed([texts[name] for name in own.question.tolist()]) @ weights + constant)
        share = 1 / (1 + np.exp(-(np.log(known / (1 - known)) + shift)))
        plain = log_loss(own.correct, np.full(len(share), known))
        rows.append((roc_auc_score(own.correct, share), log_loss(own.correct, share), plain))
    named, ease = mean_ease(table)
    weights, _ = ridge(embed([texts[name] for name in named]).astype(np.float64), ease)
    ranks = {}
    for dataset, (answers, known_texts) in others.items():
        questions, measured = mean_ease(answers)
        expected = embed([known_texts[each] for each in questions]) @ weights
        ranks[dataset] = float(spearmanr(expected, measured).statistic)
    auc, viewed, plain = np.mean(rows, 0)
    return {"auc": auc, "log_loss": viewed, "log_loss_plain": plain, "ranks": ranks}
