"""Self-consistency (arXiv 2203.11171): ask another strategy several times with some randomness, and take the answer
that most samples agree on, by equivalence rather than by spelling.

Asking stops as soon as no further sample could change the winner, which the paper leaves out. Who asks, with which
seeds, and what it costs is the caller's business: a strategy says how many samples it wants at most, at which
temperature, and, after each, whether the vote is settled. Weighting samples by their probability is left out: the paper
finds no gain over counting.
"""

from __future__ import annotations

from collections.abc import Sequence

from viaticum.errors import InputError
from viaticum.strategies.answers import group
from viaticum.strategies.base import Strategy
from viaticum.types import Completion, Message, Query, Reading

PREFIX = "self-consistency"
SAMPLES = 5
MAX_SAMPLES = 100
TEMPERATURE = 0.7  # the paper's, for PaLM and GPT-3


class SelfConsistency(Strategy):
    """The majority of up to `samples` samples of the strategy `of`, made at `temperature`.

    Named `self-consistency:<strategy>:<samples>`, under which the registry finds it too. Raises `InputError` for
    fewer than 2 samples or more than 100, a temperature that is not positive, or a strategy that samples already.
    """

    def __init__(self, of: Strategy, samples: int = SAMPLES, temperature: float = TEMPERATURE) -> None:
        if not 2 <= samples <= MAX_SAMPLES:
            raise InputError(f"{samples} samples; a majority takes 2 to {MAX_SAMPLES}")
        if not 0 < temperature <= 2:
            raise InputError(
                f"a temperature of {temperature}; samples differ only above 0, and up to 2 make sense"
            )
        if of.samples > 1:
            raise InputError(f"strategy {of.name!r} takes several samples itself; name the one it samples")
        self.of = of
        self.samples = samples
        self.temperature = temperature
        self.name = f"{PREFIX}:{of.name}:{samples}"
        self.description = f"Asks up to {samples} times and takes the answer that most replies agree on; dear but steady. {of.description}"
        self.needs = of.needs
        self.max_new_tokens = of.max_new_tokens
        self.stop = of.stop

    def messages(self, query: Query) -> list[Message]:
        return self.of.messages(query)

    def read(self, completion: Completion, query: Query) -> Reading:
        """The answer of one sample."""
        return self.of.read(completion, query)

    def vote(self, readings: Sequence[Reading], query: Query, *, last: bool = False) -> Reading | None:
        """The majority's answer, in the spelling that came first; None while further samples could change it.

        A tie goes to the answer that was given first. Samples without an answer count as asked, and vote for nobody.
        """
        left = 0 if last else self.samples - len(readings)
        groups = group((reading.value for reading in readings), query.kind)
        first = max(groups, key=len, default=None)  # of several, the first
        if first is None:
            return None if left > 0 else _no_answer(readings)
        return Reading(first[0]) if _is_settled(groups, first, left) else None


def _is_settled(groups: Sequence[Sequence[str]], first: Sequence[str], left: int) -> bool:
    """Whether `first` wins whatever the samples that are left say. At a tie the group that began earlier wins."""
    if left <= 0:
        return True
    place = next(place for place, each in enumerate(groups) if each is first)
    rivals = [len(each) - (number > place) for number, each in enumerate(groups) if number != place]
    newcomer = -1  # an answer that nobody gave yet, and that would lose a tie
    return all(rival + left < len(first) for rival in [*rivals, newcomer])


def _no_answer(readings: Sequence[Reading]) -> Reading:
    last = readings[-1].reason if readings else "nothing was asked"
    return Reading(None, f"none of {len(readings)} samples gave an answer; the last: {last}")


def parse_name(name: str) -> tuple[str, int] | None:
    """The strategy and the number of samples in `self-consistency:cot:5` or `self-consistency:cot`; None for other
    names."""
    prefix, colon, rest = name.partition(":")
    if prefix != PREFIX or not colon:
        return None
    of, colon, samples = rest.rpartition(":")
    if colon and samples.isascii() and samples.isdecimal() and len(samples) < 10:
        return of, int(samples)
    return rest, SAMPLES
