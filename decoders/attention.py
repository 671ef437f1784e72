"""Grouped-query attention over KV slots, for any transformers model that takes a named attention function.

Query heads that share a key/value head are laid out as extra query rows, so that keys and values are never
repeated in memory: with 16 rows of 600 tokens that copy would cost more than the attention itself. Leaves out
writing keys and values (`decoders.cache`).

There are two paths. The dynamic path has all new tokens of a call in one sequence and a list of spans that
assigns them to rows (`attending`). Each span is torch's fused attention over its slots, read in place, masked
only where a row reads several tokens. The static path (`decoders.graphs`) gives an additive mask: two matrix
products with the mask and a softmax between them, scores rounded to the model's dtype as in transformers'
eager attention. With a mask, the fused CUDA kernels assign each key/value head of a row to one
multiprocessor, which then processes all keys alone; a matrix product spreads the keys over the device. A
decoding kernel that splits the keys and skips masked ones would be faster still (FlashInfer, FlashAttention's
`flash_attn_with_kvcache`, FlexAttention with a block mask); all of them need more than torch's wheel, or a
compiler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import AttentionInterface

from viaticum.decoders.blocks import BlockPool
from viaticum.decoders.memory import is_out_of_memory
from viaticum.errors import ModelError
from viaticum.routers.token.base import to_device

NAME = "viaticum_slots"
MAX_KEY_RATIO = 1.25  # of the longest to the shortest row of a span on a CPU
# Kinds of layers that keep keys and values alone. In its first chunk, chunked attention is full attention.
KINDS = frozenset(("full_attention", "sliding_attention", "chunked_attention"))
# Model types whose mask alone has their window; their attention does not tell it.
MASKED_WINDOWS = ("phimoe", "qwen2_moe")


def check_layers(config: Any) -> None:
    """Check that keys and values are all that a model keeps of a text.

    config: of a transformers model.

    Raises:
        ModelError: some of its layers keep a state, or select their keys by another rule.
    """
    text = config.get_text_config()
    others = sorted({*(getattr(text, "layer_types", None) or ())} - KINDS)
    if others:
        raise ModelError(
            f"a model of type {text.model_type} has layers of kind {', '.join(others)}, which keep more of a "
            "text than keys and values or read other keys, and are not computed here; serve it with vLLM or "
            'SGLang (engine = "served"), or take another model'
        )


def unmasked_length(config: Any) -> int | None:
    """Positions within which masks hide later tokens alone, where `slot_attention` is not told of more.

    None: no limit.

    config: of a transformers model.
    """
    text = config.get_text_config()
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        return int(text.attention_chunk_size)
    window = getattr(text, "sliding_window", None) if text.model_type in MASKED_WINDOWS else None
    return int(window) if window else None  # 0: unused


@dataclass(frozen=True, slots=True)
class Span:
    """Adjacent rows of a call with equally many new tokens.

    Args:
        tokens: range of their tokens among those of the call.
        slots: a slice if they are neighbours, which copies nothing, else int64 [R].
        blocks: the blocks of each row, int64 [R, blocks], whose keys are copied; None: slots are read in
            place.
        positions: of their new tokens, int64 [R, T].
        keys: number of keys of the longest row.
        masks: cached by (query heads per key/value head, window, dtype), for the layers of a call.
    """

    tokens: slice
    slots: slice | Tensor
    positions: Tensor
    keys: int
    blocks: Tensor | None = None
    masks: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def read(self, layer: Tensor) -> Tensor:
        """The keys or values [R, kv_heads, keys, D] of the rows, from those of all slots or blocks."""
        if self.blocks is None:
            return layer[self.slots, :, : self.keys]
        found = layer.transpose(1, 2)[self.blocks.to(layer.device)]  # [R, blocks, BLOCK, kv_heads, D]
        return found.flatten(1, 2)[:, : self.keys].transpose(1, 2)

    def mask(self, groups: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Additive mask [R, 1, groups * T, keys], 0 or -inf; None if every key is visible."""
        rows, steps = self.positions.shape
        # A single new token of a single row attends to every key of its slot.
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
    pool: BlockPool | None = None,
) -> list[Span]:
    """Group the rows of a call into spans.

    Adjacent rows with equally many new tokens form one span if their slots are neighbours, whose keys are
    then read in place, and their lengths differ little.

    Args:
        slots: of each row.
        starts: tokens that each slot holds already.
        lengths: new tokens of each row.
        device: of the tensors.
        pool: where blocks are anywhere: they are copied, so that rows join whatever their slots and lengths.
    """
    groups: list[list[int]] = []
    for row, (slot, new) in enumerate(zip(slots, lengths, strict=True)):
        group = groups[-1] if groups else []
        joins = bool(group) and lengths[row - 1] == new
        if joins and pool is None:
            most, least = (choose(starts[each] for each in (*group, row)) + new for choose in (max, min))
            joins = slots[row - 1] + 1 == slot and most <= MAX_KEY_RATIO * least
        if joins:
            group.append(row)
        else:
            groups.append([row])
    found: list[Span] = []
    first = 0
    for rows in groups:
        new, low = lengths[rows[0]], slots[rows[0]]
        row_slots = [slots[row] for row in rows]
        begin = to_device([starts[row] for row in rows], device)
        found.append(
            Span(
                tokens=slice(first, first + len(rows) * new),
                slots=slice(low, low + len(rows))
                if row_slots == list(range(low, low + len(rows)))
                else to_device(row_slots, device),
                positions=begin[:, None] + torch.arange(new, device=device),
                keys=max(starts[row] for row in rows) + new,
                blocks=None if pool is None else to_device(pool.rows(row_slots), device),
            )
        )
        first += len(rows) * new
    return found


@dataclass(slots=True)
class AttentionContext:
    """The spans of the current model call, and how many layers have used them."""

    spans: Sequence[Span]
    layers: int = 0


_ATTENDED: WeakSet[Any] = WeakSet()  # models whose layers have used spans: their errors are errors
_CONTEXT: ContextVar[AttentionContext | None] = ContextVar("attention_context", default=None)


@contextmanager
def attending(spans: Sequence[Span], model: Any) -> Iterator[None]:
    """Provide the spans to the attention layers during a call of `model`; no spans for a static step.

    A context variable, since not every model family passes keyword arguments on to its attention.

    Raises:
        ModelError: no layer used the spans. The model then has an attention of its own, which ignores the
            slots and would mix sequences up, or fails.
    """
    context = AttentionContext(spans)
    token = _CONTEXT.set(context)
    failure = ""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if context.layers or model in _ATTENDED or is_out_of_memory(error):
            raise
        failure = f" ({error})"
    finally:
        _CONTEXT.reset(token)
    if not context.layers:
        raise ModelError(
            f"{type(model).__name__} has an attention of its own, which cannot read from the slots of "
            f"several texts{failure}; take a model whose attention transformers lets others replace "
            "(AttentionInterface)"
        )
    _ATTENDED.add(model)


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
    """Attention over KV slots, called by the layers of a model within `attending`.

    With spans: query [1, Hq, N, D], key and value of all slots or blocks [S, Hkv, L, D] -> [1, N, Hq, D].
    Without: query [B, Hq, T, D], key and value [B, Hkv, L, D], mask [B, 1, T, L] of 0 or -inf -> [B, T, Hq,
    D]. scaling: of the scores, by default D ** -0.5; sliding_window: visible keys; softcap: c of c *
    tanh(score / c).

    Raises:
        ModelError: the model has attention sinks (`s_aux`) or masks of its own, which are not computed here.
    """
    if s_aux is not None:
        raise ModelError(
            "this model's attention has sinks, which Viaticum does not compute; take another model"
        )
    context = _CONTEXT.get()
    assert context is not None, "a runner calls its model within `attending`"
    context.layers += 1
    if attention_mask is not None and (attention_mask.shape[1] > 1 or _is_masked(attention_mask, context)):
        raise ModelError(
            "this model's layers compute masks of their own, which Viaticum does not read; take another model"
        )
    batch, query_heads, steps, dim = query.shape
    kv_heads, width = key.shape[1], value.shape[-1]
    groups = query_heads // kv_heads
    scale = scaling if scaling is not None else dim**-0.5
    if not context.spans:
        assert attention_mask is not None, "a static step gives a mask"
        bias = attention_mask
        if sliding_window is not None:
            bias = bias.masked_fill(~_within_window(bias == 0, sliding_window), float("-inf"))
        packed = query.reshape(batch, kv_heads, groups * steps, dim)  # heads of one group are neighbours
        out = _products(packed, key, value, bias, scale, softcap)
        return out.reshape(batch, query_heads, steps, width).transpose(1, 2).contiguous(), None
    found = query.new_empty(1, steps, query_heads, width)
    for span in context.spans:
        rows, new = span.positions.shape
        span_query = query[0, :, span.tokens].view(query_heads, rows, new, dim).transpose(0, 1)
        out = _fused(
            span_query.reshape(rows, kv_heads, groups * new, dim),
            span.read(key),
            span.read(value),
            span.mask(groups, sliding_window, query.dtype),
            scale,
            softcap,
        )
        found[0, span.tokens] = out.view(rows, query_heads, new, width).transpose(1, 2).flatten(0, 1)
    return found, None


def _is_masked(mask: Tensor, context: AttentionContext) -> bool:
    """Whether a layer got another mask than the single element that stands for none."""
    return bool(context.spans) and mask.numel() > 1


def _within_window(mask: Tensor, window: int) -> Tensor:
    """True where the key is one of the last `window` visible ones of a causal mask [B, 1, T, L]."""
    last_key = mask.sum(-1, keepdim=True) - 1
    keys = torch.arange(mask.shape[-1], device=mask.device)
    return keys > last_key - window


def _products(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, cap: float | None
) -> Tensor:
    """Attention in four kernels: query [B, Hkv, G * T, D]; bias [B, 1, T, L], broadcast over the groups.

    Heads come first in memory, as `StaticCache` gathers them, so that products take keys without a copy.
    """
    batch, heads, _, _ = query.shape
    steps, keys = bias.shape[-2:]
    query, key, value = (each.transpose(0, 1) for each in (query, key, value))
    scores = torch.matmul(query, key.transpose(2, 3)).view(heads, batch, -1, steps, keys)
    if cap is None:
        scores = torch.add(bias[None], scores, alpha=scale)
    else:
        scores = bias[None] + (torch.tanh(scores.float() * (scale / cap)) * cap)
    weights = torch.softmax(scores, -1).to(value.dtype).view(heads, batch, -1, keys)
    return torch.matmul(weights, value).transpose(0, 1)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, cap: float | None
) -> Tensor:
    """Attention by torch's fused kernels; unfused with a softcap (Gemma 2), which none of them supports."""
    if cap is None:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scale
    scores = torch.tanh(scores / cap) * cap
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    return torch.matmul(weights.to(value.dtype), value)


AttentionInterface.register(NAME, slot_attention)
