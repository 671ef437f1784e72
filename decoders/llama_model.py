"""A GGUF model as llama.cpp loads it: its reasons for a failure, and what the file says of the model.

Leaves out contexts, caches and calls (`decoders.llama_runner`).
"""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path

from viaticum.decoders.llama_library import library
from viaticum.decoders.vocabulary import end_ids
from viaticum.errors import WeightsError
from viaticum.gguf.file import END_KEYS


class LlamaModel:
    """A model that llama.cpp has loaded; freed with this object, or by `close`.

    Args:
        path: a GGUF file; of a file in parts the first.
        gpu_layers: layers to compute on a GPU, where the library was built for one; -1: all.

    Attributes:
        address: of the model in memory.
        context: maximum positions of a text.
        vocabulary: rows of logits.
        bytes: of the weights.
        mapped: bytes of weights that are a mapping of the file.

    Raises:
        MissingExtra: the extra `llama` is not installed.
        WeightsError: llama.cpp cannot load the file, or the model cannot drop the end of a text.
    """

    def __init__(self, path: str | Path, gpu_layers: int = 0) -> None:
        self.path, self.library = Path(path), library()
        self.address = self._load(gpu_layers)
        functions = self.library.functions
        self._free = weakref.finalize(self, functions.llama_model_free, self.address)
        self.context: int = functions.llama_model_n_ctx_train(self.address)
        self.vocabulary: int = functions.llama_vocab_n_tokens(functions.llama_model_get_vocab(self.address))
        self.width: int = functions.llama_model_n_embd_out(self.address)
        self.bytes: int = functions.llama_model_size(self.address)
        self.mapped = 0 if gpu_layers else self.bytes

    def close(self) -> None:
        self._free()

    def _load(self, gpu_layers: int) -> int:
        if not self.path.is_file():
            raise WeightsError(f"{self.path} does not exist; llama.cpp reads a GGUF file")
        functions = self.library.functions
        values = functions.llama_model_default_params()
        values.n_gpu_layers = gpu_layers
        with self.library.errors() as errors:
            model = functions.llama_model_load_from_file(str(self.path).encode(), values)
        if not model:
            raise WeightsError(f"llama.cpp cannot load {self.path}: {summary(errors)}")
        kept = ("has_encoder", "is_recurrent", "is_hybrid", "is_diffusion")
        found = [name for name in kept if getattr(functions, f"llama_model_{name}")(model)]
        architecture = self.library.metadata(model, "general.architecture") or ""
        if found or self.library.metadata(model, f"{architecture}.rope.scaling.type") == "longrope":
            functions.llama_model_free(model)
            kind = found[0].replace("_", " ") if found else "has a rotation that depends on the text's length"
            advice = "take another model, or serve this one" if found else "take the engine torch"
            raise WeightsError(f"{self.path} {kind}: the engine llama cannot decode it; {advice}")
        return int(model)

    def _metadata(self, key: str) -> str | None:
        return self.library.metadata(self.address, key)

    @property
    def position_numbers(self) -> int:
        """Keys and values of one position, counted in numbers: 2 * layers * heads * width."""
        architecture = self._metadata("general.architecture") or ""

        def value(key: str, default: int = 0) -> int:
            text = self._metadata(f"{architecture}.{key}") or ""
            return max(map(int, re.findall(r"\d+", text)), default=default)  # one number, or one a layer

        heads = value("attention.head_count", 1)
        width = value("embedding_length") // heads
        widths = value("attention.key_length", width) + value("attention.value_length", width)
        return value("block_count") * value("attention.head_count_kv", heads) * widths

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids by which the file ends a text, and those of a generation_config.json beside it."""
        texts = [self._metadata(f"tokenizer.ggml.{key}") for key in END_KEYS]
        found = {int(text) for text in texts if text is not None}
        settings = self.path.parent / "generation_config.json"
        try:
            named = json.loads(settings.read_text("utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            named = None
        return end_ids(named) | found


def summary(errors: list[str]) -> str:
    """llama.cpp's reason: the line of a model's loader, else the last one."""
    lines = [" ".join(line.split()) for line in "".join(errors).splitlines() if line.strip()]
    named = [line for line in lines if "error loading model" in line] or lines[-1:]
    return named[0].partition("error loading model: ")[2] or named[0] if named else "no reason was given"
