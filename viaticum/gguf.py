"""From a GGUF file to a folder that transformers reads: config, tokenizer, bfloat16 safetensors.

Reads GGUF versions 2 and 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and the tensor
names of the `llama` and `qwen2` architectures; any other is refused by name. The blocks are unpacked by
the gguf package and the tokenizer is built by transformers. `from_pretrained(gguf_file=...)` gives the
same tensors, but reads the metadata three times in pure Python, which takes most of a minute.
`read_four_bit` gives the 4-bit blocks as they are, for a kernel that multiplies with them; it needs numpy
alone. Leaves out where the file came from: see `viaticum.weights`.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from viaticum.errors import MissingExtra, WeightsError

CHUNK = 1 << 18  # weights unpacked at a time: their float32 form (1 MB) stays in a core's cache

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class _Classes(NamedTuple):
    """The names of the transformers classes of an architecture."""

    model: str
    tokenizer: str


_CLASSES = {
    "qwen2": _Classes("Qwen2ForCausalLM", "Qwen2Tokenizer"),
    "llama": _Classes("LlamaForCausalLM", "PreTrainedTokenizerFast"),
}

Q4_K, Q4_K_BYTES, Q4_K_WEIGHTS, GROUP = 12, 144, 256, 32  # ggml's type number; bytes and weights of a block
UNQUANTISED = frozenset({0, 1, 28, 30})  # float32, float16, float64, bfloat16

Item = TypeVar("Item")
Result = TypeVar("Result")
Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file: its GGUF name, its shape in torch's order, its block type and byte range."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says about itself. Arrays of the metadata are left out, but for their length."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def of_architecture(self, key: str) -> Any:
        """A value under the architecture's own prefix, e.g. `qwen2.block_count`."""
        try:
            return self.metadata[f"{self.architecture}.{key}"]
        except KeyError:
            raise WeightsError(f"{self.path}: the GGUF metadata lacks {self.architecture}.{key}") from None

    @property
    def bfloat16_bytes(self) -> int:
        """How much the tensors take once unpacked to two bytes a weight."""
        return 2 * sum(prod(tensor.shape) for tensor in self.tensors)


def read_header(path: Path) -> Header:
    """The metadata and tensor table of a GGUF file; `WeightsError` if it is none or is cut short."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _Cursor(view).header(path)
    except (struct.error, KeyError, IndexError, UnicodeDecodeError, ValueError) as error:
        raise WeightsError(f"{path} is not a readable GGUF file: {error or 'it is empty'}") from None


def convert(path: Path, folder: Path, report: Callable[[int, int], None] | None = None) -> None:
    """Write config, tokenizer and model.safetensors (bfloat16) of a GGUF file into `folder`.

    Args:
        path: the GGUF file.
        folder: where the files are written.
        report: called with the bytes written so far and in all.

    Raises:
        WeightsError: an architecture or a tensor is not supported.
        MissingExtra: the `local` extra is not installed.
        OSError: a file cannot be read or written.
    """
    header = read_header(path)
    if header.architecture not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise WeightsError(
            f"{path}: the GGUF architecture {header.architecture!r} is not supported; known: {known}"
        )
    if header.metadata.get(f"{header.architecture}.rope.scaling.type", "none") != "none":
        raise WeightsError(f"{path}: GGUF files with a scaled rotary embedding are not supported")
    names = [_transformers_name(header, tensor) for tensor in header.tensors]
    _save_config(header, folder)
    _save_tokenizer(header, folder)
    _save_tensors(header, names, folder / "model.safetensors", report or (lambda done, total: None))


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
    return {_transformers_name(header, tensor): tensor for tensor in header.tensors if tensor.type == Q4_K}


def quantised_tensors(header: Header) -> list[str]:
    """Transformers' names of the matrices that the file holds in low-bit blocks of any kind."""
    return [
        _transformers_name(header, tensor)
        for tensor in header.tensors
        if len(tensor.shape) == 2 and tensor.type not in UNQUANTISED
    ]


def read_four_bit(header: Header, tensor: Tensor) -> FourBit:
    """Take the Q4_K blocks of a matrix apart without losing a bit.

    A block (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, block_q4_K) is two float16, the
    steps of scales and minima; 12 bytes with eight 6-bit scales and eight 6-bit minima; and 128 bytes of
    numbers, of which each 32 hold one group in their lower and the next in their upper halves. Raises
    `WeightsError` where the file is cut short or has another architecture than `convert` knows.
    """
    if header.architecture not in _CLASSES:
        raise WeightsError(f"{header.path}: the architecture {header.architecture!r} is not supported")
    rows, columns = tensor.shape
    count = rows * columns // Q4_K_WEIGHTS
    blob = np.memmap(header.path, dtype=np.uint8, mode="r")
    if tensor.start + count * Q4_K_BYTES > len(blob):
        raise WeightsError(f"{header.path} is cut short at tensor {tensor.name!r}")
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
    if (heads := _rotary_heads(header, tensor)) is not None:
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


def ordered_map(work: Callable[[Item], Result], items: Iterable[Item], ahead: int = 4) -> Iterator[Result]:
    """`map` over threads, in order, holding at most `ahead` results that nobody has taken yet."""
    with ThreadPoolExecutor(min(ahead, os.cpu_count() or 1)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class _Cursor:
    """Reads values from the mapped file, one after another; `offset` is the position in bytes."""

    def __init__(self, view: mmap.mmap) -> None:
        self.view, self.offset = view, 0

    def numbers(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.view, self.offset)
        self.offset += struct.calcsize("<" + layout)
        return values

    def string(self) -> str:
        (length,) = self.numbers("Q")
        if self.offset + length > len(self.view):
            raise ValueError("it is cut short")
        self.offset += length
        return self.view[self.offset - length : self.offset].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.numbers(_SCALARS[kind])[0]
        item_kind, count = self.numbers("IQ")
        if item_kind == _STRING:
            for _ in range(count):
                self.offset += 8 + struct.unpack_from("<Q", self.view, self.offset)[0]
        else:
            self.offset += count * struct.calcsize("<" + _SCALARS[item_kind])
        return count

    def tensor(self) -> Tensor:
        name = self.string()
        (dimensions,) = self.numbers("I")
        shape = self.numbers(f"{dimensions}Q")
        kind, start = self.numbers("IQ")
        return Tensor(name, tuple(reversed(shape)), kind, start)

    def header(self, path: Path) -> Header:
        if self.view[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.offset = 4
        version, tensor_count, value_count = self.numbers("IQQ")
        if version not in (2, 3):
            raise ValueError(f"it has version {version}, known are 2 and 3")
        metadata = {}
        for _ in range(value_count):
            key = self.string()
            metadata[key] = self.value(self.numbers("I")[0])
        tensors = [self.tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        data = -(-self.offset // alignment) * alignment
        return Header(
            path,
            metadata,
            tuple(Tensor(each.name, each.shape, each.type, data + each.start) for each in tensors),
        )


def _transformers_name(header: Header, tensor: Tensor) -> str:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    module, _, leaf = tensor.name.rpartition(".")
    if module in _OUTER_NAMES:
        return f"{_OUTER_NAMES[module]}.{leaf}"
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
    if layer is None or layer[2] not in _LAYER_NAMES:
        raise WeightsError(
            f"{header.path}: unknown tensor {tensor.name!r} for architecture {header.architecture}"
        )
    return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{leaf}"


def _save_config(header: Header, folder: Path) -> None:
    try:
        from transformers import AutoConfig, GenerationConfig
    except ImportError:
        raise MissingExtra("transformers", "local") from None

    embedding = next((tensor for tensor in header.tensors if tensor.name == "token_embd.weight"), None)
    if embedding is None:
        raise WeightsError(f"{header.path}: the GGUF file has no tensor token_embd.weight")
    fields = {
        "architectures": [_CLASSES[header.architecture].model],
        "vocab_size": embedding.shape[0],
        "hidden_size": header.of_architecture("embedding_length"),
        "intermediate_size": header.of_architecture("feed_forward_length"),
        "num_hidden_layers": header.of_architecture("block_count"),
        "num_attention_heads": header.of_architecture("attention.head_count"),
        "num_key_value_heads": header.of_architecture("attention.head_count_kv"),
        "max_position_embeddings": header.of_architecture("context_length"),
        "rms_norm_eps": header.of_architecture("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": header.of_architecture("rope.freq_base")},
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in header.tensors),
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": header.metadata.get("tokenizer.ggml.padding_token_id"),
        "dtype": "bfloat16",
    }
    if header.architecture == "llama" and "llama.rope.dimension_count" in header.metadata:
        fields["head_dim"] = header.metadata["llama.rope.dimension_count"]
    config = AutoConfig.for_model(header.architecture, **fields)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def _save_tokenizer(header: Header, folder: Path) -> None:
    """Asking for the class by name keeps transformers from reading the whole metadata again for a config."""
    import transformers

    tokenizer_class = getattr(transformers, _CLASSES[header.architecture].tokenizer)
    tokenizer = tokenizer_class.from_pretrained(
        str(header.path.parent), gguf_file=header.path.name, local_files_only=True
    )
    tokenizer.save_pretrained(folder)


def _save_tensors(header: Header, names: list[str], path: Path, report: Callable[[int, int], None]) -> None:
    """Stream the unpacked tensors into a safetensors file, so that the model is never whole in memory.

    The format (https://huggingface.co/docs/safetensors) is the length of a JSON table, the table, the data.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name, tensor in zip(names, header.tensors, strict=True):
        size = 2 * prod(tensor.shape)
        table[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [total, total + size]}
        total += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    done = 0
    blob = np.memmap(header.path, dtype=np.uint8, mode="r")
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for data in ordered_map(lambda tensor: _unpack(header, blob, tensor), header.tensors):
            file.write(data.data)
            done += data.nbytes
            report(done, total)


def _unpack(header: Header, blob: npt.NDArray[np.uint8], tensor: Tensor) -> npt.NDArray[np.uint16]:
    """The bfloat16 bits of one tensor, flat."""
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise MissingExtra("gguf", "local") from None

    kind = GGMLQuantizationType(tensor.type)
    block_weights, block_bytes = GGML_QUANT_SIZES[kind]
    count = prod(tensor.shape)
    end = tensor.start + count // block_weights * block_bytes
    if end > len(blob):
        raise WeightsError(
            f"{header.path} is cut short: tensor {tensor.name!r} ends at byte {end} of {len(blob)}"
        )
    packed = blob[tensor.start : end]
    out = np.empty(count, dtype=np.uint16)
    for first in range(0, count, CHUNK):
        last = min(first + CHUNK, count)
        piece = packed[first // block_weights * block_bytes : last // block_weights * block_bytes]
        # One long row: the gguf package would otherwise go through the matrix sixteen rows at a time.
        out[first:last] = _bfloat16_bits(dequantize(piece.reshape(1, -1), kind).reshape(-1))
    if (heads := _rotary_heads(header, tensor)) is not None:
        out = _undo_rotary_order(out.reshape(tensor.shape), heads).reshape(-1)
    return out


def _bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper half of each float32, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _rotary_heads(header: Header, tensor: Tensor) -> int | None:
    """How many heads a tensor holds whose rows llama.cpp has reordered; None where it has not."""
    if header.architecture != "llama" or not re.fullmatch(r"blk\.\d+\.attn_[qk]\.(weight|bias)", tensor.name):
        return None
    heads = "attention.head_count" if ".attn_q." in tensor.name else "attention.head_count_kv"
    return int(header.of_architecture(heads))


def _undo_rotary_order(weights: npt.NDArray[Number], heads: int) -> npt.NDArray[Number]:
    """From llama.cpp's interleaved rotary heads, (heads, half, 2, ...), to halves, (heads, 2, half, ...)."""
    pairs = weights.reshape(heads, weights.shape[0] // heads // 2, 2, *weights.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weights.shape)
