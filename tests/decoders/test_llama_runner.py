"""llama.cpp as a back end: what it is refused for, its cache, its errors, and the decoder on top of it.

What it has in common with other back ends is in test_runner_conformance.py.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import random
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gguf import write_tiny_gguf
from tiny_models import (
    VOCABULARY,
    Letters,
    a_prompt,
    build,
    empty,
    plain_logits,
    reference,
    requests_of,
    tokens_of,
)
from torch import Tensor

from viaticum.decoders import MixedDecoder, Request, Runner, TorchRunner, load_runner, loaded_model
from viaticum.decoders import llama_library as llama
from viaticum.decoders import llama_runner as module
from viaticum.decoders.blocks import BLOCK, OutOfBlocks, blocks_of
from viaticum.decoders.llama_model import LlamaModel
from viaticum.decoders.llama_runner import LlamaRunner
from viaticum.decoders.load import default_engine
from viaticum.decoders.memory import LOGITS_COPIES
from viaticum.errors import InputError, MissingExtra, ModelError, WeightsError
from viaticum.routers.token import AlwaysLarge, DivergenceRouter, EntropyRouter, Step, entropy

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The models of seeds 0 (large), 1 (small) and 100 (like 0)."""
    folder = tmp_path_factory.mktemp("gguf")
    return {seed: write_tiny_gguf(folder / f"{seed}.gguf", build(seed=seed), eos=90) for seed in (0, 1, 100)}


def hold(path: Path, slots: int = 1, context: int | None = 200) -> LlamaRunner:
    return LlamaRunner(path, slots=slots, context=context, cache_dtype=torch.float32)


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)


# --- the decoder on top of it -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_r_stitch_writes_what_two_models_without_a_cache_write(files: dict[int, Path], seed: int) -> None:
    """A hundred random prompts each, four at a time; logits agree to 2e-4, so tokens and turns are equal."""
    rng = random.Random(seed)
    tau = (0.6, 0.7, 0.75, 0.8, 0.85)[seed]
    small: Runner = hold(files[100], slots=4)
    if seed % 2:
        small = TorchRunner(build(seed=100), slots=4, context=200)
    decoder = MixedDecoder(hold(files[0], slots=4), small, tokenizer=Letters(), router=EntropyRouter(tau))
    requests = [Request(a_prompt(rng), max_new_tokens=rng.randrange(1, 6)) for _ in range(100)]
    results = decoder.generate_all(requests)
    for request, result in zip(requests, results, strict=True):
        expected = stitched(list(request.prompt), request.max_new_tokens, tau)
        assert (list(result.trace.tokens), list(result.trace.made_by)) == expected
    assert empty(decoder)


def stitched(prompt: list[int], length: int, tau: float) -> tuple[list[int], list[int]]:
    """R-Stitch as in its paper with the large model of seed 0 and the small one of seed 100, uncached."""
    tokens, made_by, active = list(prompt), [], 0
    while len(made_by) < length:
        logits = plain_logits(tokens, seed=0 if active else 100)
        sure = float(entropy(logits[None])) <= tau
        if not active and not sure:
            active = 1
            continue
        tokens.append(int(logits.argmax()))
        made_by.append(active)
        active = 0 if sure else 1
    return tokens[len(prompt) :], made_by


@pytest.mark.parametrize("draft", [0, 3, None])
def test_drafts_leave_greedy_text_as_it_is(files: dict[int, Path], draft: int | None) -> None:
    decoder = MixedDecoder(
        hold(files[0], slots=3),
        hold(files[100], slots=3),
        tokenizer=Letters(),
        router=AlwaysLarge(),
        draft=draft,
        draft_cost=0.1,
    )
    requests = requests_of(4, 12)
    for request, result in zip(requests, decoder.generate_all(requests), strict=True):
        model = [True] * len(result.trace.tokens)
        assert list(result.trace.tokens) == alone(list(request.prompt), len(model))
    assert draft == 0 or decoder.stats.accepted > 0


def alone(prompt: list[int], length: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(int(plain_logits(tokens, seed=0).argmax()))
    return tokens[len(prompt) :]


class BySum(DivergenceRouter):
    """Scores a token by the sign of the sum of its hidden state and by the logits."""

    def score(self, step: Step) -> Tensor:
        assert step.hidden is not None
        return torch.sigmoid(step.hidden.float().sum(-1) + 0 * step.logits[:, 0])


@pytest.mark.parametrize("small", ["torch", "llama"])
def test_a_router_over_hidden_states_decides_alike_over_both_engines(
    files: dict[int, Path], small: str
) -> None:
    requests = requests_of(8, 16, max_new_tokens=10)
    router = BySum(0.5)

    def texts(small_runner: Runner, large: Runner) -> list[tuple[Any, ...]]:
        results = MixedDecoder(large, small_runner, tokenizer=Letters(), router=router).generate_all(requests)
        return [(each.trace.tokens, each.trace.made_by) for each in results]

    torch_small = TorchRunner(build(seed=1), slots=4)
    expected = texts(torch_small, TorchRunner(build(seed=0), slots=4))
    mine = hold(files[1], slots=4) if small == "llama" else TorchRunner(build(seed=1), slots=4)
    assert texts(mine, hold(files[0], slots=4)) == expected
    assert {model for _, made_by in expected for model in made_by} == {0, 1}


def test_hidden_states_of_a_long_prompt_cost_no_logits_of_its_other_tokens(files: dict[int, Path]) -> None:
    runner, rng = hold(files[0], slots=2), random.Random(1)
    first, second = ([rng.randrange(VOCABULARY) for _ in range(count)] for count in (60, 5))
    output = runner.forward([0, 1], [first, second], [2, 1], hidden=True)
    assert runner.calls == 2, "one to read, one for what is wanted"
    plain = reference("qwen2", 0)
    with torch.inference_mode():
        states = [
            plain.model(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0]
            for text in (first, second)
        ]
    expected = torch.cat([states[0][-2:], states[1][-1:]])
    assert output.hidden is not None
    assert_close(output.hidden, expected)
    assert_close(output.logits[2], plain_logits(second, seed=0))


def test_keys_in_half_precision_with_flash_attention_are_near(files: dict[int, Path]) -> None:
    runner, rng = LlamaRunner(files[0], slots=3), random.Random(2)
    texts = [a_prompt(rng, 40) for _ in range(3)]
    got = runner.extend(range(3), texts)
    for row, text in zip(got, texts, strict=True):
        torch.testing.assert_close(row, plain_logits(text, seed=0), atol=0.08, rtol=0.02)


# --- the cache ----------------------------------------------------------------------------------------------


def test_the_cache_grows_with_the_texts_and_keeps_what_it_holds(
    files: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_CELLS", 256)
    runner, rng = hold(files[0], slots=3, context=700), random.Random(3)
    before = runner._cells
    texts = [[rng.randrange(VOCABULARY) for _ in range(count)] for count in (300, 20, 650)]
    runner.extend([1], [texts[1]])
    runner.extend([0], [texts[0]])
    runner.reuse_prefix(2, [*texts[0][:100], *texts[2][100:]])
    assert len(runner.cached_tokens[2]) >= 100, "a copy takes no cells"
    texts[2] = [*texts[0][:100], *texts[2][100:]]
    runner.extend([2], [texts[2][len(runner.cached_tokens[2]) :]])
    assert runner._cells > before
    got = runner.extend(range(3), [[5], [6], [7]])
    for row, text, token in zip(got, texts, (5, 6, 7), strict=True):
        assert_close(row, plain_logits([*text, token], seed=0))


def test_prompts_longer_than_a_call_are_read_in_parts(
    files: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 32)
    runner, rng = hold(files[0], slots=2), random.Random(4)
    texts = [[rng.randrange(VOCABULARY) for _ in range(count)] for count in (100, 75)]
    for hidden in (False, True):
        output = runner.forward([0, 1], texts, [40, 1], hidden=hidden)
        assert len(output.logits) == 41
        for row in (0, 20, 39):
            expected = plain_logits(texts[0][: 61 + row], seed=0)
            assert_close(output.logits[row], expected)
        assert_close(output.logits[40], plain_logits(texts[1], seed=0))
        runner.reset(0)
        runner.reset(1)


def test_the_text_that_asks_for_most_is_given_up_when_there_is_no_room(
    files: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_CELLS", 256)
    monkeypatch.setattr(module, "free_bytes", lambda: 0)
    runner = hold(files[0], slots=3, context=400)
    decoder = MixedDecoder(runner, tokenizer=Letters())
    prompts = [[1, 2, 3], list(range(90)) * 3, [4, 5]]
    results = decoder.generate_all([Request(prompt, max_new_tokens=5) for prompt in prompts])
    assert [result.finish_reason for result in results] == ["length", "error", "length"]
    assert isinstance(results[1].error, ModelError)
    assert "not enough memory" in str(results[1].error)
    for index in (0, 2):
        assert list(results[index].trace.tokens) == alone(prompts[index], 5)
    assert empty(decoder)
    again = decoder.generate(Request(list(range(90)) * 2, max_new_tokens=3))
    assert list(again.trace.tokens) == alone(list(range(90)) * 2, 3)


def test_texts_that_do_not_fit_together_wait_and_end_as_if_they_did(
    files: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(6)
    requests = [Request(a_prompt(rng, length), 100) for length in (40, 30, 50, 20, 60)]
    one = MixedDecoder(hold(files[0], context=250), tokenizer=Letters(), loop_guard=None)
    expected = tokens_of(one.generate_all(requests))
    monkeypatch.setattr(module, "FIRST_CELLS", 256)
    monkeypatch.setattr(module, "free_bytes", lambda: 0)
    decoder = MixedDecoder(hold(files[0], 4, 250), tokenizer=Letters(), loop_guard=None)
    engine, found = decoder.engine(), dict[int, tuple[int, ...]]()
    for request in requests:
        engine.add(request)
    while engine.busy:
        found |= {event.index: event.result.trace.tokens for event in engine.step() if event.result}
    assert engine._waiting.preemptions > 0
    assert [found[index] for index in range(5)] == expected
    assert empty(decoder)


@pytest.mark.parametrize("positions", [96, 192, 300])
def test_more_tokens_than_a_small_cache_was_made_for_are_read_in_parts_or_refused(
    files: dict[int, Path], positions: int
) -> None:
    """The cache has more cells than were asked for, a call no more tokens: beyond, the process would end."""
    runner = LlamaRunner(files[0], slots=4, context=96, cache_dtype=torch.float32, positions=positions)
    rng = random.Random(3)
    texts = [[rng.randrange(VOCABULARY) for _ in range(60)] for _ in range(4)]
    logits = runner.extend(range(4), texts)
    for row, text in enumerate(texts):
        assert_close(logits[row], plain_logits(text))
    runner.free_slots = []
    if runner._cells < 320:
        with pytest.raises(OutOfBlocks):
            runner.extend(range(4), [[1] * 20] * 4)
    else:
        runner.extend(range(4), [[1] * 20] * 4)
    runner.close()


def test_a_call_that_finds_no_room_changes_nothing(
    files: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_CELLS", 256)
    monkeypatch.setattr(module, "BATCH_TOKENS", 64)
    monkeypatch.setattr(module, "free_bytes", lambda: 0)
    runner, rng = hold(files[0], slots=3, context=400), random.Random(7)
    texts = [[rng.randrange(VOCABULARY) for _ in range(count)] for count in (100, 40)]
    runner.extend([0, 1], texts)
    runner.free_slots = [2]
    assert runner.make_room({0: 150, 1: 90})
    assert not runner.make_room({0: 150, 1: 90, 2: 60})
    runner.reuse_prefix(1, [*texts[0][:80], 1])
    runner.extend([1], [[1]])
    assert runner.make_room({0: 120, 1: 110, 2: 60}), "80 cells are those of both"
    assert not runner.make_room({0: 120, 1: 210, 2: 60})
    runner.reset(1)
    runner.extend([1], [texts[1]])
    with pytest.raises(OutOfBlocks, match="not enough memory"):
        runner.extend([1, 2], [[3], [1] * 200])  # the first of its parts fit
    assert runner.cached_tokens == [*texts, []]
    for row, text in zip(runner.extend([0, 1], [[5], [6]]), texts, strict=True):
        assert_close(row, plain_logits([*text, 5 if text is texts[0] else 6], seed=0))


def test_texts_that_ended_give_way_before_a_new_one_is_refused(
    files: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_CELLS", 256)
    monkeypatch.setattr(module, "free_bytes", lambda: 0)
    decoder = MixedDecoder(hold(files[0], slots=3, context=400), tokenizer=Letters())
    for seed in range(6):
        rng = random.Random(seed)
        prompt = [rng.randrange(VOCABULARY) for _ in range(150)]
        assert list(decoder.generate(Request(prompt, max_new_tokens=2)).trace.tokens) == alone(prompt, 2)


def test_slots_are_planned_from_the_free_memory(
    files: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(**options: int) -> Runner:
        return load_runner(files[0], engine="llama", slots="auto", **options)

    position = 2 * 2 * 2 * 8 * 2  # keys and values, layers, heads, width, bytes
    text = blocks_of(100) * BLOCK * position + LOGITS_COPIES * 4 * VOCABULARY
    free = LlamaModel(files[0]).mapped + 5 * text * 10 // 9 + 1
    monkeypatch.setattr(loaded_model, "free_bytes", lambda device: free)
    assert planned(context=100).slots == 5
    assert planned(context=100, max_slots=3).slots == 3
    with pytest.raises(ModelError, match="one request of 900 tokens"):
        planned(context=900)


# --- what the file says -------------------------------------------------------------------------------------


def test_a_quantised_file_has_its_embeddings_unpacked_when_asked(
    tmp_path: Path, files: dict[int, Path]
) -> None:
    runner = hold(files[0])
    assert "embeddings" not in vars(runner)
    assert runner.stop_ids == {90}
    assert torch.equal(runner.embeddings, build().get_input_embeddings().weight)


def test_the_settings_beside_a_file_name_further_stop_ids(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", build(), eos=90)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [91, 92]}')
    assert hold(path).stop_ids == {90, 91, 92}
    (tmp_path / "generation_config.json").write_text("[]")
    assert hold(path).stop_ids == {90}


@pytest.mark.parametrize("tensor", ["blk.1.ffn_up.weight", "output_norm.weight"])
def test_a_file_that_lacks_a_tensor_is_refused_by_name(tmp_path: Path, tensor: str) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", build(), leave_out=tensor)
    with pytest.raises(WeightsError, match=rf"model.gguf: .*tensor '{re.escape(tensor)}' not found"):
        hold(path)


def test_a_file_that_is_cut_short_or_none_is_refused(tmp_path: Path, files: dict[int, Path]) -> None:
    path = tmp_path / "model.gguf"
    whole = files[0].read_bytes()
    for data in (whole[:-1000], whole[:200], b"GGUF", b"", b"text" * 100):
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=r"llama.cpp cannot load .*model.gguf: \w+"):
            hold(path)
    with pytest.raises(WeightsError, match="does not exist"):
        hold(tmp_path / "other.gguf")


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path, files: dict[int, Path]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(files[0].read_bytes().replace(b"qwen2", b"qwenX"))
    with pytest.raises(WeightsError, match="unknown model architecture: 'qwenX'"):
        hold(path)


def test_nothing_is_printed(
    files: dict[int, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hold(files[0]).extend([0], [[1, 2]])
    with pytest.raises(WeightsError):
        hold(write_tiny_gguf(tmp_path / "model.gguf", build(), leave_out="output_norm.weight"))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


# --- the wheel ----------------------------------------------------------------------------------------------


def test_the_pin_of_the_extra_is_the_version_of_the_declarations() -> None:
    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"xllamacpp=={llama.VERSION}" in extras["llama"]
    assert f"xllamacpp=={llama.VERSION}" in (root / "constraints.txt").read_text().splitlines()


@pytest.fixture
def fresh_library() -> Any:
    llama.library.cache_clear()
    yield
    llama.library.cache_clear()


@pytest.mark.usefixtures("fresh_library")
def test_without_the_wheel_the_extra_is_named(
    files: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(
        MissingExtra, match=r"xllamacpp is not installed; run: pip install 'viaticum\[llama\]'"
    ):
        load_runner(files[0], engine="llama")


@pytest.mark.usefixtures("fresh_library")
def test_another_version_of_the_wheel_is_refused(
    files: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2026.9.1")
    with pytest.raises(MissingExtra, match=rf"needs xllamacpp=={llama.VERSION}, found 2026\.9\.1"):
        load_runner(files[0], engine="llama")


@pytest.mark.parametrize("structure", ["ModelParams", "ContextParams", "Batch"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_library_with_one_field_less_is_refused(
    structure: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens with a build whose structures differ: here the declarations do."""
    fields = list(getattr(llama, structure)._fields_)
    fields.insert(
        {"first": 0, "middle": len(fields) // 2, "last": len(fields)}[place], ("new", ctypes.c_int64)
    )
    changed = type(structure, (ctypes.Structure,), {"_fields_": tuple(fields)})
    monkeypatch.setattr(llama, structure, changed)
    with pytest.raises(MissingExtra, match=f"is another build than {llama.VERSION}: llama_"):
        llama.Library(llama._library_path())


def test_a_library_with_another_default_or_without_a_function_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(llama._CONTEXT_DEFAULTS, "n_batch", 2049)
    with pytest.raises(MissingExtra, match="gives n_batch 2048, not 2049"):
        llama.Library(llama._library_path())
    monkeypatch.undo()
    monkeypatch.setitem(llama._FUNCTIONS, "llama_of_tomorrow", (None, ()))
    with pytest.raises(MissingExtra, match="llama_of_tomorrow"):
        llama.Library(llama._library_path())
    monkeypatch.undo()
    (tmp_path / "xllamacpp.so").write_text("no library")
    with pytest.raises(MissingExtra, match="cannot be loaded"):
        llama.Library(tmp_path / "xllamacpp.so")


# --- loading ------------------------------------------------------------------------------------------------


def test_an_engine_is_loaded_by_name_from_a_file_or_a_folder(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"holds no model\.gguf"):
        load_runner(tmp_path, engine="llama")
    write_tiny_gguf(tmp_path / "model.gguf", model)
    by_folder = load_runner(tmp_path, engine="llama", context=50, slots=2, dtype="float32")
    by_file = load_runner(tmp_path / "model.gguf", engine="llama", dtype="float16")
    assert isinstance(by_folder, LlamaRunner)
    assert isinstance(by_file, LlamaRunner)
    assert (by_folder.context, by_folder.slots, by_file.context) == (50, 2, 4096)
    assert isinstance(load_runner(tmp_path, engine="torch"), TorchRunner)
    torch.testing.assert_close(
        by_folder.extend([0], [[1, 2]])[0], plain_logits([1, 2], seed=0), atol=2e-4, rtol=1e-3
    )


def test_what_an_engine_cannot_do_is_refused(files: dict[int, Path]) -> None:
    for device in ("cuda", "cuda:1", "mps"):
        with pytest.raises(InputError, match=f"device {device} was asked for"):
            load_runner(files[0], engine="llama", device=device)
    with pytest.raises(InputError, match="float16 or float32"):
        load_runner(files[0], engine="llama", dtype="bfloat16")
    with pytest.raises(InputError, match="tensor_parallel"):
        load_runner(files[0], engine="llama", tensor_parallel=2)
    with pytest.raises(InputError, match="at most 256 texts"):
        load_runner(files[0], engine="llama", slots=257)


def test_the_default_engine_depends_on_the_files_and_the_machine(
    tmp_path: Path, files: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_engine(files[0]) == "llama"
    (tmp_path / "model.gguf").write_bytes(files[0].read_bytes())
    assert default_engine(tmp_path) == "llama", "there is nothing else"
    (tmp_path / "model.safetensors").touch()
    assert default_engine(tmp_path) == "torch", "its weights are not quantised"

    from viaticum.decoders import devices, load

    monkeypatch.setattr(load, "quantised_tensors", lambda header: ["a"])
    monkeypatch.setattr(devices, "_has_bfloat16", lambda device: False)
    assert default_engine(tmp_path) == "llama"
    assert default_engine(tmp_path, weights="bfloat16") == "torch"
    assert default_engine(tmp_path, dtype="float32") == "torch"
    monkeypatch.setattr(devices, "_has_bfloat16", lambda device: True)
    assert default_engine(tmp_path) == "torch"
    monkeypatch.setattr(llama, "VERSION", "0")
    monkeypatch.setattr(devices, "_has_bfloat16", lambda device: False)
    assert default_engine(tmp_path) == "torch", "the pinned wheel is not there"
