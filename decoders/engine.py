"""Many texts written at once, which may come and go while others are being written.

A step is at most one call of the small model and one of the large. The small one serves the texts that it
has the pen of and those it drafts for, together; the large one, which costs most, waits until enough rows
want it. Each model keeps its own KV cache and reads only the tokens it has not seen. A token that the router
drops was never fed to either model; of a draft that is not accepted both forget the tail.
Knows nothing of strategies, prices or how a router decides (R-Stitch: arXiv 2507.17307; R2R: 2505.21600).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from viaticum.decoders.reading import read_unseen
from viaticum.decoders.request import Event, Request
from viaticum.decoders.runner import RunnerOutput
from viaticum.decoders.sampling import ACCEPT, FIRST, INSTEAD, SECOND, draw
from viaticum.decoders.sequence_state import LARGE, SMALL, SequenceState
from viaticum.decoders.slots import SlotAllocator
from viaticum.decoders.speculate import BatchWaitPolicy, DraftLength, verify
from viaticum.decoders.stats import CallStats
from viaticum.errors import ModelError
from viaticum.routers.token import Step, entropy
from viaticum.types import FinishReason

if TYPE_CHECKING:
    from viaticum.decoders.mixed import MixedDecoder


class Engine:
    """The texts that a `MixedDecoder` is writing now. Make one with `decoder.engine()`.

    One thread calls `step`, again and again, or iterates; any thread may `add` and `abort` meanwhile. Engines
    that share a runner share its slots, and one thread steps them all.
    """

    def __init__(self, decoder: MixedDecoder) -> None:
        self.decoder = decoder
        self._seats = SlotAllocator(decoder.runners.values())
        self._news = threading.Condition()
        self._numbers = itertools.count()
        self._arrived: deque[tuple[int, Request]] = deque()
        self._unwanted: set[int] = set()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._active: list[SequenceState] = []
        self._events: list[Event] = []
        self._patience = BatchWaitPolicy(decoder.llm_batch, decoder.draft)

    def add(self, request: Request) -> int:
        """Let a text be written as soon as there is a slot; returns the number that its events carry, from 0.

        Raises `InputError` for a token that is none, and `PromptTooLong` where prompt and longest answer do
        not fit the context of both models.
        """
        self.decoder.check(request)
        with self._news:
            number = next(self._numbers)
            self._arrived.append((number, request))
            self._news.notify_all()
        return number

    def abort(self, number: int) -> None:
        """End a text in the next step: its last event has finish reason "aborted" and what was written.

        One that has ended already stays as it ended.
        """
        with self._news:
            self._unwanted.add(number)
            self._news.notify_all()

    @property
    def busy(self) -> bool:
        """Whether any text is being written or waits for its turn."""
        return bool(self._arrived or self._waiting or self._active)

    @property
    def free_slots(self) -> int:
        """Texts that could begin in the next step; other engines that share a runner use the same slots."""
        return len(self._seats.free())

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until there is something to do; False where `timeout` seconds passed without."""
        with self._news:
            return self._news.wait_for(lambda: self.busy, timeout)

    def step(self) -> list[Event]:
        """Let the texts go on by one call of each model at most; returns what became of them.

        A text whose logits are not finite, or that needs more memory than there is, ends with reason "error",
        and the others go on. Raises `ModelError` where other engines hold every slot.
        """
        self._events = []
        self._take_news()
        self._admit()
        if self._active:
            self._active.sort(key=lambda text: text.slot)  # neighbouring slots are read without a copy
            with torch.inference_mode():
                self._call_small()
                self._call_large()
        return self._events

    def __iter__(self) -> Iterator[Event]:
        """Events until nothing is left to write. Closing the iterator frees every slot."""
        try:
            while self.busy:
                yield from self.step()
        finally:
            self.close()

    def close(self) -> None:
        """Drop every text, without events, and free the slots."""
        with self._news:
            self._arrived.clear()
            self._unwanted.clear()
        self._waiting.clear()
        for text in self._active:
            self._seats.give(text.slot)
        self._active = []

    # --- who is being written -------------------------------------------------------------------------------

    def _take_news(self) -> None:
        """Take in what other threads have asked for since the last step."""
        with self._news:
            self._waiting.extend(self._arrived)
            self._arrived.clear()
            unwanted, self._unwanted = self._unwanted, set()
        if not unwanted:
            return
        for text in [text for text in self._active if text.index in unwanted]:
            self._end(text, "aborted")
        for number, request in [each for each in self._waiting if each[0] in unwanted]:
            self._waiting.remove((number, request))
            self._end(self._writing(number, request), "aborted")

    def _admit(self) -> None:
        """Give free slots to those who wait longest."""
        free = self._seats.free() if self._waiting else []
        while self._waiting and free:
            number, request = self._waiting.popleft()
            text = self._writing(number, request)
            text.pen = SMALL if self.decoder.router.starts_small and self._pair else LARGE
            text.slot = self._seats.take(free, request.prompt)
            self._active.append(text)
            self._plan(text)
        if self._waiting and not self._active:
            raise ModelError("every slot is in use by other texts; end them, or give the runner more")

    def _writing(self, number: int, request: Request) -> SequenceState:
        decoder = self.decoder
        length = DraftLength(decoder.draft, decoder.draft_cost)
        return SequenceState(number, request, decoder.tokenizer, decoder.loop_guard, length)

    @property
    def _pair(self) -> bool:
        return SMALL in self.decoder.runners

    # --- the small model ------------------------------------------------------------------------------------

    def _call_small(self) -> None:
        """One call for the texts that the small model writes and those it drafts for."""
        texts = [text for text in self._active if text.pen == SMALL or text.drafting]
        router, began = self.decoder.router, time.perf_counter()
        pens = any(text.pen == SMALL for text in texts)
        texts, heads = self._read(SMALL, texts, hidden=router.needs_hidden and pens)
        if heads is None:
            return
        tokens, guesses = _draw(heads, texts)
        table = [tokens, heads.finite]
        rows = [row for row, text in enumerate(texts) if text.pen == SMALL]
        if rows:
            step = _step(heads, tokens, texts, rows)
            scores = router.score(step)
            keep = router.keep_small(step if scores is None else replace(step, scores=scores))
            table += [_spread(each, rows, tokens) for each in (step.entropy, keep)]
            table += [] if scores is None else [_spread(scores, rows, tokens)]
        columns = _to_host(table)
        self._count(SMALL, len(texts), began)
        for row, text in enumerate(texts):
            token, finite, *judged = (column[row] for column in columns)
            guess = guesses.get(row)
            if text.pen == SMALL:
                if not finite:
                    self._damaged(SMALL, text)
                    continue
                self.decoder.stats.proposed += 1
                text.score = judged[2] if len(judged) > 2 else text.score
                if judged[1]:
                    self._keep(text, int(token), SMALL, judged[0])
                else:
                    self._lose_pen(text, int(token), guess)
            elif finite:
                text.guess(int(token), guess)
                if self._ends(text.draft):
                    text.wanted = len(text.draft)  # nothing follows
            else:  # the large one needs no draft
                self.decoder.runners[SMALL].discard(text.slot)
                text.drafts, text.wanted = False, len(text.draft)

    def _lose_pen(self, text: SequenceState, token: int, guess: Tensor | None) -> None:
        """The router dropped the small model's token. It still is a draft, if it is a fair draw."""
        self.decoder.stats.dropped += 1
        text.pen, text.proposed = LARGE, True
        greedy = text.request.sampling.temperature == 0
        if self.decoder.draft != 0 and (greedy or not self.decoder.router.looks_at_tokens):
            text.guess(token, guess)
        self._plan(text)

    def _plan(self, text: SequenceState) -> None:
        """Say how many tokens should be drafted before the large model is called for a text that it writes."""
        fair = bool(text.draft) or not text.proposed  # else the next place has had its draw
        if text.pen == SMALL or not self._pair or self.decoder.draft == 0 or not text.drafts or not fair:
            return
        if text.left < 2:  # the large model writes the last token itself
            text.drop_draft()
        elif not self.decoder.router.large_stretches or self._ends(text.draft):
            text.wanted = len(text.draft)
        else:
            text.wanted = text.length.choose(len(text.draft), text.left - 1)

    def _ends(self, tokens: list[int]) -> bool:
        """Whether a text ends with these tokens."""
        return bool(tokens) and tokens[-1] in self.decoder.stop_ids

    # --- the large model ------------------------------------------------------------------------------------

    def _call_large(self) -> None:
        """One call for the texts that the large model writes: it verifies their drafts and adds a token."""
        ready = [text for text in self._active if text.pen == LARGE and not text.drafting]
        drafting = any(text.drafting for text in self._active)
        if not self._patience.is_over(len(ready), drafting, any(text.pen == SMALL for text in self._active)):
            return
        began = time.perf_counter()
        texts, heads = self._read(LARGE, ready)
        if heads is None:
            return
        places = [(text, ahead) for text in texts for ahead in range(len(text.draft) + 1)]
        tokens, accepted = verify(
            heads.logits,
            [text.request.sampling for text, _ in places],
            [text.draft[ahead] if ahead < len(text.draft) else None for text, ahead in places],
            {
                row: guess
                for row, (text, ahead) in enumerate(places)
                if ahead < len(text.draft) and (guess := text.guesses[ahead]) is not None
            },
            [_numbers(text, ahead) for text, ahead in places],
        )
        step = Step(
            logits=heads.logits,
            entropy=entropy(heads.logits) if heads.entropy is None else heads.entropy,
            requests=[text.index for text, _ in places],
            positions=[len(text.made_by) + ahead for text, ahead in places],
            tokens=tokens,
        )
        table = [tokens, heads.finite, step.entropy, accepted]
        if self._pair:
            table.append(self.decoder.router.hand_back(step))
        rows = list(zip(*_to_host(table), strict=True))
        self._count(LARGE, len(texts), began)
        for text in texts:
            mine, rows = rows[: len(text.draft) + 1], rows[len(text.draft) + 1 :]
            self._write_large(text, mine)

    def _write_large(self, text: SequenceState, places: list[tuple[float, ...]]) -> None:
        """Keep a text's tokens up to the first that is no draft, ends it, or gives the pen back."""
        drafted, written, accepted = len(text.draft), 0, 0
        base = len(text.tokens)
        if not all(finite for _, finite, *_ in places):
            self._write_damaged(text)
            return
        for token, _, chance, took, *back in places:
            written += 1
            accepted += bool(took)
            self._keep(text, int(token), LARGE, chance, bool(took))
            if text.ended:
                break
            if back and back[0]:
                text.pen = SMALL
                break
            if not took:
                break
        self.decoder.stats.drafted += drafted
        self.decoder.stats.accepted += accepted
        self.decoder.stats.large_tokens += written
        if drafted:
            text.length.learn(drafted, written)
        text.drop_draft()
        for model, runner in self.decoder.runners.items():
            # The last token is read again: its logits are wanted.
            if model in text.readers:
                runner.truncate(text.slot, min(base + accepted, len(text.tokens) - 1))
        if not text.ended:
            self._plan(text)

    def _write_damaged(self, text: SequenceState) -> None:
        """A draft may be what damaged the logits, those before it too (0 * NaN is NaN): read once more without."""
        if not text.draft:
            self._damaged(LARGE, text)
            return
        self.decoder.runners[LARGE].discard(text.slot)
        text.drafts = False
        text.drop_draft()

    # --- both -----------------------------------------------------------------------------------------------

    def _read(
        self, model: int, texts: list[SequenceState], *, hidden: bool = False
    ) -> tuple[list[SequenceState], RunnerOutput | None]:
        """One call of one model for these texts; those that memory is too short for end here."""
        heads, texts, failed = (
            read_unseen(self.decoder.runners[model], model, texts, self._calls(model), hidden=hidden)
            if texts
            else (None, [], [])
        )
        for text, error in failed:
            self._end(
                text, "error", error=ModelError(f"request {text.index}: {self.decoder.names[model]}: {error}")
            )
        return texts, heads

    def _keep(
        self, text: SequenceState, token: int, model: int, chance: float, accepted: bool = False
    ) -> None:
        """Append a token to its text, tell of it, and end the text where it ends there."""
        ends = token in self.decoder.stop_ids
        shown, reason = text.keep(token, model, chance, accepted, ends)
        if reason is None:
            self._events.append(Event(text.index, token, self.decoder.names[model], shown))
        else:
            self._end(text, reason, token, model, shown)

    def _end(
        self,
        text: SequenceState,
        reason: FinishReason,
        token: int | None = None,
        model: int | None = None,
        shown: str = "",
        error: ModelError | None = None,
    ) -> None:
        if text.slot >= 0:  # else it waited for its turn
            self._active.remove(text)
            self._seats.give(text.slot)
        rest, result = text.end(reason, self.decoder.names, error)
        name = "" if model is None else self.decoder.names[model]
        self._events.append(Event(text.index, token, name, shown + rest, result))

    def _damaged(self, model: int, text: SequenceState) -> None:
        """Give up a text whose logits are not finite, and what its slot holds with it."""
        self.decoder.runners[model].discard(text.slot)
        name = self.decoder.names[model]
        error = ModelError(
            f"request {text.index}: the logits of {name} are not finite after {len(text.tokens)} tokens; "
            "its weights or the input are damaged"
        )
        self._end(text, "error", error=error)

    def _calls(self, model: int) -> CallStats:
        return self.decoder.stats.large if model == LARGE else self.decoder.stats.small

    def _count(self, model: int, rows: int, began: float) -> None:
        calls = self._calls(model)
        calls.steps += 1
        calls.rows += rows
        calls.seconds += time.perf_counter() - began


def _draw(heads: RunnerOutput, texts: list[SequenceState]) -> tuple[Tensor, dict[int, Tensor]]:
    """The next token of each text, as `draw` does it; greedy ones may be there already."""
    if heads.tokens is not None and all(text.request.sampling.temperature == 0 for text in texts):
        return heads.tokens, {}
    return draw(
        heads.logits,
        [text.request.sampling for text in texts],
        [text.number(FIRST, len(text.draft)) for text in texts],
    )


def _step(heads: RunnerOutput, tokens: Tensor, texts: list[SequenceState], rows: list[int]) -> Step:
    """What the router is shown of the rows that the small model has the pen of."""
    logits, hidden, chances = heads.logits, heads.hidden, heads.entropy
    if len(rows) < len(texts):
        index = torch.tensor(rows, device=logits.device)
        logits, tokens = logits[index], tokens[index]
        hidden = None if hidden is None else hidden[index]
        chances = None if chances is None else chances[index]
    return Step(
        logits=logits,
        entropy=entropy(logits) if chances is None else chances,
        requests=[texts[row].index for row in rows],
        positions=[len(texts[row].made_by) for row in rows],
        tokens=tokens,
        hidden=hidden,
    )


def _spread(values: Tensor, rows: list[int], like: Tensor) -> Tensor:
    """values [len(rows)] at their rows of a column [B], zero elsewhere."""
    if len(rows) == len(like):
        return values
    column = torch.zeros(len(like), device=like.device)
    return column.index_copy(0, torch.tensor(rows, device=like.device), values.float())


def _to_host(columns: Sequence[Tensor]) -> list[list[float]]:
    """All columns [N] in one transfer. Token ids are whole numbers below 2^24, which float32 keeps."""
    table: list[list[float]] = torch.stack([column.float() for column in columns]).tolist()
    return table


def _numbers(text: SequenceState, ahead: int) -> tuple[float, float]:
    """To accept a draft with, and to draw the token with where there is none or it is not accepted."""
    if ahead < len(text.draft):
        return text.number(ACCEPT, ahead), text.number(INSTEAD, ahead)
    return 0.0, text.number(SECOND if text.proposed and ahead == 0 else FIRST, ahead)
