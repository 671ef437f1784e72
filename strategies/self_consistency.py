"""Self-consistency (arXiv 2203.11171): sample another strategy several times and take the majority answer.

Answers are compared by equivalence, not by spelling. Sampling stops as soon as no further sample could change
the winner, which is not in the paper. The caller makes the calls, chooses seeds and pays: a strategy only
gives the largest number of samples and the temperature and says, after each sample, whether the vote is
settled. Weighting samples by their probability is left out: the paper finds no gain over counting.
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
    """The majority of up to `samples` samples of another strategy at `temperature`.

    Its name is `self-consistency:<strategy>:<samples>`, which the registry finds as well.

    Raises:
        InputError: fewer than 2 or more than 100 samples, a temperature that is not positive, or a strategy
            that takes several samples itself.
    """

    def __init__(self, strategy: Strategy, samples: int = SAMPLES, temperature: float = TEMPERATURE) -> None:
        if not 2 <= samples <= MAX_SAMPLES:
            raise InputError(f"{samples} samples; a majority takes 2 to {MAX_SAMPLES}")
        if not 0 < temperature <= 2:
            raise InputError(
                f"a temperature of {temperature}; samples differ only above 0, and up to 2 make sense"
            )
        if strategy.samples > 1:
            raise InputError(
                f"strategy {strategy.name!r} takes several samples itself; name the one it samples"
            )
        self.strategy = strategy
        self.samples = samples
        self.temperature = temperature
        self.name = f"{PREFIX}:{strategy.name}:{samples}"
        self.description = (
            f"Asks up to {samples} times and takes the answer that most replies agree on; dear but steady. "
            f"{strategy.description}"
        )
        self.needs = strategy.needs
        self.max_new_tokens = strategy.max_new_tokens
        self.stop = strategy.stop

    def messages(self, query: Query) -> list[Message]:
        return self.strategy.messages(query)

    def read(self, completion: Completion, query: Query) -> Reading:
        """The answer of one sample."""
        return self.strategy.read(completion, query)

    def vote(self, readings: Sequence[Reading], query: Query, *, last: bool = False) -> Reading | None:
        """The majority answer in its first spelling; None while further samples could change it.

        A tie goes to the answer that was given first. Samples without an answer count as asked but do not
        vote.
        """
        left = 0 if last else self.samples - len(readings)
        groups = group((reading.value for reading in readings), query.kind)
        leader = max(groups, key=len, default=None)  # of several, the first
        if leader is None:
            return None if left > 0 else _no_answer(readings)
        return Reading(leader[0]) if _is_settled(groups, leader, left) else None


def _is_settled(groups: Sequence[Sequence[str]], leader: Sequence[str], left: int) -> bool:
    """Whether `leader` wins whatever the remaining samples say. The earlier group wins a tie."""
    if left <= 0:
        return True
    index = next(index for index, each in enumerate(groups) if each is leader)
    rivals = [len(each) - (number > index) for number, each in enumerate(groups) if number != index]
    unseen = -1  # an answer that was not given yet and would lose a tie
    return all(rival + left < len(leader) for rival in [*rivals, unseen])


def _no_answer(readings: Sequence[Reading]) -> Reading:
    last = readings[-1].reason if readings else "nothing was asked"
    return Reading(None, f"none of {len(readings)} samples gave an answer; the last: {last}")


def parse_name(name: str) -> tuple[str, int] | None:
    """Strategy and samples in `self-consistency:cot:5` or `self-consistency:cot`; None for other names."""
    prefix, colon, rest = name.partition(":")
    if prefix != PREFIX or not colon:
        return None
    strategy, colon, samples = rest.rpartition(":")
    if colon and samples.isascii() and samples.isdecimal() and len(samples) < 10:
        return strategy, int(samples)
    return rest, SAMPLES
