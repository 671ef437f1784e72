"""The results of routers.py as tables: accuracy in percent, differences in points with 95% intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Point = Mapping[str, Any]


def show(results: Mapping[str, Any]) -> None:
    console = Console(width=190, highlight=False)
    print(", ".join(f"{name} {value}" for name, value in results["conditions"].items()))
    if "in_distribution" in results:
        _in_distribution(console, results["in_distribution"])
    for each in results.get("held_out_datasets", ()):
        _unseen(console, each)
    if "ablation" in results:
        _ablation(console, results["ablation"])
    if "speed" in results:
        _pairs(console, "speed", results["speed"])


def _in_distribution(console: Console, result: Mapping[str, Any]) -> None:
    routers = result["routers"]
    budgets = [f"${point['budget']:g}" for point in next(iter(routers.values()))]
    title = f"Held out by seed: {result['questions']} questions; fitted on {result['rows_fitted']} rows"
    accuracy = _table(f"Accuracy at a mean budget a question. {title}", ["router", *budgets])
    cost = _table("Actual cost, dollars", ["router", *budgets])
    gap = _table("Ours minus it, points", ["router", *budgets])
    for name, line in routers.items():
        accuracy.add_row(name, *map(_accuracy, line))
        cost.add_row(name, *("" if p["cost"] is None else f"{p['cost']:.5f}" for p in line))
        if any("ours_minus" in point for point in line):
            gap.add_row(name, *(_gap(point.get("ours_minus")) for point in line))
    for each in (accuracy, cost, gap):
        console.print(each, "")
    single = _table(
        "Routers with one operating point, and ours at the cost expected of them",
        ["router", "accuracy", "cost", "ours", "our cost", "ours minus it"],
    )
    for name, point in result["same_cost"].items():
        single.add_row(
            name,
            f"{point['accuracy']:.1%}",
            f"{point['cost']:.5f}",
            f"{point['ours']:.1%}",
            f"{point['our_cost']:.5f}",
            _gap(point["ours_minus"]),
        )
    if result["same_cost"]:
        console.print(single, "")
    _pairs(console, "ours, means over seeds", result["summary"])
    for seed, line in enumerate(result["by_seed"]):
        _pairs(console, f"seed {seed}", line | {"tuned": result["tuned"][seed]})


def _unseen(console: Console, result: Mapping[str, Any]) -> None:
    title = f"{result['dataset']} unknown to the fit: {result['questions']} questions, "
    title += f"fitted on {result['fitted_on']}"
    title += f" ({result['near_duplicates_left_out']} near-duplicates left out)"
    table = _table(
        title,
        [
            "budget",
            "hull",
            "ours",
            "cost",
            "- hull at budget",
            "- hull at cost",
            "no trust",
            "cost",
            "- hull at cost",
            "static",
            "cost",
            "- hull at cost",
            "neighbours",
            "cost",
            "- hull at cost",
        ],
    )
    for point in result["points"]:
        cells = [
            f"{point['budget']:g}",
            "" if point["hull"] is None else f"{point['hull']:.1%}",
            *_spent(point["ours"], point["budget"]),
        ]
        cells.insert(4, _gap(point["ours_minus_hull_at_budget"]))
        for name in ("no_trust", "static", "neighbours"):
            cells += _spent(point[name], point["budget"])
        table.add_row(*cells)
    console.print(table, "")
    _pairs(console, result["dataset"], result["summary"])


def _ablation(console: Console, result: Mapping[str, Any]) -> None:
    budgets = [f"${point['budget']:g}" for point in result["all"]["points"]]
    table = _table(
        "Ablation: accuracy; then all minus it, points",
        ["", *budgets, "cost at best", "at 99%", "ece", "p90", "share"],
    )
    gaps = _table("All minus it, points", ["", *budgets])
    for name, line in result.items():
        summary = line["summary"]
        names = ("cost_at_best_single_accuracy", "cost_at_99_percent_of_it", "ece", "token_coverage_p90")
        table.add_row(
            name,
            *map(_accuracy, line["points"]),
            *(_number(summary[key]) for key in (*names, "largest_share")),
        )
        if line["points"][-1].get("ours_minus"):
            gaps.add_row(name, *(_gap(point.get("ours_minus")) for point in line["points"]))
    console.print(table, "")
    console.print(gaps, "")


def _table(title: str, columns: Sequence[str]) -> Table:
    return Table(*columns, title=title, title_justify="left", box=None, pad_edge=False, min_width=len(title))


def _pairs(console: Console, title: str, values: Mapping[str, Any]) -> None:
    console.print(f"{title}: " + ", ".join(f"{name} {_number(value)}" for name, value in values.items()))


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{name} {_number(each)}" for name, each in value.items()) + ")"
    return "never" if value is None else str(value)


def _accuracy(point: Point) -> str:
    if point["accuracy"] is None:
        return ""
    return f"{point['accuracy']:.1%}{'*' if point['cost'] > point['budget'] else ''}"


def _gap(gap: Mapping[str, float] | None) -> str:
    if gap is None:
        return ""
    return " ".join(
        [f"{100 * gap['difference']:+.1f}", f"[{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"]
    )


def _spent(point: Mapping[str, Any] | None, budget: float) -> list[str]:
    if point is None:
        return ["", "", ""]
    star = "*" if point["cost"] > budget else ""
    return [
        f"{point['accuracy']:.1%}{star}",
        f"{point['cost']:.5f}",
        _gap(point["minus_hull_at_cost"]),
    ]
