"""GGUF files unpacked here hold bit for bit what transformers makes of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import MissingExtra, WeightsError
from viaticum.gguf.conversion import convert
from viaticum.gguf.file import read_header
from viaticum.gguf.parallel import ordered_map
from viaticum.weight_sources import LocalPath
from viaticum.weights import locate, pull

HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 256, 4, 2, 512, 2  # multiples of 256, the block of K-quants
TOKENS = [*(chr(code) for code in range(33, 127)), "Ġ", "Ċ", "ab", "abc", "<|end|>"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path: Path, architecture: str, *, tied: bool, extra: dict[str, Any] | None = None) -> Path:
    """A tiny random model, its matrices in four block types, its norms and biases in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    if architecture == "llama":
        writer.add_rope_dimension_count(HIDDEN // HEADS)
        writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if architecture == "qwen2" else "smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 1) + [3])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(len(TOKENS) - 1)
    writer.add_eos_token_id(len(TOKENS) - 1)
    writer.add_pad_token_id(len(TOKENS) - 1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}")
    for key, value in (extra or {}).items():
        writer.add_string(key, value)

    random = np.random.default_rng(0)
    kinds = gguf.GGMLQuantizationType

    def blocks(name: str, rows: int, columns: int, kind: Any) -> None:
        size, width = gguf.GGML_QUANT_SIZES[kind]
        raw = random.integers(0, 60, size=(rows, columns // size * width), dtype=np.uint8)
        if kind == kinds.Q8_0:
            raw = gguf.quants.quantize(random.normal(size=(rows, columns)).astype(np.float32), kind)
        writer.add_tensor(name, raw, raw_dtype=kind)

    def floats(name: str, size: int) -> None:
        writer.add_tensor(name, random.normal(size=size).astype(np.float32))

    blocks("token_embd.weight", len(TOKENS), HIDDEN, kinds.Q8_0)
    if not tied:
        blocks("output.weight", len(TOKENS), HIDDEN, kinds.Q6_K)
    floats("output_norm.weight", HIDDEN)
    narrow = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        prefix = f"blk.{layer}"
        floats(f"{prefix}.attn_norm.weight", HIDDEN)
        floats(f"{prefix}.ffn_norm.weight", HIDDEN)
        for name, rows in (
            ("attn_q", HIDDEN),
            ("attn_k", narrow),
            ("attn_v", narrow),
            ("attn_output", HIDDEN),
        ):
            blocks(f"{prefix}.{name}.weight", rows, HIDDEN, kinds.Q4_K)
            if architecture == "qwen2" and name != "attn_output":
                floats(f"{prefix}.{name}.bias", rows)
        blocks(f"{prefix}.ffn_gate.weight", INNER, HIDDEN, kinds.Q5_0)
        blocks(f"{prefix}.ffn_up.weight", INNER, HIDDEN, kinds.Q5_0)
        blocks(f"{prefix}.ffn_down.weight", HIDDEN, INNER, kinds.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def spec_of(path: Path) -> ModelSpec:
    source = LocalPath(type="path", path=str(path))
    return ModelSpec(name="tiny", description="Tiny.", kind="local", context_length=64, sources=(source,))


@pytest.mark.parametrize(("architecture", "tied"), [("qwen2", False), ("llama", True)])
def test_the_folder_equals_what_transformers_reads_from_the_file(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    path = write_gguf(tmp_path / "tiny.gguf", architecture, tied=tied)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)

    folder = pull(spec_of(path)).path
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert ours.dtype == torch.bfloat16
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    their_config, our_config = theirs.config.to_dict(), ours.config.to_dict()
    told = {"_name_or_path", "_model_name_or_path", "architectures", "unk_token_id"}
    assert {k: v for k, v in our_config.items() if k not in told} == {
        k: v for k, v in their_config.items() if k not in told
    }
    assert ours.generation_config.eos_token_id == len(TOKENS) - 1

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "abc ab\nzab<|end|>"
    assert tokenizer(text).input_ids == their_tokenizer(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = [{"role": "user", "content": "abc"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "abc<|end|>"

    assert (folder / "model.gguf").read_bytes() == path.read_bytes()
    assert locate(spec_of(path)) == folder


def test_the_header_says_what_the_writer_wrote(tmp_path: Path) -> None:
    header = read_header(write_gguf(tmp_path / "tiny.gguf", "qwen2", tied=True))
    assert header.architecture == "qwen2"
    assert header.of_architecture("block_count") == LAYERS
    assert header.tensors[0].shape == (len(TOKENS), HIDDEN)
    assert header.metadata["tokenizer.ggml.tokens"].count == len(TOKENS)
    with pytest.raises(WeightsError, match=r"the GGUF metadata lacks qwen2\.expert_count"):
        header.of_architecture("expert_count")


def test_a_file_cut_short_or_no_gguf_at_all_is_named(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf", "qwen2", tied=True).read_bytes()
    broken = tmp_path / "broken.gguf"
    for text, message in [
        (b"", "is not a readable GGUF file"),
        (b"GGML" + whole[4:], "does not begin with GGUF"),
        (whole[:4] + b"\x09" + whole[5:], "it has version 9, known are 2 and 3"),
        (whole[:100], "is not a readable GGUF file"),
        (whole[:2000], "is not a readable GGUF file"),
        (whole[:-5000], "is cut short: tensor"),
    ]:
        broken.write_bytes(text)
        with pytest.raises(WeightsError, match=message) as caught:
            pull(spec_of(broken))
        assert "broken.gguf" in str(caught.value) or "model.gguf" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"'gemma' is not supported; known: qwen2, .* give the entry engine = \"llama\""
    ):
        pull(spec_of(write_gguf(tmp_path / "gemma.gguf", "gemma", tied=True)))
    scaled = write_gguf(
        tmp_path / "scaled.gguf", "llama", tied=True, extra={"llama.rope.scaling.type": "longrope"}
    )
    with pytest.raises(
        WeightsError, match="scaling of type 'longrope' is not supported; known: linear, yarn"
    ):
        pull(spec_of(scaled))


def test_without_the_extra_its_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "qwen2", tied=True)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        MissingExtra, match=r"transformers is not installed; run: pip install 'viaticum\[local\]'"
    ):
        pull(spec_of(path))


def test_a_kill_while_unpacking_ends_well(tmp_path: Path, cache: Path) -> None:
    spec = spec_of(write_gguf(tmp_path / "tiny.gguf", "qwen2", tied=True))
    code = f"""
import time
from viaticum.catalogue import ModelSpec
from viaticum.weights import pull
def report(stage, done, total):
    print(stage, flush=True)
    time.sleep(600)
pull(ModelSpec.model_validate_json({spec.model_dump_json()!r}), report)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "unpacking\n"
    process.kill()
    process.communicate()
    assert list(cache.glob("tmp/tiny/*/folder/model.safetensors"))
    with pytest.raises(WeightsError, match="are not on this machine"):
        locate(spec)
    assert (pull(spec).path / "model.safetensors").is_file()
    assert not list(cache.glob("tmp/tiny"))


def test_ordered_map_keeps_the_order_and_raises_what_the_work_raised() -> None:
    assert list(ordered_map(lambda number: number * number, range(20), ahead=3)) == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(lambda number: 1 // number, [1, 0, 1]))


def test_reports_reach_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = write_gguf(tmp_path / "tiny.gguf", "qwen2", tied=True)
    (tmp_path / "out").mkdir()
    convert(path, tmp_path / "out", lambda done, total: seen.append((done, total)))
    assert seen[-1] == (read_header(path).bfloat16_bytes,) * 2


@pytest.mark.real
def test_the_real_small_model_loads_from_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.delenv("VIATICUM_CACHE")
    folder = pull(Catalogue.load()["qwen2.5-coder-0.5b"]).path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.config.vocab_size == 151936
    chat = [{"role": "user", "content": "What is 2 + 3? Answer with a number."}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "5" in tokenizer.decode(written[0, prompt["input_ids"].shape[1] :])
