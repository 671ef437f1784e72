"""Pairs whose models have different rows of logits over one tokenizer, and what they write without a cache.

The small model has 97 rows, the large one 112, and the tokenizer fewer ids than either, with a hole among
them. The rows that no token has are often the most likely ones, those of the large model alone nearly always,
so that a decoder that looks at them writes one soon.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import SIZES
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from viaticum.decoders import Request, Result
from viaticum.decoders.sampling import PROPOSE, REDRAW, distributions, uniform
from viaticum.routers.token import entropy

SMALL_ROWS, LARGE_ROWS = 97, 112
HOLE = 50  # an id between others that the tokenizer lacks
TOKENS = 95  # the tokenizer's ids are 0 to 94, without the hole
CLOSE = 1e-3  # nearer than this, a comparison may go either way in another order of sums


class HoledLetters:
    """Token i is the i-th letter of a small alphabet that lacks one in its middle."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(0x41 + token) for token in token_ids)

    def get_vocab(self) -> dict[str, int]:
        return {chr(0x41 + token): token for token in range(TOKENS) if token != HOLE}


def padded_model(seed: int, rows: int, tokens: Sequence[int] | None = None, **sizes: Any) -> PreTrainedModel:
    """A tiny Qwen2 whose rows of logits without a token are often the largest.

    Args:
        seed: of the weights; models of any rows with seeds that differ by 100 agree on most tokens.
        rows: of logits and embeddings.
        tokens: ids of the tokenizer; None: those of `HoledLetters`.
        sizes: other settings of the configuration.
    """
    real = set(HoledLetters().get_vocab().values() if tokens is None else tokens)
    config = Qwen2Config(**{**SIZES, **sizes, "vocab_size": LARGE_ROWS})
    with torch.random.fork_rng():
        torch.manual_seed(seed % 100)
        model: Any = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        )
        torch.manual_seed(seed)
        with torch.no_grad():
            if seed >= 100:
                for weight in model.parameters():
                    weight += 0.015 * torch.randn_like(weight)
            direction = torch.randn(config.hidden_size)
            for number, row in enumerate(sorted(set(range(LARGE_ROWS)) - real)):
                # One of two opposite directions has a large product with any state. Rows that both models
                # have count for the entropy, which should not be that of padding alone.
                size = 20 if row >= SMALL_ROWS else 0.8
                model.lm_head.weight[row] = (size if number % 2 else -size) * direction
    model.resize_token_embeddings(rows)
    return model.eval()


@dataclass(frozen=True)
class PlainPair:
    """Both models without any cache, and how they write a text with R-Stitch's rule or without a router.

    Args:
        small, large: models of transformers' own attention.
        tokens: ids that may be written.
    """

    small: PreTrainedModel
    large: PreTrainedModel
    tokens: frozenset[int]

    @torch.inference_mode()
    def logits(self, model: PreTrainedModel, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
        """Logits before each output token, [N, SMALL_ROWS]."""
        ids = torch.tensor([[*prompt, *output[:-1]]])
        return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :, :SMALL_ROWS].float()

    def check(self, request: Request, result: Result, tau: float | None) -> bool:
        """Assert that a text is what the pair writes; False if a close decision ended the comparison early.

        tau: threshold of R-Stitch; None: the large model writes everything.
        """
        trace, sampling = result.trace, request.sampling
        assert set(trace.tokens) <= self.tokens
        prompts = (request.prompt if request.small_prompt is None else request.small_prompt, request.prompt)
        both = [
            self.logits(model, prompt, trace.tokens)
            for model, prompt in zip((self.small, self.large), prompts, strict=True)
        ]
        entropies = [entropy(each) for each in both]
        active, dropped = (1 if tau is None else 0), False
        for position, token in enumerate(trace.tokens):
            unsure = float(entropies[0][position])
            if active == 0 and tau is not None:
                if abs(unsure - tau) < CLOSE:
                    return False
                dropped = unsure > tau
                active = int(dropped)
            assert trace.made_by[position] == active, position
            logits, measured = both[active][position], float(entropies[active][position])
            assert abs(trace.entropies[position] - measured) < CLOSE, (
                trace.entropies[position],
                measured,
                active,
            )
            seed = uniform(sampling.seed, position, REDRAW if dropped else PROPOSE)
            if not self._may_choose(logits, token, request, seed):
                raise AssertionError(f"token {token} at {position}, made by {active}")
            if active == 1 and tau is not None:
                if abs(measured - tau) < CLOSE:
                    return False
                active = int(measured > tau)
            dropped = False
        return True

    def _may_choose(self, logits: Tensor, token: int, request: Request, number: float) -> bool:
        """Whether a token is the most likely one, or is drawn by the number, up to rounding."""
        banned = [each for each in range(len(logits)) if each not in self.tokens]
        allowed = logits.clone()
        allowed[banned] = float("-inf")
        if request.sampling.temperature == 0:
            return bool(allowed[token] > allowed.max() - CLOSE)
        sums = distributions(allowed[None], [request.sampling])[0].double().cumsum(0)
        below = float(sums[token - 1]) if token else 0.0
        return below - CLOSE <= number * float(sums[-1]) <= float(sums[token]) + CLOSE


# --- on disk ------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[reply]"
LETTERS = [chr(code) for code in range(33, 127) if chr(code) not in "`~^"]


def write_tokenizer(folder: Path, template: str = TEMPLATE) -> frozenset[int]:
    """Write a tokenizer of 94 ids below 97, with holes among them, and return its ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["\u0120", "\u010a", *LETTERS]  # space and newline first
    places = [place for place in range(SMALL_ROWS) if place not in (HOLE, 60)]
    vocabulary = dict(zip([*letters, "<|end|>"], places, strict=False))
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)
    fast.add_special_tokens({"eos_token": "<|end|>"})
    fast.save_pretrained(folder)
    return frozenset(fast.get_vocab().values())


def write_padded_pair(folder: Path, small_template: str = TEMPLATE) -> tuple[Path, frozenset[int]]:
    """Write a catalogue with `padded-small`, `padded-large` and their pair `padded`; return it, and the ids.

    Texts end by themselves, and the models differ at some tokens.
    """
    lines = []
    ids: frozenset[int] = frozenset()
    for name, rows, seed, template in (
        ("small", SMALL_ROWS, 103, small_template),
        ("large", LARGE_ROWS, 3, TEMPLATE),
    ):
        ids = write_tokenizer(folder / name, template)
        config = json.loads((folder / name / "tokenizer_config.json").read_text())
        end = max(ids)
        assert config["eos_token"] == "<|end|>"
        model: Any = padded_model(seed, rows, sorted(ids), max_position_embeddings=8192, eos_token_id=end)
        with torch.no_grad():
            model.lm_head.weight[end] *= 1.4
        model.save_pretrained(folder / name)
        lines.append(
            f'[models.padded-{name}]\ndescription = "random"\nkind = "local"\ncontext_length = 8192\n'
            f"input_price = 0.1\noutput_price = 0.2\n"
            f'[[models.padded-{name}.sources]]\ntype = "path"\npath = "{folder / name}"\n'
        )
    lines.append(
        '[models.padded]\ndescription = "both"\nkind = "pair"\nsmall = "padded-small"\n'
        'large = "padded-large"\nrouter = "r-stitch"\ntau = 0.5\nmode = "routed"\n'
    )
    file = folder / "catalogue.toml"
    file.write_text("\n".join(lines))
    return file, ids
