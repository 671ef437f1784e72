"""State of one sequence while it is decoded: its tokens, active model and draft, and how it ended.

Bookkeeping on the host: computes no tensors and knows no model.
"""

from __future__ import annotations

import time

from torch import Tensor

from viaticum.decoders.loop import LoopGuard
from viaticum.decoders.request import Request, Result
from viaticum.decoders.sampling import uniform
from viaticum.decoders.speculate import DraftLength
from viaticum.decoders.text import NOTHING_SHOWN, Shown, TextStream, Tokenizer
from viaticum.errors import ModelError
from viaticum.thinking import ThinkingSplitter
from viaticum.types import FinishReason, TokenCount, Trace

SMALL, LARGE = 0, 1
NO_SCORE = float("nan")


class SequenceState:
    """A sequence of prompt and output tokens.

    `active_model` (SMALL or LARGE) decodes the next token. `draft` are tokens that the small model proposes
    to follow; the large one verifies them once there are `draft_target` of them.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        tokenizer: Tokenizer,
        guard: LoopGuard | None,
        draft_length: DraftLength,
    ) -> None:
        self.index, self.request = index, request
        self.slot = -1  # none yet
        self.active_model = LARGE
        self.tokens = list(request.prompt)
        self.prefilled: set[int] = set()  # models that have read the prompt
        self.made_by: list[int] = []
        self.entropies: list[float] = []
        self.accepted: list[bool] = []
        self.scores: list[float] = []
        self.score = NO_SCORE  # of the router, for the proposed next token
        self.proposal_dropped = False  # whether a proposal for the next position was dropped by the router
        self.draft: list[int] = []
        self.draft_probabilities: list[Tensor | None] = []  # [V] that each draft token was sampled from
        self.draft_target = 0
        self.can_draft = True  # False once the small model failed to draft
        self.draft_length = draft_length
        self.finished = False
        splitter = ThinkingSplitter(request.thinking, request.inside_thought)
        self._stream = TextStream(tokenizer, request.stop, splitter)
        self._thought = [0, 0]  # tokens of the thought by model that made them
        self._loop = guard.detector() if guard else None
        self.started_at = time.perf_counter()

    @property
    def remaining(self) -> int:
        """Tokens that may still be decoded."""
        return self.request.max_new_tokens - len(self.made_by)

    @property
    def drafting(self) -> bool:
        return self.active_model == LARGE and len(self.draft) < self.draft_target

    @property
    def tokens_with_draft(self) -> list[int]:
        return self.tokens + self.draft

    def uniform(self, purpose: int, ahead: int = 0) -> float:
        """The random number in [0, 1) for the position `ahead` tokens after the next one; 0 if greedy."""
        if self.request.sampling.temperature == 0:
            return 0.0  # not used
        return uniform(self.request.sampling.seed, len(self.made_by) + ahead, purpose)

    def add_draft_token(self, token: int, probabilities: Tensor | None) -> None:
        """Append a draft token; probabilities: [V] that it was sampled from, None if greedy."""
        self.draft.append(token)
        self.draft_probabilities.append(probabilities)

    def clear_draft(self) -> None:
        self.draft, self.draft_probabilities, self.draft_target = [], [], 0

    def append(
        self, token: int, model: int, entropy: float, accepted: bool, is_stop: bool
    ) -> tuple[Shown, FinishReason | None]:
        """Append an output token that `model` made.

        Args:
            token: its id.
            model: SMALL or LARGE.
            entropy: normalised, of the distribution that it came from.
            accepted: whether it was a draft token.
            is_stop: whether it is a stop id.

        Returns:
            What may be shown, and the finish reason if this was the last token.
        """
        self.tokens.append(token)
        self.made_by.append(model)
        self.entropies.append(entropy)
        self.accepted.append(accepted)
        self.scores.append(self.score)
        self.score, self.proposal_dropped = NO_SCORE, False
        began_inside = self._stream.inside_thought
        shown = NOTHING_SHOWN if is_stop else self._stream.push(token)
        self._thought[model] += began_inside or self._stream.inside_thought
        if is_stop or self._stream.stopped:
            return shown, "stop"
        if self.remaining <= 0:
            return shown, "length"
        if self._loop is not None and self._loop.push(token):
            return shown, "loop"
        return shown, None

    def finish(
        self, reason: FinishReason, names: tuple[str, str], error: ModelError | None
    ) -> tuple[Shown, Result]:
        """End the sequence; returns what was held back so far, and the result."""
        self.finished = True
        rest = self._stream.finish(ended=reason == "stop")
        thinking = self._stream.thinking
        result = Result(
            text=self._stream.text,
            # A stop string may be completed by the last bytes.
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
                names[model]: TokenCount(
                    len(self.request.prompt),
                    self.made_by.count(model),
                    reasoning_tokens=self._thought[model] if thinking else 0,
                )
                for model in sorted(self.prefilled)
            },
            seconds=time.perf_counter() - self.started_at,
            error=error,
            thinking=thinking,
        )
        return rest, result
