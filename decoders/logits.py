"""Penalties for repetition and biases of tokens, applied to logits before a token is chosen from them.

In the order of vLLM: biases, then the repetition penalty (CTRL, arXiv 1909.05858: over prompt and output, a
positive logit is divided by it, a negative one multiplied), then OpenAI's frequency and presence penalties
(over the output). A draft token is proposed and verified with the counts that include the draft before it,
so that both models' distributions at a position are adjusted alike and speculation stays exact. A token
router sees the models' own logits. Leaves out temperature and everything after it (`decoders.sampling`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from viaticum.decoders.request import BIAS_LIMIT, Sampling
from viaticum.routers.token.base import to_device

NEVER = float("-inf")


@dataclass(slots=True)
class _Counts:
    """On one device: output tokens by id, float32 [V]; ids of the prompt, bool [V]; biases, float32 [V].

    read: tokens of the sequence that are counted.
    """

    output: Tensor
    prompt: Tensor | None
    bias: Tensor | None
    read: int


class LogitAdjuster:
    """Adjusts the logits of one sequence by its tokens. Counts stay on the device and grow by what is new.

    Args:
        sampling: penalties and biases.
        prompt_length: tokens of the prompt, with which the sequence begins.
    """

    def __init__(self, sampling: Sampling, prompt_length: int) -> None:
        self.sampling = sampling
        self._prompt_length = prompt_length
        self._counts: dict[torch.device, _Counts] = {}

    def counts(self, tokens: Sequence[int], size: int, device: torch.device) -> _Counts:
        """The counts over all of the sequence's tokens. size: of the vocabulary."""
        counts = self._counts.get(device)
        if counts is None:
            counts = self._counts[device] = self._new_counts(tokens, size, device)
        if new := list(tokens[counts.read :]):
            ids = to_device(new, device)
            counts.output.index_add_(0, ids, torch.ones(len(new), device=device))
            counts.read += len(new)
        return counts

    def _new_counts(self, tokens: Sequence[int], size: int, device: torch.device) -> _Counts:
        prompt = bias = None
        if self.sampling.repetition_penalty != 1:
            prompt = torch.zeros(size, dtype=torch.bool, device=device)
            read = [token for token in tokens[: self._prompt_length] if token < size]
            prompt[to_device(read, device, torch.int64)] = True
        if self.sampling.logit_bias:
            bias = _bias_row(self.sampling.logit_bias, size).to(device)
        return _Counts(torch.zeros(size, device=device), prompt, bias, self._prompt_length)


def _bias_row(biases: Sequence[tuple[int, float]], size: int) -> Tensor:
    """What is added to the logits [V]: -100 bans a token, 100 bans all that have less."""
    values = dict(biases)
    forced = [token for token, bias in values.items() if bias >= BIAS_LIMIT]
    row = torch.full((size,), NEVER) if forced else torch.zeros(size)
    for token, bias in values.items():
        if not forced:
            row[token] = NEVER if bias <= -BIAS_LIMIT else bias
    row[forced] = 0.0
    return row


def adjust(
    logits: Tensor, rows: Sequence[tuple[LogitAdjuster | None, Sequence[int], Sequence[int]]]
) -> Tensor:
    """Logits [N, V] with the penalties and biases of each row; the given ones where no row has any.

    rows: of each row its adjuster if it has one, the tokens of its sequence, and the draft tokens before it.
    """
    chosen = [row for row, (adjuster, *_) in enumerate(rows) if adjuster is not None]
    if not chosen:
        return logits
    device, size = logits.device, logits.shape[-1]
    picked = [(adjuster, tokens, ahead) for adjuster, tokens, ahead in rows if adjuster is not None]
    counts = [adjuster.counts(tokens, size, device) for adjuster, tokens, _ in picked]
    settings = [adjuster.sampling for adjuster, *_ in picked]
    index = to_device(chosen, device)
    values = logits[index]  # a copy
    if any(each.bias is not None for each in counts):
        zero = torch.zeros(size, device=device)
        values += torch.stack([zero if each.bias is None else each.bias for each in counts])
    output = torch.stack([each.output for each in counts])  # [R, V]
    drafted = [(row, token) for row, (*_, ahead) in enumerate(picked) for token in ahead]
    if drafted:
        at = to_device(drafted, device)
        output.index_put_((at[:, 0], at[:, 1]), torch.ones(len(drafted), device=device), accumulate=True)
    values = _penalise(values, output, counts, settings)
    return values if len(chosen) == len(rows) else logits.index_copy(0, index, values)


def _penalise(
    values: Tensor, output: Tensor, counts: Sequence[_Counts], settings: Sequence[Sampling]
) -> Tensor:
    """Apply the penalties to logits [R, V], given the counts of output tokens [R, V]."""

    def column(numbers: list[float]) -> Tensor:
        return to_device(numbers, values.device)[:, None]

    written = output > 0
    if any(each.repetition_penalty != 1 for each in settings):
        none = torch.zeros_like(written[0])
        seen = written | torch.stack([none if each.prompt is None else each.prompt for each in counts])
        penalty = column([each.repetition_penalty for each in settings])
        values = torch.where(seen, torch.where(values > 0, values / penalty, values * penalty), values)
    frequency = [each.frequency_penalty for each in settings]
    presence = [each.presence_penalty for each in settings]
    if any(frequency) or any(presence):
        values = values - column(frequency) * output - column(presence) * written
    return values


def logprob_columns(logits: Tensor, tokens: Tensor, wanted: Sequence[int | None]) -> list[Tensor]:
    """Log-probabilities of chosen and of likeliest tokens, as columns [N] for one transfer to the host.

    They are those of the model itself: before penalties, biases and temperature, as vLLM and llama.cpp give
    them.

    Args:
        logits: the model's own, [N, V].
        tokens: chosen ones, int64 [N].
        wanted: of each row the number of likeliest tokens; None: nothing.

    Returns:
        The chosen token's, then k of the likeliest tokens, then these tokens; none if no row wants any.
    """
    rows = [row for row, count in enumerate(wanted) if count is not None]
    if not rows:
        return []
    index = to_device(rows, logits.device)
    values = logits if len(rows) == len(wanted) else logits[index]
    total = values.float().logsumexp(-1, keepdim=True)
    most = min(max(count or 0 for count in wanted), values.shape[-1])
    chosen = values.gather(-1, tokens[index, None]).float() - total
    found = [chosen]
    if most:
        best, ids = values.float().topk(most, -1)
        found += [best - total, ids.float()]
    table = torch.cat(found, -1)  # [R, 1 + 2 most]
    if len(rows) < len(wanted):
        table = table.new_zeros(len(wanted), table.shape[-1]).index_copy(0, index, table)
    return list(table.unbind(-1))
