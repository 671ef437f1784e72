"""Unpacking the blocks of a tensor: into bfloat16, or 4-bit blocks as they are.

The gguf package unpacks the blocks: all K- and IQ-quants, MXFP4, float16, bfloat16 and float32.
`read_four_bit` gives the blocks of Q4_K as they are, for a kernel that multiplies with them; it needs numpy
alone. Leaves out what the tensors are called (`viaticum.gguf.architectures`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from viaticum.errors import MissingExtra, WeightsError
from viaticum.gguf.architectures import ARCHITECTURES, interleaved_heads, transformers_names
from viaticum.gguf.file import Header, Tensor

CHUNK = 1 << 18  # weights unpacked at a time: their float32 form (1 MB) stays in a core's cache
Q4_K, Q4_K_BYTES, Q4_K_WEIGHTS, GROUP = 12, 144, 256, 32  # ggml's type number; bytes and weights of a block
UNQUANTISED = frozenset({0, 1, 28, 30})  # float32, float16, float64, bfloat16

Number = TypeVar("Number", bound=np.generic)


def check_complete(header: Header) -> None:
    """Check that every tensor lies whole in its file, in rows of whole blocks, and none in another.

    Raises:
        WeightsError: a file is cut short or damaged, or a block type is not known.
        MissingExtra: the package gguf is not installed.
    """
    sizes = {path: path.stat().st_size for path in header.paths}
    ends: dict[Any, int] = {}
    for tensor in sorted(header.tensors, key=lambda each: (str(each.path), each.start)):
        begin, end = tensor_bytes(tensor)
        if end > sizes[tensor.path]:
            raise WeightsError(
                f"{tensor.path} is cut short: tensor {tensor.name!r} ends at byte {end} of"
                f" {sizes[tensor.path]}"
            )
        if begin < ends.get(tensor.path, 0):
            raise WeightsError(f"{tensor.path} is damaged: tensor {tensor.name!r} overlaps the one before it")
        ends[tensor.path] = end


def tensor_bytes(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins and ends in its file; raises as `check_complete`."""
    block_weights, block_bytes = _block_size(tensor)
    if tensor.shape[-1] % block_weights:
        raise WeightsError(
            f"{tensor.path}: the rows of tensor {tensor.name!r} have {tensor.shape[-1]} weights, which is no"
            f" multiple of the {block_weights} in a block"
        )
    return tensor.start, tensor.start + prod(tensor.shape) // block_weights * block_bytes


def read_bfloat16(header: Header, tensor: Tensor) -> npt.NDArray[np.uint16]:
    """One tensor of any block type as transformers holds it, unpacked to the bits of bfloat16, flat.

    Raises:
        WeightsError: the file is cut short, or the block type is not known.
        MissingExtra: the package gguf is not installed.
    """
    architecture = ARCHITECTURES.get(header.architecture)
    shifted = architecture is not None and tensor.name.endswith("norm.weight")
    offset = architecture.norm_offset if architecture is not None and shifted else 0.0
    out = np.empty(prod(tensor.shape), dtype=np.uint16)
    for first, values in _unpacked(tensor):
        out[first : first + len(values)] = _to_bfloat16(values - offset if offset else values)
    if (heads := interleaved_heads(header, tensor)) is not None:
        out = _undo_rotary_order(out.reshape(tensor.shape), heads).reshape(-1)
    return out


def float32_values(tensor: Tensor) -> npt.NDArray[np.float32]:
    """A small tensor in float32, flat, as it stands in the file."""
    return np.concatenate([values for _, values in _unpacked(tensor)])


def _unpacked(tensor: Tensor) -> Any:
    """Pairs of the index of a weight and the float32 weights from there on, in pieces of `CHUNK`."""
    try:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise MissingExtra("gguf", "local") from None

    kind = GGMLQuantizationType(tensor.type)
    block_weights, block_bytes = _block_size(tensor)
    begin, end = tensor_bytes(tensor)
    blob = np.memmap(tensor.path, dtype=np.uint8, mode="r")
    if end > len(blob):
        raise WeightsError(
            f"{tensor.path} is cut short: tensor {tensor.name!r} ends at byte {end} of {len(blob)}"
        )
    packed = blob[begin:end]
    count = prod(tensor.shape)
    for first in range(0, count, CHUNK):
        last = min(first + CHUNK, count)
        piece = packed[first // block_weights * block_bytes : last // block_weights * block_bytes]
        # One long row: the gguf package would otherwise go through the matrix sixteen rows at a time.
        try:
            yield first, dequantize(piece.reshape(1, -1), kind).reshape(-1)
        except NotImplementedError:
            raise WeightsError(
                f"{tensor.path}: tensor {tensor.name!r} has the block type {kind.name}, which the package"
                ' gguf does not unpack; llama.cpp may: give the entry engine = "llama"'
            ) from None


def _block_size(tensor: Tensor) -> tuple[int, int]:
    """Weights and bytes of one block."""
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise MissingExtra("gguf", "local") from None
    try:
        weights, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type)]
    except (ValueError, KeyError):
        raise WeightsError(
            f"{tensor.path}: tensor {tensor.name!r} has the block type {tensor.type}, which the package gguf"
            " does not know; a newer version may"
        ) from None
    return int(weights), int(size)


def _to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper half of each float32, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _undo_rotary_order(weights: npt.NDArray[Number], heads: int) -> npt.NDArray[Number]:
    """From llama.cpp's interleaved rotary heads, (heads, half, 2, ...), to halves, (heads, 2, half, ...)."""
    pairs = weights.reshape(heads, weights.shape[0] // heads // 2, 2, *weights.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weights.shape)


# --- 4-bit blocks as they are -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FourBit:
    """A matrix [N, K] in groups of 32 along K: weight = number * scale - minimum.

    numbers: uint8 [N, K], 0 to 15; scales and minima: float32 [N, K / 32].
    """

    numbers: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    minima: npt.NDArray[np.float32]


def four_bit_tensors(header: Header) -> dict[str, Tensor]:
    """The matrices whose blocks `read_four_bit` reads (Q4_K), by the names transformers gives them."""
    return {name: tensor for name, tensor in transformers_names(header).items() if tensor.type == Q4_K}


def quantised_tensors(header: Header) -> list[str]:
    """Transformers' names of the matrices that the file holds in low-bit blocks of any kind."""
    return [
        name
        for name, tensor in transformers_names(header).items()
        if len(tensor.shape) == 2 and tensor.type not in UNQUANTISED
    ]


def read_four_bit(header: Header, tensor: Tensor) -> FourBit:
    """Take the Q4_K blocks of a matrix apart without losing a bit.

    A block (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, block_q4_K) is two float16, the
    steps of scales and minima; 12 bytes with eight 6-bit scales and eight 6-bit minima; and 128 bytes of
    numbers, of which each 32 hold one group in their lower and the next in their upper halves.

    Raises:
        WeightsError: the file is cut short or has another architecture than `convert` knows.
    """
    rows, columns = tensor.shape
    count = rows * columns // Q4_K_WEIGHTS
    blob = np.memmap(tensor.path, dtype=np.uint8, mode="r")
    if tensor.start + count * Q4_K_BYTES > len(blob):
        raise WeightsError(f"{tensor.path} is cut short at tensor {tensor.name!r}")
    blocks = blob[tensor.start : tensor.start + count * Q4_K_BYTES].reshape(count, Q4_K_BYTES)
    steps = blocks[:, :4].copy().view(np.float16).astype(np.float32)  # [count, 2]
    small = _six_bit(blocks[:, 4:16]).astype(np.float32)  # [count, 2, 8]: scales, minima
    packed = blocks[:, 16:].reshape(count, 4, 1, GROUP)
    numbers = np.concatenate((packed & 15, packed >> 4), axis=2)  # [count, 4, 2, 32]
    found = (
        numbers.reshape(rows, columns),
        (steps[:, :1] * small[:, 0]).reshape(rows, columns // GROUP),
        (steps[:, 1:] * small[:, 1]).reshape(rows, columns // GROUP),
    )
    if (heads := interleaved_heads(header, tensor)) is not None:
        found = tuple(_undo_rotary_order(part, heads) for part in found)  # type: ignore[assignment]
    return FourBit(*found)


def _six_bit(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """12 bytes a block -> [count, 2, 8].

    The first four scales and minima lie whole in bytes 0-3 and 4-7; of the others the lower
    four bits are in bytes 8-11 and the upper two on top of the first four.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate((first & 63, (third & 15) | ((first >> 6) << 4)), axis=1)
    minima = np.concatenate((second & 63, (third >> 4) | ((second >> 6) << 4)), axis=1)
    return np.stack((scales, minima), axis=1)
