"""Comparisons of formulas have all the time that a machine needs which is held up."""

from __future__ import annotations

import pytest

from viaticum.strategies.answers import expressions


@pytest.fixture(autouse=True)
def patient_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its limit a comparison says no, and the verdict is remembered; tests of the limit set it back."""
    monkeypatch.setattr(expressions, "SECONDS", 60.0)
