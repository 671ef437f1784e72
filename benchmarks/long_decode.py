"""Time a token and memory of long texts: prompts that grow to 32k tokens, several at once.

    python benchmarks/long_decode.py --model PATH --texts 4 --lengths 1000 4000 8000 16000 32000 --json

Reads the texts in, and at each length takes decode steps of all of them at once: milliseconds a token, and
the resident memory of the process beyond what the weights took, now and at its peak, beside what the keys
and values need. Without --model the weights are random, in the shape of a 0.5B, so that nothing has to be
downloaded. Leaves out sampling, routers and the quality of text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from viaticum.decoders import TorchRunner, load_runner
from viaticum.decoders.attention import NAME as ATTENTION

SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
STEPS = 8  # decode steps at each length, after two that are not counted


def resident_bytes(field: str = "VmRSS") -> int:
    """Of this process now, or with "VmHWM" the most that it ever was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def a_runner(given: argparse.Namespace, context: int) -> TorchRunner:
    if given.model:
        loaded = load_runner(given.model, engine="torch", slots=given.texts, context=context)
        assert isinstance(loaded, TorchRunner)
        return loaded
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        Qwen2Config(**SHAPE), dtype=torch.float32, attn_implementation=ATTENTION
    )
    return TorchRunner(model, slots=given.texts, context=context)


def measure(runner: TorchRunner, lengths: list[int], texts: int) -> list[dict[str, float]]:
    """At each length: milliseconds a token, CPU milliseconds a token, and bytes of memory."""
    slots, found = list(range(texts)), []
    rng = torch.Generator().manual_seed(1)
    runner.extend([0], [[1]])
    runner.reset(0)
    weights = resident_bytes()
    for length in sorted(lengths):
        for slot in slots:
            missing = length - STEPS - 2 - len(runner.cached_tokens[slot])
            runner.extend([slot], [torch.randint(1000, 100_000, (missing,), generator=rng).tolist()])
        wall, cpu = [], []
        for step in range(STEPS + 2):
            began = time.perf_counter(), time.process_time()
            runner.forward(slots, [[step + 5]] * texts)
            if step >= 2:
                wall.append(time.perf_counter() - began[0])
                cpu.append(time.process_time() - began[1])
        held = sum(runner.pool.count(slot) for slot in slots) / runner.pool.per_slot
        whole = sum(
            layer.numel() * layer.element_size() for layer in (*runner._cache.keys, *runner._cache.values)
        )
        found.append(
            {
                "length": length,
                "ms_per_token": round(1000 * statistics.median(wall) / texts, 2),
                "cpu_ms_per_token": round(1000 * statistics.median(cpu) / texts, 2),
                "resident_mb": round((resident_bytes() - weights) / 1e6),
                "peak_mb": round((resident_bytes("VmHWM") - weights) / 1e6),
                "keys_and_values_mb": round(held * whole / texts / 1e6),
                "whole_contexts_mb": round(whole / 1e6),
            }
        )
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder of weights; else random weights in the shape of a 0.5B")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 4000, 8000, 16000, 32000])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    runner = a_runner(given, max(given.lengths))
    found = measure(runner, given.lengths, given.texts)
    if given.json:
        print(json.dumps({"texts": given.texts, "threads": given.threads, "lengths": found}))


if __name__ == "__main__":
    main()
