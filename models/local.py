"""Local models and pairs behind the `Model` contract; every set of weights is loaded once and shared.

Needs the `local` extra. Knows no strategy and no price. Calls of many threads are written together, as slots allow:
see `viaticum.models.batching`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import InputError, MissingExtra, ModelError, PromptTooLong
from viaticum.heavy import LOADING
from viaticum.models.base import Generation, Model
from viaticum.models.batching import BatchScheduler
from viaticum.models.decoding_modes import choose_way, habits_of, known_costs
from viaticum.types import Completion, Message, TokenCount, Usage
from viaticum.vocabulary import check_same_vocabulary
from viaticum.weights import fingerprint, locate

if TYPE_CHECKING:
    from viaticum.decoders import Event, MixedDecoder, Request, Result, Runner
    from viaticum.decoders.cost import CostModel, DecodingMode, HandoffStats
    from viaticum.routers.token import TokenRouter
    from viaticum.routers.token.neural import LearnedDivergence, TrainedRouter
    from viaticum.routers.token.policy import RStitchPlus, TrainedPolicy


class LocalModels:
    """The local models of a catalogue, loaded on first use. slots: texts that are written at once."""

    def __init__(self, catalogue: Catalogue, *, slots: int = 1) -> None:
        self.catalogue = catalogue
        self.slots = slots
        self._runners: dict[str, Runner] = {}
        self._tokenizers: dict[str, Any] = {}
        self.lock = threading.RLock()
        self.desk = BatchScheduler()

    def model(self, name: str) -> LocalModel:
        """A model of kind local or pair. Checks that weights are here and fit; loads them only when asked to write.

        Raises `WeightsError` for missing weights and `VocabularyMismatch` for a pair that cannot work.
        """
        spec = self.catalogue[name]
        if spec.kind not in ("local", "pair"):
            raise InputError(f"{name} is a {spec.kind} model, not a local one")
        folders = [locate(self.catalogue[member]) for member in spec.members]
        if len(folders) == 2:
            check_same_vocabulary(*folders)
        return LocalModel(self, spec, folders[-1])

    def tokenizer(self, folder: Path) -> Any:
        found = self._tokenizers.get(str(folder))
        if found is None:
            with LOADING:
                found = self._tokenizers.get(str(folder)) or self._load_tokenizer(folder)
                self._tokenizers[str(folder)] = found
        return found

    @staticmethod
    def _load_tokenizer(folder: Path) -> Any:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise MissingExtra("transformers", "local") from None
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def runner(self, name: str) -> Runner:
        with LOADING:
            try:
                from viaticum.decoders import Runner
            except ImportError as error:
                raise MissingExtra(error.name or "torch", "local") from None
        spec = self.catalogue[name]
        with self.lock, LOADING:
            if name not in self._runners:
                self._runners[name] = Runner.load(locate(spec), slots=self.slots, context=spec.context_length)
            return self._runners[name]


class LocalModel(Model):
    """One local model, or a small/large pair in which a token router chooses."""

    def __init__(self, pool: LocalModels, spec: ModelSpec, folder: Path) -> None:
        self.pool, self.spec = pool, spec
        self.name, self.members = spec.name, spec.members
        self._folder = folder
        self._decoders: dict[DecodingMode, MixedDecoder] = {}
        self._ways: dict[
            tuple[HandoffStats, int], DecodingMode
        ] = {}  # what was chosen: choosing takes tenths of a second
        self._texts = 0  # asked for and not ended

    @cached_property
    def _costs(self) -> CostModel | None:
        return known_costs(self.spec)

    @property
    def tokenizer(self) -> Any:
        return self.pool.tokenizer(self._folder)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat, by the model's own template, ready for the answer.

        Raises `InputError` for messages that the template refuses.
        """
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_dict=False
            )
        except Exception as error:
            if not type(error).__module__.startswith("jinja2"):
                raise
            raise InputError(f"{self.name} cannot read these messages: {error}") from None
        return ids

    def worst_case(self, messages: Sequence[Message], max_new_tokens: int) -> dict[str, TokenCount]:
        prompt = len(self.prompt(messages))
        if prompt + max_new_tokens > self.spec.context_length:
            raise PromptTooLong(
                f"a prompt of {prompt} tokens and {max_new_tokens} new ones do not fit the context of "
                f"{self.name} ({self.spec.context_length}); shorten the question or lower max_new_tokens"
            )
        # Each model of a pair reads the prompt; which of them makes a token is not known beforehand, so
        # the large one, never the cheaper, is taken to make them all.
        worst = dict.fromkeys(self.members, TokenCount(prompt, 0))
        worst[self.members[-1]] = TokenCount(prompt, max_new_tokens)
        return worst

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[str | Completion]:
        """As `Model.stream`. While it waits an empty piece comes now and then: a caller may close between pieces."""
        for _, event in self._write([self._request(messages, generation)]):
            if event is None:
                yield ""
                continue
            if event.text:
                yield event.text
            if event.result is not None:
                yield completion_of(event.result)

    def generate_all(
        self, chats: Sequence[Sequence[Message]], generation: Generation
    ) -> Iterator[tuple[int, Completion]]:
        """Many chats at once, as slots allow: (place in the list, completion) as each ends.

        Where some fail the others are given first; then the first failure is raised (`ModelError`).
        """
        failure: ModelError | None = None
        for place, event in self._write([self._request(messages, generation) for messages in chats]):
            if event is None or event.result is None:
                continue
            if event.result.error is not None:
                failure = failure or event.result.error
            else:
                yield place, completion_of(event.result)
        if failure is not None:
            raise failure

    def _write(self, requests: list[Request]) -> Iterator[tuple[int, Event | None]]:
        with self.pool.lock:
            self._texts += len(requests)
        try:
            with self.pool.lock:
                decoder = self._mixed(self._texts)
            yield from self.pool.desk.write(decoder, requests)
        finally:
            with self.pool.lock:
                self._texts -= len(requests)

    def _request(self, messages: Sequence[Message], generation: Generation) -> Request:
        with LOADING:
            from viaticum.decoders import Request, Sampling

        if generation.extra:
            raise InputError(f"{self.name} runs locally and cannot do: {', '.join(generation.extra)}")
        return Request(
            prompt=self.prompt(messages),
            max_new_tokens=generation.max_new_tokens,
            sampling=Sampling(generation.temperature, generation.top_p, generation.top_k, generation.seed),
            stop=generation.stop,
        )

    def _mixed(self, texts: int) -> MixedDecoder:
        """The decoder for so many texts at once; a pair may have one for every way that pays."""
        from viaticum.decoders import MixedDecoder
        from viaticum.decoders.cost import LARGE_ALONE
        from viaticum.routers.token import AlwaysLarge

        runners = [self.pool.runner(member) for member in self.members]
        way = LARGE_ALONE if len(runners) == 1 else self._way(min(texts, self.pool.slots))
        if way not in self._decoders:
            self._decoders[way] = MixedDecoder(
                runners[-1],
                runners[0] if way != LARGE_ALONE else None,
                tokenizer=self.tokenizer,
                router=token_router(self.spec, self.pool.catalogue, runners[0])
                if way.routed
                else AlwaysLarge(),
                stop_ids=stop_ids(runners[-1], self.tokenizer),
                names=(self.members[0], self.members[-1]),
                draft=way.draft,
            )
        return self._decoders[way]

    def _way(self, streams: int) -> DecodingMode:
        habits = habits_of(decoder.stats for decoder in self._decoders.values())
        if (habits, streams) not in self._ways:
            self._ways[habits, streams] = choose_way(self.spec, self._costs, habits, streams)
        return self._ways[habits, streams]


def token_router(spec: ModelSpec, catalogue: Catalogue, small: Runner) -> TokenRouter:
    """The token router that a pair's entry names; small: the runner of its small model.

    Raises `InputError` for an unknown one, and for a learned one that was made for other weights.
    """
    from viaticum.routers.token import EntropyRouter

    if spec.router == "r2r":
        return learned_router(spec, catalogue, small)
    if spec.router == "r-stitch+":
        return learned_policy(spec, catalogue, small)
    if spec.router != "r-stitch":
        raise InputError(
            f"{spec.name}: unknown token router {spec.router!r}; known: r-stitch, r-stitch+, r2r"
        )
    assert spec.tau is not None, "the catalogue checks that a pair has a tau"
    return EntropyRouter(spec.tau)


def learned_router(spec: ModelSpec, catalogue: Catalogue, small: Runner) -> LearnedDivergence:
    """R2R's router of a pair, with the threshold that the entry names or the router was calibrated to."""
    from viaticum.routers.token.drift import ShareController
    from viaticum.routers.token.neural import LearnedDivergence, TrainedRouter

    trained = TrainedRouter.load(router_folder(spec))
    check_members(trained, spec, catalogue)
    threshold = trained.threshold if spec.share is None else trained.threshold_for(spec.share)
    drift = None
    if spec.drift:
        target = trained.facts["calibration"].get("share") if spec.share is None else spec.share
        drift = ShareController(target)
    return LearnedDivergence(
        trained.network,
        small.embeddings,
        threshold if spec.threshold is None else spec.threshold,
        drift,
    )


def learned_policy(spec: ModelSpec, catalogue: Catalogue, small: Runner) -> RStitchPlus:
    """R-Stitch+'s router of a pair, with tau and threshold that the entry names or the policy was learned with."""
    from viaticum.routers.token.policy import RStitchPlus, TrainedPolicy

    trained = TrainedPolicy.load(router_folder(spec))
    check_members(trained, spec, catalogue)
    return RStitchPlus(
        trained.policy.to(small.device),
        trained.tau if spec.tau is None else spec.tau,
        trained.threshold if spec.threshold is None else spec.threshold,
    )


def check_members(trained: TrainedRouter | TrainedPolicy, spec: ModelSpec, catalogue: Catalogue) -> None:
    """Raise `InputError` unless it was made for the weights of this pair's members on this machine."""
    for role, name in zip(("small", "large"), spec.members, strict=True):
        trained.check_weights(role, name, fingerprint(catalogue[name]))


def check_fits(question: str, prompt: Sequence[int], new: int, members: Iterable[ModelSpec]) -> None:
    """Raise `PromptTooLong`, with the question's id, unless each of these models can read a prompt and `new` tokens after it."""
    for spec in members:
        if len(prompt) + new > spec.context_length:
            raise PromptTooLong(
                f"question {question!r}: a prompt of {len(prompt)} tokens and {new} new ones do not fit the context of "
                f"{spec.name} ({spec.context_length}); shorten the question or leave it out"
            )


def router_folder(spec: ModelSpec) -> Path:
    """Where a pair's learned router is: the folder its entry names, else that which is packaged for its name."""
    if spec.router_path is not None:
        return Path(spec.router_path).expanduser()
    packaged = Path(str(resources.files("viaticum") / "token_routers" / spec.name))
    if not packaged.is_dir():
        command = "policy" if spec.router == "r-stitch+" else "train"
        raise InputError(
            f"{spec.name}: no router is packaged for it; train one with `viaticum tokens {command}` and give its folder "
            "as router_path"
        )
    return packaged


def stop_ids(runner: Runner, tokenizer: Any) -> list[int]:
    """Token ids that end a text: the tokenizer's and those of the model's generation config."""
    configured = getattr(runner.model.generation_config, "eos_token_id", None)
    many = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in (*many, tokenizer.eos_token_id) if token is not None})


def completion_of(result: Result) -> Completion:
    """Raises the error of a text that failed."""
    if result.error is not None:
        raise result.error  # a failed call is no completion: nothing is charged for it
    return Completion(result.text, Usage(result.usage, result.seconds), result.finish_reason, result.trace)
