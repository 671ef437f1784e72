"""What "auto" comes to on this machine, and what is said where a device was asked for that is not there.

No GPU is needed: torch says which GPUs there are, and tests speak for it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import build

from viaticum.decoders import load_runner
from viaticum.decoders.devices import resolve_device, resolve_dtype
from viaticum.decoders.loaded_model import usable_bytes
from viaticum.errors import InputError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)


def pretend_mps(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)


def test_auto_takes_a_gpu_then_a_mac_then_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_mps(monkeypatch, True)
    pretend_gpus(monkeypatch, 2)
    assert resolve_device("auto") == GPU
    pretend_gpus(monkeypatch, 0)
    assert resolve_device("auto").type == "mps"
    pretend_mps(monkeypatch, False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU


def test_a_gpu_that_is_not_there_is_an_error_that_says_what_was_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_gpus(monkeypatch, 0)
    pretend_mps(monkeypatch, False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InputError, match="is built without CUDA"):
        resolve_device("cuda")

    def no_driver() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check that")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    with pytest.raises(InputError, match=r"no driver or GPU \(Found no NVIDIA driver on your system\.\)"):
        resolve_device("cuda:1")
    with pytest.raises(InputError, match="device mps was asked for"):
        resolve_device("mps")
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        resolve_device("gpu")


def test_a_number_beyond_the_gpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(
        InputError, match="cuda:2 was asked for, and torch sees 2 CUDA GPUs, cuda:0 to cuda:1"
    ):
        resolve_device("cuda:2")


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 1, (8, 0))
    assert resolve_dtype("auto", GPU) == torch.bfloat16
    pretend_gpus(monkeypatch, 1, (7, 5))
    assert resolve_dtype("auto", GPU) == torch.float16
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert resolve_dtype("auto", CPU) == (torch.bfloat16 if fast else torch.float32)
    assert resolve_dtype("float16", CPU) == resolve_dtype(torch.float16, CPU) == torch.float16
    with pytest.raises(InputError, match="unknown dtype 'half'"):
        resolve_dtype("half", CPU)


def test_gpu_memory_leaves_its_part_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 1000))
    assert usable_bytes(GPU, 0.9) == 500
    assert usable_bytes(GPU, 0.5) == 100
    assert usable_bytes(GPU, 0.1) == 0


def test_weights_go_to_the_device_as_they_are_read(tmp_path: Path) -> None:
    """On `meta` nothing is allocated: had they been read into the host's memory first, they were here."""
    build("llama").save_pretrained(tmp_path)
    runner = load_runner(tmp_path, engine="torch", device="meta", dtype="float16", slots=3, context=64)
    assert runner.device.type == "meta"
    assert runner.embeddings.device.type == "meta"
    assert runner.embeddings.dtype == torch.float16
    with pytest.raises(InputError, match="vllm serve MODEL --tensor-parallel-size 2"):
        load_runner(tmp_path, tensor_parallel=2)
