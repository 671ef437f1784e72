"""Drafts: which of the small model's guesses the large one accepts, how many to ask for, and how long to wait for them.

Accepting follows Leviathan et al. (arXiv 2211.17192) and Chen et al. (2302.01318): greedy text takes a draft
where it is the large model's own choice; sampled text takes draft d with probability min(1, p(d)/q(d)) and
otherwise draws from max(p - q, 0), so that what is written follows p, whatever q was. p and q are what the
request's temperature, top-k and top-p leave of each model. Knows no model, cache or text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from viaticum.decoders.request import Sampling
from viaticum.decoders.sampling import distributions, pick
from viaticum.routers.token.base import likeliest

MOST = 16  # tokens of an adaptive draft
VERIFY = 0.02  # what one more token in a verifying pass costs, in passes (CPU, 1.5B: 2.9 ms of 180 ms)
PRIOR, PRIOR_WEIGHT = 0.7, 4.0  # the acceptance to begin with, and how many drafts it is worth
FORGET = 0.9  # what a pass leaves of the weight of those before it
PROBE = 16  # of so many passes that did not seem worth a draft, one tries a token, lest nothing be learned


def verify(
    logits: Tensor,
    samplings: Sequence[Sampling],
    drafts: Sequence[int | None],
    guesses: Mapping[int, Tensor],
    numbers: Sequence[tuple[float, float]],
) -> tuple[Tensor, Tensor]:
    """The token of every place, given that the drafts before it were accepted, and whether it is the draft.

    logits: the large model's [N, V]; drafts: the token drafted for each place, None where there is none;
    guesses: for sampled rows with a draft, the probabilities [V] it was drawn from; numbers: in [0, 1), one
    to accept with and one to draw with. Returns int64 [N] and bool [N].
    """
    device = logits.device
    drafted = torch.tensor([-1 if draft is None else draft for draft in drafts], device=device)
    tokens = likeliest(logits)
    rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not rows:
        return tokens, tokens == drafted
    index = torch.tensor(rows, device=device)
    p = distributions(logits[index], [samplings[row] for row in rows])
    none = torch.zeros_like(p[0])
    q = torch.stack([none if drafts[row] is None else guesses[row] for row in rows])
    at = drafted[index, None].clamp_min(0)
    luck = torch.tensor([numbers[row][0] for row in rows], device=device)
    takes = (luck * q.gather(-1, at)[:, 0] < p.gather(-1, at)[:, 0]) & (drafted[index] >= 0)
    rest = (p - q).clamp_min(0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)  # p equals q but for rounding
    instead = pick(rest, [numbers[row][1] for row in rows])
    tokens = tokens.index_copy(0, index, torch.where(takes, at[:, 0], instead))
    accepted = (tokens == drafted).index_copy(0, index, takes)
    return tokens, accepted


def worth(most: int, acceptance: float, in_hand: int, cost: float) -> list[float]:
    """Tokens that a pass with a draft of 0, 1, ... `most` tokens is expected to give, per cost of a plain pass.

    acceptance: the probability that the place after a draft is reached, taken as the same for all; in_hand:
    drafted tokens that cost nothing; cost: a step of the small model, in passes of the large one.
    """
    worths, tokens = [], 0.0
    for length in range(most + 1):
        tokens += acceptance**length
        worths.append(tokens / (1 + max(0, length - in_hand) * cost + length * VERIFY))
    return worths


class BatchWaitPolicy:
    """When the large model is called: it costs little more for many rows than for one, so that those which are
    ready may wait for others. batch: ready rows that are worth a call; draft: the length of drafts, None: any."""

    def __init__(self, batch: int, draft: int | None) -> None:
        self._batch = batch
        self._most = max(MOST, draft or 0)  # steps that ready rows wait for the drafts of others
        self._waited = 0

    def is_over(self, ready: int, drafting: bool, writing: bool) -> bool:
        """Whether to call it now. drafting: drafts are being made for other rows; writing: some write without it."""
        if ready == 0:
            return False
        if drafting or writing:  # else no row can go on without it
            if ready < self._batch:
                return False
            self._waited += 1
            if drafting and self._waited <= self._most:
                return False
        self._waited = 0
        return True


class DraftLength:
    """How many tokens to draft for the next pass of one text.

    fixed: that many always; None: the number for which `worth` is greatest, given the acceptance seen in this
    text so far. It looks at its own text and at constants only, never at a clock or at other texts, so that a
    seed gives the same text in any company.
    """

    def __init__(self, fixed: int | None, cost: float) -> None:
        self._fixed, self._cost = fixed, cost
        self._reached, self._tried = PRIOR * PRIOR_WEIGHT, PRIOR_WEIGHT
        self._idle = 0

    @property
    def acceptance(self) -> float:
        return self._reached / self._tried

    def choose(self, in_hand: int, room: int) -> int:
        """Tokens to draft, those in hand included; room: the most that may be."""
        if self._fixed is not None:
            return min(room, max(self._fixed, in_hand))
        worths = worth(min(MOST, room), self.acceptance, in_hand, self._cost)
        best = max(in_hand, worths.index(max(worths)))
        if best > 0:
            self._idle = 0
            return best
        self._idle += 1
        return int(self._idle % PROBE == 0)

    def learn(self, drafted: int, written: int) -> None:
        """A pass over `drafted` tokens wrote `written`: all but its last place were reached and gone beyond."""
        self._reached = self._reached * FORGET + min(written - 1, drafted)
        self._tried = self._tried * FORGET + min(written, drafted)
