"""The splitter of thoughts and text, on every family's tags and on every cut of a text into pieces."""

from __future__ import annotations

import itertools
import random
import tracemalloc

import pytest

from viaticum.catalogue import ModelSpec
from viaticum.thinking import (
    AUTO,
    FORMATS,
    HARMONY,
    ThinkingFormat,
    ThinkingSplitter,
    format_named,
    format_of_family,
)
from viaticum.types import ThinkingDelta

THINK = format_named("think")
OPENED = format_named("think", opened=True)


def split(
    text: str, format: ThinkingFormat = THINK, inside: bool | None = None, size: int = 0, ended: bool = True
) -> tuple[str, str]:
    """(thinking, text), from pieces of `size` characters; both as they were streamed."""
    splitter = ThinkingSplitter(format, inside)
    size = size or max(1, len(text))
    pieces = [splitter.push(text[start : start + size]) for start in range(0, len(text), size)]
    shown = list(itertools.chain(*pieces, splitter.finish(ended=ended)))
    streamed = "".join(each.text for each in shown if isinstance(each, ThinkingDelta))
    if splitter.thinking:
        assert streamed == splitter.thinking
    return splitter.thinking, "".join(each for each in shown if isinstance(each, str))


CASES = [
    ("<think>\n2 + 2 = 4\n</think>\n\nThe answer is 4.", THINK, None, "2 + 2 = 4", "The answer is 4."),
    ("\n\n<think>a</think>b", THINK, None, "a", "b"),
    ("<think>\n\n</think>\n\nno thought", THINK, None, "", "no thought"),
    ("2 + 2 = 4\n</think>\n\n4", OPENED, None, "2 + 2 = 4", "4"),
    ("<think>\n2 + 2 = 4\n</think>\n\n4", OPENED, None, "2 + 2 = 4", "4"),
    ("2 + 2 = 4\n</think>\n\n4", THINK, True, "2 + 2 = 4", "4"),
    ("<think>again</think>4", THINK, True, "again", "4"),
    ("plain, no tag at all\n", OPENED, None, "", "plain, no tag at all\n"),
    (
        "plain after a prompt that opened a thought",
        OPENED,
        True,
        "plain after a prompt that opened a thought",
        "",
    ),
    ("<think>never closed", THINK, None, "never closed", ""),
    ("<think>a</think><think>b</think> c", THINK, None, "a\n\nb", "c"),
    ("<think>a</think>\none\n<think>b</think>\ntwo", THINK, None, "a\n\nb", "one\ntwo"),
    ("<think>a</think></think>\n4", THINK, None, "a", "4"),
    ("<think>a</think>Write <think>x</think> so.", THINK, None, "a", "Write <think>x</think> so."),
    ("<think>a</think>`</think>` ends it", THINK, None, "a", "`</think>` ends it"),
    (
        "<think>a</think>\n```\n<think>x</think>\n```\nso",
        THINK,
        None,
        "a",
        "```\n<think>x</think>\n```\nso",
    ),
    ("The tag <think> opens, </think> closes.", THINK, None, "", "The tag <think> opens, </think> closes."),
    ("  <thinner than that\n", THINK, None, "", "  <thinner than that\n"),
    ("<think>a < b </thin> c</think>d", THINK, None, "a < b </thin> c", "d"),
    ("<think>a <think> b</think>c", THINK, None, "a <think> b", "c"),
    ("[THINK]a[/THINK]b", AUTO, None, "a", "b"),
    ("<thought>a</think></thought>b", AUTO, None, "a</think>", "b"),
    ("Hello <think>a</think>", AUTO, None, "", "Hello <think>a</think>"),
    ("◁think▷a◁/think▷b", format_named("kimi"), None, "a", "b"),
    ("<seed:think>a</seed:think>b", format_named("seed"), None, "a", "b"),
    (
        "<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>b<|END_RESPONSE|>",
        format_named("cohere"),
        None,
        "a",
        "b",
    ),
    (
        "Here's my thought process: a\nHere is my response: b",
        format_named("granite"),
        None,
        "a",
        "b",
    ),
    ("<think>a</think>\n<response>\nb\n</response>\n", format_named("response"), None, "a", "b"),
    ("steps\n[BEGIN FINAL RESPONSE]\nb\n[END FINAL RESPONSE]", format_named("apriel"), True, "steps", "b"),
    (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>",
        HARMONY,
        None,
        "a",
        "b",
    ),
    (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary to=f <|constrain|>json"
        "<|message|>{}<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>b <|channel|> c",
        HARMONY,
        None,
        "a\n\n{}",
        "b <|channel|> c",
    ),
    ("a<|end|><|start|>assistant<|channel|>final<|message|>b", HARMONY, True, "a", "b"),
    (
        "<|channel|>commentary?? to=x<|channel|>analysis<|message|>a<|end|>stray words<|channel|>final"
        "<|message|>b",
        HARMONY,
        None,
        "a",
        "b",
    ),
    (
        "<|channel|>analysis??<|end|><|start|>assistant<|channel|>final<|message|>b",
        HARMONY,
        None,
        "",
        "b",
    ),
    ("<|channel|>analysis<|message|>never ends", HARMONY, None, "never ends", ""),
    ("no channels", HARMONY, None, "", "no channels"),
    ("b", HARMONY, False, "", "b"),
]


@pytest.mark.parametrize(("text", "format", "inside", "thinking", "answer"), CASES)
def test_a_text_is_split_the_same_way_in_pieces_of_any_size(
    text: str, format: ThinkingFormat, inside: bool | None, thinking: str, answer: str
) -> None:
    for size in (0, 1, 2, 3, 5, 7, 11):
        assert split(text, format, inside, size) == (thinking, answer), size


def test_a_cut_text_without_tags_of_a_model_that_always_thinks_is_a_thought() -> None:
    assert split("so far so good", OPENED, ended=False) == ("so far so good", "")
    assert split("<think>so far", THINK, ended=False) == ("so far", "")


def test_random_texts_without_a_thought_are_returned_byte_by_byte() -> None:
    rng = random.Random(7)
    alphabet = ["<", "think>", "/", "\n", " ", "x", "é", "`", "[THINK", "<|", "channel|>"]
    for _ in range(2000):
        text = "x" + "".join(rng.choices(alphabet, k=rng.randrange(12)))
        for each in (THINK, AUTO, HARMONY, ThinkingFormat()):
            assert split(text, each, size=rng.randrange(1, 5)) == ("", text)


def test_a_format_that_is_off_splits_nothing() -> None:
    assert split("<think>a</think>b", ThinkingFormat()) == ("", "<think>a</think>b")


def test_a_thought_that_came_apart_from_the_text() -> None:
    splitter = ThinkingSplitter(OPENED)
    assert splitter.follow_thought("let me ") == [ThinkingDelta("let me")]
    assert splitter.follow_thought("think\n") == [ThinkingDelta(" think")]
    assert splitter.push("\n\nThe answer") == ["The answer"]
    assert splitter.push(" is 4.") == [" is 4."]
    assert splitter.finish() == []
    assert splitter.thinking == "let me think"


def test_what_a_prompt_says_about_the_beginning() -> None:
    assert OPENED.inside_after("<｜Assistant｜><think>\n") is True
    assert OPENED.inside_after("<|im_start|>assistant\n<think>\n\n</think>\n\n") is False
    assert OPENED.inside_after("<|im_start|>assistant\n") is None
    assert HARMONY.inside_after("<|start|>assistant<|channel|>analysis<|message|>") is True
    assert HARMONY.inside_after("<|start|>assistant<|channel|>final<|message|>") is False
    assert HARMONY.inside_after("<|start|>assistant") is None


@pytest.mark.parametrize(
    ("name", "open", "opened"),
    [
        ("openai/deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "<think>", True),
        ("Qwen/QwQ-32B", "<think>", True),
        ("Qwen/Qwen3-8B", "<think>", False),
        ("Qwen/Qwen3-4B-Thinking-2507", "<think>", True),
        ("zai-org/GLM-4.5-Air", "<think>", False),
        ("MiniMaxAI/MiniMax-M2", "<think>", True),
        ("mistralai/Magistral-Small-2507", "[THINK]", False),
        ("ByteDance-Seed/Seed-OSS-36B-Instruct", "<seed:think>", False),
        ("ibm-granite/granite-3.2-8b-instruct", "Here is my thought process:", False),
        ("moonshotai/Kimi-VL-A3B-Thinking", "◁think▷", False),
        ("LGAI-EXAONE/EXAONE-Deep-7.8B", "<thought>", True),
    ],
)
def test_families_are_known_by_name(name: str, open: str, opened: bool) -> None:
    found = format_of_family(name)
    assert (found.tags[0].open[0], found.opened, found.thinks) == (open, opened, True)


def test_models_that_do_not_think_are_of_no_family() -> None:
    names = ("Qwen/Qwen2.5-Coder-1.5B-Instruct", "Qwen/Qwen3-Coder-30B", "Qwen/Qwen3-4B-Instruct-2507")
    for name in (*names, "openai/gpt-5-mini", "HuggingFaceTB/SmolLM2-135M-Instruct", "openai/fake"):
        assert format_of_family(name) is AUTO
    assert format_of_family("openai/gpt-oss-20b") is HARMONY


def a_spec(**fields: object) -> ModelSpec:
    settings = {
        "name": "far",
        "description": "d",
        "kind": "remote",
        "context_length": 10,
        "litellm_model": "openai/x",
    }
    return ModelSpec.model_validate(settings | fields)


def test_the_catalogue_says_how_a_model_thinks() -> None:
    assert a_spec().thinking_format is AUTO
    assert a_spec(thinking=False).thinking_format == ThinkingFormat()
    assert a_spec(thinking=True).thinking_format == OPENED
    assert a_spec(thinking="harmony").thinking_format is HARMONY
    assert a_spec(litellm_model="openai/magistral-small").thinking_format.tags == (FORMATS["mistral"],)
    own = a_spec(thinking={"open": "<r>", "close": "</r>"}).thinking_format
    assert split("<r>a</r>b", own) == ("a", "b")
    with pytest.raises(ValueError, match="unknown format 'thought process' of thoughts"):
        a_spec(thinking="thought process")
    with pytest.raises(ValueError, match="pattern"):
        a_spec(thinking={"open": "<r> ", "close": ""})


def test_thirty_thousand_tokens_stay_linear_in_memory() -> None:
    splitter = ThinkingSplitter(THINK)
    splitter.push("<think>")
    tracemalloc.start()
    try:
        for number in range(30_000):
            splitter.push(f" {number}" if number % 50 else "\n\n")
        splitter.push("</think>\n4")
        splitter.finish()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(splitter.thinking) > 150_000
    assert peak < 6_000_000  # one small string a token, no copy of the whole at each
