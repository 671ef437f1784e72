"""The memory of two models: one sum of what is free, from which both caches are planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_gguf import write_tiny_gguf
from tiny_models import Letters, build, requests_of

from viaticum.decoders import MixedDecoder, Runner, TorchRunner, load_weights, loaded_model, make_runners
from viaticum.decoders.blocks import BLOCK
from viaticum.decoders.llama_runner import LlamaRunner
from viaticum.decoders.loaded_model import LoadedModel
from viaticum.decoders.memory import MAX_SLOTS, RESERVE, CacheCost, mapped_bytes, plan_together
from viaticum.errors import ModelError
from viaticum.routers.token import EntropyRouter

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = 256


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small and a large model, each as safetensors and as GGUF."""
    found = []
    for seed, kind in ((100, "qwen2"), (0, "qwen2")):
        folder = tmp_path_factory.mktemp(kind)
        model = build(kind, seed)
        model.save_pretrained(folder)
        write_tiny_gguf(folder / "model.gguf", model, eos=90)
        found.append(folder)
    return found[0], found[1]


def load(folder: Path, engine: str = "torch", slots: object = "auto", device: str = "cpu") -> LoadedModel:
    return load_weights(folder, engine=engine, dtype="float32", slots=slots, context=CONTEXT, device=device)  # type: ignore[arg-type]


def pretend_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(loaded_model, "free_bytes", lambda device: free)


def cache_bytes(model: LoadedModel, runner: Runner) -> int:
    """What a runner may take at most beside its weights."""
    assert model.cost is not None
    if isinstance(runner, TorchRunner):
        blocks = runner.pool.limit
    else:
        assert isinstance(runner, LlamaRunner)
        blocks = -(-runner._most_cells // BLOCK)
    return blocks * model.cost.block_bytes + runner.slots * model.cost.row_bytes


@pytest.mark.parametrize("engines", [("torch", "torch"), ("torch", "llama"), ("llama", "llama")])
@pytest.mark.parametrize("share", [1, 3, 40])
def test_both_caches_fit_the_memory_that_is_free(
    folders: tuple[Path, Path], engines: tuple[str, str], share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """share: texts of the whole context that there is memory for, about."""
    models = [load(folder, engine) for folder, engine in zip(folders, engines, strict=True)]
    costs = [each.cost for each in models if each.cost is not None]
    text = sum(cost.block_bytes * CONTEXT // BLOCK + cost.row_bytes for cost in costs)
    left = share * text + max(cost.call_bytes for cost in costs)
    mapped = sum(each.mapped for each in models)
    assert mapped > 0, "weights in mapped files count as free for the system, and are not"
    pretend_free(monkeypatch, int(left / (1 - RESERVE)) + mapped + 10)
    runners = make_runners(*models)
    assert runners[0].slots == runners[1].slots >= min(share, MAX_SLOTS)
    assert all(runner.context == CONTEXT for runner in runners), "one text may have all of it"
    taken = sum(map(cache_bytes, models, runners))
    assert 0.6 * share * text <= taken <= share * text
    requests = requests_of(share, 3, max_new_tokens=8)
    decoder = MixedDecoder(runners[1], runners[0], tokenizer=Letters(), router=EntropyRouter(0.75))
    assert all(result.error is None for result in decoder.generate_all(requests))
    pretend_free(monkeypatch, mapped + 1000)
    with pytest.raises(ModelError, match="1,000 are free"):
        make_runners(*models)


def test_models_of_a_pair_on_two_devices_have_as_many_slots_as_the_shorter_one(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [load(folders[0], device="meta"), load(folders[1])]
    assert models[1].cost is not None
    free = {"meta": 10**12, "cpu": models[1].mapped + int(1.2 * models[1].cost.call_bytes)}
    monkeypatch.setattr(loaded_model, "free_bytes", lambda device: free[device.type])
    small, large = make_runners(*models)
    assert small.slots == large.slots < MAX_SLOTS
    assert isinstance(small, TorchRunner)
    assert small.pool.limit == small.slots * CONTEXT // BLOCK


def test_a_given_number_of_slots_holds_for_its_model(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_free(monkeypatch, 10**9)
    small, large = make_runners(load(folders[0], slots=5), load(folders[1]))
    assert (small.slots, large.slots) == (5, 5)
    small, large = make_runners(load(folders[0], slots=5), load(folders[1], slots=3))
    assert (small.slots, large.slots) == (5, 3)


def test_a_plan_never_exceeds_what_is_free() -> None:
    for seed in range(300):
        draw = torch.Generator().manual_seed(seed)

        def number(low: int, high: int, draw: torch.Generator = draw) -> int:
            return int(torch.randint(low, high, (1,), generator=draw))

        costs = [
            CacheCost(number(1, 4000), number(1, 1500), number(1, 5000), number(0, 9000), number(0, 9000))
            for _ in range(number(1, 4))
        ]
        given = [None if number(0, 2) else number(1, 9) for _ in costs]
        free = number(1, 3_000_000)
        try:
            plans = plan_together(costs, free, slots=given, at_most=number(1, 70))
        except ModelError:
            continue
        taken = sum(
            plan.blocks * cost.block_bytes + plan.slots * cost.row_bytes
            for plan, cost in zip(plans, costs, strict=True)
        )
        assert taken + max(cost.call_bytes for cost in costs) <= free
        assert all(plan.blocks > 0 and plan.slots > 0 for plan in plans)
        shortest = min(cost.context for cost in costs)
        if None in given:
            assert all(plan.blocks * BLOCK >= shortest for plan in plans)


def test_weights_that_were_converted_are_no_mapping(folders: tuple[Path, Path]) -> None:
    assert load(folders[0]).mapped > 0
    assert load_weights(folders[0], engine="torch", dtype="bfloat16").mapped == 0
    assert mapped_bytes([torch.ones(1000)]) == 0
