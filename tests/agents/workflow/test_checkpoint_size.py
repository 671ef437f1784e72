"""Long values in checkpoints are compressed, and values that an earlier version stored are still read."""

from __future__ import annotations

import numpy as np
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from viaticum.agents.workflow.checkpoints import CompressedSerializer


def test_a_long_text_that_is_stored_twice_takes_less_than_once() -> None:
    words = np.random.default_rng(0).integers(5000, size=3000)
    text = " ".join(f"word{each}" for each in words)
    kind, data = CompressedSerializer().dumps_typed({"asked": text[:9000], "text": text[:9000]})
    assert len(data) < 9000
    assert CompressedSerializer().loads_typed((kind, data))["text"] == text[:9000]


def test_short_and_earlier_values_are_stored_and_read_as_they_are() -> None:
    for value in ({"text": "short"}, {"text": "long" * 5000}, None, "text"):
        assert CompressedSerializer().loads_typed(JsonPlusSerializer().dumps_typed(value)) == value
    assert CompressedSerializer().dumps_typed("short") == JsonPlusSerializer().dumps_typed("short")
