"""llama.cpp's C interface, by ctypes over the library inside the xllamacpp wheel (extra `llama`).

The declarations are those of one build, so the wheel is pinned: `library()` compares its version, the sizes
of the structures and their default values with what is declared here before anything else is called. A build
with one more field in a structure would crash or, worse, read another field. The Python module of the wheel
is never imported. Leaves out what a model does with the calls (`decoders.llama_runner`).

Source: https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Final

from viaticum.errors import MissingExtra

PACKAGE: Final = "xllamacpp"
VERSION: Final = "2026.10.11549"  # the one build that the declarations are right for; pyproject.toml pins it

F32, F16 = 0, 1  # ggml's numbers of the types that keys and values are stored in
FLASH_AUTO, FLASH_OFF = -1, 0
POOLING_NONE = 0
NO_ROOM = 1  # `llama_decode` found no room in the KV cache; nothing has changed
MAX_SEQUENCES = 256


class ModelParams(ctypes.Structure):
    """`struct llama_model_params`."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class ContextParams(ctypes.Structure):
    """`struct llama_context_params`."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class Batch(ctypes.Structure):
    """`struct llama_batch`: new tokens of several sequences, in any order."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", c_void_p),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", c_void_p),
    )


# Defaults other than 0, NULL and false.
_MODEL_DEFAULTS = {
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "use_extra_bufts": True,
}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0,
    "type_k": F16,
    "type_v": F16,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
}
_BATCH_DEFAULTS = {"n_tokens": 7}  # of llama_batch_get_one(NULL, 7)

_TAIL = 256  # bytes behind a structure that a larger one would write to
_UNTOUCHED = 0xA5

# Functions by name: what they return, and their arguments.
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (c_void_p, c_void_p)),
    "llama_supports_gpu_offload": (c_bool, ()),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_n_batch": (c_uint32, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_model_n_embd_out": (c_int32, (c_void_p,)),
    "llama_model_n_ctx_train": (c_int32, (c_void_p,)),
    "llama_model_size": (c_uint64, (c_void_p,)),
    "llama_model_desc": (c_int32, (c_void_p, c_char_p, c_size_t)),
    "llama_model_has_encoder": (c_bool, (c_void_p,)),
    "llama_model_is_recurrent": (c_bool, (c_void_p,)),
    "llama_model_is_hybrid": (c_bool, (c_void_p,)),
    "llama_model_is_diffusion": (c_bool, (c_void_p,)),
    "llama_model_meta_val_str": (c_int32, (c_void_p, c_char_p, c_char_p, c_size_t)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_set_embeddings": (None, (c_void_p, c_bool)),
    "llama_set_n_threads": (None, (c_void_p, c_int32, c_int32)),
    "llama_get_logits": (c_void_p, (c_void_p,)),
    "llama_get_embeddings": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_memory_seq_rm": (c_bool, (c_void_p, c_int32, c_int32, c_int32)),
    "llama_memory_seq_cp": (None, (c_void_p, c_int32, c_int32, c_int32, c_int32)),
    "llama_state_get_size": (c_size_t, (c_void_p,)),
    "llama_state_get_data": (c_size_t, (c_void_p, c_void_p, c_size_t)),
    "llama_state_set_data": (c_size_t, (c_void_p, c_void_p, c_size_t)),
}

_LOG_CALLBACK = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_LOG_ERROR, _LOG_CONTINUED = 4, 5


class _Log(threading.local):
    """What llama.cpp reports in this thread: nothing is printed, and errors are kept for whoever listens."""

    lines: list[str] | None = None
    keeps = False  # whether the last line was kept, as its continuation is then

    def receive(self, level: int, text: bytes, data: object) -> None:
        self.keeps = self.keeps if level == _LOG_CONTINUED else level == _LOG_ERROR
        if self.keeps and self.lines is not None:
            self.lines.append(text.decode(errors="replace"))

    @contextmanager
    def errors(self) -> Iterator[list[str]]:
        outer, self.lines = self.lines, []
        try:
            yield self.lines
        finally:
            self.lines = outer


class Library:
    """The functions of llama.cpp by their names in C, and its errors.

    Args:
        path: of the shared library.

    Raises:
        MissingExtra: it is not the build that the declarations are for.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.functions: Any = ctypes.CDLL(str(path))
        except OSError as error:
            raise MissingExtra(PACKAGE, "llama", f"{path} cannot be loaded: {error}") from None
        try:
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(self.functions, name)
                function.restype, function.argtypes = result, arguments
            _check_layout(self.functions)
        except (AttributeError, ValueError) as error:
            raise MissingExtra(PACKAGE, "llama", f"{path} is another build than {VERSION}: {error}") from None
        self._log = _Log()
        self._callback = _LOG_CALLBACK(self._log.receive)  # has to live as long as the library
        self.functions.llama_log_set(self._callback, None)
        self.functions.llama_backend_init()

    @contextmanager
    def errors(self) -> Iterator[list[str]]:
        """Collect what llama.cpp reports as errors in this thread, for the message of an exception."""
        with self._log.errors() as lines:
            yield lines

    def metadata(self, model: int, key: str) -> str | None:
        """A value of a model's GGUF metadata as text; None where there is none."""
        room = ctypes.create_string_buffer(4096)
        length = self.functions.llama_model_meta_val_str(model, key.encode(), room, len(room))
        return room.value.decode(errors="replace") if length >= 0 else None


@cache
def library() -> Library:
    """The library of the installed wheel, loaded and checked once.

    Raises:
        MissingExtra: the wheel is missing, or of another version than the declarations are for.
    """
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtra(PACKAGE, "llama") from None
    if found != VERSION:
        raise MissingExtra(PACKAGE, "llama", f"needs {PACKAGE}=={VERSION}, found {found}")
    return Library(_library_path())


def is_installed() -> bool:
    """Whether the pinned wheel is installed; its library is not loaded."""
    try:
        return importlib.metadata.version(PACKAGE) == VERSION
    except importlib.metadata.PackageNotFoundError:
        return False


def _library_path() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # finds the package without running it
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob(f"{PACKAGE}*")):
            if path.suffix in (".so", ".pyd", ".dylib"):
                return path
    raise MissingExtra(PACKAGE, "llama", f"the package {PACKAGE} holds no library")


def _check_layout(functions: Any) -> None:
    """Compare sizes and default values; raises `ValueError` with the first difference."""
    for name, structure, defaults, arguments in (
        ("llama_model_default_params", ModelParams, _MODEL_DEFAULTS, ()),
        ("llama_context_default_params", ContextParams, _CONTEXT_DEFAULTS, ()),
        ("llama_batch_get_one", Batch, _BATCH_DEFAULTS, (None, 7)),
    ):
        found = _returned(functions, name, structure, arguments)
        for field, *_ in structure._fields_:
            value = getattr(found, field) or 0
            if value != defaults.get(field, 0):
                raise ValueError(f"{name} gives {field} {value}, not {defaults.get(field, 0)}")


def _returned(functions: Any, name: str, structure: type[Any], arguments: tuple[Any, ...]) -> Any:
    """What a function that returns a structure gives; `ValueError` if that is of another size.

    The result lies in a larger buffer, so that a larger structure overwrites nothing else. Only x86-64 passes
    the address of the result like a first argument: elsewhere the values alone are compared.
    """

    class Padded(ctypes.Structure):
        _fields_ = (("value", structure), ("tail", c_int8 * _TAIL))

    function = functions[name]  # a fresh object: its types are not those of `functions.name`
    if platform.machine().lower() not in ("x86_64", "amd64"):
        function.restype = Padded
        return function(*arguments).value
    padded = Padded()
    ctypes.memset(ctypes.byref(padded), _UNTOUCHED, ctypes.sizeof(padded))
    function.restype = c_void_p
    function(ctypes.byref(padded), *arguments)
    last = max((i for i, byte in enumerate(bytes(padded)) if byte != _UNTOUCHED), default=-1)
    # Padding at the end of a structure is not written to.
    if not ctypes.sizeof(structure) - 8 <= last < ctypes.sizeof(structure):
        raise ValueError(f"{name} writes {last + 1} bytes, not {ctypes.sizeof(structure)}")
    return padded.value
