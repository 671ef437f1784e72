"""Linear layers with packed weights that choose their kernel by the number of rows.

One row is bound by the bytes of weights that it reads, many rows by arithmetic. A layer [N, K] therefore
stores its weights twice: in bfloat16 in oneDNN's own order for any number of rows (the results of
`torch.nn.functional.linear`, up to twice as fast), and in a low-bit form for few rows. The form depends on
the GGUF file and on the shape:

- 4-bit, if the file has Q4_K: its blocks unchanged, groups of 32 along K with a scale and a minimum each,
  these two rounded to bfloat16. 5 bits a weight.
- 8-bit, if the file has another low-bit type: integers with one scale a row of the matrix, rounded from the
  bfloat16 weights. Either in ATen's kernel (`EightBitForm`) or, if N is large compared to K (the output head,
  gate and up), in oneDNN's integer kernel (`IntegerForm`): activations become 16-bit integers with one scale
  a row, split into two digits that pass through the kernel as two rows. Its sums are exact. It reads weights
  faster, but the digits cost about ten small operations.

The two forms of a layer take 2.6 to 3 bytes a weight together, bfloat16 alone takes 2 (1.5B model: 4.6 GB,
0.5B: 1.7 GB, with the embedding); `weights="bfloat16"` uses only that one. Kernels:
`_weight_int4pack_mm_for_cpu` and `_weight_int8pack_mm` of ATen, `qlinear_pointwise` and `_linear_pointwise`
of oneDNN, all in torch's own CPU wheel. Leaves out decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from viaticum.errors import InputError, WeightsError
from viaticum.gguf.blocks import FourBit, four_bit_tensors, quantised_tensors, read_four_bit
from viaticum.gguf.file import read_header
from viaticum.gguf.parallel import ordered_map

Weights = Literal["auto", "plain", "bfloat16", "low-bit"]

# Maximum rows of a form; beyond them bfloat16 is faster. Measured on two Zen 4 cores with the layers of a
# 0.5B and a 1.5B model (benchmarks/call_costs.py). ATen's kernels read the weights again for every four rows.
FOUR_BIT_ROWS = 4
EIGHT_BIT_ROWS = 4
INTEGER_ROWS = 20
KERNEL_ROWS = 4  # oneDNN's integer kernel takes 10 to 20% longer for 2 rows than for 4
MIN_ASPECT = 4  # N / K from which `IntegerForm` is faster than `EightBitForm` in spite of its digits

GROUP = 32  # weights along K that share a scale and a minimum
ZERO_POINT = 128  # a digit is stored as an unsigned byte, this much above its value
MAX_ACTIVATION = 127 * 256  # of a 16-bit activation: its upper digit stays within -127 to 127
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that read the same input


class _Form(Protocol):
    """One packed form of a matrix [N, K] with its bias [N]; bytes: size of the weights."""

    bytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """x bfloat16 [R, K] -> bfloat16 [R, N]."""
        ...


class BFloat16Form:
    """The weights in oneDNN's own order; the same results as `torch.nn.functional.linear`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = bias
        self.bytes = 2 * weight.numel()

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


class EightBitForm:
    """Weights of 8 bits with one scale a row of the matrix."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, scales = _eight_bit(weight)
        self.scales = scales.to(weight.dtype)
        self.bias = bias
        self.bytes = weight.numel()

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scales)
        return out if self.bias is None else out.add_(self.bias)


class IntegerForm:
    """Weights of 8 bits with one scale a row of the matrix, activations of 16, sums exact."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        numbers, self.scales = _eight_bit(weight)
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.weight = torch.ops.onednn.qlinear_prepack(numbers, None)
        self.bias = None if bias is None else bias.float()
        self.bytes = weight.numel()

    def __call__(self, x: Tensor) -> Tensor:
        rows = len(x)
        digits, scales = _two_digits(x)
        sums: Tensor = torch.ops.onednn.qlinear_pointwise(
            digits,
            1.0,
            ZERO_POINT,
            self.weight,
            self.scales,
            self.zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        out = torch.add(sums[:rows], sums[rows : 2 * rows], alpha=256).mul_(scales)
        if self.bias is not None:
            out.add_(self.bias)
        return out.to(x.dtype)


class FourBitForm:
    """Groups of 32 weights of 4 bits: weight = (number - 8) * scale + zero, scale and zero bfloat16."""

    def __init__(self, blocks: FourBit, bias: Tensor | None) -> None:
        numbers = torch.from_numpy(blocks.numbers).int()
        # `clone`, because in some versions of torch the packed tensor is a view with the size of the int32
        # storage.
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1).clone()
        scales = torch.from_numpy(blocks.scales).to(torch.bfloat16)
        # The value of number 8, the middle of the range, is exact up to bfloat16.
        zeros = (8 * torch.from_numpy(blocks.scales) - torch.from_numpy(blocks.minima)).to(torch.bfloat16)
        self.scales = torch.stack((scales.t(), zeros.t()), dim=-1).contiguous()  # [K / 32, N, 2]
        self.bias = bias
        self.bytes = self.weight.numel() + 2 * self.scales.numel()

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, GROUP, self.scales)
        return out if self.bias is None else out.add_(self.bias)


class PackedLinear(nn.Module):
    """A linear layer from K to N features that uses the fastest form for the number of rows.

    forms: (maximum rows, form), rising; the last one takes any number of rows.
    """

    def __init__(self, forms: list[tuple[float, _Form]], in_features: int, out_features: int) -> None:
        super().__init__()
        self.forms = forms
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        form = next(form for limit, form in self.forms if len(rows) <= limit)
        return form(rows).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        forms = ", ".join(f"{type(form).__name__} up to {limit} rows" for limit, form in self.forms)
        return f"in_features={self.in_features}, out_features={self.out_features}, {forms}"


class FusedPart(nn.Module):
    """One of several layers that read the same input: the first one called computes all of them."""

    fused: FusedProjection

    def __init__(self, fused: FusedProjection, index: int) -> None:
        super().__init__()
        self.fused, self.index = fused, index
        self.out_features = fused.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.fused.part(x, self.index)


class FusedProjection:
    """Layers with the same input, their weights stacked in one matrix; keeps outputs until all are taken."""

    def __init__(self, layer: PackedLinear, sizes: list[int]) -> None:
        self.layer, self.sizes = layer, sizes
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def part(self, x: Tensor, index: int) -> Tensor:
        """Output `index` for x [..., K]: [..., sizes[index]]."""
        if x is not self._input:
            self._outputs = self.layer(x).split(self.sizes, dim=-1)
            self._input = x
        output = self._outputs[index]
        if index == len(self.sizes) - 1:
            self._input, self._outputs = None, ()
        return output


@dataclass(frozen=True, slots=True)
class _GgufWeights:
    """The quantised matrices of the GGUF file of the weights; quantised: names of all low-bit ones."""

    quantised: frozenset[str]
    four_bit: Mapping[str, Callable[[], FourBit]]


def pack(model: nn.Module, folder: Path, weights: Weights) -> bool:
    """Replace the linear layers of a causal LM in place; False if `weights` comes out as "plain".

    Layers that read the same input (q, k and v; gate and up) become one matrix.

    Args:
        model: a transformers causal LM.
        folder: that it was loaded from.
        weights: see `load_runner`.

    Raises:
        InputError: "low-bit" or "bfloat16" is not possible with this machine, dtype or folder.
    """
    resolved = _resolve(model, folder, weights)
    if resolved == "plain":
        return False
    file = _read_file(folder) if resolved == "low-bit" else _GgufWeights(frozenset(), {})
    # Two at a time: reading the file's blocks is done by numpy, packing by torch.
    for (parent, _, names), layer in ordered_map(
        lambda job: (job, _packed(*job, file)), _jobs(model), ahead=2
    ):
        if len(names) == 1:
            setattr(parent, names[0], layer)
            continue
        members: list[Any] = [parent.get_submodule(name) for name in names]
        fused = FusedProjection(layer, [member.out_features for member in members])
        for index, name in enumerate(names):
            setattr(parent, name, FusedPart(fused, index))
    return True


def _jobs(model: nn.Module) -> list[tuple[nn.Module, str, tuple[str, ...]]]:
    """(parent module, its name, names of its linear layers that become one); each linear layer once."""
    jobs: list[tuple[nn.Module, str, tuple[str, ...]]] = []
    for prefix, parent in model.named_modules():
        left = [name for name, layer in parent.named_children() if type(layer) is nn.Linear]
        for names in SAME_INPUT:
            if set(names) <= set(left) and len({_inputs(parent.get_submodule(name)) for name in names}) == 1:
                jobs.append((parent, prefix, names))
                left = [name for name in left if name not in names]
        jobs += [(parent, prefix, (name,)) for name in left]
    return jobs


def fused_packed_layer(layers: Sequence[nn.Module]) -> PackedLinear | None:
    """The packed layer that computes exactly these layers; None if they were not packed together."""
    found = {layer.fused for layer in layers if isinstance(layer, FusedPart)}
    if len(found) != 1 or not all(isinstance(layer, FusedPart) for layer in layers):
        return None
    fused = found.pop()
    return fused.layer if len(fused.sizes) == len(layers) else None


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that a call of one row reads, the whole embedding included: a measure of its cost."""
    tensors = {id(one): one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers())}
    packed: dict[int, int] = {}
    for module in model.modules():
        layer = module.fused.layer if isinstance(module, FusedPart) else module
        if isinstance(layer, PackedLinear):
            packed[id(layer)] = layer.forms[0][1].bytes
    return sum(tensors.values()) + sum(packed.values())


def _resolve(model: nn.Module, folder: Path, weights: Weights) -> Weights:
    """`weights` with "auto" resolved: low-bit forms only of weights that came in low-bit blocks."""
    if weights not in ("auto", "plain", "bfloat16", "low-bit"):
        raise InputError(f"weights must be auto, plain, bfloat16 or low-bit, got {weights!r}")
    if weights == "plain":
        return weights
    tensor = next(model.parameters())
    on_cpu = tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16
    bfloat16 = on_cpu and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    low_bit = bfloat16 and torch.cpu._is_vnni_supported() and (folder / "model.gguf").is_file()
    if weights == "auto":
        return "low-bit" if low_bit else "bfloat16" if bfloat16 else "plain"
    if weights == "low-bit" and not low_bit:
        raise InputError(
            f"weights='low-bit' needs {folder / 'model.gguf'}, dtype bfloat16 and a CPU with "
            "AVX-512 VNNI; use 'auto'"
        )
    if not bfloat16:
        raise InputError("weights='bfloat16' needs dtype bfloat16 and a CPU with AVX-512; use 'auto'")
    return weights


def _read_file(folder: Path) -> _GgufWeights:
    """The quantised matrices of model.gguf; none if it cannot be read or has an unknown architecture."""
    try:
        header = read_header(folder / "model.gguf")
        quantised = set(quantised_tensors(header))
        four_bit = {
            name: partial(read_four_bit, header, tensor) for name, tensor in four_bit_tensors(header).items()
        }
    except WeightsError:
        return _GgufWeights(frozenset(), {})
    if all(tensor.name != "output.weight" for tensor in header.tensors):  # the output head is the embedding
        quantised |= {HEAD} if EMBEDDING in quantised else set()
        four_bit |= {HEAD: four_bit[EMBEDDING]} if EMBEDDING in four_bit else {}
    return _GgufWeights(frozenset(quantised), four_bit)


def _inputs(layer: Any) -> tuple[int, bool]:
    return layer.in_features, layer.bias is not None


@torch.inference_mode()
def _packed(parent: nn.Module, prefix: str, members: tuple[str, ...], file: _GgufWeights) -> PackedLinear:
    """Linear layers of a module, stacked, in every form that their weights allow."""
    layers: list[Any] = [parent.get_submodule(name) for name in members]
    names = [f"{prefix}.{name}.weight".lstrip(".") for name in members]
    weight = layers[0].weight.data if len(layers) == 1 else torch.cat([layer.weight.data for layer in layers])
    biases = [layer.bias.data for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    rows, columns = weight.shape
    forms: list[tuple[float, _Form]] = []
    if file.quantised.issuperset(names):
        blocks = _blocks(layers, names, file)
        aligned = rows % 16 == 0 and columns % GROUP == 0  # ATen's kernels need this, and do not check it
        if blocks is not None and aligned:
            forms.append((FOUR_BIT_ROWS, FourBitForm(blocks, bias)))
        elif rows >= MIN_ASPECT * columns:
            forms.append((INTEGER_ROWS, IntegerForm(weight, bias)))
        elif aligned:
            forms.append((EIGHT_BIT_ROWS, EightBitForm(weight, bias)))
    forms.append((float("inf"), BFloat16Form(weight, bias)))
    return PackedLinear(forms, columns, rows)


def _blocks(layers: list[nn.Linear], names: list[str], file: _GgufWeights) -> FourBit | None:
    """The file's 4-bit blocks of all these layers; None if one has none or its weights have changed."""
    if not all(name in file.four_bit for name in names):
        return None
    try:
        found = [file.four_bit[name]() for name in names]
    except WeightsError:  # the file is cut short; the weights beside it are not
        return None
    if not all(_match(layer.weight, blocks) for layer, blocks in zip(layers, found, strict=True)):
        return None
    return FourBit(
        np.concatenate([one.numbers for one in found]),
        np.concatenate([one.scales for one in found]),
        np.concatenate([one.minima for one in found]),
    )


def _match(weight: Tensor, blocks: FourBit, rows: int = 16) -> bool:
    """Whether the first rows of a weight are those of the blocks; they differ if the model was fine-tuned."""
    if tuple(weight.shape) != blocks.numbers.shape:
        return False
    return bool(torch.equal(dequantise(blocks, rows).to(weight.dtype), weight[:rows]))


def dequantise(blocks: FourBit, rows: int | None = None) -> Tensor:
    """Unpack 4-bit blocks: the weights of the first `rows` rows (None: all), float32 [rows, K]."""
    numbers = torch.from_numpy(blocks.numbers[:rows]).float().reshape(-1, blocks.scales.shape[1], GROUP)
    scales, minima = torch.from_numpy(blocks.scales[:rows]), torch.from_numpy(blocks.minima[:rows])
    weights: Tensor = (numbers * scales[..., None] - minima[..., None]).flatten(1)
    return weights


def _eight_bit(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight bfloat16 [N, K] -> int8 [N, K] and float32 scales [N]; in parts that fit a core's cache."""
    scales = torch.empty(len(weight))
    numbers = torch.empty(weight.shape, dtype=torch.int8)
    for first in range(0, len(weight), 256):
        part = weight[first : first + 256].float()
        scale = part.abs().amax(1).clamp_min_(1e-30) / 127
        scales[first : first + 256] = scale
        numbers[first : first + 256] = part.div_(scale[:, None]).round_()
    return numbers, scales


def _two_digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, K] as (low + 256 high) * scale: uint8 [>= 2R, K], low digits first, and float32 scales [R, 1].

    The digits of value v, -MAX_ACTIVATION to MAX_ACTIVATION, are the two bytes of v + 128 * 257, less 128
    each. A NaN anywhere in a row makes its scale, and so its result, NaN.
    """
    values = x.float()
    scales = values.abs().amax(1, keepdim=True).clamp_min_(1e-30).div_(MAX_ACTIVATION)
    shifted = values.div_(scales).add_(ZERO_POINT * 257 + 0.5).to(torch.int32)  # positive: truncation rounds
    digits = shifted.view(torch.uint8).view(*x.shape, 4)[..., :2].movedim(-1, 0).reshape(2 * len(x), -1)
    if len(digits) < KERNEL_ROWS:
        digits = torch.cat((digits, digits))  # padding: the values of the additional rows are not used
    return digits, scales
