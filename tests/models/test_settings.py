"""Which settings a call gets: call, then strategy, then catalogue entry, then default."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from viaticum.agents.workflow.calls import generation_parameters
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import InputError
from viaticum.generation import GenerationSettings
from viaticum.models.base import Generation
from viaticum.models.remote.model import RemoteModel
from viaticum.models.settings import prompt, resolve
from viaticum.strategies import Strategy, get, names
from viaticum.types import Message, Query

QUERY = Query("What is 1 + 2?", "number")


def catalogue(thinking: bool | str = "auto", context: int = 32_768, **generation: Any) -> Catalogue:
    spec = ModelSpec(
        name="m",
        description="A model.",
        kind="scripted",
        context_length=context,
        thinking=thinking,
        generation=GenerationSettings.of(**generation),
    )
    return Catalogue([spec])


def roles(messages: list[Message]) -> list[str]:
    return [each["role"] for each in messages]


@pytest.mark.parametrize("name", [*names(), "self-consistency:cot:3", "self-consistency:pot:5"])
def test_settings_are_fields_of_every_strategy(name: str) -> None:
    strategy: Any = get(name)
    changed = replace(
        strategy, name="own", max_new_tokens=8192, temperature=0.6, top_p=0.9, system=None, seed=4
    )
    generation = resolve(catalogue(), "m", changed)
    assert (generation.max_new_tokens, generation.temperature, generation.top_p) == (8192, 0.6, 0.9)
    assert generation.seed == 4
    assert (changed.name, strategy.name) == ("own", name)
    assert "system" not in roles(prompt(catalogue()["m"], changed, QUERY))
    with pytest.raises(InputError, match="'own': max_new_tokens"):
        replace(changed, max_new_tokens=0)


def test_a_subclass_sets_its_values_as_attributes_of_the_class() -> None:
    class Long(type(get("cot"))):  # type: ignore[misc]
        name = "long"
        max_new_tokens = 5000

    assert (Long().name, Long().max_new_tokens, replace(Long(), temperature=1.0).max_new_tokens) == (
        "long",
        5000,
        5000,
    )


def test_defaults_are_those_of_earlier_versions() -> None:
    for name, limit, temperature in (
        ("cot", 400, 0.0),
        ("direct", 32, 0.0),
        ("chat", 2048, 0.0),
        ("self-consistency:cod:3", 200, 0.7),
    ):
        strategy = get(name)
        assert resolve(catalogue(), "m", strategy, sample=2) == Generation(
            limit, temperature, stop=strategy.stop, seed=2
        )
    assert set(generation_parameters(resolve(catalogue(), "m", get("pot")))) == {
        *("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop", "extra")
    }


def test_call_before_strategy_before_entry() -> None:
    entry = catalogue(max_new_tokens=900, temperature=0.3, top_k=20, seed=7, min_p=0.1)
    own = replace(get("cot"), max_new_tokens=700, temperature=0.5)
    call = GenerationSettings(max_new_tokens=100, stop=("x",))
    by_entry, by_strategy, by_call = (
        resolve(entry, "m", get("cot")),
        resolve(entry, "m", own),
        resolve(entry, "m", own, call, sample=1),
    )
    assert (by_entry.max_new_tokens, by_entry.temperature) == (900, 0.3)
    assert (by_strategy.max_new_tokens, by_strategy.temperature) == (700, 0.5)
    assert (by_call.max_new_tokens, by_call.temperature, by_call.top_k) == (100, 0.5, 20)
    assert (by_call.seed, by_call.stop, by_call.min_p) == (8, ("x",), 0.1)


def test_mappings_are_joined_by_key() -> None:
    entry = catalogue(chat_template_kwargs={"enable_thinking": True, "tone": "dry"})
    own = replace(get("cot"), chat_template_kwargs={"enable_thinking": False})
    assert resolve(entry, "m", own).chat_template_kwargs == {"enable_thinking": False, "tone": "dry"}


def test_samples_of_a_vote_are_never_greedy() -> None:
    greedy, warm = GenerationSettings(temperature=0), GenerationSettings(temperature=0.2)
    sampled = get("self-consistency:cot:3")
    assert resolve(catalogue(), "m", sampled, greedy).temperature == 0.7
    assert resolve(catalogue(), "m", sampled, warm).temperature == 0.2


@pytest.mark.parametrize(
    ("entry", "strategy", "call", "total", "thought"),
    [
        ({}, {}, {}, 400 + 8192, 8192),
        ({}, {"max_new_tokens": 32}, {}, 32 + 8192, 8192),
        ({"thinking_budget": 1000}, {}, {}, 1400, 1000),
        ({"thinking_budget": 1000}, {"thinking_budget": 512}, {}, 912, 512),
        ({"max_new_tokens": 5000}, {}, {}, 5000, 4600),
        ({"max_new_tokens": 5000}, {"max_new_tokens": 32}, {}, 5000, 4968),
        ({}, {}, {"max_new_tokens": 1000}, 1000, 600),
        ({}, {}, {"max_new_tokens": 100}, 100, 50),
        ({}, {}, {"max_new_tokens": 1000, "thinking_budget": 200}, 1000, 200),
        ({}, {}, {"thinking_budget": 0}, 400, 0),
    ],
)
def test_a_thought_comes_on_top_of_the_answer(
    entry: dict[str, int], strategy: dict[str, int], call: dict[str, int], total: int, thought: int
) -> None:
    own: Strategy = replace(get("cot"), **strategy)
    found = resolve(catalogue(True, **entry), "m", own, GenerationSettings.of(**call))
    assert (found.max_new_tokens, found.thinking_budget) == (total, thought)


def test_a_default_thought_fits_the_context() -> None:
    found = resolve(catalogue(True, context=2000), "m", get("cot"))
    assert found.max_new_tokens <= 1200


def test_a_system_turn_of_the_entry_stands_before_the_strategys() -> None:
    strategy: Any = get("cot")
    text = prompt(catalogue(system="Think hard.")["m"], strategy, QUERY)[0]["content"]
    assert text == f"Think hard.\n\n{strategy.system}"
    own = prompt(catalogue(system="Think hard.")["m"], replace(strategy, system="Be short."), QUERY)
    assert own[0]["content"] == "Be short."
    asked = prompt(catalogue(system="Think hard.")["m"], strategy, QUERY, GenerationSettings(system="Sing."))
    assert asked[0]["content"] == "Sing."
    assert prompt(catalogue(system="Think hard.")["m"], get("chat"), QUERY)[0]["content"] == "Think hard."


def test_an_entry_without_a_system_turn_keeps_the_instructions() -> None:
    strategy: Any = get("direct")
    folded = prompt(catalogue(system="")["m"], strategy, QUERY)
    assert folded == [{"role": "user", "content": f"{strategy.system}\n\n{QUERY.text}"}]
    none = prompt(catalogue(system="")["m"], strategy, QUERY, GenerationSettings(system=""))
    assert none == [{"role": "user", "content": QUERY.text}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": True}, "true is no value"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"extra_body": {"max_tokens": 9}}, "max_tokens decides what a call can cost"),
        ({"extra_body": {"n": 2}}, "n decides"),
        ({"chat_template_kwargs": {"tokenize": False}}, "no variable"),
        ({"extra_body": {"x": object()}}, "not plain JSON"),
        ({"max_tokenz": 3}, "did you mean"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerationSettings.of(**values)


def test_keywords_name_max_tokens_as_apis_do() -> None:
    settings = GenerationSettings.from_keywords({"max_tokens": 5, "stop": "x", "temperature": None})
    assert settings.given == {"max_new_tokens": 5, "stop": ("x",)}
    with pytest.raises(InputError, match="did you mean 'max_tokens'"):
        GenerationSettings.from_keywords({"max_token": 5})


@pytest.mark.parametrize(
    ("model", "sends"), [("openai/gpt-4o", True), ("openai/o3", False), ("openai/gpt-5-mini", False)]
)
def test_the_default_temperature_is_not_sent_where_it_is_refused(model: str, sends: bool) -> None:
    spec = ModelSpec(name="far", description="Far.", kind="remote", context_length=9000, litellm_model=model)
    request = RemoteModel(spec, key="k").request([{"role": "user", "content": "?"}], Generation(100))
    assert ("temperature" in request) is sends


def test_what_only_some_servers_take_goes_beside_openais_fields() -> None:
    spec = ModelSpec(
        name="far",
        description="Far.",
        kind="remote",
        context_length=9000,
        litellm_model="openai/x",
        api_base="http://127.0.0.1:1/v1",
    )
    generation = Generation(100, min_p=0.1, chat_template_kwargs={"a": 1}, extra_body={"b": 2})
    request = RemoteModel(spec).request([{"role": "user", "content": "?"}], generation)
    assert request["extra_body"] == {"chat_template_kwargs": {"a": 1}, "b": 2, "min_p": 0.1}


@pytest.mark.parametrize(
    ("model", "room"),
    [
        ("openai/o3", True),
        ("openrouter/openai/o3", True),
        ("gpt-5", True),
        ("openai/gpt-5.1", False),  # thinks only where it is asked, as Claude does
        ("anthropic/claude-sonnet-4-5", False),
        ("openai/gpt-4o", False),
    ],
)
def test_a_remote_model_that_thinks_by_litellms_list_gets_room_for_it(model: str, room: bool) -> None:
    spec = ModelSpec(
        name="far", description="Far.", kind="remote", context_length=90_000, litellm_model=model
    )
    models = Catalogue([spec])
    assert resolve(models, "far", get("cot")).max_new_tokens == (8592 if room else 400)
    asked = resolve(models, "far", get("cot"), GenerationSettings.of(reasoning_effort="low"))
    assert asked.max_new_tokens == 8592


def test_a_provider_without_stops_is_sent_none() -> None:
    spec = ModelSpec(
        name="far", description="Far.", kind="remote", context_length=9000, litellm_model="gpt-5"
    )
    model = RemoteModel(spec, key="k")
    assert model.cuts_stops
    assert "stop" not in model.request([{"role": "user", "content": "?"}], Generation(100, stop=("Q:",)))
