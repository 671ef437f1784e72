"""What is told while weights load."""

from __future__ import annotations

import logging

import pytest

from viaticum.catalogue import Catalogue
from viaticum.models.local import LocalModels


def test_loading_is_told_once_with_size_folder_and_time(
    tiny_catalogue: Catalogue, caplog: pytest.LogCaptureFixture
) -> None:
    models = LocalModels(tiny_catalogue, slots=1)
    with caplog.at_level(logging.INFO, "viaticum"):
        for _ in range(2):
            models.runner("tiny-small")
    lines = [each for each in caplog.messages if "tiny-small" in each]
    assert len(lines) == 2
    assert "MB from" in lines[0]
    assert lines[1].startswith("tiny-small is loaded, after ")
