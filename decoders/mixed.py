"""Two models write one text, token by token; or one model writes it alone.

Each model keeps its own KV cache and reads only the tokens it has not seen. A token that the router
drops was never fed to either model, so nothing has to be rolled back. Rows are independent: many requests
share the model calls of a step, and a free slot takes the next request at once.
Knows nothing of strategies, prices or how a router decides (R-Stitch: arXiv 2507.17307; R2R: 2505.21600).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import takewhile

import torch

from viaticum.decoders.request import Event, Request, Result
from viaticum.decoders.runner import Runner
from viaticum.decoders.sampling import draw
from viaticum.decoders.text import TextStream, Tokenizer
from viaticum.errors import InputError, ModelError, PromptTooLong
from viaticum.routers.token import AlwaysLarge, Step, TokenRouter, entropy
from viaticum.types import FinishReason, TokenCount, Trace

SMALL, LARGE = 0, 1
SHARED_PREFIX = 16  # prompts that share fewer tokens than this are read apart


class _Text:
    """One request being written. `tokens` is prompt and output; `pen` is the model that writes next."""

    def __init__(self, index: int, request: Request, slot: int, pen: int, tokenizer: Tokenizer) -> None:
        self.index, self.request, self.slot, self.pen = index, request, slot, pen
        self.tokens = list(request.prompt)
        self.made_by: list[int] = []
        self.entropies: list[float] = []
        self.stream = TextStream(tokenizer, request.stop)
        self.readers: set[int] = set()  # models that have read the prompt
        self.draws = 0  # proposals for the next position so far
        self._generator = torch.Generator()
        self.began = time.perf_counter()

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    def dice(self) -> torch.Generator:
        """Randomness of this position, new for a second draw: a dropped token changes no later draw."""
        place = (self.request.sampling.seed * 1_000_003 + len(self.made_by)) * 2 + self.draws
        self.draws += 1
        return self._generator.manual_seed(place % 2**32)  # torch uses no more bits on a CPU


class MixedDecoder:
    """Writes texts with a small and a large `Runner`, a `TokenRouter` choosing between them.

    For one model alone leave `small` out: the large one then writes everything. names: how usage and
    traces call the two; stop_ids: token ids that end a text (they are counted as made, not shown).
    """

    def __init__(
        self,
        large: Runner,
        small: Runner | None = None,
        *,
        tokenizer: Tokenizer,
        router: TokenRouter | None = None,
        stop_ids: Sequence[int] = (),
        names: tuple[str, str] = ("small", "large"),
    ) -> None:
        if small is None and router is not None and not isinstance(router, AlwaysLarge):
            raise InputError(f"{type(router).__name__} chooses between two models; give a small one as well")
        if small is not None and small.vocabulary != large.vocabulary:
            raise InputError(
                f"the models' vocabularies differ: {small.vocabulary} and {large.vocabulary} tokens"
            )
        self.runners = {LARGE: large} if small is None else {SMALL: small, LARGE: large}
        self.router = router or AlwaysLarge()
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.names = names
        self.slots = min(runner.slots for runner in self.runners.values())
        self.context = min(runner.context for runner in self.runners.values())

    def write(self, request: Request) -> Result:
        """Write one text to its end."""
        for event in self.stream([request]):
            if event.result is not None:
                return event.result
        raise AssertionError("a stream ends with a result")

    def write_all(self, requests: Sequence[Request]) -> list[Result]:
        """Write many texts, as many at once as there are slots; results in the order of the requests."""
        results = {event.index: event.result for event in self.stream(requests) if event.result is not None}
        return [results[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Tokens as they are kept, each request's end with its result.

        Raises `PromptTooLong` before anything is computed where a prompt plus its longest answer does not
        fit the context of both models. Closing the iterator frees every slot.
        """
        for request in requests:
            self._check_fits(request)
        waiting = list(enumerate(requests))[::-1]
        prefix = self._shared_prefix(requests)
        active: list[_Text] = []
        try:
            while waiting or active:
                while waiting and (free := self._free()):
                    index, request = waiting.pop()
                    pen = SMALL if self.router.starts_small and SMALL in self.runners else LARGE
                    slot = self._take(free, request.prompt)
                    active.append(_Text(index, request, slot, pen, self.tokenizer))
                if not active:
                    raise ModelError("every slot is in use by other texts; end them, or give the runner more")
                active.sort(key=lambda text: text.slot)  # neighbouring slots are read without a copy
                for text, event in self._step(active, prefix):
                    if event.result is not None:
                        active.remove(text)
                        self._give(text.slot)
                    yield event
        finally:
            for text in active:
                self._give(text.slot)

    def _step(self, active: list[_Text], prefix: list[int]) -> Iterator[tuple[_Text, Event]]:
        """The SLM proposes where it has the pen; then the LLM writes where it has it, those just lost too."""
        events: list[tuple[_Text, Event]] = []
        small = [text for text in active if text.pen == SMALL]
        if small:
            step = self._propose(SMALL, small, prefix)
            for row, keep in enumerate(self.router.keep_small(step).tolist()):
                if keep:
                    events.append((small[row], self._keep(small[row], step, row)))
                else:
                    small[row].pen = LARGE
        ended = {text for text, event in events if event.result is not None}
        large = [text for text in active if text.pen == LARGE and text not in ended]
        if large:
            step = self._propose(LARGE, large, prefix)
            back = self.router.hand_back(step).tolist() if SMALL in self.runners else [False] * len(large)
            for row, text in enumerate(large):
                events.append((text, self._keep(text, step, row)))
                text.pen = SMALL if back[row] else LARGE
        yield from events

    @torch.inference_mode()
    def _propose(self, model: int, texts: list[_Text], prefix: list[int]) -> Step:
        """One call of one model for the rows that wait for it, and the token each would take."""
        runner = self.runners[model]
        self._admit(model, [text for text in texts if model not in text.readers], prefix)
        logits = runner.extend(
            [text.slot for text in texts], [text.tokens[len(runner.held[text.slot]) :] for text in texts]
        )
        return Step(
            logits=logits,
            entropy=entropy(logits),
            requests=[text.index for text in texts],
            positions=[len(text.made_by) for text in texts],
            tokens=draw(logits, [t.request.sampling for t in texts], [t.dice() for t in texts]),
        )

    def _keep(self, text: _Text, step: Step, row: int) -> Event:
        """Append the proposed token and say whether the text ends with it."""
        token = step.tokens[row]
        text.tokens.append(token)
        text.made_by.append(text.pen)
        text.draws = 0
        text.entropies.append(float(step.entropy[row]))
        ends = token in self.stop_ids
        shown = "" if ends else text.stream.push(token)
        if ends or text.stream.stopped:
            return self._end(text, token, shown, "stop")
        if len(text.made_by) >= text.request.max_new_tokens:
            return self._end(text, token, shown, "length")
        return Event(text.index, token, self.names[text.pen], shown)

    def _end(self, text: _Text, token: int, shown: str, reason: FinishReason) -> Event:
        shown += text.stream.finish()
        reason = "stop" if text.stream.stopped else reason  # a stop string may end in the last bytes
        result = Result(
            text=text.stream.text,
            finish_reason=reason,
            trace=Trace(self.names, tuple(text.output), tuple(text.made_by), tuple(text.entropies)),
            usage=self._usage(text),
            seconds=time.perf_counter() - text.began,
        )
        return Event(text.index, token, self.names[text.pen], shown, result)

    def _usage(self, text: _Text) -> dict[str, TokenCount]:
        """A model that was called read the prompt once; the tokens kept count for the model that made them."""
        return {
            self.names[model]: TokenCount(len(text.request.prompt), text.made_by.count(model))
            for model in sorted(text.readers)
        }

    def _shared_prefix(self, requests: Sequence[Request]) -> list[int]:
        """What all prompts begin with, less one token, so that each row still has something to read."""
        if len(requests) < 2:
            return []
        columns = zip(*(request.prompt for request in requests), strict=False)
        shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        shared = shared[: min(len(request.prompt) for request in requests) - 1]
        return shared if len(shared) >= SHARED_PREFIX else []

    def _free(self) -> list[int]:
        """Slots that are free at every model: a runner may serve other decoders at the same time."""
        return [
            slot
            for slot in self.runners[LARGE].free
            if all(slot in each.free for each in self.runners.values())
        ]

    def _take(self, free: list[int], prompt: Sequence[int]) -> int:
        """Of the free slots the one that has read most of the prompt; of equals the one free for longest."""
        slot = max(free, key=lambda slot: sum(each.shared(slot, prompt) for each in self.runners.values()))
        for runner in self.runners.values():
            runner.free.remove(slot)
        return slot

    def _give(self, slot: int) -> None:
        for runner in self.runners.values():
            runner.free.append(slot)

    def _admit(self, model: int, texts: list[_Text], prefix: list[int]) -> None:
        """Start texts at a model, from what its slots still hold; their shared prefix is computed at most once."""
        runner = self.runners[model]
        for text in texts:
            text.readers.add(model)
            runner.start(text.slot, text.tokens)
            if len(runner.held[text.slot]) < len(prefix):
                runner.extend([text.slot], [prefix[len(runner.held[text.slot]) :]])

    def _check_fits(self, request: Request) -> None:
        longest = len(request.prompt) + request.max_new_tokens
        if longest > self.context:
            raise PromptTooLong(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones do not fit "
                f"the context of {self.context}; shorten the prompt or lower max_new_tokens"
            )
