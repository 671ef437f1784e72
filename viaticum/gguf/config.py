"""The configuration of transformers that a GGUF file's metadata and tensors describe.

Leaves out the names of the tensors (`viaticum.gguf.architectures`) and the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from viaticum.errors import WeightsError
from viaticum.gguf.architectures import ROPE_FACTORS, architecture_of
from viaticum.gguf.blocks import float32_values
from viaticum.gguf.file import Header

DEFAULT_THETA = 10000.0  # of a file that gives none, as llama.cpp
# What a file of a supported architecture may hold, and its layers in transformers do not compute.
_SCALES = ("attention.scale", "logit_scale", "embedding_scale", "residual_scale")
# Layers of the models whose attention is scaled by the width of the embedding, as llama.cpp tells them apart.
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0  # low_freq_factor, high_freq_factor of all llama 3.1 and 3.2
LLAMA3_THETA, LLAMA31_CONTEXT = 500000.0, 131072
_LLAMA3_LENGTHS = tuple(1 << power for power in range(11, 18))  # 8192 of all known ones


def config_fields(header: Header, names: Collection[str]) -> dict[str, Any]:
    """Fields of the configuration, `model_type` left out.

    Args:
        header: of the file.
        names: its tensors, by transformers' names.

    Raises:
        WeightsError: a value is missing, or stands for something that transformers' layers do not compute.
    """
    architecture, of = architecture_of(header), header.of_architecture
    _refuse_other_layers(header)
    embedding = next((each for each in header.tensors if each.name == "token_embd.weight"), None)
    if embedding is None:
        raise WeightsError(f"{header.path}: the GGUF file has no tensor token_embd.weight")
    heads = int(of("attention.head_count"))
    fields = {
        "architectures": [architecture.model_class],
        "vocab_size": embedding.shape[0],
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(header),
        "tie_word_embeddings": "lm_head.weight" not in names,
        "bos_token_id": _token(header, "bos_token_id", embedding.shape[0]),
        "eos_token_id": _token(header, "eos_token_id", embedding.shape[0]),
        "pad_token_id": _token(header, "padding_token_id", embedding.shape[0]),
        "dtype": "bfloat16",
    }
    size = _head_size(header)
    if header.architecture != "qwen2" or size != fields["hidden_size"] // heads:
        fields["head_dim"] = size
    if header.architecture in ("llama", "qwen3"):
        fields["attention_bias"] = any(name.endswith("self_attn.q_proj.bias") for name in names)
    if header.architecture == "llama":
        fields["mlp_bias"] = any(name.endswith("mlp.up_proj.bias") for name in names)
    if header.architecture.startswith("gemma"):
        fields |= _gemma_fields(header, size)
    return fields


def _token(header: Header, key: str, rows: int) -> int | None:
    """An id of the metadata; None where it is no row of the embedding (some files write -1 for none)."""
    token = header.metadata.get(f"tokenizer.ggml.{key}")
    return token if isinstance(token, int) and 0 <= token < rows else None


def _refuse_other_layers(header: Header) -> None:
    metadata, prefix = header.metadata, header.architecture
    if metadata.get(f"{prefix}.expert_count"):
        raise WeightsError(
            f"{header.path} is a mixture of {metadata[f'{prefix}.expert_count']} experts, which is not"
            ' supported; llama.cpp reads it: give the entry engine = "llama"'
        )
    for key in _SCALES:
        if metadata.get(f"{prefix}.{key}") not in (None, 0.0, 1.0):
            raise WeightsError(
                f"{header.path}: {prefix}.{key} of the GGUF metadata is not supported; llama.cpp reads it:"
                ' give the entry engine = "llama"'
            )


def _head_size(header: Header) -> int:
    of = header.of_architecture
    rotated = of("rope.dimension_count", 0)
    size = of("attention.key_length", rotated or of("embedding_length") // of("attention.head_count"))
    if of("attention.value_length", size) != size or rotated not in (0, size):
        raise WeightsError(
            f"{header.path}: heads whose keys, values ({size}, {of('attention.value_length', size)}) and "
            f"rotated part ({rotated or size}) differ in size are not supported"
        )
    return int(size)


def _gemma_fields(header: Header, head_size: int) -> dict[str, Any]:
    of = header.of_architecture
    wide = of("block_count") == _GEMMA_27B[header.architecture]
    fields: dict[str, Any] = {
        "sliding_window": of("attention.sliding_window"),
        "query_pre_attn_scalar": of("embedding_length") // of("attention.head_count") if wide else head_size,
    }
    if header.architecture == "gemma2":
        fields["attn_logit_softcapping"] = of("attn_logit_softcapping")
        fields["final_logit_softcapping"] = of("final_logit_softcapping")
    else:
        local = {"rope_type": "default", "rope_theta": of("rope.freq_base_swa", DEFAULT_THETA)}
        fields["rope_parameters"] = {"full_attention": _rope(header), "sliding_attention": local}
    return fields


# --- the rotation -------------------------------------------------------------------------------------------


def _rope(header: Header) -> dict[str, Any]:
    """transformers' `rope_parameters`; the scaling of the metadata, or that of `rope_freqs.weight`."""
    of = header.of_architecture
    plain = {"rope_type": "default", "rope_theta": of("rope.freq_base", DEFAULT_THETA)}
    kind = of("rope.scaling.type", "none")
    old_factor = of("rope.scale_linear", 1.0) if kind == "none" else 1.0
    factors = next((each for each in header.tensors if each.name == ROPE_FACTORS), None)
    if factors is not None:
        if kind != "none":
            raise WeightsError(
                f"{header.path}: {ROPE_FACTORS} beside a scaling of type {kind!r} is not supported"
            )
        return _rope_by_factors(header, float32_values(factors), plain)
    if kind == "none" and old_factor == 1.0:
        _refuse_lost_factors(header, plain["rope_theta"])
        return plain
    if kind in ("none", "linear"):
        return plain | {"rope_type": "linear", "factor": of("rope.scaling.factor", old_factor)}
    if kind == "yarn":
        return plain | _yarn(header)
    raise WeightsError(
        f"{header.path}: a rotary embedding with scaling of type {kind!r} is not supported; known: linear,"
        ' yarn; llama.cpp reads more of them: give the entry engine = "llama"'
    )


def _refuse_lost_factors(header: Header, theta: float) -> None:
    """Converters of July 2024 left out the factors of llama 3.1; long texts would silently go wrong."""
    if header.architecture == "llama" and theta == LLAMA3_THETA:
        context = header.of_architecture("context_length")
        if context >= LLAMA31_CONTEXT:
            raise WeightsError(
                f"{header.path} has a context of {context} tokens and the rotation of llama 3, but not the"
                f" factors of llama 3.1 ({ROPE_FACTORS}); convert the model again with a current llama.cpp"
            )


def _yarn(header: Header) -> dict[str, Any]:
    of = header.of_architecture
    factor = float(of("rope.scaling.factor"))
    found = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": of("rope.scaling.original_context_length"),
        "beta_fast": of("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": of("rope.scaling.yarn_beta_slow", 1.0),
    }
    scale = of("rope.scaling.yarn_attn_factor", of("rope.scaling.attn_factor", 1.0))
    if scale != 1.0:  # llama.cpp multiplies it with what transformers takes where nothing is given
        found["attention_factor"] = scale * (0.1 * math.log(factor) + 1.0)
    if of("rope.scaling.yarn_log_multiplier", 0.1) != 0.1:
        raise WeightsError(f"{header.path}: yarn with a yarn_log_multiplier of its own is not supported")
    return found


def _rope_by_factors(
    header: Header, factors: npt.NDArray[np.float32], plain: dict[str, Any]
) -> dict[str, Any]:
    """Divisors of the frequencies [D / 2]: those of llama 3.1's formula, or any, each as it stands."""
    half = _head_size(header) // 2
    if factors.shape != (half,):
        raise WeightsError(
            f"{header.path}: {ROPE_FACTORS} holds {len(factors)} factors for {half} frequencies"
        )
    frequencies = plain["rope_theta"] ** (-np.arange(half) / half)
    factor = float(factors.max())
    for length in _LLAMA3_LENGTHS:
        if np.allclose(_llama3_factors(frequencies, factor, length), factors, rtol=1e-3):
            return plain | {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LLAMA3_LOW,
                "high_freq_factor": _LLAMA3_HIGH,
                "original_max_position_embeddings": length,
            }
    listed = [float(each) for each in factors]
    return plain | {
        "rope_type": "longrope",
        "short_factor": listed,
        "long_factor": listed,
        "attention_factor": 1.0,
        "original_max_position_embeddings": header.of_architecture("context_length"),
    }


def _llama3_factors(frequencies: npt.NDArray[Any], factor: float, length: int) -> npt.NDArray[Any]:
    """By what llama 3.1 divides each frequency: 1 for short waves, `factor` for long, between them between.

    The smoothing of https://github.com/meta-llama/llama-models/blob/main/models/llama3/reference_impl/model.py
    """
    waves = length * frequencies / (2 * math.pi)  # how many of them a text of that length has
    smooth = np.clip((waves - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))
