"""Two models write one text, token by token; or one model writes it alone.

What is said here once is how texts are written: by which models, who chooses between them, what is drafted,
what ends a text. `Engine` does the writing.
Knows nothing of strategies, prices or how a router decides (R-Stitch: arXiv 2507.17307; R2R: 2505.21600).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from viaticum.decoders.engine import Engine
from viaticum.decoders.loop import LoopGuard
from viaticum.decoders.request import Event, Request, Result
from viaticum.decoders.runner import Runner
from viaticum.decoders.sequence_state import LARGE, SMALL
from viaticum.decoders.stats import Stats
from viaticum.decoders.text import Tokenizer
from viaticum.errors import InputError, PromptTooLong
from viaticum.routers.token import AlwaysLarge, TokenRouter


class MixedDecoder:
    """Writes texts with a small and a large `Runner`, a `TokenRouter` choosing between them.

    For one model alone leave `small` out: the large one then writes everything.

    stop_ids: token ids that end a text (they are counted as made, not shown); names: how usage and traces call
    the two. draft: tokens that the small model guesses ahead of each pass of the large one, which then
    verifies them in that pass (0: none; None: as many as seem worth it); what is written follows the same
    distribution with and without, and is the same text where it is greedy. draft_cost: a step of the small model in
    steps of the large one, for that choice; None: the ratio of their weights' bytes. llm_batch: the large
    model is called when so many texts wait for it, or none can go on without. loop_guard: what counts
    as a loop and ends a text; None: nothing does.
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
    ) -> None:
        if small is None and router is not None and not isinstance(router, AlwaysLarge):
            raise InputError(f"{type(router).__name__} chooses between two models; give a small one as well")
        if small is not None and small.vocabulary != large.vocabulary:
            raise InputError(
                f"the models' vocabularies differ: {small.vocabulary} and {large.vocabulary} tokens"
            )
        if draft is not None and draft < 0:
            raise InputError(f"draft must be 0 or more tokens, or None to choose by itself, got {draft}")
        if draft != 0 and small is None:
            raise InputError("a draft is written by a small model; give one, or draft=0")
        if draft_cost is not None and not draft_cost > 0:
            raise InputError(f"draft_cost must be above 0, got {draft_cost}")
        if llm_batch < 1:
            raise InputError(f"llm_batch must be 1 or more, got {llm_batch}")
        self.runners = {LARGE: large} if small is None else {SMALL: small, LARGE: large}
        self.router = router or AlwaysLarge()
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.names = names
        self.draft = draft
        self.draft_cost = draft_cost or (small.weight_bytes / large.weight_bytes if small else 1.0)
        self.llm_batch = llm_batch
        self.loop_guard = loop_guard
        self.slots = min(runner.slots for runner in self.runners.values())
        self.context = min(runner.context for runner in self.runners.values())
        self.vocabulary = large.vocabulary
        self.stats = Stats()

    def engine(self) -> Engine:
        """An engine without texts yet, for those who add and abort while others are being written."""
        return Engine(self)

    def write(self, request: Request) -> Result:
        """Write one text to its end. Raises `ModelError` where that failed."""
        for event in self.stream([request]):
            if event.result is not None:
                if event.result.error is not None:
                    raise event.result.error
                return event.result
        raise AssertionError("a stream ends with a result")

    def write_all(self, requests: Sequence[Request]) -> list[Result]:
        """Write many texts, as many at once as there are slots; results in the order of the requests.

        One that failed has finish reason "error" and its `error`; the others are not touched by it.
        """
        results = {event.index: event.result for event in self.stream(requests) if event.result is not None}
        return [results[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Tokens as they are kept, each request's end with its result.

        Raises `InputError` for what cannot be written (see `check`) before anything is computed. Closing the
        iterator frees every slot.
        """
        engine = self.engine()
        for request in requests:
            engine.add(request)
        yield from engine

    def check(self, request: Request) -> None:
        """Raise `InputError` for a token that is none, `PromptTooLong` where prompt and answer do not fit both models."""
        least, most = min(request.prompt), max(request.prompt)
        if least < 0 or most >= self.vocabulary:
            raise InputError(
                f"the prompt has a token {least if least < 0 else most}; tokens are 0 to {self.vocabulary - 1}"
            )
        if len(request.prompt) + request.max_new_tokens > self.context:
            raise PromptTooLong(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones do not fit "
                f"the context of {self.context}; shorten the prompt or lower max_new_tokens"
            )
