"""Learn R-Stitch+'s policy for a pair on questions with known answers.

A step takes some questions, draws a group of texts for each with the policy's decisions sampled, and updates
the policy by their rewards. A group whose rewards are all equal has no gradient; other questions are asked
instead, up to a bound (DAPO's dynamic sampling). Held-out questions are answered before and after, as they
are served. A checkpoint is written after every step (`training.policy_checkpoint`), so that a killed run
resumes and ends with the same policy.

Leaves out how texts are decoded (`decoders.rollouts`), their rewards (`training.policy_environment`) and the
update (`routers.token.policy_train`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import DataError, InputError
from viaticum.questions import Question, digest_of
from viaticum.training.policy_checkpoint import PolicyRun, Progress, digest
from viaticum.training.policy_environment import PolicyEnvironment, require_answers
from viaticum.training.policy_evaluation import compare
from viaticum.training.progress import Report, no_report
from viaticum.training.provenance import member_facts, prompt_text, versions

if TYPE_CHECKING:
    from viaticum.decoders.cost import CostModel
    from viaticum.decoders.rollouts import Rollout
    from viaticum.routers.token.policy import PolicyDecisions, PolicyShape, TrainedPolicy
    from viaticum.routers.token.policy_train import Learner, LearnerSettings

TAU = 0.03  # R-Stitch's own; where neither the caller nor the pair's entry gives one


@dataclass(frozen=True)
class PolicySettings:
    """What a policy depends on, beside models and questions.

    Args:
        tau: normalised entropy above which the policy is asked.
        strategy: how questions are asked.
        latency_weight: lambda, the reward that a second of latency costs.
        streams: texts at once whose latency is estimated.
        group: texts for each question.
        questions: questions with different rewards that a step learns from.
        most: questions that a step asks at most to find them.
        temperature: of the models' tokens.
        seed: of the split and of every random draw.
        held_out: questions to evaluate on.
        rank, width, start: see `PolicyShape`.
        rate, epochs, minibatches, scale: see `policy_train.LearnerSettings`.
    """

    tau: float
    strategy: str = "cot"
    latency_weight: float = 0.01
    streams: int = 1
    group: int = 8
    questions: int = 4
    most: int = 12
    temperature: float = 0.0
    seed: int = 0
    held_out: int = 0
    rank: int = 32
    width: int = 64
    start: float = 2.5
    rate: float = 3e-3
    epochs: int = 4
    minibatches: int = 4
    scale: Literal["group", "batch"] = "group"

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise InputError(f"tau is a normalised entropy between 0 and 1, got {self.tau}")
        if self.group < 2:
            raise InputError(
                f"a group has two texts or more, to be compared with each other; got {self.group}"
            )
        if min(self.questions, self.streams) < 1 or self.held_out < 0:
            raise InputError("questions and streams must be 1 or more, held_out 0 or more")
        if self.most < self.questions:
            raise InputError(
                f"a step asks at least the {self.questions} questions it learns from, got {self.most}"
            )

    def shape(self, hidden_size: int) -> PolicyShape:
        from viaticum.routers.token.policy import PolicyShape

        return PolicyShape(hidden_size, self.rank, self.width, self.start)

    def learner_settings(self) -> LearnerSettings:
        from viaticum.routers.token.policy_train import LearnerSettings

        return LearnerSettings(self.rate, epochs=self.epochs, minibatches=self.minibatches, scale=self.scale)


def learn(
    questions: Sequence[Question],
    pair: str,
    out: str | Path,
    *,
    catalogue: Catalogue,
    settings: PolicySettings,
    steps: int = 50,
    minutes: float | None = None,
    slots: int = 16,
    costs: CostModel | None = None,
    report: Report = no_report,
) -> TrainedPolicy:
    """Learn until `steps` steps were made in all, those of earlier runs in the folder included.

    Args:
        questions: questions with right answers.
        pair: name of a pair of the catalogue.
        out: folder of the run and of the policy; one that was begun is continued.
        catalogue: the models.
        settings: what the policy depends on besides.
        steps: total number of steps.
        minutes: begin no further step after so long; the same command continues.
        slots: texts that are written at once.
        costs: times of calls; by default those measured for the pair on this machine.
        report: called with stage, done and total.

    Raises:
        DataError: right answers are missing, or no step can be learned from.
        InputError: a setting is out of range, or the folder was begun with something else.
        VocabularyMismatch, WeightsError: the pair cannot run.
        ModelError: a text failed.
    """
    from viaticum.routers.token.policy_train import check_latency_weight

    check_latency_weight(settings.latency_weight)
    settings.shape(1), settings.learner_settings()  # raise before anything is loaded
    if steps < 0:
        raise InputError(f"steps must be 0 or more, got {steps}")
    started = time.monotonic()
    held_out, training = split(questions, settings.held_out, settings.seed)
    environment = PolicyEnvironment(catalogue, pair, settings.strategy, settings.streams, slots, costs)
    with PolicyRun(Path(out), _identity(environment, held_out, training, settings)) as run:
        trainer = _PolicyTrainer(run, environment, settings, held_out, training, report)
        trainer.evaluate_before()
        while trainer.progress.steps < steps:
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                return trainer.save(evaluation=None)
            trainer.step(steps)
        return trainer.finish()


def split(questions: Sequence[Question], held_out: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Return held-out questions and those to learn from, by a hash of their ids.

    Raises:
        DataError: right answers are missing, or no question is left to learn from.
    """
    require_answers(questions)
    ordered = sorted(questions, key=lambda each: hashlib.sha256(f"{seed}:{each.id}".encode()).hexdigest())
    if len(ordered) - held_out < 1:
        raise DataError(
            f"{held_out} of {len(ordered)} questions are held out, which leaves none to learn from; give "
            "more questions"
        )
    return ordered[:held_out], ordered[held_out:]


class _PolicyTrainer:
    """One run over one folder."""

    def __init__(
        self,
        run: PolicyRun,
        environment: PolicyEnvironment,
        settings: PolicySettings,
        held_out: Sequence[Question],
        training: Sequence[Question],
        report: Report,
    ) -> None:
        from viaticum.routers.token.policy import Policy
        from viaticum.routers.token.policy_train import Learner

        self.run, self.environment, self.settings, self.report = run, environment, settings, report
        self.held_out, self.training = held_out, training
        self._orders: dict[int, list[int]] = {}  # of the training questions, by epoch
        environment.cached = run.facts["cached"]
        self.policy = Policy(settings.shape(environment.hidden_size), settings.seed).to(environment.device)
        self.learner: Learner = Learner(self.policy, settings.learner_settings())
        self.progress = Progress()
        if (checkpoint := run.load()) is not None:
            self.progress, state = checkpoint
            try:
                self.learner.restore(state)
            except (RuntimeError, KeyError, ValueError) as error:
                raise DataError(
                    f"the checkpoint in {run.folder} does not fit ({str(error).splitlines()[0]}); learn into "
                    "a new folder"
                ) from None
        if "before" not in run.facts:
            run.add_facts(before=None)

    def evaluate_before(self) -> None:
        """Answer the held-out questions by R-Stitch, once: the policy before it learned."""
        if self.run.facts["before"] is None and not self.progress.steps:
            self.run.add_facts(before=self._serve("before"))

    def step(self, total: int) -> None:
        """Make one of `total` steps and write its checkpoint."""
        from viaticum.decoders.rollouts import derive_seed
        from viaticum.routers.token.policy_train import Batch

        number, started = self.progress.steps, time.monotonic()
        self.report("steps", number, total)
        groups = self._groups(number)
        useful = [each for each in groups if each.differs]
        if not useful and not self.progress.learned:
            raise DataError(self._why_nothing(groups))
        losses = {"loss": 0.0, "clipped": 0.0}
        if not self.progress.learned:
            self.policy.fit_decisions([each for group in groups for each in group.decisions])
        if useful:
            batch = Batch.of(
                self.policy,
                [each.rewards for each in useful],
                [each.decisions for each in useful],
                self.settings.scale,
            )
            losses = self.learner.update(batch, derive_seed(self.settings.seed, number))
            self.progress.learned += 1
        self.progress.curve.append(self._row(number, groups, losses, time.monotonic() - started))
        self.run.save(self.progress, self.learner.state())
        self.report("steps", number + 1, total)

    def finish(self) -> TrainedPolicy:
        """Save the policy with its evaluation on the held-out questions."""
        before = self.run.facts["before"]
        if not before:
            return self.save(evaluation=None)
        return self.save(evaluation=compare(before, self._serve("after")))

    def _serve(self, stage: str) -> list[dict[str, Any]]:
        if not self.held_out:
            return []
        settings = self.settings
        self.report(stage, 0, len(self.held_out))
        rows = self.environment.serve(self.policy, settings.tau, self.held_out, 0.5, settings.latency_weight)
        self.report(stage, len(self.held_out), len(self.held_out))
        return rows

    # --- a step ---------------------------------------------------------------------------------------------

    def _groups(self, step: int) -> list[_Group]:
        """Draw groups until enough have different rewards, or the bound of questions is reached."""
        groups: list[_Group] = []
        while True:
            missing = self.settings.questions - sum(each.differs for each in groups)
            count = min(missing, self.settings.most - len(groups))
            if count <= 0:
                return groups
            groups += self._draw(step, count)

    def _draw(self, step: int, count: int) -> list[_Group]:
        """Groups of texts for the next so many questions."""
        from viaticum.decoders.rollouts import derive_seed
        from viaticum.routers.token.policy_train import EQUAL_REWARDS, reward

        settings, environment = self.settings, self.environment
        numbers = range(self.progress.asked, self.progress.asked + count)
        questions = [self._question(number) for number in numbers]
        seeds = [derive_seed(settings.seed, step, number) for number in numbers]
        self.progress.asked += count
        requests = [environment.request(each, settings.temperature) for each in questions]
        drawn = environment.writer.sample(self.policy, settings.tau, requests, settings.group, seeds)
        groups = []
        for question, texts in zip(questions, drawn, strict=True):
            correct = tuple(environment.correct(each, question) for each in texts)
            rewards = tuple(
                reward(was_correct, each.latency, settings.latency_weight)
                for was_correct, each in zip(correct, texts, strict=True)
            )
            decisions = sum(each.decision_count for each in texts)
            differs = decisions > 0 and max(rewards) - min(rewards) > EQUAL_REWARDS
            groups.append(_Group(tuple(texts), correct, rewards, differs))
        return groups

    def _question(self, number: int) -> Question:
        """The training questions in an order that is drawn anew for each epoch."""
        epoch, index = divmod(number, len(self.training))
        if epoch not in self._orders:
            names = [f"{self.settings.seed}:{epoch}:{each.id}" for each in self.training]
            self._orders[epoch] = sorted(
                range(len(names)), key=lambda at: hashlib.sha256(names[at].encode()).digest()
            )
        return self.training[self._orders[epoch][index]]

    def _row(
        self, number: int, groups: Sequence[_Group], losses: Mapping[str, float], seconds: float
    ) -> dict[str, Any]:
        """A row of the learning curve: means over all texts of the step, also those without a gradient."""
        texts = [text for group in groups for text in group.texts]
        tokens = sum(len(each.tokens) for each in texts)
        decisions = sum(each.decision_count for each in texts)
        return {
            "step": number + 1,
            "reward": sum(sum(each.rewards) for each in groups) / len(texts),
            "accuracy": sum(sum(each.correct) for each in groups) / len(texts),
            "large_share": sum(each.tokens_by_model[1] for each in texts) / max(1, tokens),
            "asked_share": decisions / max(1, tokens),
            "called_share": sum(each.dropped for each in texts) / max(1, decisions),
            "latency": sum(each.latency for each in texts) / len(texts),
            "questions": len(groups),
            "dropped": sum(not each.differs for each in groups),
            "texts": len(texts),
            "tokens": tokens,
            "learned": self.progress.learned,
            **losses,
            "seconds": round(seconds, 1),
        }

    def _why_nothing(self, groups: Sequence[_Group]) -> str:
        texts = sum(len(each.texts) for each in groups)
        decisions = sum(text.decision_count for each in groups for text in each.texts)
        correct = sum(sum(each.correct) for each in groups)
        finding = (
            f"no question of {len(groups)} has texts with different rewards ({correct} of {texts} right, the "
            f"policy was asked {decisions} times)"
        )
        if not decisions:
            return f"{finding}; lower tau from {self.settings.tau} to ask it more often"
        return (
            f"{finding}; give other questions, which the pair answers now right, now wrong, a lambda above "
            "0, a lower tau, larger groups, or a temperature"
        )

    # --- the artefact ---------------------------------------------------------------------------------------

    def save(self, *, evaluation: Mapping[str, Any] | None) -> TrainedPolicy:
        """Write the policy as it is now, and return it as it is loaded."""
        from viaticum.routers.token.policy import TrainedPolicy

        learned = {
            each.id: digest_of(each.query.text) for each in map(self._question, range(self.progress.asked))
        }
        facts = {
            **{name: self.run.facts[name] for name in ("pair", "small", "large", "settings", "cached")},
            "tau": self.settings.tau,
            "threshold": 0.5,
            "steps": self.progress.steps,
            "learned": self.progress.learned,
            "last": self.progress.curve[-1] if self.progress.curve else None,
            "evaluation": evaluation,
            "split": {
                "held_out": [each.id for each in self.held_out],
                "learned": sorted(learned),
            },
            "digests": [learned[name] for name in sorted(learned)],
            "costs": asdict(self.environment.costs),
            "versions": versions(),
        }
        TrainedPolicy(self.policy, facts).save(self.run.folder)
        return TrainedPolicy.load(self.run.folder)


@dataclass(frozen=True, slots=True)
class _Group:
    """The texts for a question. differs: whether their rewards do, and the policy was asked at all."""

    texts: tuple[Rollout, ...]
    correct: tuple[bool, ...]
    rewards: tuple[float, ...]
    differs: bool

    @property
    def decisions(self) -> list[PolicyDecisions]:
        return [each.decisions for each in self.texts if each.decisions is not None]


def _identity(
    environment: PolicyEnvironment,
    held_out: Sequence[Question],
    training: Sequence[Question],
    settings: PolicySettings,
) -> dict[str, Any]:
    questions = [*held_out, *training]
    return {
        "pair": environment.spec.name,
        **member_facts(environment.spec, environment.catalogue),
        "settings": asdict(settings),
        "questions_sha256": digest(
            [[each.id, each.query.text, each.query.kind, *each.accepted] for each in questions]
        ),
        "prompt_sha256": digest(prompt_text(environment.catalogue, environment.spec, environment.strategy)),
        "costs_sha256": digest(asdict(environment.costs)),
        "cached": environment.shared_prefix(questions),
    }


def default_tau(spec: ModelSpec) -> float:
    """Return the tau of the pair's entry, else R-Stitch's own."""
    return TAU if spec.tau is None else float(spec.tau)
