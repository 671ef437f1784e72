"""Local models and pairs behind the `Model` contract. Every set of weights is loaded once and shared.

Calls of many threads are batched, as slots allow (`viaticum.models.batching`). Needs the `local` extra.
Leaves out strategies and prices.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import InputError, MissingExtra, ModelError, PromptTooLong
from viaticum.heavy import LOADING, imported
from viaticum.local_settings import LocalSettings
from viaticum.models.api_keys import api_key
from viaticum.models.base import Generation, Model, StreamPiece
from viaticum.models.batching import BatchScheduler
from viaticum.models.budget_forcing import thinking_limit
from viaticum.models.decoding_modes import mode_chooser
from viaticum.models.engine_choice import measured_engine
from viaticum.models.loading import loading_told
from viaticum.models.logprobs import openai_logprobs
from viaticum.models.prompts import PromptRenderer
from viaticum.models.templates import has_template, have_same_prompts, require_template
from viaticum.models.token_routers import SPECULATIVE, token_router
from viaticum.types import Completion, Message, ThinkingDelta, TokenCount, Usage
from viaticum.vocabulary import check_same_vocabulary, configured_stop_ids, logits_rows
from viaticum.weights import locate

if TYPE_CHECKING:
    from viaticum.decoders import Event, MixedDecoder, Request, Result, Runner, Server
    from viaticum.decoders.loaded_model import LoadedModel
    from viaticum.decoders.vocabulary import SharedVocabulary

PLAIN = Generation()


class LocalModels:
    """The local models of a catalogue, loaded on first use.

    Args:
        catalogue: its entries say where and how each model runs (`Catalogue.local_settings`).
        slots: texts that are written at once by a model whose entry does not say; "auto" for as many as the
            free memory holds, at most `max_slots` (`decoders.memory.MAX_SLOTS` where None).
        streams: texts at once for which the engine "auto" is chosen; None for as many as there are slots.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        slots: int | Literal["auto"] = 1,
        max_slots: int | None = None,
        streams: int | None = None,
    ) -> None:
        self.catalogue = catalogue
        self.slots, self.max_slots, self.streams = slots, max_slots, streams
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
        unshared = check_same_vocabulary(*folders) if len(folders) == 2 else frozenset()
        require_template(self.catalogue[spec.members[-1]], folders[-1])
        return LocalModel(self, spec, folders, unshared)

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
        automatic, plain = imported("transformers", "local", _tokenizer_classes)
        # AutoTokenizer takes a class by the type of the model, which may replace what tokenizer.json says of
        # how a text is composed and split by what the first models of that type did.
        loader = plain if (folder / "tokenizer.json").is_file() else automatic
        return loader.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,  # left open, transformers asks on the terminal
            # A space before a full stop was written by the model, and a text is decoded in pieces.
            clean_up_tokenization_spaces=False,
        )

    def runners(self, name: str) -> list[Runner]:
        """Return the loaded weights of a model, or of both models of a pair: [small, large].

        Raises:
            MissingExtra: torch is not installed.
            WeightsError: weights are missing.
            InputError: the device that an entry names is not there.
        """
        spec = self.catalogue[name]
        return self._runners_of([(member, name if spec.kind == "pair" else None) for member in spec.members])

    def runner(self, name: str, pair: str | None = None) -> Runner:
        """As `runners`, of one model of kind local. pair: the one that it is used in.

        A model that runs alike alone and in pairs is loaded once.
        """
        return self._runners_of([(name, pair)])[0]

    def _runners_of(self, members: Sequence[tuple[str, str | None]]) -> list[Runner]:
        """The runners of (model, pair); the weights of all are loaded before memory for texts is planned."""
        with LOADING:
            try:
                from viaticum.decoders import make_runners
            except ImportError as error:
                raise MissingExtra(error.name or "torch", "local") from None
        keys = [(name, self.catalogue.local_settings(name, pair)) for name, pair in members]
        with self.lock, LOADING:
            missing = [key for key in keys if key not in self._runners]
            loaded = make_runners(*(self._load(*key) for key in missing)) if missing else []
            self._runners |= dict(zip(missing, loaded, strict=True))
            return [self._runners[key] for key in keys]

    def _load(self, name: str, settings: LocalSettings) -> LoadedModel:
        from viaticum.decoders import load_weights

        spec = self.catalogue[name]
        options = settings.over(LocalSettings(slots=self.slots)).given
        if not {"device", "dtype"} & options.keys() and options.get("engine", "auto") == "auto":
            options["engine"] = measured_engine(spec, self.streams or options["slots"]) or "auto"
        options["context"] = min(settings.context or spec.context_length, spec.context_length)
        if self.max_slots is not None:
            options["max_slots"] = self.max_slots
        weights = locate(spec)
        with loading_told(name, weights):
            return load_weights(weights, server=served_by(spec), **options)


def _tokenizer_classes() -> tuple[Any, Any]:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    return AutoTokenizer, PreTrainedTokenizerFast


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


class LocalModel(Model):
    """One local model, or a small/large pair in which a token router chooses the model of each token.

    Args:
        pool: holds the weights.
        spec: its entry.
        folders: weights of its members.
        unshared: token ids that do not mean the same to both models of a pair.
    """

    runs_here = True

    def __init__(
        self,
        pool: LocalModels,
        spec: ModelSpec,
        folders: Sequence[Path],
        unshared: frozenset[int] = frozenset(),
    ) -> None:
        self.pool, self.spec = pool, spec
        self.name, self.members = spec.name, spec.members
        self.thinking = pool.catalogue.thinking_format(spec.name)
        self._folders, self._unshared = folders, unshared
        self._loaded: MixedDecoder | None = None

    @property
    def tokenizer(self) -> Any:
        return self.pool.tokenizer(self._folders[-1])

    def prompt(self, messages: Sequence[Message], generation: Generation = PLAIN) -> list[int]:
        """Return a chat's token ids by the model's chat template, of a pair by that of the large one.

        Args:
            generation: its chat_template_kwargs and reasoning_effort are variables of the template.

        Raises:
            InputError: the template refuses the messages.
        """
        return self._renderer.prompt(messages, generation)

    def small_prompt(
        self, messages: Sequence[Message], generation: Generation = PLAIN, prompt: Sequence[int] = ()
    ) -> list[int] | None:
        """Return what the small model of a pair reads in place of `prompt`; None where it reads the same.

        prompt: what `prompt` returned for the same chat; it is rendered here if it is not given.

        Raises:
            InputError: its template refuses the messages.
        """
        if self._small_renderer is None:
            return None
        prompt = prompt or self.prompt(messages, generation)
        inside = self._renderer.inside_thought(prompt, messages)
        own = self._small_renderer.prompt_as(messages, generation, inside)
        return None if own == prompt else own

    @cached_property
    def _renderer(self) -> PromptRenderer:
        template = self.pool.catalogue[self.members[-1]].chat_template
        return PromptRenderer(self.name, self.tokenizer, template, self.thinking)

    @cached_property
    def _small_renderer(self) -> PromptRenderer | None:
        """Of the small model of a pair, if it may read chats by another template."""
        small, large = (self.pool.catalogue[name] for name in (self.members[0], self.members[-1]))
        folder = self._folders[0]
        if not has_template(small, folder) or have_same_prompts(small, folder, large, self._folders[-1]):
            return None
        tokenizer = self.pool.tokenizer(folder)
        return PromptRenderer(small.name, tokenizer, small.chat_template, self.thinking)

    def stop_ids(self, runners: Iterable[Runner] = ()) -> list[int]:
        """Return the sorted token ids that end a text, by the tokenizer and by the settings of every model.

        runners: those that are loaded; a model that is not is known by its files.
        """
        configured = (token for folder in self._folders for token in configured_stop_ids(folder))
        return sorted({*stop_ids(runners, self.tokenizer), *configured})

    def vocabulary(self, runners: Iterable[Runner]) -> SharedVocabulary:
        """Return the tokens that may be written, those that the models and the tokenizer share.

        runners: as in `stop_ids`.
        """
        with LOADING:
            from viaticum.decoders.vocabulary import SharedVocabulary

        runners = list(runners)
        known = [rows for folder in self._folders if (rows := logits_rows(folder)) is not None]
        rows = min([*known, *(runner.vocabulary for runner in runners)])
        return SharedVocabulary.of(rows, self._token_ids, self.stop_ids(runners))

    @cached_property
    def _token_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.get_vocab().values()) - self._unshared

    def worst_case(self, messages: Sequence[Message], max_new_tokens: int) -> dict[str, TokenCount]:
        return self.worst_case_of(messages, Generation(max_new_tokens))

    def worst_case_of(self, messages: Sequence[Message], generation: Generation) -> dict[str, TokenCount]:
        prompt = self.prompt(messages, generation)
        own = self.small_prompt(messages, generation, prompt)
        lengths = [len(prompt if own is None else own), len(prompt)]
        longest, max_new_tokens = max(lengths), generation.max_new_tokens
        if longest + max_new_tokens > self.spec.usable_context:
            raise PromptTooLong(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the context of "
                f"{self.name} ({self.spec.usable_context}); shorten the question or lower max_new_tokens"
            )
        # Both models of a pair read the prompt. Which of them makes a token is not known beforehand: the
        # large one, never the cheaper, is assumed to make them all.
        worst = {self.members[0]: TokenCount(lengths[0], 0)}
        worst[self.members[-1]] = TokenCount(lengths[1], max_new_tokens)
        return worst

    def prompt_tokens(self, messages: Sequence[Message], generation: Generation) -> int:
        return len(self.prompt(messages, generation))

    def count(self, text: str) -> int:
        return len(self._renderer.encode(text))

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
        inside = self._renderer.inside_thought(prompt, messages)
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
            thinking_limit=thinking_limit(self.thinking, generation, inside, self._renderer.encode),
            logprobs=(top or 0) if wanted else None,
            small_prompt=self.small_prompt(messages, generation, prompt),
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
            modes, drafts = None, self.spec.router == SPECULATIVE
            if router is not None and not drafts and self.spec.mode != "routed":
                modes = mode_chooser(self.spec, self.pool.catalogue, runners, router)
            self._loaded = MixedDecoder(
                runners[-1],
                runners[0] if pair else None,
                tokenizer=self.tokenizer,
                router=router,
                draft=None if drafts else 0,
                stop_ids=self.stop_ids(runners),
                names=(self.members[0], self.members[-1]),
                modes=modes,
                shared_vocabulary=self.vocabulary(runners),
            )
            return self._loaded


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
    return Completion(
        result.text,
        usage,
        result.finish_reason,
        result.trace,
        thinking=result.thinking,
        stop_string=result.stop_string,
    )
