"""OpenAI's embeddings as data: the request, the response, and vectors in the form that was asked for."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.openai_api.parsing import parse_body
from viaticum.agents.openai_api.requests import RequestLimits
from viaticum.agents.openai_api.responses import Count

MAX_INPUTS = 2048  # as OpenAI's
Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class EmbeddingRequest(RequestLimits):
    """The body of POST /v1/embeddings: OpenAI's fields, and `budget` and `only`."""

    model: str = Field(min_length=1, max_length=200, description="An encoder of the catalogue.")
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_INPUTS)]
    ) = Field(description="Texts, or token ids of the encoder's own tokenizer.")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(
        None, ge=1, le=100_000, description="The first so many components, scaled to length 1."
    )
    user: str | None = None  # accepted and ignored

    @property
    def inputs(self) -> Sequence[str | Sequence[int]]:
        """Each input, a text or token ids."""
        if isinstance(self.input, str):
            return [self.input]
        return [self.input] if isinstance(self.input[0], int) else self.input


class Embedding(TypedDict):
    """embedding: numbers, or their float32 bytes in base64, the lowest byte first."""

    object: Literal["embedding"]
    index: Count
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    prompt_tokens: Count
    total_tokens: Count


class EmbeddingList(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def parse_embeddings(body: bytes) -> EmbeddingRequest:
    """Parse a body. Raises `APIError` with status 400. Not for the event loop's thread."""
    return parse_body(EmbeddingRequest, body)


def embedding_list(
    request: EmbeddingRequest, vectors: np.ndarray[tuple[int, int], np.dtype[np.float32]], tokens: int
) -> EmbeddingList:
    """The response.

    Args:
        vectors: of length 1 [N, D], float32.
        tokens: of all inputs.

    Raises:
        APIError: with status 400 for more dimensions than D.
    """
    size = vectors.shape[1]
    if request.dimensions is not None and request.dimensions != size:
        if request.dimensions > size:
            message = f"dimensions: {request.model} has {size}, got {request.dimensions}"
            raise APIError(400, message, param="dimensions")
        vectors = vectors[:, : request.dimensions]
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(_written(vectors, request.encoding_format == "base64"))
        ],
        "model": request.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _written(
    vectors: np.ndarray[tuple[int, int], np.dtype[np.float32]], as_base64: bool
) -> Iterable[list[float] | str]:
    if as_base64:
        return (base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors)
    return (vector.tolist() for vector in vectors)
