"""Grouped-query attention over cache slots, for any transformers model that takes a named attention.

Leaves out building the mask (the runner's work) and writing keys and values (the cache's). Query heads
that share a key/value head are laid out as extra query rows, so keys and values are never repeated in
memory: with 16 rows of 600 tokens that copy would cost more than the attention itself.

The mask says how it is computed. A bool mask, of the dynamic path: torch's fused attention. An additive one, of the
static step (`decoders.graphs`): two matrix products with the mask and a softmax between them, scores rounded to the
model's dtype as transformers' eager attention does. With a mask the fused kernels of CUDA give each key/value head
of a row to one multiprocessor, which then walks over all keys alone; a product spreads the keys over the device.
Faster still would be a decoding kernel that splits the keys and reads no masked ones (FlashInfer, FlashAttention's
`flash_attn_with_kvcache`, FlexAttention with a block mask); all of them need more than torch's wheel, or a compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "viaticum_slots"


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, Hq, T, D], key and value [B, Hkv, L, D], mask [B, 1, T, L] -> [B, T, Hq, D].

    mask: bool, True where a key is seen, or of the query's dtype, 0 there and -inf elsewhere.
    """
    batch, query_heads, steps, dim = query.shape
    kv_heads = key.shape[1]
    groups = query_heads // kv_heads
    assert attention_mask is not None, "the runner always gives a mask"
    packed = query.reshape(batch, kv_heads, groups * steps, dim)  # heads of one group are neighbours
    if attention_mask.dtype != torch.bool:
        bias = attention_mask
        if sliding_window is not None:
            bias = bias.masked_fill(~_within_window(bias == 0, sliding_window), float("-inf"))
        out = _products(packed, key, value, bias, scaling if scaling is not None else dim**-0.5, softcap)
        return out.reshape(batch, query_heads, steps, value.shape[-1]).transpose(1, 2).contiguous(), None
    mask: Tensor | None = None
    # One new token of one sequence sees every key that the cache returns: then there is nothing to mask.
    if batch > 1 or steps > 1 or sliding_window is not None or softcap is not None:
        seen = attention_mask
        if sliding_window is not None:
            seen = seen & _within_window(seen, sliding_window)
        mask = seen.expand(batch, 1, steps, seen.shape[-1]).repeat(1, 1, groups, 1)
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(packed, key, value, mask, scale=scaling)
    else:
        assert mask is not None
        out = _softcapped(packed, key, value, mask, scaling if scaling is not None else dim**-0.5, softcap)
    return out.reshape(batch, query_heads, steps, value.shape[-1]).transpose(1, 2).contiguous(), None


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


def _softcapped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    """Attention with logits squashed to (-cap, cap), as Gemma 2 has it; no fused kernel does this on a CPU."""
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scale
    scores = torch.tanh(scores / cap) * cap
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    return torch.matmul(weights.to(value.dtype), value)


AttentionInterface.register(NAME, slot_attention)
