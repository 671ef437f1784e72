"""Differences between transformers' families: attention of their own, RoPE that depends on the call."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, VOCABULARY, Letters
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BloomConfig,
    DogeConfig,
    FalconConfig,
    GPTJConfig,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    NemotronConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    RecurrentGemmaConfig,
    StableLmConfig,
)

from viaticum.decoders import MixedDecoder, Request, Runner, TorchRunner, load_runner
from viaticum.decoders.call_times import measure
from viaticum.decoders.graphs import GraphRunner
from viaticum.decoders.runner import RunnerOutput
from viaticum.errors import ModelError, PromptTooLong, WeightsError
from viaticum.routers.token import EntropyRouter

LIMIT = 16  # positions from which the rotations below depend on the longest text of a call
LONG = [1.0, 1.5, 2.0, 3.0]  # factors of half a head


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32
        ).eval()


@torch.inference_mode()
def plain(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(count)]


@pytest.mark.parametrize(
    "config", [StableLmConfig(**SIZES), NemotronConfig(**SIZES)], ids=["stablelm", "nemotron"]
)
def test_a_family_that_hands_no_arguments_on_to_its_attention(config: PreTrainedConfig) -> None:
    rng, model = random.Random(0), model_of(config)
    runner = TorchRunner(model_of(config), slots=3)
    for _ in range(5):
        slots = rng.sample(range(3), rng.randrange(1, 4))
        logits = runner.extend(slots, [words(rng, rng.choice([1, 2, 9])) for _ in slots])
        for row, slot in enumerate(slots):
            torch.testing.assert_close(
                logits[row], plain(model, runner.cached_tokens[slot]), atol=2e-4, rtol=1e-3
            )


@pytest.mark.parametrize("slots", [1, 3])
def test_a_family_with_an_attention_of_its_own_is_refused(slots: int) -> None:
    """Such attention would read the slots of other sequences."""
    config = GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    with pytest.raises(ModelError, match="GPTJForCausalLM has an attention of its own"):
        TorchRunner(model_of(config), slots=slots).extend([0], [[1, 2, 3]])


def test_a_family_with_sinks_is_refused() -> None:
    config = GptOssConfig(**SIZES | {"head_dim": 8}, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ModelError, match="sinks"):
        TorchRunner(model_of(config)).extend([0], [[1, 2, 3]])


TINY = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            RecurrentGemmaConfig(**TINY, intermediate_size=64, lru_width=32, pad_token_id=0),
            "recurrent_gemma has layers of kind linear_attention",
        ),
        (
            Lfm2Config(
                **TINY | {"num_key_value_heads": 2, "pad_token_id": 0}, layer_types=["conv", "full_attention"]
            ),
            "lfm2 has layers of kind conv",
        ),
        (BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4), "counts the positions"),
        (
            BartConfig(
                vocab_size=VOCABULARY,
                d_model=32,
                decoder_layers=2,
                decoder_attention_heads=4,
                decoder_ffn_dim=64,
            ),
            "counts the positions",
        ),
        (FalconConfig(**TINY), "FalconForCausalLM has an attention of its own.*[(]shape"),
        (
            DogeConfig(
                **TINY, intermediate_size=64, num_key_value_heads=2, keep_window_size=4, pad_token_id=0
            ),
            "masks of their own",
        ),
    ],
    ids=["recurrent", "convolution", "bloom", "bart", "falcon", "doge"],
)
def test_a_model_that_would_be_computed_wrongly_is_refused(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        TorchRunner(model_of(config), slots=2).extend([0, 1], [words(random.Random(0), 9), [4, 5]])


@pytest.mark.parametrize(
    "config",
    [
        PhimoeConfig(**SIZES | {"pad_token_id": 0}, sliding_window=LIMIT, num_local_experts=2),
        Qwen2MoeConfig(
            **SIZES,
            use_sliding_window=True,
            sliding_window=LIMIT,
            max_window_layers=0,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
        Llama4TextConfig(
            **SIZES | {"num_hidden_layers": 4, "pad_token_id": 0},
            head_dim=8,
            intermediate_size_mlp=64,
            attention_chunk_size=LIMIT,
            num_local_experts=2,
        ),
    ],
    ids=["window", "window of Qwen", "chunks"],
)
def test_a_text_ends_where_a_mask_would_hide_its_beginning(config: PreTrainedConfig) -> None:
    """The attention is not told of that mask; up to there it hides nothing."""
    rng, model = random.Random(0), model_of(config)
    runner = TorchRunner(model_of(config), slots=2, context=4 * LIMIT)
    assert runner.context == LIMIT
    texts = [words(rng, LIMIT - 1), words(rng, 5)]
    runner.extend([0, 1], texts)
    logits = runner.extend([0, 1], [[3], [4]])
    for row, text in enumerate(([*texts[0], 3], [*texts[1], 4])):
        torch.testing.assert_close(logits[row], plain(model, text), atol=2e-4, rtol=1e-3)
    with pytest.raises(PromptTooLong):
        runner.extend([0], [[5]])


DYNAMIC = LlamaConfig(
    **SIZES | {"max_position_embeddings": LIMIT},
    rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
)
LONGROPE = Phi3Config(
    **SIZES | {"max_position_embeddings": 8 * LIMIT, "pad_token_id": 0},
    original_max_position_embeddings=LIMIT,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": LONG,
        "original_max_position_embeddings": LIMIT,
    },
)


@pytest.mark.parametrize("long_first", [False, True], ids=["short first", "long first"])
@pytest.mark.parametrize("kind", [TorchRunner, GraphRunner], ids=["runner", "graphs"])
@pytest.mark.parametrize("config", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_a_rotation_that_depends_on_the_length_is_that_of_the_text_alone(
    config: PreTrainedConfig, kind: type[TorchRunner], long_first: bool
) -> None:
    """Independent of the other rows, of earlier calls and of the slot."""
    rng = random.Random(1)
    texts = [words(rng, length) for length in (3, LIMIT - 1, LIMIT, LIMIT + 5, 3 * LIMIT)]
    longest = kind(model_of(config), slots=1, context=4 * LIMIT).context
    texts = [text for text in texts if len(text) < longest]
    if long_first:
        texts.reverse()
    alone = []
    for text in texts:
        runner = kind(model_of(config), slots=1, context=4 * LIMIT)
        alone.append(torch.stack([runner.extend([0], [text])[0], runner.extend([0], [[5]])[0]]))
    together = kind(model_of(config), slots=len(texts), context=4 * LIMIT)
    slots = range(len(texts))
    both = torch.stack([together.extend(slots, texts), together.extend(slots, [[5]] * len(texts))], 1)
    torch.testing.assert_close(both, torch.stack(alone), atol=2e-4, rtol=1e-3)
    # The lengths do matter: a text within the limit would be rotated otherwise beside a long one.
    shortest = texts.index(min(texts, key=len))
    first = plain(model_of(config), texts[shortest])
    torch.testing.assert_close(both[shortest, 0], first, atol=2e-4, rtol=1e-3)


@torch.inference_mode()
def started(runner: Runner, slot: int, text: list[int]) -> Tensor:
    """Logits after a text that may share a prefix with some slot, and after one more token."""
    runner.reuse_prefix(slot, text)
    first = runner.extend([slot], [text[len(runner.cached_tokens[slot]) :]])[0]
    return torch.stack([first, runner.extend([slot], [[5]])[0]])


@pytest.mark.parametrize("kind", [TorchRunner, GraphRunner], ids=["runner", "graphs"])
@pytest.mark.parametrize("slot", [0, 1], ids=["same slot", "other slot"])
@pytest.mark.parametrize(
    ("held", "length", "taken"),
    [
        (LIMIT + 4, 9, 0),  # from a long text to a short one
        (10, LIMIT + 4, 0),  # from a short one to a long one
        (LIMIT + 4, LIMIT + 9, 0),
        (10, 12, 8),
        (LIMIT, LIMIT, 8),  # the second passes the limit while it is written
        (LIMIT, LIMIT + 1, 0),
        (LIMIT + 1, LIMIT, 0),
    ],
)
def test_keys_are_not_taken_over_by_a_text_that_would_rotate_them_otherwise(
    kind: type[TorchRunner], slot: int, held: int, length: int, taken: int
) -> None:
    rng = random.Random(2)
    prompt = words(rng, 8)
    other, text = ([*prompt, *words(rng, count - 8)] for count in (held, length))
    alone = started(kind(model_of(LONGROPE), context=4 * LIMIT), 0, text)
    runner = kind(model_of(LONGROPE), slots=2, context=4 * LIMIT)
    runner.extend([0], [other])
    runner.reuse_prefix(slot, text)
    assert len(runner.cached_tokens[slot]) == taken
    torch.testing.assert_close(started(runner, slot, text), alone, atol=2e-4, rtol=1e-3)


def test_keys_of_a_draft_beyond_the_limit_are_not_taken_over() -> None:
    """The remaining keys are within the limit, but were rotated for the longer sequence."""
    rng = random.Random(3)
    text = words(rng, 12)
    alone = started(TorchRunner(model_of(LONGROPE)), 0, text)
    runner = TorchRunner(model_of(LONGROPE), slots=2)
    runner.extend([0], [text[:8]])
    runner.extend([0], [[*text[8:], *words(rng, LIMIT)]])
    runner.truncate(0, 11)
    torch.testing.assert_close(started(runner, 1, text), alone, atol=2e-4, rtol=1e-3)


def test_calls_are_timed_after_so_many_tokens_in_every_slot() -> None:
    class Watched(TorchRunner):
        def forward(self, slots: Any, tokens: Any, *args: Any, **kwargs: Any) -> RunnerOutput:
            before.append([len(self.cached_tokens[slot]) for slot in slots])
            return super().forward(slots, tokens, *args, **kwargs)

    before: list[list[int]] = []
    measure(Watched(model_of(LONGROPE), slots=2), rows=[1, 2], tokens=[1], context=2 * LIMIT, repeats=1)
    assert before[-2:] == [[2 * LIMIT], [2 * LIMIT] * 2]


@pytest.mark.parametrize("tau", [0.3, 0.6])
@pytest.mark.parametrize("draft", [0, 3])
def test_texts_that_begin_alike_are_written_as_each_is_alone(draft: int, tau: float) -> None:
    """Also around the limit, which some pass during decoding or drafting."""
    rng = random.Random(4)
    prompt = words(rng, LIMIT)
    lengths = (LIMIT - 3, LIMIT, LIMIT + 1, LIMIT + 4, LIMIT + 4)
    requests = [Request([*prompt, *words(rng, 4)][:length], max_new_tokens=8) for length in lengths]
    models = [model_of(LONGROPE), model_of(LONGROPE)]
    with torch.no_grad():
        for weight in models[1].parameters():
            weight.mul_(1.05)

    def decoder(slots: int) -> MixedDecoder:
        large, small = (TorchRunner(copy.deepcopy(model), slots=slots) for model in models)
        return MixedDecoder(large, small, tokenizer=Letters(), router=EntropyRouter(tau), draft=draft)

    alone = [decoder(1).generate(request) for request in requests]
    together = decoder(len(requests)).generate_all(requests)
    for one, other in zip(together, alone, strict=True):
        assert (one.trace.tokens, one.trace.made_by) == (other.trace.tokens, other.trace.made_by)
        assert one.trace.entropies == pytest.approx(other.trace.entropies, abs=1e-4)


def a_folder(path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A saved model whose tensors were changed since."""
    model_of(LlamaConfig(**SIZES)).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM), f"the folder lacks {NORM}; fetch it again"),
        (
            lambda tensors: tensors.update({NORM: torch.ones(16)}),
            f"has the wrong shape for {NORM}",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            r"no place for: model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
    ],
    ids=["missing", "shape", "left over"],
)
def test_weights_that_do_not_fit_the_model_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    """transformers would fill what is missing with random numbers, and pass over the rest."""
    with pytest.raises(WeightsError, match=message):
        load_runner(a_folder(tmp_path, change), dtype=torch.float32)


def test_rotation_frequencies_of_old_files_are_passed_over(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = a_folder(tmp_path, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert load_runner(folder, dtype=torch.float32).vocabulary == VOCABULARY


def change_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: truncate(folder / "model.safetensors", -64), "cannot be read.*fetch them again"),
        (lambda folder: truncate(folder / "model.safetensors", 0), "cannot be read.*fetch them again"),
        (lambda folder: change_config(folder, model_type="zorg"), "cannot be loaded: .*zorg"),
        (
            lambda folder: change_config(
                folder, model_type="zorg", auto_map={"AutoConfig": "configuration.Zorg"}
            ),
            "cannot be loaded: .*custom code",
        ),
        (
            lambda folder: change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
            "cannot be loaded: .*GPTQ",
        ),
        (lambda folder: change_config(folder, eos_token_id="</s>"), "cannot be loaded: .*eos_token_id"),
        (lambda folder: change_config(folder, model_type="t5"), "cannot be loaded: .*T5Config"),
    ],
    ids=["cut off", "empty", "unknown", "code", "quantised", "settings", "no causal LM"],
)
def test_a_folder_that_cannot_be_loaded_is_an_error_of_its_weights(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    """And asks nothing on the terminal: a server has none."""
    damage(a_folder(tmp_path, lambda tensors: None))
    with pytest.raises(WeightsError, match=message):
        load_runner(tmp_path, dtype=torch.float32)


def test_layers_that_are_not_computed_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    a_folder(tmp_path, lambda tensors: tensors.clear())
    change_config(tmp_path, layer_types=["linear_attention", "full_attention"])
    with pytest.raises(ModelError, match="llama has layers of kind linear_attention"):
        load_runner(tmp_path, dtype=torch.float32)
