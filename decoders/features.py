"""Offline features of an existing text: what a token router would have seen at every position.

One teacher-forced pass of the small model over prompt and text through the runner that serves: same dtype,
cache and attention. What differs from serving is the number of tokens a call: a decode step reads one a row
(two after the large model was active), here `step_tokens` of one row. Linear layers choose their kernel by
that number (`decoders.linear`), so that up to four tokens use the kernels of up to four streams; products are
summed in another order, which changes the last digits in bfloat16. Leaves out labels, and which model made
the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from viaticum.decoders.runner import Runner
from viaticum.decoders.vocabulary import SharedVocabulary
from viaticum.errors import InputError, ModelError
from viaticum.routers.token.base import TOP, argmax_token, entropy, second_choice, top_tokens

STEP_TOKENS = 4  # on a CPU the maximum rows of every low-bit kernel


@dataclass(frozen=True, slots=True)
class Features:
    """Features of N positions on the host; row i is position i of the text, before its token was read.

    Args:
        tokens: the model's argmax, int64 [N].
        second: the most likely token other than that, int64 [N].
        top: largest logits, descending, [N, count] in the model's dtype, in which they are exact.
        hidden: last hidden states [N, D] in the model's dtype.
        entropy: normalised, float32 [N].
    """

    tokens: Tensor
    second: Tensor
    top: Tensor
    hidden: Tensor
    entropy: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


@torch.inference_mode()
def read_features(
    runner: Runner,
    prompt: Sequence[int],
    text: Sequence[int],
    *,
    step_tokens: int = STEP_TOKENS,
    count: int = TOP,
    slot: int = 0,
    vocabulary: SharedVocabulary | None = None,
) -> Features:
    """Features of every token of `text` after `prompt`; the slot then holds both but the last token.

    A cached prefix of the prompt in any slot is reused.

    Args:
        runner: of the small model.
        prompt: token ids.
        text: token ids.
        step_tokens: tokens of the text a call.
        count: largest logits to keep.
        slot: of the runner to use.
        vocabulary: of the pair, see `DecoderConfig.vocabulary`; None: all rows of the model.

    Raises:
        InputError: an empty prompt or text, or `step_tokens` below 1.
        ModelError: logits or hidden states are not finite.
    """
    if not text or not prompt:
        raise InputError("features are those of a text after a prompt; one of them is empty")
    if step_tokens < 1:
        raise InputError(f"step_tokens must be 1 or more, got {step_tokens}")
    vocabulary = vocabulary or SharedVocabulary.of(runner.vocabulary)
    runner.reuse_prefix(slot, prompt)
    parts = [_read(runner, slot, prompt[len(runner.cached_tokens[slot]) :], 1, count, vocabulary)]
    for begin in range(0, len(text) - 1, step_tokens):
        new = text[begin : min(begin + step_tokens, len(text) - 1)]
        parts.append(_read(runner, slot, new, len(new), count, vocabulary))
    return Features(*(torch.cat([getattr(part, name) for part in parts]) for name in Features.__slots__))


def _read(
    runner: Runner, slot: int, new: Sequence[int], keep: int, count: int, vocabulary: SharedVocabulary
) -> Features:
    output = runner.forward([slot], [list(new)], [keep], hidden=True, vocabulary=vocabulary)
    assert output.hidden is not None
    if not bool(output.finite.all() & torch.isfinite(output.hidden).all()):
        runner.discard(slot)
        raise ModelError(f"logits or hidden states are not finite; {runner.overflow_hint}")
    dtype = output.hidden.dtype
    tokens = argmax_token(vocabulary.candidates(output.logits))
    top, best = top_tokens(output.logits, max(count, 2))
    return Features(
        tokens=tokens.cpu(),
        second=second_choice(best, tokens).cpu(),
        top=top[:, :count].to(dtype).cpu(),
        hidden=output.hidden.cpu(),
        entropy=entropy(output.logits).cpu(),
    )
