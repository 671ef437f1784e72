"""The environment of policy learning: a pair that answers questions, and the rewards of its answers.

The models are loaded when the first text is written. Leaves out how rollouts are decoded
(`decoders.rollouts`) and how the policy is updated (`routers.token.policy_train`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import DataError, InputError
from viaticum.models.decoding_modes import costs_path, thorough_costs
from viaticum.models.local import LocalModels, completion_of
from viaticum.models.settings import prompt, resolve
from viaticum.questions import Question
from viaticum.strategies import get as get_strategy
from viaticum.strategies import load
from viaticum.strategies.answers import is_right

if TYPE_CHECKING:
    import torch

    from viaticum.decoders import Request
    from viaticum.decoders.cost import CostModel
    from viaticum.decoders.rollouts import Rollout, RolloutGenerator
    from viaticum.routers.token.policy import Policy


def require_answers(questions: Sequence[Question]) -> None:
    """Raise `DataError` where there are no questions, or one has no right answer."""
    missing = [each.id for each in questions if each.gold is None]
    if missing or not questions:
        raise DataError(
            f"{len(missing)} of {len(questions)} questions have no right answer, e.g. "
            f"{(missing or ['none'])[0]!r}; a policy is rewarded for right answers: write "
            '{"question": "...", "answer": "..."}'
        )


class PolicyEnvironment:
    """A pair, a strategy and the times of the pair's calls.

    Args:
        catalogue: the models.
        pair: name of a pair.
        strategy: how questions are asked; one that asks once.
        streams: texts at once whose latency is estimated.
        slots: texts that are written at once.
        costs: times of calls; by default those measured for the pair on this machine.

    Raises:
        InputError: no pair, a strategy that asks several times, or no measured times.
        WeightsError, VocabularyMismatch: the pair cannot run.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        pair: str,
        strategy: str,
        streams: int,
        slots: int,
        costs: CostModel | None,
    ) -> None:
        self.catalogue, self.streams = catalogue, streams
        self.spec = catalogue[pair]
        if self.spec.kind != "pair":
            raise InputError(f"{pair} is a {self.spec.kind} model; a policy is learned for a pair")
        load(*catalogue.strategies, strategy)
        self.strategy = get_strategy(strategy)
        self.generation = resolve(catalogue, pair, self.strategy)
        if self.strategy.samples > 1 or not self.strategy.graded:
            raise InputError(
                f"{strategy} is not graded text by text; learn with a strategy that asks once, e.g. cot"
            )
        self.pool = LocalModels(catalogue, slots=slots)
        self.model = self.pool.model(pair)  # checks weights and vocabularies
        self.costs = costs or _measured_costs(self.spec)
        self.cached = 0  # tokens of the prefix that all prompts share
        self._writer: RolloutGenerator | None = None

    @property
    def writer(self) -> RolloutGenerator:
        """Decodes rollouts; loads both models at its first use."""
        if self._writer is None:
            from viaticum.decoders.rollouts import RolloutGenerator

            small, large = self.pool.runners(self.spec.name)
            self._writer = RolloutGenerator(
                small,
                large,
                self.model.tokenizer,
                self.costs,
                stop_ids=self.model.stop_ids([small, large]),
                names=(self.spec.members[0], self.spec.members[1]),
                shared_vocabulary=self.model.vocabulary([small, large]),
                streams=self.streams,
                cached=self.cached,
            )
        return self._writer

    @property
    def device(self) -> torch.device:
        """Where the small model, and so the policy, runs."""
        return self.writer.small.device

    @property
    def hidden_size(self) -> int:
        """Size of the small model's hidden states."""
        return int(self.writer.small.embeddings.shape[1])

    def request(self, question: Question, temperature: float = 0.0) -> Request:
        """Return the decoder's request for a question."""
        from viaticum.decoders import Request, Sampling

        chat = prompt(self.spec, self.strategy, question.query)
        return Request(
            self.model.prompt(chat, self.generation),
            self.generation.max_new_tokens,
            Sampling(temperature),
            self.generation.stop,
            small_prompt=self.model.small_prompt(chat, self.generation),
        )

    def shared_prefix(self, questions: Sequence[Question]) -> int:
        """Return the number of tokens that all prompts begin with, at most all but one of the shortest.

        Of two models that read different prompts, the smaller number.
        """
        requests = [self.request(each) for each in questions]
        return min(_shared_length([list(each.prompts[model]) for each in requests]) for model in (0, 1))

    def correct(self, rollout: Rollout, question: Question) -> bool:
        """Return whether a rollout's answer is the right one."""
        reading = self.strategy.read(completion_of(rollout.result), question.query)
        return is_right(reading.value, question.accepted, question.query.kind)

    def serve(
        self, policy: Policy, tau: float, questions: Sequence[Question], threshold: float, weight: float
    ) -> list[dict[str, Any]]:
        """Answer questions as they are served: the policy's decision is its likelier action.

        Args:
            policy: the policy to serve.
            tau: normalised entropy above which it is asked.
            questions: questions with right answers.
            threshold: probability of calling the large model from which on it is called.
            weight: reward that a second of latency costs.

        Returns:
            A row of measurements for each question.
        """
        from viaticum.routers.token.policy_train import reward

        rollouts = self.writer.generate(policy, tau, [self.request(each) for each in questions], threshold)
        rows = []
        for question, rollout in zip(questions, rollouts, strict=True):
            correct = self.correct(rollout, question)
            rows.append(
                {
                    "id": question.id,
                    "reward": reward(correct, rollout.latency, weight),
                    "correct": correct,
                    "large_share": rollout.large_share,
                    "latency": rollout.latency,
                    "tokens": len(rollout.tokens),
                    "asked": rollout.decision_count,
                    "dropped": rollout.dropped,
                }
            )
        return rows


def _shared_length(prompts: list[list[int]]) -> int:
    first, last = min(prompts), max(prompts)  # in lexicographic order these two share least
    shared = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(shared, len(first) - 1)


def _measured_costs(spec: ModelSpec) -> CostModel:
    costs = thorough_costs(spec)
    if costs is None:
        raise InputError(
            f"{spec.name}: no times of its calls with this torch and these threads in {costs_path(spec)}; "
            f"measure them with `viaticum models measure {spec.name}`, or give --costs FILE"
        )
    return costs
