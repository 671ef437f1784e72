"""GGUF files of tiny models, written as llama.cpp's converter writes them: with the package gguf alone.

The names come from the package's own table, so that they do not depend on what is tested.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

CORPUS = [
    "the cat sat on the mat, and the dog sat with the cat",
    "What is 12 + 345? It's 357, isn't it?",
    "def f(x):\n    return x ** 2\n",
    "größer, naïve, café, 東京の天気は? привет мир",
] * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<｜User｜>", "<｜Assistant｜>"]
USER_DEFINED = ["<think>", "</think>", "<tool_call>"]
ODD_TEXTS = [
    "",
    " ",
    "   a  b ",
    "\n\n\t x\r\ny",
    "e\u0301 is composed, \u00e9 is not",
    "12345678901234567890",
    "it's they'RE I'Ll",
    "<|im_start|>user\nhi<|im_end|>",
    "<|im_start<|im_start|>|>",
    "<｜User｜>hello<｜Assistant｜><think>\n",
    "<think></think><tool_call>{}",
    "🙂👩\u200d👩\u200d👧 \ufffd \x00 \x7f",
    "ﬁ Å \u212b \u1100\u1161",
    "a" * 200,
    "▁▁ underscore ▁",
    "ĠĊ literal letters of the byte alphabet",
    "[PAD300]",
]


@dataclass(frozen=True)
class Vocabulary:
    """Tokens as the file holds them, and the tokenizer that they stand for."""

    tokenizer: Tokenizer
    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float] | None = None


def byte_level(pre: str, split: str, *, nfc: bool = False, ignore_merges: bool = False) -> Vocabulary:
    """A byte-level vocabulary of some 350 tokens, special ones outside the byte alphabet among them."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.normalizer = normalizers.NFC() if nfc else None  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    normal = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(USER_DEFINED)
    return _vocabulary(tokenizer, "gpt2", pre, [1] * normal)


def sentencepiece() -> Vocabulary:
    """A vocabulary as Llama 2 has it: unknown, control and byte tokens, then pieces with scores."""
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=first, show_progress=False)
    )
    trained.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1),
        ]
    )
    # Byte tokens are no special ones: they are only reached where a letter is unknown.
    document = json.loads(trained.to_str())
    document["added_tokens"] = [one for one in document["added_tokens"] if one["id"] < 3]
    trained = Tokenizer.from_str(json.dumps(document))
    size = trained.get_vocab_size()
    types = [2, 3, 3] + [6] * 256 + [1] * (size - 259)
    scores = [0.0] * 259 + [-float(rank) for rank in range(size - 259)]
    found = _vocabulary(trained, "llama", "default", types)
    return Vocabulary(found.tokenizer, "llama", "default", found.tokens, found.types, [], scores)


def _vocabulary(tokenizer: Tokenizer, kind: str, pre: str, types: list[int]) -> Vocabulary:
    size = tokenizer.get_vocab_size()
    tokens = [str(tokenizer.id_to_token(token)) for token in range(size)]
    types = [*types, *([3] * len(SPECIAL) + [4] * len(USER_DEFINED) if len(types) < size else [])]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return Vocabulary(tokenizer, kind, pre, tokens, types, [" ".join(pair) for pair in merges])


@dataclass
class Written:
    """How a file differs from what the model says. drop: tensors left out; add: further ones, by name."""

    split: int = 0
    quantise: Callable[[str, np.ndarray[Any, Any]], Any] | None = None
    drop: Sequence[str] = ()
    add: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model whose weights bfloat16 holds, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 1:
                    torch.nn.init.uniform_(weight, -0.5, 1.5)
                else:
                    torch.nn.init.normal_(weight, 0, 0.2)
                weight.copy_(weight.bfloat16().float())
    return model


def write_gguf(
    path: Path,
    architecture: str,
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    written: Written | None = None,
) -> Path:
    """Write a model; where `written.split` is given, in shards of that many tensors. Returns the path."""
    written = written or Written()
    config = model.config
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=written.split)
    _write_metadata(writer, config, architecture)
    _write_vocabulary(writer, vocabulary, config.vocab_size)
    for key, value in written.metadata.items():
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}[
            type(value)
        ](key, value)
    name_of = tensor_names(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        new = name_of(name)
        if new in written.drop:
            continue
        values = tensor.numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            values = interleaved(values, heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        quantised = None if written.quantise is None else written.quantise(new, values)
        if quantised is None:
            writer.add_tensor(new, np.ascontiguousarray(values))
        else:
            kind, data = quantised
            writer.add_tensor(new, data, raw_dtype=kind)
    for new, values in written.add.items():
        writer.add_tensor(new, values)
    write_file(writer)
    return path


def write_file(writer: Any) -> None:
    """Write what a writer was given, and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensor_names(architecture: str, layers: int) -> Callable[[str], str]:
    """From a name of transformers to that of a GGUF file: `model.norm.weight` is `output_norm.weight`."""
    names = gguf.get_tensor_name_map(_ARCHITECTURES[architecture], layers)
    return lambda name: str(names.get_name(name, try_suffixes=(".weight", ".bias")))


_ARCHITECTURES = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}


def interleaved(weights: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The rows of rotated heads in llama.cpp's order."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def _write_metadata(writer: Any, config: Any, architecture: str) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope.get("full_attention", rope)["rope_theta"]))
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture == "llama":
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_vocab_size(config.vocab_size)
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _write_vocabulary(writer: Any, vocabulary: Vocabulary, rows: int) -> None:
    padding = [f"[PAD{token}]" for token in range(len(vocabulary.tokens), rows)]
    ids = {text: token for token, text in enumerate(vocabulary.tokens)}
    end = "</s>" if "</s>" in ids else "<|im_end|>"
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([*vocabulary.tokens, *padding])
    writer.add_token_types([*vocabulary.types, *([5] * len(padding))])
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores([*vocabulary.scores, *([0.0] * len(padding))])
        writer.add_bos_token_id(ids["<s>"])
        writer.add_unk_token_id(ids["<unk>"])
    writer.add_eos_token_id(ids[end])
    writer.add_chat_template("{% for m in messages %}<｜User｜>{{ m['content'] }}{{ eos_token }}{% endfor %}")
