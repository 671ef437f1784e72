"""Reading what a GGUF file says of itself: metadata and tensor table, of one file or of one cut into shards.

Versions 2 and 3, little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A file that is
damaged, cut short or of another version is refused with what is wrong with it. Arrays of the metadata are
read on demand: a vocabulary has a million entries. Needs numpy alone. Leaves out what the values mean
(`viaticum.gguf.architectures`) and the blocks of the tensors (`viaticum.gguf.blocks`).
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from viaticum.errors import WeightsError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_MIN_VALUE, _MIN_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8  # bytes that an entry of each table takes at least
MAX_DIMENSIONS = 4
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of tokens that end a text, in tokenizer.ggml
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: its GGUF name, its shape in torch's order, its block type, and where its bytes begin.

    path: the file that holds it, one of several where the model is cut into shards.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    path: Path


@dataclass(frozen=True, slots=True)
class Array:
    """An array of the metadata that has not been read: the type of its entries, their number, their place."""

    kind: int
    count: int
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says about itself.

    path: the file, or the first shard.
    metadata: values by key; arrays as `Array`, read by `array`.
    spans: the bytes of each entry of the metadata in the file, from its key on.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]
    alignment: int
    spans: dict[str, tuple[int, int]]

    @property
    def architecture(self) -> str:
        try:
            return str(self.metadata["general.architecture"])
        except KeyError:
            raise WeightsError(f"{self.path}: the GGUF metadata lacks general.architecture") from None

    def of_architecture(self, key: str, default: Any = None) -> Any:
        """A value under the architecture's own prefix, e.g. `qwen2.block_count`.

        Raises:
            WeightsError: there is none and no default, or it differs from layer to layer.
        """
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name, default)
        if value is None:
            raise WeightsError(f"{self.path}: the GGUF metadata lacks {name}")
        if isinstance(value, Array):
            values = set(self.array(name))
            if len(values) != 1:
                raise WeightsError(f"{self.path}: {name} differs from layer to layer, which is not supported")
            return values.pop()
        return value

    def array(self, key: str) -> list[Any]:
        """The entries of an array of the metadata; empty where the key is missing."""
        value = self.metadata.get(key)
        if value is None:
            return []
        if not isinstance(value, Array):
            raise WeightsError(f"{self.path}: {key} of the GGUF metadata is no array")
        try:
            with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _Cursor(view, value.offset).entries(value)
        except UnicodeDecodeError as error:
            raise WeightsError(f"{self.path}: {key} holds text that is not UTF-8: {error}") from None

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that hold the tensors, each once."""
        return tuple(dict.fromkeys([self.path, *(tensor.path for tensor in self.tensors)]))

    @property
    def bfloat16_bytes(self) -> int:
        """How much the tensors take once unpacked to two bytes a weight."""
        return 2 * sum(prod(tensor.shape) for tensor in self.tensors)


def read_header(path: Path) -> Header:
    """The metadata and tensor table of a GGUF file; of a shard, those of the whole model.

    Raises:
        WeightsError: it is no GGUF file, is cut short or damaged, or a shard is missing.
    """
    header = _read_one(path)
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int):
        raise WeightsError(f"{path} is not a readable GGUF file: its split.count is {count!r}, no number")
    if count <= 1:
        return header
    paths = shards(path, count)
    return _join([header if shard == path else _read_one(shard) for shard in paths])


def shards(path: Path, count: int | None = None) -> list[Path]:
    """All files of the model that a shard, `name-00001-of-00003.gguf`, belongs to; else the path alone.

    Raises:
        WeightsError: a shard is missing, or the name is not that of one of `count` shards.
    """
    match = SHARD.fullmatch(path.name)
    if match is None or (count is not None and int(match["count"]) != count):
        if count is None:
            return [path]
        raise WeightsError(
            f"{path} is one of {count} shards, but is not named so; its name must end in "
            f"-00001-of-{count:05}.gguf"
        )
    total = int(match["count"])
    found = [path.with_name(f"{match['stem']}-{i:05}-of-{total:05}.gguf") for i in range(1, total + 1)]
    if missing := [shard.name for shard in found if not shard.is_file()]:
        raise WeightsError(
            f"{path.parent} holds {total - len(missing)} of the {total} shards of {match['stem']}; missing: "
            f"{', '.join(missing)}"
        )
    return found


def _join(headers: list[Header]) -> Header:
    """One header of all shards: the metadata of the first, the tensors of all."""
    first = headers[0]
    for number, header in enumerate(headers):
        claimed = header.metadata.get("split.no"), header.metadata.get("split.count")
        if claimed != (number, len(headers)):
            raise WeightsError(
                f"{header.path} says that it is shard {claimed[0]} of {claimed[1]}, counted from 0, but its"
                f" name says {number} of {len(headers)}"
            )
    tensors = tuple(tensor for header in headers for tensor in header.tensors)
    total = first.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise WeightsError(f"{first.path}: the shards hold {len(tensors)} of {total} tensors")
    _refuse_twice(first.path, "tensor", (tensor.name for tensor in tensors))
    return replace(first, tensors=tensors)


def _read_one(path: Path) -> Header:
    try:
        size = path.stat().st_size
        if size == 0:
            raise ValueError("it is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _Cursor(view).header(path)
    except struct.error:
        raise WeightsError(f"{path} is not a readable GGUF file: it is cut short") from None
    except UnicodeDecodeError:
        raise WeightsError(f"{path} is not a readable GGUF file: it holds text that is not UTF-8") from None
    except ValueError as error:
        raise WeightsError(f"{path} is not a readable GGUF file: {error}") from None


def _refuse_twice(path: Path, what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise WeightsError(f"{path} is not a readable GGUF file: it holds the {what} {name!r} twice")
        seen.add(name)


class _Cursor:
    """Reads values from the mapped file, one after another; `offset` is the position in bytes."""

    def __init__(self, view: mmap.mmap, offset: int = 0) -> None:
        self.view, self.offset = view, offset

    def numbers(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.view, self.offset)
        self.offset += struct.calcsize("<" + layout)
        return values

    def string(self) -> str:
        (length,) = self.numbers("Q")
        self._skip(length)
        return self.view[self.offset - length : self.offset].decode()

    def value(self) -> Any:
        (kind,) = self.numbers("I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        return self.numbers(_layout(kind))[0]

    def array(self) -> Array:
        """Skip an array."""
        kind, count = self.numbers("IQ")
        found = Array(kind, count, self.offset)
        if kind != _STRING:
            self._skip(count * struct.calcsize("<" + _layout(kind)))
            return found
        self._check_count(count, 8)
        view, offset, length = self.view, self.offset, _LENGTH.unpack_from
        for _ in range(count):
            offset += 8 + length(view, offset)[0]
        self.offset = offset
        self._skip(0)
        return found

    def entries(self, array: Array) -> list[Any]:
        if array.kind != _STRING:
            data = np.dtype("<" + _layout(array.kind))
            numbers: list[Any] = np.frombuffer(self.view, data, array.count, array.offset).tolist()
            return numbers
        view, offset, length, found = self.view, array.offset, _LENGTH.unpack_from, []
        for _ in range(array.count):
            begin = offset + 8
            offset = begin + length(view, offset)[0]
            found.append(view[begin:offset].decode())
        return found

    def tensor(self, path: Path) -> Tensor:
        name = self.string()
        (dimensions,) = self.numbers("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = self.numbers(f"{dimensions}Q")
        kind, start = self.numbers("IQ")
        return Tensor(name, tuple(reversed(shape)), kind, start, path)

    def header(self, path: Path) -> Header:
        if self.view[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.offset = 4
        (version,) = self.numbers("I")
        _check_version(version)
        tensor_count, value_count = self.numbers("QQ")
        self._check_count(tensor_count, _MIN_TENSOR)
        self._check_count(value_count, _MIN_VALUE)
        metadata: dict[str, Any] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(value_count):
            begin, key = self.offset, self.string()
            if key in metadata:
                raise ValueError(f"it holds the key {key!r} twice")
            metadata[key] = self.value()
            spans[key] = begin, self.offset
        tensors = [self.tensor(path) for _ in range(tensor_count)]
        _refuse_twice(path, "tensor", (tensor.name for tensor in tensors))
        alignment = _alignment(metadata)
        data = -(-self.offset // alignment) * alignment
        for tensor in tensors:
            if tensor.start % alignment:
                raise ValueError(
                    f"tensor {tensor.name!r} begins at byte {tensor.start} of the data, which is no multiple"
                    f" of the alignment {alignment}"
                )
        placed = tuple(replace(tensor, start=data + tensor.start) for tensor in tensors)
        return Header(path, metadata, placed, alignment, spans)

    def _skip(self, size: int) -> None:
        self.offset += size
        if self.offset > len(self.view):
            raise ValueError("it is cut short")

    def _check_count(self, count: int, least: int) -> None:
        if count * least > len(self.view):
            raise ValueError(
                f"it is damaged or cut short: {count} entries do not fit its {len(self.view)} bytes"
            )


def _layout(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"it is damaged: a value of the metadata has the unknown type {kind}")
    return _SCALARS[kind]


def _check_version(version: int) -> None:
    if version in (2, 3):
        return
    if version & 0xFFFF == 0:
        raise ValueError("it is big-endian; rewrite it with gguf-convert-endian of the package gguf")
    advice = "; convert the model again with a current llama.cpp" if version == 1 else ""
    raise ValueError(f"it has version {version}, known are 2 and 3{advice}")


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"its general.alignment is {alignment!r}, not a power of two from 8 on")
    return alignment
