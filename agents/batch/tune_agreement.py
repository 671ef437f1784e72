"""Grades answers by the agreement of the strongest pairs, where there is neither a known answer nor a judge.

Right is what at least two of the strongest pairs say, and more of them than say anything else; a question on
which they do not agree gives no outcome. Strongest are those that the prior puts first, of as many models as
there are, since pairs of one model make the same mistakes; of equal ones the dearer. It costs no call of its
own. Agreement says something of accuracy without labels (arXiv 2106.13799); it says too much where models err
alike, and favours the pairs that vote.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from viaticum.agents.batch.tune_judge import GivenAnswer, Grader, Progress
from viaticum.routers.query.prior_screening import PriorScreen
from viaticum.strategies.answers import equivalent
from viaticum.types import AnswerKind, Pair

VOTERS = 3
NEEDED = 2  # equal answers


def strongest_pairs(screen: PriorScreen, count: int = VOTERS) -> list[Pair]:
    """The pairs whose agreement counts, one a model first."""
    shares = [round(accuracy, 6) for accuracy, _, _ in screen.shares()]
    order = sorted(range(len(shares)), key=lambda each: (-shares[each], -screen.cost_p50[each]))
    firsts: dict[str, Pair] = {}
    for each in order:
        firsts.setdefault(screen.pairs[each].model, screen.pairs[each])
    rest = [screen.pairs[each] for each in order if screen.pairs[each] not in firsts.values()]
    return [*firsts.values(), *rest][:count]


class Agreement(Grader):
    """Grades by what most of the voters say.

    Args:
        voters: pairs, two at least.
    """

    def __init__(self, voters: Sequence[Pair]) -> None:
        self.voters = tuple(voters)
        *some, last = map(str, voters)
        self.name = f"agreement of {', '.join(some)} and {last}"
        self.models = tuple(dict.fromkeys(each.model for each in voters))
        self._answers: dict[int, GivenAnswer] = {}
        self._agreed: dict[str, str | None] = {}  # by question

    def grade(self, answers: Mapping[int, GivenAnswer], progress: Progress) -> None:
        self._answers = dict(answers)
        votes: dict[str, list[str]] = defaultdict(list)
        questions = {}
        for each in answers.values():
            questions[each.question.id] = each.question
            if each.answer is not None and each.pair in self.voters:
                votes[each.question.id].append(each.answer)
        self._agreed = {
            name: agreed_answer(votes[name], question.query.kind) for name, question in questions.items()
        }

    def verdict(self, number: int) -> bool | None:
        """As of every grader: None where the voters do not agree."""
        each = self._answers.get(number)
        agreed = None if each is None else self._agreed.get(each.question.id)
        if each is None or agreed is None:
            return None
        return equivalent(agreed, each.answer, each.question.query.kind)

    def to_check(self, known: Mapping[int, GivenAnswer]) -> Iterable[int]:
        """All of them: that costs nothing."""
        return known


def agreed_answer(votes: Sequence[str], kind: AnswerKind) -> str | None:
    """The answer that at least two votes have, and more than any other."""
    groups: list[list[str]] = []
    for vote in votes:
        for group in groups:
            if equivalent(group[0], vote, kind):
                group.append(vote)
                break
        else:
            groups.append([vote])
    groups.sort(key=len, reverse=True)
    if not groups or len(groups[0]) < NEEDED or (len(groups) > 1 and len(groups[1]) == len(groups[0])):
        return None
    return groups[0][0]
