"""How well predicted quantiles of output tokens hold, on outcome tables where outputs are long or cut.

30% of the questions are held out for each of --seeds seeds, near-duplicates together; everything is fitted on
the rest. Synthetic tables (`_token_tables`) have the true lengths: coverage is of what nothing would have
cut. Real tables (OUTCOMES ...) have what was written; --cut SHARE cuts that share of the outputs of each pair
at one length before fitting, and the test lengths stay whole.

    p50, p90   share of the held-out outputs that are no longer than predicted, in percent
    worst      the largest distance of such a share from 50 or 90, over groups of 30 outputs or more: each
               pair by thirds of its questions, from short to long predictions
    pinball    mean quantile loss (Koenker and Bassett 1978) of both quantiles, as a share of the loss of the
               quantiles of each pair's training outputs; of what is written under the limit at serving, to
               which predictions are capped. Columns: the limit of the table, a quarter of it, four times it

Beside the learned router: quantiles of each pair (`StaticRouter`, which counts cut outputs as longer), the
same counting cut outputs as whole (naive), a ridge regression of log tokens with normal residuals, and
scikit-learn's HistGradientBoostingRegressor(loss="quantile") on 32 principal components with conformal
offsets (Romano et al. 2019). ms: one question, all pairs.

    viaticum models pull all-minilm-l6-v2
    python benchmarks/token_quantiles.py [OUTCOMES ...] [--seeds 3] [--questions 1000] [--cut 0.33] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _token_tables import KINDS, WordEncoder, synthetic_table
from rich.console import Console
from rich.table import Table

from viaticum.outcomes import read_outcomes
from viaticum.quantiles import NORMAL_P90, censored_quantile
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.fit import fit
from viaticum.routers.query.outcome_matrix import Array, OutcomeMatrix, held_out, near_duplicates
from viaticum.routers.query.parameters import RTRSettings

SHARE = 0.3  # of the questions is held out
LEVELS = (0.5, 0.9)
SMALLEST_GROUP = 30
COMPONENTS = 32
Predict = Callable[[OutcomeMatrix], Array]  # test questions -> quantiles of tokens [N, P, 2]


@dataclass(frozen=True)
class Case:
    """A table: what is learned from, and the lengths [Q, P] by which predictions are judged.

    limits: at which outputs of each pair were cut [P]; NaN where none was.
    """

    name: str
    matrix: OutcomeMatrix
    lengths: Array
    limits: Array


@dataclass(frozen=True)
class Fitted:
    predict: Predict
    seconds: float


def synthetic(kind: str, questions: int, seed: int) -> Case:
    table = synthetic_table(kind, questions, seed)
    matrix = OutcomeMatrix.from_outcomes(table.outcomes)
    order = [int(number) for _, number in matrix.ids]
    columns = [list(dict.fromkeys(row.pair for row in table.outcomes)).index(pair) for pair in matrix.pairs]
    lengths = table.lengths[np.ix_(order, columns)]
    return Case(kind, matrix, lengths, np.full(len(matrix.pairs), float(table.limit)))


def real(path: Path, questions: int, cut: float) -> Case:
    """A table of outcomes, or a random part of it; cut at the 1 - `cut` quantile of each pair."""
    outcomes = [replace(row, cost_nanousd=row.cost_nanousd or 0) for row in read_outcomes(path)]
    matrix = OutcomeMatrix.from_outcomes([row for row in outcomes if row.output_tokens])
    matrix = matrix.select(np.random.default_rng(0).permutation(len(matrix))[:questions])
    lengths = matrix.tokens.copy()
    limits = np.full(len(matrix.pairs), np.nan)
    if cut:
        limits = np.nanquantile(lengths, 1 - cut, axis=0).round()
        matrix = replace(
            matrix,
            tokens=np.minimum(lengths, limits),
            truncated=matrix.truncated | (lengths > limits),
        )
    return Case(path.stem + (f", {cut:.0%} cut" if cut else ""), matrix, lengths, limits)


# --- predictors ---------------------------------------------------------------------------------------------


def ours(train: OutcomeMatrix, embed: Callable[[Sequence[str]], Any]) -> Predict:
    # The plans do not change what is predicted of tokens.
    router = fit(train, embed, settings=RTRSettings(plans=False))  # type: ignore[arg-type]
    return lambda test: router.predict_texts(test.texts).tokens.numpy()


def static(train: OutcomeMatrix, embed: object, *, naive: bool = False) -> Predict:
    logs = np.log(np.maximum(train.tokens, 1))
    rows = []
    for column in range(len(train.pairs)):
        known = ~np.isnan(logs[:, column])
        cut = train.truncated[known, column] & (not naive)
        rows.append([np.exp(censored_quantile(logs[known, column], cut, level)) for level in LEVELS])
    return lambda test: np.broadcast_to(np.array(rows), (len(test), len(rows), 2))


def naive(train: OutcomeMatrix, embed: object) -> Predict:
    return static(train, embed, naive=True)


def log_normal(train: OutcomeMatrix, embed: Callable[[Sequence[str]], Any]) -> Predict:
    from sklearn.linear_model import RidgeCV

    x, logs = np.asarray(embed(train.texts)), np.log(np.maximum(train.tokens, 1))
    models = []
    for column in range(len(train.pairs)):
        known = ~np.isnan(logs[:, column])
        model = RidgeCV(np.geomspace(0.01, 100, 9)).fit(x[known], logs[known, column])
        models.append((model, float(np.std(logs[known, column] - model.predict(x[known])))))

    def predict(test: OutcomeMatrix) -> Array:
        middle = np.stack([model.predict(np.asarray(embed(test.texts))) for model, _ in models], 1)
        wide = NORMAL_P90 * np.array([spread for _, spread in models])
        return np.exp(np.stack((middle, middle + wide), -1))

    return predict


def boosted(train: OutcomeMatrix, embed: Callable[[Sequence[str]], Any]) -> Predict:
    from sklearn.decomposition import PCA
    from sklearn.ensemble import HistGradientBoostingRegressor

    components = PCA(min(COMPONENTS, len(train) - 1), random_state=0).fit(np.asarray(embed(train.texts)))
    features = lambda texts: np.column_stack(  # noqa: E731
        (components.transform(np.asarray(embed(texts))), [np.log(len(text) + 1) for text in texts])
    )
    x, logs = features(train.texts), np.log(np.maximum(train.tokens, 1))
    fold = np.random.default_rng(0).random(len(train)) < 0.3  # conformal offsets from these
    models = []
    for column in range(len(train.pairs)):
        known, lines = ~np.isnan(logs[:, column]), []
        for level in LEVELS:
            model = HistGradientBoostingRegressor(
                loss="quantile",
                quantile=level,
                max_iter=60,
                max_leaf_nodes=8,
                learning_rate=0.08,
                random_state=0,
            ).fit(x[known & ~fold], logs[known & ~fold, column])
            rest = known & fold
            residual = logs[rest, column] - model.predict(x[rest])
            lines.append((model, censored_quantile(residual, train.truncated[rest, column], level)))
        models.append(lines)

    def predict(test: OutcomeMatrix) -> Array:
        x = features(test.texts)
        logs = [[model.predict(x) + offset for model, offset in lines] for lines in models]
        return np.exp(np.maximum.accumulate(np.array(logs), 1)).transpose(2, 0, 1)

    return predict


PREDICTORS = {
    "viaticum": ours,
    "static": static,
    "naive": naive,
    "log-normal": log_normal,
    "boosted": boosted,
}


# --- figures ------------------------------------------------------------------------------------------------


def coverage(lengths: Array, quantiles: Array) -> dict[str, float]:
    """Shares of lengths [N, P] within their quantiles [N, P, 2], and the worst group's miss."""
    figures, worst = {}, 0.0
    known = ~np.isnan(lengths)
    for n, level in enumerate(LEVELS):
        within = lengths <= quantiles[..., n] + 0.5
        figures[f"p{level * 100:.0f}"] = float(within[known].mean())
        for group in _groups(quantiles, known):
            worst = max(worst, abs(float(within[group].mean()) - level))
    return figures | {"worst": worst}


def _groups(quantiles: Array, known: Array) -> Iterator[Array]:
    for column in range(known.shape[1]):
        rank = quantiles[:, column, 0].argsort(kind="stable").argsort(kind="stable") * 3 // len(quantiles)
        for third in range(3):
            group = np.zeros_like(known)
            group[:, column] = known[:, column] & (rank == third)
            if group.sum() >= SMALLEST_GROUP:
                yield group


def pinball(lengths: Array, quantiles: Array, limits: Array) -> float:
    """Mean quantile loss of what is written under limits [P], in shares of each pair's mean length."""
    cap = np.where(np.isnan(limits), np.inf, limits)
    written, total = np.minimum(lengths, cap), 0.0
    scale = np.nanmean(written, 0)
    for n, level in enumerate(LEVELS):
        residual = (written - np.minimum(quantiles[..., n], cap[None])) / scale
        total += float(np.nanmean(np.maximum(level * residual, (level - 1) * residual)))
    return total


def measure(
    case: Case, embed: Callable[[Sequence[str]], Any], seed: int, names: Sequence[str]
) -> dict[str, Any]:
    """Figures of each predictor on one split; pinball in shares of the naive quantiles' loss."""
    test = held_out(near_duplicates([text[:2000] for text in case.matrix.texts]), SHARE, seed)
    train, asked, lengths = case.matrix.select(~test), case.matrix.select(test), case.lengths[test]
    limits = {"x1": case.limits, "x1/4": case.limits / 4, "x4": case.limits * 4}
    if np.isnan(case.limits).all():
        limits = {"x1": case.limits}
    results: dict[str, Any] = {}
    base = naive(train, embed)(asked)
    for name in names:
        began = time.perf_counter()
        predict = PREDICTORS[name](train, embed)
        seconds, quantiles = time.perf_counter() - began, predict(asked)
        predict(asked.select(np.arange(1)))
        began = time.perf_counter()
        for row in range(20):
            predict(asked.select(np.array([row])))
        milliseconds = (time.perf_counter() - began) * 1000 / 20
        results[name] = coverage(lengths, quantiles) | {
            f"pinball {which}": pinball(lengths, quantiles, limit) / pinball(lengths, base, limit)
            for which, limit in limits.items()
        }
        results[name] |= {"fit s": seconds, "ms": milliseconds}
    return results | {"cut": float(case.matrix.truncated.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("outcomes", nargs="*", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--cut", type=float, default=0.0)
    parser.add_argument("--predictors", default=",".join(PREDICTORS))
    parser.add_argument("--cache", default="", help="the encoder's cache")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names, everything = options.predictors.split(","), {}
    for name, runs in _runs(options, names):
        everything[name] = {
            each: {key: float(np.mean([run[each][key] for run in runs])) for key in runs[0][each]}
            for each in names
        }
        if not options.json:
            _show(name, everything[name], float(np.mean([run["cut"] for run in runs])), len(runs))
    if options.json:
        print(json.dumps(everything, indent=1))


def _runs(options: argparse.Namespace, names: Sequence[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    if not options.outcomes:
        for kind in KINDS:
            cases = [synthetic(kind, options.questions, seed) for seed in range(options.seeds)]
            embed = _Cached(WordEncoder())
            yield kind, [measure(case, embed, seed, names) for seed, case in enumerate(cases)]
    for path in options.outcomes:
        embed = _Cached(Encoder(cache=options.cache))
        case = real(path, options.questions, options.cut)
        yield case.name, [measure(case, embed, seed, names) for seed in range(options.seeds)]


class _Cached:
    """An encoder that keeps what it encoded, so that the time of one prediction is without it."""

    def __init__(self, encoder: Any) -> None:
        self._encoder, self.name, self._known = encoder, encoder.name, {}

    def __call__(self, texts: Sequence[str], progress: object = None) -> torch.Tensor:
        if missing := [text for text in dict.fromkeys(texts) if text not in self._known]:
            self._known |= dict(zip(missing, self._encoder(missing), strict=True))
        return torch.stack([self._known[text] for text in texts])


def _show(name: str, figures: dict[str, dict[str, float]], cut: float, seeds: int) -> None:
    keys = list(next(iter(figures.values())))
    table = Table("predictor", *keys, title=f"{name}: {cut:.0%} of the outputs cut; {seeds} seeds", box=None)
    for each, line in figures.items():
        table.add_row(each, *(_cell(key, value) for key, value in line.items()))
    Console(width=110, highlight=False).print(table, "")


def _cell(name: str, value: float) -> str:
    if name in ("ms", "fit s"):
        return f"{value:.1f}"
    return f"{value:.3f}" if name.startswith("pinball") else f"{100 * value:.1f}"


if __name__ == "__main__":
    main()
