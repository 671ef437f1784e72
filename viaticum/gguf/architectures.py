"""What the tensors of a GGUF file are called in transformers, for the architectures whose layers both share.

Leaves out their shapes and the rest of the configuration (`viaticum.gguf.config`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from viaticum.errors import WeightsError
from viaticum.gguf.file import Header, Tensor

ROPE_FACTORS = "rope_freqs.weight"  # of llama 3.1 and later: divisors of the frequencies of the rotation

_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture of GGUF files and what transformers makes of it.

    model_class, model_type: transformers' names.
    layer: names of a layer's modules, GGUF's to transformers'.
    interleaved: llama.cpp rotates neighbouring dimensions, transformers those half a head apart.
    norm_offset: what the file adds to the weights of the norms.
    """

    model_class: str
    model_type: str
    layer: Mapping[str, str]
    interleaved: bool = False
    norm_offset: float = 0.0


ARCHITECTURES = {
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", _LAYER),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", _LAYER | _HEAD_NORMS),
    "llama": Architecture("LlamaForCausalLM", "llama", _LAYER, interleaved=True),
    "gemma2": Architecture("Gemma2ForCausalLM", "gemma2", _LAYER | _GEMMA_NORMS, norm_offset=1.0),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", "gemma3_text", _LAYER | _GEMMA_NORMS | _HEAD_NORMS, norm_offset=1.0
    ),
}


def architecture_of(header: Header) -> Architecture:
    """The architecture of a file.

    Raises:
        WeightsError: it is not one of these, or the file holds no causal language model.
    """
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise WeightsError(f"{header.path} holds no model of its own, but one of type {kind!r}")
    found = ARCHITECTURES.get(header.architecture)
    if found is None:
        raise WeightsError(
            f"{header.path}: the GGUF architecture {header.architecture!r} is not supported; known: "
            f'{", ".join(ARCHITECTURES)}; llama.cpp reads more of them: give the entry engine = "llama"'
        )
    return found


def transformers_names(header: Header) -> dict[str, Tensor]:
    """The tensors of a file by transformers' names: `blk.3.attn_q.weight` is that of
    `model.layers.3.self_attn.q_proj.weight`. Without `ROPE_FACTORS`, which the configuration holds.

    Raises:
        WeightsError: the architecture or a tensor is not known.
    """
    architecture = architecture_of(header)
    return {
        _name(header, architecture, tensor): tensor
        for tensor in header.tensors
        if not (tensor.name == ROPE_FACTORS and architecture.interleaved)
    }


def _name(header: Header, architecture: Architecture, tensor: Tensor) -> str:
    module, _, leaf = tensor.name.rpartition(".")
    if leaf in ("weight", "bias"):
        if module in _OUTER:
            return f"{_OUTER[module]}.{leaf}"
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
        if layer is not None and layer[2] in architecture.layer:
            return f"model.layers.{int(layer[1])}.{architecture.layer[layer[2]]}.{leaf}"
    raise WeightsError(
        f"{header.path}: unknown tensor {tensor.name!r} for architecture {header.architecture}"
    )


def interleaved_heads(header: Header, tensor: Tensor) -> int | None:
    """How many heads a tensor holds whose rows llama.cpp has reordered; None where it has not."""
    architecture = ARCHITECTURES.get(header.architecture)
    if architecture is None or not architecture.interleaved:
        return None
    if not re.fullmatch(r"blk\.\d+\.attn_[qk]\.(weight|bias)", tensor.name):
        return None
    heads = int(header.of_architecture("attention.head_count"))
    if ".attn_k." in tensor.name:
        heads = int(header.of_architecture("attention.head_count_kv", heads))
    return heads
