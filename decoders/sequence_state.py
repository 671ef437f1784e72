"""One text being written: what is kept, who has the pen, what is drafted, and how it ends.

Plain bookkeeping on the host: no tensor is computed here, and no model known.
"""

from __future__ import annotations

import time

from torch import Tensor

from viaticum.decoders.loop import LoopGuard
from viaticum.decoders.request import Request, Result
from viaticum.decoders.sampling import uniform
from viaticum.decoders.speculate import DraftLength
from viaticum.decoders.text import TextStream, Tokenizer
from viaticum.errors import ModelError
from viaticum.types import FinishReason, TokenCount, Trace

SMALL, LARGE = 0, 1
UNKNOWN = float("nan")


class SequenceState:
    """`tokens` is prompt and output; `pen` is the model that writes next; `draft` are tokens that the small
    model guesses to follow, until the large one has looked at `wanted` of them."""

    def __init__(
        self, index: int, request: Request, tokenizer: Tokenizer, guard: LoopGuard | None, length: DraftLength
    ) -> None:
        self.index, self.request = index, request
        self.slot = -1
        self.pen = LARGE
        self.tokens = list(request.prompt)
        self.readers: set[int] = set()  # models that have read the prompt
        self.made_by: list[int] = []
        self.entropies: list[float] = []
        self.accepted: list[bool] = []
        self.scores: list[float] = []
        self.score = UNKNOWN  # the router's, of the proposal for the next place
        self.proposed = False  # whether a token was drawn for the next place and dropped
        self.draft: list[int] = []
        self.guesses: list[Tensor | None] = []  # the probabilities [V] that a sampled draft was drawn from
        self.wanted = 0
        self.drafts = True  # False once the small model failed to draft
        self.length = length
        self.ended = False
        self._stream = TextStream(tokenizer, request.stop)
        self._loop = guard.watch() if guard else None
        self.began = time.perf_counter()

    @property
    def left(self) -> int:
        """Tokens that may still be written."""
        return self.request.max_new_tokens - len(self.made_by)

    @property
    def drafting(self) -> bool:
        return self.pen == LARGE and len(self.draft) < self.wanted

    @property
    def sequence(self) -> list[int]:
        return self.tokens + self.draft

    def number(self, use: int, ahead: int = 0) -> float:
        """Randomness for the place `ahead` tokens from the next one."""
        if self.request.sampling.temperature == 0:
            return 0.0  # not used
        return uniform(self.request.sampling.seed, len(self.made_by) + ahead, use)

    def guess(self, token: int, probabilities: Tensor | None) -> None:
        self.draft.append(token)
        self.guesses.append(probabilities)

    def drop_draft(self) -> None:
        self.draft, self.guesses, self.wanted = [], [], 0

    def keep(
        self, token: int, model: int, entropy: float, accepted: bool, ends: bool
    ) -> tuple[str, FinishReason | None]:
        """Append a token that `model` made; `ends`: it is one that ends a text. Returns what may be shown, and the reason if this was the last."""
        self.tokens.append(token)
        self.made_by.append(model)
        self.entropies.append(entropy)
        self.accepted.append(accepted)
        self.scores.append(self.score)
        self.score, self.proposed = UNKNOWN, False
        shown = "" if ends else self._stream.push(token)
        if ends or self._stream.stopped:
            return shown, "stop"
        if self.left <= 0:
            return shown, "length"
        if self._loop is not None and self._loop.push(token):
            return shown, "loop"
        return shown, None

    def end(
        self, reason: FinishReason, names: tuple[str, str], error: ModelError | None
    ) -> tuple[str, Result]:
        """The rest of the text, now that no more comes, and the result."""
        self.ended = True
        rest = self._stream.finish()
        result = Result(
            text=self._stream.text,
            # A stop string may end in the last bytes.
            finish_reason="stop" if self._stream.stopped else reason,
            trace=Trace(
                names,
                tuple(self.tokens[len(self.request.prompt) :]),
                tuple(self.made_by),
                tuple(self.entropies),
                tuple(self.accepted),
                tuple(self.scores) if any(score == score for score in self.scores) else (),
            ),
            usage={
                names[model]: TokenCount(len(self.request.prompt), self.made_by.count(model))
                for model in sorted(self.readers)
            },
            seconds=time.perf_counter() - self.began,
            error=error,
        )
        return rest, result
