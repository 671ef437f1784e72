"""The catalogue's real models: fetched once by the set-up (`viaticum models pull`), then offline."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from inference_server import InferenceServer, serving
from transformers import AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from viaticum.catalogue import Catalogue
from viaticum.decoders import MixedDecoder, Request, Runner, Server, TorchRunner, load_runner
from viaticum.decoders.served_runner import ServedRunner
from viaticum.models.base import Generation
from viaticum.models.decoding_modes import in_measured_modes
from viaticum.models.local import LocalModels
from viaticum.routers.token import AlwaysLarge, AlwaysSmall, EntropyRouter, TokenRouter
from viaticum.strategies import get as get_strategy
from viaticum.types import Completion, Query
from viaticum.weights import locate

pytestmark = pytest.mark.real

SMALL, LARGE = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"
NEW_TOKENS = 96
PROMPTS = [
    "A farm has 12 goats and 3 times as many hens. How many legs do they have together? Think step by step.",
    "Explain in one paragraph why the sky is blue.",
    "Write a Python function that tells whether a string is a palindrome.",
    "A train leaves at 9:40 and arrives at 13:05. How long does it travel? Think step by step.",
    "List the first ten prime numbers and say how you found them.",
    "Translate into French: The library closes at six in the evening.",
    "Write a SQL query that finds the three customers who spent the most.",
    "A shirt costs $40 and is sold at 15% off, plus 8% tax. What is the price? Think step by step.",
    "Summarise the rules of chess in a few sentences.",
    "What does the following program print? for i in range(3): print(i * i)",
]


def weights(name: str) -> Path:
    return locate(Catalogue.load()[name])


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    gc.collect()


def greedy(model: PreTrainedModel, prompts: list[list[int]], stop: list[int]) -> list[list[int]]:
    """transformers' own decoding with its own cache and attention, all prompts in one batch."""
    pad = stop[0]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.set_attn_implementation("sdpa")
    # repetition_penalty: the model's own generation config has one, which is not greedy decoding.
    out = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        pad_token_id=pad,
        eos_token_id=stop,
    )
    texts = []
    for row in out[:, width:].tolist():
        end = next((n + 1 for n, token in enumerate(row) if token in stop), len(row))
        texts.append(row[:end])
    return texts


@pytest.mark.parametrize(
    ("router", "name"), [(AlwaysSmall(), SMALL), (AlwaysLarge(), LARGE)], ids=["slm", "llm"]
)
def test_always_one_model_equals_its_own_greedy_output(router: TokenRouter, name: str) -> None:
    """10 prompts x 96 tokens. In float32: in bfloat16 two kernels may round a near tie differently.

    The other model of the pair is not loaded for it: a tiny stand-in of the same vocabulary, never called.
    """
    tokenizer = AutoTokenizer.from_pretrained(weights(name), local_files_only=True)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in PROMPTS
    ]
    runner = load_runner(weights(name), slots=len(prompts), dtype=torch.float32, engine="torch")
    stop = [tokenizer.eos_token_id]
    requests = [Request(prompt, max_new_tokens=NEW_TOKENS) for prompt in prompts]
    other = TorchRunner(_tiny_like(runner), slots=len(prompts))
    pair = (runner, other) if name == LARGE else (other, runner)
    decoder = MixedDecoder(*pair, tokenizer=tokenizer, router=router, stop_ids=stop)
    got = [list(result.trace.tokens) for result in decoder.generate_all(requests)]
    assert other.calls == 0
    expected = greedy(runner.model, prompts, stop)
    assert got == expected
    assert sum(map(len, got)) > 500


def _tiny_like(runner: Runner) -> PreTrainedModel:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=runner.vocabulary, **sizes, **heads))


def test_the_large_model_behind_a_server_writes_what_it_writes_here() -> None:
    """A stand-in that speaks vLLM's API serves the 1.5B in float32: the LLM alone, speculative, R-Stitch."""
    tokenizer = AutoTokenizer.from_pretrained(weights(LARGE), local_files_only=True)
    prompts: list[list[int]] = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in PROMPTS[:2]
    ]
    requests = [Request(prompt, max_new_tokens=16) for prompt in prompts]
    large = load_runner(weights(LARGE), slots=4, context=512, dtype=torch.float32, engine="torch")
    small = load_runner(weights(SMALL), slots=2, context=512, engine="torch")
    here = MixedDecoder(large, tokenizer=tokenizer).generate_all(requests)
    server = InferenceServer(large, encode=lambda text: tokenizer.encode(text, add_special_tokens=False))
    with serving(server):
        runner = load_runner(weights(LARGE), engine="served", slots=2, server=Server(server.url, timeout=300))
        assert isinstance(runner, ServedRunner)
        for other, draft in ((None, 0), (small, 2)):
            decoder = MixedDecoder(runner, other, tokenizer=tokenizer, draft=draft)
            results = decoder.generate_all(requests)
            assert [result.trace.tokens for result in results] == [result.trace.tokens for result in here]
        tau = 0.03
        stitch = MixedDecoder(runner, small, tokenizer=tokenizer, router=EntropyRouter(tau))
        traces = [result.trace for result in stitch.generate_all(requests)]
        assert {model for trace in traces for model in trace.made_by} == {0, 1}
        for trace in traces:
            for made_by, after, entropy in zip(
                trace.made_by, trace.made_by[1:], trace.entropies, strict=False
            ):
                assert (made_by, after) != (1, 0) or entropy <= tau
        assert runner.traffic.streamed > 0
        runner.close()


def test_r_stitch_on_the_real_pair() -> None:
    """Both models write; every token obeys the rule; the pieces make the text, and the answer is right."""
    catalogue = Catalogue.load()
    spec = catalogue["qwen2.5-coder-r-stitch"]
    assert spec.tau is not None
    model = LocalModels(in_measured_modes(catalogue)).model(spec.name)
    query = Query(
        "A tray holds 12 eggs. Ann buys 3 trays and uses 6 eggs for a cake. How many eggs are left?", "number"
    )
    strategy = get_strategy("cot")
    *pieces, completion = model.stream(strategy.messages(query), Generation(max_new_tokens=150))
    assert isinstance(completion, Completion)
    assert "".join(str(piece) for piece in pieces) == completion.text
    assert strategy.read(completion, query).value == "30"
    trace = completion.trace
    assert trace is not None
    assert trace.models == (SMALL, LARGE)
    assert set(trace.made_by) == {0, 1}
    before = 0  # the SLM begins
    for made_by, uncertainty in zip(trace.made_by, trace.entropies, strict=True):
        if made_by == 0:
            assert uncertainty <= spec.tau, "an uncertain token of the SLM was kept"
            assert before == 0, "the SLM wrote where the LLM had not handed back"
        before = 0 if uncertainty <= spec.tau else 1
    for member, count in completion.usage.models.items():
        assert count.output_tokens == trace.made_by.count(trace.models.index(member))


def test_solve_on_the_command_line(tmp_path: Path) -> None:
    question = (
        "Mara bakes 48 rolls on Monday and half as many on Tuesday. How many rolls does she bake altogether?"
    )
    done = subprocess.run(
        [sys.executable, "-c", "from viaticum.cli import main; main()", "solve", question, "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"XDG_DATA_HOME": str(tmp_path)},
        timeout=1400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["answer"] == "72"
    assert told["route"]["pair"] == f"{told['model']}+{told['strategy']}"
    assert told["finish_reason"] == "stop"
    assert 0 < told["cost_nanousd"] <= told["held_nanousd"] <= 10_000_000
    assert told["seconds"] > 0
    price = Catalogue.load().prices(told["usage"])
    assert told["cost_nanousd"] == sum(
        price[name].cost(count["input_tokens"], count["output_tokens"])
        for name, count in told["usage"].items()
    )
