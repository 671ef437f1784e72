"""Static calls against the dynamic path and against no cache at all, on tiny random models.

Without a GPU the static step runs eagerly: the tests check the function that CUDA captures, not the
capture.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from host_reads import no_host_reads
from tiny_models import (
    CONFIGS,
    NEAR,
    VOCABULARY,
    Letters,
    a_prompt,
    build,
    plain_logits,
    plain_stitch,
    requests_of,
    tokens_of,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from viaticum.decoders import MixedDecoder, Request, Sampling, TorchRunner, graphs, load_runner
from viaticum.decoders.blocks import BLOCK
from viaticum.decoders.fused_layers import FusedAttention, fuse_layers
from viaticum.decoders.graphs import GraphRunner, GraphShape, StaticCache, key_bucket
from viaticum.errors import ModelError
from viaticum.routers.token import DivergenceRouter, EntropyRouter, ReplayRouter, Step, entropy

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def short_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key lengths of 8, 12, 16, 24, ... so that tiny texts cross many of them."""
    monkeypatch.setattr(graphs, "FIRST_KEYS", 8)


def a_graph_runner(kind: str = "qwen2", seed: int = 0, slots: int = 1, context: int = 200) -> GraphRunner:
    return GraphRunner(build(kind, seed), slots=slots, context=context)


# --- one call -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_static_calls_equal_dynamic_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged rows, some in few slots and some far apart, that come and go; prompts are read dynamically."""
    rng = random.Random(kind)
    static, dynamic = a_graph_runner(kind, slots=7), TorchRunner(build(kind), slots=7)
    shapes = seen_shapes(static, monkeypatch)
    for _ in range(60):
        slots = rng.sample(range(7), rng.choice([1, 2, 2, 3, 5, 7]))
        for slot in slots:
            if rng.random() < 0.1 or len(dynamic.cached_tokens[slot]) > 150:
                for each in (static, dynamic):
                    each.reset(slot)
            elif rng.random() < 0.1:
                for each in (static, dynamic):
                    each.truncate(slot, len(each.cached_tokens[slot]) // 2)
        new = [a_prompt(rng, rng.choice([1, 1, 3, 7, 40])) for _ in slots]
        keep = [rng.choice([1, len(each)]) for each in new]
        got, expected = (each.forward(slots, new, keep, hidden=True) for each in (static, dynamic))
        assert static.cached_tokens == dynamic.cached_tokens
        torch.testing.assert_close(got.logits, expected.logits, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(got.hidden, expected.hidden, atol=2e-3, rtol=1e-3)
        assert got.finite.tolist() == expected.finite.tolist()
        if got.tokens is not None:
            assert got.tokens.tolist() == expected.logits.argmax(-1).tolist()
            torch.testing.assert_close(got.entropy, entropy(expected.logits), atol=1e-4, rtol=1e-3)
    assert 30 < static.static_calls < static.calls, "both ways of a call are needed"
    assert len({shape.keys for shape in shapes}) >= 5
    assert len({(shape.rows, shape.tokens) for shape in shapes}) >= 8


def seen_shapes(runner: GraphRunner, monkeypatch: pytest.MonkeyPatch) -> set[GraphShape]:
    shapes: set[GraphShape] = set()
    replay = runner._replay

    def watched(shape: GraphShape) -> None:
        shapes.add(shape)
        replay(shape)

    monkeypatch.setattr(runner, "_replay", watched)
    return shapes


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_one_sequence_equals_a_forward_without_cache(kind: str) -> None:
    under_test = a_graph_runner(kind)
    text = [rng.randrange(VOCABULARY) for rng in [random.Random(3)] for _ in range(30)]
    under_test.extend([0], [text[:5]])
    for end in range(6, 30):
        got = under_test.extend([0], [text[end - 1 : end]])
        torch.testing.assert_close(got[0], plain_logits(text[:end], kind), atol=2e-4, rtol=1e-3)
    assert under_test.static_calls == under_test.calls == 25


def test_results_outlive_the_next_call() -> None:
    under_test = a_graph_runner(slots=2)
    heads = under_test.forward([0], [[1, 2]], [2], hidden=True)
    assert heads.tokens is not None
    parts = (heads.logits, heads.finite, heads.tokens, heads.entropy, heads.hidden)
    before = [part.clone() for part in parts if part is not None]
    under_test.forward([0, 1], [[5, 7], [8]], [2, 1], hidden=True)
    assert all(torch.equal(part, was) for part, was in zip(parts, before, strict=True) if part is not None)


def test_memory_is_taken_once_and_never_moves() -> None:
    under_test = a_graph_runner(slots=3, context=100)
    assert under_test.pool.limit == 3 * 4
    where = [layer.data_ptr() for layer in (*under_test._cache.keys, *under_test._cache.values)]
    assert len(where) == 4
    under_test.extend([1], [[4] * 60])
    for _ in range(40):
        under_test.extend([1, 2], [[5], [6]])
    under_test.reuse_prefix(0, [4] * 30)
    under_test.discard(1)
    under_test.extend([1], [[4] * 100])
    assert where == [layer.data_ptr() for layer in (*under_test._cache.keys, *under_test._cache.values)]
    assert under_test.pool.limit == 3 * 4


def test_padding_writes_where_nothing_is_read() -> None:
    """What fills a call up leaves every slot as it was."""
    under_test = a_graph_runner(slots=4)
    under_test.extend([0, 1, 2, 3], [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]])
    before = [layer[:-BLOCK].clone() for layer in under_test._cache.keys]
    under_test.extend([0, 1, 3], [[1], [5], [2, 3, 4, 5, 6]])  # a bucket of four rows by six tokens
    written = [(0, 3), (1, 2), *[(3, position) for position in range(4, 9)]]
    for layer, was in zip(under_test._cache.keys, before, strict=True):
        changed = (layer[:-BLOCK] != was).any(1).any(-1).nonzero().flatten().tolist()
        assert changed == sorted(under_test._cache.address(*place) for place in written)


def test_nan_stays_in_its_row() -> None:
    """Padding reads token 0: its NaN reaches neither other rows nor later sequences."""
    model = build()
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = float("nan")
    under_test = GraphRunner(model, slots=3, context=64)
    under_test.extend([0, 2], [[4, 5, 6], [7]])
    with pytest.raises(ModelError, match=r"\[1\]"):
        under_test.extend([1, 2], [[0], [8]])
    got = under_test.extend([0, 1, 2], [[9], [1] * 5, [3]])
    for row, tokens in enumerate([[4, 5, 6, 9], [1] * 5, [7, 8, 3]]):
        torch.testing.assert_close(got[row], plain_logits(tokens), atol=2e-4, rtol=1e-3)


def test_key_lengths_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [key_bucket(n) for n in (1, 128, 129, 193, 257, 385, 4096, 4097)] == [
        128,
        128,
        192,
        256,
        384,
        512,
        4096,
        6144,
    ]


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_static_step_can_be_captured(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    under_test = a_graph_runner(kind, slots=3)
    replay = under_test._replay

    def watched(shape: GraphShape) -> None:
        with no_host_reads():
            replay(shape)

    monkeypatch.setattr(under_test, "_replay", watched)
    for slots, new in (([0], [[1, 2, 3]]), ([0, 2], [[4], [5, 6]]), ([2], [[7]]), ([0, 1, 2], [[8]] * 3)):
        under_test.extend(slots, new)
    assert under_test.static_calls == 4


def test_a_greedy_step_is_one_upload_and_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    static, _ = both(3, EntropyRouter(1.0))  # the small model writes all
    engine = static.engine()
    for request in requests_of(1, 3):
        engine.add(request)
    engine.step()  # prompts
    counts = {"upload": 0}

    def counted(name: str, original: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            assert options.get("device") is None, "an upload of its own"
            counts[name] = counts.get(name, 0) + 1
            return original(*given, **options)

        return call

    monkeypatch.setattr(torch, "tensor", counted("tensor", torch.tensor))
    small: Any = static.runners[0]
    monkeypatch.setattr(small, "_upload", counted("upload", small._upload))
    with no_host_reads() as seen:
        for _ in range(4):
            engine.step()
    assert seen.copies == ["tolist"] * 4
    assert counts == {"upload": 4}


# --- where a static call is not possible --------------------------------------------------------------------


def test_no_memory_for_a_graph_leaves_its_bucket_to_the_dynamic_path(monkeypatch: pytest.MonkeyPatch) -> None:
    under_test = a_graph_runner()
    tried = []

    def short(shape: GraphShape) -> None:
        tried.append(shape)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(under_test, "_replay", short)
    for end in range(3, 6):
        got = under_test.extend([0], [[1, 2, 3] if end == 3 else [end]])
        torch.testing.assert_close(got[0], plain_logits([1, 2, 3, 4, 5][:end]), atol=2e-4, rtol=1e-3)
    assert under_test.static_calls == 0
    assert len(tried) == len(set(tried)) == 2, "a bucket that was refused is not tried again"


def test_no_memory_for_the_cache_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(cache: StaticCache, like: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(StaticCache, "_empty", short)
    with pytest.raises(ModelError, match="all its blocks at once"):
        a_graph_runner()


def test_rotation_that_depends_on_the_length_is_dynamic() -> None:
    config: Any = copy.deepcopy(CONFIGS["qwen2"])
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = AutoModelForCausalLM.from_config(config)
    under_test = GraphRunner(model, slots=1, context=64)
    under_test.extend([0], [[1, 2]])
    assert (under_test.calls, under_test.static_calls) == (1, 0)


def test_a_folder_is_loaded_with_graphs_where_they_are_asked_for(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    loaded = load_runner(tmp_path, slots=2, context=40, dtype=torch.float32, graphs=True)
    assert isinstance(loaded, GraphRunner)
    torch.testing.assert_close(loaded.extend([1], [[5, 6]])[0], plain_logits([5, 6]), atol=2e-4, rtol=1e-3)
    assert type(load_runner(tmp_path, dtype=torch.float32)) is TorchRunner, "by default on CUDA alone"
    assert type(load_runner(tmp_path, dtype=torch.float32, graphs=False)) is TorchRunner


# --- fused layers -------------------------------------------------------------------------------------------


def matrix_weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_leaner_layers_compute_the_same(kind: str) -> None:
    plain, changed = TorchRunner(build(kind), slots=2), build(kind)
    weights = matrix_weights(changed)
    assert fuse_layers(changed) == (kind != "gemma2")
    assert any(isinstance(each, FusedAttention) for each in changed.modules()) == (kind != "gemma2")
    assert matrix_weights(changed) == weights
    under_test = TorchRunner(changed, slots=2)
    for new in ([list(range(9)), [4, 5]], [[7], [8, 9, 10]]):
        got, expected = (each.extend([0, 1], new) for each in (under_test, plain))
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)


def test_joined_layers_give_up_their_weights() -> None:
    """A reference to a replaced layer keeps no memory: else a large model would exist twice."""
    model = build()
    replaced = [each for each in model.base_model.layers.modules() if isinstance(each, nn.Linear)]
    assert fuse_layers(model)
    kept = {id(each) for each in model.modules()}
    assert len(kept & set(map(id, replaced))) == 4, "o_proj and down_proj of two layers"
    assert not [list(each.parameters()) for each in replaced if id(each) not in kept and [*each.parameters()]]


def test_layers_that_cannot_be_joined_stay() -> None:
    model = build()
    model.base_model.layers[1].mlp.gate_proj = nn.Sequential(model.base_model.layers[1].mlp.gate_proj)
    assert not fuse_layers(model)
    assert not any(isinstance(each, FusedAttention) for each in model.modules())


def test_biases_of_some_joined_layers_alone() -> None:
    config = Qwen2Config(**{**CONFIGS["qwen2"].to_dict(), "hidden_size": 16})
    model, same = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias = None
    same.load_state_dict(model.state_dict(), strict=False)
    for layer in same.model.layers:
        layer.self_attn.k_proj.bias = None
    assert fuse_layers(model)
    got, expected = (TorchRunner(each, slots=1).extend([0], [[1, 2, 3, 4]]) for each in (model, same))
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)


# --- the engine with static calls ---------------------------------------------------------------------------


def both(slots: int, router: Any, kind: str = "qwen2", **values: Any) -> tuple[MixedDecoder, MixedDecoder]:
    """A decoder with static calls and one without."""
    static = [a_graph_runner(kind, seed, slots, context=120) for seed in (1, NEAR + 1)]
    dynamic = [TorchRunner(build(kind, seed), slots=slots, context=120) for seed in (1, NEAR + 1)]
    return tuple(  # type: ignore[return-value]
        MixedDecoder(*pair, tokenizer=Letters(), router=router, **values) for pair in (static, dynamic)
    )


@pytest.mark.parametrize("draft", [0, 3, None])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_mixed_texts_are_the_same_with_graphs(kind: str, draft: int | None) -> None:
    rng = random.Random(f"{kind}{draft}")
    traces = [[rng.random() < 0.5 for _ in range(20)] for _ in range(8)]
    static, dynamic = both(5, ReplayRouter(traces), kind, draft=draft)
    requests = requests_of(5, 8, max_new_tokens=20)
    got, expected = static.generate_all(requests), dynamic.generate_all(requests)
    assert tokens_of(got) == tokens_of(expected)
    assert [each.trace.made_by for each in got] == [each.trace.made_by for each in expected]
    for one, other in zip(got, expected, strict=True):
        assert one.trace.entropies == pytest.approx(other.trace.entropies, abs=1e-4)
        assert one.trace.accepted == other.trace.accepted
    for runner in static.runners.values():
        assert isinstance(runner, GraphRunner)
        assert runner.static_calls > 10


def test_a_stitched_text_equals_decoding_without_cache() -> None:
    runners = [GraphRunner(build(seed=seed), slots=3, context=100) for seed in (1, 0)]
    decoder = MixedDecoder(*runners, tokenizer=Letters(), router=EntropyRouter(0.45))
    for request, got in zip(requests_of(2, 6), decoder.generate_all(requests_of(2, 6)), strict=True):
        tokens, made_by = plain_stitch(request.prompt, 12, 0.45)
        assert (list(got.trace.tokens), list(got.trace.made_by)) == (tokens, made_by)


class Sum(DivergenceRouter):
    """Diverges by the hidden state alone."""

    def score(self, step: Step) -> Tensor:
        assert step.hidden is not None
        return torch.sigmoid(step.hidden.float().sum(-1))


@pytest.mark.parametrize("draft", [0, 2])
def test_sampled_texts_and_routers_that_read_hidden_states(draft: int) -> None:
    static, dynamic = both(4, Sum(0.5), draft=draft)
    rng = random.Random(7)
    requests = [
        Request(a_prompt(rng), max_new_tokens=15, sampling=Sampling(0.8 * (n % 3 > 0), 0.9, 0, n))
        for n in range(8)
    ]
    got, expected = static.generate_all(requests), dynamic.generate_all(requests)
    assert tokens_of(got) == tokens_of(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.trace.scores == pytest.approx(other.trace.scores, abs=2e-3, nan_ok=True)
        assert one.trace.made_by == other.trace.made_by


def test_greedy_tokens_come_from_the_static_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a greedy step is computed again from its logits."""

    def never(*args: Any) -> Any:
        raise AssertionError("computed twice")

    from viaticum.decoders import engine, rows

    static, _ = both(2, EntropyRouter(0.4))
    monkeypatch.setattr(rows, "sample", never)
    for module in (engine, rows):
        monkeypatch.setattr(module, "entropy", never)
    results: Sequence[Any] = static.generate_all(
        [Request([1, 2, 3], max_new_tokens=8), Request([4], max_new_tokens=8)]
    )
    assert [each.finish_reason for each in results] == ["length", "length"]


@pytest.mark.parametrize(
    ("lengths", "calls", "static"),
    [
        ([1] * 8, 1, 1),
        ([1] * 31 + [8], 1, 1),
        ([1] * 31 + [18], 1, 0),
        ([1] * 30 + [8, 100], 1, 0),
        ([1] * 30 + [12, 100], 1, 0),
        ([30, 40], 1, 0),
    ],
)
def test_rows_that_no_shape_holds_are_one_packed_call(lengths: list[int], calls: int, static: int) -> None:
    """The weights are read once a step, whatever the rows' lengths."""
    rng = random.Random(len(lengths))
    under_test, plain = (kind(build(), slots=32, context=256) for kind in (GraphRunner, TorchRunner))
    slots = rng.sample(range(32), len(lengths))
    new = [[rng.randrange(97) for _ in range(length)] for length in lengths]
    keep = [min(length, 2) for length in lengths]
    heads, wanted = (each.forward(slots, new, keep, hidden=True) for each in (under_test, plain))
    assert (under_test.calls, under_test.static_calls) == (calls, static)
    torch.testing.assert_close(heads.logits, wanted.logits, atol=2e-4, rtol=1e-3)
    assert heads.hidden is not None
    assert wanted.hidden is not None
    torch.testing.assert_close(heads.hidden, wanted.hidden, atol=2e-4, rtol=1e-3)
    assert under_test.cached_tokens == plain.cached_tokens
