"""A pair of 97 and 112 rows of logits over one tokenizer, as local models load and prompt it."""

from __future__ import annotations

from pathlib import Path

import pytest
from padded_pair import LARGE_ROWS, SMALL_ROWS, TEMPLATE, write_padded_pair

from viaticum.catalogue import Catalogue
from viaticum.models.base import Generation
from viaticum.models.local import LocalModels
from viaticum.types import Completion

pytestmark = pytest.mark.usefixtures("one_thread")
CHATS = [[{"role": "user", "content": f"How many hens are {number} hens?"}] for number in range(6)]


@pytest.mark.parametrize("name", ["padded-small", "padded-large", "padded"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_text_has_a_token_that_the_tokenizer_lacks(name: str, temperature: float, tmp_path: Path) -> None:
    file, ids = write_padded_pair(tmp_path)
    model = LocalModels(Catalogue.load(file), slots=3).model(name)
    seen: set[int] = set()
    for _, completion in model.generate_all(CHATS, Generation(40, temperature=temperature)):
        assert completion.trace is not None
        seen.update(completion.trace.tokens)
    assert seen
    assert seen <= ids
    rows = LARGE_ROWS if name == "padded-large" else SMALL_ROWS
    assert model.vocabulary(model.pool.runners(name)).rows == rows


def test_each_model_of_a_pair_reads_its_own_template(tmp_path: Path) -> None:
    file, _ = write_padded_pair(tmp_path, small_template="S:" + TEMPLATE)
    model = LocalModels(Catalogue.load(file)).model("padded")
    prompt = model.prompt(CHATS[0])
    own = model.small_prompt(CHATS[0])
    assert own is not None
    assert model.tokenizer.decode(own) == "S:" + model.tokenizer.decode(prompt)
    done = [each for each in model.stream(CHATS[0], Generation(8)) if isinstance(each, Completion)]
    tokens = done[0].usage.models
    assert tokens["padded-small"].input_tokens == len(prompt) + 2
    if "padded-large" in tokens:
        assert tokens["padded-large"].input_tokens == len(prompt)
    worst = model.worst_case(CHATS[0], 8)
    assert [worst[name].input_tokens for name in model.members] == [len(prompt) + 2, len(prompt)]


def test_equal_templates_are_rendered_once(tmp_path: Path) -> None:
    file, _ = write_padded_pair(tmp_path)
    model = LocalModels(Catalogue.load(file)).model("padded")
    assert model.small_prompt(CHATS[0]) is None
    assert model.vocabulary([]).rows == SMALL_ROWS, "known before anything is loaded"
