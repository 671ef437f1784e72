"""Resolve the names of devices and dtypes for the machine at hand: what "auto" comes to, and what is missing.

Leaves out loading (`decoders.load`) and planning memory (`decoders.memory`).
"""

from __future__ import annotations

import torch

from viaticum.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BFLOAT16_CAPABILITY = (8, 0)  # CUDA compute capability from which GPUs compute in bfloat16: Ampere
MAC_WITH_BFLOAT16 = (14, 0)  # macOS from which Metal has bfloat16


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The torch device of a name; "auto" takes the first CUDA GPU, else Apple's GPU, else the CPU.

    Raises:
        InputError: the device is not there; the message says what was found.
    """
    if name == "auto":
        return torch.device("cuda", 0) if _cuda_gpus() else torch.device("mps" if _has_mps() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f'unknown device {name!r}; give "auto", "cpu", "cuda", "cuda:1" or "mps"') from None
    if device.type == "cuda":
        return torch.device("cuda", _checked_index(device.index or 0))
    if device.type == "mps" and not _has_mps():
        raise InputError(f"device mps was asked for, and {_why_no_mps()}; give device auto or cpu")
    return device


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The torch dtype of a name; "auto" takes what is fast on the device.

    bfloat16 on GPUs that compute in it, else float16; on CPUs bfloat16 with AVX-512 (see `decoders.linear`),
    else float32: emulated bfloat16 is slower than float32.

    Raises:
        InputError: unknown dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else _without_bfloat16(device)
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return (
            torch.version.hip is not None or torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY
        )
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(*MAC_WITH_BFLOAT16)
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True  # meta: computes nothing


def _without_bfloat16(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.float16


def _cuda_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _checked_index(index: int) -> int:
    found = _cuda_gpus()
    if not found:
        raise InputError(
            f"a CUDA GPU was asked for, and {_why_no_cuda()}; give device auto or cpu to run without one"
        )
    if index >= found:
        last = "cuda:0" if found == 1 else f"cuda:0 to cuda:{found - 1}"
        raise InputError(
            f"device cuda:{index} was asked for, and torch sees {found} CUDA GPU{'s' * (found > 1)}, {last}; "
            "see CUDA_VISIBLE_DEVICES"
        )
    return index


def _why_no_cuda() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} is built without CUDA (install a CUDA build with "
            "`pip install -c constraints-cuda.txt ...`, see the README)"
        )
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return f"torch {torch.__version__} finds no driver or GPU ({str(error).splitlines()[0]})"
    return f"torch {torch.__version__} sees no GPU (CUDA_VISIBLE_DEVICES may hide it)"


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _why_no_mps() -> str:
    if torch.backends.mps.is_built():
        return "this Mac has no GPU that Metal can use"
    return f"torch {torch.__version__} is built without it"
