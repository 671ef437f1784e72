"""Linear layers that hold their weights packed, and pick the kernel by the number of rows.

One row is bound by the bytes of weights that it reads, many rows by arithmetic, so a layer holds up to
three forms of its weights:

- 4-bit: the Q4_K blocks of the GGUF file as they are (groups of 32 along K, a scale and a minimum each, these
  two rounded to bfloat16): about 5 bits a weight, dearer with every row. Up to `FOUR_BIT_ROWS`.
- 8-bit: integers with one scale a row of the matrix, rounded from the bfloat16 weights. Activations become
  16-bit integers with one scale a row, split into two digits of 8 bits, which go through the integer kernel as
  two rows: the sums are exact, so a row's result does not depend on its neighbours. Up to `EIGHT_BIT_ROWS`.
- bfloat16, in the blocked order of oneDNN: the numbers of `torch.nn.functional.linear`, up to twice as fast.

Holding all three takes 3.6 bytes a weight where bfloat16 alone takes 2 (the 1.5B model: 5.4 GB, the 0.5B 1.6 GB);
`weights="bfloat16"` keeps to that one form. Knows nothing of decoding. Kernels: `_weight_int4pack_mm_for_cpu`
of ATen, `qlinear_pointwise` and `_linear_pointwise` of oneDNN, all in torch's own CPU wheel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from viaticum.errors import InputError, WeightsError
from viaticum.gguf import FourBit, four_bit_tensors, quantised_tensors, read_four_bit, read_header

Weights = Literal["auto", "plain", "bfloat16", "low-bit"]

# Measured on two Zen 4 cores with the layers of a 1.5B model (benchmarks/kernels.py): beyond so many rows
# the next form is faster.
FOUR_BIT_ROWS = 2
EIGHT_BIT_ROWS = 20

GROUP = 32  # weights along K that share a scale and a minimum
HALF = 128  # a digit is stored as an unsigned byte, this much above its value
LARGEST = 127 * 256  # of a 16-bit activation: its upper digit stays within -127 to 127
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that read the same input


class _Form(Protocol):
    """One packed form of a matrix [N, K] with its bias [N]."""

    bytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """x bfloat16 [R, K] -> bfloat16 [R, N]."""
        ...


class BFloat16Form:
    """The weights in oneDNN's own order; the same numbers as `torch.nn.functional.linear`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = bias
        self.bytes = 2 * weight.numel()

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


class EightBitForm:
    """Weights of 8 bits with one scale a row, activations of 16."""

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
            digits, 1.0, HALF, self.weight, self.scales, self.zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        out = torch.add(sums[:rows], sums[rows : 2 * rows], alpha=256).mul_(scales)
        if self.bias is not None:
            out.add_(self.bias)
        return out.to(x.dtype)


class FourBitForm:
    """Groups of 32 weights of 4 bits: weight = (number - 8) * scale + zero, scale and zero bfloat16."""

    def __init__(self, blocks: FourBit, bias: Tensor | None) -> None:
        numbers = torch.from_numpy(blocks.numbers).int()
        # `clone`, because the packed tensor is a view of the int32 storage's size in some versions of torch.
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1).clone()
        scales = torch.from_numpy(blocks.scales).to(torch.bfloat16)
        # The middle of the group (number 8) is kept exact up to bfloat16, as the file has it.
        zeros = (8 * torch.from_numpy(blocks.scales) - torch.from_numpy(blocks.minima)).to(torch.bfloat16)
        self.scales = torch.stack((scales.t(), zeros.t()), dim=-1).contiguous()  # [K / 32, N, 2]
        self.bias = bias
        self.bytes = self.weight.numel() + 2 * self.scales.numel()

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, GROUP, self.scales)
        return out if self.bias is None else out.add_(self.bias)


class PackedLinear(nn.Module):
    """A linear layer from K to N features that uses the form which is fastest for the rows it is given.

    forms: (most rows, form), rising; the last one takes any number.
    """

    def __init__(self, forms: list[tuple[float, _Form]], in_features: int, out_features: int) -> None:
        super().__init__()
        self.forms = forms
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        form = next(form for most, form in self.forms if len(rows) <= most)
        return form(rows).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        forms = ", ".join(f"{type(form).__name__} up to {most} rows" for most, form in self.forms)
        return f"in_features={self.in_features}, out_features={self.out_features}, {forms}"


class _Together(nn.Module):
    """One of several layers that read the same input: the first one called computes for all."""

    joined: _Joined

    def __init__(self, joined: _Joined, index: int) -> None:
        super().__init__()
        self.joined, self.index = joined, index

    def forward(self, x: Tensor) -> Tensor:
        return self.joined.part(x, self.index)


class _Joined:
    """Layers whose weights lie below each other in one matrix; remembers the last input it has seen."""

    def __init__(self, layer: PackedLinear, sizes: list[int]) -> None:
        self.layer, self.sizes = layer, sizes
        self._seen: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def part(self, x: Tensor, index: int) -> Tensor:
        if x is not self._seen:
            self._parts = self.layer(x).split(self.sizes, dim=-1)
            self._seen = x
        found = self._parts[index]
        if index == len(self.sizes) - 1:
            self._seen, self._parts = None, ()
        return found


@dataclass(frozen=True, slots=True)
class _File:
    """What the GGUF file that the weights came in says of them. quantised: names of its low-bit matrices."""

    quantised: frozenset[str]
    four_bit: Mapping[str, Callable[[], FourBit]]


def pack(model: nn.Module, folder: Path, weights: Weights) -> None:
    """Replace the linear layers of a causal LM in place, as `weights` says; see `Runner.load`.

    Layers that read the same input (q, k and v; gate and up) become one matrix. Raises `InputError` for
    "low-bit" or "bfloat16" where the machine, the dtype or the folder does not allow it.
    """
    wanted = _wanted(model, folder, weights)
    if wanted == "plain":
        return
    file = _read_file(folder) if wanted == "low-bit" else _File(frozenset(), {})
    for prefix, parent in list(model.named_modules()):
        for names in TOGETHER:
            layers = [parent._modules.get(name) for name in names]
            if (
                all(type(layer) is nn.Linear for layer in layers)
                and len({_inputs(one) for one in layers}) == 1
            ):
                _join(parent, prefix, names, file)
        for name, layer in list(parent._modules.items()):
            if type(layer) is nn.Linear:
                setattr(parent, name, _packed([layer], [_joined_name(prefix, name)], file))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that a call of one row goes by, the embedding counted whole: a measure of its cost."""
    tensors = {id(one): one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers())}
    packed: dict[int, int] = {}
    for module in model.modules():
        layer = module.joined.layer if isinstance(module, _Together) else module
        if isinstance(layer, PackedLinear):
            packed[id(layer)] = layer.forms[0][1].bytes
    return sum(tensors.values()) + sum(packed.values())


def _wanted(model: nn.Module, folder: Path, weights: Weights) -> Weights:
    """`weights` with "auto" decided: low-bit forms only of weights that came in low-bit blocks."""
    if weights not in ("auto", "plain", "bfloat16", "low-bit"):
        raise InputError(f"weights must be auto, plain, bfloat16 or low-bit, got {weights!r}")
    if weights == "plain":
        return weights
    tensor = next(model.parameters())
    fits = tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16
    able = fits and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    low_able = able and torch.cpu._is_vnni_supported()
    has_file = (folder / "model.gguf").is_file()
    if weights == "auto":
        return "low-bit" if low_able and has_file else "bfloat16" if able else "plain"
    if weights == "low-bit" and not (low_able and has_file):
        raise InputError(
            f"weights='low-bit' needs {folder / 'model.gguf'}, dtype bfloat16 and a CPU with AVX-512 VNNI; use 'auto'"
        )
    if not able:
        raise InputError("weights='bfloat16' needs dtype bfloat16 and a CPU with AVX-512; use 'auto'")
    return weights


def _read_file(folder: Path) -> _File:
    """A file that cannot be read, or of an unknown architecture, has no low-bit matrices."""
    try:
        header = read_header(folder / "model.gguf")
        quantised = frozenset(quantised_tensors(header))
        tensors = four_bit_tensors(header)
    except WeightsError:
        return _File(frozenset(), {})
    return _File(
        quantised,
        {name: lambda tensor=tensor: read_four_bit(header, tensor) for name, tensor in tensors.items()},  # type: ignore[misc]
    )


def _inputs(layer: Any) -> tuple[int, bool]:
    return layer.in_features, layer.bias is not None


def _joined_name(prefix: str, name: str) -> str:
    return f"{prefix}.{name}.weight" if prefix else f"{name}.weight"


def _join(parent: nn.Module, prefix: str, names: tuple[str, ...], file: _File) -> None:
    layers: list[Any] = [parent._modules[name] for name in names]
    packed = _packed(layers, [_joined_name(prefix, name) for name in names], file)
    joined = _Joined(packed, [layer.out_features for layer in layers])
    for index, name in enumerate(names):
        setattr(parent, name, _Together(joined, index))


@torch.inference_mode()
def _packed(layers: list[nn.Linear], names: list[str], file: _File) -> PackedLinear:
    """The layers, one below the other, in every form that their weights allow."""
    weight = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight.data for layer in layers])
    biases = [layer.bias.data for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    rows, columns = weight.shape
    forms: list[tuple[float, _Form]] = []
    if file.quantised.issuperset(names):
        blocks = _blocks(layers, names, file)
        if blocks is not None and rows % 16 == 0 and columns % GROUP == 0:
            forms.append((FOUR_BIT_ROWS, FourBitForm(blocks, bias)))
        forms.append((EIGHT_BIT_ROWS, EightBitForm(weight, bias)))
    forms.append((float("inf"), BFloat16Form(weight, bias)))
    return PackedLinear(forms, columns, rows)


def _blocks(layers: list[nn.Linear], names: list[str], file: _File) -> FourBit | None:
    """The file's 4-bit blocks of all these layers; None where one has none, or holds other weights now."""
    import numpy as np

    if not all(name in file.four_bit for name in names):
        return None
    found = [file.four_bit[name]() for name in names]
    if not all(_same(layer.weight, blocks) for layer, blocks in zip(layers, found, strict=True)):
        return None
    return FourBit(
        np.concatenate([one.numbers for one in found]),
        np.concatenate([one.scales for one in found]),
        np.concatenate([one.minima for one in found]),
    )


def _same(weight: Tensor, blocks: FourBit, rows: int = 16) -> bool:
    """Whether the model's weights are those of the blocks, by the first few rows: someone may have tuned them."""
    if tuple(weight.shape) != blocks.numbers.shape:
        return False
    return bool(torch.equal(dequantise(blocks, rows).to(weight.dtype), weight[:rows]))


def dequantise(blocks: FourBit, rows: int | None = None) -> Tensor:
    """The weights of the blocks' first rows, float32 [rows, K]."""
    numbers = torch.from_numpy(blocks.numbers[:rows]).float().reshape(-1, blocks.scales.shape[1], GROUP)
    scales, minima = torch.from_numpy(blocks.scales[:rows]), torch.from_numpy(blocks.minima[:rows])
    found: Tensor = (numbers * scales[..., None] - minima[..., None]).flatten(1)
    return found


def _eight_bit(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight bfloat16 [N, K] -> int8 [N, K] and float32 scales [N]. A few rows at a time stay in a core's cache."""
    scales = torch.empty(len(weight))
    numbers = torch.empty(weight.shape, dtype=torch.int8)
    for first in range(0, len(weight), 256):
        part = weight[first : first + 256].float()
        scale = part.abs().amax(1).clamp_min_(1e-30) / 127
        scales[first : first + 256] = scale
        numbers[first : first + 256] = part.div_(scale[:, None]).round_()
    return numbers, scales


def _two_digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, K] as (low + 256 high) * scale: uint8 [2R or more, K], low digits first, and float32 scales [R, 1].

    The digits of value v, -LARGEST to LARGEST, are the two bytes of v + 128 * 257, less 128 each. A NaN
    anywhere in a row makes its scale, and so its result, NaN.
    """
    values = x.float()
    scales = values.abs().amax(1, keepdim=True).clamp_min_(1e-30).div_(LARGEST)
    shifted = values.div_(scales).add_(HALF * 257 + 0.5).to(torch.int32)  # positive: truncation rounds
    pairs = shifted.view(torch.uint8).view(*x.shape, 4)[..., :2]
    return pairs.movedim(-1, 0).reshape(2 * len(x), -1), scales
