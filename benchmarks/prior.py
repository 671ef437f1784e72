"""The prior for models without outcomes: how well it places a model that was left out, and what it chooses.

A table of one kind of questions (mmlu_pro): questions are split, near-duplicates on one side. Each model in
turn is left out of everything that the prior learns from (tables and public figures); its figure is its share
of right answers on the *training* questions, it is scored on the held-out ones. It is placed by the figure,
by the mean of the other models, by 20, 50 and 100 outcomes alone (training questions, drawn --draws times),
and by the mean or the figure with those outcomes. Then all models are new at once: each weight of a dollar
picks a model by such shares and the prior's costs; the score is accuracy less weight * cost / (mean cost of
the dearest model), averaged over `WEIGHTS`; its loss is taken against the best choice knowing all held-out
outcomes.

A table of several kinds and strategies (faithful_cot, concise): every pair of a left-out model is placed by
the model's figure on another data set, the model and the data set that is asked about left out of the fit:
rank correlation over pairs, intervals, and the loss of the choice.

Public figures: models of mmlu_pro that the cards name, placed by their figures other than MMLU-Pro alone.
--view: what the wording of single questions says, on held-out questions of models left out and on other data
sets. --fit OUT writes the weights that ship (OUT is routers/query/prior.json; prior_questions.npz comes
beside it), from all tables, and measures nothing. Both need the encoder.

    viaticum models pull all-minilm-l6-v2
    python benchmarks/prior.py TABLE... [--prices PRICES.json ...] [--seeds 3] [--fit OUT] [--view]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _prior_fit import (
    ANCHOR,
    USUAL,
    Answers,
    Array,
    Figures,
    benchmark_of,
    characters_a_token,
    fit_scale,
    fit_tokens,
    prompt_characters,
    public_figures,
    read_all,
    summed,
    tokens_of,
    without,
)
from _prior_view import Embed, fit_view, view_figures
from scipy.stats import spearmanr

from viaticum.files import atomic_file, atomic_write
from viaticum.routers.query.ability import AbilityScale, estimate
from viaticum.routers.query.outcome_matrix import held_out, near_duplicates, read_prices
from viaticum.routers.query.prior import Lengths, PriorWeights
from viaticum.types import Pair

SHARE = 0.35  # of the questions is held out
COUNTS = (20, 50, 100)
MEAN = "mean of the models"
WEIGHTS = (0.03, 0.1, 0.3, 1.0)
ABOUT = (
    "Averages learned by `python benchmarks/prior.py --fit`: abilities of models, kinds of questions,"
    " strategies and tokens. No question and no answer is in this file. Licence: Apache-2.0, as the project."
    " Learned from outcome tables derived from Faithful-CoT (MIT), MMLU-Pro's published predictions"
    " (Apache-2.0), jhu-concise-cot (BSD-2-Clause) and this project's own, and from the published figures"
    " that benchmarks/prior_figures.json lists with their sources."
)
Prices = Mapping[str, tuple[float, float]]


def fit_weights(
    tables: Sequence[Answers],
    texts: Sequence[Mapping[str, str]],
    figures: Figures,
) -> PriorWeights:
    scale = fit_scale([each.cells for each in tables], figures)
    ratio = characters_a_token(tables, texts)
    tokens = fit_tokens(map(tokens_of, tables))
    prompts = prompt_characters(tokens)
    lengths = {
        name: Lengths(each["p50"], each["p90"], each["mean"], round(prompts.get(name, 0) / ratio))
        for name, each in tokens.items()
    }
    return PriorWeights(scale, lengths, ratio)


# --- a model left out ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """A table of one kind of questions, split; `others` are further tables of other questions."""

    train: Answers
    test: Answers
    others: Sequence[Answers]
    seed: int

    def scale_without(self, model: str) -> AbilityScale:
        cells = [without(each.cells, model=model) for each in (self.train, *self.others)]
        return fit_scale(cells, without_figures(model))


def without_figures(model: str) -> Figures:
    return {name: each for name, each in public_figures().items() if name != model}


def shares(answers: Answers) -> dict[str, float]:
    counts = summed(answers.cells, lambda dataset, model, strategy: model)
    return {model: right / asked for model, (right, asked) in counts.items()}


def placed(scale: AbilityScale, figures: Mapping[str, float], outcomes: Array | None = None) -> float:
    """Expected share of right answers of a model to questions of the anchor's kind."""
    pair = Pair("new", USUAL)
    counts = None if outcomes is None else {pair: (int(outcomes.sum()), len(outcomes))}
    kind = scale.benchmarks[ANCHOR]
    return float(estimate(scale, {"new": scale.ability(figures)}, [pair], counts, kind).accuracy[0])


def leave_one_out(split: Split, draws: int) -> dict[str, dict[str, list[float]]]:
    """Expected shares by way and model, a value a draw; `truth` is the share on held-out questions."""
    rng = np.random.default_rng(split.seed)
    figures, truth = shares(split.train), shares(split.test)
    found: dict[str, dict[str, list[float]]] = {"truth": {model: [share] for model, share in truth.items()}}

    def add(way: str, model: str, share: float) -> None:
        found.setdefault(way, {}).setdefault(model, []).append(share)

    for model in truth:
        scale = split.scale_without(model)
        own = split.train.correct[split.train.model == model]
        add("figure as it is, no prior", model, figures[model])
        add("figure", model, placed(scale, {ANCHOR: figures[model]}))
        add(MEAN, model, float(np.mean([each for m, each in figures.items() if m != model])))
        for count in COUNTS:
            for _ in range(draws):
                outcomes = rng.choice(own, count, replace=False)
                add(f"{count} outcomes", model, float(outcomes.mean()))
                add(f"mean and {count} outcomes", model, placed(scale, {}, outcomes))
                add(f"figure and {count} outcomes", model, placed(scale, {ANCHOR: figures[model]}, outcomes))
    return found


def placement_figures(found: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """Rank correlation with the truth, and mean absolute error in points, of every way."""
    truth = {model: values[0] for model, values in found["truth"].items()}
    table = {}
    for way, by_model in found.items():
        values = np.array([by_model[model] for model in truth])
        real = np.array(list(truth.values()))
        columns = [] if way == MEAN else values.T  # a mean without the model itself has the order upside down
        ranks = [spearmanr(column, real).statistic for column in columns]
        table[way] = {
            "rank": float(np.mean(ranks)) if ranks else float("nan"),
            "error": 100 * float(np.abs(values - real[:, None]).mean()),
        }
    return table


# --- all models new at once ---------------------------------------------------------------------------------


def losses(expected: Array, expected_cost: Array, correct: Array, cost: Array) -> tuple[float, float, float]:
    """Mean loss of score in points, accuracy and dollars of the choices by expectation, over `WEIGHTS`.

    expected, expected_cost, correct, cost: shares and dollars by column [C], the last two as they are.
    """
    dearest = cost.max()
    loss, accuracy, dollars = [], [], []
    for weight in WEIGHTS:
        score = correct - weight * cost / dearest
        chosen = int((expected - weight * expected_cost / expected_cost.max()).argmax())
        loss.append(score.max() - score[chosen])
        accuracy.append(correct[chosen])
        dollars.append(cost[chosen])
    return 100 * float(np.mean(loss)), 100 * float(np.mean(accuracy)), float(np.mean(dollars))


def mean_costs(answers: Answers, prices: Prices) -> dict[str, float]:
    """Dollars a question by model, prompts counted where the table counts them."""
    costs = {}
    for model in np.unique(answers.model).tolist():
        own = answers.select(answers.model == model)
        if model in prices and not np.isnan(own.tokens).all():
            prompt, output = prices[model]
            costs[model] = float(np.nanmean(np.nan_to_num(own.prompt) * prompt + own.tokens * output)) / 1e6
    return costs


def choices(
    split: Split, found: Mapping[str, Mapping[str, Sequence[float]]], prices: Prices
) -> dict[str, tuple[float, float, float]]:
    """Losses of the choice of one model for all questions, by way; lengths are those of other tables."""
    costs = mean_costs(split.test, prices)
    models = sorted(costs)
    real = np.array([found["truth"][model][0] for model in models])
    cost = np.array([costs[model] for model in models])
    usual = fit_tokens(map(tokens_of, split.others))[USUAL]["mean"]
    prompt = float(np.nanmean(split.train.prompt))
    expected_cost = np.array([prices[m][0] * prompt + prices[m][1] * usual for m in models]) / 1e6
    table = {}
    for way, by_model in found.items():
        if way == MEAN:  # of all: there is no other
            by_model = {model: [0.5] for model in models}
        draws = np.array([by_model[model] for model in models])
        each = [losses(draws[:, n], expected_cost, real, cost) for n in range(draws.shape[1])]
        table[way] = tuple(np.mean(each, 0).tolist())
    return table


# --- other kinds of questions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crossed:
    """Pairs of one data set placed from figures of another: expected shares, intervals and the truth [P]."""

    dataset: str
    pairs: tuple[Pair, ...]
    expected: Array
    low: Array
    high: Array
    truth: Array
    cost: Array
    expected_cost: Array


def cross(tables: Sequence[Answers], number: int, prices: Prices) -> list[Crossed]:
    """Every data set of a table, its models placed by their figure on the largest other data set."""
    own = tables[number].cells
    sizes = {d: asked for d, (_, asked) in summed(own, lambda dataset, model, strategy: dataset).items()}
    tokens = [tokens_of(each) for each in tables]
    found = []
    for dataset in sizes:
        figure_of = max((name for name in sizes if name != dataset), key=lambda name: sizes[name])
        rows = []
        for model in sorted({key[1] for key in own}):
            scale = fit_scale(
                [without(each.cells, model=model, dataset=dataset) for each in tables], without_figures(model)
            )
            kept = [{k: v for k, v in each.items() if k[1] != model and k[0] != dataset} for each in tokens]
            lengths = fit_tokens(kept)
            right, asked = own[figure_of, model, USUAL]
            ability = scale.ability({benchmark_of(figure_of): right / asked})
            pairs = [Pair(model, strategy) for d, m, strategy in own if (d, m) == (dataset, model)]
            result = estimate(scale, {model: ability}, pairs)
            for index, pair in enumerate(pairs):
                right, asked = own[dataset, model, pair.strategy]
                price = prices[model][1] / 1e6
                cost = price * float(tokens[number][dataset, model, pair.strategy].mean())
                usual_cost = price * lengths.get(pair.strategy, lengths[USUAL])["mean"]
                ends = [float(end[index]) for end in result.interval]
                rows.append((pair, float(result.accuracy[index]), *ends, right / asked, cost, usual_cost))
        pairs_, *columns = zip(*rows, strict=True)
        found.append(Crossed(dataset, tuple(pairs_), *map(np.array, columns)))
    return found


def crossed_figures(found: Sequence[Crossed]) -> list[dict[str, Any]]:
    table = []
    for each in found:
        alike = np.full(len(each.truth), 0.5)
        covered = (each.low <= each.truth) & (each.truth <= each.high)
        table.append(
            {
                "dataset": each.dataset,
                "rank": float(spearmanr(each.expected, each.truth).statistic),
                "covered": float(covered.mean()),
                "width": 100 * float((each.high - each.low).mean()),
                "prior": losses(each.expected, each.expected_cost, each.truth, each.cost),
                "alike": losses(alike, each.expected_cost, each.truth, each.cost),
            }
        )
    return table


def public_ranks(tables: Sequence[Answers], number: int) -> dict[str, Any]:
    """Models of the anchor's table placed by public figures other than the anchor's."""
    figures = public_figures()
    truth = shares(merged(tables, number))
    rows = {}
    for model in sorted(set(truth) & set(figures)):
        own = {name: float(np.mean(values)) for name, values in figures[model].items() if name != ANCHOR}
        rest = [without(each.cells, model=model) for each in tables]
        scale = fit_scale(rest, without_figures(model))
        if own:
            rows[model] = (placed(scale, own), truth[model], sorted(own))
    expected, real = (np.array([row[n] for row in rows.values()]) for n in (0, 1))
    return {
        "models": rows,
        "rank": float(spearmanr(expected, real).statistic),
        "error": 100 * float(np.abs(expected - real).mean()),
    }


# --- the command --------------------------------------------------------------------------------------------


def single_kind(
    tables: Sequence[Answers], texts: Sequence[Mapping[str, str]], number: int, prices: Prices, args: Any
) -> None:
    """The first part, for the table of the anchor."""
    whole = merged(tables, number)
    named = sorted({*whole.question.tolist()})
    groups = near_duplicates([texts[number][name] for name in named])
    placements, chosen = [], []
    for seed in range(args.seeds):
        test = held_out(groups, SHARE, seed)
        of_test = np.isin(whole.question, np.array(named)[test])
        others = [
            each
            for n, each in enumerate(tables)
            if n != number and not np.isin(each.question[:1], whole.question).any()
        ]
        split = Split(whole.select(~of_test), whole.select(of_test), others, seed)
        found = leave_one_out(split, args.draws)
        placements.append(placement_figures(found))
        chosen.append(choices(split, found, prices))
        means = [100 * np.mean(list(shares(each).values())) for each in (split.train, split.test)]
        print(
            f"seed {seed}: {test.sum()} of {len(named)} questions held out, {len(found['truth'])} models,"
            f" right on average {means[0]:.1f}% of the training questions, {means[1]:.1f}% of the others"
        )
    print(f"\n{'placed by':32}{'rank':>8}{'error':>8}{'loss':>8}{'accuracy':>10}{'dollars':>10}")
    for way in placements[0]:
        rank, error = (np.mean([each[way][name] for each in placements]) for name in ("rank", "error"))
        loss, accuracy, dollars = np.mean([each[way] for each in chosen], 0)
        print(f"{way:32}{rank:8.3f}{error:8.2f}{loss:8.2f}{accuracy:10.1f}{dollars:10.6f}")


def merged(tables: Sequence[Answers], number: int) -> Answers:
    """The table, and others of the same questions, as one."""
    own = set(tables[number].question.tolist())
    same = [each for each in tables if own & set(each.question[:1000].tolist())]
    columns = Answers.__dataclass_fields__
    return Answers(*(np.concatenate([getattr(each, name) for each in same]) for name in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tables", nargs="+", metavar="TABLE")
    parser.add_argument("--prices", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--fit", metavar="OUT")
    parser.add_argument("--view", action="store_true")
    parser.add_argument("--cache", default="", help="file that keeps embeddings")
    args = parser.parse_args()
    tables, texts = read_all(args.tables)
    anchor = next(n for n, each in enumerate(tables) if benchmark_of(each.dataset[0]) == ANCHOR and texts[n])
    if args.fit:
        weights = fit_weights(tables, texts, public_figures())
        atomic_write(Path(args.fit), json.dumps({"about": ABOUT} | weights.document(), indent=1) + "\n")
        view = fit_view(merged(tables, anchor), texts[anchor], embedder(args.cache))
        with (
            atomic_file(Path(args.fit).with_name("prior_questions.npz")) as scratch,
            scratch.open("wb") as file,
        ):
            np.savez_compressed(file, **view)
        print(f"wrote {args.fit} and prior_questions.npz")
        return
    if args.view:
        report_view(tables, texts, anchor, args.cache)
        return
    prices = {name: each for path in args.prices for name, each in read_prices(path).items()}
    prices["gpt-3.5-turbo"] = prices.get("gpt-3.5-turbo", prices.get("gpt-35-turbo", (0.0, 0.0)))
    for number, table in enumerate(tables):
        if not texts[number]:
            continue
        if len({*map(benchmark_of, np.unique(table.dataset))}) == 1 and len(np.unique(table.strategy)) == 1:
            single_kind(tables, texts, number, prices, args)
            public = public_ranks(tables, number)
            print(f"\nby other public figures: rank {public['rank']:.3f}, error {public['error']:.1f}")
            for model, (expected, real, names) in public["models"].items():
                print(f"  {model:24}{100 * expected:6.1f}{100 * real:6.1f}  {', '.join(names)}")
        elif len(np.unique(table.strategy)) > 1 and len(np.unique(table.dataset)) > 1:
            report_crossed(crossed_figures(cross(tables, number, prices)))


def embedder(cache: str) -> Embed:
    from viaticum.routers.query.encoder import Encoder

    encoder = Encoder(cache=cache)
    return lambda texts: np.asarray(encoder(texts).numpy())


def report_view(
    tables: Sequence[Answers], texts: Sequence[Mapping[str, str]], anchor: int, cache: str
) -> None:
    others = {
        dataset: (table.select((table.dataset == dataset) & (table.strategy == USUAL)), known)
        for n, (table, known) in enumerate(zip(tables, texts, strict=True))
        if n != anchor and any(known.values())
        for dataset in np.unique(table.dataset).tolist()
    }
    found = view_figures(merged(tables, anchor), texts[anchor], others, embedder(cache))
    print(
        f"held-out questions of models left out: AUC {found['auc']:.3f}, log loss {found['log_loss']:.3f};"
        f" by the model's share alone {found['log_loss_plain']:.3f}"
    )
    print("rank correlation of ease on other data sets:")
    for name, rank in found["ranks"].items():
        print(f"  {name:22}{rank:7.2f}")


def report_crossed(rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"\n{'data set':22}{'rank':>7}{'within':>8}{'width':>7}{'loss':>7}{'loss, all alike':>17}")
    for row in rows:
        print(
            f"{row['dataset']:22}{row['rank']:7.2f}{row['covered']:8.0%}{row['width']:7.0f}"
            f"{row['prior'][0]:7.1f}{row['alike'][0]:17.1f}"
        )
    means = [np.mean([row[name] for row in rows]) for name in ("rank", "covered", "width")]
    both = [np.mean([row[name][0] for row in rows]) for name in ("prior", "alike")]
    print(f"{'mean':22}{means[0]:7.2f}{means[1]:8.0%}{means[2]:7.0f}{both[0]:7.1f}{both[1]:17.1f}")


if __name__ == "__main__":
    main()
