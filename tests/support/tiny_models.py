"""Tiny random models of several families, and what they write when nothing is cached.

Shared by the decoders' tests.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from viaticum.decoders import MixedDecoder, Request, Result, TorchRunner
from viaticum.routers.token import TokenRouter, entropy

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,  # the default would leave the logits nearly flat
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=7),
    "gemma2": Gemma2Config(
        **SIZES, head_dim=8, sliding_window=7, attn_logit_softcapping=2.0, final_logit_softcapping=5.0
    ),
}


class Letters:
    """Token i is the i-th letter of a small alphabet."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(0x41 + token) for token in token_ids)


NOISE = {
    "qwen2": 0.015,
    "qwen3": 0.05,
    "llama": 0.015,
    "mistral": 0.015,
    "gemma2": 0.1,
}  # Gemma's norms even it out
NEAR = 100  # model NEAR + n is model n, a little disturbed: the two agree on most tokens, not on all


def build(kind: str = "qwen2", seed: int = 0, attention: str = "eager") -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed % NEAR)
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(CONFIGS[kind]), attn_implementation=attention, dtype=torch.float32
        )
        if kind == "qwen3":  # the norms of heads would all be ones
            for layer in model.base_model.layers:
                for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                    nn.init.uniform_(norm.weight, 0.5, 2.0)
        if seed >= NEAR:
            with torch.no_grad():
                for weight in model.parameters():
                    weight += NOISE[kind] * torch.randn_like(weight)
    return model.eval()


@cache
def reference(kind: str, seed: int) -> PreTrainedModel:
    return build(kind, seed)


@torch.inference_mode()
def plain_logits(tokens: Sequence[int], kind: str = "qwen2", seed: int = 0) -> Tensor:
    """transformers' own attention, the whole sequence at once, no cache."""
    return (
        reference(kind, seed)(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0, -1].float()
    )


def plain_text(
    prompt: Sequence[int], large: Sequence[bool], kind: str = "qwen2", small: int = 0
) -> list[int]:
    """Greedy tokens, the whole sequence computed again for each by the model that writes it."""
    tokens = list(prompt)
    for is_large in large:
        tokens.append(int(plain_logits(tokens, kind, 1 if is_large else small).argmax()))
    return tokens[len(prompt) :]


def plain_stitch(
    prompt: Sequence[int], length: int, tau: float, kind: str = "qwen2", small: int = 0
) -> tuple[list[int], list[int]]:
    """R-Stitch as in its paper, greedy: the tokens, and which model (0 small, 1 large) made each."""
    tokens, made_by, active_model = list(prompt), [], 0
    while len(made_by) < length:
        logits = plain_logits(tokens, kind, 1 if active_model else small)
        sure = float(entropy(logits[None])) <= tau
        if active_model == 0 and not sure:
            active_model = 1
            continue
        tokens.append(int(logits.argmax()))
        made_by.append(active_model)
        active_model = 0 if sure else 1
    return tokens[len(prompt) :], made_by


def a_decoder(
    router: TokenRouter | None, slots: int = 1, context: int | None = None, stop_ids: Sequence[int] = ()
) -> MixedDecoder:
    return MixedDecoder(
        TorchRunner(build(seed=1), slots=slots, context=context),
        TorchRunner(build(seed=0), slots=slots, context=context),
        tokenizer=Letters(),
        router=router,
        stop_ids=stop_ids,
    )


def single(seed: int, slots: int = 1) -> MixedDecoder:
    return MixedDecoder(TorchRunner(build(seed=seed), slots=slots), tokenizer=Letters())


def a_prompt(rng: random.Random, longest: int = 12) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, longest + 1))]


def requests_of(seed: int, count: int, **values: int) -> list[Request]:
    rng = random.Random(seed)
    return [Request(a_prompt(rng), **{"max_new_tokens": 12, **values}) for _ in range(count)]


def tokens_of(results: Sequence[Result]) -> list[tuple[int, ...]]:
    return [result.trace.tokens for result in results]


def empty(decoder: MixedDecoder) -> bool:
    """Whether every slot is free again."""
    return all(sorted(each.free_slots) == list(range(each.slots)) for each in decoder.runners.values())
