"""Loops, the memory plan, and what the runner reads in one call."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CONFIGS, Letters, build, empty, plain_logits, reference
from transformers import Qwen2Config

from viaticum.decoders import (
    LoopGuard,
    MixedDecoder,
    Request,
    TorchRunner,
    free_bytes,
    load_runner,
    loaded_model,
    memory,
    plan_memory,
    torch_runner,
)
from viaticum.decoders.attention import spans
from viaticum.decoders.blocks import BLOCK, BlockPool
from viaticum.decoders.features import read_features
from viaticum.decoders.memory import out_of_memory
from viaticum.decoders.torch_runner import _chunks as chunks_of
from viaticum.errors import InputError, ModelError

pytestmark = pytest.mark.usefixtures("one_thread")

# --- loops --------------------------------------------------------------------------------------------------


def loops_at(tokens: list[int], guard: LoopGuard | None = None) -> int | None:
    """Number of tokens after which the guard finds a loop."""
    watch = (guard or LoopGuard()).detector()
    return next((n for n, token in enumerate(tokens, 1) if watch.push(token)), None)


def slow_loops_at(tokens: list[int], guard: LoopGuard) -> int | None:
    """The definition, evaluated at every token."""
    for n in range(1, len(tokens) + 1):
        for period in range(1, guard.period + 1):
            length = max(guard.tokens, guard.repeats * period)
            tail = tokens[max(0, n - length) : n]
            if len(tail) == length and tail[period:] == tail[:-period]:
                return n
    return None


@pytest.mark.parametrize("seed", range(6))
def test_the_guard_says_what_its_definition_says(seed: int) -> None:
    rng = random.Random(seed)
    found = 0
    for _ in range(25):
        guard = LoopGuard(rng.randrange(1, 9), rng.randrange(2, 5), rng.randrange(2, 20))
        tokens: list[int] = []
        while len(tokens) < 120:
            cycle = [rng.randrange(4) for _ in range(rng.randrange(1, 12))]
            tokens += cycle * rng.randrange(1, 6)
        assert loops_at(tokens, guard) == slow_loops_at(tokens, guard)
        found += loops_at(tokens, guard) is not None
    assert found > 3


@pytest.mark.parametrize("period", [1, 7, 32, 64])
def test_a_loop_is_found_after_any_text(period: int) -> None:
    rng = random.Random(period)
    for before in (0, 100, 4095, 9000):
        text = [rng.randrange(1000) for _ in range(before)]
        loop = list(range(2000, 2000 + period))
        assert loops_at(text + loop * 300) == before + max(256, 8 * period)


def test_text_that_repeats_itself_is_no_loop() -> None:
    """Tables, lists, zeros and refrains, a token a character, which is the hardest case for the guard."""
    texts = [
        "1" + "0" * 100,  # a googol
        "".join(f"{a} x {b} = {a * b}\n" for a in range(1, 13) for b in range(1, 13)),
        "".join(f"{n}. The number {n} is {'even' if n % 2 == 0 else 'odd'}.\n" for n in range(200)),
        "| a | b | c |\n|---|---|---|\n" + "| 0 | 0 | 0 |\n" * 12,
        "[" + ", ".join(["0"] * 64) + "]",
        "-" * 80 + "\n" + "=" * 80,
        "0.142857142857142857142857142857142857142857142857",
        "\n".join(" ".join("1" if i == j else "0" for j in range(16)) for i in range(16)),
        "I must not talk in class.\n" * 7,
        "    return None\n\n\n" * 6 + "def f():\n" * 6,
    ]
    for text in texts:
        assert loops_at([ord(letter) for letter in text]) is None, text[:30]


def test_a_loop_that_breaks_off_is_no_loop() -> None:
    assert loops_at(([1, 2, 3] * 85) + [4] + ([1, 2, 3] * 85)) is None
    assert loops_at([*range(1025)] * 40) is None, "a period of 1025 is longer than the guard looks"
    assert loops_at([*range(65)] * 40, LoopGuard(period=65)) == 520


@pytest.mark.parametrize("period", [65, 100, 257, 700, 1024])
@pytest.mark.parametrize("before", [0, 50, 9000, 20_000])
def test_a_loop_of_whole_paragraphs_is_found_soon_after_it_is_one(period: int, before: int) -> None:
    """Paragraphs that repeat sentences of their own, and begin after thousands of tokens."""
    rng = random.Random(period)
    sentence = [rng.randrange(1000) for _ in range(40)]
    phrase = sentence + [rng.randrange(1000) for _ in range(9)]
    cycle = [*phrase * 5, *(rng.randrange(1000) for _ in range(period))][-period:]
    text = [rng.randrange(1000) for _ in range(before)]
    found = loops_at(text + cycle * 30)
    earliest = before + max(1024, 4 * period)
    assert found is not None
    assert earliest <= found < earliest + 64


def thought_loops_at(tokens: list[int]) -> int | None:
    watch = LoopGuard().detector()
    return next((n for n, token in enumerate(tokens, 1) if watch.push(token, thought=True)), None)


def test_a_thought_that_says_nothing_new_is_a_loop() -> None:
    """Sentences again and again in random order: no cycle, and no end."""
    rng = random.Random(0)
    sentences = [[rng.randrange(5000) for _ in range(rng.randrange(8, 16))] for _ in range(3)]
    tokens = [token for _ in range(800) for token in rng.choice(sentences)]
    assert loops_at(tokens) is None
    found = thought_loops_at(tokens)
    assert found is not None
    assert found < 6000
    fresh = [rng.randrange(5000) for _ in range(10_000)]
    assert thought_loops_at(fresh) is None
    late = thought_loops_at(fresh + tokens)
    assert late is not None
    assert late < 16_000


def test_long_thoughts_that_repeat_their_phrases_are_no_loops() -> None:
    """Thousands of tokens, a token a character: checks, arithmetic, code, tables, enumerations."""
    checks = "".join(
        f"Wait, let me check {n} again. {n} * 17 = {n * 17}, and {n * 17} mod 23 is {n * 17 % 23}. Hmm, "
        f"that is {'right' if n % 3 else 'not what I had'}. Wait, no.\n"
        for n in range(200)
    )
    texts = [
        checks,
        "".join(f"Case {n}: x = {n}. Then f(x) = {n} + {n} = {2 * n}. OK.\n" for n in range(600)),
        "".join(f"| {n} | {n % 2} | {n % 3} | {n % 5} | yes | no |\n" for n in range(800)),
        "".join(f"    if value == {n}:\n        return table[{n}]\n" for n in range(500)),
        "\n".join(" ".join(format(n, "010b")) for n in range(1024)),
        "\n".join(" ".join(str((a * b) % 61) for b in range(60)) for a in range(60)),
        ("def solve(n):\n" + "".join(f"    total += n ** {k}\n" for k in range(40)) + "\nSo:\n") * 3,
        ", ".join(str(n) for n in range(3000)),
        "Let me count: " + "".join(f"r{'r' * (n % 9)}, {n}; " for n in range(1500)),
    ]
    for text in texts:
        tokens = [ord(letter) for letter in text]
        assert loops_at(tokens) is None, text[:40]
        assert thought_loops_at(tokens) is None, text[:40]


def test_the_guard_takes_the_same_memory_for_any_text() -> None:
    watch = LoopGuard().detector()
    rng = random.Random(1)
    sizes = []
    for n in range(30_001):
        watch.push(rng.randrange(100_000), thought=True)
        if n in (10_000, 30_000):
            sizes.append((len(watch._grams), len(watch._gram_counts), watch._tokens.nbytes))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    "values", [{"period": 0}, {"repeats": 1}, {"tokens": 1}, {"long_repeats": 1}, {"stale_tokens": 1}]
)
def test_a_guard_that_makes_no_sense(values: dict[str, int]) -> None:
    with pytest.raises(InputError):
        LoopGuard(**values)


# --- float16 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_that_float16_is_too_small_for_says_so(dtype: torch.dtype) -> None:
    """Activations beyond 65,504, as those of some models trained in bfloat16 are."""
    model = build(seed=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 20_000
    runner = TorchRunner(model.to(dtype))
    (result,) = MixedDecoder(runner, tokenizer=Letters()).generate_all([Request([1, 2, 3], 5)])
    if dtype != torch.float16:
        assert result.error is None
        return
    assert "float16 ends at 65,504" in str(result.error)
    assert "set dtype to bfloat16 or float32" in str(result.error)
    with pytest.raises(ModelError, match="set dtype to bfloat16"):
        runner.extend([0], [[1, 2]])
    with pytest.raises(ModelError, match="set dtype to bfloat16"):
        read_features(runner, [1, 2], [3, 4])
    assert empty(MixedDecoder(runner, tokenizer=Letters()))


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(CONFIGS))
@pytest.mark.parametrize("context", [300, 512, 3000])
def test_the_plan_fits_and_is_not_far_from_what_is_taken(kind: str, context: int) -> None:
    free = 200_000_000
    plan = plan_memory(CONFIGS[kind], context, free, dtype=torch.float32, at_most=1000)
    assert plan.slots > 1
    fewer = plan_memory(CONFIGS[kind], context, free, dtype=torch.float32)
    assert fewer.slots == min(plan.slots, memory.MAX_SLOTS)
    if plan.slots == 1000:
        return
    under_test = TorchRunner(
        build(kind), slots=plan.slots, context=context, blocks=plan.blocks, in_place=False
    )
    under_test.extend(list(range(2)), [[1] * context, [2]])
    cache = under_test._cache
    taken = sum(
        layer.numel() * layer.element_size() for store in (cache.keys, cache.values) for layer in store
    )
    assert under_test.context == context
    assert 0.4 * free < taken < 0.9 * free  # masks take the rest
    with pytest.raises(ModelError, match=r"needs [\d,]+ bytes and 100,000 are free"):
        plan_memory(CONFIGS[kind], context, 100_000, dtype=torch.float32)
    for wrong in ({"context": 0}, {"context": 9, "mean_length": 0}):
        with pytest.raises(InputError):
            plan_memory(CONFIGS[kind], free_bytes=free, **wrong)


def test_the_bytes_that_are_needed_are_enough() -> None:
    with pytest.raises(ModelError) as refused:
        plan_memory(CONFIGS["llama"], 600, 0)
    needed = int(str(refused.value).split()[6].replace(",", ""))
    assert plan_memory(CONFIGS["llama"], 600, needed + 10).slots == 1
    with pytest.raises(ModelError):
        plan_memory(CONFIGS["llama"], 600, int(0.95 * needed))


def test_slots_are_planned_for_texts_of_the_mean_length_and_one_may_have_the_whole_context() -> None:
    """The caches of a 32B and a 1.5B model at 32k tokens beside their weights in 141 GB, as one model."""
    config = Qwen2Config(
        hidden_size=5120, intermediate_size=27648, num_hidden_layers=71, num_attention_heads=40,
        num_key_value_heads=8, vocab_size=152_064,
    )  # fmt: skip
    free, context = 73_000_000_000, 32_768
    whole = plan_memory(config, context, free, mean_length=context)
    mean = plan_memory(config, context, free)
    assert whole.slots <= 7
    assert mean.slots > 2 * whole.slots
    assert mean.blocks * BLOCK >= context
    assert whole.blocks <= mean.blocks < 1.2 * whole.blocks, "the same memory"
    assert plan_memory(config, context, free, slots=3).blocks == 3 * context // BLOCK
    short = plan_memory(CONFIGS["llama"], 4096, 100_000_000, slots=5, dtype=torch.float32)
    few = plan_memory(CONFIGS["llama"], 4096, 57_000_000, slots=5, dtype=torch.float32)
    assert few.blocks < short.blocks, "a given number of slots shares what there is"


def test_a_runner_plans_its_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama").save_pretrained(tmp_path)
    mapped = sum(each.nbytes for each in load_file(tmp_path / "model.safetensors").values())
    assert free_bytes() > 0
    assert load_runner(tmp_path, slots="auto", context=64).slots == memory.MAX_SLOTS
    for free in (6_000_000, 9_000_000):
        monkeypatch.setattr(loaded_model, "free_bytes", lambda device, free=free: free + mapped)
        planned = load_runner(tmp_path, slots="auto", context=64, dtype=torch.float32)
        assert isinstance(planned, TorchRunner)
        expected = plan_memory(CONFIGS["llama"], 64, free, dtype=torch.float32)
        assert (planned.slots, planned.pool.limit) == (expected.slots, expected.blocks)
    monkeypatch.setattr(loaded_model, "free_bytes", lambda device: 1000 + mapped)
    with pytest.raises(ModelError, match="1,000 are free"):
        load_runner(tmp_path, slots="auto", context=64, dtype=torch.float32)


GIGABYTE = 1 << 30
NO_LIMIT = str(0x7FFFFFFFFFFFF000)


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        # As in a container: the group is at the root. A cached file is dropped when memory is wanted.
        ("0::/", {"memory.max": "4", "memory.current": "3", "memory.stat": "2 0.5"}, 3.5),
        # The limit is that of a group above, as systemd sets it.
        ("0::/a.slice/b.scope", {"a.slice/memory.max": "2", "a.slice/memory.current": "1.5"}, 0.5),
        ("0::/a", {"a/memory.max": "max", "a/memory.current": "3"}, None),
        ("0::/../../gone", {"memory.max": "1", "memory.current": "2"}, -1),
        (
            "4:cpu,memory:/docker/x\n0::/",
            {
                "memory/memory.limit_in_bytes": NO_LIMIT,
                "memory/memory.usage_in_bytes": "9",
                "memory/docker/x/memory.limit_in_bytes": "5",
                "memory/docker/x/memory.usage_in_bytes": "4",
                "memory/docker/x/memory.stat": "0 1",
            },
            2,
        ),
    ],
)
def test_free_memory_is_that_of_the_control_groups(
    groups: str, files: dict[str, str], free: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """files: of the groups, in gigabytes; of memory.stat active and inactive cached files."""
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path / "self")
    (tmp_path / "self").write_text(groups + "\n")
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("stat"):
            prefix = "total_" if "memory/" in name else ""
            active, inactive = (int(float(part) * GIGABYTE) for part in text.split())
            text = f"anon 1\n{prefix}active_file {active}\n{prefix}inactive_file {inactive}"
        elif text not in ("max", NO_LIMIT):
            text = str(int(float(text) * GIGABYTE))
        path.write_text(text + "\n")
    found = list(memory._free_in_groups())
    assert min(found, default=None) == (None if free is None else free * GIGABYTE)
    assert 0 <= free_bytes() <= max(0, min([1 << 60, *found]))


def test_a_real_allocator_is_understood() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(failed.value).startswith("not enough memory (")
    assert "\n" not in out_of_memory(failed.value)
    assert "MemoryError" in out_of_memory(MemoryError())
    with pytest.raises(KeyError):
        out_of_memory(KeyError("x"))


# --- tokens of one call -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [5, 16, 1024])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_the_last_positions_of_ragged_rows(kind: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_runner, "PREFILL_TOKENS", width)
    rng = random.Random(f"{kind}{width}")
    under_test = TorchRunner(build(kind), slots=4)
    for _ in range(10):
        slots = rng.sample(range(4), rng.randrange(1, 5))
        new = [[rng.randrange(97) for _ in range(rng.choice([1, 2, 5, 20]))] for _ in slots]
        keep = [rng.randrange(1, min(len(tokens), 6) + 1) for tokens in new]
        before = [list(under_test.cached_tokens[slot]) for slot in slots]
        heads = under_test.forward(slots, new, keep, hidden=True)
        assert heads.hidden is not None
        assert heads.logits.dtype == torch.float32
        assert len(heads.logits) == len(heads.finite) == len(heads.hidden) == sum(keep)
        at = 0
        for old, tokens, last in zip(before, new, keep, strict=True):
            for length in range(len(tokens) - last + 1, len(tokens) + 1):
                text = old + tokens[:length]
                torch.testing.assert_close(heads.logits[at], plain_logits(text, kind), atol=2e-4, rtol=1e-3)
                with torch.inference_mode():
                    hidden = reference(kind, 0).model(torch.tensor([text]), use_cache=False).last_hidden_state
                torch.testing.assert_close(heads.hidden[at], hidden[0, -1], atol=2e-4, rtol=1e-3)
                at += 1
        for slot in slots:
            under_test.truncate(slot, rng.randrange(len(under_test.cached_tokens[slot]) + 1))
    with pytest.raises(InputError):
        under_test.forward([0], [[1, 2]], [3])
    assert under_test.forward([0], [[1]]).hidden is None


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_prefill_once_in_calls_of_bounded_size(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_runner, "PREFILL_TOKENS", 16)
    rng = random.Random(seed)
    lengths = [rng.choice([1, 2, 5, 16, 30, 100]) for _ in range(rng.randrange(1, 7))]
    keep = [rng.randrange(1, length + 1) for length in lengths]
    chunks = list(chunks_of([0] * len(lengths), lengths, keep))
    assert all(sum(end - begin for _, begin, end, _ in chunk) <= 16 for chunk in chunks)
    assert len(chunks) == -(-sum(lengths) // 16)  # no more calls than that takes
    read = [(row, at) for chunk in chunks for row, begin, end, _ in chunk for at in range(begin, end)]
    assert read == [(row, at) for row, length in enumerate(lengths) for at in range(length)]
    wanted = [(row, at) for chunk in chunks for row, _, end, last in chunk for at in range(end - last, end)]
    assert wanted == [
        (row, at) for row, length in enumerate(lengths) for at in range(length - keep[row], length)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_masks_of_long_prompts_are_bounded(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_runner, "PREFILL_TOKENS", 64)
    monkeypatch.setattr(torch_runner, "MASK_TOKENS", 4)
    monkeypatch.setattr(torch_runner, "MASK_PAIRS", 2000)
    rng = random.Random(seed)
    starts = [rng.choice([0, 10, 100, 400, 900]) for _ in range(rng.randrange(1, 7))]
    lengths = [rng.choice([1, 2, 5, 16, 30, 200]) for _ in starts]
    chunks = list(chunks_of(starts, lengths, lengths))
    read = [(row, at) for chunk in chunks for row, begin, end, _ in chunk for at in range(begin, end)]
    assert read == [(row, at) for row, length in enumerate(lengths) for at in range(length)]
    for chunk in chunks:
        prompts = [(end - begin) * (starts[row] + end) for row, begin, end, _ in chunk if end - begin > 4]
        assert sum(prompts) <= 2000, "tokens times keys of rows that read more than the least"
        assert sum(end - begin for _, begin, end, _ in chunk) <= 64
    short = list(chunks_of([900] * 12, [1] * 12, [1] * 12))
    assert len(short) == 1, "a step of decoding is one call, however long the texts are"


def test_long_prompts_in_small_calls_have_the_logits_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_runner, "MASK_TOKENS", 3)
    monkeypatch.setattr(torch_runner, "MASK_PAIRS", 100)
    rng = random.Random(5)
    prompts = [[rng.randrange(97) for _ in range(length)] for length in (40, 1, 23)]
    under_test = TorchRunner(build("qwen2"), slots=3)
    heads = under_test.forward(range(3), prompts)
    for logits, prompt in zip(heads.logits, prompts, strict=True):
        torch.testing.assert_close(logits, plain_logits(prompt, "qwen2"), atol=2e-4, rtol=1e-3)


def test_neighbours_of_one_length_are_attended_to_batches() -> None:
    def rows(slots: list[int], starts: list[int], lengths: list[int], gather: bool) -> list[int]:
        pool = BlockPool(7, 100, in_place=False) if gather else None
        for slot in slots if pool else ():
            assert pool is not None
            pool.extend(slot, 0, 100)
        found = spans(slots, starts, lengths, torch.device("cpu"), pool=pool)
        assert [span.tokens.stop for span in found[:-1]] == [span.tokens.start for span in found[1:]]
        assert found[-1].tokens.stop == sum(lengths)
        return [len(span.positions) for span in found]

    assert rows([0, 1, 2, 5, 6], [9, 9, 9, 9, 9], [1, 1, 1, 1, 1], False) == [3, 2]
    assert rows([0, 1, 2, 5, 6], [9, 9, 9, 9, 9], [1, 1, 1, 1, 1], True) == [5]
    assert rows([0, 1, 2, 3], [9, 9, 9, 9], [1, 1, 3, 1], False) == [2, 1, 1]
    assert rows([0, 1, 2], [99, 9, 9], [1, 1, 1], False) == [1, 2]  # no masked keys by the dozen


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_rows_that_are_taken_together_say_what_they_say_alone(kind: str, in_place: bool) -> None:
    rng = random.Random(kind)
    under_test = TorchRunner(build(kind), slots=6, in_place=in_place)
    for _ in range(10):
        slots = rng.sample(range(6), rng.randrange(2, 7))
        if rng.random() < 0.5:
            slots.sort()
        new = [[rng.randrange(97) for _ in range(rng.choice([1, 1, 1, 2, 4]))] for _ in slots]
        logits = under_test.extend(slots, new)
        for row, slot in enumerate(slots):
            torch.testing.assert_close(
                logits[row], plain_logits(under_test.cached_tokens[slot], kind), atol=2e-4, rtol=1e-3
            )
