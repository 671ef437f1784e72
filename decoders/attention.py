"""Grouped-query attention over cache slots, for any transformers model that takes a named attention.

Leaves out writing keys and values (the cache's work). Query heads that share a key/value head are laid out as extra
query rows, so keys and values are never repeated in memory: with 16 rows of 600 tokens that copy would cost more than
the attention itself.

Computed in one of two ways. The dynamic path has all new tokens of a call in one line and says in spans whose they
are (`attending`): each row is torch's fused attention over its own slot, read where it lies, masked only where it reads several
tokens. The static step (`decoders.graphs`) gives an additive mask: two matrix products with the mask and a softmax
between them, scores rounded to the model's dtype as transformers' eager attention does. With a mask the fused kernels of CUDA
give each key/value head of a row to one multiprocessor, which then walks over all keys alone; a product spreads the keys over the device.
Faster still would be a decoding kernel that splits the keys and reads no masked ones (FlashInfer, FlashAttention's
`flash_attn_with_kvcache`, FlexAttention with a block mask); all of them need more than torch's wheel, or a compiler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from viaticum.errors import ModelError

NAME = "viaticum_slots"
PADDED = 1.25  # rows are taken together on a CPU where the longest has at most so many keys for each of the shortest


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of a call that stand side by side and have equally many new tokens.

    tokens: where theirs are among the call's; slots: a slice where they are neighbours, which copies nothing, else int64 [R];
    positions: of their new tokens, int64 [R, T]; keys: those of the longest row. masks: made once a call.
    """

    tokens: slice
    slots: slice | Tensor
    positions: Tensor
    keys: int
    masks: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, groups: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores [R, 1, groups * T, keys], 0 or -inf; None where every key is seen."""
        rows, steps = self.positions.shape
        # One new token of one row sees every key of its slot.
        if rows == steps == 1 and (window is None or self.keys <= window):
            return None
        kind = (groups, window, dtype)
        if kind not in self.masks:
            keys = torch.arange(self.keys, device=self.positions.device)
            hidden = keys > self.positions[:, :, None]
            if window is not None:
                hidden |= keys <= self.positions[:, :, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
                hidden, float("-inf")
            )
            self.masks[kind] = mask[:, None].repeat(1, 1, groups, 1)
        return self.masks[kind]


def spans(
    slots: Sequence[int],
    starts: Sequence[int],
    lengths: Sequence[int],
    device: torch.device,
    *,
    gather: bool = False,
) -> list[Span]:
    """Rows that each read `lengths[i]` tokens behind the `starts[i]` that `slots[i]` holds, as their tokens follow one another.

    Neighbours of one length are taken together where they are in neighbouring slots, whose keys are read where they
    lie; with `gather`, for devices where starting a kernel costs more than a copy of the keys, whatever their slots.
    """
    groups: list[list[int]] = []
    for row, (slot, new) in enumerate(zip(slots, lengths, strict=True)):
        group = groups[-1] if groups else []
        joins = bool(group) and lengths[row - 1] == new
        if joins and not gather:
            most, least = (pick(starts[each] for each in (*group, row)) + new for pick in (max, min))
            joins = slots[row - 1] + 1 == slot and most <= PADDED * least
        if joins:
            group.append(row)
        else:
            groups.append([row])
    found: list[Span] = []
    first = 0
    for rows in groups:
        new, low = lengths[rows[0]], slots[rows[0]]
        of_rows = [slots[row] for row in rows]
        begin = torch.tensor([starts[row] for row in rows], device=device)
        found.append(
            Span(
                tokens=slice(first, first + len(rows) * new),
                slots=slice(low, low + len(rows))
                if of_rows == list(range(low, low + len(rows)))
                else torch.tensor(of_rows, device=device),
                positions=begin[:, None] + torch.arange(new, device=device),
                keys=max(starts[row] for row in rows) + new,
            )
        )
        first += len(rows) * new
    return found


@dataclass(slots=True)
class Attending:
    """The spans of the call that a model is making, and how many of its layers have asked for them."""

    spans: Sequence[Span]
    layers: int = 0


_ATTENDING: ContextVar[Attending | None] = ContextVar("attending", default=None)


@contextmanager
def attending(spans: Sequence[Span], model: Any) -> Iterator[None]:
    """Around a call of a model: whose tokens its layers find in one line; none for a static step.

    Not every family hands arguments on to its attention, so they do not travel as one. Raises `ModelError` where no
    layer asked: the model has an attention of its own, which knows nothing of slots and would mix texts up.
    """
    told = Attending(spans)
    token = _ATTENDING.set(told)
    try:
        yield
    finally:
        _ATTENDING.reset(token)
    if not told.layers:
        raise ModelError(
            f"{type(model).__name__} has an attention of its own, which cannot read from the slots of several texts; "
            "take a model whose attention transformers lets others replace (AttentionInterface)"
        )


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Within `attending` with spans: query [1, Hq, N, D], key and value of all slots [S, Hkv, L, D] -> [1, N, Hq, D].

    Without: query [B, Hq, T, D], key and value [B, Hkv, L, D], mask [B, 1, T, L], 0 or -inf -> [B, T, Hq, D].
    Raises `ModelError` for attention sinks (s_aux), which are not computed here.
    """
    if s_aux is not None:
        raise ModelError(
            "this model's attention has sinks, which Viaticum does not compute; take another model"
        )
    told = _ATTENDING.get()
    assert told is not None, "a runner says who attends"
    told.layers += 1
    batch, query_heads, steps, dim = query.shape
    kv_heads, width = key.shape[1], value.shape[-1]
    groups = query_heads // kv_heads
    scale = scaling if scaling is not None else dim**-0.5
    if not told.spans:
        assert attention_mask is not None, "a static step gives a mask"
        bias = attention_mask
        if sliding_window is not None:
            bias = bias.masked_fill(~_within_window(bias == 0, sliding_window), float("-inf"))
        packed = query.reshape(batch, kv_heads, groups * steps, dim)  # heads of one group are neighbours
        out = _products(packed, key, value, bias, scale, softcap)
        return out.reshape(batch, query_heads, steps, width).transpose(1, 2).contiguous(), None
    found = query.new_empty(1, steps, query_heads, width)
    for span in told.spans:
        rows, new = span.positions.shape
        mine = query[0, :, span.tokens].view(query_heads, rows, new, dim).transpose(0, 1)
        out = _fused(
            mine.reshape(rows, kv_heads, groups * new, dim),
            key[span.slots, :, : span.keys],
            value[span.slots, :, : span.keys],
            span.mask(groups, sliding_window, query.dtype),
            scale,
            softcap,
        )
        found[0, span.tokens] = out.view(rows, query_heads, new, width).transpose(1, 2).flatten(0, 1)
    return found, None


def _within_window(mask: Tensor, window: int) -> Tensor:
    """True where the key is one of the last `window` positions; mask [B, 1, T, L] is causal without holes."""
    last_key = mask.sum(-1, keepdim=True) - 1
    keys = torch.arange(mask.shape[-1], device=mask.device)
    return keys > last_key - window


def _products(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, cap: float | None
) -> Tensor:
    """Attention in four kernels: query [B, Hkv, G * T, D], bias [B, 1, T, L], broadcast over groups, not copied."""
    batch, heads, _, _ = query.shape
    steps, keys = bias.shape[-2:]
    scores = torch.matmul(query, key.transpose(2, 3)).view(batch, heads, -1, steps, keys)
    if cap is None:
        scores = torch.add(bias[:, :, None], scores, alpha=scale)
    else:
        scores = bias[:, :, None] + (torch.tanh(scores.float() * (scale / cap)) * cap)
    weights = torch.softmax(scores, -1).to(value.dtype).view(batch, heads, -1, keys)
    return torch.matmul(weights, value)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, cap: float | None
) -> Tensor:
    """Attention by torch's kernels; with scores squashed to (-cap, cap), as Gemma 2 has it, no fused one does this."""
    if cap is None:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scale
    scores = torch.tanh(scores / cap) * cap
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    return torch.matmul(weights.to(value.dtype), value)


AttentionInterface.register(NAME, slot_attention)
