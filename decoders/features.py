"""What a token router would have been shown at every place of a text that is there already.

One pass of the small model over prompt and text, teacher-forced, through the runner that serves: same dtype, same
cache, same attention. What differs from serving is how many tokens a call reads: a decoding call reads one a row (two
after the large model wrote), here `step_tokens` of one row. Linear layers pick their kernel by that number (see
`decoders.linear`), so up to four tokens go through the kernels of up to four streams; sums of products are
added up in another order, which in bfloat16 moves the last digits. Knows nothing of labels or who wrote the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from viaticum.decoders.runner import Runner, RunnerOutput
from viaticum.errors import InputError, ModelError
from viaticum.routers.token.base import TOP, entropy, largest, likeliest, second_choice

STEP_TOKENS = 4  # on a CPU: the most rows that every low-bit kernel takes


@dataclass(frozen=True, slots=True)
class Features:
    """Row i is the place of the text's token i, before that token was read.

    tokens: what the model would write there, greedy, and second: the most likely token beside it, int64 [N]; top: its largest logits, sorted downwards
    [N, count]; hidden: the last hidden states [N, D]; both in the model's dtype, in which they are exact. entropy:
    normalised, float32 [N]. All on the host.
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
) -> Features:
    """Features of every token of `text` after `prompt`; the slot then holds both.

    What any slot holds of the prompt is not read again. Raises `InputError` for an empty text and `ModelError` where
    logits or hidden states are not finite.
    """
    if not text or not prompt:
        raise InputError("features are those of a text after a prompt; one of them is empty")
    if step_tokens < 1:
        raise InputError(f"step_tokens must be 1 or more, got {step_tokens}")
    runner.start(slot, prompt)
    parts = [_read(runner, slot, prompt[len(runner.held[slot]) :], 1, count)]
    for begin in range(0, len(text) - 1, step_tokens):
        new = text[begin : min(begin + step_tokens, len(text) - 1)]
        parts.append(_read(runner, slot, new, len(new), count))
    return Features(*(torch.cat([getattr(part, name) for part in parts]) for name in Features.__slots__))


def _read(runner: Runner, slot: int, new: Sequence[int], keep: int, count: int) -> Features:
    heads: RunnerOutput = runner.read([slot], [list(new)], [keep], hidden=True)
    assert heads.hidden is not None
    if not bool(heads.finite.all() & torch.isfinite(heads.hidden).all()):
        runner.discard(slot)
        raise ModelError(
            "logits or hidden states are not finite; the model's weights or the text are damaged"
        )
    dtype = heads.hidden.dtype
    tokens = likeliest(heads.logits)
    top, best = largest(heads.logits, max(count, 2))
    return Features(
        tokens=tokens.cpu(),
        second=second_choice(best, tokens).cpu(),
        top=top[:, :count].to(dtype).cpu(),
        hidden=heads.hidden.cpu(),
        entropy=entropy(heads.logits).cpu(),
    )
