"""Evaluation of a learned policy against R-Stitch at the same tau (the policy before it learned).

Leaves out learning (`training.policy`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viaticum.catalogue import Catalogue
from viaticum.errors import DataError
from viaticum.models.token_routers import check_members
from viaticum.questions import Question, digest_of
from viaticum.training.policy_environment import PolicyEnvironment, require_answers
from viaticum.training.progress import Report, no_report

if TYPE_CHECKING:
    from viaticum.decoders.cost import CostModel

BOOTSTRAP_SAMPLES = 2000  # of the questions, for intervals
REQUIRED_FACTS = ("pair", "settings", "cached", "split", "costs")  # of a policy
MEASURES = ("reward", "correct", "large_share", "latency")


def evaluate(
    folder: str | Path,
    questions: Sequence[Question],
    *,
    catalogue: Catalogue,
    pair: str = "",
    slots: int = 16,
    costs: CostModel | None = None,
    report: Report = no_report,
) -> dict[str, Any]:
    """Compare a learned policy with R-Stitch at the same tau, on questions that it did not learn from.

    Args:
        folder: folder of the policy.
        questions: questions with right answers.
        catalogue: the models.
        pair: by default the pair that it was learned for.
        slots: texts that are written at once.
        costs: times of calls; by default those that it learned with, so that rewards can be compared.
        report: called with stage, done and total.

    Returns:
        What `compare` returns, and `learned_from`: how many of the questions it learned from.

    Raises:
        DataError: right answers are missing.
        InputError: the policy was learned for other weights.
    """
    from viaticum.decoders.cost import CostModel
    from viaticum.routers.token.policy import Policy, TrainedPolicy

    require_answers(questions)
    trained = TrainedPolicy.load(folder)
    _require_facts(trained.metadata, folder)
    settings = trained.metadata["settings"]
    environment = PolicyEnvironment(
        catalogue,
        pair or trained.metadata["pair"],
        settings["strategy"],
        settings["streams"],
        slots,
        costs or CostModel.from_dict(trained.metadata["costs"]),
    )
    check_members(trained, environment.spec, catalogue)
    environment.cached = int(trained.metadata["cached"])
    learned = _learned_among(trained.metadata, questions)
    untrained = Policy(trained.policy.shape).eval().requires_grad_(False)  # decides as R-Stitch
    weight, rows = settings["latency_weight"], []
    for policy, threshold, stage in (
        (untrained, 0.5, "R-Stitch"),
        (trained.policy, trained.threshold, "R-Stitch+"),
    ):
        report(stage, 0, len(questions))
        rows.append(
            environment.serve(policy.to(environment.device), trained.tau, questions, threshold, weight)
        )
        report(stage, len(questions), len(questions))
    return {"learned_from": len(learned), **compare(*rows)}


def _learned_among(facts: Mapping[str, Any], questions: Sequence[Question]) -> set[str]:
    from viaticum.routers.token.artefact import seen_in_training

    digests = {each.id: digest_of(each.query.text) for each in questions}
    return seen_in_training(facts, facts["split"]["learned"], digests)


def _require_facts(facts: Mapping[str, Any], folder: str | Path) -> None:
    missing = [name for name in REQUIRED_FACTS if name not in facts]
    if missing:
        raise DataError(f"the policy in {folder} does not say its {', '.join(missing)}; learn it again")


def compare(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means of two lists of rows over the same questions, and those of their differences.

    "95%" is the bootstrap interval of a mean difference over resampled questions (percentiles 2.5 and 97.5).
    """
    import numpy as np

    rng = np.random.default_rng(0)
    samples = rng.integers(len(before), size=(BOOTSTRAP_SAMPLES, len(before)))
    result: dict[str, Any] = {"questions": len(before), "before": {}, "after": {}, "difference": {}}
    for name in (*MEASURES, "tokens"):
        ours, theirs = (np.array([float(row[name]) for row in each]) for each in (before, after))
        interval = np.quantile((theirs - ours)[samples].mean(1), (0.025, 0.975))
        result["before"][name], result["after"][name] = float(ours.mean()), float(theirs.mean())
        result["difference"][name] = {
            "mean": float((theirs - ours).mean()),
            "95%": [float(each) for each in interval],
        }
    return result | {"rows": {"before": list(before), "after": list(after)}}
