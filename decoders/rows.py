"""The rows of one model call: how their tokens are sampled, what the router sees, what goes to the host.

Pure functions over the sequences of a step; the engine (`decoders.engine`) decides what follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from viaticum.decoders.logits import adjust
from viaticum.decoders.request import TokenLogprobs
from viaticum.decoders.runner import RunnerOutput
from viaticum.decoders.sampling import ACCEPT, PROPOSE, REDRAW, RESAMPLE, sample
from viaticum.decoders.sequence_state import SequenceState
from viaticum.decoders.speculate import verify
from viaticum.routers.token import Step, entropy
from viaticum.routers.token.base import to_device


def sample_next(
    output: RunnerOutput, candidates: Tensor, sequences: list[SequenceState]
) -> tuple[Tensor, dict[int, Tensor]]:
    """The next token of each sequence: from the call if all are greedy and it has them, else sampled.

    candidates: logits of the tokens to choose from, see `SharedVocabulary.candidates`.
    """
    if output.tokens is not None and all(
        each.request.sampling.temperature == 0 and each.adjuster is None for each in sequences
    ):
        return output.tokens, {}
    return sample(
        adjusted(candidates, [(each, len(each.draft)) for each in sequences]),
        [each.request.sampling for each in sequences],
        [each.uniform(PROPOSE, len(each.draft)) for each in sequences],
    )


def adjusted(logits: Tensor, positions: Sequence[tuple[SequenceState, int]]) -> Tensor:
    """The logits with penalties and biases.

    positions: of each row its sequence, and the number of draft tokens before it.
    """
    if all(each.adjuster is None for each, _ in positions):
        return logits
    return adjust(logits, [(each.adjuster, each.tokens, each.draft[:ahead]) for each, ahead in positions])


def logprobs_of(sequence: SequenceState, token: float, details: Sequence[float]) -> TokenLogprobs | None:
    """Log-probabilities of a token from its row of `logprob_columns`; None if its request wants none."""
    count = sequence.request.logprobs
    if count is None:
        return None
    most = len(details) // 2
    top = zip(details[1 + most :], details[1 : 1 + most], strict=True)
    return TokenLogprobs(int(token), details[0], tuple((int(each), value) for each, value in top)[:count])


def router_step(
    output: RunnerOutput, tokens: Tensor, sequences: list[SequenceState], rows: list[int]
) -> Step:
    """What the router sees: the rows that the small model decodes, without those it drafts for."""
    logits, hidden, entropies = output.logits, output.hidden, output.entropy
    if len(rows) < len(sequences):
        index = to_device(rows, logits.device)
        logits, tokens = logits[index], tokens[index]
        hidden = None if hidden is None else hidden[index]
        entropies = None if entropies is None else entropies[index]
    return Step(
        logits=logits,
        entropy=entropy(logits) if entropies is None else entropies,
        requests=[sequences[row].index for row in rows],
        positions=[len(sequences[row].made_by) for row in rows],
        tokens=tokens,
        hidden=hidden,
    )


def scatter(values: Tensor, rows: list[int], like: Tensor) -> Tensor:
    """values [len(rows)] at their rows of a column [B] like `like`, zero elsewhere."""
    if len(rows) == len(like):
        return values
    column = torch.zeros(len(like), device=like.device)
    return column.index_copy(0, to_device(rows, like.device), values.float())


def to_host(columns: Sequence[Tensor]) -> list[list[float]]:
    """All columns [N] in one transfer, as float32, which is exact for token ids (integers below 2^24)."""
    table: list[list[float]] = torch.stack([column.float() for column in columns]).tolist()
    return table


def verify_drafts(
    candidates: Tensor, positions: Sequence[tuple[SequenceState, int]]
) -> tuple[Tensor, Tensor]:
    """What `speculate.verify` says of the large model's logits.

    candidates: see `sample_next`. positions: of each row its sequence, and the number of draft tokens before
    it; the row after the last of them has no draft token.
    """
    return verify(
        adjusted(candidates, positions),
        [each.request.sampling for each, _ in positions],
        [each.draft[ahead] if ahead < len(each.draft) else None for each, ahead in positions],
        {
            row: distribution
            for row, (each, ahead) in enumerate(positions)
            if ahead < len(each.draft) and (distribution := each.draft_probabilities[ahead]) is not None
        },
        [_verify_uniforms(each, ahead) for each, ahead in positions],
    )


def _verify_uniforms(sequence: SequenceState, ahead: int) -> tuple[float, float]:
    """Uniform numbers for a position: to accept its draft token, and to sample without an accepted one."""
    if ahead < len(sequence.draft):
        return sequence.uniform(ACCEPT, ahead), sequence.uniform(RESAMPLE, ahead)
    redraw = sequence.proposal_dropped and ahead == 0
    return 0.0, sequence.uniform(REDRAW if redraw else PROPOSE, ahead)
