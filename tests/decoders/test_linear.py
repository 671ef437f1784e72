"""Packed linear layers against plain matrix products, and packed models against plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from viaticum.decoders import linear, load_runner
from viaticum.decoders.fused_layers import FusedAttention
from viaticum.decoders.linear import (
    BFloat16Form,
    EightBitForm,
    FourBitForm,
    IntegerForm,
    PackedLinear,
    dequantise,
    pack,
    weight_bytes,
)
from viaticum.errors import InputError, WeightsError
from viaticum.gguf.blocks import FourBit, four_bit_tensors, read_four_bit
from viaticum.gguf.conversion import convert
from viaticum.gguf.file import read_header

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported() or not torch.cpu._is_vnni_supported(),
    reason="packed weights need a CPU with AVX-512",
)

ROWS = (1, 2, 3, 4, 5, 8, 20, 21, 64)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def blocks_of(rows: int, columns: int) -> FourBit:
    random = np.random.default_rng(0)
    groups = (rows, columns // 32)
    return FourBit(
        random.integers(0, 16, (rows, columns), dtype=np.uint8),
        random.uniform(0.001, 0.02, groups).astype(np.float32),
        random.uniform(0.0, 0.15, groups).astype(np.float32),
    )


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(64, 256), (48, 32), (16, 96), (200, 128), (1000, 64)])
def test_every_form_is_the_product_within_its_rounding(shape: tuple[int, int], rows: int, bias: bool) -> None:
    n, k = shape
    blocks = blocks_of(n, k)
    exact = dequantise(blocks)
    weight = exact.to(torch.bfloat16)
    offset = torch.randn(n).to(torch.bfloat16) if bias else None
    x = torch.randn(rows, k).to(torch.bfloat16)
    wanted = x.float() @ exact.t() + (offset.float() if offset is not None else 0)

    # bfloat16 keeps 8 bits; an int8 step is a 254th of a row's range, near 1% of the weights' own size.
    forms: list[tuple[Any, float]] = [
        (BFloat16Form(weight, offset), 0.006),
        (IntegerForm(weight, offset), 0.02),
    ]
    if n % 16 == 0:
        forms += [(FourBitForm(blocks, offset), 0.008), (EightBitForm(weight, offset), 0.02)]
    for form, bound in forms:
        found = form(x)
        assert found.shape == (rows, n)
        assert found.dtype == torch.bfloat16
        assert distance(found, wanted) < bound, type(form).__name__


@pytest.mark.parametrize("shape", [(30, 100), (7, 33), (1, 8)])
def test_odd_shapes_work_in_the_forms_that_take_any(shape: tuple[int, int]) -> None:
    n, k = shape
    weight, x = torch.randn(n, k).to(torch.bfloat16), torch.randn(3, k).to(torch.bfloat16)
    wanted = x.float() @ weight.float().t()
    for form in (BFloat16Form(weight, None), IntegerForm(weight, None)):
        assert distance(form(x), wanted) < 0.02


def test_shapes_that_a_kernel_does_not_take_fall_back_to_bfloat16(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = nn.ModuleDict({"odd": nn.Linear(100, 30), "even": nn.Linear(96, 48), "wide": nn.Linear(10, 90)})
    names = frozenset(f"{name}.weight" for name in model)
    monkeypatch.setattr(linear, "_read_file", lambda folder: linear._GgufWeights(names, {}))
    (tmp_path / "model.gguf").touch()
    pack(model.to(torch.bfloat16), tmp_path, "low-bit")
    forms = {name: [type(form) for _, form in layer.forms] for name, layer in model.items()}
    assert forms == {
        "odd": [BFloat16Form],
        "even": [EightBitForm, BFloat16Form],
        "wide": [IntegerForm, BFloat16Form],
    }


def test_bfloat16_form_gives_the_numbers_of_a_plain_layer() -> None:
    layer = nn.Linear(96, 80).to(torch.bfloat16)
    x = torch.randn(5, 96).to(torch.bfloat16)
    with torch.inference_mode():
        found = BFloat16Form(layer.weight.data, layer.bias.data)(x)
        assert distance(found, layer(x).float()) < 0.004


def test_integer_sums_do_not_depend_on_the_other_rows() -> None:
    weight = torch.randn(512, 96).to(torch.bfloat16)
    form = IntegerForm(weight, None)
    x = torch.randn(9, 96).to(torch.bfloat16) * torch.logspace(-3, 3, 9)[:, None].to(torch.bfloat16)
    together = form(x)
    for row in range(len(x)):
        assert torch.equal(form(x[row : row + 1]), together[row : row + 1])


def test_sixteen_bit_activations_lose_next_to_nothing() -> None:
    x = torch.randn(6, 500).to(torch.bfloat16)
    x[0] = 0
    x[1, 3] = 1000
    digits, scales = linear._two_digits(x)
    low, high = digits[:6].float() - 128, digits[6:].float() - 128
    back = (low + 256 * high) * scales
    assert (
        float((back - x.float()).abs().div(x.float().abs().amax(1, keepdim=True).clamp_min(1e-9)).max())
        < 2e-5
    )
    assert torch.equal(back[0], torch.zeros(500))


def test_a_damaged_activation_is_not_hidden() -> None:
    x = torch.randn(2, 64).to(torch.bfloat16)
    x[1, 5] = float("nan")
    weight = torch.randn(256, 64).to(torch.bfloat16)
    for form in (IntegerForm(weight, None), EightBitForm(weight, None)):
        found = form(x)
        assert torch.isfinite(found[0]).all()
        assert not torch.isfinite(found[1]).any()


class Tiny(nn.Module):
    """Layers named as transformers names them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, 64), nn.Linear(32, 16)
        self.v_proj, self.o_proj = nn.Linear(32, 16), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(q) * k.sum(-1, keepdim=True) + v.mean(-1, keepdim=True)  # type: ignore[no-any-return]


@torch.inference_mode()
def test_layers_with_the_same_input_are_joined_and_give_the_same(tmp_path: Path) -> None:
    model = Tiny().to(torch.bfloat16)
    inputs = [torch.randn(2, rows, 32).to(torch.bfloat16) for rows in (1, 3)]
    wanted = [model(x) for x in inputs]
    before = weight_bytes(model)
    pack(model, tmp_path, "bfloat16")
    for x, expected in zip(inputs, wanted, strict=True):
        assert distance(model(x), expected.float()) < 0.01
        assert model(x).shape == expected.shape
    assert isinstance(model.o_proj, PackedLinear)
    assert not isinstance(model.q_proj, nn.Linear)
    assert weight_bytes(model) == before - 2 * (64 + 16 + 16)  # biases are not counted


def test_what_does_not_fit_stays_as_it_is(tmp_path: Path) -> None:
    model = Tiny()  # float32
    pack(model, tmp_path, "auto")
    assert isinstance(model.q_proj, nn.Linear)
    with pytest.raises(InputError, match="bfloat16"):
        pack(model, tmp_path, "bfloat16")
    with pytest.raises(InputError, match=r"model\.gguf"):
        pack(model.to(torch.bfloat16), tmp_path, "low-bit")
    with pytest.raises(InputError, match="weights must be"):
        pack(model, tmp_path, "int3")  # type: ignore[arg-type]
    pack(model, tmp_path, "plain")
    assert isinstance(model.q_proj, nn.Linear)


@pytest.fixture(params=["qwen2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model as `pull` leaves it: model.gguf with several block types, model.safetensors."""
    write_gguf(tmp_path / "model.gguf", request.param)
    convert(tmp_path / "model.gguf", tmp_path)
    return tmp_path


def write_gguf(path: Path, architecture: str) -> None:
    hidden, inner, heads = 256, 512, 4
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = ["<|end|>", *letters, "Ġ", "ab", *(f"<{n}>" for n in range(15))]  # 112: a multiple of 16
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if architecture == "qwen2" else "smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] + [1] * (len(vocabulary) - 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    random = np.random.default_rng(0)
    kinds = gguf.GGMLQuantizationType

    def matrix(name: str, rows: int, columns: int, kind: Any) -> None:
        if kind == kinds.Q4_K:  # the gguf package reads these blocks but does not write them
            data = random.integers(0, 256, (rows, columns // 256, 144), dtype=np.uint8)
            data[..., :4] = np.full(2, 0.002, dtype=np.float16).view(np.uint8)
            writer.add_tensor(name, data.reshape(rows, -1), raw_dtype=kind)
        else:
            values = random.normal(0, 0.05, (rows, columns)).astype(np.float32)
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    matrix("token_embd.weight", len(vocabulary), hidden, kinds.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
    for layer in range(2):
        for name, rows, columns in (
            ("attn_q", hidden, hidden),
            ("attn_k", hidden // 2, hidden),
            ("attn_v", hidden // 2, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            kind = kinds.Q5_0 if (layer, name) in ((1, "attn_v"), (1, "ffn_down")) else kinds.Q4_K
            matrix(f"blk.{layer}.{name}.weight", rows, columns, kind)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, dtype=np.float32))
        if architecture == "qwen2":
            for name, rows in (("attn_q", hidden), ("attn_k", hidden // 2), ("attn_v", hidden // 2)):
                writer.add_tensor(f"blk.{layer}.{name}.bias", random.normal(0, 0.1, rows).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_four_bit_blocks_are_the_files_own(folder: Path) -> None:
    from safetensors.torch import load_file

    header = read_header(folder / "model.gguf")
    unpacked = load_file(folder / "model.safetensors")
    tensors = four_bit_tensors(header)
    assert len(tensors) == 12
    for name, tensor in tensors.items():
        assert torch.equal(dequantise(read_four_bit(header, tensor)).to(torch.bfloat16), unpacked[name]), name


@torch.inference_mode()
def test_a_model_with_packed_weights_says_what_the_plain_one_says(folder: Path) -> None:

    plain, packed = load_runner(folder, weights="plain"), load_runner(folder)
    kinds = {
        type(form).__name__
        for module in packed.model.modules()
        if isinstance(module, PackedLinear)
        for _, form in module.forms
    }
    assert kinds == {"FourBitForm", "EightBitForm", "BFloat16Form"}
    head = packed.model.lm_head.forms  # tied to the embedding, which the file has in Q8_0
    assert [type(form) for _, form in head] == [EightBitForm, BFloat16Form]
    assert isinstance(packed.model.model.layers[0].self_attn, FusedAttention)
    joined = packed.model.model.layers[0].self_attn.qkv
    assert [type(form) for _, form in joined.forms] == [FourBitForm, BFloat16Form]
    assert packed.weight_bytes < plain.weight_bytes
    for new in ([5, 6, 7], [8], [9, 10, 11, 12, 13, 14]):  # few rows and more rows than a low-bit form takes
        wanted, found = plain.extend([0], [new]), packed.extend([0], [new])
        assert distance(found, wanted) < 0.05


def test_weights_that_were_tuned_since_are_not_replaced_by_the_files(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.model.layers[0].self_attn.o_proj.weight.data[0, 0] += 1
    pack(model, folder, "low-bit")
    forms = [type(form) for _, form in model.model.layers[0].self_attn.o_proj.forms]
    assert forms == [EightBitForm, BFloat16Form]


def test_a_file_that_cannot_be_read_is_as_good_as_none(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    (folder / "model.gguf").write_bytes(b"GGUF cut short")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    pack(model, folder, "auto")
    assert [type(form) for _, form in model.lm_head.forms] == [BFloat16Form]


def test_a_file_that_is_cut_short_gives_no_blocks(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole = (folder / "model.gguf").read_bytes()
    (folder / "model.gguf").write_bytes(whole[: len(whole) * 2 // 3])
    header = read_header(folder / "model.gguf")
    tensor = list(four_bit_tensors(header).values())[-1]
    with pytest.raises(WeightsError, match="cut short"):
        read_four_bit(header, tensor)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    pack(model, folder, "low-bit")
    kinds = [type(layer.mlp.gate_proj.fused.layer.forms[0][1]) for layer in model.model.layers]
    assert kinds == [FourBitForm, IntegerForm]
