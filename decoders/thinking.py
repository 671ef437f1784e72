"""When the closing tag of a thought has to be forced.

Budget forcing (s1, arXiv 2501.19393, section 3.1): a thought that has used its budget is ended by writing its
closing tag, and the model goes on with the answer. Where a thought begins and ends is found in the text
(`viaticum.thinking`), because a tokenizer may split a tag in several ways; tags are forced as token ids.
Leaves out the paper's other half, lengthening a thought by suppressing its end ("Wait").
"""

from __future__ import annotations

from viaticum.decoders.request import ThinkingLimit, ThoughtEnd

MAX_FORCED = 3  # closing tags forced in one text; a model that opens thought after thought is in a loop


class ThoughtBudget:
    """What is left of the thinking budget of one sequence.

    Attributes:
        used: tokens of its thoughts so far, without those that were forced.
        closed_by: what ended its last thought; None before.
        forced: closing tags that were forced.
    """

    def __init__(self, limit: ThinkingLimit, max_new_tokens: int) -> None:
        self.limit = limit
        self.used = 0
        self.closed_by: ThoughtEnd | None = None
        self.forced = 0
        self._max_new_tokens = max_new_tokens

    def can_close(self, written: int) -> bool:
        """Whether the closing tag and an answer fit after `written` output tokens."""
        return self._max_new_tokens - written > len(self.limit.close_ids)

    def left(self, written: int) -> int | None:
        """Tokens that an open thought may still have after `written` output tokens; None: no limit."""
        if self.limit.budget is None:
            return None
        room = self._max_new_tokens - written - len(self.limit.close_ids) - max(1, self.limit.answer)
        return max(0, min(self.limit.budget - self.used, room))

    @property
    def is_exhausted(self) -> bool:
        """Whether the closing tag has been forced as often as makes sense."""
        return self.forced >= MAX_FORCED

    def first_ids(self, inside: bool) -> tuple[int, ...]:
        """The tokens that a budget of 0 forces before the first one, if they and an answer fit."""
        ids = self.limit.close_ids if inside else self.limit.empty_ids
        return ids if self.limit.budget == 0 and self._max_new_tokens > len(ids) else ()
