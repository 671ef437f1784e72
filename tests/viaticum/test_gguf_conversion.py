"""A folder made of a GGUF file computes, and cuts texts, as the model that the file was written from."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import (
    ODD_TEXTS,
    SPECIAL,
    USER_DEFINED,
    Vocabulary,
    Written,
    byte_level,
    sentencepiece,
    tiny_model,
    write_gguf,
)
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.decoders import load_runner
from viaticum.errors import WeightsError
from viaticum.gguf.conversion import convert
from viaticum.gguf.file import read_header
from viaticum.gguf.split_patterns import SPLITTINGS
from viaticum.models.local import LocalModels
from viaticum.weight_sources import LocalPath
from viaticum.weights import locate, pull

ROWS = 360  # of the embedding: more than there are tokens
SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
GEMMA = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def words() -> Vocabulary:
    return byte_level("qwen2", SPLITTINGS["qwen2"].patterns[0], nfc=True)


def frequency_divisors(model: PreTrainedModel) -> np.ndarray[Any, Any]:
    """rope_freqs.weight as the converter computes it: plain frequencies over the model's own."""
    rotary: Any = model.base_model.rotary_emb
    half = len(rotary.inv_freq)
    plain = model.config.rope_parameters["rope_theta"] ** (-np.arange(half) / half)
    return (plain / rotary.inv_freq.numpy()).astype(np.float32)


def logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def converted(path: Path, folder: Path) -> PreTrainedModel:
    folder.mkdir()
    convert(path, folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


MODELS: dict[str, tuple[str, PreTrainedConfig]] = {
    "qwen2 untied": ("qwen2", Qwen2Config(**SIZES)),
    "qwen2 tied": ("qwen2", Qwen2Config(**SIZES | {"tie_word_embeddings": True})),
    "qwen2 yarn": ("qwen2", Qwen2Config(**SIZES, rope_parameters=YARN)),
    "qwen3": ("qwen3", Qwen3Config(**SIZES, head_dim=16)),
    "qwen3 tied": ("qwen3", Qwen3Config(**SIZES | {"tie_word_embeddings": True}, head_dim=16)),
    "llama": ("llama", LlamaConfig(**SIZES)),
    "llama wide heads": ("llama", LlamaConfig(**SIZES, head_dim=16)),
    "llama biases": ("llama", LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama 3.1": ("llama", LlamaConfig(**SIZES, head_dim=16, rope_parameters=LLAMA3_ROPE)),
    "llama 3.2": ("llama", LlamaConfig(**SIZES, head_dim=16, rope_parameters=LLAMA3_ROPE | {"factor": 32.0})),
    "llama linear": (
        "llama",
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    ),
    "gemma2": (
        "gemma2",
        Gemma2Config(**SIZES | GEMMA, attn_logit_softcapping=20.0, final_logit_softcapping=10.0),
    ),
    "gemma3": ("gemma3", Gemma3TextConfig(**SIZES | GEMMA)),
}


def scaling(config: Any) -> dict[str, Any]:
    """The scaling of the rotation in the metadata."""
    rope = config.rope_parameters
    found = {"rope.scaling.type": rope.get("rope_type"), "rope.scaling.factor": rope.get("factor")}
    if rope.get("rope_type") == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return found if rope.get("rope_type") in ("yarn", "linear") else {}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model_that_the_file_was_written_from(
    tmp_path: Path, name: str, words: Vocabulary
) -> None:
    architecture, config = MODELS[name]
    model = tiny_model(config)
    written = Written(metadata={f"{architecture}.{key}": value for key, value in scaling(config).items()})
    if name.startswith("llama 3"):
        written.add["rope_freqs.weight"] = frequency_divisors(model)
    path = write_gguf(tmp_path / "model.gguf", architecture, model, words, written)
    ours = converted(path, tmp_path / "folder")
    assert type(ours) is type(model)
    assert ours.config.tie_word_embeddings == config.tie_word_embeddings
    rng = random.Random(name)
    ids = [rng.randrange(ROWS) for _ in range(100)]
    torch.testing.assert_close(logits(ours, ids), logits(model, ids), atol=2e-5, rtol=1e-4)
    if "llama 3" in name:
        assert ours.config.rope_parameters == config.rope_parameters


def test_factors_of_the_rotation_that_follow_no_formula_are_kept_each(
    tmp_path: Path, words: Vocabulary
) -> None:
    listed = [1.0, 1.5, 2.0, 3.0]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": listed,
        "long_factor": listed,
        "attention_factor": 1.0,
        "original_max_position_embeddings": 256,
    }
    model = tiny_model(LlamaConfig(**SIZES, rope_parameters=rope))
    written = Written(add={"rope_freqs.weight": np.array(listed, dtype=np.float32)})
    ours = converted(write_gguf(tmp_path / "m.gguf", "llama", model, words, written), tmp_path / "folder")
    ids = list(range(0, 300, 3))
    torch.testing.assert_close(logits(ours, ids), logits(model, ids), atol=2e-5, rtol=1e-4)


# --- block types --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ2_0"])
def test_every_block_type_that_the_package_writes_is_read(
    tmp_path: Path, words: Vocabulary, kind: str
) -> None:
    """The expected weights are the package's own, rounded to bfloat16."""
    number = gguf.GGMLQuantizationType[kind]
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    model = tiny_model(Qwen2Config(**SIZES | sizes))
    expected: dict[str, torch.Tensor] = {}

    def quantise(name: str, values: np.ndarray[Any, Any]) -> Any:
        if values.ndim < 2:
            return None
        data = values.astype(np.float16) if kind == "F16" else gguf.quants.quantize(values, number)
        back = gguf.quants.dequantize(data.view(np.uint8) if kind == "F16" else data, number)
        expected[name] = torch.from_numpy(np.ascontiguousarray(back)).to(torch.bfloat16).reshape(values.shape)
        return number, data

    path = write_gguf(tmp_path / "m.gguf", "qwen2", model, words, Written(quantise=quantise))
    convert(path, tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert torch.equal(ours["model.layers.0.mlp.down_proj.weight"], expected["blk.0.ffn_down.weight"])
    assert torch.equal(ours["lm_head.weight"], expected["output.weight"])


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"])
def test_every_block_type_that_the_package_reads_is_unpacked(
    tmp_path: Path, words: Vocabulary, kind: str
) -> None:
    number = gguf.GGMLQuantizationType[kind]
    weights, size = gguf.GGML_QUANT_SIZES[number]
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    model = tiny_model(Qwen2Config(**SIZES | sizes))
    blocks = np.random.default_rng(0).integers(0, 60, (256, 256 // weights * size), dtype=np.uint8)
    written = Written(quantise=lambda name, _: (number, blocks) if name == "blk.0.ffn_down.weight" else None)
    convert(write_gguf(tmp_path / "m.gguf", "qwen2", model, words, written), tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, number)).to(torch.bfloat16)
    assert torch.equal(ours["model.layers.0.mlp.down_proj.weight"], expected)


# --- tensors too few and too many ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (Written(drop=["blk.1.attn_q.bias"]), r"lacks model\.layers\.1\.self_attn\.q_proj\.bias of the arch"),
        (Written(drop=["output_norm.weight"]), r"lacks model\.norm\.weight"),
        (Written(drop=[f"blk.1.{part}.weight" for part in ("ffn_up", "ffn_down", "attn_norm", "ffn_gate")]),
         "and 1 more of the architecture"),
        (Written(add={"blk.0.attn_output.bias": np.ones(32, np.float32)}), "no place for: blk.0.attn_out"),
        (Written(add={"blk.2.attn_norm.weight": np.ones(32, np.float32)}), "no place for: blk.2.attn_norm"),
        (Written(add={"blk.0.attn_q.scale": np.ones(1, np.float32)}), "unknown tensor 'blk.0.attn_q.scale'"),
        (Written(drop=["output_norm.weight"], add={"output_norm.weight": np.ones(16, np.float32)}),
         r"'output_norm.weight' has shape \(16,\), not \(32,\) as the metadata"),
        (Written(drop=["token_embd.weight"]), "has no tensor token_embd.weight"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_the_model_are_errors(
    tmp_path: Path, words: Vocabulary, written: Written, message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", "qwen2", tiny_model(Qwen2Config(**SIZES)), words, written)
    with pytest.raises(WeightsError, match=message):
        convert(path, tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "mixture of 8 experts"),
        ({"llama.logit_scale": 0.25}, "llama.logit_scale of the GGUF metadata is not supported"),
        (
            {"qwen2.attention.key_length": 16, "qwen2.attention.value_length": 8},
            "differ in size are not",
        ),
        ({"llama.rope.scaling.type": "longrope"}, "scaling of type 'longrope' is not supported"),
        ({"general.type": "adapter"}, "holds no model of its own, but one of type 'adapter'"),
    ],
)
def test_models_that_compute_otherwise_are_refused(
    tmp_path: Path, words: Vocabulary, metadata: dict[str, Any], message: str
) -> None:
    architecture = "qwen2" if "qwen2" in str(metadata) else "llama"
    model = tiny_model((Qwen2Config if architecture == "qwen2" else LlamaConfig)(**SIZES))
    path = write_gguf(tmp_path / "m.gguf", architecture, model, words, Written(metadata=metadata))
    with pytest.raises(WeightsError, match=message):
        convert(path, tmp_path)


def test_a_llama_3_of_3_1s_context_without_its_factors_is_refused(tmp_path: Path, words: Vocabulary) -> None:
    """It would read texts beyond 8,192 tokens otherwise than it was trained to."""
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    long = {"max_position_embeddings": 131072, "rope_parameters": rope}
    path = write_gguf(tmp_path / "m.gguf", "llama", tiny_model(LlamaConfig(**SIZES | long)), words)
    with pytest.raises(WeightsError, match=r"but not the factors of llama 3\.1 \(rope_freqs\.weight\)"):
        convert(path, tmp_path)


def test_ids_that_are_no_tokens_are_none(tmp_path: Path, words: Vocabulary) -> None:
    """Some converters write -1 as an unsigned number where a model has no such token."""
    written = Written(metadata={"tokenizer.ggml.padding_token_id": 0xFFFFFFFF})
    path = write_gguf(tmp_path / "m.gguf", "qwen2", tiny_model(Qwen2Config(**SIZES)), words, written)
    assert converted(path, tmp_path / "folder").config.pad_token_id is None


# --- shards -------------------------------------------------------------------------------------------------


def spec_of(path: Path) -> ModelSpec:
    source = LocalPath(type="path", path=str(path))
    return ModelSpec(name="tiny", description="Tiny.", kind="local", context_length=64, sources=(source,))


@pytest.fixture
def parts(tmp_path: Path, words: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three shards of a model; `whole.gguf` beside them holds the same in one file."""
    monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path / "cache"))
    model = tiny_model(Qwen2Config(**SIZES))
    write_gguf(tmp_path / "whole.gguf", "qwen2", model, words)
    write_gguf(tmp_path / "tiny.gguf", "qwen2", model, words, Written(split=12))
    found = sorted(tmp_path.glob("tiny-*.gguf"))
    assert [path.name for path in found] == [f"tiny-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    return found


@pytest.mark.parametrize("named", [0, 2], ids=["first", "last"])
def test_shards_are_one_model_whichever_is_named(parts: list[Path], tmp_path: Path, named: int) -> None:
    folder = pull(spec_of(parts[named])).path
    merged, whole = read_header(folder / "model.gguf"), read_header(tmp_path / "whole.gguf")
    assert {one.name: one.shape for one in merged.tensors} == {one.name: one.shape for one in whole.tensors}
    assert not [key for key in merged.metadata if key.startswith("split.")]
    assert merged.array("tokenizer.ggml.tokens") == whole.array("tokenizer.ggml.tokens")
    (tmp_path / "whole").mkdir()
    convert(tmp_path / "whole.gguf", tmp_path / "whole")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    (tmp_path / "again").mkdir()
    convert(folder / "model.gguf", tmp_path / "again")
    for place in (folder, tmp_path / "again"):
        ours = AutoModelForCausalLM.from_pretrained(place).state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_missing_shard_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(WeightsError, match=r"2 of the 3 shards of tiny; missing: tiny-00002-of-00003\.gguf"):
        pull(spec_of(parts[0]))


def test_shards_of_another_order_or_name_are_refused(parts: list[Path]) -> None:
    second, third = parts[1].read_bytes(), parts[2].read_bytes()
    parts[1].write_bytes(third)
    with pytest.raises(WeightsError, match="it is shard 2 of 3, counted from 0, but its name says 1"):
        pull(spec_of(parts[0]))
    parts[1].write_bytes(second[:-400])
    with pytest.raises(WeightsError, match=r"tiny-00002-of-00003\.gguf is cut short: tensor"):
        pull(spec_of(parts[0]))
    parts[0].rename(parts[0].with_name("first.gguf"))
    with pytest.raises(WeightsError, match="is one of 3 shards, but is not named so"):
        pull(spec_of(parts[0].with_name("first.gguf")))


# --- tokenizers ---------------------------------------------------------------------------------------------


def odd_texts() -> list[str]:
    """A hundred texts: the odd ones, and random mixtures of their parts."""
    rng = random.Random(0)
    texts = list(ODD_TEXTS)
    pieces = [
        *ODD_TEXTS,
        *SPECIAL,
        *USER_DEFINED,
        "the cat",
        " sat",
        "  12",
        "é",
        "\u0301",
        "東京",
        "\n",
        "'s",
    ]
    while len(texts) < 100:
        texts.append("".join(rng.choices(pieces, k=rng.randrange(1, 6))))
    return texts


@pytest.mark.parametrize("pre", ["qwen2", "deepseek-r1-qwen", "llama-bpe", "tekken", "gpt-2"])
def test_a_byte_level_tokenizer_cuts_texts_as_the_source_does(tmp_path: Path, pre: str) -> None:
    how = SPLITTINGS[pre]
    source = byte_level(pre, how.patterns[0], nfc=how.nfc, ignore_merges=how.ignore_merges)
    check_tokenizer(tmp_path, "qwen2", Qwen2Config(**SIZES), source)


def test_a_sentencepiece_tokenizer_cuts_texts_as_the_source_does(tmp_path: Path) -> None:
    source = sentencepiece()
    check_tokenizer(tmp_path, "llama", LlamaConfig(**SIZES | {"vocab_size": 440}), source)


def check_tokenizer(folder: Path, architecture: str, config: PreTrainedConfig, source: Vocabulary) -> None:
    convert(write_gguf(folder / "m.gguf", architecture, tiny_model(config), source), folder, tensors=False)
    ours = LocalModels(Catalogue(())).tokenizer(folder)
    assert len(ours) == len(source.tokens), "what only pads the embedding is no token"
    assert ours.convert_ids_to_tokens(range(len(ours))) == source.tokens
    for text in odd_texts():
        expected = source.tokenizer.encode(text, add_special_tokens=False).ids
        found = ours(text, add_special_tokens=False).input_ids
        assert found == expected, text
        for skip in (False, True):
            assert ours.decode(found, skip_special_tokens=skip) == source.tokenizer.decode(
                expected, skip_special_tokens=skip
            )
    assert not (folder / "model.safetensors").exists()


def test_the_template_and_the_tokens_that_end_a_text_are_kept(tmp_path: Path, words: Vocabulary) -> None:
    from transformers import GenerationConfig

    named = {"tokenizer.chat_template.tool_use": "tools"}
    model = tiny_model(Qwen2Config(**SIZES))
    convert(write_gguf(tmp_path / "m.gguf", "qwen2", model, words, Written(metadata=named)), tmp_path)
    ours = LocalModels(Catalogue(())).tokenizer(tmp_path)
    chat = [{"role": "user", "content": "hi"}]
    prompt = ours.apply_chat_template(chat, tokenize=False)
    assert prompt == "<｜User｜>hi<|im_end|>"
    assert ours(prompt).input_ids[0] == words.tokens.index("<｜User｜>"), "one token, not its bytes"
    assert ours.get_chat_template("tool_use") == "tools"
    ends = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert ends == [words.tokens.index(text) for text in ("<|im_end|>", "<|endoftext|>")]


def _longest_merge(words: Vocabulary) -> str:
    """A merge whose result is longer than every token: the tokenizers library panics."""
    return " ".join(sorted(words.tokens, key=len)[-2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {"pre": "jais"}, r"how its tokenizer splits a text is not known .* is 'jais'"),
        (lambda v: {"kind": "bert"}, "a tokenizer of kind 'bert' is not supported"),
        (lambda v: {"tokens": [*v.tokens[:-1], v.tokens[3]]}, "the tokens 3 and 347 are both"),
        (lambda v: {"merges": ["nowhere at", *v.merges[1:]]}, "its tokens and merges make no tokenizer"),
        (
            lambda v: {"merges": [_longest_merge(v), *v.merges[1:]]},
            "its tokens and merges make no tokenizer",
        ),
        (lambda v: {"merges": ["one", *v.merges[1:]]}, "a merge of the GGUF file names no two tokens"),
        (lambda v: {"types": v.types[:-2]}, "360 tokens but 358 token types"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_an_error(
    tmp_path: Path, words: Vocabulary, change: Callable[[Vocabulary], dict[str, Any]], message: str
) -> None:
    from dataclasses import replace

    model = tiny_model(Qwen2Config(**SIZES))
    path = write_gguf(tmp_path / "m.gguf", "qwen2", model, replace(words, **change(words)))
    with pytest.raises(WeightsError, match=message):
        convert(path, tmp_path)


# --- for llama.cpp, which reads the file itself -------------------------------------------------------------


def test_for_llama_cpp_a_file_stays_where_it_is(
    tmp_path: Path, words: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is unpacked when torch first loads it."""
    monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path / "cache"))
    model = tiny_model(Qwen3Config(**SIZES, head_dim=16))
    path = write_gguf(tmp_path / "tiny.gguf", "qwen3", model, words)
    spec = spec_of(path).model_copy(update={"engine": "llama"})
    folder = pull(spec).path
    assert (folder / "model.gguf").readlink() == path
    assert not list(folder.glob("*.safetensors"))
    assert LocalModels(Catalogue(())).tokenizer(folder).get_vocab()["<｜User｜>"] == 343
    runner = load_runner(folder, engine="torch", device="cpu", dtype="float32")
    ids = list(range(40))
    torch.testing.assert_close(runner.extend([0], [ids])[0], logits(model, ids)[-1], atol=2e-5, rtol=1e-4)
    assert locate(spec) == folder
    path.unlink()
    with pytest.raises(WeightsError, match=r"model\.gguf is missing; run: viaticum models pull tiny"):
        locate(spec)


def test_for_llama_cpp_any_architecture_will_do(tmp_path: Path, words: Vocabulary) -> None:
    model = tiny_model(Qwen2Config(**SIZES))
    written = Written(metadata={"qwen2.expert_count": 4}, drop=["output_norm.weight"])
    path = write_gguf(tmp_path / "m.gguf", "qwen2", model, words, written)
    convert(path, tmp_path, tensors=False)
    assert not (tmp_path / "config.json").exists()
    assert len(LocalModels(Catalogue(())).tokenizer(tmp_path)) == len(words.tokens)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(WeightsError, match="is cut short: tensor"):
        convert(path, tmp_path, tensors=False)
