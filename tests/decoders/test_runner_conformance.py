"""The contract of `Runner`, the same for every back end of `tests/support/runner_backends.py`.

Expected values are those of a model that computes the whole sequence for every token, in float32.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from runner_backends import Backend, backend_params, uncached_hidden, uncached_logits
from tiny_models import CONFIGS, VOCABULARY, a_prompt, build
from transformers import PreTrainedModel

from viaticum.decoders import Runner, graphs
from viaticum.errors import InputError, ModelError, PromptTooLong

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.parametrize("backend", backend_params()),
]
Hold = Callable[..., Runner]
DAMAGED = 96  # the token whose embedding `damaged` replaces by NaN


@pytest.fixture(autouse=True)
def short_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key lengths of static calls of 8, 12, 16, 24, ... so that tiny texts cross many of them."""
    monkeypatch.setattr(graphs, "FIRST_KEYS", 8)


@pytest.fixture
def hold(backend: Backend, tmp_path: Path) -> Iterator[Hold]:
    """Holds a model in a runner of the back end; closes it at the end of the test."""
    held: list[Runner] = []

    def hold(model: PreTrainedModel | None = None, slots: int = 3, context: int = 200) -> Runner:
        folder = tmp_path / str(len(held))
        folder.mkdir()
        held.append(backend.make(build() if model is None else model, folder, slots, context))
        return held[-1]

    yield hold
    for runner in held:
        getattr(runner, "close", lambda: None)()


def damaged() -> PreTrainedModel:
    """A model that computes NaN from one token, in its keys and values too."""
    model = build()
    with torch.no_grad():
        model.get_input_embeddings().weight[DAMAGED] = float("nan")
    return model


# --- what a call returns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_any_mix_of_calls_equals_decoding_without_a_cache(backend: Backend, hold: Hold, kind: str) -> None:
    """Prefills, steps, catch-ups and drafts of ragged rows that are cut, dropped and started again."""
    if kind not in backend.kinds:
        pytest.skip(f"{backend.name} does not hold {kind}")
    rng = random.Random(kind)
    plain, runner = build(kind), hold(build(kind), slots=5, context=160)
    held: list[list[int]] = [[] for _ in range(5)]
    for _ in range(40):
        slots = rng.sample(range(5), rng.randrange(1, 6))
        for slot in slots:
            act = rng.random()
            if act < 0.1 or len(held[slot]) > 110:
                (runner.discard if act < 0.05 else runner.reset)(slot)
                held[slot] = []
            elif act < 0.25:
                length = rng.randrange(len(held[slot]) + 1)
                runner.truncate(slot, length)
                held[slot] = held[slot][:length]
        new = [a_prompt(rng, rng.choice([1, 1, 3, 7, 45])) for _ in slots]
        keep = [rng.choice([1, len(each), rng.randrange(1, len(each) + 1)]) for each in new]
        output = runner.forward(slots, new, keep)
        assert output.logits.dtype == torch.float32
        assert output.logits.shape == (sum(keep), VOCABULARY)
        assert output.finite.tolist() == [True] * sum(keep)
        rows = iter(output.logits)
        for slot, more, last in zip(slots, new, keep, strict=True):
            held[slot] += more
            expected = uncached_logits(plain, held[slot])[-last:]
            backend.assert_close(torch.stack([next(rows) for _ in range(last)]), expected)
        assert runner.cached_tokens == held


def test_a_call_tells_the_most_likely_tokens_and_the_entropy_or_leaves_both_out(
    backend: Backend, hold: Hold
) -> None:
    from viaticum.routers.token import entropy

    runner, rng = hold(), random.Random(0)
    output = runner.forward([0, 1, 2], [a_prompt(rng), a_prompt(rng), [5]])
    assert (output.tokens is None) == (output.entropy is None)
    if output.tokens is not None and output.entropy is not None:
        assert output.tokens.dtype == torch.int64
        assert output.tokens.tolist() == output.logits.argmax(-1).tolist()
        torch.testing.assert_close(output.entropy, entropy(output.logits), atol=1e-4, rtol=1e-3)


def test_hidden_states_are_those_that_the_logits_come_from(backend: Backend, hold: Hold) -> None:
    runner, plain = hold(), build()
    assert runner.forward([1], [[1, 2, 3]]).hidden is None, "they are not asked for"
    if not backend.hidden:
        with pytest.raises((ModelError, InputError)):
            runner.forward([1], [[4]], hidden=True)
        return
    output = runner.forward([2, 1], [[7, 8], [4, 5, 6]], [1, 2], hidden=True)
    expected = torch.cat(
        [uncached_hidden(plain, [7, 8])[-1:], uncached_hidden(plain, [1, 2, 3, 4, 5, 6])[-2:]]
    )
    assert output.hidden is not None
    backend.assert_close(output.hidden.float(), expected)
    head = plain.get_output_embeddings().weight.detach()
    backend.assert_close(output.hidden.float() @ head.T, output.logits)


def test_extend_returns_the_logits_after_the_last_tokens(backend: Backend, hold: Hold) -> None:
    runner, plain = hold(), build()
    got = runner.extend([2, 0], [[1, 2, 3], [9]])
    expected = torch.stack([uncached_logits(plain, [1, 2, 3])[-1], uncached_logits(plain, [9])[-1]])
    backend.assert_close(got, expected)


def test_calls_are_counted(backend: Backend, hold: Hold) -> None:
    runner = hold()
    assert runner.calls == 0
    runner.extend([0], [[1, 2, 3]])
    first = runner.calls
    assert first >= 1
    runner.extend([0, 1], [[4], [5]])
    assert runner.calls > first


# --- what a runner says of its model ------------------------------------------------------------------------


def test_a_runner_describes_its_model(backend: Backend, hold: Hold) -> None:
    model = build()
    model.generation_config.eos_token_id = [90, 91]
    runner = hold(model, slots=2, context=50)
    assert runner.vocabulary == VOCABULARY
    assert runner.context == 50
    assert runner.slots == 2
    assert runner.stop_ids == {90, 91}
    assert runner.weight_bytes > 0
    assert runner.free_slots == [0, 1]
    assert runner.cached_tokens == [[], []]
    logits = runner.extend([0], [[1]])
    assert logits.device.type == runner.device.type


def test_embeddings_are_those_of_the_model(backend: Backend, hold: Hold) -> None:
    runner, expected = hold(), build().get_input_embeddings().weight.detach()
    if backend.embeddings:
        backend.assert_close(runner.embeddings.float(), expected)
        return
    with pytest.raises(ModelError):
        _ = runner.embeddings


# --- slots --------------------------------------------------------------------------------------------------


def test_a_sequence_starts_from_the_longest_prefix_that_any_slot_holds(backend: Backend, hold: Hold) -> None:
    runner, plain, prompt = hold(), build(), list(range(30))
    runner.extend([0], [prompt])
    runner.extend([1], [prompt[:5]])
    assert runner.cached_prefix_length(0, [*prompt[:20], 5]) == 20
    runner.reuse_prefix(2, [*prompt[:20], 5, 6])
    assert runner.cached_tokens == [prompt, prompt[:5], prompt[:20]]
    backend.assert_close(runner.extend([2], [[5, 6]])[0], uncached_logits(plain, [*prompt[:20], 5, 6])[-1])
    runner.reuse_prefix(1, prompt)
    assert runner.cached_tokens[1] == prompt[:-1], "the last token is read again: its logits are wanted"
    backend.assert_close(runner.extend([1], [prompt[-1:]])[0], uncached_logits(plain, prompt)[-1])
    runner.reuse_prefix(1, [90, 91])
    assert runner.cached_tokens == [prompt, [], [*prompt[:20], 5, 6]]
    backend.assert_close(
        runner.extend([0, 2], [[40], [41]]),
        torch.stack(
            [
                uncached_logits(plain, [*prompt, 40])[-1],
                uncached_logits(plain, [*prompt[:20], 5, 6, 41])[-1],
            ]
        ),
    )


def test_a_shared_prefix_outlives_the_slot_that_it_came_from(backend: Backend, hold: Hold) -> None:
    runner, plain, prompt = hold(), build(), list(range(20))
    runner.extend([0], [prompt])
    runner.reuse_prefix(1, [*prompt, 50])
    runner.discard(0)
    runner.extend([0], [[60] * 20])
    backend.assert_close(runner.extend([1], [[50]])[0], uncached_logits(plain, [*prompt, 50])[-1])
    runner.reuse_prefix(1, [*prompt[:9], 70])
    assert runner.cached_tokens == [[60] * 20, prompt[:9], []], "a slot may begin with what it holds"
    backend.assert_close(runner.extend([1], [[70]])[0], uncached_logits(plain, [*prompt[:9], 70])[-1])


@pytest.mark.parametrize("seed", range(5))
def test_any_history_of_slots_leaves_each_with_its_own_text(backend: Backend, hold: Hold, seed: int) -> None:
    """Texts of few tokens, so that they share prefixes of every length."""
    rng = random.Random(seed)
    runner, plain = hold(slots=4, context=60), build()
    held: list[list[int]] = [[] for _ in range(4)]
    for _ in range(50):
        slot = rng.randrange(4)
        act = rng.random()
        if act < 0.5:
            text = [rng.randrange(2) for _ in range(rng.randrange(2, 25))]
            longest = max(runner.cached_prefix_length(each, text) for each in range(4))
            runner.reuse_prefix(slot, text)
            held[slot] = text[: min(longest, len(text) - 1)]
            assert runner.cached_tokens == held
            new = text[len(held[slot]) :]
            held[slot] = text
            backend.assert_close(runner.extend([slot], [new])[0], uncached_logits(plain, text)[-1])
        elif act < 0.7:
            length = rng.randrange(len(held[slot]) + 3)
            runner.truncate(slot, length)
            held[slot] = held[slot][:length]
        elif act < 0.8:
            (runner.reset if rng.random() < 0.5 else runner.discard)(slot)
            held[slot] = []
        elif len(held[slot]) < 59:
            held[slot] = [*held[slot], 1]
            got = runner.extend([slot], [[1]])[0]
            backend.assert_close(got, uncached_logits(plain, held[slot])[-1])
        assert runner.cached_tokens == held


# --- failures -----------------------------------------------------------------------------------------------


def test_a_call_that_is_refused_changes_nothing(backend: Backend, hold: Hold) -> None:
    runner, plain = hold(slots=2, context=10), build()
    runner.extend([0], [[1] * 8])
    calls = runner.calls
    with pytest.raises(PromptTooLong, match="11 tokens do not fit the context of 10"):
        runner.forward([1, 0], [[1], [1, 2, 3]])
    for tokens, keep in (([], 1), ([1], 0), ([1], 2)):
        with pytest.raises(InputError, match="slot 0"):
            runner.forward([0], [tokens], [keep])
    assert runner.cached_tokens == [[1] * 8, []]
    assert runner.calls == calls
    backend.assert_close(runner.extend([0], [[2, 3]])[0], uncached_logits(plain, [1] * 8 + [2, 3])[-1])
    with pytest.raises(InputError, match="at least one slot"):
        hold(slots=0)


def test_logits_that_are_not_finite_are_told_row_by_row(backend: Backend, hold: Hold) -> None:
    runner, plain = hold(damaged()), build()
    output = runner.forward([0, 1, 2], [[1, 2], [3, DAMAGED], [4]], [2, 1, 1])
    assert output.finite.tolist() == [True, True, False, True]
    backend.assert_close(output.logits[:2], uncached_logits(plain, [1, 2]))
    backend.assert_close(output.logits[3], uncached_logits(plain, [4])[-1])


def test_nan_leaves_other_rows_and_later_sequences_alone(backend: Backend, hold: Hold) -> None:
    runner, plain = hold(damaged()), build()
    runner.extend([2], [[4, 5]])
    with pytest.raises(ModelError, match=r"\[1\]"):
        runner.extend([0, 1], [[1, 2, 3], [1] * 6 + [DAMAGED] * 6])
    assert [len(tokens) for tokens in runner.cached_tokens] == [3, 0, 2]
    # Slot 1 is read with 32 keys, most of them those of its former sequence.
    got = runner.extend([0, 1, 2], [[7], [8], [9] * 30])
    for row, tokens in enumerate([[1, 2, 3, 7], [8], [4, 5] + [9] * 30]):
        backend.assert_close(got[row], uncached_logits(plain, tokens)[-1])


def test_a_slot_with_a_damaged_draft_is_discarded_and_started_again(backend: Backend, hold: Hold) -> None:
    runner, plain = hold(damaged()), build()
    runner.extend([0], [[1, 2, 3]])
    output = runner.forward([0], [[4, DAMAGED]], [1])
    assert output.finite.tolist() == [False]
    runner.discard(0)
    assert runner.cached_tokens[0] == []
    backend.assert_close(runner.extend([0], [[1, 2, 3, 4]])[0], uncached_logits(plain, [1, 2, 3, 4])[-1])


def test_after_a_lack_of_memory_a_slot_holds_what_the_runner_says(
    backend: Backend, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend.starve is None:
        pytest.skip(f"{backend.name} is never short of memory in a call")
    runner, plain, rng = hold(context=400), build(), random.Random(0)
    long = [rng.randrange(VOCABULARY) for _ in range(150)]
    for _ in range(2):
        runner.extend([0, 1], [[1, 2, 3], [4, 5]])
        backend.starve(runner, monkeypatch)
        with pytest.raises(ModelError, match="not enough memory"):
            runner.extend([2, 0], [long, [6]])
        monkeypatch.undo()
        held = [list(tokens) for tokens in runner.cached_tokens]
        for slot, before, new in ((0, [1, 2, 3], [6]), (1, [4, 5], []), (2, [], long)):
            assert held[slot] == [*before, *new][: len(held[slot])]
            assert len(held[slot]) >= len(before), "what was processed before the call is kept"
        got = runner.extend([0, 1, 2], [[7], [8], [9]])
        for slot, token in enumerate((7, 8, 9)):
            backend.assert_close(got[slot], uncached_logits(plain, [*held[slot], token])[-1])
        for slot in range(3):
            runner.discard(slot)
