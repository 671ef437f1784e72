"""A GGUF model as llama.cpp loads it: its reasons for a failure, and what the file says of the model.

Leaves out contexts, caches and calls (`decoders.llama_runner`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from viaticum.decoders.llama_library import Library
from viaticum.decoders.vocabulary import end_ids
from viaticum.errors import WeightsError
from viaticum.gguf.file import END_KEYS


def load_model(loaded: Library, path: Path, gpu_layers: int) -> int:
    """The address of the model, which the caller frees.

    Raises:
        WeightsError: llama.cpp cannot load the file, or the model cannot drop the end of a text.
    """
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; llama.cpp reads a GGUF file")
    functions = loaded.functions
    values = functions.llama_model_default_params()
    values.n_gpu_layers = gpu_layers
    with loaded.errors() as errors:
        model = functions.llama_model_load_from_file(str(path).encode(), values)
    if not model:
        raise WeightsError(f"llama.cpp cannot load {path}: {summary(errors)}")
    kept = ("has_encoder", "is_recurrent", "is_hybrid", "is_diffusion")
    found = [name for name in kept if getattr(functions, f"llama_model_{name}")(model)]
    if found or loaded.metadata(model, f"{_architecture(loaded, model)}.rope.scaling.type") == "longrope":
        functions.llama_model_free(model)
        reason = found[0].replace("_", " ") if found else "has a rotation that depends on the text's length"
        raise WeightsError(f"{path} {reason}: the engine llama cannot decode it; take the engine torch")
    return int(model)


def summary(errors: list[str]) -> str:
    """llama.cpp's reason: the line of a model's loader, else the last one."""
    lines = [" ".join(line.split()) for line in "".join(errors).splitlines() if line.strip()]
    named = [line for line in lines if "error loading model" in line] or lines[-1:]
    return named[0].partition("error loading model: ")[2] or named[0] if named else "no reason was given"


def _architecture(loaded: Library, model: int) -> str:
    return loaded.metadata(model, "general.architecture") or ""


def position_numbers(loaded: Library, model: int) -> int:
    """Keys and values of one position, counted in numbers: 2 * layers * heads * width."""

    def value(key: str, default: int = 0) -> int:
        text = loaded.metadata(model, f"{_architecture(loaded, model)}.{key}") or ""
        return max(map(int, re.findall(r"\d+", text)), default=default)  # one number, or one a layer

    heads = value("attention.head_count", 1)
    width = value("embedding_length") // heads
    widths = value("attention.key_length", width) + value("attention.value_length", width)
    return value("block_count") * value("attention.head_count_kv", heads) * widths


def stop_ids(loaded: Library, model: int, path: Path) -> frozenset[int]:
    """The ids by which the file ends a text, and those of a generation_config.json beside it."""
    texts = [loaded.metadata(model, f"tokenizer.ggml.{key}") for key in END_KEYS]
    found = {int(text) for text in texts if text is not None}
    try:
        named = json.loads((path.parent / "generation_config.json").read_text("utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        named = None
    return end_ids(named) | found
