"""From a GGUF file to a folder that transformers reads: config, tokenizer, bfloat16 safetensors.

`from_pretrained(gguf_file=...)` makes the same tensors, but reads fewer tokenizers, knows nothing of shards
or of the factors of llama 3.1's rotation, and fills what is missing with random numbers: here names and
shapes are compared with those of the model class, and a tensor too few or too many is an error. Leaves out
where the file came from (`viaticum.weights`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

from viaticum.errors import MissingExtra, WeightsError
from viaticum.files import atomic_file
from viaticum.gguf.architectures import architecture_of, transformers_names
from viaticum.gguf.blocks import check_complete, read_bfloat16
from viaticum.gguf.config import config_fields
from viaticum.gguf.file import Header, Tensor, read_header
from viaticum.gguf.parallel import ordered_map
from viaticum.gguf.tokenizer import Vocabulary, save_tokenizer

Report = Callable[[int, int], None]


def convert(path: Path, folder: Path, report: Report | None = None, *, tensors: bool = True) -> None:
    """Write config, tokenizer and model.safetensors (bfloat16) of a GGUF file into `folder`.

    Args:
        path: the GGUF file, or one of its shards.
        folder: where the files are written.
        report: called with the bytes written so far and in all.
        tensors: False leaves out model.safetensors, which `convert_tensors` can write later, for llama.cpp,
            which reads the file itself. The model may then be of any architecture; one that transformers does
            not know gets no config.json.

    Raises:
        WeightsError: the file is damaged, or holds something that is not supported.
        MissingExtra: the `local` extra is not installed.
        OSError: a file cannot be read or written.
    """
    header = read_header(path)
    check_complete(header)
    vocabulary = Vocabulary(header)
    if not tensors:
        with suppress(WeightsError):  # llama.cpp reads more than transformers
            _config(header, transformers_names(header)).save_pretrained(folder)
        _save_ends(vocabulary, folder)
        save_tokenizer(header, vocabulary, folder)
        return
    names = transformers_names(header)
    config = _config(header, names)
    _check_tensors(header, names, config)
    config.save_pretrained(folder)
    _save_ends(vocabulary, folder)
    save_tokenizer(header, vocabulary, folder)
    _save_tensors(header, names, folder / "model.safetensors", report or (lambda done, total: None))


def convert_tensors(path: Path, target: Path, report: Report | None = None) -> None:
    """Write the safetensors file of a GGUF file whose configuration and tokenizer `convert` has written.

    The file appears whole or not at all. Raises as `convert`.
    """
    header = read_header(path)
    names = transformers_names(header)
    check_complete(header)
    _check_tensors(header, names, _config(header, names))
    with atomic_file(target) as scratch:
        _save_tensors(header, names, scratch, report or (lambda done, total: None))


def _config(header: Header, names: Mapping[str, Tensor]) -> Any:
    """transformers' configuration."""
    try:
        from transformers import AutoConfig
    except ImportError:
        raise MissingExtra("transformers", "local") from None

    return AutoConfig.for_model(architecture_of(header).model_type, **config_fields(header, names))


def _save_ends(vocabulary: Vocabulary, folder: Path) -> None:
    """Write generation_config.json, which names the tokens that end a text."""
    from transformers import GenerationConfig

    ends = vocabulary.stop_ids
    make: Any = GenerationConfig
    make(
        bos_token_id=vocabulary.named("bos_token_id"),
        eos_token_id=ends if len(ends) > 1 else next(iter(ends), None),
        pad_token_id=vocabulary.named("padding_token_id"),
    ).save_pretrained(folder)


def _check_tensors(header: Header, names: Mapping[str, Tensor], config: Any) -> None:
    """Compare names and shapes with those of the model class."""
    expected = _expected_shapes(config)
    if missing := [name for name in expected if name not in names]:
        raise WeightsError(
            f"{header.path} lacks {_some(missing)} of the architecture {header.architecture}; fetch the file"
            " again, or convert the model again with a current llama.cpp"
        )
    if left := [tensor.name for name, tensor in names.items() if name not in expected]:
        raise WeightsError(
            f"{header.path} holds tensors that {architecture_of(header).model_class} has no place for: "
            f"{_some(left)}"
        )
    for name, tensor in names.items():
        if tensor.shape != expected[name]:
            raise WeightsError(
                f"{header.path}: tensor {tensor.name!r} has shape {tensor.shape}, not {expected[name]} as the"
                " metadata says"
            )


def _expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors; a head that is the embedding is none of its own."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtra(error.name or "torch", "local") from None

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _save_tensors(header: Header, names: Mapping[str, Tensor], path: Path, report: Report) -> None:
    """Stream the unpacked tensors into a safetensors file, so that the model is never whole in memory.

    The format (https://huggingface.co/docs/safetensors) is the length of a JSON table, the table, the data.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name, tensor in names.items():
        size = 2 * prod(tensor.shape)
        table[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [total, total + size]}
        total += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    done = 0
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for data in ordered_map(lambda tensor: read_bfloat16(header, tensor), names.values()):
            file.write(data.data)
            done += data.nbytes
            report(done, total)
