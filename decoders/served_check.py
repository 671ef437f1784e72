"""Connect to an inference server, and check that it can be an LLM here, before any text depends on it.

Checked: that it is there and takes the key, that it serves the model, how long texts may be, that its tokens
are ours, and that it gives token ids and enough log probabilities. Leaves out decoding
(`decoders.served_runner`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any

from viaticum.decoders.served_api import ServedAPI, SglangAPI, VllmAPI
from viaticum.decoders.served_connection import Connection, Interrupted, NotThere
from viaticum.decoders.served_runner import ServedRunner
from viaticum.errors import InputError, ModelError, VocabularyMismatch

TOP = 20  # log probabilities a position: what vLLM gives unless --max-logprobs says otherwise
TIMEOUT, RETRIES = 120.0, 4
APIS: dict[str, type[ServedAPI]] = {"vllm": VllmAPI, "sglang": SglangAPI}
_STREAMS, _TOKENS = 3, 5  # that the round trip is measured with


def connect(
    api_base: str,
    *,
    vocabulary: int,
    model: str | None = None,
    key: str | None = None,
    probes: Mapping[str, Sequence[int]] | None = None,
    slots: int = 1,
    context: int | None = None,
    top: int = TOP,
    timeout: float = TIMEOUT,
    retries: int = RETRIES,
    weight_bytes: int = 1,
    stop_ids: frozenset[int] = frozenset(),
) -> ServedRunner:
    """A checked runner of a model behind vLLM or SGLang.

    Args:
        api_base: address of the server, such as "http://gpu:8000/v1".
        vocabulary: tokens of the model that may be used here.
        model: its name there; None: the only one served.
        key: bearer token.
        probes: texts and their token ids here, without special tokens added; the server has to agree.
        slots: sequences at once.
        context: tokens of prompt and answer, if fewer than the server takes.
        top: log probabilities a position; a server allows as many as its --max-logprobs.
        timeout: seconds that the server may be silent.
        retries: repetitions of a request that failed in a way that may pass.
        weight_bytes: bytes of the model's weights, for the relative cost of drafts.
        stop_ids: token ids that end a text.

    Raises:
        InputError: the server serves no such model, or says nothing of its context and `context` is None.
        VocabularyMismatch: its tokens are others.
        AuthenticationFailed: it rejects the key.
        ProviderUnavailable: it cannot be reached.
        ModelError: it gives no token ids, or too few log probabilities.
    """
    connection = Connection(api_base, key=key, timeout=timeout, retries=retries)
    try:
        card = _card(connection, model)
        api = APIS.get(str(card.get("owned_by")), VllmAPI)(str(card["id"]), top)
        longest = card.get("max_model_len") or context
        if longest is None:
            raise InputError(f"{connection.root} does not say how long texts may be; give context")
        _check_tokens(connection, api, probes or {})
        _check_answer(connection, api, vocabulary)
        round_trip = connection.call(_round_trip(connection, api))
        return ServedRunner(
            connection,
            api,
            vocabulary=vocabulary,
            context=min(int(longest), context or int(longest)),
            slots=slots,
            weight_bytes=weight_bytes,
            stop_ids=stop_ids,
            round_trip=round_trip,
        )
    except BaseException:
        connection.close()
        raise


def _card(connection: Connection, model: str | None) -> dict[str, Any]:
    """What the server says of the model."""
    answer = connection.call(connection.request("GET", "/v1/models"))
    try:
        cards = {str(card["id"]): dict(card) for card in answer["data"]}
    except (KeyError, TypeError):
        raise ModelError(f"{connection.root}/v1/models lists no models; is it vLLM or SGLang?") from None
    if model is None and len(cards) == 1:
        return next(iter(cards.values()))
    if model not in cards:
        raise InputError(
            f"{connection.root} serves no model {model!r} but {', '.join(cards) or 'none'}; set served_model"
        )
    return cards[model]


def _check_tokens(connection: Connection, api: ServedAPI, probes: Mapping[str, Sequence[int]]) -> None:
    for text, ours in probes.items():
        theirs = _tokens(connection, api, text)
        if theirs is not None and theirs != list(ours):
            where = next(
                (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b),
                min(len(theirs), len(ours)),
            )
            raise VocabularyMismatch(
                f"{api.model} at {connection.root} has another vocabulary: of {text!r} token {where} is "
                f"{theirs[where : where + 1]} there and {list(ours[where : where + 1])} here"
            )


def _tokens(connection: Connection, api: ServedAPI, text: str) -> list[int] | None:
    """The server's tokens of a text; None if it has no way to tell."""
    body: dict[str, Any] = {"model": api.model, "prompt": text, "add_special_tokens": False}
    try:
        tokens: list[int] = connection.call(connection.request("POST", "/tokenize", body))["tokens"]
        return tokens
    except NotThere:
        pass
    if not isinstance(api, VllmAPI):
        return None
    whole = api.body([[0]], 1, stream=False) | {"prompt": text, "add_special_tokens": False}
    choice: dict[str, Any] = connection.call(connection.request("POST", api.path, whole))["choices"][0]
    return choice.get("prompt_token_ids")


def _check_answer(connection: Connection, api: ServedAPI, vocabulary: int) -> None:
    """Ask for one token as the runner will."""
    body = api.body([[0]], 1, stream=False, ignore_eos=True)
    answer = connection.call(connection.request("POST", api.path, body))
    try:
        positions = api.first_positions(answer)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ModelError(
            f"{connection.root}{api.path} answers in another form than {api.name} ({error!r}); is it vLLM or "
            "SGLang?"
        ) from None
    if len(positions) != 1 or len(positions[0].ids) < min(api.top, vocabulary):
        raise ModelError(
            f"{connection.root} gives {len(positions[0].ids) if positions else 0} log probabilities a token, "
            f"not {api.top}; start it with a larger --max-logprobs, or lower top_logprobs"
        )


async def _round_trip(connection: Connection, api: ServedAPI) -> float:
    """Seconds from a request to its first token, less those between tokens: medians of short streams."""
    first, between = [], []
    for _ in range(_STREAMS):
        began, arrived = time.perf_counter(), list[float]()
        body = api.body([[0]], _TOKENS, stream=True)
        try:
            async with aclosing(connection.events(api.path, body)) as events:
                async for event in events:
                    new, _ = api.stream_positions(event, len(arrived))
                    arrived += [time.perf_counter()] * len(new)
        except Interrupted as interruption:
            raise interruption.error from None
        if len(arrived) > 1:
            first.append(arrived[0] - began)
            between.append((arrived[-1] - arrived[0]) / (len(arrived) - 1))
    return max(0.0, statistics.median(first) - statistics.median(between)) if first else 0.0
