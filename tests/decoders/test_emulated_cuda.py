"""The CUDA path on an emulated device (`emulated_cuda`): it has to write what the CPU writes."""

from __future__ import annotations

import json
import random
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_cuda import Device, emulated_cuda, on_device
from tiny_models import CONFIGS, NEAR, VOCABULARY, Letters, a_prompt, build, requests_of, tokens_of
from torch import Tensor

from viaticum.decoders import (
    MixedDecoder,
    Request,
    Sampling,
    TorchRunner,
    call_times,
    graphs,
    load_runner,
)
from viaticum.decoders.features import read_features
from viaticum.decoders.graphs import GraphRunner
from viaticum.routers.token import EntropyRouter, RandomRouter, ReplayRouter
from viaticum.routers.token.base import to_device
from viaticum.routers.token.drift import ShareController
from viaticum.routers.token.neural import DivergenceNetwork, LearnedDivergenceRouter, Shape
from viaticum.routers.token.policy import Policy, PolicyShape, Recorder, RStitchPlus

pytestmark = pytest.mark.usefixtures("one_thread")
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "decode_gpu.py"


@pytest.fixture(autouse=True)
def short_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key lengths of 16, 24, 32, ... so that tiny texts cross several of them."""
    monkeypatch.setattr(graphs, "FIRST_KEYS", 16)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with emulated_cuda(monkeypatch) as device:
        yield device


# --- what the emulated device refuses, as a real one does ---------------------------------------------------


def a_capture(device: Device, work: Callable[[], Any]) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def test_tensors_of_two_devices_are_not_mixed(cuda: Device) -> None:
    numbers = torch.ones(3, device="cuda")
    assert numbers.device == torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="one device"):
        numbers + torch.ones(3)
    assert (numbers + torch.tensor(2.0)).tolist() == [3, 3, 3], "a single number of the host is a constant"


@pytest.mark.parametrize(
    "work",
    [
        lambda each: each.sum().item(),
        lambda each: each.tolist(),
        lambda each: each[each > 0],
        lambda each: torch.tensor([1.0], device="cuda"),
        lambda each: each.cpu(),
        lambda each: 1 if each.any() else 0,
        lambda each: torch.cuda.synchronize(),
    ],
)
def test_nothing_is_waited_for_in_a_capture(work: Callable[[Tensor], Any], cuda: Device) -> None:
    numbers = torch.ones(3, device="cuda")
    before = len(cuda.waits)
    work(numbers)
    assert len(cuda.waits) == before + 1
    with pytest.raises(RuntimeError, match="capturing"):
        a_capture(cuda, lambda: work(numbers))


def test_a_graph_computes_only_when_it_is_replayed(cuda: Device) -> None:
    given, out = torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda")
    inner: list[Tensor] = []

    def work() -> None:
        inner.append(given[:2] * 2)
        out[:2] = inner[0] + 1

    graph = a_capture(cuda, work)
    given += 3
    graph.replay()
    assert out.tolist() == [7, 7, 0]
    assert inner[0].isnan().all(), "memory that graphs share does not outlive a replay"
    given[0] = 10
    graph.replay()
    assert out.tolist() == [21, 7, 0]


def test_a_capture_on_a_stream_of_another_device_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_cuda(monkeypatch, 2) as device:
        out = torch.zeros(2, device="cuda:1")
        graph = a_capture(device, lambda: out.add_(1))
        graph.replay()
        assert out.tolist() == [1, 1], "computed at once, and never again"
        kept = torch.cuda.CUDAGraph()
        with torch.cuda.graph(kept, stream=torch.cuda.Stream("cuda:1")):
            out += 1
        kept.replay()
        kept.replay()
        assert out.tolist() == [3, 3]


def test_pinned_memory_that_is_written_too_early_is_seen(cuda: Device) -> None:
    pinned = torch.zeros(2, pin_memory=True)
    there = pinned.to("cuda", non_blocking=True)
    pinned += 1
    with pytest.raises(AssertionError, match="pinned"):
        there.tolist()


# --- models and texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "index"), [*((kind, 0) for kind in sorted(CONFIGS)), ("qwen2", 1)])
def test_captured_calls_compute_what_the_cpu_computes(
    kind: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the second GPU too, while the first is torch's current one."""
    rng = random.Random(kind)
    plain, model = TorchRunner(build(kind), slots=4, context=400), build(kind)
    with emulated_cuda(monkeypatch, index + 1) as device:
        captured = GraphRunner(on_device(model, index), slots=4, context=400)
        assert captured.device == torch.device("cuda", index)
        for _ in range(25):
            slots = rng.sample(range(4), rng.choice([1, 2, 4]))
            new = [a_prompt(rng, rng.choice([1, 1, 3, 30])) for _ in slots]
            keep = [rng.choice([1, len(each)]) for each in new]
            got = captured.forward(slots, new, keep, hidden=True)
            expected = plain.forward(slots, new, keep, hidden=True)
            pairs = ((got.logits, expected.logits, 2e-4), (got.hidden, expected.hidden, 2e-3))
            for one, other, atol in pairs:
                assert one is not None
                torch.testing.assert_close(one.cpu(), other, atol=atol, rtol=1e-3)
            assert got.finite.all()
        assert 10 < device.replays == captured.static_calls < captured.calls


def a_policy(small: TorchRunner) -> RStitchPlus:
    policy = Policy(PolicyShape(32, rank=0, start=0.1))
    with torch.no_grad():
        policy.head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    return RStitchPlus(moved(policy, small), tau=0.4)


def a_network(small: TorchRunner) -> LearnedDivergenceRouter:
    """R2R's router with every input, and a threshold that follows a share."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DivergenceNetwork(Shape(32, top=20, width=16, rank=8, members=2))
    return LearnedDivergenceRouter(
        moved(network, small), small.embeddings, 0.5, ShareController(0.4, gain=0.5)
    )


def moved(network: Any, small: TorchRunner) -> Any:
    return network if small.device.type == "cpu" else on_device(network, small.device.index)


TRACES = [[random.Random(text).random() < 0.5 for text in range(each, each + 20)] for each in range(12)]
ROUTERS: dict[str, Callable[[TorchRunner], Any]] = {
    "replay": lambda _: ReplayRouter(TRACES),
    "random": lambda _: RandomRouter(0.4),
    "entropy": lambda _: EntropyRouter(0.45),
    "R2R": a_network,
    "R-Stitch+": a_policy,
}


def all_options() -> list[Request]:
    """Requests that use every way to change a distribution, beside greedy ones."""
    rng = random.Random(7)
    samplings = [
        Sampling(),
        Sampling(0.8, top_p=0.9, seed=1),
        Sampling(0.7, top_k=20, seed=2),
        Sampling(1.0, min_p=0.05, seed=3),
        Sampling(repetition_penalty=1.3),
        Sampling(0.9, frequency_penalty=0.4, presence_penalty=0.2, seed=5),
        Sampling(0.8, logit_bias=((3, -100.0), (5, 2.0)), seed=6),
        Sampling(1.2, top_p=0.95, top_k=40, repetition_penalty=1.1, seed=7),
    ]
    return [
        Request(a_prompt(rng), max_new_tokens=12, sampling=each, logprobs=n % 4 if n % 2 else None)
        for n, each in enumerate(samplings)
    ]


@pytest.mark.parametrize(
    ("router", "draft"),
    [("replay", 0), ("replay", None), ("random", 3), ("entropy", 0), ("entropy", None)]
    + [(router, draft) for router in ("R2R", "R-Stitch+") for draft in (0, None)],
)
def test_texts_are_those_of_the_cpu(router: str, draft: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [*requests_of(5, 4, max_new_tokens=16), *all_options()]
    seeds = (1, NEAR + 1)
    plain = [TorchRunner(build(seed=seed), slots=5, context=120) for seed in seeds]
    rule = ROUTERS[router]
    decoder = MixedDecoder(*plain, tokenizer=Letters(), router=rule(plain[1]), draft=draft)
    expected = decoder.generate_all(requests)
    models = [build(seed=seed) for seed in seeds]
    with emulated_cuda(monkeypatch) as device:
        runners = [GraphRunner(on_device(model), slots=5, context=120) for model in models]
        decoder = MixedDecoder(*runners, tokenizer=Letters(), router=rule(runners[1]), draft=draft)
        device.waits.clear()
        got = decoder.generate_all(requests)
    assert [each.error for each in got] == [None] * len(requests)
    assert tokens_of(got) == tokens_of(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.trace.made_by == other.trace.made_by
        assert one.trace.entropies == pytest.approx(other.trace.entropies, abs=1e-4)
    assert device.replays > 40
    calls = decoder.stats.small.calls + decoder.stats.large.calls
    waits = [each for each in device.waits if each != "event"]
    assert waits.count("_to_copy") == calls, "one download a call"
    assert len(waits) - calls <= 4, "biases are uploaded once a text; nothing else is waited for"


def test_recorded_decisions_and_features_of_a_text_are_those_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What routers and policies learn from, read where they are trained."""
    requests, text = requests_of(3, 3, max_new_tokens=20), [5, 9, 70, 33, 1, 2, 60]

    def learned_from(pair: list[TorchRunner]) -> tuple[list[Any], Any]:
        recorder = Recorder([1, 2, 3], 20)
        router = RStitchPlus(a_policy(pair[1]).policy, 0.7, recorder=recorder)
        MixedDecoder(*pair, tokenizer=Letters(), router=router).generate_all(requests)
        return recorder.read(), read_features(pair[1], [4, 8, 15], text, count=5)

    seeds = (1, NEAR + 1)
    decisions, features = learned_from([TorchRunner(build(seed=seed), slots=3) for seed in seeds])
    models = [build(seed=seed) for seed in seeds]
    with emulated_cuda(monkeypatch):
        got, there = learned_from([GraphRunner(on_device(each), slots=3, context=60) for each in models])
    assert sum(map(len, decisions)) > 10
    for one, other in [*zip(got, decisions, strict=True), (there, features)]:
        for name in type(other).__slots__:
            torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("draft", [0, None])
@pytest.mark.parametrize("router", ["replay", "entropy", "R2R"])
def test_a_pair_on_two_gpus_writes_the_same(
    router: str, draft: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, seeds = [*requests_of(5, 2), *all_options()], (1, NEAR + 1)
    plain = [TorchRunner(build(seed=seed), slots=5, context=120) for seed in seeds]
    rule = ROUTERS[router]
    decoder = MixedDecoder(*plain, tokenizer=Letters(), router=rule(plain[1]), draft=draft)
    expected = decoder.generate_all(requests)
    models = [build(seed=seed) for seed in seeds]
    with emulated_cuda(monkeypatch, 2):
        # The small model on the second GPU.
        runners = [
            GraphRunner(on_device(model, index), slots=5, context=120)
            for index, model in zip((0, 1), models, strict=True)
        ]
        decoder = MixedDecoder(*runners, tokenizer=Letters(), router=rule(runners[1]), draft=draft)
        got = decoder.generate_all(requests)
    assert [each.error for each in got] == [None] * len(requests)
    assert tokens_of(got) == tokens_of(expected)


def test_an_upload_does_not_wait(cuda: Device) -> None:
    for values, dtype in (([1, 2], torch.int64), ([0.5], torch.float32), ([True, False], torch.bool)):
        there = to_device(values, torch.device("cuda"))
        assert (there.dtype, there.device.type) == (dtype, "cuda")
    assert cuda.waits == []
    assert there.tolist() == [True, False]


def test_a_folder_is_loaded_to_cuda_with_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    prompt = [random.Random(1).randrange(VOCABULARY) for _ in range(9)]
    expected = TorchRunner(model).extend([0], [prompt])
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # its threads do not know the emulated device
    with emulated_cuda(monkeypatch) as device:
        loaded = load_runner(tmp_path, slots=2, context=100, dtype=torch.float32)
        assert isinstance(loaded, GraphRunner), "the default where there is a GPU"
        torch.testing.assert_close(loaded.extend([0], [prompt]).cpu(), expected, atol=2e-4, rtol=1e-3)
        assert device.replays == 1


# --- the benchmark ------------------------------------------------------------------------------------------


def test_the_benchmark_of_gpus_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """All of it, with tiny shapes: the first minutes on a real GPU are not spent on a slip."""
    out = tmp_path / "found.json"
    monkeypatch.setattr(graphs, "FIRST_KEYS", 128)  # as it is: few graphs
    given = ["--device", "cuda", "--tiny", "--streams", "1", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), *given])
    with emulated_cuda(monkeypatch), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARK), run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    assert (found["faults"], ended.value.code) == ([], 0)
    assert found["graph_error"] < 1e-3
    for streams in ("streams_1", "streams_2"):
        assert found[streams]["mixed"]["tok_s"] > 0
        assert found[streams]["graphs"]["large"] > 3


def test_a_part_of_the_benchmark_that_fails_is_told_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    given = ["--device", "cpu", "--streams", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), *given])

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(call_times, "measure", broken)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARK), run_name="__main__")
    found = json.loads(out.read_text())
    assert ended.value.code == 1
    assert [each["part"] for each in found["faults"]] == ["call_ms"]
    assert "illegal memory access" in found["faults"][0]["trace"]
    assert found["streams_1"]["mixed"]["tok_s"] > 0
    assert "speculative_predicted" not in found["streams_1"]
