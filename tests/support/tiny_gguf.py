"""GGUF files of tiny transformers models, their weights in float32, for llama.cpp to read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_tiny_gguf(
    path: Path,
    model: PreTrainedModel,
    tokens: Iterable[str] | None = None,
    *,
    leave_out: str = "",
    change: Callable[[str, np.ndarray], np.ndarray] = lambda name, values: values,
    eos: int | None = None,
) -> Path:
    """Write a Qwen 2, Qwen 3 or Llama model.

    Args:
        tokens: of a byte-level tokenizer; None: letters, one for each row of logits.
        leave_out: a tensor that the file lacks, by its GGUF name.
        change: of a tensor's values, given its name.
    """
    config = model.config
    architecture = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama"}[config.model_type]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = list(tokens or (chr(0x100 + n) for n in range(config.vocab_size)))
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if architecture == "llama" else "qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    if eos is not None:
        writer.add_eos_token_id(eos)
    for name, tensor in model.state_dict().items():
        title = gguf_name(name)
        if title != leave_out and not (name == "lm_head.weight" and config.tie_word_embeddings):
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            values = tensor.float()
            if architecture == "llama" and title.split(".")[2:3] and title.split(".")[2] in heads:
                values = interleaved(values, heads[title.split(".")[2]])
            writer.add_tensor(title, change(title, values.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    module, _, leaf = name.rpartition(".")
    if module in NAMES:
        return f"{NAMES[module]}.{leaf}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{leaf}"


def interleaved(values: Tensor, heads: int) -> Tensor:
    """The order of rows in which llama.cpp rotates the heads of Llama models."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape).contiguous()
