"""What a model wrote, without what is no part of its words: thoughts, markup, invisible characters.

Everything here is one pass of a pattern over the text. Leaves out LaTeX (`numbers.clean`), which is part of
a value, and thoughts that a model gives apart from its text.
"""

from __future__ import annotations

import re

_THOUGHT_END = re.compile(
    r"</(?:seed:)?(?:think|thinking|thought|reasoning)>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>"
    r"|<\|end_of_thought\|>|<\|channel\|>\s?final\s?<\|message\|>"
)
_THOUGHT_BEGIN = re.compile(
    r"<(?:seed:)?(?:think|thinking|thought)>|\[THINK\]|◁think▷|<\|START_THINKING\|>|<\|begin_of_thought\|>"
    r"|(?:<\|start\|>assistant)?<\|channel\|>(?!\s?final)"
)
_THOUGHT_WORDS = ("think", "THINK", "thought", "reasoning", "<|channel|>")
_FENCE = re.compile(r"^[ \t]{0,8}(?:```|~~~)[\w+-]{0,20}[ \t]{0,8}\r?$", re.MULTILINE)
_TAG = re.compile(
    r"</?(?:b|strong|i|em|u|p|span|div|mark|code|font|center|big|small|li|ul|ol|h[1-6])(?:\s[^<>\n]{0,100})?>"
    r"|<B>(?=\S[^<\n]{0,200}</B>)|</B>"
)
_LINE_BREAK = re.compile(r"<br\s?/?>|\r\n?", re.IGNORECASE)
_CONFIDENCE = re.compile(
    r"^\W{0,6}(?:my )?confidence(?: level| score)?\W{1,6}(?:about )?[\d.]{1,6}\s?%?[^\n\w]{0,6}$", re.I | re.M
)
_RAISED = re.compile(r"<sup>([^<>]{1,20})</sup>", re.IGNORECASE)
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>\n]{1,40}\|>|</?s>|<(?:eos|bos|pad|end_of_turn)>|\[/?INST\]")
# After it a model that did not stop goes on with a turn of somebody else.
_TURN_END = re.compile(
    r"(?:<\|(?:endoftext|im_end|eot_id|eom_id)\|>|<｜end▁of▁sentence｜>|</s>|<end_of_turn>|<eos>)"
    r"(?!\s{0,4}<[^<>\s]{1,20}>\s?(?:assistant|model))"
)
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe0e\ufe0f\ufeff]")
# Two stars are a power between numbers, names and brackets, else they mark bold words.
_STARS = re.compile(r"(?<![0-9)\]])\*\*(?!\*)|\*\*(?![\s]?[-+(0-9A-Za-z])")
_NAME_STARS = re.compile(r"(?:(?<=[^A-Za-z][A-Za-z])|(?<=^[A-Za-z]))\*\*(?=[-(\d])")
_UNDERSCORES = re.compile(r"(?<![\w\\])__(?=\S)|(?<=[^\s_])__(?!\w)")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
_WRITTEN_NEWLINE = re.compile(r"\\n(?![A-Za-z])")  # in JSON that was escaped twice
_POWER = "\x00"


def spoken(text: str) -> str:
    """The text after its thoughts, up to the end of its turn; empty where a thought was never closed."""
    if "<" not in text and "[" not in text and "◁" not in text:
        return text
    if not any(word in text for word in _THOUGHT_WORDS):  # much faster than a pattern on a long text
        return _one_turn(text)
    ends = None
    for ends in _THOUGHT_END.finditer(text):  # noqa: B007 - the last one
        pass
    if ends is not None:
        text = text[ends.end() :]
    begins = _THOUGHT_BEGIN.search(text)
    return _one_turn(text if begins is None else text[: begins.start()])


def _one_turn(text: str) -> str:
    for end in _TURN_END.finditer(text):
        if text[: end.start()].strip() and not (end[0] == "</s>" and "<s>" in text):
            return text[: end.start()]
    return text


def plain(text: str) -> str:
    """The text without markup: bold, code, HTML, fences, special tokens; full-width letters as usual ones."""
    if not text.isascii():
        text = _INVISIBLE.sub("", text.translate(_FULL_WIDTH))
    if "<" in text or "[" in text:
        text = _RAISED.sub(r"^{\1}", _SPECIAL_TOKEN.sub("", text))
        text = _TAG.sub("", _LINE_BREAK.sub("\n", text))
    text = _CONFIDENCE.sub("", _WRITTEN_NEWLINE.sub("\n", text))
    text = text.replace("\r", "\n").replace("\x08oxed", "\\boxed").replace("\x0crac", "\\frac")
    text = _FENCE.sub("", text).replace("```", " ").replace("`", "")
    text = _STARS.sub("", _NAME_STARS.sub(_POWER, text)).replace(_POWER, "**")
    return _UNDERSCORES.sub("", text)
