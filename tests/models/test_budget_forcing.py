"""Thinking budgets of local models on tiny weights: tags of the catalogue, pairs, limits, usage."""

from __future__ import annotations

import pytest

from viaticum.catalogue import Catalogue
from viaticum.errors import InputError
from viaticum.local_settings import LocalSettings
from viaticum.model_spec import ThinkingTags
from viaticum.models.base import Generation
from viaticum.models.local import LocalModel, LocalModels
from viaticum.types import Message, ThinkingDelta

CHAT: list[Message] = [{"role": "user", "content": "How many?"}]
TAGS = ThinkingTags(open="<think>", close="</think>", opened=True)


def thinking_model(catalogue: Catalogue, name: str, tags: ThinkingTags | bool = TAGS) -> LocalModel:
    spec = catalogue[name].model_copy(update={"thinking": tags})
    # In one precision on every machine: the tiny models' words depend on it.
    settled = catalogue.with_models(spec).with_local(LocalSettings.of(dtype="float32"))
    return LocalModels(settled, slots=3).model(name)


@pytest.mark.parametrize("name", ["tiny-small", "tiny-pair"])
@pytest.mark.parametrize("budget", [0, 1, 20])
def test_the_thought_is_closed_and_the_answer_written(
    tiny_catalogue: Catalogue, name: str, budget: int
) -> None:
    model = thinking_model(tiny_catalogue, name)
    *pieces, completion = model.stream(CHAT, Generation(60, thinking_budget=budget))
    closing = len(model.tokenizer.encode("\n</think>\n\n"))
    forced = completion.trace.forced
    assert forced == (False,) * budget + (True,) * closing + (False,) * (60 - budget - closing)
    assert completion.finish_reason == "length"
    assert completion.text
    assert "think>" not in completion.text + completion.thinking
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == completion.text
    thought = "".join(piece.text for piece in pieces if isinstance(piece, ThinkingDelta))
    assert thought == completion.thinking
    counts = completion.usage.models.values()
    assert sum(count.output_tokens for count in counts) == 60
    worst = model.worst_case(CHAT, 60)
    assert all(
        count.input_tokens <= worst[each].input_tokens for each, count in completion.usage.models.items()
    )


def test_the_prompt_opens_the_thought_where_the_entry_says_so(tiny_catalogue: Catalogue) -> None:
    plain = LocalModels(tiny_catalogue).model("tiny-small")
    opened = thinking_model(tiny_catalogue, "tiny-small")
    assert (
        opened.tokenizer.decode(opened.prompt(CHAT))
        == plain.tokenizer.decode(plain.prompt(CHAT)) + "<think>\n"
    )
    unopened = thinking_model(tiny_catalogue, "tiny-small", TAGS.model_copy(update={"opened": False}))
    assert unopened.prompt(CHAT) == plain.prompt(CHAT)


def test_a_budget_of_0_writes_an_empty_thought_where_the_prompt_opened_none(
    tiny_catalogue: Catalogue,
) -> None:
    model = thinking_model(tiny_catalogue, "tiny-small", TAGS.model_copy(update={"opened": False}))
    completion = model.generate(CHAT, Generation(60, thinking_budget=0))
    assert completion.trace is not None
    forced = [
        t for t, is_forced in zip(completion.trace.tokens, completion.trace.forced, strict=True) if is_forced
    ]
    assert model.tokenizer.decode(forced) == "<think>\n\n</think>\n\n"
    assert completion.thinking == ""
    assert completion.text


def test_a_cue_begins_the_answer_after_a_forced_close(tiny_catalogue: Catalogue) -> None:
    tags = TAGS.model_copy(update={"cue": "Final answer:"})
    model = thinking_model(tiny_catalogue, "tiny-small", tags)
    completion = model.generate(CHAT, Generation(60, thinking_budget=5))
    assert completion.text.startswith("Final answer:")
    assert sum(count.output_tokens for count in completion.usage.models.values()) == 60


def test_a_budget_leaves_room_for_the_answer(tiny_catalogue: Catalogue) -> None:
    model = thinking_model(tiny_catalogue, "tiny-small")
    completion = model.generate(CHAT, Generation(100, thinking_budget=8192))
    assert completion.trace is not None
    assert 100 - completion.trace.forced.index(True) >= 25


def test_no_budget_forces_nothing(tiny_catalogue: Catalogue) -> None:
    completion = thinking_model(tiny_catalogue, "tiny-small").generate(CHAT, Generation(40))
    assert completion.trace is not None
    assert not any(completion.trace.forced)
    assert completion.text == ""


def test_a_model_that_is_not_known_to_think_has_no_budget(tiny_catalogue: Catalogue) -> None:
    model = LocalModels(tiny_catalogue).model("tiny-small")
    with pytest.raises(InputError, match="set `thinking` in its catalogue entry"):
        model.generate(CHAT, Generation(40, thinking_budget=10))
    assert model.generate(CHAT, Generation(40, thinking_budget=0)) is not None
