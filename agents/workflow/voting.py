"""Votes: of the samples of one pair, and of the pairs of one plan.

Both return an update of the state with `done`: whether the question is settled. What a strategy's vote is,
the strategy says (`viaticum.strategies`); when the answers of a plan agree, see
`viaticum.routers.query.Plan`.
"""

from __future__ import annotations

from viaticum.agents.workflow.state import State, query_of
from viaticum.routers.query.outcome_matrix import canonical_answer
from viaticum.routers.query.plans import BY_CHECK
from viaticum.strategies import equivalent
from viaticum.strategies import get as get_strategy
from viaticum.strategies.verify import YES
from viaticum.types import Pair, Reading


def vote_of_samples(state: State, *, last: bool = False) -> State:
    """The vote of the samples so far, passed on to the plan once the strategy needs no further sample.

    last: no further sample can be made, so the vote is final.
    """
    readings = [Reading(value, reason or "") for value, reason in state["samples"]]
    reading = get_strategy(pair_of(state).strategy).vote(readings, query_of(state), last=last)
    if reading is None:
        return {"samples": state["samples"], "done": False}
    return {"samples": [], **vote_of_plan(state, reading)}


def vote_of_plan(state: State, reading: Reading) -> State:
    """The vote of the plan's pairs so far, with the answer of the pair at hand.

    Settled once `need` answers are equal, or all pairs have been asked; of the answers with the most votes
    the latest is taken.
    """
    plan = state["plan"]
    if plan is None or len(plan["pairs"]) == 1:
        return {"value": reading.value, "reason": reading.reason, "done": reading.answered}
    if plan["need"] == BY_CHECK:
        return _by_check(state, reading)
    votes = list(state["votes"])
    if canonical_answer(reading.value) is not None:
        assert reading.value is not None
        votes.append([str(pair_of(state)), reading.value])
    asked_all = set(plan["pairs"]) <= set(state["tried"])
    if not votes:
        return {"value": None, "reason": reading.reason, "done": False}
    kind = query_of(state).kind
    counts = [sum(equivalent(one, other, kind) for _, other in votes) for _, one in votes]
    most = max(counts)
    value = next(value for (_, value), count in zip(votes[::-1], counts[::-1], strict=True) if count == most)
    return {"votes": votes, "value": value, "reason": "", "done": most >= plan["need"] or asked_all}


def _by_check(state: State, reading: Reading) -> State:
    """The latest answer of a plan with a check, which a yes settles, or the plan's last pair."""
    pair, votes = pair_of(state), list(state["votes"])
    if pair.is_check:
        return {"done": reading.value == YES}
    if canonical_answer(reading.value) is not None:
        assert reading.value is not None
        votes.append([str(pair), reading.value])
    if not votes:
        return {"value": None, "reason": reading.reason, "done": False}
    assert state["plan"] is not None
    return {
        "votes": votes,
        "value": votes[-1][1],
        "reason": "",
        "done": str(pair) == state["plan"]["pairs"][-1],
    }


def why_next(state: State) -> str:
    """Why the next pair of the plan is asked."""
    plan, votes = state["plan"], state["votes"]
    assert plan is not None
    if plan["need"] != BY_CHECK:
        return f"{len(votes)} answers so far, and no {plan['need']} agree"
    first, check, _ = plan["pairs"]
    return f"{check} does not say that the answer is right" if votes else f"{first} gave no answer"


def pair_of(state: State) -> Pair:
    """The pair that is being asked."""
    assert state["route"] is not None
    return Pair.parse(state["route"]["pair"])
