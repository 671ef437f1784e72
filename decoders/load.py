"""Load a runner from a model folder: weights, packed linear layers, KV slots and, on CUDA, graphs.

Reads local files only. Leaves out where the folder comes from (`viaticum.weights`) and running the model
(`decoders.runner`, `decoders.graphs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from viaticum.decoders.attention import NAME as ATTENTION
from viaticum.decoders.cache import FIRST_CAPACITY
from viaticum.decoders.fused_layers import fuse_layers
from viaticum.decoders.graphs import GraphRunner
from viaticum.decoders.linear import Weights, pack
from viaticum.decoders.memory import free_bytes, plan_slots
from viaticum.decoders.torch_runner import PREFILL_TOKENS, TorchRunner, context_length
from viaticum.errors import WeightsError


def load_runner(
    path: str | Path,
    *,
    slots: int | Literal["auto"] = 1,
    context: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    weights: Weights = "auto",
    graphs: bool | None = None,
) -> TorchRunner:
    """Load a causal LM from a folder with config.json and safetensors; never uses the network.

    Args:
        path: the model folder.
        slots: sequences in the KV cache at once. "auto" takes as many as fit the memory that is free once the
            weights are loaded (see `plan_slots`); of two models, load the other one first.
        context: maximum positions of one sequence; None: what the model supports.
        dtype: of activations, keys and values.
        device: a torch device.
        weights: how linear layers store their weights (see `decoders.linear`). "plain": as transformers does,
            in `dtype`. "bfloat16": the same values in the kernel's own order, about twice as fast. "low-bit":
            also in 4 and 8 bits, for calls of few rows; 2.6 to 3 bytes a weight in all. "auto": the last of
            these that the machine, the dtype and the folder allow; low-bit only if a quantised model.gguf
            lies beside the weights.
        graphs: run calls of few tokens in static shapes, as CUDA graphs (`GraphRunner`). The cache then
            allocates its whole context at once. None: on CUDA only.

    Raises:
        WeightsError: the folder lacks a tensor of the model, or holds one that the model has no place for.
        InputError: `weights` is not possible on this machine or with this folder.
        ModelError: the memory is not enough for one slot.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation=ATTENTION,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in `info`
    )
    model, info = loaded
    _check_complete(Path(path), info)
    model = model.to(torch.device(device))
    if pack(model, Path(path), weights):
        fuse_layers(model)
    if slots == "auto":
        slots = plan_slots(
            model.config,
            context_length(model.config, context),
            free_bytes(device),
            dtype=dtype,
            prefill_tokens=PREFILL_TOKENS,
            first_capacity=FIRST_CAPACITY,
        )
    use_graphs = torch.device(device).type == "cuda" if graphs is None else graphs
    return (GraphRunner if use_graphs else TorchRunner)(model, slots=slots, context=context)


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
