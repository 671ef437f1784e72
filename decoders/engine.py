"""Continuous batching of sequences that a small and a large model decode together, or one model alone.

A step is at most one call of the small model and one of the large. The small model's call serves the
sequences that it decodes and those that it drafts for; the large model, which costs most, waits until enough
sequences need it. Each model has its own KV cache and reads only tokens that it has not seen (catch-up). A
token that the router drops was never given to either model; after a rejected draft both drop its tail from
their caches. Leaves out strategies, prices and how a router decides (R-Stitch: arXiv 2507.17307; R2R:
2505.21600).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from viaticum.decoders.admission import Admission
from viaticum.decoders.blocks import OutOfBlocks
from viaticum.decoders.catch_up import catch_up
from viaticum.decoders.config import DecoderConfig
from viaticum.decoders.drafting import change_mode, ends_with_stop, plan_draft
from viaticum.decoders.logits import logprob_columns
from viaticum.decoders.request import Event, Request
from viaticum.decoders.rows import (
    logprobs_of,
    router_step,
    sample_next,
    scatter,
    to_host,
    verify_drafts,
)
from viaticum.decoders.runner import RunnerOutput
from viaticum.decoders.sequence_state import LARGE, SMALL, SequenceState
from viaticum.decoders.speculate import BatchWaitPolicy
from viaticum.decoders.stats import CallStats, Stats
from viaticum.decoders.text import NOTHING_SHOWN, Shown
from viaticum.errors import ModelError
from viaticum.routers.token import Step, entropy
from viaticum.types import FinishReason


class Engine:
    """The sequences that are being decoded with one configuration. Made by `MixedDecoder.engine()`.

    One thread calls `step` repeatedly, or iterates; any thread may `add` and `abort` meanwhile. Engines that
    share a runner share its slots and have to be stepped by the same thread.

    Args:
        config: models, router and settings.
        stats: counts the model calls.
    """

    def __init__(self, config: DecoderConfig, stats: Stats) -> None:
        self.config, self.stats = config, stats
        self._waiting = Admission(config)
        self._changed = threading.Condition()  # guards _added and _aborted
        self._ids = itertools.count()
        self._added: deque[tuple[int, Request]] = deque()
        self._aborted: set[int] = set()
        self._active: list[SequenceState] = []
        self._events: list[Event] = []
        self._batch_wait = BatchWaitPolicy(config.llm_batch, config.draft)
        self._tokens_seen = {model: self._call_stats(model).tokens for model in (SMALL, LARGE)}

    def add(self, request: Request) -> int:
        """Queue a request until there is a free slot; returns the index that its events carry, from 0.

        Raises:
            InputError: a token of the prompt is not in the vocabulary.
            PromptTooLong: prompt and longest answer do not fit the context of both models.
        """
        self.config.check(request)
        with self._changed:
            index = next(self._ids)
            self._added.append((index, request))
            self._changed.notify_all()
        return index

    def abort(self, index: int) -> None:
        """End a request in the next step; its last event has finish reason "aborted" and the text so far.

        Does nothing if the request has ended already.
        """
        with self._changed:
            self._aborted.add(index)
            self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether any request is being decoded or waits for a slot."""
        return bool(self._added or len(self._waiting) or self._active)

    @property
    def free_slots(self) -> int:
        """Requests that could start in the next step; engines that share a runner share its slots."""
        return len(self._waiting.free_slots())

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot or for memory, also those that were preempted."""
        return len(self._waiting)

    @property
    def starved(self) -> bool:
        """Whether nothing of it is decoded and other engines hold every slot, so that a step is an error."""
        return self.busy and not self._active and not self.free_slots

    def wait(self, timeout: float | None = None) -> bool:
        """Block until there is something to do; False after `timeout` seconds without."""
        with self._changed:
            return self._changed.wait_for(lambda: self.busy, timeout)

    def step(self) -> list[Event]:
        """Advance the sequences by at most one call of each model; returns the events.

        A sequence whose logits are not finite, or whose call needs more memory than there is, ends with
        reason "error"; the others continue. Where caches need too much, the youngest waits for the others.

        Raises:
            ModelError: other engines hold every slot.
        """
        self._events = []
        self._collect_changes()
        if self.config.modes is not None and len(self._waiting) and not self._active:
            self.config.modes.prepare(self.config.runners[SMALL], self.config.runners[LARGE])
        self._admit()
        if self._active:
            self._choose_mode()
            self._active.sort(key=lambda sequence: sequence.slot)  # neighbouring slots need no copy
            with torch.inference_mode():
                self._run_small()
                self._run_large()
        return self._events

    def __iter__(self) -> Iterator[Event]:
        """Events until no request is left. Closing the iterator frees every slot."""
        try:
            while self.busy:
                events = self.step()
                yield from events
                if not events and len(self._waiting) and not self._active:
                    raise ModelError("other texts hold the memory of this one; end them, or run fewer")
        finally:
            self.close()

    def close(self) -> None:
        """Drop every request, without events, and free the slots."""
        with self._changed:
            self._added.clear()
            self._aborted.clear()
        self._waiting.clear()
        for sequence in self._active:
            self._waiting.release(sequence)
        self._active = []

    # --- admission ------------------------------------------------------------------------------------------

    def _collect_changes(self) -> None:
        """Take over the requests that were added and aborted since the last step."""
        with self._changed:
            self._waiting.add(self._added)
            self._added.clear()
            aborted, self._aborted = self._aborted, set()
        if aborted:
            for sequence in [each for each in self._active if each.index in aborted]:
                self._finish(sequence, "aborted")
            for sequence in self._waiting.withdraw(aborted):
                self._finish(sequence, "aborted")

    def _admit(self) -> None:
        """Start what waits in free slots, as memory allows."""
        while sequence := self._waiting.admit(self._active):
            self._active.append(sequence)
            if sequence.read_by or sequence.made_by:  # it was preempted
                continue
            sequence.active_model = SMALL if self.config.router.starts_small and self._has_small else LARGE
            sequence.close_if_no_budget()
            self._force_close(sequence)
            plan_draft(sequence, self.config)
        if len(self._waiting) and not self._active and not self._waiting.free_slots():
            raise ModelError("every slot is in use by other texts; end them, or give the runner more")

    @property
    def _has_small(self) -> bool:
        return SMALL in self.config.runners

    def _choose_mode(self) -> None:
        """Continue every sequence in the mode that is the fastest for so many, if modes are chosen."""
        modes = self.config.modes
        if modes is None:
            return
        mode = modes.choose(len(self._active), self.stats)
        router = modes.router_of(mode)
        if (self.config.router, self.config.draft) == (router, mode.draft):
            return
        self.config = self._waiting.config = config = replace(
            self.config, router=router, draft=mode.draft, shared_vocabulary=self.config.vocabulary
        )
        self._batch_wait = BatchWaitPolicy(config.llm_batch, config.draft)
        for sequence in (*self._active, *self._waiting.sequences):
            change_mode(sequence, config)

    # --- the small model ------------------------------------------------------------------------------------

    def _run_small(self) -> None:
        """One call for the sequences that the small model decodes and those that it drafts for."""
        sequences = [each for each in self._active if each.active_model == SMALL or each.drafting]
        router, began = self.config.router, time.perf_counter()
        decodes = any(each.active_model == SMALL for each in sequences)
        sequences, output = self._forward(SMALL, sequences, hidden=router.needs_hidden and decodes)
        if output is None:
            return
        candidates = self.config.vocabulary.candidates(output.logits)
        tokens, probabilities = sample_next(output, candidates, sequences)
        table = [tokens, output.finite]
        rows = [row for row, each in enumerate(sequences) if each.active_model == SMALL]
        if rows:
            step = router_step(output, tokens, sequences, rows)
            scores = router.score(step)
            keep = router.keep_small(step if scores is None else replace(step, scores=scores))
            table += [scatter(each, rows, tokens) for each in (step.entropy, keep)]
            table += [] if scores is None else [scatter(scores, rows, tokens)]
        details = logprob_columns(
            candidates,
            tokens,
            [each.request.logprobs if each.active_model == SMALL else None for each in sequences],
        )
        columns = to_host([*table, *details])
        columns, details_of = columns[: len(table)], columns[len(table) :]
        self._count(SMALL, len(sequences), began)
        for row, sequence in enumerate(sequences):
            token, finite, *decision = (column[row] for column in columns)
            distribution = probabilities.get(row)
            if sequence.active_model == SMALL:
                if not finite:
                    self._fail_not_finite(SMALL, sequence)
                    continue
                self.stats.proposed += 1
                sequence.score = decision[2] if len(decision) > 2 else sequence.score
                if decision[1]:
                    sequence.logprobs = logprobs_of(sequence, token, [column[row] for column in details_of])
                    self._append(sequence, int(token), SMALL, decision[0])
                else:
                    self._hand_to_large(sequence, int(token), distribution)
            elif finite:
                sequence.add_draft_token(int(token), distribution)
                if ends_with_stop(sequence.draft, self.config):
                    sequence.draft_target = len(sequence.draft)  # nothing follows a stop id
            else:  # the large model can continue without a draft
                self.config.runners[SMALL].discard(sequence.slot)
                sequence.can_draft, sequence.draft_target = False, len(sequence.draft)

    def _hand_to_large(self, sequence: SequenceState, token: int, probabilities: Tensor | None) -> None:
        """Activate the large model after the router dropped a token, which if unbiased is the first draft."""
        self.stats.dropped += 1
        sequence.active_model, sequence.proposal_dropped = LARGE, True
        self.config.runners[SMALL].idle(sequence.slot)
        greedy = sequence.request.sampling.temperature == 0
        if self.config.draft != 0 and (greedy or not self.config.router.depends_on_token):
            sequence.add_draft_token(token, probabilities)
        plan_draft(sequence, self.config)

    # --- the large model ------------------------------------------------------------------------------------

    def _run_large(self) -> None:
        """One call for the sequences that the large model decodes: verify their drafts and add a token."""
        ready = [each for each in self._active if each.active_model == LARGE and not each.drafting]
        drafting = any(each.drafting for each in self._active)
        small_active = any(each.active_model == SMALL for each in self._active)
        if not self._batch_wait.should_run(len(ready), drafting, small_active):
            return
        began = time.perf_counter()
        sequences, output = self._forward(LARGE, ready)
        if output is None:
            return
        positions = [(each, ahead) for each in sequences for ahead in range(len(each.draft) + 1)]
        candidates = self.config.vocabulary.candidates(output.logits)
        tokens, accepted = verify_drafts(candidates, positions)
        step = Step(
            logits=output.logits,
            entropy=entropy(output.logits) if output.entropy is None else output.entropy,
            requests=[each.index for each, _ in positions],
            positions=[len(each.made_by) + ahead for each, ahead in positions],
            tokens=tokens,
        )
        table = [tokens, output.finite, step.entropy, accepted]
        if self._has_small:
            table.append(self.config.router.hand_back(step))
        details = logprob_columns(candidates, tokens, [each.request.logprobs for each, _ in positions])
        columns = to_host([*table, *details])
        rows = list(zip(*columns[: len(table)], strict=True))
        logprobs = list(zip(*columns[len(table) :], strict=True)) if details else [()] * len(rows)
        self._count(LARGE, len(sequences), began)
        end = 0
        for sequence in sequences:
            begin, end = end, end + len(sequence.draft) + 1
            self._append_verified(sequence, rows[begin:end], logprobs[begin:end])

    def _append_verified(
        self,
        sequence: SequenceState,
        verified: list[tuple[float, ...]],
        logprobs: Sequence[Sequence[float]],
    ) -> None:
        """Append tokens up to the first that was not drafted, ends the sequence or hands back to the SLM.

        verified: (token, finite, entropy, accepted, hand back if there is a small model) of each draft
        position and the one after them. logprobs: what `logprob_columns` gave of each.
        """
        drafted, made, accepted = len(sequence.draft), 0, 0
        base = len(sequence.tokens)
        if not all(finite for _, finite, *_ in verified):
            self._retry_without_draft(sequence)
            return
        for (token, _, token_entropy, took, *back), details in zip(verified, logprobs, strict=True):
            index = base + made
            made += 1
            sequence.logprobs = logprobs_of(sequence, token, details)
            self._append(sequence, int(token), LARGE, token_entropy, bool(took))
            if sequence.is_forced(index):  # in place of the token
                break
            accepted += bool(took)
            if sequence.finished:
                break
            if back and back[0]:
                sequence.active_model = SMALL
                break
            if not took or len(sequence.tokens) > index + 1:  # a closing tag was forced after it
                break
        self.stats.drafted += drafted
        self.stats.accepted += accepted
        self.stats.large_tokens += made
        if drafted:
            sequence.draft_length.update(drafted, made)
        sequence.clear_draft()
        for model, runner in self.config.runners.items():
            # The last token is read again, since its logits are needed.
            if model in sequence.prefilled:
                length = min(base + accepted, len(sequence.tokens) - 1)
                runner.truncate(sequence.slot, length + sequence.shift(model))
        if sequence.active_model == SMALL:
            self.config.runners[LARGE].idle(sequence.slot)
        if not sequence.finished:
            plan_draft(sequence, self.config)

    def _retry_without_draft(self, sequence: SequenceState) -> None:
        """Drop a draft that may have damaged the logits, also of positions before it (0 * NaN is NaN)."""
        if not sequence.draft:
            self._fail_not_finite(LARGE, sequence)
            return
        self.config.runners[LARGE].discard(sequence.slot)
        sequence.can_draft = False
        sequence.clear_draft()

    # --- both models ----------------------------------------------------------------------------------------

    def _forward(
        self, model: int, sequences: list[SequenceState], *, hidden: bool = False
    ) -> tuple[list[SequenceState], RunnerOutput | None]:
        """One call of one model; sequences that the memory is not enough for wait, or end here."""
        output: RunnerOutput | None = None
        failed: list[tuple[SequenceState, ModelError]] = []
        while sequences:
            try:
                output, sequences, failed = catch_up(
                    self.config.runners[model],
                    model,
                    sequences,
                    self._call_stats(model),
                    hidden=hidden,
                    vocabulary=self.config.vocabulary,
                )
                break
            except OutOfBlocks as short:
                if self._waiting.is_alone(self._active):  # nobody would ever make room
                    sequences, failed = [], [(sequences[0], short)]
                    break
                preempted = self._waiting.preempt(self._active)
                sequences = [each for each in sequences if each is not preempted]
        for sequence, error in failed:
            error.args = (f"request {sequence.index}: {self.config.names[model]}: {error}",)
            self._finish(sequence, "error", error=error)
        return sequences, output

    def _append(
        self, sequence: SequenceState, token: int, model: int, token_entropy: float, accepted: bool = False
    ) -> None:
        """Append a token to its sequence, emit its event, and end the sequence if it ends there."""
        is_stop = token in self.config.stop_ids
        shown, reason = sequence.append(token, model, token_entropy, accepted, is_stop)
        if reason is not None:
            self._finish(sequence, reason, token, model, shown)
            return
        if sequence.closing != "stop":  # else the token was not appended
            self._emit(sequence, token, model, shown)
        self._force_close(sequence)

    def _force_close(self, sequence: SequenceState) -> None:
        """Write the closing tag of a thought that has to end; both models read it like a prompt."""
        for token, shown in sequence.force_close():
            self._emit(sequence, token, sequence.active_model, shown)

    def _emit(self, sequence: SequenceState, token: int, model: int, shown: Shown) -> None:
        name = self.config.names[model]
        self._events.append(Event(sequence.index, token, name, shown.text, thinking=shown.thinking))

    def _finish(
        self,
        sequence: SequenceState,
        reason: FinishReason,
        token: int | None = None,
        model: int | None = None,
        shown: Shown = NOTHING_SHOWN,
        error: ModelError | None = None,
    ) -> None:
        if sequence.slot >= 0:  # else it was still waiting
            self._active.remove(sequence)
            self._waiting.release(sequence)
        rest, result = sequence.finish(reason, self.config.names, error)
        name = "" if model is None else self.config.names[model]
        text, thinking = shown.text + rest.text, shown.thinking + rest.thinking
        self._events.append(Event(sequence.index, token, name, text, result, thinking))

    def _fail_not_finite(self, model: int, sequence: SequenceState) -> None:
        """Fail a sequence whose logits are not finite, and discard what its slot holds."""
        self.config.runners[model].discard(sequence.slot)
        name = self.config.names[model]
        error = ModelError(
            f"request {sequence.index}: the logits of {name} are not finite after "
            f"{sequence.length(model)} tokens; {self.config.runners[model].overflow_hint}"
        )
        self._finish(sequence, "error", error=error)

    def _call_stats(self, model: int) -> CallStats:
        return self.stats.large if model == LARGE else self.stats.small

    def _count(self, model: int, rows: int, began: float) -> None:
        calls, seconds = self._call_stats(model), time.perf_counter() - began
        calls.add_step(rows, seconds)
        if self.config.modes is not None:
            seconds += self.config.runners[model].saved_seconds
            self.config.modes.observe(model, rows, calls.tokens - self._tokens_seen[model], seconds)
            self._tokens_seen[model] = calls.tokens
