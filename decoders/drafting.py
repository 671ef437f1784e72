"""When the small model drafts for a sequence that the large one decodes, and how a sequence changes its mode.

How long a draft pays and how it is verified: `decoders.speculate`. Leaves out models and their calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from viaticum.decoders.config import DecoderConfig
from viaticum.decoders.sequence_state import LARGE, SMALL, SequenceState
from viaticum.decoders.speculate import DraftLength


def plan_draft(sequence: SequenceState, config: DecoderConfig) -> None:
    """Set how many tokens to draft before the large model's next call for a sequence that it decodes."""
    # Without a draft a dropped proposal has used up the unbiased draw for the next position.
    unbiased = bool(sequence.draft) or not sequence.proposal_dropped
    if (
        sequence.active_model == SMALL
        or config.small is None
        or config.draft == 0
        or not sequence.can_draft
        or not unbiased
    ):
        return
    if sequence.room < 2:  # the large model decodes the last token itself
        sequence.clear_draft()
    elif not config.router.multi_token_handoff or ends_with_stop(sequence.draft, config):
        sequence.draft_target = len(sequence.draft)
    else:
        sequence.draft_target = sequence.draft_length.choose(len(sequence.draft), sequence.room - 1)


def ends_with_stop(tokens: Sequence[int], config: DecoderConfig) -> bool:
    """Whether nothing can follow these tokens."""
    return bool(tokens) and tokens[-1] in config.stop_ids


def change_mode(sequence: SequenceState, config: DecoderConfig) -> None:
    """Continue a sequence with the router and the draft of `config`, which are others than before."""
    sequence.clear_draft()
    sequence.draft_length = DraftLength(config.draft, config.relative_draft_cost)
    if not config.router.starts_small:
        sequence.active_model = LARGE
    elif not sequence.made_by:
        sequence.active_model = SMALL
    plan_draft(sequence, config)
