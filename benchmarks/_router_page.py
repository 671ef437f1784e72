"""The page of `routers.py --data`: what the parts of one half show, as Markdown tables.

Accuracies in percent, differences in points with 95% intervals: a paired bootstrap over questions, in which
the seeds' results of one question are drawn together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from _router_figures import paired
from _router_units import (
    AT_COST,
    BEFORE,
    KNN,
    OURS,
    PACED,
    PARTS,
    STATIC,
    STATIC_AT_COST,
    STATIC_PACED,
    Run,
)

from viaticum.routers.query.outcome_matrix import Array

CURVES = (OURS, PACED, AT_COST, BEFORE)
GAPS = ((OURS, STATIC), (OURS, STATIC_AT_COST), (PACED, STATIC_PACED))  # of kinds that were left out
Figures = dict[str, Any]


# --- figures ------------------------------------------------------------------------------------------------


def figures(runs: Sequence[Run], budgets: dict[str, tuple[float, ...]]) -> Figures:
    """All figures, by table."""
    found: Figures = {}
    for table in dict.fromkeys(run.unit.table for run in runs):
        own = [run for run in runs if run.unit.table == table]
        parts = {part: [run for run in own if run.unit.part == part] for part in PARTS}
        found[table] = {
            "budgets": budgets[table],
            "split": splits(_with_before(own), budgets[table]) if parts["split"] else None,
            "kind": kinds(parts["kind"], budgets[table]) if parts["kind"] else None,
            "size": sizes(parts["size"]) if parts["size"] else None,
            "llmrouter": beside(parts["llmrouter"]) if parts["llmrouter"] else None,
            "speed": next((run.facts for run in own if run.unit.part == "speed"), None),
        }
    return found


def _with_before(runs: Sequence[Run]) -> list[Run]:
    """The splits, with the results of the other checkout where there are some."""
    before = {run.unit.which: run for run in runs if run.unit.part == "before"}
    merged = []
    for run in runs:
        if run.unit.part == "split":
            more = before[run.unit.which].results if run.unit.which in before else {}
            merged.append(Run(run.unit, run.results | more, run.numbers, run.facts))
    return merged


def splits(runs: Sequence[Run], budgets: Sequence[float]) -> Figures:
    """Accuracy and spending by router and budget, ours minus each, and the figures of ours."""
    names = [name for name in runs[0].results if all(name in run.results for run in runs)]
    numbers = [run.numbers for run in runs]
    lines = {}
    for name in names:
        right, spent = (_means(runs, name, part) for part in (0, 1))
        line: Figures = {"accuracy": right, "spent": [s / b for s, b in zip(spent, budgets, strict=True)]}
        for own in (OURS, PACED):
            if name not in CURVES or name == BEFORE:
                gaps = [run.results[own][0] - run.results[name][0] for run in runs]
                line[f"{own} minus it"] = [
                    _paired([gap[at] for gap in gaps], numbers) for at in range(len(budgets))
                ]
                line[f"{own} minus it, mean"] = _paired([_mean_known(gap) for gap in gaps], numbers)
        lines[name] = line
    return {
        "train": [run.facts["train"] for run in runs],
        "test": [run.facts["test"] for run in runs],
        "routers": lines,
        "facts": {
            name: [run.facts[name] for run in runs]
            for name in (
                "cost_at_best",
                "cost_at_99_percent",
                "ece",
                "p90",
                "trust",
                "seconds",
                "cpu_seconds",
            )
        },
        "best_single": [run.facts["best_single"] for run in runs],
    }


def kinds(runs: Sequence[Run], budgets: Sequence[float]) -> Figures:
    """Kinds left out: pooled and each, ours minus the static mixture of the same training questions."""
    points = []
    for at, budget in enumerate(budgets):
        right, spent = (
            {
                name: np.concatenate([run.results[name][part][at] for run in runs])
                for name in (OURS, STATIC, PACED, STATIC_PACED)
            }
            for part in (0, 1)
        )
        gaps, at_cost, paced_gaps = (
            _paired(
                [run.results[own][0][at] - run.results[other][0][at] for run in runs],
                [run.numbers for run in runs],
            )
            for own, other in GAPS
        )
        points.append(
            {
                "budget": budget,
                "accuracy": float(right[OURS].mean()),
                "static": float(right[STATIC].mean()),
                "spent": float(spent[OURS].mean() / budget),
                "static_spent": float(spent[STATIC].mean() / budget),
                **gaps,
                "at_cost": at_cost,
                "paced": float(right[PACED].mean()),
                "static_paced": float(right[STATIC_PACED].mean()),
                "paced_spent": float(spent[PACED].mean() / budget),
                "static_paced_spent": float(spent[STATIC_PACED].mean() / budget),
                "paced_gap": paced_gaps,
            }
        )
    weights = np.array([run.facts["test"] for run in runs], dtype=float)
    each = []
    for run in runs:
        gap, at_cost, paced_gap = (run.results[own][0] - run.results[other][0] for own, other in GAPS)
        each.append(
            {
                "kind": run.unit.which,
                "questions": run.facts["test"],
                "points": [_paired([line], [run.numbers]) for line in gap],
                "mean": _paired([gap.mean(0)], [run.numbers]),
                "at_cost": [_paired([line], [run.numbers]) for line in at_cost],
                "mean_at_cost": _paired([at_cost.mean(0)], [run.numbers]),
                "paced": [_paired([line], [run.numbers]) for line in paced_gap],
                "mean_paced": _paired([paced_gap.mean(0)], [run.numbers]),
                "spent": [float(s.mean() / b) for s, b in zip(run.results[OURS][1], budgets, strict=True)],
                **{name: run.facts[name] for name in ("ece", "p90", "trust")},
            }
        )
    return {
        "pooled": points,
        "kinds": each,
        **{
            name: float(np.average([run.facts[name] for run in runs], weights=weights))
            if all(run.facts[name] is not None for run in runs)
            else None
            for name in ("ece", "p90", "trust")
        },
    }


def sizes(runs: Sequence[Run]) -> Figures:
    """Ours minus the static mixture and the neighbours, mean over budgets, by the questions fitted on."""
    found: Figures = {}
    for size in sorted({int(run.unit.which.split("-")[0]) for run in runs}):
        own = [run for run in runs if run.unit.which.startswith(f"{size}-")]
        numbers = [run.numbers for run in own]
        found[str(size)] = {
            "ours": float(np.mean([run.results[OURS][0].mean() for run in own])),
            "spent": [_means(own, OURS, 1)],
            **{
                name: _paired(
                    [_mean_known(run.results[OURS][0] - run.results[name][0]) for run in own], numbers
                )
                for name in (STATIC, KNN)
            },
            "ece": float(np.mean([run.facts["ece"] for run in own])),
            "draws": len(own),
        }
    return found


def beside(runs: Sequence[Run]) -> Figures:
    """Ours minus each router with one operating point, at the cost that was expected of that one."""
    found: Figures = {}
    for name in runs[0].results:
        own = f"{OURS} beside {name}"
        if own in runs[0].results:
            found[name] = {
                key: _means(runs, of, part)[0]
                for key, of, part in (
                    ("accuracy", name, 0),
                    ("cost", name, 1),
                    ("ours", own, 0),
                    ("our_cost", own, 1),
                )
            } | _paired(
                [(run.results[own][0] - run.results[name][0])[0] for run in runs],
                [run.numbers for run in runs],
            )
    return found


def _means(runs: Sequence[Run], name: str, part: int) -> list[float]:
    """Means over seeds by budget; NaN where nothing is so cheap."""
    return [float(each) for each in np.mean([run.results[name][part].mean(1) for run in runs], 0)]


def _mean_known(gaps: Array) -> Array:
    """The mean over the budgets that both have [Q]; gaps: [budgets, Q]."""
    known = ~np.isnan(gaps).any(1)
    return np.asarray(gaps[known].mean(0) if known.any() else np.full(gaps.shape[1], np.nan))


def _paired(gaps: Sequence[Array], numbers: Sequence[Array]) -> dict[str, float]:
    if any(np.isnan(gap).any() for gap in gaps):
        return dict.fromkeys(("difference", "low", "high"), float("nan"))
    return paired(gaps, numbers)


# --- the page -----------------------------------------------------------------------------------------------


def page(found: Figures, conditions: str) -> str:
    """The page in Markdown."""
    lines = ["# The query router beside others", "", conditions, ""]
    for name, table in found.items():
        lines += [f"## {name}", ""]
        if table["split"]:
            lines += _split_lines(table["split"], table["budgets"])
        if table["kind"]:
            lines += _kind_lines(table["kind"], table["budgets"])
        if table["size"]:
            lines += _size_lines(table["size"])
        if table["llmrouter"]:
            lines += _beside_lines(table["llmrouter"])
        if table["speed"]:
            lines += [", ".join(f"{key} {value:.4g}" for key, value in table["speed"].items()) + ".", ""]
    return "\n".join(lines)


def _split_lines(split: Figures, budgets: Sequence[float]) -> list[str]:
    heads = [f"${budget:g}" for budget in budgets]
    title = f"Held out {split['test']} questions by seed, fitted on {split['train']}."
    lines = [f"{title} Accuracy, in brackets the part of the budget that was spent:", ""]
    lines += _head(["", *heads])
    for name, line in split["routers"].items():
        cells = [
            "" if np.isnan(right) else f"{100 * right:.1f} ({spent:.2f})"
            for right, spent in zip(line["accuracy"], line["spent"], strict=True)
        ]
        lines.append(_row([name, *cells]))
    for own in (OURS, PACED):
        lines += ["", f"{own} minus it, points:", "", *_head(["", *heads, "mean over budgets"])]
        for name, line in split["routers"].items():
            if f"{own} minus it" in line:
                gaps = [*line[f"{own} minus it"], line[f"{own} minus it, mean"]]
                lines.append(_row([name, *map(_gap, gaps)]))
    best, facts = split["best_single"], split["facts"]
    pairs = sorted({each["pair"] for each in best})
    accuracy, cost = (np.mean([each[key] for each in best]) for key in ("accuracy", "cost"))
    lines += [
        "",
        f"Best single pair ({', '.join(pairs)}): {100 * accuracy:.1f}% at ${cost:.5f}.",
        "By seed: " + "; ".join(f"{name} {_numbers(values)}" for name, values in facts.items()) + ".",
        "",
    ]
    return lines


def _kind_lines(kind: Figures, budgets: Sequence[float]) -> list[str]:
    lines = [
        f"Each of {len(kind['kinds'])} kinds left out, pooled:",
        "",
        *_head(["budget", "viaticum (spent)", "static mixture (spent)", "difference", "at equal real cost"]),
    ]
    for point in kind["pooled"]:
        ours, static = f"{100 * point['accuracy']:.1f}", f"{100 * point['static']:.1f}"
        cells = [f"${point['budget']:g}", f"{ours} ({point['spent']:.2f})"]
        lines.append(
            _row([*cells, f"{static} ({point['static_spent']:.2f})", _gap(point), _gap(point["at_cost"])])
        )
    lines += [
        "",
        "Both paced, so that real costs correct what is left of the budget:",
        "",
        *_head(["budget", "viaticum (spent)", "static mixture (spent)", "difference"]),
    ]
    for point in kind["pooled"]:
        ours, static = (
            f"{100 * point[name]:.1f} ({point[f'{name}_spent']:.2f})" for name in ("paced", "static_paced")
        )
        lines.append(_row([f"${point['budget']:g}", ours, static, _gap(point["paced_gap"])]))
    lines += [
        "",
        ", ".join(f"{name} {_number(kind[name])}" for name in ("p90", "ece", "trust")) + ".",
        "",
        "Each kind minus the static mixture:",
        "",
        *_head(
            ["kind", *(f"${budget:g}" for budget in budgets), "mean", "most spent", "p90", "ece", "trust"]
        ),
    ]
    for each in kind["kinds"]:
        cells = [f"{each['kind']} ({each['questions']})", *map(_gap, each["points"]), _gap(each["mean"])]
        cells += [f"{max(each['spent']):.2f}", *(_number(each[name]) for name in ("p90", "ece", "trust"))]
        lines.append(_row(cells))
    for title, key in (
        ("Each kind minus the static mixture that really cost as much on it:", "at_cost"),
        ("Each kind, both paced:", "paced"),
    ):
        lines += ["", title, "", *_head(["kind", *(f"${budget:g}" for budget in budgets), "mean"])]
        for each in kind["kinds"]:
            lines.append(_row([each["kind"], *map(_gap, each[key]), _gap(each[f"mean_{key}"])]))
    return [*lines, ""]


def _size_lines(size: Figures) -> list[str]:
    lines = [
        "Fitted on few questions, mean over budgets:",
        "",
        *_head(["questions", "viaticum", "minus static mixture", "minus neighbours", "ece", "draws"]),
    ]
    for name, each in size.items():
        cells = [name, f"{100 * each['ours']:.1f}", _gap(each[STATIC]), _gap(each[KNN])]
        lines.append(_row([*cells, _number(each["ece"]), str(each["draws"])]))
    return [*lines, ""]


def _beside_lines(found: Figures) -> list[str]:
    lines = [
        "Beside llmrouter-lib, planned to cost what was expected of each of its routers:",
        "",
        *_head(["", "right", "cost", "viaticum", "its cost", "difference"]),
    ]
    for name, each in found.items():
        theirs = f"{100 * each['accuracy']:.1f}", f"${each['cost']:.5f}"
        ours = f"{100 * each['ours']:.1f}", f"${each['our_cost']:.5f}"
        lines.append(_row([name, *theirs, *ours, _gap(each)]))
    return [*lines, ""]


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), _row(["---"] * len(cells))]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _gap(gap: dict[str, float]) -> str:
    if np.isnan(gap["difference"]):
        return ""
    return f"{100 * gap['difference']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"


def _numbers(values: Sequence[float | None]) -> str:
    return ", ".join(map(_number, values))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 10 else f"{value:.0f}"
