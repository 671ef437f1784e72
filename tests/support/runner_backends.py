"""The back ends that every test of the contract of `Runner` runs on.

A back end joins by one more entry in `BACKENDS`: how to hold a tiny transformers model with it, and what it
leaves out. The expected values come from the same model without any cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from inference_server import InferenceServer, serving
from torch import Tensor
from transformers import PreTrainedModel

from viaticum.decoders import Runner, TorchRunner
from viaticum.decoders.graphs import GraphRunner
from viaticum.decoders.served_check import connect
from viaticum.decoders.served_runner import ServedRunner

# (model, folder for files, slots, context) -> a runner over the model's weights in float32.
Make = Callable[[PreTrainedModel, Path, int, int], Runner]


@dataclass(frozen=True)
class Backend:
    """One way to hold a model.

    Args:
        name: shown in the tests' names.
        make: holds a model in a runner with `slots` slots of `context` positions.
        kinds: model families of `tiny_models.CONFIGS` that it can hold.
        hidden: whether its calls return hidden states.
        embeddings: whether it has the input embeddings.
        starve: makes calls of a runner with more than 100 new tokens run out of memory; None: they cannot.
        normalised: whether its logits are log probabilities.
        atol, rtol: by how much its logits may differ from those of transformers in float32.
    """

    name: str
    make: Make
    kinds: tuple[str, ...] = ("qwen2", "llama", "mistral", "gemma2")
    hidden: bool = True
    embeddings: bool = True
    starve: Callable[[Runner, pytest.MonkeyPatch], None] | None = None
    normalised: bool = False
    atol: float = 2e-4
    rtol: float = 1e-3

    def assert_close(self, got: Tensor, expected: Tensor) -> None:
        expected = expected.log_softmax(-1) if self.normalised else expected
        torch.testing.assert_close(got, expected, atol=self.atol, rtol=self.rtol)


def _torch(model: PreTrainedModel, folder: Path, slots: int, context: int) -> Runner:
    return TorchRunner(model, slots=slots, context=context)


def _blocks(model: PreTrainedModel, folder: Path, slots: int, context: int) -> Runner:
    return TorchRunner(model, slots=slots, context=context, in_place=False)


def _graphs(model: PreTrainedModel, folder: Path, slots: int, context: int) -> Runner:
    return GraphRunner(model, slots=slots, context=context)


def _served(dialect: str) -> Make:
    def make(model: PreTrainedModel, folder: Path, slots: int, context: int) -> Runner:
        there = TorchRunner(model, slots=slots + 1, context=context + 1)
        with ExitStack() as stack:
            server = stack.enter_context(serving(InferenceServer(there, dialect=dialect)))
            runner = connect(
                server.url,
                vocabulary=there.vocabulary,
                slots=slots,
                top=there.vocabulary,
                stop_ids=there.stop_ids,
                weight_bytes=there.weight_bytes,
            )
            stack.callback(ServedRunner.close, runner)
            runner.close = stack.pop_all().close  # type: ignore[method-assign]
        return runner

    return make


def _starve_torch(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The activations of a long call do not fit, in the middle of the model."""
    assert isinstance(runner, TorchRunner)
    layer: Any = runner.model.model.layers[1]
    forward = layer.forward

    def short_of_memory(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden.shape[0] * hidden.shape[1] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(hidden, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", short_of_memory)


def _llama(model: PreTrainedModel, folder: Path, slots: int, context: int) -> Runner:
    from tiny_gguf import write_tiny_gguf

    from viaticum.decoders.llama_runner import LlamaRunner

    model.generation_config.save_pretrained(folder)
    path = write_tiny_gguf(folder / "model.gguf", model)
    return LlamaRunner(path, slots=slots, context=context, cache_dtype=torch.float32)


def _starve_llama(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp finds no room for a long call, and neither can the cache grow."""
    from viaticum.decoders.llama_library import NO_ROOM
    from viaticum.decoders.llama_runner import LlamaRunner

    assert isinstance(runner, LlamaRunner)
    functions: Any = runner._c
    decode = functions.llama_decode
    monkeypatch.setattr(
        functions,
        "llama_decode",
        lambda context, batch: NO_ROOM if batch.n_tokens > 100 else decode(context, batch),
    )
    monkeypatch.setattr(runner, "_free_cells", lambda busy: False)


BACKENDS: list[Backend] = [
    Backend("torch", _torch, starve=_starve_torch),
    Backend("torch-blocks", _blocks, starve=_starve_torch),
    Backend("torch-graphs", _graphs, starve=_starve_torch),
    Backend("llama", _llama, kinds=("qwen2", "qwen3", "llama"), starve=_starve_llama),
    Backend(
        "served-vllm", _served("vllm"), ("qwen2", "gemma2"), hidden=False, embeddings=False, normalised=True
    ),
    Backend("served-sglang", _served("sglang"), ("qwen2",), hidden=False, embeddings=False, normalised=True),
]


def backend_params(**needed: Any) -> list[Any]:
    """Parameters for `pytest.mark.parametrize("backend", ...)`: back ends whose fields are as `needed`."""
    return [
        pytest.param(each, id=each.name)
        for each in BACKENDS
        if all(getattr(each, name) == value for name, value in needed.items())
    ]


@torch.inference_mode()
def uncached_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """Logits after every token, float32 [N, V]: the whole sequence at once, by transformers' own attention.

    model: not the one that a runner holds, which has another attention.
    """
    return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].float()


@torch.inference_mode()
def uncached_hidden(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """Hidden states after the last norm, [N, D], computed like `uncached_logits`."""
    return model.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).last_hidden_state[0]
