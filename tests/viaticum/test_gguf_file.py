"""What a GGUF file says of itself, and every way in which it can be damaged. The bytes are written here."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from viaticum.errors import WeightsError
from viaticum.gguf.file import Array, read_header, shards

Q4_0, F32 = 2, 0


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, data: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + data


def words(key: str, *values: str | bytes) -> bytes:
    return entry(key, 9, struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values)))


def numbers(key: str, layout: str, kind: int, values: list[Any]) -> bytes:
    data = struct.pack(f"<IQ{len(values)}{layout}", kind, len(values), *values)
    return entry(key, 9, data)


def tensor(name: str, shape: tuple[int, ...], start: int = 0, kind: int = F32) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, start)


NAME = entry("general.architecture", 8, text("qwen2"))


def gguf_bytes(
    values: list[bytes],
    tensors: Sequence[bytes] = (),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensor_count, value_count = counts or (len(tensors), len(values))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, value_count)
    found = head + b"".join(values) + b"".join(tensors)
    return found + bytes(-len(found) % 32) + bytes(256)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("version", [2, 3])
def test_values_arrays_and_tensors(path: Path, version: int) -> None:
    values = [
        NAME,
        entry("qwen2.block_count", 4, struct.pack("<I", 7)),
        words("tokenizer.ggml.tokens", "a", "", "東京"),
        numbers("tokenizer.ggml.token_type", "i", 5, [1, -1, 3]),
        numbers("scores", "f", 6, [0.5]),
        entry("truth", 7, b"\x01"),
    ]
    path.write_bytes(gguf_bytes(values, [tensor("a", (4, 3)), tensor("b", (8,), 64)], version=version))
    header = read_header(path)
    assert header.of_architecture("block_count") == 7
    assert header.metadata["truth"] is True
    assert isinstance(header.metadata["tokenizer.ggml.tokens"], Array)
    assert header.array("tokenizer.ggml.tokens") == ["a", "", "東京"]
    assert header.array("tokenizer.ggml.token_type") == [1, -1, 3]
    assert header.array("scores") == [0.5]
    assert header.array("none") == []
    assert [(one.name, one.shape) for one in header.tensors] == [("a", (3, 4)), ("b", (8,))]
    assert header.tensors[1].start - header.tensors[0].start == 64


def test_a_value_of_every_layer_is_one_only_where_they_agree(path: Path) -> None:
    heads = numbers("qwen2.attention.head_count_kv", "I", 4, [2, 2, 2])
    path.write_bytes(gguf_bytes([NAME, heads, numbers("qwen2.feed_forward_length", "I", 4, [8, 16])]))
    header = read_header(path)
    assert header.of_architecture("attention.head_count_kv") == 2
    with pytest.raises(WeightsError, match="feed_forward_length differs from layer to layer"):
        header.of_architecture("feed_forward_length")


def test_a_vocabulary_of_a_million_tokens(path: Path) -> None:
    count = 1_000_000
    body = b"".join(text(b"%d" % number) for number in range(count))
    path.write_bytes(gguf_bytes([NAME, entry("tokens", 9, struct.pack("<IQ", 8, count) + body)]))
    header = read_header(path)
    assert header.array("tokens")[-1] == "999999"


GOOD = gguf_bytes([NAME], [tensor("a", (8,))])
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "another format": (b"GGML" + GOOD[4:], "it does not begin with GGUF"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "it does not begin with GGUF"),
    "version 1": (gguf_bytes([NAME], version=1), "version 1, known are 2 and 3; convert the model again"),
    "version 9": (gguf_bytes([NAME], version=9), "it has version 9, known are 2 and 3"),
    "big-endian": (
        b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + GOOD[24:],
        "big-endian; rewrite it with",
    ),
    "cut in the counts": (GOOD[:20], "it is cut short"),
    "cut in a key": (GOOD[:40], "it is cut short"),
    "cut in the table of tensors": (GOOD[:80], "it is cut short"),
    "too many values": (gguf_bytes([NAME], counts=(0, 1 << 40)), "1099511627776 entries do not fit"),
    "too many tensors": (gguf_bytes([NAME], counts=(1 << 60, 1)), "entries do not fit its"),
    "a key twice": (gguf_bytes([NAME, NAME]), "it holds the key 'general.architecture' twice"),
    "a tensor twice": (
        gguf_bytes([NAME], [tensor("a", (8,)), tensor("a", (8,), 32)]),
        "it holds the tensor 'a' twice",
    ),
    "an unknown type": (gguf_bytes([entry("k", 13, bytes(8))]), "has the unknown type 13"),
    "an array of arrays": (
        gguf_bytes([entry("k", 9, struct.pack("<IQ", 9, 1) + bytes(12))]),
        "has the unknown type 9",
    ),
    "a long string": (gguf_bytes([struct.pack("<Q", 1 << 50) + b"x"]), "cut short"),
    "a long array": (gguf_bytes([entry("k", 9, struct.pack("<IQ", 4, 1 << 61))]), "it is cut short"),
    "a long array of strings": (
        gguf_bytes([entry("k", 9, struct.pack("<IQ", 8, 1 << 61))]),
        "entries do not fit its",
    ),
    "a string past the end": (
        gguf_bytes([entry("k", 9, struct.pack("<IQQ", 8, 1, 1 << 62))]),
        "it is cut short",
    ),
    "bytes for text": (gguf_bytes([entry(b"\xff\xfe", 4, bytes(4))]), "it holds text that is not UTF-8"),
    "alignment 0": (gguf_bytes([entry("general.alignment", 4, bytes(4))]), "general.alignment is 0, not a p"),
    "alignment 48": (
        gguf_bytes([entry("general.alignment", 4, struct.pack("<I", 48))]),
        "is 48, not",
    ),
    "alignment of text": (gguf_bytes([entry("general.alignment", 8, text("32"))]), "is '32', not a power"),
    "an unaligned tensor": (
        gguf_bytes([NAME], [tensor("a", (8,), 40)]),
        "at byte 40 .* multiple of",
    ),
    "nine dimensions": (gguf_bytes([NAME], [tensor("a", (1,) * 9)]), "tensor 'a' has 9 dimensions"),
    "shards that are counted in words": (
        gguf_bytes([NAME, entry("split.count", 8, text("three"))]),
        "its split.count is 'three', no number",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_named(path: Path, damage: str) -> None:
    data, message = DAMAGED[damage]
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=f"model.gguf is not a readable GGUF file: .*{message}") as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


def test_what_is_asked_for_and_missing_is_named(path: Path) -> None:
    path.write_bytes(gguf_bytes([words("tokens", b"\xff"), entry("n", 4, bytes(4))]))
    header = read_header(path)
    with pytest.raises(WeightsError, match=r"lacks general\.architecture"):
        header.of_architecture("block_count")
    with pytest.raises(WeightsError, match="tokens holds text that is not UTF-8"):
        header.array("tokens")
    with pytest.raises(WeightsError, match="n of the GGUF metadata is no array"):
        header.array("n")


def test_shards_are_found_by_their_names(tmp_path: Path) -> None:
    assert shards(tmp_path / "model.gguf") == [tmp_path / "model.gguf"]
    for number in (1, 3):
        (tmp_path / f"m-0000{number}-of-00003.gguf").touch()
    with pytest.raises(WeightsError, match=r"holds 2 of the 3 shards of m; missing: m-00002-of-00003\.gguf"):
        shards(tmp_path / "m-00003-of-00003.gguf")
