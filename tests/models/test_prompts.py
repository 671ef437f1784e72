"""Chat templates as published models have them: their own BOS, dates, roles that must alternate."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from viaticum.catalogue import Catalogue
from viaticum.decoders.text import TextStream
from viaticum.errors import InputError
from viaticum.messages import with_history
from viaticum.models.base import Generation
from viaticum.models.local import LocalModel, LocalModels
from viaticum.types import Message

# As Mistral's: roles alternate, the first one is the user's, no system turn.
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# As Llama 3.1's, Mistral Small 3's and Granite's: the day of the call stands in the system turn.
DATED = (
    "{{ bos_token }}Today Date: {{ strftime_now('%d %b %Y') }}\n"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


@pytest.fixture
def model(tiny_catalogue: Catalogue) -> LocalModel:
    """A model whose tokenizer, as those of Llama and Gemma, also puts a BOS before every text."""
    found = LocalModels(tiny_catalogue).model("tiny-small")
    found.tokenizer.bos_token = found.tokenizer.eos_token
    found.tokenizer.add_bos_token = True
    found.tokenizer.chat_template = ALTERNATING
    return found


def rendered(model: LocalModel, messages: list[Message]) -> str:
    text = model.tokenizer.decode(model.prompt(messages, Generation()))
    assert isinstance(text, str)
    return text


def test_a_prompt_has_the_bos_that_its_template_writes_and_no_other(model: LocalModel) -> None:
    bos = model.tokenizer.bos_token_id
    assert model.tokenizer("x")["input_ids"][0] == bos, "the tokenizer puts one too"
    prompt = model.prompt([{"role": "user", "content": "How many?"}], Generation())
    assert prompt[0] == bos
    assert prompt.count(bos) == 1


def test_roles_alternate_whatever_the_conversation(model: LocalModel) -> None:
    history: list[Message] = [
        {"role": "user", "content": "Hello."},
        {"role": "user", "content": "Anyone?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "assistant", "content": "Here."},
        {"role": "system", "content": "Be brief."},
    ]
    own: list[Message] = [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "How many?"},
    ]
    text = rendered(model, with_history(history, own))
    turns = re.findall(r"\[INST\] (.*?) \[/INST\]", text, re.DOTALL)
    assert turns == ["Count.\n\nBe brief.\n\nHello.\n\nAnyone?", "How many?"]
    assert "[/INST]Yes.\n\nHere.<|end|>[INST]" in text


def test_a_chat_that_a_template_refuses_is_told_in_its_words(model: LocalModel) -> None:
    chat: list[Message] = [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "How many?"}]
    with pytest.raises(InputError, match=r"tiny-small cannot read these messages: .*must alternate"):
        model.prompt(chat, Generation())


@pytest.mark.parametrize(
    "expression",
    ["m.content + 1", "1 / 0", "m.content.split(0)", "m.content[0:'a']", "m.content.encode('no')"],
)
def test_an_expression_that_fails_on_a_chat_refuses_it(model: LocalModel, expression: str) -> None:
    model.tokenizer.chat_template = f"{{% for m in messages %}}{{{{ {expression} }}}}{{% endfor %}}"
    with pytest.raises(InputError, match=r"tiny-small cannot read these messages: .*fails on them"):
        model.prompt([{"role": "user", "content": "How many?"}], Generation())


def test_a_last_turn_of_the_assistant_is_continued(model: LocalModel) -> None:
    chat: list[Message] = [
        {"role": "user", "content": "Six times seven?"},
        {"role": "assistant", "content": "The answer is"},
    ]
    assert rendered(model, chat).endswith("[INST] Six times seven? [/INST]The answer is")
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}{% endfor %}"
    with pytest.raises(InputError, match="cannot continue"):
        model.prompt(chat, Generation())


def test_a_template_may_ask_for_the_date(model: LocalModel) -> None:
    model.tokenizer.chat_template = DATED
    before = date.today()
    text = rendered(model, [{"role": "user", "content": "Which day?"}])
    days = {each.strftime("%d %b %Y") for each in (before, date.today())}
    assert any(f"Today Date: {day}\nuser: Which day?" in text for day in days)


def test_a_date_given_as_a_variable_stands_in_its_place(model: LocalModel) -> None:
    model.tokenizer.chat_template = "{{ date_string or strftime_now('%Y') }}: {{ messages[0].content }}"
    chat: list[Message] = [{"role": "user", "content": "Which day?"}]
    ids = model.prompt(chat, Generation(chat_template_kwargs={"date_string": "26 Jul 2024"}))
    assert model.tokenizer.decode(ids) == "26 Jul 2024: Which day?"


def test_a_space_before_a_full_stop_stays_however_a_text_is_decoded(tmp_path: Path) -> None:
    """Cleaned up, as a tokenizer's settings may ask for, a text in pieces would lack whole tokens."""
    pieces = [
        ("<unk>", 0.0),
        ("\u2581the", -1.0),
        (".", -1.0),
        ("\u2581.", -1.0),
        ("\u2581", -1.0),
        ("x", -1.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, 0))
    tokenizer.decoder = decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True).save_pretrained(
        tmp_path
    )
    loaded = LocalModels(Catalogue([])).tokenizer(tmp_path)
    ids = [1, 4, 2, 1, 3, 5, 4, 2]
    stream = TextStream(loaded)
    text = "".join([stream.push(token).text for token in ids]) + stream.finish().text
    assert text == loaded.decode(ids) == "the . the .x ."
