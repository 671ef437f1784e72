"""Content blocks of Anthropic's messages: the pydantic models that parse them.

Fields that change no answer here (citations, callers of a tool ...) are accepted and ignored. Documents are
taken as text alone: how many tokens a PDF has is not known before the call. Leaves out messages (`requests`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from viaticum.agents.openai_api.parsing import Form
from viaticum.agents.openai_api.requests import CacheControl

_BLOCK = ConfigDict(extra="ignore", strict=True)


class TextBlock(Form):
    model_config = _BLOCK
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


class Base64Source(Form):
    model_config = _BLOCK
    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: Annotated[str, Field(min_length=1)]

    @property
    def address(self) -> str:
        return f"data:{self.media_type};base64,{self.data}"


class UrlSource(Form):
    model_config = _BLOCK
    type: Literal["url"]
    url: Annotated[str, Field(min_length=1)]

    @property
    def address(self) -> str:
        return self.url


class ImageBlock(Form):
    """An image, for models whose entries state how many tokens one has at most."""

    model_config = _BLOCK
    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]
    cache_control: CacheControl | None = None


class PlainTextSource(Form):
    model_config = _BLOCK
    type: Literal["text"]
    data: str


class ContentSource(Form):
    model_config = _BLOCK
    type: Literal["content"]
    content: str | list[TextBlock]


class DocumentBlock(Form):
    """A document that is a text."""

    model_config = _BLOCK
    type: Literal["document"]
    source: Annotated[PlainTextSource | ContentSource, Field(discriminator="type")]
    title: str | None = None
    context: str | None = None
    cache_control: CacheControl | None = None

    @property
    def text(self) -> str:
        source = self.source.data if isinstance(self.source, PlainTextSource) else self.source.content
        text = source if isinstance(source, str) else "\n\n".join(each.text for each in source)
        return "\n\n".join(each for each in (self.title, self.context, text) if each)


class SearchResultBlock(Form):
    model_config = _BLOCK
    type: Literal["search_result"]
    source: str
    title: str
    content: list[TextBlock]
    cache_control: CacheControl | None = None

    @property
    def text(self) -> str:
        return "\n\n".join((f"{self.title} ({self.source})", *(each.text for each in self.content)))


class ThoughtBlock(Form):
    """A thought of an assistant's earlier turn. It is not sent to a model again."""

    model_config = _BLOCK
    type: Literal["thinking", "redacted_thinking"]


class ToolUseBlock(Form):
    model_config = _BLOCK
    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)]
    input: dict[str, Any]
    cache_control: CacheControl | None = None


ReadBlock = Annotated[TextBlock | ImageBlock | DocumentBlock | SearchResultBlock, Field(discriminator="type")]


class ToolResultBlock(Form):
    model_config = _BLOCK
    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1)]
    content: str | list[ReadBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


Block = Annotated[
    TextBlock
    | ImageBlock
    | DocumentBlock
    | SearchResultBlock
    | ThoughtBlock
    | ToolUseBlock
    | ToolResultBlock,
    Field(discriminator="type"),
]
