"""GGUF files of tiny transformers models, their weights in float32, for llama.cpp to read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import gguf
import numpy as np
from gguf_files import interleaved, tensor_names, write_file
from transformers import PreTrainedModel


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
    name_of = tensor_names(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        title = name_of(name)
        if title != leave_out and not (name == "lm_head.weight" and config.tie_word_embeddings):
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            values = tensor.float().numpy()
            if architecture == "llama" and title.split(".")[2:3] and title.split(".")[2] in heads:
                values = interleaved(values, heads[title.split(".")[2]])
            writer.add_tensor(title, change(title, np.ascontiguousarray(values)))
    write_file(writer)
    return path
