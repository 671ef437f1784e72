"""Load a runner from a model folder: weights, packed linear layers and, on CUDA, graphs.

Reads local files only. Leaves out where the folder comes from (`viaticum.weights`), what a device is
(`decoders.devices`), the caches (`decoders.loaded_model`) and running the model (`decoders.runner`,
`decoders.graphs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from viaticum.decoders.attention import NAME as ATTENTION
from viaticum.decoders.attention import check_layers
from viaticum.decoders.devices import resolve_device, resolve_dtype
from viaticum.decoders.fused_layers import fuse_layers
from viaticum.decoders.graphs import GraphRunner
from viaticum.decoders.linear import Weights, pack
from viaticum.decoders.loaded_model import GPU_MEMORY, LoadedModel, make_runners
from viaticum.decoders.memory import MAX_SLOTS, CacheCost, MemoryPlan, mapped_bytes
from viaticum.decoders.runner import Runner
from viaticum.decoders.served_load import Server, load_served
from viaticum.decoders.torch_runner import PREFILL_TOKENS, TorchRunner, context_length
from viaticum.errors import InputError, WeightsError
from viaticum.gguf.blocks import quantised_tensors
from viaticum.gguf.conversion import convert_tensors
from viaticum.gguf.file import read_header

Engine = Literal["auto", "torch", "llama", "served"]
MESSAGE = 300  # characters of an error of transformers that are shown


class LoadOptions(TypedDict, total=False):
    """The options of `load_weights`."""

    engine: Engine
    device: str | torch.device
    dtype: str | torch.dtype
    slots: int | Literal["auto"]
    max_slots: int
    context: int | None
    tensor_parallel: int
    gpu_memory: float
    weights: Weights
    graphs: bool | None
    server: Server | None


def load_runner(path: str | Path, **options: Unpack[LoadOptions]) -> Runner:
    """Load a causal LM; arguments and errors are those of `load_weights`.

    Raises:
        ModelError: the memory is not enough for one slot.
    """
    return make_runners(load_weights(path, **options))[0]


def load_weights(
    path: str | Path,
    *,
    engine: Engine = "auto",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    slots: int | Literal["auto"] = 1,
    max_slots: int = MAX_SLOTS,
    context: int | None = None,
    tensor_parallel: int = 1,
    gpu_memory: float = GPU_MEMORY,
    weights: Weights = "auto",
    graphs: bool | None = None,
    server: Server | None = None,
) -> LoadedModel:
    """Load the weights of a causal LM; never uses the network, but for the engine "served".

    Args:
        path: the model folder, with config.json and safetensors, or a GGUF file for the engine "llama"; of
            the engine "served" without weights.
        engine: what computes the model. "torch": this package, on CPU, CUDA and MPS. "llama": llama.cpp.
            "served": vLLM or SGLang, at `server`. "auto": see `default_engine`.
        device: a torch device, "auto" for the GPU if there is one (see `decoders.devices`).
        dtype: of weights, activations, keys and values; "auto" for what is fast on the device.
        slots: sequences in the KV cache at once. "auto" takes as many as fit the memory that is free once the
            weights are loaded (see `make_runners`).
        max_slots: upper limit of slots="auto".
        context: maximum positions of one sequence; None: what the model supports.
        tensor_parallel: GPUs over which the weights are spread; more than one with the engine "served".
        gpu_memory: fraction of a GPU's memory that slots="auto" may fill, weights included.
        weights: see `load_torch`.
        graphs: see `load_torch`.
        server: of the engine "served".

    Raises:
        InputError: the engine, device or dtype is not there, or `weights` is not possible with them.
        WeightsError: the weights cannot be read, or are not those of the model.
        ModelError: its layers keep more than keys and values.
    """
    if engine == "auto":
        engine = default_engine(path, device=device, dtype=dtype, weights=weights, graphs=graphs)
    if tensor_parallel > 1 and engine != "served":
        raise InputError(
            f"tensor_parallel={tensor_parallel}: the engine {engine} uses one GPU; serve the model with "
            f"`vllm serve MODEL --tensor-parallel-size {tensor_parallel}` and give its entry "
            'engine = "served"'
        )
    if engine == "llama":
        from viaticum.decoders.llama_load import load_llama

        return load_llama(path, device=device, dtype=dtype, slots=slots, max_slots=max_slots, context=context)
    if engine == "torch":
        return load_torch(
            path,
            device=device,
            dtype=dtype,
            slots=slots,
            max_slots=max_slots,
            context=context,
            gpu_memory=gpu_memory,
            weights=weights,
            graphs=graphs,
        )
    if engine == "served":
        runner = load_served(path, server, slots=slots, max_slots=max_slots, context=context)
        return LoadedModel(runner.slots, max_slots, lambda plan: runner)
    raise InputError(f"unknown engine {engine!r}; known: auto, torch, llama, served")


def default_engine(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    weights: Weights = "auto",
    graphs: bool | None = None,
) -> Engine:
    """The engine of a model for which nothing was measured on this machine.

    llama.cpp for a GGUF file that no safetensors lie beside; also for a quantised one on a CPU without
    AVX-512, where the kernels of torch for few rows are not to be had and bfloat16 is emulated. Else torch.
    An argument that only torch has a use for means torch.

    Raises:
        InputError: the device is not there.
    """
    path = Path(path)
    if path.suffix == ".gguf" or (gguf_file(path) and not list(path.glob("*.safetensors"))):
        return "llama"
    if weights != "auto" or graphs is not None or dtype != "auto" or resolve_device(device).type != "cpu":
        return "torch"
    if resolve_dtype("auto", torch.device("cpu")) == torch.bfloat16:
        return "torch"
    from viaticum.decoders.llama_library import is_installed

    found = gguf_file(path)
    return "llama" if found and is_installed() and quantised_tensors(read_header(found)) else "torch"


def gguf_file(path: Path) -> Path | None:
    """The GGUF file of a model folder, or the path itself if it is one."""
    file = path if path.suffix == ".gguf" else path / "model.gguf"
    return file if file.is_file() else None


def load_torch(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    slots: int | Literal["auto"] = 1,
    max_slots: int = MAX_SLOTS,
    context: int | None = None,
    gpu_memory: float = GPU_MEMORY,
    weights: Weights = "auto",
    graphs: bool | None = None,
) -> LoadedModel:
    """Load the weights of a causal LM from a folder with config.json and safetensors, for torch.

    Args:
        path: the model folder.
        weights: how linear layers store their weights (see `decoders.linear`). "plain": as transformers does,
            in `dtype`. "bfloat16": the same values in the kernel's own order, about twice as fast. "low-bit":
            also in 4 and 8 bits, for calls of few rows; 2.6 to 3 bytes a weight in all. "auto": the last of
            these that the machine, the dtype and the folder allow; low-bit only if a quantised model.gguf
            lies beside the weights.
        graphs: run calls of few tokens in static shapes, as CUDA graphs (`GraphRunner`). The cache then
            allocates its whole context at once. None: on CUDA only.
        device, dtype, slots, max_slots, context, gpu_memory: see `load_weights`.

    Raises:
        WeightsError: the folder lacks a tensor of the model, or holds one that the model has no place for.
        InputError: device or dtype is not there, or `weights` is not possible with them.
        ModelError: its layers keep more than keys and values.
    """
    target = resolve_device(device)
    resolved = resolve_dtype(dtype, target)
    model = _load_weights(path, resolved, target)
    if pack(model, Path(path), weights):
        fuse_layers(model)
    use_graphs = target.type == "cuda" if graphs is None else graphs

    def runner(plan: MemoryPlan) -> Runner:
        kind = GraphRunner if use_graphs else TorchRunner
        return kind(model, slots=plan.slots, context=context, blocks=plan.blocks)

    longest = context_length(model.config, context)
    return LoadedModel(
        slots,
        max_slots,
        runner,
        CacheCost.of(model.config, longest, dtype=resolved, prefill_tokens=PREFILL_TOKENS),
        target,
        gpu_memory,
        mapped_bytes(model.parameters()),
    )


def _load_weights(path: str | Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model, each weight read from its file straight to its device where accelerate is installed."""
    _unpack_gguf(Path(path))
    options: dict[str, Any] = {}
    if device.type != "cpu" and find_spec("accelerate"):
        options["device_map"] = {"": device}
    config = _read_config(Path(path))
    check_layers(config)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION,
            local_files_only=True,
            trust_remote_code=False,  # left open, transformers asks on the terminal
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in `info`
            **options,
        )
    except (OSError, SafetensorError) as error:  # no weights, or not all of them
        raise WeightsError(f"the weights in {path} cannot be read: {error}; fetch them again") from None
    except (ImportError, ValueError) as error:
        raise _not_loadable(Path(path), error) from None
    model: PreTrainedModel = loaded[0]
    _check_complete(Path(path), loaded[1])
    model.to(device)  # type: ignore[arg-type]
    return model


def _read_config(folder: Path) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of any kind: each family checks its own settings
        raise _not_loadable(folder, error) from None
    return config


def _not_loadable(folder: Path, error: Exception) -> WeightsError:
    reason = " ".join(str(error).split())[:MESSAGE]
    return WeightsError(
        f"the model in {folder} cannot be loaded: {reason}; the engine torch takes models that transformers "
        "knows, without code or a quantisation of their own"
    )


def _unpack_gguf(folder: Path) -> None:
    """Write the safetensors of a folder that was fetched for llama.cpp and has a GGUF file alone."""
    file = folder / "model.gguf"
    if (folder / "config.json").is_file() and file.is_file() and not any(folder.glob("*.safetensors")):
        convert_tensors(file, folder / "model.safetensors")


def _check_complete(folder: Path, info: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit the model: transformers would fill what is missing with random numbers.

    info: what `from_pretrained` tells with `output_loading_info`.
    """
    misfits = {
        "lacks": info["missing_keys"],
        "has the wrong shape for": {name for name, *_ in info["mismatched_keys"]},
        # Files of old versions hold the frequencies of the rotation, which the configuration gives.
        "holds what the model has no place for:": {
            name for name in info["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq")
        },
    }
    for what, names in misfits.items():
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise WeightsError(
                f"the weights in {folder} are not those of its config.json: the folder {what} {shown}; "
                "fetch it again"
            )
