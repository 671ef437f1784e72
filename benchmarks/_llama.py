"""llama.cpp for comparison: `pip install xllamacpp`."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import torch


def llama_speed(file: Path, prompt: Sequence[int], tokens: int) -> float:
    """Tokens a second of one greedy stream of a GGUF file after its prompt.

    It has as many threads as torch. A new server each time: the threads of an idle one would keep the
    cores busy.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    parameters.n_ctx, parameters.n_parallel, parameters.verbosity = 1536, 1, -1
    server = xllamacpp.Server(parameters)
    request = {"prompt": list(prompt), "n_predict": tokens, "temperature": 0, "ignore_eos": True}
    speed = float(server.handle_completions(request)["timings"]["predicted_per_second"])
    del server
    gc.collect()
    return speed
