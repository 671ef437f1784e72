"""The settings of a workflow: validated once, and one list of keywords for all who take them."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from viaticum import InputError, Viaticum, build_graph
from viaticum.agents.workflow.settings import SettingsKeywords, WorkflowSettings


def test_the_keywords_are_the_fields_with_their_types() -> None:
    keywords, settings = get_type_hints(SettingsKeywords), get_type_hints(WorkflowSettings)
    assert {field.name for field in fields(WorkflowSettings)} == {"budget", *keywords}
    assert keywords.items() <= settings.items()


@pytest.mark.parametrize("function", [Viaticum.__init__, build_graph])
def test_no_setting_is_named_in_a_second_signature(function: object) -> None:
    assert callable(function)
    named = {name for name in inspect.signature(function).parameters if name != "settings"}
    assert not named & set(get_type_hints(SettingsKeywords))


def test_an_unknown_keyword_is_named_with_the_closest_known_one() -> None:
    with pytest.raises(TypeError, match="unexpected keyword 'polcy'; did you mean 'policy'"):
        Viaticum("0.1", polcy="best")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"unexpected keyword 'xyz'; known: budget, .*slots"):
        build_graph("0.1", xyz=1)  # type: ignore[call-arg]


def test_values_are_checked_when_the_settings_are_made() -> None:
    wrong = ({"budget": 0}, {"tries": 0}, {"concurrency": 0}, {"timeout": 0.0}, {"policy": "dearest"})
    for each in wrong:
        with pytest.raises(InputError):
            WorkflowSettings(**each)  # type: ignore[arg-type]


def test_both_stores_are_named_by_a_folder_or_an_address(tmp_path: Path) -> None:
    here = WorkflowSettings(folder=tmp_path)
    assert (here.ledger_address, here.checkpoints_address) == (
        tmp_path / "ledger.db",
        tmp_path / "checkpoints.db",
    )
    there = WorkflowSettings(folder=tmp_path, store="postgresql://host/name")
    assert {there.ledger_address, there.checkpoints_address} == {"postgresql://host/name"}
