"""Decode with a small and a large model that take turns token by token, or with one model alone.

The public entry point of token-level decoding: `MixedDecoder` holds the settings, `Engine` does the work.
Leaves out strategies, prices and how a router decides (R-Stitch: arXiv 2507.17307; R2R: 2505.21600).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from viaticum.decoders.auto_mode import ModeChooser
from viaticum.decoders.config import DecoderConfig
from viaticum.decoders.engine import Engine
from viaticum.decoders.loop import LoopGuard
from viaticum.decoders.request import Event, Request, Result
from viaticum.decoders.runner import Runner
from viaticum.decoders.stats import Stats
from viaticum.decoders.text import Tokenizer
from viaticum.decoders.vocabulary import SharedVocabulary
from viaticum.routers.token import AlwaysLarge, TokenRouter


class MixedDecoder:
    """Decodes with a small and a large `Runner` between which a `TokenRouter` chooses.

    Without `small` the large model decodes everything. The other arguments: see `DecoderConfig`. `stats`
    counts the model calls of all engines that the decoder has made since it was set.
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
        draft: int | None = 0,
        draft_cost: float | None = None,
        llm_batch: int = 1,
        loop_guard: LoopGuard | None = LoopGuard(),  # noqa: B008 (it is frozen)
        modes: ModeChooser | None = None,
        shared_vocabulary: SharedVocabulary | None = None,
    ) -> None:
        self.config = DecoderConfig(
            large,
            small,
            tokenizer,
            router or AlwaysLarge(),
            frozenset(stop_ids),
            names,
            draft,
            draft_cost,
            llm_batch,
            loop_guard,
            modes=modes,
            shared_vocabulary=shared_vocabulary,
        )
        self.stats = Stats()

    @property
    def runners(self) -> dict[int, Runner]:
        """The runners by model: 0 small, 1 large."""
        return self.config.runners

    @property
    def slots(self) -> int:
        """Sequences that may be decoded at once."""
        return self.config.slots

    def engine(self) -> Engine:
        """An engine without requests, to add and abort requests while others are being decoded."""
        return Engine(self.config, self.stats)

    def generate(self, request: Request) -> Result:
        """Decode one request to its end.

        Raises:
            InputError: the request cannot be decoded (see `check`).
            ModelError: decoding failed.
        """
        for event in self.stream([request]):
            if event.result is not None:
                if event.result.error is not None:
                    raise event.result.error
                return event.result
        raise AssertionError("a stream ends with a result")

    def generate_all(self, requests: Sequence[Request]) -> list[Result]:
        """Decode many requests, as many at once as there are slots; results in the order of the requests.

        A request that failed has finish reason "error" and its `error`; the others are not affected.

        Raises:
            InputError: a request cannot be decoded (see `check`); none is started then.
        """
        results = {event.index: event.result for event in self.stream(requests) if event.result is not None}
        return [results[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Yield each token as it is kept; a request's last event has its result. Closing it frees every slot.

        Raises:
            InputError: a request cannot be decoded (see `check`); none is started then.
        """
        engine = self.engine()
        for request in requests:
            engine.add(request)
        yield from engine

    def check(self, request: Request) -> None:
        """Raise `InputError` or `PromptTooLong` if the request cannot be decoded."""
        self.config.check(request)
