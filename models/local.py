"""Local models and pairs behind the `Model` contract. Every set of weights is loaded once and shared.

Calls of many threads are batched, as slots allow (`viaticum.models.batching`). Needs the `local` extra.
Leaves out strategies and prices.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import InputError, MissingExtra, ModelError, PromptTooLong
from viaticum.heavy import LOADING
from viaticum.local_settings import LocalSettings
from viaticum.messages import fold_system
from viaticum.models.api_keys import api_key
from viaticum.models.base import Generation, Model, StreamPiece
from viaticum.models.batching import BatchScheduler
from viaticum.models.budget_forcing import opening_ids, thinking_limit
from viaticum.models.decoding_modes import mode_chooser
from viaticum.models.engine_choice import measured_engine
from viaticum.models.logprobs import openai_logprobs
from viaticum.models.templates import require_template
from viaticum.models.token_routers import token_router
from viaticum.types import Completion, Message, ThinkingDelta, TokenCount, Usage
from viaticum.vocabulary import check_same_vocabulary
from viaticum.weights import locate

if TYPE_CHECKING:
    from viaticum.decoders import Event, MixedDecoder, Request, Result, Runner, Server

MAX_SLOTS = 64  # of slots="auto", where the caller sets no limit
PROMPT_END = 32  # tokens of a prompt that tell whether it ends inside a thought


PLAIN = Generation()


class LocalModels:
    """The local models of a catalogue, loaded on first use.

    Args:
        catalogue: its entries say where and how each model runs (`Catalogue.local_settings`).
        slots: texts that are written at once by a model whose entry does not say; "auto" for as many as the
            free memory holds, at most `max_slots`.
        mode: of all pairs, in place of their entries': "routed" where their routers are what is looked at.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        slots: int | Literal["auto"] = 1,
        max_slots: int = MAX_SLOTS,
        mode: Literal["routed", "auto"] | None = None,
    ) -> None:
        self.catalogue = catalogue
        self.slots, self.max_slots = slots, max_slots
        self.mode = mode
        self._runners: dict[tuple[str, LocalSettings], Runner] = {}
        self._tokenizers: dict[str, Any] = {}
        self.lock = threading.RLock()
        self.scheduler = BatchScheduler()

    def model(self, name: str) -> LocalModel:
        """Return a model of kind local or pair. Its weights are checked now and loaded at its first call.

        Raises:
            InputError: the model is of another kind, or has no chat template.
            WeightsError: weights are missing.
            VocabularyMismatch: the two models of a pair have different vocabularies.
        """
        spec = self.catalogue[name]
        if spec.kind not in ("local", "pair"):
            raise InputError(f"{name} is a {spec.kind} model, not a local one")
        folders = [locate(self.catalogue[member]) for member in spec.members]
        if len(folders) == 2:
            check_same_vocabulary(*folders)
        require_template(self.catalogue[spec.members[-1]], folders[-1])
        return LocalModel(self, spec, folders[-1])

    def tokenizer(self, folder: Path) -> Any:
        """Return the tokenizer in a folder of weights."""
        tokenizer = self._tokenizers.get(str(folder))
        if tokenizer is None:
            with LOADING:
                tokenizer = self._tokenizers.get(str(folder)) or self._load_tokenizer(folder)
                self._tokenizers[str(folder)] = tokenizer
        return tokenizer

    @staticmethod
    def _load_tokenizer(folder: Path) -> Any:
        try:
            from transformers import AutoTokenizer, PreTrainedTokenizerFast
        except ImportError:
            raise MissingExtra("transformers", "local") from None
        # AutoTokenizer takes a class by the type of the model, which may replace what tokenizer.json says of
        # how a text is composed and split by what the first models of that type did.
        loader: Any = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
        return loader.from_pretrained(folder, local_files_only=True)

    def runners(self, name: str) -> list[Runner]:
        """Return the loaded weights of a model, or of both models of a pair: [small, large].

        Raises:
            MissingExtra: torch is not installed.
            WeightsError: weights are missing.
            InputError: the device that an entry names is not there.
        """
        spec = self.catalogue[name]
        if spec.kind != "pair":
            return [self.runner(name)]
        # The large one first: memory for texts is planned when the weights of both are loaded.
        return [self.runner(member, name) for member in reversed(spec.members)][::-1]

    def runner(self, name: str, pair: str | None = None) -> Runner:
        """As `runners`, of one model of kind local. pair: the one that it is used in.

        A model that runs alike alone and in pairs is loaded once.
        """
        with LOADING:
            try:
                from viaticum.decoders import load_runner
            except ImportError as error:
                raise MissingExtra(error.name or "torch", "local") from None
        spec, settings = self.catalogue[name], self.catalogue.local_settings(name, pair)
        with self.lock, LOADING:
            if (name, settings) not in self._runners:
                options = settings.over(LocalSettings(slots=self.slots)).given
                if not {"device", "dtype"} & options.keys() and options.get("engine", "auto") == "auto":
                    options["engine"] = measured_engine(spec, options["slots"]) or "auto"
                options["context"] = min(settings.context or spec.context_length, spec.context_length)
                self._runners[name, settings] = load_runner(
                    locate(spec),
                    max_slots=self.max_slots,
                    server=served_by(spec),
                    **options,
                )
            return self._runners[name, settings]


def served_by(spec: ModelSpec) -> Server | None:
    """Return where a model is served; None for one that runs here.

    Raises:
        AuthenticationFailed: the variable that holds the server's key is empty.
    """
    from viaticum.decoders import Server

    if spec.api_base is None:
        return None
    given: dict[str, Any] = {
        "timeout": spec.timeout_seconds,
        "retries": spec.max_retries,
        "top": spec.top_logprobs,
    }
    return Server(
        spec.api_base,
        spec.served_model,
        api_key(spec),
        **{name: value for name, value in given.items() if value is not None},
    )


class TemplateRefusal(Exception):
    """A chat template raised an error about the messages."""


class LocalModel(Model):
    """One local model, or a small/large pair in which a token router chooses the model of each token."""

    def __init__(self, pool: LocalModels, spec: ModelSpec, folder: Path) -> None:
        self.pool, self.spec = pool, spec
        self.name, self.members = spec.name, spec.members
        self.thinking = pool.catalogue.thinking_format(spec.name)
        self._folder = folder
        self._template = pool.catalogue[self.members[-1]].chat_template
        self._loaded: MixedDecoder | None = None

    @property
    def tokenizer(self) -> Any:
        return self.pool.tokenizer(self._folder)

    def prompt(self, messages: Sequence[Message], generation: Generation = PLAIN) -> list[int]:
        """Return a chat's token ids by the model's chat template, up to where the answer begins.

        Args:
            generation: its chat_template_kwargs and reasoning_effort are variables of the template.

        A template that refuses a system turn (Gemma, early Mistral) gets its text in the first user turn.

        Raises:
            InputError: the template refuses the messages.
        """
        try:
            ids = self._render(messages, generation)
        except TemplateRefusal as error:
            folded = fold_system(messages)
            if len(folded) == len(messages):
                raise InputError(f"{self.name} cannot read these messages: {error}") from None
            try:
                ids = self._render(folded, generation)
            except TemplateRefusal:
                raise InputError(f"{self.name} cannot read these messages: {error}") from None
        return ids + opening_ids(self.thinking, self._inside_thought(ids), self._encode)

    def _render(self, messages: Sequence[Message], generation: Generation) -> list[int]:
        """Raises `TemplateRefusal` where the template raises an error. The template writes its own BOS."""
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=True,
                return_dict=False,
                chat_template=self._template,
                **template_variables(generation),
            )
        except Exception as error:
            if not type(error).__module__.startswith("jinja2"):
                raise
            line = getattr(error, "lineno", None)
            raise TemplateRefusal(
                f"line {line} of its chat template: {error}" if line else str(error)
            ) from None
        return ids

    def _inside_thought(self, prompt: Sequence[int]) -> bool | None:
        return self.thinking.inside_after(self.tokenizer.decode(list(prompt[-PROMPT_END:])))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def worst_case(self, messages: Sequence[Message], max_new_tokens: int) -> dict[str, TokenCount]:
        return self.worst_case_of(messages, Generation(max_new_tokens))

    def worst_case_of(self, messages: Sequence[Message], generation: Generation) -> dict[str, TokenCount]:
        prompt, max_new_tokens = len(self.prompt(messages, generation)), generation.max_new_tokens
        if prompt + max_new_tokens > self.spec.usable_context:
            raise PromptTooLong(
                f"a prompt of {prompt} tokens and {max_new_tokens} new ones do not fit the context of "
                f"{self.name} ({self.spec.usable_context}); shorten the question or lower max_new_tokens"
            )
        # Both models of a pair read the prompt. Which of them makes a token is not known beforehand: the
        # large one, never the cheaper, is assumed to make them all.
        worst = dict.fromkeys(self.members, TokenCount(prompt, 0))
        worst[self.members[-1]] = TokenCount(prompt, max_new_tokens)
        return worst

    def count(self, text: str) -> int:
        return len(self._encode(text))

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[StreamPiece]:
        """As `Model.stream`. Yields empty pieces while it waits, so that a caller can close between them."""
        for _, event in self._generate([self._request(messages, generation)]):
            if event is None:
                yield ""
                continue
            if event.thinking:
                yield ThinkingDelta(event.thinking)
            if event.text:
                yield event.text
            if event.result is not None:
                yield self._completion(event.result)

    def generate_all(
        self, chats: Sequence[Sequence[Message]], generation: Generation
    ) -> Iterator[tuple[int, Completion]]:
        """Answer many chats at once, as slots allow; yield (index in `chats`, completion) as each ends.

        Raises:
            ModelError: the first failure of a chat, after all other completions were yielded.
        """
        failure: ModelError | None = None
        for index, event in self._generate([self._request(messages, generation) for messages in chats]):
            if event is None or event.result is None:
                continue
            if event.result.error is not None:
                failure = failure or event.result.error
            else:
                yield index, self._completion(event.result)
        if failure is not None:
            raise failure

    def _generate(self, requests: list[Request]) -> Iterator[tuple[int, Event | None]]:
        yield from self.pool.scheduler.generate(self._decoder(), requests)

    def _request(self, messages: Sequence[Message], generation: Generation) -> Request:
        with LOADING:
            from viaticum.decoders import Request, Sampling

        logprobs = dict(generation.extra)
        wanted, top = logprobs.pop("logprobs", False), logprobs.pop("top_logprobs", None)
        if unknown := [*logprobs, *generation.extra_body]:
            raise InputError(f"{self.name} runs locally and cannot do: {', '.join(unknown)}")
        prompt = self.prompt(messages, generation)
        inside = self._inside_thought(prompt)
        return Request(
            prompt=prompt,
            max_new_tokens=generation.max_new_tokens,
            sampling=Sampling(
                generation.temperature,
                generation.top_p,
                generation.top_k,
                generation.seed,
                generation.min_p,
                generation.frequency_penalty,
                generation.presence_penalty,
                generation.repetition_penalty,
                tuple(generation.logit_bias.items()),
            ),
            stop=generation.stop,
            thinking=self.thinking,
            inside_thought=inside,
            thinking_limit=thinking_limit(self.thinking, generation, inside, self._encode),
            logprobs=(top or 0) if wanted else None,
        )

    def _completion(self, result: Result) -> Completion:
        completion = completion_of(result)
        return replace(completion, logprobs=openai_logprobs(result, self.tokenizer))

    def _decoder(self) -> MixedDecoder:
        """The decoder of the model, made when first needed. That of a pair may choose its own mode."""
        from viaticum.decoders import MixedDecoder

        with self.pool.lock:
            if self._loaded is not None:
                return self._loaded
            runners = self.pool.runners(self.name)
            pair = len(runners) == 2
            router = token_router(self.spec, self.pool.catalogue, runners[0]) if pair else None
            modes = None
            if router is not None and (self.pool.mode or self.spec.mode or "auto") == "auto":
                modes = mode_chooser(self.spec, self.pool.catalogue, runners, router)
            self._loaded = MixedDecoder(
                runners[-1],
                runners[0] if pair else None,
                tokenizer=self.tokenizer,
                router=router,
                stop_ids=stop_ids(runners, self.tokenizer),
                names=(self.members[0], self.members[-1]),
                modes=modes,
            )
            return self._loaded


def template_variables(generation: Generation) -> dict[str, Any]:
    """Return the variables of the chat template: those that are set, the effort, and whether to think."""
    variables: dict[str, Any] = {}
    if generation.thinking_budget == 0:
        variables["enable_thinking"] = False
    if generation.reasoning_effort is not None:
        variables["reasoning_effort"] = generation.reasoning_effort
    return variables | dict(generation.chat_template_kwargs)


def check_context(
    question: str, prompt: Sequence[int], max_new_tokens: int, members: Iterable[ModelSpec]
) -> None:
    """Raise `PromptTooLong` with a question's id unless prompt and new tokens fit every member."""
    for spec in members:
        if len(prompt) + max_new_tokens > spec.usable_context:
            raise PromptTooLong(
                f"question {question!r}: a prompt of {len(prompt)} tokens and {max_new_tokens} new ones do "
                f"not fit the context of {spec.name} ({spec.usable_context}); shorten the question or leave "
                "it out"
            )


def stop_ids(runners: Iterable[Runner], tokenizer: Any) -> list[int]:
    """Return the sorted token ids that end a text, by the tokenizer and by the settings of every model."""
    own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    return sorted({*own, *(token for runner in runners for token in runner.stop_ids)})


def completion_of(result: Result) -> Completion:
    """Return a decoder's result as a completion; raise the error of a text that failed."""
    if result.error is not None:
        raise result.error  # a failed call is no completion: nothing is charged for it
    usage = Usage(result.usage, result.seconds)
    return Completion(result.text, usage, result.finish_reason, result.trace, thinking=result.thinking)
