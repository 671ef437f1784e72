"""Three lanes over the same questions: always the small model, always the large one, and routed.

Lanes take turns, a few questions each, and one alone has the machine meanwhile: so the seconds of each are
its own. All share the loaded weights; each pays from its part of one budget. Leaves out what is printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from viaticum.demo.questions import TOPIC
from viaticum.errors import ViaticumError, one_line
from viaticum.questions import Question
from viaticum.routers.query.single_pair import SinglePairRouter
from viaticum.strategies.answers import is_right
from viaticum.types import Answer, Outcome, Pair

if TYPE_CHECKING:
    from viaticum.agents.client import Viaticum

FIXED_STRATEGY = "cot"  # of the lanes that do not route
BUDGET_PARTS = 4  # a part for each lane, and one for the answer of two models
ROUTED = "Viaticum"


@dataclass(frozen=True)
class LaneAnswer:
    """An answer in one lane.

    Args:
        value: None for none.
        routes: the pairs that were asked, in their order.
        cost: nano-dollars that were posted.
        reason: why there is no answer.
    """

    question: Question
    value: str | None
    right: bool
    routes: tuple[str, ...] = ()
    cost: int = 0
    reason: str = ""

    @classmethod
    def of(cls, question: Question, result: Answer | ViaticumError) -> LaneAnswer:
        if isinstance(result, ViaticumError):
            return cls(question, None, False, reason=one_line(result))
        return cls(
            question,
            result.value,
            is_right(result.value, question.accepted, question.query.kind),
            tuple(str(route.pair) for route in result.routes),
            result.cost,
            result.reason,
        )


@dataclass
class Lane:
    """One way to answer all questions, and what it got so far.

    Args:
        name: shown above its column.
        way: how it asks, shown below.
        client: asks, and pays from the lane's own budget.
    """

    name: str
    way: str
    client: Viaticum
    answers: dict[str, LaneAnswer] = field(default_factory=dict)
    cost: int = 0
    _seconds: float = 0.0
    _began: float | None = None

    @property
    def right(self) -> int:
        return sum(each.right for each in list(self.answers.values()))  # which another thread may add to

    @property
    def is_busy(self) -> bool:
        return self._began is not None

    @property
    def seconds(self) -> float:
        """Seconds in which this lane was at work, up to now."""
        return self._seconds + (0.0 if self._began is None else time.perf_counter() - self._began)

    def outcomes(self) -> Iterator[Outcome]:
        """What the pair of a lane that does not route got on each question that it was asked."""
        pair = Pair.parse(self.way)
        for each in self.answers.values():
            if each.routes:
                yield Outcome(
                    str(each.question.columns.get(TOPIC, "questions")),
                    each.question.id,
                    each.question.query.text,
                    pair.model,
                    pair.strategy,
                    each.value,
                    each.right,
                    cost_nanousd=each.cost,
                )

    async def answer(self, questions: Sequence[Question], at_once: int) -> None:
        """Answer some questions; what ended stays where this is cancelled, and calls in flight end."""
        self._began = time.perf_counter()
        try:
            queries = [each.query for each in questions]
            async for index, result in self.client.abatch(queries, concurrency=at_once):
                question = questions[index]
                self.answers[question.id] = LaneAnswer.of(question, result)
                self.cost = self.client.budget().posted_nanousd
        finally:
            self._seconds = self.seconds
            self._began = None
            self.cost = self.client.budget().posted_nanousd  # with calls that were cut short


def open_lanes(client: Viaticum, small: str, large: str, limit: int) -> list[Lane]:
    """The three lanes of a client, each with a budget of its own below the client's.

    Args:
        small, large: names of models.
        limit: nano-dollars of each lane.
    """

    def paying(name: str, pair: Pair | None = None) -> Viaticum:
        scope = f"{client.budget_name}/{name}"
        client.ledger.create(scope, limit_nanousd=limit, parent=client.budget_name)
        if pair is None:
            return client.derive(budget=scope)
        return client.derive(budget=scope, router=SinglePairRouter(pair, client.router))

    models = {"always small": small, "always large": large}
    fixed = [(name, Pair(model, FIXED_STRATEGY)) for name, model in models.items()]
    lanes = [Lane(name, str(pair), paying(name.replace(" ", "-"), pair)) for name, pair in fixed]
    return [*lanes, Lane(ROUTED, "routed", paying("routed"))]


async def run_lanes(
    lanes: Sequence[Lane], waves: Sequence[Sequence[Question]], ended: Callable[[Sequence[Question]], None]
) -> None:
    """Answer all questions in all lanes. ended: called with each wave that every lane has answered.

    Another lane begins each wave, so that none has the caches warm from the others each time.
    """
    for number, wave in enumerate(waves):
        first = number % len(lanes)
        for lane in [*lanes[first:], *lanes[:first]]:
            await lane.answer(wave, len(wave))
        ended(wave)
