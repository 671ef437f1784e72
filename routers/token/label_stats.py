"""What labelled tokens look like: shares, entropies, and how far verifiers agree. Numbers for a person or JSON."""

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
    """Of each verifier the shares of identical, neutral and divergent tokens and their mean entropies; agreement.

    unknown are tokens that differ without a verdict: dropped as unparseable, or not looked at yet.
    """
    folder = Path(folder)
    first = LabelledTokens.load(folder)
    verifiers: list[str] = list(first.manifest["verifiers"])
    told = {
        name: _of_labels(first if name == verifiers[0] else LabelledTokens.load(folder, name))
        for name in verifiers
    }
    verdicts = [row["verdicts"] for row in read_rows(folder)]
    return {
        "questions": len(first.questions),
        "tokens": len(first),
        "differing": int(first.differing.sum()),
        "verifiers": told,
        "agreement": [_agreement(a, b, verdicts) for a, b in combinations(verifiers, 2)],
        "work": first.manifest.get("work", {}),
    }


def _of_labels(tokens: LabelledTokens) -> dict[str, Any]:
    scale = math.log(tokens.manifest["vocabulary"])
    told: dict[str, Any] = {}
    for name, kind in KINDS.items():
        rows = tokens.labels == kind
        mean = float(tokens.entropy[rows].mean()) if bool(rows.any()) else None
        told[name] = {
            "tokens": int(rows.sum()),
            "share": float(rows.float().mean()),
            "entropy": mean,
            "nats": None if mean is None else mean * scale,
        }
    others = torch.isin(tokens.labels, torch.tensor([IDENTICAL, NEUTRAL]))
    mean = float(tokens.entropy[others].mean()) if bool(others.any()) else None
    told["not_divergent"] = {"entropy": mean, "nats": None if mean is None else mean * scale}
    return told


def _agreement(a: str, b: str, verdicts: list[dict[str, bool | None]]) -> dict[str, Any]:
    """The share of equal verdicts, and Cohen's kappa: what of it is beyond chance (1960)."""
    both = [(bool(row[a]), bool(row[b])) for row in verdicts if None not in (row.get(a), row.get(b))]
    if not both:
        return {"verifiers": [a, b], "differences": 0, "share": None, "kappa": None}
    share = sum(ours == theirs for ours, theirs in both) / len(both)
    rates = [sum(pair[side] for pair in both) / len(both) for side in (0, 1)]
    chance = rates[0] * rates[1] + (1 - rates[0]) * (1 - rates[1])
    kappa = None if chance == 1 else (share - chance) / (1 - chance)
    return {"verifiers": [a, b], "differences": len(both), "share": share, "kappa": kappa}
