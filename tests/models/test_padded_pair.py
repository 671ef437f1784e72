"""A pair of 97 and 112 rows of logits over one tokenizer, as local models load and prompt it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from padded_pair import LARGE_ROWS, SMALL_ROWS, TEMPLATE, write_padded_pair
from tiny_catalogue import write_tiny_model
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from viaticum.catalogue import Catalogue
from viaticum.models.base import Generation
from viaticum.models.local import LocalModels
from viaticum.types import Completion

pytestmark = pytest.mark.usefixtures("one_thread")
CHATS = [[{"role": "user", "content": f"How many hens are {number} hens?"}] for number in range(6)]


@pytest.mark.parametrize("name", ["padded-small", "padded-large", "padded"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_text_has_a_token_that_the_tokenizer_lacks(name: str, temperature: float, tmp_path: Path) -> None:
    file, ids = write_padded_pair(tmp_path)
    model = LocalModels(Catalogue.load(file), slots=3).model(name)
    seen: set[int] = set()
    for _, completion in model.generate_all(CHATS, Generation(40, temperature=temperature)):
        assert completion.trace is not None
        seen.update(completion.trace.tokens)
    assert seen
    assert seen <= ids
    rows = LARGE_ROWS if name == "padded-large" else SMALL_ROWS
    assert model.vocabulary(model.pool.runners(name)).rows == rows


def test_each_model_of_a_pair_reads_its_own_template(tmp_path: Path) -> None:
    file, _ = write_padded_pair(tmp_path, small_template="S:" + TEMPLATE)
    model = LocalModels(Catalogue.load(file)).model("padded")
    prompt = model.prompt(CHATS[0])
    own = model.small_prompt(CHATS[0])
    assert own is not None
    assert model.tokenizer.decode(own) == "S:" + model.tokenizer.decode(prompt)
    done = [each for each in model.stream(CHATS[0], Generation(8)) if isinstance(each, Completion)]
    tokens = done[0].usage.models
    assert tokens["padded-small"].input_tokens == len(prompt) + 2
    if "padded-large" in tokens:
        assert tokens["padded-large"].input_tokens == len(prompt)
    worst = model.worst_case(CHATS[0], 8)
    assert [worst[name].input_tokens for name in model.members] == [len(prompt) + 2, len(prompt)]


def test_equal_templates_are_rendered_once(tmp_path: Path) -> None:
    file, _ = write_padded_pair(tmp_path)
    model = LocalModels(Catalogue.load(file)).model("padded")
    assert model.small_prompt(CHATS[0]) is None
    assert model.vocabulary([]).rows == SMALL_ROWS, "known before anything is loaded"


def test_a_chat_model_beside_its_base_model_has_tokens_of_its_own(tmp_path: Path) -> None:
    """As ChatML was added to models without chats: it reads and ends texts by rows that the other lacks."""
    lines = []
    for seed, name in enumerate(("base", "chat")):
        write_tiny_model(tmp_path / name, seed)
        lines.append(
            f'[models.{name}]\ndescription = "d"\nkind = "local"\ncontext_length = 512\ninput_price = 1\n'
            f'output_price = 1\n[[models.{name}.sources]]\ntype = "path"\npath = "{tmp_path / name}"\n'
        )
    for router in ("speculative", "r-stitch"):
        lines.append(
            f'[models.{router}]\ndescription = "d"\nkind = "pair"\nsmall = "base"\nlarge = "chat"\n'
            f'router = "{router}"\n' + ('tau = 0.5\nmode = "routed"\n' if router == "r-stitch" else "")
        )
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path / "chat")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.eos_token = "<|im_end|>"
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
    fast.save_pretrained(tmp_path / "chat")
    model = Qwen2ForCausalLM.from_pretrained(tmp_path / "chat")
    model.resize_token_embeddings(len(fast))
    with torch.no_grad():  # its end is likely
        model.lm_head.weight[fast.eos_token_id] = 6 * model.lm_head.weight[7]
    model.save_pretrained(tmp_path / "chat")
    file = tmp_path / "catalogue.toml"
    file.write_text("\n".join(lines))
    pool = LocalModels(Catalogue.load(file))
    alone = pool.model("chat").generate(CHATS[0], Generation(12))
    assert alone.finish_reason == "stop"
    for router in ("speculative", "r-stitch"):
        pair = pool.model(router)
        assert max(pair.prompt(CHATS[0])) == fast.eos_token_id == 258
        assert max(pair.small_prompt(CHATS[0]) or ()) <= 256
        done = pair.generate(CHATS[0], Generation(12))
        assert done.usage.models["chat"].input_tokens == len(pair.prompt(CHATS[0])), "it wrote some of it"
        if router == "speculative":
            assert (done.text, done.finish_reason) == (alone.text, alone.finish_reason)
