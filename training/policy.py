"""Learn R-Stitch+'s policy for a pair on questions whose answers are known, and say how good it is.

A step: some questions, a group of texts to each with the policy's answers drawn, their rewards, and an update. Questions whose texts all
have the same reward teach nothing; others are asked instead, up to a bound. Held-out questions are answered before and after, as
they are served. Everything is kept after each step (`training.policy_checkpoint`), so that a killed run goes on and ends with the policy that it
would have ended with. Leaves out how texts are written (`decoders.rollouts`) and how the policy learns from them
(`routers.token.policy_train`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import DataError, InputError
from viaticum.models.decoding_modes import costs_path, known_costs
from viaticum.models.local import LocalModels, completion_of, stop_ids
from viaticum.models.token_routers import check_members
from viaticum.questions import Question, digest_of
from viaticum.strategies import equivalent
from viaticum.strategies import get as get_strategy
from viaticum.training.policy_checkpoint import PolicyRun, Progress, digest
from viaticum.types import Query
from viaticum.weights import fingerprint, locate

if TYPE_CHECKING:
    from viaticum.decoders import Request
    from viaticum.decoders.cost import CostModel
    from viaticum.decoders.rollouts import Rollout, RolloutWriter
    from viaticum.routers.token.policy import Choices, Policy, PolicyShape, TrainedPolicy
    from viaticum.routers.token.policy_train import Learner, LearnerSettings

Report = Callable[[str, int, int], None]
TAU = 0.03  # where neither the caller nor the pair's entry names one
DRAWS = 2000  # of questions, for intervals
FACTS = ("pair", "settings", "cached", "split", "costs")  # of a policy, that an evaluation needs
MEASURES = ("reward", "correct", "large_share", "latency")


@dataclass(frozen=True)
class PolicySettings:
    """What a policy depends on, beside models and questions.

    latency_weight: lambda, what a second costs of a right answer; streams: texts at once whose latency is estimated. group: texts a
    question; questions: those a step wants to learn from; most: those that it asks at most to find them. temperature: of the models'
    tokens. rank, width, start: see `PolicyShape`; the rest as `policy_train.LearnerSettings`. held_out: questions to evaluate on.
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

    def shape(self, hidden: int) -> PolicyShape:
        from viaticum.routers.token.policy import PolicyShape

        return PolicyShape(hidden, self.rank, self.width, self.start)

    def learning(self) -> LearnerSettings:
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
    device: str = "cpu",
    costs: CostModel | None = None,
    report: Report = lambda stage, done, of: None,
) -> TrainedPolicy:
    """Learn until `steps` steps were made in all; a folder that was begun goes on. Returns the policy, which is in `out`.

    minutes: begin no further step after so long; the same command goes on. costs: times of calls, by default those measured
    for the pair here. Raises `DataError` where answers are missing or nothing can be learned from, `VocabularyMismatch`,
    `WeightsError`, `ModelError`, and `InputError` where the folder was begun with something else.
    """
    from viaticum.routers.token.policy_train import check_weight

    check_weight(settings.latency_weight)
    settings.shape(1), settings.learning()  # raise before anything is loaded
    if steps < 0:
        raise InputError(f"steps must be 0 or more, got {steps}")
    began = time.monotonic()
    held, rest = split(questions, settings.held_out, settings.seed)
    bench = PolicyEnvironment(catalogue, pair, settings.strategy, settings.streams, slots, device, costs)
    with PolicyRun(Path(out), _identity(bench, held, rest, settings)) as run:
        training = _Training(run, bench, settings, held, rest, report)
        training.evaluate_before()
        while training.progress.steps < steps:
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                return training.keep()
            training.step(steps)
        return training.finish()


def evaluate(
    folder: str | Path,
    questions: Sequence[Question],
    *,
    catalogue: Catalogue,
    pair: str = "",
    slots: int = 16,
    device: str = "cpu",
    costs: CostModel | None = None,
    report: Report = lambda stage, done, of: None,
) -> dict[str, Any]:
    """A learned policy against R-Stitch with the same tau, on questions that it should not have learned from.

    costs: times of calls, by default those that it learned with, so that rewards can be compared.
    Raises `DataError` where answers are missing, `InputError` for a policy of other weights.
    """
    from viaticum.decoders.cost import CostModel
    from viaticum.routers.token.artefact import learned_among
    from viaticum.routers.token.policy import Policy, TrainedPolicy

    _require_gold(questions)
    trained = TrainedPolicy.load(folder)
    missing = [name for name in FACTS if name not in trained.facts]
    if missing:
        raise DataError(f"the policy in {folder} does not say its {', '.join(missing)}; learn it again")
    settings = trained.facts["settings"]
    bench = PolicyEnvironment(
        catalogue,
        pair or trained.facts["pair"],
        settings["strategy"],
        settings["streams"],
        slots,
        device,
        costs or CostModel.of(trained.facts["costs"]),
    )
    check_members(trained, bench.spec, catalogue)
    bench.cached = int(trained.facts["cached"])
    asked = {each.id: digest_of(each.query.text) for each in questions}
    learned = learned_among(trained.facts, trained.facts["split"]["learned"], asked)
    weight, rows = settings["latency_weight"], []
    first = Policy(trained.policy.shape).eval().requires_grad_(False)
    for policy, threshold, stage in (
        (first, 0.5, "R-Stitch"),
        (trained.policy, trained.threshold, "R-Stitch+"),
    ):
        report(stage, 0, len(questions))
        rows.append(bench.serve(policy.to(device), trained.tau, questions, threshold, weight))
        report(stage, len(questions), len(questions))
    return {"learned_from": len(learned), **compare(*rows)}


def split(questions: Sequence[Question], held_out: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Held-out questions and those to learn from, by a hash of their ids. Raises `DataError` where answers are missing, or too few are left."""
    _require_gold(questions)
    ordered = sorted(questions, key=lambda each: hashlib.sha256(f"{seed}:{each.id}".encode()).hexdigest())
    if len(ordered) - held_out < 1:
        raise DataError(
            f"{held_out} of {len(ordered)} questions are held out, which leaves none to learn from; give more questions"
        )
    return ordered[:held_out], ordered[held_out:]


def _require_gold(questions: Sequence[Question]) -> None:
    missing = [each.id for each in questions if each.gold is None]
    if missing or not questions:
        raise DataError(
            f"{len(missing)} of {len(questions)} questions have no right answer, e.g. {(missing or ['none'])[0]!r}; a policy is rewarded "
            'for right answers: write {"question": "...", "answer": "..."}'
        )


class PolicyEnvironment:
    """A pair that writes answers, and the rewards that they earn. Loads the models when the first text is to be written."""

    def __init__(
        self,
        catalogue: Catalogue,
        pair: str,
        strategy: str,
        streams: int,
        slots: int,
        device: str,
        costs: CostModel | None,
    ) -> None:
        self.catalogue, self.streams, self.slots, self.device = catalogue, streams, slots, device
        self.spec = catalogue[pair]
        if self.spec.kind != "pair":
            raise InputError(f"{pair} is a {self.spec.kind} model; a policy is learned for a pair")
        self.strategy = get_strategy(strategy)
        if self.strategy.samples > 1 or not self.strategy.graded:
            raise InputError(
                f"{strategy} is not graded text by text; learn with a strategy that asks once, e.g. cot"
            )
        self.model = LocalModels(catalogue).model(pair)  # checks weights and vocabularies
        self.costs = costs or _costs_of(self.spec)
        self.cached = 0  # tokens that all prompts begin with
        self._writer: RolloutWriter | None = None

    @property
    def writer(self) -> RolloutWriter:
        if self._writer is None:
            from viaticum.decoders import Runner
            from viaticum.decoders.rollouts import RolloutWriter

            small, large = (
                Runner.load(
                    locate(self.catalogue[name]),
                    slots=self.slots,
                    context=self.catalogue[name].context_length,
                    device=self.device,
                )
                for name in self.spec.members
            )
            self._writer = RolloutWriter(
                small,
                large,
                self.model.tokenizer,
                self.costs,
                stop_ids=stop_ids(large, self.model.tokenizer),
                names=(self.spec.members[0], self.spec.members[1]),
                streams=self.streams,
                cached=self.cached,
            )
        return self._writer

    @property
    def hidden(self) -> int:
        return int(self.writer.small.embeddings.shape[1])

    def request(self, question: Question, temperature: float = 0.0) -> Request:
        from viaticum.decoders import Request, Sampling

        return Request(
            self.model.prompt(self.strategy.messages(question.query)),
            self.strategy.max_new_tokens,
            Sampling(temperature),
            self.strategy.stop,
        )

    def common(self, questions: Sequence[Question]) -> int:
        """Tokens that all prompts begin with."""
        prompts = [self.model.prompt(self.strategy.messages(each.query)) for each in questions]
        first, last = min(prompts), max(prompts)  # sorted as words are, they have least in common
        same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        return min(same, len(first) - 1)

    def correct(self, rollout: Rollout, question: Question) -> bool:
        reading = self.strategy.read(completion_of(rollout.result), question.query)
        return equivalent(reading.value, question.gold, question.query.kind)

    def serve(
        self, policy: Policy, tau: float, questions: Sequence[Question], threshold: float, weight: float
    ) -> list[dict[str, Any]]:
        """A row a question, with what came out where the policy's likelier answer is taken."""
        from viaticum.routers.token.policy_train import reward

        found = self.writer.serve(policy, tau, [self.request(each) for each in questions], threshold)
        rows = []
        for question, rollout in zip(questions, found, strict=True):
            correct = self.correct(rollout, question)
            rows.append(
                {
                    "id": question.id,
                    "reward": reward(correct, rollout.latency, weight),
                    "correct": correct,
                    "large_share": rollout.large_share,
                    "latency": rollout.latency,
                    "tokens": len(rollout.tokens),
                    "asked": rollout.asked,
                    "dropped": rollout.dropped,
                }
            )
        return rows


class _Training:
    """One run over one folder."""

    def __init__(
        self,
        run: PolicyRun,
        bench: PolicyEnvironment,
        settings: PolicySettings,
        held: Sequence[Question],
        rest: Sequence[Question],
        report: Report,
    ) -> None:
        from viaticum.routers.token.policy import Policy
        from viaticum.routers.token.policy_train import Learner

        self.run, self.bench, self.settings, self.report = run, bench, settings, report
        self.held, self.rest = held, rest
        self._orders: dict[int, list[int]] = {}  # of the questions, by the pass over them
        bench.cached = run.facts["cached"]
        self.policy = Policy(settings.shape(bench.hidden), settings.seed).to(bench.device)
        self.learner: Learner = Learner(self.policy, settings.learning())
        self.progress = Progress()
        if (found := run.load()) is not None:
            self.progress, state = found
            try:
                self.learner.restore(state)
            except (RuntimeError, KeyError, ValueError) as error:
                raise DataError(
                    f"the checkpoint in {run.folder} does not fit ({str(error).splitlines()[0]}); learn into a new folder"
                ) from None
        if "before" not in run.facts:
            run.know(before=None)

    def evaluate_before(self) -> None:
        """The held-out questions by R-Stitch, once; it is the policy before it learned."""
        if self.run.facts["before"] is None and not self.progress.steps:
            self.run.know(before=self._serve("before"))

    def step(self, of: int) -> None:
        """One step, and its checkpoint."""
        from viaticum.decoders.rollouts import derived
        from viaticum.routers.token.policy_train import Batch

        number, began = self.progress.steps, time.monotonic()
        self.report("steps", number, of)
        groups = self._groups(number)
        kept = [each for each in groups if each.differs]
        if not kept and not self.progress.learned:
            raise DataError(self._why_nothing(groups))
        told = {"loss": 0.0, "clipped": 0.0}
        if not self.progress.learned:
            self.policy.fit_choices([each for group in groups for each in group.choices])
        if kept:
            batch = Batch.of(
                self.policy,
                [each.rewards for each in kept],
                [each.choices for each in kept],
                self.settings.scale,
            )
            told = self.learner.update(batch, derived(self.settings.seed, number))
            self.progress.learned += 1
        self.progress.curve.append(self._row(number, groups, told, time.monotonic() - began))
        self.run.save(self.progress, self.learner.state())
        self.report("steps", number + 1, of)

    def keep(self) -> TrainedPolicy:
        """The policy as it is, on the disk; not evaluated."""
        return self._save(None)

    def finish(self) -> TrainedPolicy:
        """The policy with what it is worth on the held-out questions."""
        before = self.run.facts["before"]
        if not before:
            return self._save(None)
        return self._save(compare(before, self._serve("after")))

    def _serve(self, stage: str) -> list[dict[str, Any]]:
        if not self.held:
            return []
        self.report(stage, 0, len(self.held))
        rows = self.bench.serve(self.policy, self.settings.tau, self.held, 0.5, self.settings.latency_weight)
        self.report(stage, len(self.held), len(self.held))
        return rows

    # --- a step ---------------------------------------------------------------------------------------------

    def _groups(self, number: int) -> list[_Group]:
        """Texts to so many questions that enough of them have rewards that differ, or the bound is reached."""
        from viaticum.decoders.rollouts import derived
        from viaticum.routers.token.policy_train import SAME, reward

        settings = self.settings
        groups: list[_Group] = []
        while True:
            wanted = settings.questions - sum(each.differs for each in groups)
            count = min(wanted, settings.most - len(groups))
            if count <= 0:
                return groups
            asked = [self._question(self.progress.asked + at) for at in range(count)]
            seeds = [derived(settings.seed, number, self.progress.asked + at) for at in range(count)]
            self.progress.asked += count
            requests = [self.bench.request(each, settings.temperature) for each in asked]
            found = self.bench.writer.draw(self.policy, settings.tau, requests, settings.group, seeds)
            for question, texts in zip(asked, found, strict=True):
                right = tuple(self.bench.correct(each, question) for each in texts)
                rewards = tuple(
                    reward(was, each.latency, settings.latency_weight)
                    for was, each in zip(right, texts, strict=True)
                )
                answers = sum(each.asked for each in texts)
                differs = answers > 0 and max(rewards) - min(rewards) > SAME
                groups.append(_Group(tuple(texts), right, rewards, differs))

    def _question(self, number: int) -> Question:
        """The questions in an order drawn anew for each pass over them."""
        turn, place = divmod(number, len(self.rest))
        if turn not in self._orders:
            names = [f"{self.settings.seed}:{turn}:{each.id}" for each in self.rest]
            self._orders[turn] = sorted(
                range(len(names)), key=lambda at: hashlib.sha256(names[at].encode()).digest()
            )
        return self.rest[self._orders[turn][place]]

    def _row(
        self, number: int, groups: Sequence[_Group], told: Mapping[str, float], seconds: float
    ) -> dict[str, Any]:
        """A line of the learning curve: means over all texts of the step, those that taught nothing among them."""
        texts = [text for group in groups for text in group.texts]
        tokens, asked = sum(len(each.tokens) for each in texts), sum(each.asked for each in texts)
        return {
            "step": number + 1,
            "reward": sum(sum(each.rewards) for each in groups) / len(texts),
            "accuracy": sum(sum(each.right) for each in groups) / len(texts),
            "large_share": sum(each.made[1] for each in texts) / max(1, tokens),
            "asked_share": asked / max(1, tokens),
            "called_share": sum(each.dropped for each in texts) / max(1, asked),
            "latency": sum(each.latency for each in texts) / len(texts),
            "questions": len(groups),
            "dropped": sum(not each.differs for each in groups),
            "texts": len(texts),
            "tokens": tokens,
            "learned": self.progress.learned,
            **told,
            "seconds": round(seconds, 1),
        }

    def _why_nothing(self, groups: Sequence[_Group]) -> str:
        texts = sum(len(each.texts) for each in groups)
        asked = sum(text.asked for each in groups for text in each.texts)
        right = sum(sum(each.right) for each in groups)
        told = f"no question of {len(groups)} has texts with different rewards ({right} of {texts} right, the policy was asked {asked} times)"
        if not asked:
            return f"{told}; lower tau from {self.settings.tau} to ask it more often"
        return (
            f"{told}; give other questions, which the pair answers now right, now wrong, a lambda above 0, a lower tau, "
            "larger groups, or a temperature"
        )

    # --- what is kept ---------------------------------------------------------------------------------------

    def _save(self, evaluation: Mapping[str, Any] | None) -> TrainedPolicy:
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
                "held_out": [each.id for each in self.held],
                "learned": sorted(learned),
            },
            "digests": [learned[name] for name in sorted(learned)],
            "costs": asdict(self.bench.costs),
            "versions": {name: metadata.version(name) for name in ("viaticum", "torch", "transformers")},
        }
        found = TrainedPolicy(self.policy, facts)
        found.save(self.run.folder)
        return TrainedPolicy.load(self.run.folder)


@dataclass(frozen=True, slots=True)
class _Group:
    """The texts to a question. differs: whether their rewards do, and the policy was asked at all."""

    texts: tuple[Rollout, ...]
    right: tuple[bool, ...]
    rewards: tuple[float, ...]
    differs: bool

    @property
    def choices(self) -> list[Choices]:
        return [each.choices for each in self.texts if each.choices is not None]


def compare(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of both, and of the differences with the middle 95% when the questions are drawn anew."""
    import numpy as np

    dice = np.random.default_rng(0)
    rows = dice.integers(len(before), size=(DRAWS, len(before)))
    told: dict[str, Any] = {"questions": len(before), "before": {}, "after": {}, "difference": {}}
    for name in (*MEASURES, "tokens"):
        ours, theirs = (np.array([float(row[name]) for row in each]) for each in (before, after))
        ends = np.quantile((theirs - ours)[rows].mean(1), (0.025, 0.975))
        told["before"][name], told["after"][name] = float(ours.mean()), float(theirs.mean())
        told["difference"][name] = {
            "mean": float((theirs - ours).mean()),
            "95%": [float(each) for each in ends],
        }
    return told | {"rows": {"before": list(before), "after": list(after)}}


def _identity(
    bench: PolicyEnvironment, held: Sequence[Question], rest: Sequence[Question], settings: PolicySettings
) -> dict[str, Any]:
    prompt = json.dumps([bench.strategy.messages(Query("?")), bench.strategy.max_new_tokens], sort_keys=True)
    asked = [[each.id, each.query.text, each.query.kind, each.gold] for each in (*held, *rest)]
    small, large = bench.spec.members
    return {
        "pair": bench.spec.name,
        "small": {"name": small, "sha256": fingerprint(bench.catalogue[small])},
        "large": {"name": large, "sha256": fingerprint(bench.catalogue[large])},
        "settings": asdict(settings),
        "questions_sha256": digest(asked),
        "prompt_sha256": digest(prompt),
        "costs_sha256": digest(asdict(bench.costs)),
        "cached": bench.common([*held, *rest]),
    }


def _costs_of(spec: ModelSpec) -> CostModel:
    found = known_costs(spec)
    if found is None:
        raise InputError(
            f"{spec.name}: no times of its calls with this torch and these threads in {costs_path(spec)}; measure them with "
            f"`viaticum models measure {spec.name}`, or give --costs FILE"
        )
    return found


def default_tau(spec: ModelSpec) -> float:
    """That of the pair's entry, else R-Stitch's own."""
    return TAU if spec.tau is None else float(spec.tau)
