"""Learning the prior from outcome tables and public figures: abilities, kinds, strategies and tokens.

Each data set of a table is a benchmark of its own, whose figures are the shares of right answers with `cot`;
data sets named alike with a slash (mmlu-pro/math) are parts of one. Public figures (prior_figures.json, each
with its source) tie benchmarks together that no table holds. Abilities and benchmarks are fitted in turn by
least squares on log-odds, with weak priors; the scale is that of MMLU-Pro (offset 0, slope 1).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from viaticum import strategies
from viaticum.routers.query.ability import AbilityScale, Benchmark, Normal, log_odds
from viaticum.types import Query

Array = np.ndarray[Any, Any]
Cells = Mapping[tuple[str, str, str], tuple[int, int]]  # (data set, model, strategy): right, asked
Figures = Mapping[str, Mapping[str, Sequence[float]]]  # shares by model and benchmark
ANCHOR = "mmlu-pro"  # the benchmark whose log-odds are the scale
USUAL = "cot"
STRATEGIES = {"baseline": "direct", "chain_of_thought": "cot", "concise": "cod", "composite": None}
MODELS = {"gpt-35-turbo": "gpt-3.5-turbo"}
BENCHMARKS = {
    "aqua-rat": "aqua",
    "arc-challenge-test": "arc-challenge",
    "hellaswag_val": "hellaswag",
    "medmcqa-dev": "medmcqa",
}
ROUNDS = 300
SLOPE_SD = 0.5  # of slopes around 1
SHAPE, EXPECTED_SD = 4.0, 0.35  # weight and value of what is expected of a benchmark's deviation
GAIN_SD = 0.5  # of a strategy's gain around 0
FIGURES = Path(__file__).with_name("prior_figures.json")


@dataclass(frozen=True)
class Answers:
    """Rows of one outcome table, as arrays [N]; tokens are NaN where they are unknown."""

    dataset: Array
    question: Array
    model: Array
    strategy: Array
    correct: Array
    tokens: Array
    prompt: Array

    def select(self, mask: Array) -> Answers:
        return Answers(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))

    @cached_property
    def cells(self) -> Cells:
        """Right answers and answers by data set, model and strategy."""
        columns = self.dataset, self.model, self.strategy
        values, codes = zip(*(np.unique(each, return_inverse=True) for each in columns), strict=True)
        shape = [len(each) for each in values]
        cell = np.ravel_multi_index(codes, shape)
        right = np.bincount(cell, self.correct)
        asked = np.bincount(cell)
        found = np.flatnonzero(asked)
        places = zip(*np.unravel_index(found, shape), strict=True)
        names = [tuple(str(each[n]) for each, n in zip(values, place, strict=True)) for place in places]
        return {name: (int(right[n]), int(asked[n])) for name, n in zip(names, found, strict=True)}


def without(cells: Cells, *, model: str | None = None, dataset: str | None = None) -> Cells:
    return {key: count for key, count in cells.items() if key[1] != model and key[0] != dataset}


def summed(cells: Cells, key: Callable[[str, str, str], Any]) -> dict[Any, tuple[int, int]]:
    """Counts added up by what `key` makes of data set, model and strategy; None leaves them out."""
    found: dict[Any, tuple[int, int]] = {}
    for names, (right, asked) in cells.items():
        if (name := key(*names)) is not None:
            before = found.get(name, (0, 0))
            found[name] = before[0] + right, before[1] + asked
    return found


def read(path: str | Path, texts: Mapping[str, str] | None = None) -> tuple[Answers, dict[str, str]]:
    """A table, and its questions by id. A table without texts is of the questions of `texts`."""
    table = pq.read_table(path)
    columns = {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}
    size = len(columns["model"])
    question = columns["question_id"].astype(str)
    if "dataset" in columns:
        question = np.array([f"{a}/{b}" for a, b in zip(columns["dataset"], question, strict=True)])
        dataset = columns["dataset"].astype(str)
    else:
        by_id = {name.rpartition("/")[2]: name for name in texts or {}}
        question = np.array([by_id.get(each, "") for each in question])
        dataset = np.array([name.rpartition("/")[0] for name in question])
    named = columns.get("strategy", np.full(size, USUAL)).astype(str)
    strategy = np.array([STRATEGIES.get(name, name) or "" for name in named])
    model = np.array([MODELS.get(name, name) for name in columns["model"].astype(str)])
    unknown = np.full(size, np.nan)
    answers = Answers(
        dataset,
        question,
        model,
        strategy,
        columns["correct"].astype(np.float64),
        *(columns.get(name, unknown).astype(np.float64) for name in ("output_tokens", "input_tokens")),
    )
    found = dict(zip(question.tolist(), columns["question"], strict=True)) if "question" in columns else {}
    return answers.select((strategy != "") & (question != "")), found


def read_all(paths: Sequence[str]) -> tuple[list[Answers], list[dict[str, str]]]:
    """The tables; one without texts takes the questions of the one before it."""
    tables, texts = list[Answers](), list[dict[str, str]]()
    for path in sorted(paths, key=lambda each: "question" not in pq.read_schema(each).names):
        known = {name: text for each in texts for name, text in each.items()}
        answers, found = read(path, known)
        tables.append(answers)
        texts.append(found)
    return tables, texts


def public_figures() -> Figures:
    """Figures by model and benchmark, as published."""
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for source in json.loads(FIGURES.read_text()):
        for model, shares in source["figures"].items():
            for name, share in shares.items():
                figures[model][name].append(share)
    return figures


def benchmark_of(dataset: str) -> str:
    """The benchmark that a data set is, or is a part of."""
    return BENCHMARKS.get(dataset, dataset.partition("/")[0])


# --- abilities and kinds ------------------------------------------------------------------------------------


def fit_scale(tables: Sequence[Cells], figures: Figures) -> AbilityScale:
    """Fit the whole scale. What must not be known (a model, a data set, questions) is left out before."""
    observed = [
        (model, name, log_odds(share))
        for model, by_name in figures.items()
        for name, shares in by_name.items()
        for share in shares
    ]
    for cells in tables:
        counts = summed(cells, lambda dataset, model, strategy: (model, benchmark_of(dataset), strategy))
        observed += [(m, name, _log_odds(count)) for (m, name, s), count in counts.items() if s == USUAL]
    abilities, benchmarks = _alternate(observed)
    values = np.array([abilities[model] for model in sorted({key[1] for cells in tables for key in cells})])
    kind, slope, rest = _kinds(tables, abilities)
    gains, pair_rest = _gains(tables)
    return AbilityScale(
        Normal(float(values.mean()), float(values.std(ddof=1))),
        benchmarks,
        kind,
        slope,
        gains,
        rest,
        pair_rest,
    )


def _log_odds(count: tuple[int, int]) -> float:
    return log_odds((count[0] + 0.5) / (count[1] + 1))


def _alternate(
    observed: Sequence[tuple[str, str, float]],
) -> tuple[dict[str, float], dict[str, Benchmark]]:
    """Abilities by model and benchmarks by name, each fitted with the other held, until they settle."""
    models = sorted({each[0] for each in observed})
    names = sorted({each[1] for each in observed})
    model = np.array([models.index(each[0]) for each in observed])
    kind = np.array([names.index(each[1]) for each in observed])
    value = np.array([each[2] for each in observed])
    ability = np.zeros(len(models))
    offset, slope, sd = np.zeros(len(names)), np.ones(len(names)), np.full(len(names), EXPECTED_SD)
    for _ in range(ROUNDS):
        spread = max(float(ability.std()), 0.5)
        weight = slope[kind] / sd[kind] ** 2
        total = np.bincount(model, weight * (value - offset[kind]), len(models)) + ability.mean() / spread**2
        ability = total / (np.bincount(model, weight * slope[kind], len(models)) + spread**-2)
        for n, name in enumerate(names):
            own = kind == n
            if name != ANCHOR:
                offset[n], slope[n] = _line(ability[model[own]], value[own], sd[n])
            rest = value[own] - offset[n] - slope[n] * ability[model[own]]
            sd[n] = np.sqrt((rest @ rest + SHAPE * EXPECTED_SD**2) / (own.sum() + SHAPE - 1))
    return (
        dict(zip(models, ability.tolist(), strict=True)),
        {name: Benchmark(float(offset[n]), float(slope[n]), float(sd[n])) for n, name in enumerate(names)},
    )


def _line(ability: Array, value: Array, sd: float) -> tuple[float, float]:
    """Offset and slope, the slope near 1 where little is known."""
    design = np.stack((np.ones_like(ability), ability), 1)
    expected = np.diag((1e-3, SLOPE_SD**-2))
    left = design.T @ design / sd**2 + expected
    offset, slope = np.linalg.solve(left, design.T @ value / sd**2 + expected @ np.array((0.0, 1.0)))
    return float(offset), float(slope)


def _kinds(tables: Iterable[Cells], abilities: Mapping[str, float]) -> tuple[Normal, float, float]:
    """Offset, slope and rest of a kind of questions: benchmarks count alike, their parts within them too."""
    rows: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for number, cells in enumerate(tables):
        for (dataset, model, strategy), count in cells.items():
            if strategy == USUAL:
                rows[number, dataset].append((abilities[model], _log_odds(count)))
    parts = Counter((number, benchmark_of(dataset)) for number, dataset in rows)
    weights = np.array([1 / parts[number, benchmark_of(dataset)] for number, dataset in rows])
    found = []
    for values in rows.values():
        ability, value = np.array(values).T
        offset, slope = _line(ability, value, EXPECTED_SD)
        rest = value - offset - slope * ability
        found.append((offset, slope, rest @ rest / max(1, len(rest) - 2)))
    offsets, slopes, rests = np.array(found).T
    mean, slope, rest = (float(np.average(each, weights=weights)) for each in (offsets, slopes, rests))
    count = weights.sum()
    variance = float(weights @ (offsets - mean) ** 2 / (count - 1))
    return Normal(mean, (variance * (1 + 1 / count)) ** 0.5), slope, rest**0.5


def _gains(tables: Iterable[Cells]) -> tuple[dict[str, Normal], float]:
    """Gains of the strategies over the usual one: data sets count alike, models within them too."""
    differences: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cells in tables:
        for (dataset, model, strategy), count in cells.items():
            usual = cells.get((dataset, model, USUAL))
            if usual is not None and strategy != USUAL:
                differences[strategy][dataset].append(_log_odds(count) - _log_odds(usual))
    gains, rests = {USUAL: Normal(0.0, 0.0)}, []
    for strategy, by_dataset in sorted(differences.items()):
        means = np.array([np.mean(each) for each in by_dataset.values()])
        between = float(means.var(ddof=1)) if len(means) > 1 else GAIN_SD**2
        mean = means.mean() / (1 + between / len(means) / GAIN_SD**2)
        gains[strategy] = Normal(float(mean), float(np.sqrt(between * (1 + 1 / len(means)))))
        rests += [np.var(each, ddof=1) for each in by_dataset.values() if len(each) > 1]
    return gains, float(np.sqrt(np.mean(rests))) if rests else GAIN_SD


# --- tokens -------------------------------------------------------------------------------------------------


TokensOf = Mapping[tuple[str, str, str], Array]  # (data set, model, strategy): output tokens


def tokens_of(table: Answers) -> TokensOf:
    """Output tokens by data set, model and strategy, where they are known."""
    known = table.select(~np.isnan(table.tokens))
    order = np.lexsort((known.strategy, known.model, known.dataset))
    sorted_ = known.select(order)
    columns = sorted_.dataset, sorted_.model, sorted_.strategy
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = np.any([each[1:] != each[:-1] for each in columns], 0)
    first = np.flatnonzero(starts).tolist()
    return {
        tuple(str(each[start]) for each in columns): sorted_.tokens[start:end]
        for start, end in zip(first, [*first[1:], len(order)], strict=False)
    }


def fit_tokens(tables: Iterable[TokensOf]) -> dict[str, dict[str, float]]:
    """Median, 90% quantile and mean of the output tokens of each strategy; (data set, model) count alike."""
    values: dict[str, list[Array]] = defaultdict(list)
    for table in tables:
        for (_, _, strategy), tokens in table.items():
            values[strategy].append(tokens)
    found = {}
    for strategy, groups in sorted(values.items()):
        tokens = np.concatenate(groups)
        weights = np.concatenate([np.full(len(each), 1 / len(each)) for each in groups])
        order = np.argsort(tokens)
        share = np.cumsum(weights[order]) / weights.sum()
        p50, p90 = (float(tokens[order][np.searchsorted(share, level)]) for level in (0.5, 0.9))
        found[strategy] = {"p50": p50, "p90": p90, "mean": float(np.average(tokens, weights=weights))}
    return found


def prompt_characters(names: Iterable[str]) -> dict[str, int]:
    """Characters that the prompts of our strategies add to a question."""
    query = Query("x")
    return {
        name: sum(len(message["content"]) for message in strategies.get(name).messages(query)) - 1
        for name in names
        if strategies.is_known(name)
    }


def characters_a_token(tables: Sequence[Answers], texts: Sequence[Mapping[str, str]]) -> float:
    """Characters a token of questions; where a table counts the rest of the prompts too, there are fewer."""
    ratios = []
    for table, known in zip(tables, texts, strict=True):
        counted = table.select(~np.isnan(table.prompt) & (table.prompt > 0))
        named, first = np.unique(counted.question, return_index=True)
        lengths = np.array([len(known[name]) for name in named.tolist()])
        if len(named):
            ratios.append(lengths.sum() / counted.prompt[first].sum())
    return float(max(ratios)) if ratios else 4.0
