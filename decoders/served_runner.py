"""A model behind vLLM or SGLang as a `Runner`: asked with token ids, read as log probabilities.

No logits come over the wire. A position's `logits` are the log probabilities of its most probable tokens and
minus infinity elsewhere, so that sampling is top-k sampling with k = `top` (drafts are verified against the
same distribution); `entropy` is a lower bound, see `entropy_of`. Keys and values are the server's: it caches
prefixes by itself, and every request sends the whole text.

A request a token would cost a round trip a token. Instead the server streams its greedy tokens ahead
(`Reading`); as long as the decoder keeps them, they are answers without a request. When it goes another way
(another token, the other model, the end of the text) the stream is closed, which ends the work there. How far
a stream reads ahead follows from how much of the last one was used. A draft is verified by one request of all
its prefixes: `prompt_logprobs` of vLLM would recompute the whole text, since it cannot use cached prefixes.

Leaves out the requests' form (`decoders.served_api`) and HTTP (`decoders.served_connection`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import aclosing

import torch
from torch import Tensor

from viaticum.decoders.runner import Runner, RunnerOutput
from viaticum.decoders.served_api import GIVEN_UP, Position, ServedAPI
from viaticum.decoders.served_connection import Connection, Interrupted, Traffic
from viaticum.errors import ModelError, ProviderTimeout, ProviderUnavailable, SequencesFailed

FIRST_STREAM, LONGEST_STREAM = 4, 1024  # tokens that a stream reads ahead
GROWTH = 4  # a stream that was used to its end is followed by one so many times as long
_MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError)


class Reading:
    """A text that a server reads, and the greedy tokens that it streams after it.

    Args:
        prompt: token ids.
        limit: tokens to stream.
    """

    def __init__(self, prompt: list[int], limit: int) -> None:
        self.prompt, self.limit = prompt, limit
        self.positions: list[Position] = []
        self.used = 0  # positions up to the last one that was asked for
        self.finished: str | None = None  # why the stream ended; set by the connection's thread
        self.closed = False  # set by the decoder's thread, and by it alone
        self.error: ModelError | None = None
        self.future: Future[None] | None = None
        self._arrived = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self.closed or self.finished is not None or self.error is not None

    def token_at(self, index: int) -> int | None:
        """The token at an index of prompt and stream; None if it has not come."""
        if index < len(self.prompt):
            return self.prompt[index]
        index -= len(self.prompt)
        return self.positions[index].token if index < len(self.positions) else None

    def may_have(self, length: int) -> bool:
        """Whether the position after `length` tokens has come, or may still come."""
        index = length - len(self.prompt)
        if index < 0:
            return False
        return index < len(self.positions) or (not self.ended and index < self.limit)

    def wake(self) -> None:
        self._arrived.set()

    async def at(self, length: int) -> Position | None:
        """The position after `length` tokens; None if the stream ends before it."""
        index = length - len(self.prompt)
        while index >= len(self.positions):
            if self.error is not None:
                raise self.error
            if self.ended:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        self.used = max(self.used, index + 1)
        return self.positions[index]


class ServedRunner(Runner):
    """A `Runner` whose model an inference server runs; `decoders.served_check.connect` makes a checked one.

    Args:
        connection: to the server.
        api: what the server speaks, with the model's name and the log probabilities a position.
        vocabulary: tokens of the model; others that the server names are left out.
        context: tokens of prompt and answer that the server takes.
        slots: sequences at once.
        weight_bytes: bytes of the model's weights, for the relative cost of drafts.
        stop_ids: token ids that end a text.
        round_trip: seconds that a request takes more than the next token of a stream.
    """

    def __init__(
        self,
        connection: Connection,
        api: ServedAPI,
        *,
        vocabulary: int,
        context: int,
        slots: int = 1,
        weight_bytes: int = 1,
        stop_ids: frozenset[int] = frozenset(),
        round_trip: float = 0.0,
    ) -> None:
        # The logits after the last position are those of a token that the server has to have room for.
        super().__init__(
            slots=slots,
            context=context - 1,
            vocabulary=vocabulary,
            weight_bytes=weight_bytes,
            stop_ids=stop_ids,
        )
        self.connection, self.api, self.round_trip = connection, api, round_trip
        self._readings: list[Reading | None] = [None] * slots
        self._agreed = [0] * slots  # tokens of the slot's sequence that are those of its reading
        self._window = [FIRST_STREAM] * slots

    @property
    def description(self) -> str:
        return f"{self.api.model} by {self.api.name} at {self.connection.root}"

    @property
    def traffic(self) -> Traffic:
        """What the model has cost on the wire."""
        return self.connection.traffic

    @property
    def embeddings(self) -> Tensor:
        raise ModelError(
            f"{self.api.model} is served elsewhere: its embeddings are not to be had; load it here"
        )

    def close(self) -> None:
        """Close the streams and the connection."""
        for slot in range(self.slots):
            self._drop(slot)
        self.connection.close()

    # --- calls ----------------------------------------------------------------------------------------------

    def _forward(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], keep: Sequence[int], hidden: bool
    ) -> RunnerOutput:
        if hidden:
            raise ModelError(f"{self.api.model} is served elsewhere: it gives no hidden states; load it here")
        rows: list[list[Position]] = []
        streamed = self.traffic.streamed
        agreed = [self._agreement(slot, new) for slot, new in zip(slots, tokens, strict=True)]
        found = self.connection.call(self._answer(slots, tokens, keep, agreed))
        failed: dict[int, ModelError] = {}
        for slot, row in zip(slots, found, strict=True):
            if isinstance(row, ModelError):
                failed[slot] = row
            elif isinstance(row, BaseException):
                raise row
            else:
                rows.append(row)
        if failed:
            raise SequencesFailed(failed)
        for slot, new in zip(slots, tokens, strict=True):
            self._agreed[slot] = self._agreement(slot, new)
            self.cached_tokens[slot].extend(new)
        self.calls += 1
        self.traffic.answers += sum(map(len, rows))
        self.saved_seconds = self.round_trip * (self.traffic.streamed - streamed == sum(map(len, rows)))
        return self._output([position for row in rows for position in row])

    def _agreement(self, slot: int, new: Sequence[int]) -> int:
        """Length to which the slot's sequence, continued by `new`, is what its reading has."""
        reading, length = self._readings[slot], len(self.cached_tokens[slot])
        if reading is None or self._agreed[slot] < length:
            return self._agreed[slot]
        for token in new:
            if reading.token_at(length) != token:
                break
            length += 1
        return length

    async def _answer(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        keep: Sequence[int],
        agreed: Sequence[int],
    ) -> list[list[Position] | BaseException]:
        rows = zip(slots, tokens, keep, agreed, strict=True)
        return await asyncio.gather(*(self._row(*row) for row in rows), return_exceptions=True)

    async def _row(self, slot: int, new: Sequence[int], keep: int, agreed: int) -> list[Position]:
        """The positions after the last `keep` tokens of a row: from its stream, else by a request."""
        end = len(self.cached_tokens[slot]) + len(new)
        lengths = range(end - keep + 1, end + 1)
        reading = self._readings[slot]
        found: dict[int, Position] = {}
        for length in lengths:
            if reading is None or length > agreed or not reading.may_have(length):
                break
            position = await reading.at(length)
            if position is None:
                break
            found[length] = position
        self.traffic.streamed += len(found)
        missing = [length for length in lengths if length not in found]
        if not missing:
            return list(found.values())
        text = [*self.cached_tokens[slot], *new]
        if keep > 1:
            return [*found.values(), *await self._verify([text[:length] for length in missing])]
        return [await self._read_on(slot, text)]

    async def _verify(self, prompts: list[list[int]]) -> list[Position]:
        """The positions after several prefixes of a text, by one request."""
        body = self.api.body(prompts, 1, stream=False, ignore_eos=True)
        positions: list[Position] = []
        for attempt in range(self.connection.retries + 1):
            answer = await self.connection.request("POST", self.api.path, body)
            try:
                positions = self.api.first_positions(answer)
            except _MALFORMED as error:
                raise self._malformed(error) from None
            if positions:
                break
            given_up = ProviderUnavailable(f"{self.connection.root} gave up its answer")
            if attempt == self.connection.retries:
                raise given_up
            await self.connection.pause(attempt, Interrupted(given_up))
        if len(positions) != len(prompts):
            raise ModelError(f"the server answered {len(positions)} of {len(prompts)} prompts")
        self.traffic.received += len(positions)
        return positions

    async def _read_on(self, slot: int, text: list[int]) -> Position:
        """Open a stream after a text; returns its first position."""
        self._drop(slot)
        longest = min(self.context + 1 - len(text), self.api.longest_stream or LONGEST_STREAM)
        reading = Reading(text, max(1, min(self._window[slot], longest)))
        self._readings[slot], self._agreed[slot] = reading, len(text)
        reading.future = self.connection.start(self._stream(reading))
        position = await reading.at(len(text))
        return position or (await self._verify([text]))[0]  # a server may keep a stop id to itself

    async def _stream(self, reading: Reading) -> None:
        """Stream a reading to its end; what breaks off is asked for again from where it broke."""
        attempt = 0
        try:
            while not reading.ended:
                before = len(reading.positions)
                try:
                    await self._stream_once(reading)
                except Interrupted as interruption:
                    attempt = 0 if len(reading.positions) > before else attempt + 1
                    if attempt > self.connection.retries:
                        raise interruption.error from None
                    await self.connection.pause(max(0, attempt - 1), interruption)
        except ModelError as error:
            reading.error = error
        except _MALFORMED as error:
            reading.error = self._malformed(error)
        finally:
            reading.wake()

    def _malformed(self, error: Exception) -> ModelError:
        return ModelError(f"{self.connection.root} answers in another form than {self.api.name}: {error!r}")

    async def _stream_once(self, reading: Reading) -> None:
        known = len(reading.positions)
        if known >= reading.limit:
            reading.finished = "length"
            return
        text = [*reading.prompt, *(position.token for position in reading.positions)]
        # A stop id ends the stream; a text that goes on after one is asked for anew.
        body = self.api.body([text], reading.limit - known, stream=True, ignore_eos=False)
        async with aclosing(self.connection.events(self.api.path, body)) as events:
            while True:
                try:
                    async with asyncio.timeout(self.connection.timeout):
                        event = await anext(events)
                except StopAsyncIteration:
                    raise Interrupted(
                        ProviderUnavailable(f"{self.connection.root} broke off its answer")
                    ) from None
                except TimeoutError:
                    message = f"{self.connection.root} sent nothing for {self.connection.timeout:g} s"
                    raise Interrupted(ProviderTimeout(message)) from None
                new, finish = self.api.stream_positions(event, len(reading.positions) - known)
                reading.positions += new
                self.traffic.received += len(new)
                if finish in GIVEN_UP:
                    raise Interrupted(
                        ProviderUnavailable(f"{self.connection.root} gave up its answer ({finish})")
                    )
                reading.finished = finish
                reading.wake()
                if finish is not None:
                    return

    # --- slots ----------------------------------------------------------------------------------------------

    def idle(self, slot: int) -> None:
        """Close the slot's stream; what has come of it stays an answer."""
        reading = self._readings[slot]
        if reading is not None and reading.future is not None and not reading.ended:
            reading.closed = True
            reading.future.cancel()

    def truncate(self, slot: int, length: int) -> None:
        super().truncate(slot, length)
        self._agreed[slot] = min(self._agreed[slot], len(self.cached_tokens[slot]))

    def reset(self, slot: int) -> None:
        super().reset(slot)
        self._drop(slot)

    def reuse_prefix(self, slot: int, tokens: Sequence[int]) -> None:
        super().reuse_prefix(slot, tokens)
        self._drop(slot)

    def _copy_prefix(self, source: int, target: int, length: int) -> None:
        """Nothing: the server knows its own prefixes."""

    def _wipe(self, slot: int) -> None:
        self._drop(slot)

    def _drop(self, slot: int) -> None:
        """Forget the slot's reading, and learn from it how far to read ahead."""
        reading = self._readings[slot]
        if reading is None:
            return
        self.idle(slot)
        self.traffic.wasted += len(reading.positions) - reading.used
        if reading.finished == "length" and reading.used >= reading.limit:
            self._window[slot] = min(GROWTH * self._window[slot], LONGEST_STREAM)
        elif reading.used < len(reading.positions):
            self._window[slot] = min(max(2, 2 * reading.used), LONGEST_STREAM)
        self._readings[slot], self._agreed[slot] = None, 0

    # --- output ---------------------------------------------------------------------------------------------

    def _output(self, positions: list[Position]) -> RunnerOutput:
        logits = torch.full((len(positions), self.vocabulary), -math.inf)
        shared = self._call_vocabulary
        finite, entropies = [], []
        for row, position in enumerate(positions):
            both = [
                (shared.written(i), value) for i, value in zip(position.ids, position.logprobs, strict=True)
            ]
            # Ascending, so that of two ends of a text the likelier one stays.
            known = dict(sorted((pair for pair in both if pair[0] < shared.rows), key=lambda pair: pair[1]))
            finite.append(bool(known) and all(value == value for value in known.values()))
            if finite[-1]:
                ids, values = list(known), list(known.values())
                logits[row, ids] = torch.tensor(values)
                token = shared.written(position.token)
                if token in shared:
                    # Its choice among equals, or among what rounding made equal, is the model's.
                    highest = shared.candidates(logits[row : row + 1]).max()
                    if int(shared.candidates(logits[row : row + 1]).argmax()) != token:
                        logits[row, token] = torch.nextafter(highest, torch.tensor(math.inf))
                others = [value for i, value in both if i >= shared.rows]
                rest = 0.0 if len(both) >= self.vocabulary else None
                entropies.append(entropy_of(renormalised(values, others, rest), shared.rows))
            else:
                entropies.append(math.nan)
        allowed = shared.candidates(logits)  # a row whose likeliest tokens are all others cannot be used
        return RunnerOutput(
            logits=logits,
            finite=torch.tensor(finite, dtype=torch.bool) & (allowed.amax(-1) > -math.inf),
            tokens=allowed.argmax(-1),
            entropy=torch.tensor(entropies),
        )


def renormalised(
    logprobs: Sequence[float], excluded: Sequence[float], rest: float | None = None
) -> list[float]:
    """Log probabilities given that none of the excluded tokens comes.

    logprobs, excluded: as far as known. rest: probability of what is not known; None: what is left of 1.
    """
    if not excluded:
        return list(logprobs)
    known = sum(map(math.exp, logprobs))
    rest = max(0.0, 1.0 - known - sum(map(math.exp, excluded))) if rest is None else rest
    return [value - math.log(known + rest) for value in logprobs]


def entropy_of(logprobs: Sequence[float], vocabulary: int) -> float:
    """Normalised entropy of a distribution of which only the largest log probabilities are known.

    H = (-sum(p ln p) - r ln(m)) / ln|V|, with r the probability of the rest and m the smallest known
    probability. It is a lower bound, reached if the rest are tokens as probable as the last known one; evenly
    over all other tokens, -r ln(r / (|V| - k)), would be the upper bound. Equal to R-Stitch's (arXiv
    2507.17307, equation 1) if all tokens are known.
    """
    known = sum(map(math.exp, logprobs))
    rest = max(0.0, 1.0 - known) if len(logprobs) < vocabulary else 0.0
    nats = -sum(math.exp(value) * value for value in logprobs if value > -math.inf) - rest * min(logprobs)
    return nats / math.log(vocabulary)
