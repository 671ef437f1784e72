"""Split a growing text into thought and text by the tags around the thought.

A `ThinkingFormat` says which tags a model writes: by the family of its name, by its catalogue entry, or, for
an unknown model, any well-known tag that the text begins with. `ThinkingSplitter` takes the text in pieces of
any size, and gives back pieces of thought and text without tags; gpt-oss (harmony) has channels in place of
tags. Time and memory are linear in the text. Standard library only: the decoders use it on a bare CUDA image.
Leaves out tokens, stop strings and models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from viaticum.types import ThinkingDelta

Piece = str | ThinkingDelta


@dataclass(frozen=True, slots=True)
class Tags:
    """What stands around a thought: other spellings of its opening and its closing tag, each at least one.

    answer: tags around the answer that follows, which are no text either.
    """

    open: tuple[str, ...]
    close: tuple[str, ...]
    answer: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class ThinkingFormat:
    """How the text of one model shows its thoughts.

    Attributes:
        tags: the tags that may open a thought; empty for a text that is never split.
        thinks: the model is known to think, so that a call has to leave room for it.
        opened: the text begins inside the thought unless the prompt says otherwise: the chat template writes
            the opening tag.
        harmony: the thought is in the channels of gpt-oss.
        cue: what the answer begins with where the end of the thought was forced, such as "Final answer:".
    """

    tags: tuple[Tags, ...] = ()
    thinks: bool = False
    opened: bool = False
    harmony: bool = False
    cue: str = ""

    @property
    def close(self) -> str:
        """What ends a thought, to be forced when its budget is used up; empty where nothing is split."""
        if self.harmony:
            return "<|end|><|start|>assistant<|channel|>final<|message|>"
        return self.tags[0].close[0] if self.tags else ""

    def inside_after(self, prompt: str) -> bool | None:
        """Whether a text begins inside a thought after this prompt; None where the prompt does not tell."""
        prompt = prompt.rstrip()
        if self.harmony:
            channel = re.search(r"<\|channel\|>(\w+)<\|message\|>$", prompt)
            return channel[1] != "final" if channel else None
        if any(prompt.endswith(tag.rstrip()) for each in self.tags for tag in each.open):
            return True
        return False if any(prompt.endswith(tag) for each in self.tags for tag in each.close) else None


THINK = Tags(("<think>",), ("</think>",))
_CODE = ("```", "~~~")
# Of harmony.
_HEADERS, _MESSAGE = ("<|start|>", "<|channel|>"), "<|message|>"
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")
# Formats by the names that a catalogue entry may give.
FORMATS: dict[str, Tags] = {
    "think": THINK,
    "thinking": Tags(("<thinking>",), ("</thinking>",)),
    "thought": Tags(("<thought>",), ("</thought>",)),
    "mistral": Tags(("[THINK]",), ("[/THINK]",)),
    "seed": Tags(("<seed:think>",), ("</seed:think>",)),
    "kimi": Tags(("◁think▷",), ("◁/think▷",)),
    "cohere": Tags(
        ("<|START_THINKING|>",), ("<|END_THINKING|>",), ("<|START_RESPONSE|>", "<|END_RESPONSE|>")
    ),
    "gemma": Tags(("<|channel>thought",), ("<channel|>",)),
    "response": Tags(("<think>",), ("</think>",), ("<response>", "</response>")),
    "granite": Tags(
        ("Here is my thought process:", "Here's my thought process:"),
        ("Here is my response:", "Here's my response:"),
    ),
    "apriel": Tags(
        ("Here are my reasoning steps:",),
        ("[BEGIN FINAL RESPONSE]",),
        ("", "[END FINAL RESPONSE]"),
    ),
}
PLAIN = ThinkingFormat()  # a text that is never split
HARMONY = ThinkingFormat(thinks=True, harmony=True)
# An unknown model's text is split where it begins with one of these. Phrases of plain English are left out.
_LEADING = tuple(
    FORMATS[name] for name in ("think", "thinking", "thought", "mistral", "seed", "kimi", "cohere", "gemma")
)
AUTO = ThinkingFormat(_LEADING)
# Families by the lower-case name of a model: format, and whether the chat template writes the opening tag.
_FAMILIES: tuple[tuple[str, str, bool], ...] = (
    (r"gpt-?oss", "harmony", False),
    (r"magistral|(mi|mini)stral.*reasoning", "mistral", False),
    (r"seed-?oss", "seed", False),
    (r"kimi-vl|kimi.?k?1\.5", "kimi", False),
    (r"command-a-reasoning", "cohere", False),
    (r"granite-3\.2", "granite", False),
    (r"granite-3\.[3-9]|granite-3-3|ernie.*thinking", "response", False),
    (r"apriel-1\.[56]", "apriel", True),
    (r"exaone-deep", "thought", True),
    (r"gemma-?4", "gemma", False),
    (
        r"deepseek-?r1|deepseek-reasoner|qwq|qwen3.*thinking|minimax-m2|glm-z1|step-?3|mimo-7b-rl",
        "think",
        True,
    ),
    (
        r"qwen-?3(?!.*(instruct|coder|embed|rerank))|glm-?4\.[5-9]|glm-?4\.1v|glm-?5|minimax-m1|kimi-k2.*think"
        r"|deepseek-(chat-)?v(3\.[1-9]|[4-9])|nemotron|exaone-?4|smollm3|hunyuan|ernie|phi-?4.*reasoning|olmo-?3.*think"
        r"|intern-?s1|deephermes|openthinker|skywork-or1|acereason|open-?r1|mimo|(^|[-_/])r1([-_.:]|$)",
        "think",
        False,
    ),
)


def format_of_family(*names: str) -> ThinkingFormat:
    """The format of a model by its names (of its repository, for its provider); `AUTO` if none is known."""
    for name in names:
        for pattern, key, opened in _FAMILIES:
            if re.search(pattern, name.lower()):
                return format_named(key, opened=opened)
    return AUTO


def format_named(name: str, *, opened: bool = False) -> ThinkingFormat:
    """The format `harmony`, or one of `FORMATS`."""
    return HARMONY if name == "harmony" else ThinkingFormat((FORMATS[name],), thinks=True, opened=opened)


class ThinkingSplitter:
    """Splits one text. `push` and `finish` return the pieces that are safe to show, without tags.

    A thought stands at the beginning, directly after another thought, or, once there was one, at the
    beginning of a later line outside a code block. Tags anywhere else are text. White space around a thought
    is cut; a text without thought is returned byte by byte.

    Attributes:
        inside: whether the text so far ends inside a thought.

    Args:
        format: the model's tags.
        inside: whether the text begins inside a thought; None if that is not known. Where the format then
            says that it does, a text that ends normally and has no tag at all was no thought, and `finish`
            returns it as text.
    """

    def __init__(self, format: ThinkingFormat, inside: bool | None = None) -> None:
        self._step: Callable[[], list[Piece]]
        self._tags, self._current = format.tags, format.tags[0] if format.tags else THINK
        self._unsure = inside is None and format.opened
        self._raw: list[str] = []  # while unsure, all of the text
        self._held = ""  # not consumed yet: at most what may be the beginning of a tag, and white space
        self._thoughts = _Thoughts()
        self._had_thought = self._in_code = False
        self._at_line_begin = True
        self.inside = inside is True or self._unsure
        self._step = self._begin if format.tags else self._plain
        if format.harmony:
            self._step = self._begin_harmony if inside is None else self._message
        self._harmony = format.harmony

    @property
    def thinking(self) -> str:
        """The thoughts so far, an empty line between two."""
        return self._thoughts.text

    def follow_thought(self, text: str) -> list[Piece]:
        """Add a thought that comes by another way, such as a field of its own, before the text."""
        if not self._had_thought and not self._held:
            self._had_thought, self._unsure, self.inside = True, False, False
            if not self._harmony:
                self._step = self._after
        return self._thoughts.add(text)

    def push(self, text: str) -> list[Piece]:
        """Add a piece of the text; return what became safe to show."""
        if self._step == self._plain:
            return [text] if text else []
        if self._unsure:
            self._raw.append(text)
        self._held += text
        if text and not self.inside:
            self._thoughts.end()
        pieces: list[Piece] = []
        before = None
        while (now := (self._step, len(self._held))) != before:
            pieces += self._step()
            before = now
        return pieces

    def finish(self, *, ended: bool = True) -> list[Piece]:
        """What was held back, at the end of the text. ended: the model ended it, it was not cut off."""
        held, self._held = self._held, ""
        if self._unsure and ended:
            self.inside, self._thoughts = False, _Thoughts()
            return [text for text in ("".join(self._raw),) if text]
        if self._step == self._header:
            return []
        if self.inside:
            return self._thoughts.add(held.rstrip())
        return [held] if held.strip() or not self._had_thought else []

    # --- states: each consumes some of what is held and returns its pieces ----------------------------------

    def _plain(self) -> list[Piece]:
        held, self._held = self._held, ""
        return [held] if held else []

    def _begin(self) -> list[Piece]:
        """Nothing but white space so far."""
        text = self._held.lstrip()
        if self._open(text) or not text or self._may_open(text):
            return []
        self._step = self._thought if self.inside else self._plain
        return []

    def _after(self) -> list[Piece]:
        """After a thought, before the first word of what follows."""
        text = self._held = self._held.lstrip()
        skipped = [*self._current.close, *(self._current.answer or ())[:1]]
        for tag in filter(None, skipped):
            if text.startswith(tag):
                self._held = text[len(tag) :]
                return []
        if self._open(text) or self._may_open(text) or any(tag.startswith(text) for tag in skipped):
            return []
        self._step, self._at_line_begin, self._in_code = self._text, True, False
        return []

    def _thought(self) -> list[Piece]:
        """Inside a thought, up to its first closing tag."""
        found = [(at, tag) for tag in self._current.close if (at := self._held.find(tag)) >= 0]
        if not found:
            safe = len(self._held) - _overlap(self._held, self._current.close)
            words, self._held = self._held[:safe], self._held[safe:]
            return self._thoughts.add(words)
        at, tag = min(found)
        words, self._held = self._held[:at], self._held[at + len(tag) :]
        self._step, self.inside, self._unsure, self._had_thought = self._after, False, False, True
        self._raw = []
        pieces = self._thoughts.add(words)
        self._thoughts.end()
        return pieces

    def _text(self) -> list[Piece]:
        """After the first word of the text that follows a thought: one line, or the beginning of one."""
        if self._current.answer:
            return self._text_in_tags(self._current.answer[1])
        if self._at_line_begin:
            line = self._held.lstrip(" \t")
            if not self._in_code and self._open(line):
                return []
            if any(mark.startswith(line) for mark in _CODE) or (not self._in_code and self._may_open(line)):
                return []
            self._in_code ^= line.startswith(_CODE)
        newline = self._held.find("\n") + 1
        self._at_line_begin = newline > 0
        return self._show(newline or len(self._held))

    def _text_in_tags(self, end: str) -> list[Piece]:
        """A text with a closing tag of its own, without white space before that."""
        at = self._held.find(end)
        if at < 0:
            safe = len(self._held) - _overlap(self._held, (end,))
            return self._show(len(self._held[:safe].rstrip()))
        pieces = self._show(len(self._held[:at].rstrip()))
        self._step, self._held = self._after, self._held.lstrip()[len(end) :]
        return pieces

    def _show(self, length: int) -> list[Piece]:
        shown, self._held = self._held[:length], self._held[length:]
        return [shown] if shown else []

    def _open(self, text: str) -> bool:
        """Begin a thought if the text begins with an opening tag."""
        for tags in self._tags:
            for tag in tags.open:
                if text.startswith(tag):
                    self._current, self._held = tags, text[len(tag) :]
                    self._step, self.inside, self._unsure = self._thought, True, False
                    self._raw = []
                    return True
        return False

    def _may_open(self, text: str) -> bool:
        return any(tag.startswith(text) for tags in self._tags for tag in tags.open)

    # --- harmony: <|start|>assistant<|channel|>analysis<|message|>...<|end|> --------------------------------

    def _begin_harmony(self) -> list[Piece]:
        text = self._held.lstrip()
        if not any(mark.startswith(text) or text.startswith(mark) for mark in _HEADERS):
            self._step = self._plain
        elif text.startswith(_HEADERS):
            self._step, self._had_thought = self._header, True
        return []

    def _header(self) -> list[Piece]:
        """From the end of a message to the text of the next one."""
        header, mark, rest = self._held.partition(_MESSAGE)
        if mark:
            channels = _CHANNEL.findall(header)  # the last one: a malformed header may name several
            self.inside = bool(channels) and channels[-1] != "final"
            self._step, self._held, self._at_line_begin = self._message, rest, True
        return []

    def _message(self) -> list[Piece]:
        """The text of one message; only the channel `final` is for the user."""
        ends = _ENDS if self.inside else _ENDS[:-1]  # a final text may speak of channels
        found = [(at, end) for end in ends if (at := self._held.find(end)) >= 0]
        safe = min(found)[0] if found else len(self._held) - _overlap(self._held, ends)
        shown, self._held = self._held[:safe], self._held[safe:]
        if self.inside:
            pieces = self._thoughts.add(shown)
        else:
            shown = shown.lstrip() if self._at_line_begin else shown
            self._at_line_begin &= not shown
            pieces = [shown] if shown else []
        if found:
            self._thoughts.end()
            self._step, self._had_thought = self._header, True
        return pieces


class _Thoughts:
    """Joins the pieces of the thoughts, an empty line between two, without white space around them."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._spaces: list[str] = []  # cut if nothing follows them
        self._begun = False

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def add(self, text: str) -> list[Piece]:
        """Add a piece of the current thought; return what became safe to show."""
        words = text.rstrip()
        spaces = text[len(words) :]
        if not self._begun:
            words = words.lstrip()
        if not words:
            self._spaces += [spaces] * self._begun
            return []
        before = "".join(self._spaces) if self._begun else "\n\n" * bool(self._parts)
        self._spaces, self._begun = [spaces], True
        self._parts.append(before + words)
        return [ThinkingDelta(before + words)]

    def end(self) -> None:
        self._spaces, self._begun = [], False


def _overlap(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of the text that is the beginning of a tag."""
    longest = min(len(text), max(map(len, tags)) - 1)
    return next((n for n in range(longest, 0, -1) if any(tag.startswith(text[-n:]) for tag in tags)), 0)
