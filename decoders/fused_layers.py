"""Fused layers of common model families: fewer and larger kernels, the same results as transformers' layers.

A decode step reads every weight once; everything else is bound by the number of kernels, not by their work,
on a GPU and for a small model on a CPU as well. transformers launches some 45 kernels a layer. Here q, k and
v are one product, gate and up another, a norm is one kernel and the rotation of queries and keys three: about
20; the norms that Qwen 3 has for the queries and keys of each head are one more. Only for families with fully
rotated heads (Qwen 2 and 3, Llama, Mistral); others are left unchanged. `torch.compile` would fuse the
elementwise rest as well, but needs a compiler on the machine. Leaves out KV slots and graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from viaticum.decoders.attention import slot_attention
from viaticum.decoders.linear import SAME_INPUT, fused_packed_layer

FAMILIES = ("Qwen2", "Qwen3", "Llama", "Mistral")


class FusedNorm(nn.Module):
    """RMS norm over the last dimension, as one kernel where torch has one."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class FusedRotary(nn.Module):
    """cos and sin [B, T, 1, D] of the model's rotary embedding, the first half of sin negated.

    Then rotate_half(x) * sin is roll(x, D / 2) * sin, which saves a copy and a negation in every layer.
    """

    sign: Tensor

    def __init__(self, rotary: nn.Module, dim: int) -> None:
        super().__init__()
        self.rotary = rotary
        sign = torch.ones(dim)
        sign[: dim // 2] = -1
        self.register_buffer("sign", sign, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(x, position_ids)
        return cos[:, :, None], (sin * self.sign.to(sin.dtype))[:, :, None]


class FusedHeadNorm(nn.Module):
    """The RMS norms of queries and keys over each head [B, T, heads, D]: one kernel, then their weights."""

    weight: Tensor  # [heads, D]

    def __init__(self, attention: Any, query_heads: int, key_heads: int) -> None:
        super().__init__()
        queries, keys = attention.q_norm, attention.k_norm
        self.eps = queries.variance_epsilon
        weights = (queries.weight.expand(query_heads, -1), keys.weight.expand(key_heads, -1))
        self.register_buffer("weight", torch.cat(weights).detach(), persistent=False)

    def forward(self, heads: Tensor) -> Tensor:
        return nn.functional.rms_norm(heads, self.weight.shape[-1:], None, self.eps) * self.weight


class FusedAttention(nn.Module):
    """Attention with one product for queries, keys and values; takes the output of `FusedRotary`."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.qkv, self.o_proj = _fused_linear(parts), attention.o_proj
        self.layer_idx, self.dim, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        # Mistral's attention looks it up in the configuration, Llama's has none.
        owner = attention.config if type(attention).__name__ == "MistralAttention" else attention
        self.window = getattr(owner, "sliding_window", None)
        self.query_heads = attention.q_proj.out_features // self.dim
        key_heads = attention.k_proj.out_features // self.dim
        self.rotated_heads = self.query_heads + key_heads
        has_norm = hasattr(attention, "q_norm")
        self.head_norm = FusedHeadNorm(attention, self.query_heads, key_heads) if has_norm else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, T, hidden] -> the same shape; position_embeddings: cos and sin [B, T, 1, D]."""
        batch, steps, _ = hidden_states.shape
        cos, sin = position_embeddings
        heads = self.qkv(hidden_states).view(batch, steps, -1, self.dim)
        rotated = heads[:, :, : self.rotated_heads]  # queries and keys
        if self.head_norm is not None:
            rotated = self.head_norm(rotated)
        rotated = torch.addcmul(rotated.roll(self.dim // 2, -1) * sin, rotated, cos).transpose(1, 2)
        keys, values = past_key_values.update(
            rotated[:, self.query_heads :],
            heads[:, :, self.rotated_heads :].transpose(1, 2),
            self.layer_idx,
        )
        out, _ = slot_attention(
            self,
            rotated[:, : self.query_heads],
            keys,
            values,
            attention_mask,
            scaling=self.scaling,
            sliding_window=self.window,
        )
        return self.o_proj(out.reshape(batch, steps, -1)), None


class FusedMLP(nn.Module):
    """A gated MLP with one product for gate and up."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up = _fused_linear([mlp.gate_proj, mlp.up_proj])
        self.down_proj, self.act = mlp.down_proj, mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down_proj(self.act(gate) * up)
        return out


def fuse_layers(model: Any) -> bool:
    """Replace the layers of a causal LM in place; False, changing nothing, if its family is not supported."""
    base = model.base_model
    found = {
        part: [m for m in base.modules() if type(m).__name__ in _class_names(part)]
        for part in ("Attention", "MLP")
    }
    fusable = bool(found["Attention"]) and all(
        _is_fusable([getattr(layer, name) for name in names])
        for part, names in zip(("Attention", "MLP"), SAME_INPUT, strict=True)
        for layer in found[part]
    )
    if not fusable or not hasattr(base, "rotary_emb") or _is_partly_rotated(model.config):
        return False
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            kind = type(child).__name__
            if kind in _class_names("RMSNorm"):
                setattr(parent, name, FusedNorm(child))
            elif kind in _class_names("Attention"):
                setattr(parent, name, FusedAttention(child))
            elif kind in _class_names("MLP"):
                setattr(parent, name, FusedMLP(child))
    dim = found["Attention"][0].head_dim
    base.rotary_emb = FusedRotary(base.rotary_emb, dim).to(model.device)
    return True


def _class_names(part: str) -> tuple[str, ...]:
    return tuple(family + part for family in FAMILIES)


def _is_partly_rotated(config: Any) -> bool:
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return float(parameters.get("partial_rotary_factor", 1.0)) != 1.0


def _is_fusable(layers: list[Any]) -> bool:
    return fused_packed_layer(layers) is not None or all(type(layer) is nn.Linear for layer in layers)


@torch.no_grad()
def _fused_linear(layers: list[Any]) -> nn.Module:
    """One layer that concatenates the outputs of layers with the same input.

    Packed layers may be fused already. The layers give up their weights, so that at most one layer of a
    model that fills the device exists twice.
    """
    if (packed := fused_packed_layer(layers)) is not None:
        return packed
    first = layers[0]
    out = nn.Linear(first.in_features, sum(layer.out_features for layer in layers), bias=False, device="meta")
    out.weight = nn.Parameter(torch.cat(tuple(layer.weight for layer in layers)), requires_grad=False)
    if any(layer.bias is not None for layer in layers):
        biases: list[Tensor] = [
            layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
            for layer in layers
        ]
        out.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    for layer in layers:
        del layer.weight, layer.bias
    return out
