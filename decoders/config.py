"""Settings of a decoder: one model, or a small and a large one with a token router; validated once.

Both `MixedDecoder` and `Engine` are built from a `DecoderConfig`. Leaves out decoding itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from viaticum.decoders.auto_mode import ModeChooser
from viaticum.decoders.loop import LoopGuard
from viaticum.decoders.request import BIAS_LIMIT, Request
from viaticum.decoders.runner import Runner
from viaticum.decoders.sequence_state import LARGE, SMALL
from viaticum.decoders.text import Tokenizer
from viaticum.decoders.vocabulary import SharedVocabulary
from viaticum.errors import InputError, PromptTooLong
from viaticum.routers.token import AlwaysLarge, TokenRouter


@dataclass(frozen=True, eq=False)
class DecoderConfig:
    """The models of a decoder and how they cooperate.

    Args:
        large: runner of the large model, or of the only one.
        small: runner of the small model; None: the large one decodes everything.
        tokenizer: turns token ids into text.
        router: chooses between the two models token by token.
        stop_ids: token ids that end a sequence; they are counted, not shown.
        names: of the small and the large model in usage and traces.
        draft: tokens that the small model drafts before each pass of the large one, which verifies them in
            that pass. 0: none; None: as many as pay off. The output distribution is the same with any draft,
            and the same text if greedy.
        draft_cost: cost of a decode step of the small model in steps of the large one, for `draft=None`;
            None: the ratio of their weight bytes.
        llm_batch: call the large model when this many sequences wait for it, or none can continue without it.
        loop_guard: what counts as a loop and ends a sequence; None: nothing does.
        modes: chooses `router` and `draft` while texts are decoded; None: they stay.
        shared_vocabulary: tokens that may be written, where these are fewer than models and tokenizer share:
            the large model alone, for a pair, writes what the small one can read.

    Raises:
        InputError: models that do not fit each other, or a number out of range.
    """

    large: Runner
    small: Runner | None
    tokenizer: Tokenizer
    router: TokenRouter = field(default_factory=AlwaysLarge)
    stop_ids: frozenset[int] = frozenset()
    names: tuple[str, str] = ("small", "large")
    draft: int | None = 0
    draft_cost: float | None = None
    llm_batch: int = 1
    loop_guard: LoopGuard | None = field(default_factory=LoopGuard)
    modes: ModeChooser | None = None
    shared_vocabulary: SharedVocabulary | None = None

    def __post_init__(self) -> None:
        small = self.small
        if small is None and not isinstance(self.router, AlwaysLarge):
            raise InputError(
                f"{type(self.router).__name__} chooses between two models; give a small one as well"
            )
        if self.draft is not None and self.draft < 0:
            raise InputError(f"draft must be 0 or more tokens, or None to choose by itself, got {self.draft}")
        if self.draft != 0 and small is None:
            raise InputError("a draft is written by a small model; give one, or draft=0")
        if self.modes is not None and small is None:
            raise InputError("there is one mode without a small model; give one, or modes=None")
        if self.draft_cost is not None and not self.draft_cost > 0:
            raise InputError(f"draft_cost must be above 0, got {self.draft_cost}")
        if self.llm_batch < 1:
            raise InputError(f"llm_batch must be 1 or more, got {self.llm_batch}")

    @cached_property
    def runners(self) -> dict[int, Runner]:
        """The runners by model, SMALL first."""
        return {LARGE: self.large} if self.small is None else {SMALL: self.small, LARGE: self.large}

    @cached_property
    def vocabulary(self) -> SharedVocabulary:
        """The tokens that may be written: those of the models, of the tokenizer and of `shared_vocabulary`.

        A tokenizer without `get_vocab` has a token for every row of the models' logits.

        Raises:
            InputError: there are none.
        """
        if self.shared_vocabulary is not None:
            return self.shared_vocabulary
        list_tokens = getattr(self.tokenizer, "get_vocab", None)
        ids = None if list_tokens is None else list_tokens().values()
        rows = min(runner.vocabulary for runner in self.runners.values())
        return SharedVocabulary.of(rows, ids, self.stop_ids)

    @cached_property
    def relative_draft_cost(self) -> float:
        """Cost of a decode step of the small model, in steps of the large one."""
        if self.draft_cost is not None:
            return self.draft_cost
        return 1.0 if self.small is None else self.small.weight_bytes / self.large.weight_bytes

    @cached_property
    def slots(self) -> int:
        """Sequences that may be decoded at once."""
        return min(runner.slots for runner in self.runners.values())

    def check(self, request: Request) -> None:
        """Check that a request can be decoded.

        Raises:
            InputError: a token of a prompt is not one of the model that reads it.
            PromptTooLong: prompt and longest answer do not fit the context of both models.
        """
        for model, runner in self.runners.items():
            prompt = request.prompts[model]
            lowest, highest = min(prompt), max(prompt)
            # Each reads its own: a chat template may have tokens for which only this model has rows.
            if lowest < 0 or highest >= runner.vocabulary:
                token = lowest if lowest < 0 else highest
                raise InputError(
                    f"the prompt of {self.names[model]} has a token {token}; its tokens are 0 to "
                    f"{runner.vocabulary - 1}"
                )
            if len(prompt) + request.max_new_tokens > runner.context:
                raise PromptTooLong(
                    f"a prompt of {len(prompt)} tokens and {request.max_new_tokens} new ones do not fit "
                    f"the context of {runner.context}, which the models and their memory allow; shorten the "
                    "prompt or lower max_new_tokens"
                )
        limit = request.thinking_limit
        forced = (*limit.close_ids, *limit.empty_ids, *limit.cue_ids) if limit else ()
        if any(token not in self.vocabulary for token in forced):
            raise InputError(f"a closing tag of tokens {forced}; some of them are not in the vocabulary")
        banned = {token for token, bias in request.sampling.logit_bias if bias <= -BIAS_LIMIT}
        for token, _ in request.sampling.logit_bias:
            if token not in self.vocabulary:
                last = self.vocabulary.size - 1
                raise InputError(f"logit_bias is for tokens of the vocabulary, from 0 to {last}; got {token}")
        if len(banned) >= len(self.vocabulary):
            raise InputError("logit_bias bans every token; leave one")
