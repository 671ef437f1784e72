"""Self-consistency (arXiv 2203.11171): sample another strategy several times and take the majority answer.

Answers are compared by equivalence, not by spelling. Sampling stops as soon as no further sample could change
the winner, which is not in the paper. The caller makes the calls, chooses seeds and pays: a strategy only
gives the largest number of samples and the temperature and says, after each sample, whether the vote is
settled. Weighting samples by their probability is left out: the paper finds no gain over counting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from viaticum.errors import InputError
from viaticum.strategies.answers import group
from viaticum.strategies.base import INHERITED, ConfiguredStrategy, Strategy, system_turn
from viaticum.types import Completion, Message, Query, Reading

PREFIX = "self-consistency"
SAMPLES = 5
MAX_SAMPLES = 100
TEMPERATURE = 0.7  # the paper's, for PaLM and GPT-3


@dataclass(frozen=True)
class SelfConsistency(ConfiguredStrategy):
    """The majority of up to `samples` samples of another strategy at `temperature`.

    Its name is `self-consistency:<strategy>:<samples>`, which the registry finds as well. Settings that are
    not given are those of the other strategy.

    Raises:
        InputError: fewer than 2 or more than 100 samples, a temperature that is not positive, or a strategy
            that takes several samples itself.
    """

    strategy: Strategy
    samples: int = SAMPLES
    temperature: float | None = field(default=TEMPERATURE, kw_only=True)
    system: str | None = field(default=INHERITED, kw_only=True)
    needs: frozenset[str] = field(default=INHERITED, kw_only=True)

    def __post_init__(self) -> None:
        if not 2 <= self.samples <= MAX_SAMPLES:
            raise InputError(f"{self.samples} samples; a majority takes 2 to {MAX_SAMPLES}")
        if self.temperature is not None and not 0 < self.temperature <= 2:
            raise InputError(
                f"a temperature of {self.temperature}; samples differ only above 0, and up to 2 make sense"
            )
        if self.strategy.samples > 1:
            raise InputError(
                f"strategy {self.strategy.name!r} takes several samples itself; name the one it samples"
            )
        inherited = {
            "name": f"{PREFIX}:{self.strategy.name}:{self.samples}",
            "description": (
                f"Asks up to {self.samples} times and takes the answer that most replies agree on; dear but "
                f"steady. {self.strategy.description}"
            ),
        }
        for each in fields(self):
            if getattr(self, each.name) is INHERITED:
                value = inherited.get(each.name, getattr(self.strategy, each.name, None))
                object.__setattr__(self, each.name, value)
        super().__post_init__()

    @property
    def has_own_system(self) -> bool:
        return self.system != getattr(self.strategy, "system", None) or self.strategy.has_own_system

    def messages(self, query: Query) -> list[Message]:
        messages = self.strategy.messages(query)
        if self.system == getattr(self.strategy, "system", None):
            return messages
        return system_turn(self.system) + [each for each in messages if each["role"] != "system"]

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
