"""Load a model for llama.cpp: its GGUF file, the device, and how many texts the free memory holds.

Leaves out the choice of an engine (`decoders.load`) and the calls of the model (`decoders.llama_runner`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from viaticum.decoders import llama_library as llama
from viaticum.decoders.blocks import BLOCK
from viaticum.decoders.devices import resolve_dtype
from viaticum.decoders.llama_library import library
from viaticum.decoders.llama_model import LlamaModel
from viaticum.decoders.llama_runner import LlamaRunner
from viaticum.decoders.loaded_model import LoadedModel
from viaticum.decoders.memory import LOGITS_COPIES, MAX_SLOTS, CacheCost, MemoryPlan
from viaticum.decoders.runner import Runner
from viaticum.errors import InputError, WeightsError


def load_llama(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    slots: int | Literal["auto"] = 1,
    max_slots: int = MAX_SLOTS,
    context: int | None = None,
) -> LoadedModel:
    """Load the GGUF file of a model for llama.cpp.

    Args:
        path: the file, or a folder that holds it as model.gguf.
        device: "auto" computes on a GPU if the library was built for one, "cpu" never; "cuda" and "mps" need
            such a build.
        dtype: of keys and values, float16 (also for "auto") or float32; weights stay as they are in the file.
        slots: given number, or "auto" for as many texts of `context` tokens as fit the free memory.
        max_slots: upper limit of slots="auto".
        context: maximum positions of one sequence; None: what the model supports.

    Raises:
        InputError: the library was not built for the device, or another dtype.
        WeightsError: there is no such file, or llama.cpp cannot load it.
        MissingExtra: as `LlamaModel`.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.gguf"
        if not path.is_file():
            raise WeightsError(
                f"{path.parent} holds no model.gguf, which the engine llama reads; take the engine torch, or "
                "a source that is a GGUF file"
            )
    offloads = bool(library().functions.llama_supports_gpu_offload())
    if not offloads and str(device).partition(":")[0] not in ("auto", "cpu"):
        raise InputError(
            f"device {device} was asked for, and the installed {llama.PACKAGE} is built for CPUs; give "
            "device auto or cpu, or install its build for this GPU"
        )
    cache_dtype = torch.float16 if dtype == "auto" else resolve_dtype(dtype, torch.device("cpu"))
    model = LlamaModel(path, -1 if offloads and str(device) != "cpu" else 0)
    most = min(context or model.context, model.context)
    cost = CacheCost(
        most,
        most,
        BLOCK * model.position_numbers * cache_dtype.itemsize,
        LOGITS_COPIES * 4 * model.vocabulary,
    )

    def runner(plan: MemoryPlan) -> Runner:
        positions = plan.blocks * BLOCK
        return LlamaRunner(
            model, slots=plan.slots, context=context, cache_dtype=cache_dtype, positions=positions
        )

    return LoadedModel(slots, max_slots, runner, cost, mapped=model.mapped)
