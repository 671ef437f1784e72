"""llama.cpp's own server for comparison: `pip install xllamacpp`."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch


class LlamaServer:
    """The server of the wheel, with a slot for each text and as many threads as torch.

    It keeps every prompt in its slot, so that what is timed afterwards is decoding. Idle threads do not poll:
    they would keep the cores busy while others are measured.
    """

    def __init__(self, file: Path, slots: int, context: int) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
        parameters.cpuparams.poll = parameters.cpuparams_batch.poll = 0
        parameters.n_ctx, parameters.n_parallel, parameters.verbosity = context * slots, slots, -1
        self._server: Any = xllamacpp.Server(parameters)
        self._pool = ThreadPoolExecutor(slots)
        self.flags = {
            "wheel": f"xllamacpp {xllamacpp.__version__}",
            "threads": torch.get_num_threads(),
            "poll": 0,
            "n_ctx": context * slots,
            "n_parallel": slots,
        }

    def _complete(self, slot: int, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        request = {
            "prompt": list(prompt),
            "n_predict": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": True,
            "id_slot": slot,
        }
        answer = self._server.handle_completions(request)
        if "timings" not in answer:
            raise RuntimeError(f"llama.cpp: {answer}")
        return answer

    def speed(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Tokens a second of greedy texts, all at once, after their prompts."""
        for slot, prompt in enumerate(prompts):
            self._complete(slot, prompt, 1)
        began = time.perf_counter()
        answers = list(self._pool.map(lambda each: self._complete(*each, tokens), list(enumerate(prompts))))
        seconds = time.perf_counter() - began
        return sum(answer["timings"]["predicted_n"] for answer in answers) / seconds

    def close(self) -> None:
        self._pool.shutdown()
        self._server = None
        gc.collect()


def llama_speed(file: Path, prompt: Sequence[int], tokens: int) -> float:
    """Tokens a second of one greedy stream of a GGUF file after its prompt."""
    server = LlamaServer(file, 1, 1536)
    try:
        return server.speed([prompt], tokens)
    finally:
        server.close()
