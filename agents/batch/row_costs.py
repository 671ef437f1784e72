"""The measured columns of an outcome: tokens, cost and seconds of a completion of a local model."""

from __future__ import annotations

from typing import Any

from viaticum.catalogue import Catalogue
from viaticum.types import Completion


def measured(completion: Completion, catalogue: Catalogue) -> dict[str, Any]:
    """The last columns of a row. Raises `UnknownPrice`."""
    return {
        "input_tokens": completion.usage.input_tokens,
        "output_tokens": completion.usage.output_tokens,
        "cost_nanousd": cost_of(completion, catalogue),
        "seconds": round(completion.usage.seconds, 3),
        "finish_reason": completion.finish_reason,
    }


def cost_of(completion: Completion, catalogue: Catalogue) -> int:
    """Cost of a completion in nano-dollars, at the catalogue's prices. Raises `UnknownPrice`."""
    models = completion.usage.models
    prices = catalogue.prices(models)
    return sum(prices[name].cost(count.input_tokens, count.output_tokens) for name, count in models.items())
