"""The layers of the common families in fewer and larger operations, with the numbers of transformers' own.

A decoding step reads every weight once; what it does beside that is bound by the number of kernels, not by their
work, on a GPU, and for a small model on a CPU as well. transformers spends some 45 a layer. Here q, k and v are one product, gate and up another, a norm is
one kernel and the rotation of queries and keys three: about 20. Only for attention without norms of its own and
with whole heads rotated (Qwen 2, Llama, Mistral); other families stay as they are. `torch.compile` would join the
elementwise rest as well, but needs a compiler on the machine. Knows nothing of slots or graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from viaticum.decoders.attention import slot_attention
from viaticum.decoders.linear import TOGETHER, joined_layer

FAMILIES = ("Qwen2", "Llama", "Mistral")


class FusedNorm(nn.Module):
    """RMS norm over the last dimension, one kernel where torch has one."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LeanRotary(nn.Module):
    """cos and sin of the model's own rotation [B, T, 1, D], the first half of sin negated.

    With it rotate_half(x) * sin is roll(x, D / 2) * sin: a copy less, and no negation in every layer.
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


class LeanAttention(nn.Module):
    """Attention with one product for queries, keys and values; takes what `LeanRotary` gives."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.qkv, self.o_proj = _joined(parts), attention.o_proj
        self.layer_idx, self.dim, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        # Mistral's attention looks it up in the configuration, Llama's has none.
        of = attention.config if type(attention).__name__ == "MistralAttention" else attention
        self.window = getattr(of, "sliding_window", None)
        self.queries = attention.q_proj.out_features // self.dim
        self.turned = self.queries + attention.k_proj.out_features // self.dim

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, T, hidden] -> the same shape."""
        batch, steps, _ = hidden_states.shape
        cos, sin = position_embeddings
        heads = self.qkv(hidden_states).view(batch, steps, -1, self.dim)
        turned = heads[:, :, : self.turned]  # queries and keys
        turned = torch.addcmul(turned.roll(self.dim // 2, -1) * sin, turned, cos).transpose(1, 2)
        keys, values = past_key_values.update(
            turned[:, self.queries :], heads[:, :, self.turned :].transpose(1, 2), self.layer_idx
        )
        out, _ = slot_attention(
            self,
            turned[:, : self.queries],
            keys,
            values,
            attention_mask,
            scaling=self.scaling,
            sliding_window=self.window,
        )
        return self.o_proj(out.reshape(batch, steps, -1)), None


class LeanMLP(nn.Module):
    """A gated MLP with one product for gate and up."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up, self.down_proj, self.act = (
            _joined([mlp.gate_proj, mlp.up_proj]),
            mlp.down_proj,
            mlp.act_fn,
        )

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down_proj(self.act(gate) * up)
        return out


def fused_layers(model: Any) -> bool:
    """Replace the layers of a causal LM in place; False where the family does not allow it."""
    base = model.base_model
    found = {
        name: [m for m in base.modules() if type(m).__name__ in _named(name)] for name in ("Attention", "MLP")
    }
    fits = bool(found["Attention"]) and all(
        _can_join([getattr(layer, name) for name in names])
        for kind, names in zip(("Attention", "MLP"), TOGETHER, strict=True)
        for layer in found[kind]
    )
    if not fits or not hasattr(base, "rotary_emb") or _partly_rotated(model.config):
        return False
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            kind = type(child).__name__
            if kind in _named("RMSNorm"):
                setattr(parent, name, FusedNorm(child))
            elif kind in _named("Attention"):
                setattr(parent, name, LeanAttention(child))
            elif kind in _named("MLP"):
                setattr(parent, name, LeanMLP(child))
    dim = found["Attention"][0].head_dim
    base.rotary_emb = LeanRotary(base.rotary_emb, dim).to(model.device)
    return True


def _named(part: str) -> tuple[str, ...]:
    return tuple(family + part for family in FAMILIES)


def _partly_rotated(config: Any) -> bool:
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return float(parameters.get("partial_rotary_factor", 1.0)) != 1.0


def _can_join(layers: list[Any]) -> bool:
    return joined_layer(layers) is not None or all(type(layer) is nn.Linear for layer in layers)


@torch.no_grad()
def _joined(layers: list[Any]) -> nn.Module:
    """Layers that read the same input as one, their outputs one after the other; packed ones may be that already.

    They give up their weights: of a model that fills most of a device only one layer may be there twice.
    """
    if (packed := joined_layer(layers)) is not None:
        return packed
    first = layers[0]
    out = nn.Linear(first.in_features, sum(layer.out_features for layer in layers), bias=False, device="meta")
    out.weight = nn.Parameter(torch.cat(tuple(layer.weight for layer in layers)), requires_grad=False)
    if any(layer.bias is not None for layer in layers):
        every: list[Tensor] = [
            layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
            for layer in layers
        ]
        out.bias = nn.Parameter(torch.cat(every), requires_grad=False)
    for layer in layers:
        del layer.weight, layer.bias
    return out
