"""A tiny local model that thinks: its weights say which token follows which, so that its text is known."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.models.base import Generation
from viaticum.models.local import LocalModels
from viaticum.types import Completion, Message, ThinkingDelta

CHAT: list[Message] = [{"role": "user", "content": "How many?"}]
CHAIN = ["<|assistant|>", "<think>", "Ċ", "a", "b", "c", "</think>", "4", ".", "<|end|>"]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
OFF = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>{% endif %}"


def write_thinker(folder: Path, template: str) -> None:
    """A Qwen2 of one layer that does nothing: the token after one of CHAIN is the next of CHAIN."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ("<|assistant|>", "<think>", "</think>")
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=template)
    fast.save_pretrained(folder)
    size = len(fast)
    config = Qwen2Config(
        vocab_size=size,
        hidden_size=320,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, :size] = torch.eye(size)
        ids = fast.convert_tokens_to_ids(CHAIN)
        for before, after in itertools.pairwise(ids):
            model.lm_head.weight[after, before] = 10.0
    model.save_pretrained(folder)


def ask(
    folder: Path, template: str, generation: Generation | None = None, begun: str = "", **fields: object
) -> tuple[str, str, Completion]:
    """(streamed text, streamed thought, completion). begun: the answer's beginning, which is continued."""
    prefill: list[Message] = [{"role": "assistant", "content": begun}] if begun else []
    write_thinker(folder, template)
    settings = {
        "name": "thinker",
        "description": "d",
        "kind": "local",
        "context_length": 1024,
        "sources": [{"type": "path", "path": str(folder)}],
        "input_price": 1,
        "output_price": 1,
    }
    catalogue = Catalogue([ModelSpec.model_validate(settings | fields)])
    *pieces, completion = (
        LocalModels(catalogue).model("thinker").stream(CHAT + prefill, generation or Generation(30))
    )
    assert isinstance(completion, Completion)
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return text, "".join(each.text for each in pieces if isinstance(each, ThinkingDelta)), completion


@pytest.mark.parametrize(
    ("end", "reasoning", "written"), [("", 6, 9), ("<think>", 5, 8), ("<think>{{ '\\n' }}", 4, 7)]
)
def test_the_tag_is_written_by_the_model_or_by_its_template(
    tmp_path: Path, end: str, reasoning: int, written: int
) -> None:
    text, thinking, completion = ask(tmp_path, TEMPLATE + end, Generation(30, stop=("b",)))
    assert (text, thinking) == ("4.", "abc") == (completion.text, completion.thinking)
    count = completion.usage.models["thinker"]
    assert (count.output_tokens, count.reasoning_tokens) == (written, reasoning)
    assert completion.finish_reason == "stop"


def test_a_stop_string_ends_the_text_after_the_thought(tmp_path: Path) -> None:
    text, _, completion = ask(tmp_path, TEMPLATE, Generation(30, stop=(".",)))
    assert (text, completion.text, completion.thinking) == ("4", "4", "abc")


def test_a_thought_that_is_cut_off_leaves_no_text(tmp_path: Path) -> None:
    for end in ("", "<think>"):
        text, thinking, completion = ask(tmp_path, TEMPLATE + end, Generation(4))
        assert (text, completion.text, completion.finish_reason) == ("", "", "length")
        assert thinking == completion.thinking == ("ab" if not end else "abc")


def test_a_template_that_closes_the_thought_leaves_plain_text(tmp_path: Path) -> None:
    off = Generation(30, chat_template_kwargs={"enable_thinking": False})
    text, thinking, completion = ask(tmp_path, TEMPLATE + OFF, off, thinking=True)
    assert (text, thinking) == ("4.", "")
    assert completion.usage.models["thinker"].reasoning_tokens == 0


def test_a_model_that_is_not_split_keeps_its_text(tmp_path: Path) -> None:
    text, thinking, completion = ask(tmp_path, TEMPLATE, thinking=False)
    assert (text, thinking) == ("<think>\nabc</think>4.", "")
    assert completion.thinking == ""


@pytest.mark.parametrize(
    ("begun", "text", "thought", "budget"),
    [
        ("<think>\na", "4.", "bc", None),
        ("<think>\na", "abc</think>4.", "b", 1),  # "a" is what this model writes after a new line
        ("<think>\nabc</think>4", ".", "", 0),
        ("4", ".", "", 0),
        ("4", ".", "", None),
    ],
)
@pytest.mark.parametrize("opened", [False, True])
def test_an_answer_that_was_begun_goes_on_inside_its_thought_or_after_it(
    tmp_path: Path, begun: str, text: str, thought: str, budget: int | None, opened: bool
) -> None:
    """Whatever the model's template does where an answer is not begun."""
    shown, thinking, completion = ask(
        tmp_path,
        TEMPLATE,
        Generation(30, thinking_budget=budget),
        begun,
        thinking={"open": "<think>", "close": "</think>", "opened": opened},
    )
    assert (shown, thinking) == (text, thought) == (completion.text, completion.thinking)
    tokens = completion.usage.models["thinker"].output_tokens
    assert tokens == len(completion.trace.tokens if completion.trace else ())
