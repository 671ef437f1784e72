"""State of one sequence while it is decoded: its tokens, active model and draft, and how it ended.

Bookkeeping on the host: computes no tensors and knows no model.
"""

from __future__ import annotations

import time

from torch import Tensor

from viaticum.decoders.logits import LogitAdjuster
from viaticum.decoders.loop import LoopGuard
from viaticum.decoders.request import Request, Result, ThoughtEnd, TokenLogprobs
from viaticum.decoders.sampling import uniform
from viaticum.decoders.speculate import DraftLength
from viaticum.decoders.text import NOTHING_SHOWN, Shown, TextStream, Tokenizer
from viaticum.decoders.thinking import ThoughtBudget
from viaticum.errors import ModelError
from viaticum.thinking import ThinkingSplitter
from viaticum.types import FinishReason, TokenCount, Trace

SMALL, LARGE = 0, 1
NO_SCORE = float("nan")


class SequenceState:
    """A sequence of prompt and output tokens.

    `active_model` (SMALL or LARGE) decodes the next token. `draft` are tokens that the small model proposes
    to follow; the large one verifies them once there are `draft_target` of them. `closing` says why the
    closing tag of the thought has to be forced next, if it has to.
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
        self.tokens = list(request.prompt)  # as the large model reads them
        self.prefilled: set[int] = set()  # models whose cache holds the prompt
        self.read_by: set[int] = set()  # models that have ever read it
        self.made_by: list[int] = []
        self.entropies: list[float] = []
        self.accepted: list[bool] = []
        self.scores: list[float] = []
        self.score = NO_SCORE  # of the router, for the proposed next token
        self.proposal_dropped = False  # whether a proposal for the next position was dropped by the router
        self.draft: list[int] = []
        self.draft_probabilities: list[Tensor | None] = []  # [V] that each draft token was sampled from
        self.draft_target = 0
        sampling = request.sampling
        self.adjuster = LogitAdjuster(sampling, len(request.prompt)) if sampling.adjusts_logits else None
        self.logprobs: TokenLogprobs | None = None  # of the next token
        self._last_logprobs: TokenLogprobs | None = None
        self._text_logprobs: list[TokenLogprobs] = []
        self.can_draft = True  # False once the small model failed to draft
        self.draft_length = draft_length
        self.finished = False
        splitter = ThinkingSplitter(request.thinking, request.inside_thought)
        self._stream = TextStream(tokenizer, request.stop, splitter)
        self._thought = [0, 0]  # tokens of the thought by model that made them
        self.closing: ThoughtEnd | None = None
        limit = request.thinking_limit
        self._budget = ThoughtBudget(limit, request.max_new_tokens) if limit else None
        self._forced: list[bool] = []  # stays empty without a limit
        self._guard = guard
        self._loop = guard.detector() if guard else None
        self.started_at = time.perf_counter()

    @property
    def remaining(self) -> int:
        """Tokens that may still be decoded."""
        return self.request.max_new_tokens - len(self.made_by)

    @property
    def room(self) -> int:
        """Tokens that may still be decoded before the sequence ends or its thought is closed."""
        left = self._budget_left()
        return self.remaining if left is None else min(left, self.remaining)

    @property
    def drafting(self) -> bool:
        return self.active_model == LARGE and len(self.draft) < self.draft_target

    def shift(self, model: int) -> int:
        """By how much the prompt of a model is longer than that of the large one."""
        return len(self.request.prompts[model]) - len(self.request.prompt)

    def length(self, model: int) -> int:
        """Tokens of prompt and output for a model."""
        return len(self.tokens) + self.shift(model)

    def length_with_draft(self, model: int) -> int:
        return self.length(model) + len(self.draft)

    def unread(self, model: int, read: int) -> list[int]:
        """The tokens and draft tokens beyond the first `read` of a model."""
        prompt = self.request.prompts[model]
        if prompt is not self.request.prompt and read < len(prompt):
            return [*prompt[read:], *self.tokens[len(self.request.prompt) :], *self.draft]
        read -= self.shift(model)
        if read >= len(self.tokens):
            return self.draft[read - len(self.tokens) :]
        return self.tokens[read:] + self.draft

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
        inside, budget = self._stream.inside_thought, self._budget
        if is_stop and inside and budget and budget.can_close(len(self.made_by)) and not budget.is_exhausted:
            self.closing = "stop"  # in place of the token
            return NOTHING_SHOWN, None
        if is_stop and self._wants_cue():
            self.closing = "stop"
            return NOTHING_SHOWN, None
        self._record(token, model, entropy, accepted)
        shown = NOTHING_SHOWN if is_stop else self._push(token, model)
        if inside and budget and not self._stream.inside_thought:
            budget.closed_by = "model"
        if is_stop or self._stream.stopped:
            return shown, "stop"
        if self.remaining <= 0:
            return shown, "length"
        loops = self._loop is not None and self._loop.push(token, thought=self._stream.inside_thought)
        if self._stream.inside_thought and budget and budget.can_close(len(self.made_by)):
            if loops:
                self.closing = "loop"
            elif self._budget_left() == 0:
                self.closing = "budget"
            if self.closing is not None and budget.is_exhausted:
                self.closing = None
                return shown, "loop"
            return shown, None
        return shown, "loop" if loops else None

    def force_close(self) -> list[tuple[int, Shown]]:
        """Write the closing tag of a thought that has to end, as tokens of the active model.

        Returns:
            Its tokens, and what may be shown after each; none if the thought goes on.
        """
        if self._budget is None or self.closing is None:
            return []
        limit, reason = self._budget.limit, self.closing
        ids = limit.close_ids
        if not self._stream.inside_thought:
            ids = limit.cue_ids if reason == "stop" else limit.empty_ids
        if ids != limit.cue_ids:
            self._budget.closed_by = reason
            self._budget.forced += 1
        self.closing = None
        self.score, self.logprobs = NO_SCORE, None
        self._loop = self._guard.detector() if self._guard else None
        written = []
        for token in ids:
            self._record(token, self.active_model, float("nan"), accepted=False, forced=True)
            written.append((token, self._push(token, self.active_model, forced=True)))
        return written

    def _wants_cue(self) -> bool:
        """Whether a stop id would end the text right after a thought, and a cue can begin an answer."""
        budget = self._budget
        if budget is None or budget.closed_by != "model" or self.remaining <= len(budget.limit.cue_ids):
            return False
        return (
            bool(budget.limit.cue_ids) and not self._stream.inside_thought and not self._stream.text.strip()
        )

    def close_if_no_budget(self) -> None:
        """Have the thought closed before the first token if its budget is 0."""
        if self._budget and self._budget.first_ids(self._stream.inside_thought):
            self.closing = "budget"

    def is_forced(self, index: int) -> bool:
        """Whether the token at `index` of `tokens` was forced."""
        return bool(self._forced) and self._forced[index - len(self.request.prompt)]

    def _budget_left(self) -> int | None:
        """Tokens that the open thought may still have; None if none is open, or it has no limit."""
        if self._budget is None or not self._stream.inside_thought:
            return None
        return self._budget.left(len(self.made_by))

    def _record(
        self, token: int, model: int, entropy: float, accepted: bool, *, forced: bool = False
    ) -> None:
        self.tokens.append(token)
        self.made_by.append(model)
        self.entropies.append(entropy)
        self.accepted.append(accepted)
        self.scores.append(self.score)
        if self._budget:
            self._forced.append(forced)
        self.score, self.proposal_dropped = NO_SCORE, False
        self._last_logprobs, self.logprobs = self.logprobs, None

    def _push(self, token: int, model: int, *, forced: bool = False) -> Shown:
        """Add the text of a token, and count it if it belongs to a thought."""
        inside = self._stream.inside_thought
        shown = self._stream.push(token)
        if inside or self._stream.inside_thought:
            self._thought[model] += 1
            if self._budget and not forced:
                self._budget.used += 1
        elif self._last_logprobs is not None:
            self._text_logprobs.append(self._last_logprobs)
        return shown

    def finish(
        self, reason: FinishReason, names: tuple[str, str], error: ModelError | None
    ) -> tuple[Shown, Result]:
        """End the sequence; returns what was held back so far, and the result."""
        self.finished = True
        rest = self._stream.finish(ended=reason == "stop")
        thinking = self._stream.thinking
        result = Result(
            text=self._stream.text,
            stop_string=self._stream.stop_string,
            # A stop string may be completed by the last bytes.
            finish_reason="stop" if self._stream.stopped else reason,
            trace=Trace(
                names,
                tuple(self.tokens[len(self.request.prompt) :]),
                tuple(self.made_by),
                tuple(self.entropies),
                tuple(self.accepted),
                tuple(self.scores) if any(score == score for score in self.scores) else (),
                tuple(self._forced) if any(self._forced) else (),
            ),
            usage={
                names[model]: TokenCount(
                    len(self.request.prompts[model]),
                    self.made_by.count(model),
                    reasoning_tokens=self._thought[model] if thinking else 0,
                )
                for model in sorted(self.read_by)
            },
            seconds=time.perf_counter() - self.started_at,
            error=error,
            thinking=thinking,
            thought_closed_by=self._budget.closed_by if self._budget else None,
            logprobs=tuple(self._text_logprobs),
        )
        return rest, result
