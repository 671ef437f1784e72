"""Pairs of 97 and 112 rows of logits over one tokenizer, on every back end, against no cache at all.

500 random cases a back end, fewer over a server: the large model alone, with drafts, R-Stitch, R-Stitch with
drafts, and sampled; with one prompt for both models, or one for each.
"""

from __future__ import annotations

import copy
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from padded_pair import (
    CLOSE,
    HOLE,
    LARGE_ROWS,
    SMALL_ROWS,
    TOKENS,
    HoledLetters,
    PlainPair,
    padded_model,
)
from runner_backends import Backend, backend_params
from transformers import PreTrainedModel

from viaticum.decoders import MixedDecoder, Request, Sampling, graphs
from viaticum.decoders.vocabulary import SharedVocabulary
from viaticum.errors import InputError
from viaticum.routers.token import AlwaysSmall, EntropyRouter, TokenRouter

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.parametrize("backend", backend_params()),
]
IDS = frozenset(HoledLetters().get_vocab().values())


@pytest.fixture(autouse=True)
def short_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "FIRST_KEYS", 8)


@cache
def plain() -> PlainPair:
    return PlainPair(padded_model(101, SMALL_ROWS), padded_model(1, LARGE_ROWS), IDS)


class Pair:
    """Both models in one back end; decoders of any mode share them."""

    def __init__(
        self, backend: Backend, folder: Path, slots: int = 4, large: PreTrainedModel | None = None
    ) -> None:
        for name in ("small", "large"):
            (folder / name).mkdir()
        self.small = backend.make(padded_model(101, SMALL_ROWS), folder / "small", slots, 200)
        self.large = backend.make(large or padded_model(1, LARGE_ROWS), folder / "large", slots, 200)

    def decoder(
        self, router: TokenRouter | None, draft: int | None = 0, *, both: bool = True
    ) -> MixedDecoder:
        return MixedDecoder(
            self.large,
            self.small if both else None,
            tokenizer=HoledLetters(),
            router=router,
            draft=draft,
            shared_vocabulary=SharedVocabulary.of(SMALL_ROWS, IDS),
        )

    def close(self) -> None:
        for runner in (self.small, self.large):
            getattr(runner, "close", lambda: None)()


def a_text(rng: random.Random, longest: int = 12) -> list[int]:
    return [rng.choice(sorted(IDS)) for _ in range(rng.randrange(1, longest + 1))]


def a_request(rng: random.Random, *, sampled: bool) -> Request:
    sampling = Sampling(
        rng.choice([0.5, 1.0, 2.0]), rng.choice([1.0, 0.9]), rng.choice([0, 0, 7, 500]), rng.randrange(1000)
    )
    small_prompt = rng.choice([None, None, a_text(rng, 20)])
    # Of a template that the small model does not know.
    special = [] if small_prompt is None else [rng.randrange(SMALL_ROWS, LARGE_ROWS)]
    return Request(
        a_text(rng) + special,
        max_new_tokens=rng.randrange(1, 14),
        sampling=sampling if sampled else Sampling(),
        small_prompt=small_prompt,
    )


MODES: dict[str, tuple[float | None, int | None, bool]] = {
    "large": (None, 0, False),
    "large-sampled": (None, 0, True),
    "speculative": (None, 3, False),
    "r-stitch": (0.7, 0, False),
    "r-stitch-sampled": (0.7, 0, True),
    "r-stitch-drafts": (0.7, None, False),
}


@pytest.mark.parametrize("mode", MODES)
def test_what_a_pair_writes_equals_decoding_without_a_cache(
    backend: Backend, mode: str, tmp_path: Path
) -> None:
    """84 cases a mode, 504 a back end; 21 and 126 where every call goes through a server."""
    rng = random.Random(mode)
    tau, draft, sampled = MODES[mode]
    pair = Pair(backend, tmp_path)
    router = None if tau is None else EntropyRouter(tau)
    decoder = pair.decoder(router, draft, both=tau is not None or draft != 0)
    count = 21 if backend.normalised else 84
    requests = [a_request(rng, sampled=sampled) for _ in range(count)]
    complete = 0
    for request, result in zip(requests, decoder.generate_all(requests), strict=True):
        assert result.finish_reason in ("length", "loop")
        complete += plain().check(request, result, tau)
        for name, prompt in (("large", request.prompt), ("small", request.small_prompt or request.prompt)):
            if name in result.usage:
                assert result.usage[name].input_tokens == len(prompt)
    assert complete > 0.8 * count, "few comparisons end early"
    pair.close()


@pytest.mark.parametrize("draft", [0, 2, None])
def test_sampled_texts_of_any_mode_have_tokens_of_the_tokenizer_only(
    backend: Backend, draft: int | None, tmp_path: Path
) -> None:
    rng = random.Random(0)
    pair = Pair(backend, tmp_path)
    for router in (None, EntropyRouter(0.7), AlwaysSmall()):
        requests = [a_request(rng, sampled=True) for _ in range(20)]
        for result in pair.decoder(router, draft).generate_all(requests):
            assert result.error is None
            assert set(result.trace.tokens) <= IDS
    pair.close()


@pytest.mark.parametrize("draft", [0, 3])
def test_a_text_ends_by_a_token_that_only_the_large_model_has(
    backend: Backend, draft: int, tmp_path: Path
) -> None:
    """As a chat model beside its base model: where it would end it alone, by the end that both have."""
    ends, own_ends, rng = [TOKENS - 1], [SMALL_ROWS, SMALL_ROWS + 1], random.Random(0)
    plain_large = padded_model(1, LARGE_ROWS)
    with torch.no_grad():
        plain_large.lm_head.weight[own_ends] *= 0.05
    pair = Pair(backend, tmp_path, large=copy.deepcopy(plain_large))
    decoder = MixedDecoder(
        pair.large, pair.small, tokenizer=HoledLetters(), draft=draft, stop_ids=[*ends, *own_ends]
    )
    assert decoder.config.vocabulary.own_ends == (*own_ends,)
    requests = [Request(a_text(rng), max_new_tokens=12) for _ in range(12 if backend.normalised else 30)]
    lengths = set()
    for request, result in zip(requests, decoder.generate_all(requests), strict=True):
        tokens = list(request.prompt)
        for token in result.trace.tokens:
            with torch.inference_mode():
                logits = plain_large(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
            best = sorted([*IDS, *own_ends], key=lambda each: -float(logits[each]))
            if float(logits[best[0]] - logits[best[1]]) < CLOSE:
                break
            assert token == (ends[0] if best[0] in own_ends else best[0])
            tokens.append(token)
        else:
            is_ended = result.trace.tokens[-1] in ends
            assert result.finish_reason == ("stop" if is_ended else "length")
            lengths.add(len(result.trace.tokens) if is_ended else 0)
    assert len(lengths) > 2, "some end early, some late, some not"
    pair.close()


def test_prompts_closing_tags_and_biases_beyond_the_vocabulary_are_refused(
    backend: Backend, tmp_path: Path
) -> None:
    pair = Pair(backend, tmp_path)
    decoder = MixedDecoder(
        pair.large, pair.small, tokenizer=HoledLetters(), router=EntropyRouter(0.7), draft=None
    )
    assert decoder.config.vocabulary == pair.decoder(None).config.vocabulary
    assert decoder.config.vocabulary.rows == SMALL_ROWS
    assert decoder.config.vocabulary.size == TOKENS
    assert HOLE not in decoder.config.vocabulary
    for request in (
        Request([1, SMALL_ROWS]),
        Request([1], small_prompt=[SMALL_ROWS]),
        Request([1], sampling=Sampling(logit_bias=((HOLE, 5.0),))),
        Request([1], sampling=Sampling(logit_bias=((TOKENS, 5.0),))),
    ):
        with pytest.raises(InputError, match="token"):
            decoder.check(request)
    decoder.check(Request([HOLE, TOKENS], 3))
    decoder.check(Request([1, SMALL_ROWS], 3, small_prompt=[1]))
    with pytest.raises(
        InputError, match=f"prompt of large has a token {LARGE_ROWS}; .* 0 to {LARGE_ROWS - 1}"
    ):
        decoder.check(Request([1, LARGE_ROWS], 3, small_prompt=[1]))
    alone = MixedDecoder(pair.large, tokenizer=HoledLetters())
    assert alone.config.vocabulary == SharedVocabulary.of(LARGE_ROWS, IDS)
    assert set(alone.generate(Request([1, 2, 3], 20)).trace.tokens) <= IDS
    pair.close()
