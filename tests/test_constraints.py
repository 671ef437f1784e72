"""The two sets of tested versions agree but for what a torch with CUDA needs beside it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDA = re.compile(r"(nvidia-[a-z0-9-]+|cuda-[a-z]+|triton)==[0-9.]+")


def lines(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_cuda_set_is_the_tested_set_and_the_packages_of_cuda() -> None:
    first, *more = lines("constraints-cuda.txt")
    assert first == "-c constraints.txt", "everything else is pinned once"
    assert all(CUDA.fullmatch(line) for line in more)
    assert more == sorted(set(more))
    cpu = lines("constraints.txt")
    assert not [line for line in cpu if CUDA.fullmatch(line)]
    torch = [line for line in cpu if line.startswith("torch==")]
    assert torch, "no local version: the pin accepts the CPU's and CUDA's build"
    assert "+" not in torch[0]
