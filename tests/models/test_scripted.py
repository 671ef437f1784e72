"""The models and routers that ship for users' own tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from viaticum import FakeRouter, InputError, ScriptedModel, Viaticum
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import ModelError, PromptTooLong
from viaticum.models.base import Generation
from viaticum.types import Completion, Message, TokenCount

CHAT: list[Message] = [{"role": "user", "content": "six times seven"}]


def test_an_app_runs_offline_under_a_budget(tmp_path: Path) -> None:
    model = ScriptedModel("Six times seven. The answer is 42.")
    router = FakeRouter("scripted+cot")
    with Viaticum("0.01", models={"scripted": model}, router=router, folder=tmp_path) as client:
        answer = client.solve("What is 6 * 7?", kind="number")
        assert answer.value == "42"
        assert answer.cost == 1000 * (answer.usage.input_tokens + answer.usage.output_tokens) > 0
        assert client.budget().posted_nanousd == answer.cost
    assert len(model.calls) == 1
    assert model.calls[0][0][-1]["content"].endswith("What is 6 * 7?")


def test_the_router_wants_pairs_in_their_order(tmp_path: Path) -> None:
    models = {name: ScriptedModel(text, name=name) for name, text in (("a", "no idea"), ("b", "7"))}
    with Viaticum(
        "0.01", models=models, router=FakeRouter("a+direct", "b+direct"), folder=tmp_path
    ) as client:
        answer = client.solve("What is 3 + 4?", kind="number")
    assert [str(route.pair) for route in answer.routes] == ["a+direct", "b+direct"]
    assert answer.value == "7"


def test_scripts() -> None:
    turns = ScriptedModel(["one", ModelError("it broke"), "two"])
    assert turns.generate(CHAT, Generation()).text == "one"
    with pytest.raises(ModelError, match="it broke"):
        turns.generate(CHAT, Generation())
    assert [turns.generate(CHAT, Generation()).text for _ in range(2)] == ["two", "two"]
    echo = ScriptedModel(lambda messages, generation: f"{messages[-1]['content']}, {generation.seed}")
    assert echo.generate(CHAT, Generation(seed=3)).text == "six times seven, 3"


def test_length_stop_and_counts() -> None:
    model = ScriptedModel("a b c. d e")
    assert model.worst_case(CHAT, 5) == {"scripted": TokenCount(3, 5)}
    *pieces, completion = model.stream(CHAT, Generation(max_new_tokens=2))
    assert isinstance(completion, Completion)
    assert ("".join(map(str, pieces)), completion.text, completion.finish_reason) == ("a b", "a b", "length")
    assert completion.usage.models == {"scripted": TokenCount(3, 2)}
    stopped = model.generate(CHAT, Generation(stop=(".",)))
    assert (stopped.text, stopped.finish_reason) == ("a b c", "stop")
    with pytest.raises(PromptTooLong):
        model.worst_case(CHAT, 40_000)


def test_a_catalogue_may_hold_scripted_models(tmp_path: Path) -> None:
    file = tmp_path / "catalogue.toml"
    file.write_text(
        '[models.echo]\ndescription = "Says yes."\nkind = "scripted"\ntext = "yes"\ncontext_length = 100\n'
        "input_price = 1.0\noutput_price = 2.0\n"
    )
    with Viaticum("0.01", catalogue=file, router=FakeRouter("echo+direct"), folder=tmp_path) as client:
        assert client.solve("Is water wet?", kind="boolean").value is not None
    with pytest.raises(ValueError, match="takes no text"):
        ModelSpec.model_validate(Catalogue.load()["smollm2-135m"].model_dump() | {"text": "x"})


@pytest.mark.parametrize("pairs", [(), ({"a+cot": 1.5},)])
def test_bad_pairs(pairs: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="accuracies from 0 to 1"):
        FakeRouter(*pairs)
    with pytest.raises(InputError, match="not a pair"):
        FakeRouter("cot")


def test_an_empty_script_is_refused() -> None:
    with pytest.raises(InputError, match="empty script"):
        ScriptedModel([])
