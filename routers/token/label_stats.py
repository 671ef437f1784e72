"""Statistics of labelled tokens: class shares, mean entropies and verifier agreement, as plain data."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from viaticum.routers.token.labels import (
    DIVERGENT,
    IDENTICAL,
    NEUTRAL,
    UNKNOWN,
    LabelledTokens,
    read_rows,
)

KINDS = {"identical": IDENTICAL, "neutral": NEUTRAL, "divergent": DIVERGENT, "unknown": UNKNOWN}


def statistics(folder: str | Path) -> dict[str, Any]:
    """Statistics of a folder of labels.

    Of each verifier the shares of identical, neutral and divergent tokens with their mean entropies, and the
    agreement of each two verifiers. "unknown" are tokens that differ without a verdict: unparseable, or not
    verified yet.
    """
    folder = Path(folder)
    first = LabelledTokens.load(folder)
    verifiers: list[str] = list(first.manifest["verifiers"])
    classes = {
        name: _class_stats(first if name == verifiers[0] else LabelledTokens.load(folder, name))
        for name in verifiers
    }
    verdicts = [row["verdicts"] for row in read_rows(folder)]
    return {
        "questions": len(first.questions),
        "tokens": len(first),
        "differing": int(first.differing.sum()),
        "verifiers": classes,
        "agreement": [_agreement(a, b, verdicts) for a, b in combinations(verifiers, 2)],
        "work": first.manifest.get("work", {}),
    }


def _class_stats(tokens: LabelledTokens) -> dict[str, Any]:
    scale = math.log(tokens.manifest["vocabulary"])
    stats: dict[str, Any] = {}
    for name, kind in KINDS.items():
        rows = tokens.labels == kind
        mean = float(tokens.entropy[rows].mean()) if bool(rows.any()) else None
        stats[name] = {
            "tokens": int(rows.sum()),
            "share": float(rows.float().mean()),
            "entropy": mean,
            "nats": None if mean is None else mean * scale,
        }
    others = torch.isin(tokens.labels, torch.tensor([IDENTICAL, NEUTRAL]))
    mean = float(tokens.entropy[others].mean()) if bool(others.any()) else None
    stats["not_divergent"] = {"entropy": mean, "nats": None if mean is None else mean * scale}
    return stats


def _agreement(a: str, b: str, verdicts: list[dict[str, bool | None]]) -> dict[str, Any]:
    """The share of equal verdicts, and Cohen's kappa (1960), which corrects it for chance agreement."""
    both = [(bool(row[a]), bool(row[b])) for row in verdicts if None not in (row.get(a), row.get(b))]
    if not both:
        return {"verifiers": [a, b], "differences": 0, "share": None, "kappa": None}
    share = sum(first == second for first, second in both) / len(both)
    rates = [sum(pair[side] for pair in both) / len(both) for side in (0, 1)]
    chance = rates[0] * rates[1] + (1 - rates[0]) * (1 - rates[1])
    kappa = None if chance == 1 else (share - chance) / (1 - chance)
    return {"verifiers": [a, b], "differences": len(both), "share": share, "kappa": kappa}
