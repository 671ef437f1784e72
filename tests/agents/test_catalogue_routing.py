"""Which models of a catalogue are routed to: those whose weights, key and price are here."""

from __future__ import annotations

import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from viaticum import ScriptedModel, Viaticum, build_graph
from viaticum.agents.completions import available_names
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import AuthenticationFailed, InputError, UnknownPrice, WeightsError
from viaticum.models import usable
from viaticum.models.usable import UsableModels
from viaticum.types import Pair

LOCAL = "qwen2.5-coder-1.5b"


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FAR_KEY", raising=False)


def scripted(name: str, price: str, **fields: Any) -> ModelSpec:
    values = {
        "name": name,
        "description": "Says the same to everything.",
        "kind": "scripted",
        "context_length": 9000,
        "input_price": price,
        "output_price": price,
        "text": f"I am {name}. The answer is 4.",
    }
    return ModelSpec.model_validate(values | fields)


def remote(name: str, **fields: Any) -> ModelSpec:
    values = {"kind": "remote", "litellm_model": "openai/x", "api_key_env": "FAR_KEY", "text": None}
    return scripted(name, "1", **(values | fields))


def client(folder: Path, *specs: ModelSpec, **settings: Any) -> Viaticum:
    return Viaticum("0.1", folder=folder, catalogue=Catalogue.load().with_models(*specs), **settings)


def test_the_cheapest_of_models_without_outcomes_answers(tmp_path: Path) -> None:
    with client(tmp_path, scripted("dear", "9"), scripted("cheap", "1")) as viaticum:
        answer = viaticum.solve("2+2?")
    assert answer.value == "4"
    assert answer.routes[0].pair.model == "cheap"
    assert "prior only: no outcomes for this model" in answer.routes[0].why


def test_a_graph_needs_no_model_either(tmp_path: Path) -> None:
    catalogue = Catalogue.load().with_models(scripted("cheap", "1"))
    graph = build_graph("0.1", folder=tmp_path, catalogue=catalogue)
    assert graph.invoke({"question": "2+2?"})["value"] == "4"  # type: ignore[call-overload]


def test_entries_that_are_not_routed_to_by_default_are_asked_by_name_alone(tmp_path: Path) -> None:
    specs = (scripted("hidden", "0.1", default=False), scripted("open", "1"))
    with client(tmp_path, *specs) as viaticum:
        assert viaticum.solve("2+2?").routes[0].pair.model == "open"
    with client(tmp_path, *specs, model="hidden") as viaticum:
        assert viaticum.solve("2+2?").routes[0].pair.model == "hidden"


def test_a_model_passed_in_code_is_a_candidate_with_its_own_price(tmp_path: Path) -> None:
    """Also where the catalogue has an entry of the same name, or it is given under another one."""
    own = ScriptedModel("The answer is 5.", spec=scripted("cheap", "0.5"))
    models = {"cheap": own, "alias": ScriptedModel("The answer is 6.", name="mine")}
    with client(tmp_path, scripted("cheap", "100"), models=models) as viaticum:
        assert viaticum.catalogue["cheap"].input_price == Decimal("0.5")
        answer = viaticum.solve("2+2?")
        assert (answer.value, answer.routes[0].pair.model) == ("5", "cheap")
        tokens = answer.usage.models["cheap"]
        assert answer.cost == round(0.5 * 1000) * (tokens.input_tokens + tokens.output_tokens)
    with client(tmp_path, models=models, model="alias") as viaticum:
        answer = viaticum.solve("2+2?")
        assert (answer.value, answer.cost > 0) == ("6", True)


def test_what_cannot_be_used_is_left_out_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("viaticum.models.usable.RECHECK_SECONDS", 1000.0)  # however long this takes
    specs = (remote("far"), scripted("free", "1", input_price=None, output_price=None), scripted("open", "1"))
    with caplog.at_level(logging.INFO, "viaticum"), client(tmp_path, *specs) as viaticum:
        for question in ("2+2?", "1+3?", "8/2?"):
            assert viaticum.solve(question).routes[0].pair.model == "open"
        assert not viaticum.is_usable("far")
        assert not viaticum.is_usable(LOCAL)
        assert not viaticum.is_usable("nobody")
        assert viaticum.is_usable("open")
        names = available_names(viaticum)
    assert "open+cot" in names
    assert not {"far", LOCAL, "free"} & set(names)
    for name in ("far", "free", LOCAL):
        about = [each for each in caplog.records if name in each.getMessage().split()]
        assert len(about) == 1, name
    levels = {each.getMessage().split()[4]: each.levelname for each in caplog.records}
    assert levels["far"] == "WARNING"  # what a user can mend at once
    assert all(each.levelname == "INFO" for each in caplog.records if "weights" in each.getMessage())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "far"}, AuthenticationFailed, "far needs a key; put it into the variable FAR_KEY"),
        ({"model": LOCAL}, WeightsError, f"viaticum models pull {LOCAL}"),
        ({"model": "free"}, UnknownPrice, "input_price"),
        ({}, InputError, "FAR_KEY.*viaticum models pull"),
    ],
)
def test_a_model_that_was_named_is_an_error_with_what_to_do(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    specs = (remote("far"), scripted("free", "1", input_price=None, output_price=None))
    with client(tmp_path, *specs, **settings) as viaticum, pytest.raises(error, match=message):
        viaticum.solve("2+2?")


def test_the_key_that_litellm_looks_for_counts_where_the_entry_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    catalogue = Catalogue([remote("far", litellm_model="gemini/gemini-2.5-flash", api_key_env=None)])
    assert "far" not in UsableModels(catalogue)
    monkeypatch.setenv("GOOGLE_API_KEY", "k")
    assert "far" in UsableModels(catalogue)
    own_server = remote("far", api_key_env=None, api_base="http://127.0.0.1:9/v1")
    assert "far" in UsableModels(Catalogue([own_server]))


def test_an_entry_without_a_known_price_does_not_hinder_the_others(tmp_path: Path) -> None:
    unlisted = remote(
        "far",
        api_key_env=None,
        api_base="http://127.0.0.1:9/v1",
        litellm_model="nobody/x",
        input_price=None,
        output_price=None,
        price_version="litellm",
    )
    with client(tmp_path, unlisted, scripted("open", "1")) as viaticum:
        assert viaticum.solve("2+2?").routes[0].pair.model == "open"
        assert not viaticum.is_usable("far")


def test_a_model_is_looked_at_again_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = UsableModels(Catalogue([remote("far")]))
    assert "far" not in models
    monkeypatch.setenv("FAR_KEY", "k")
    assert "far" not in models
    monkeypatch.setattr(usable, "RECHECK_SECONDS", 0.0)
    assert "far" in models


def test_a_router_that_was_given_decides_alone(tmp_path: Path) -> None:
    from viaticum.routers.query import StaticRouter
    from viaticum.types import RoutingTable, Row

    table = RoutingTable((Row(Pair("dear", "cot"), 0.9, 10, 20, 10_000, 20_000),))
    specs = (scripted("dear", "9"), scripted("cheap", "1"))
    with client(tmp_path, *specs, router=StaticRouter(table)) as viaticum:
        assert viaticum.solve("2+2?").routes[0].pair.model == "dear"


def test_reasons_name_what_the_packaged_table_was_measured_on(tmp_path: Path) -> None:
    model = ScriptedModel("The answer is 4.", spec=scripted(LOCAL, "1"))
    with client(tmp_path, models={LOCAL: model}) as viaticum:
        why = viaticum.solve("2+2?").routes[0].why
    assert why.endswith("; measured on 200 questions of gsm8k (grade-school maths), 2026-11-29")


def test_packaged_models_and_unknown_ones_are_compared_on_one_scale(tmp_path: Path) -> None:
    """62% on grade-school maths is not better than an unknown model on anything."""
    local = ScriptedModel("The answer is 4.", spec=scripted(LOCAL, "1"))
    strong = scripted("strong", "1", benchmarks={"gsm8k": 0.95, "mmlu-pro": 0.8})
    with client(tmp_path, strong, models={LOCAL: local}) as viaticum:
        answer = viaticum.solve("2+2?")
    assert answer.routes[0].pair.model == "strong"
