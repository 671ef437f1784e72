"""The thinking limit of a local call: which tokens close a thought, and how long it may be.

Leaves out when they are forced (`viaticum.decoders.thinking`) and how remote models are told
(`viaticum.models.remote.thinking`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from viaticum.errors import InputError
from viaticum.models.base import Generation
from viaticum.thinking import ThinkingFormat

if TYPE_CHECKING:
    from viaticum.decoders import ThinkingLimit

ANSWER_TOKENS = 256  # left for the answer where the budget would use up max_new_tokens, at most a quarter

Encode = Callable[[str], list[int]]


def opening_ids(format: ThinkingFormat, inside: bool | None, encode: Encode) -> list[int]:
    """The tokens that open the thought after a prompt, where the template should have and has not.

    Args:
        format: of the model's thoughts.
        inside: whether the prompt ends inside a thought; None if it does not tell.
        encode: turns text into token ids.
    """
    if not format.opened or inside is not None:
        return []
    return encode(f"{format.tags[0].open[0]}\n")


def thinking_limit(
    format: ThinkingFormat, generation: Generation, inside: bool | None, encode: Encode
) -> ThinkingLimit | None:
    """How the thought of a call is limited and closed; None for a model that is not known to think.

    A budget of 0 writes an empty thought first, unless the prompt ends after a thought (a template that was
    told not to think).

    Args:
        format, inside, encode: as in `opening_ids`.
        generation: its thinking_budget and max_new_tokens.

    Raises:
        InputError: a budget for a model that is not known to think.
    """
    from viaticum.decoders import ThinkingLimit

    budget = generation.thinking_budget
    if not format.thinks:
        if budget:
            raise InputError(
                f"a thinking budget of {budget} tokens for a model that is not known to think; set `thinking`"
                " in its catalogue entry, or leave the budget out"
            )
        return None
    closing = (format.close if format.harmony else f"\n{format.close}\n\n") + format.cue
    empty = f"{format.tags[0].open[0]}\n{closing}" if format.tags and inside is None else ""
    return ThinkingLimit(
        close_ids=tuple(encode(closing)),
        budget=budget,
        empty_ids=tuple(encode(empty)) if empty else (),
        cue_ids=tuple(encode(f"\n\n{format.cue}")) if format.cue else (),
        answer=min(ANSWER_TOKENS, generation.max_new_tokens // 4),
    )
