"""What a page of the documentation finds: a shell, and, in tests, models that answer at once.

`sh` and `toml` are called by the program that `doc_pages` makes of a page. `furnish` prepares a folder: local
models of a few kilobytes that write one sentence through the real engine, an encoder, files of questions, and
the address of a provider on loopback.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path
from typing import Any

from doc_pages import ROOT, commands
from ports import free_port

# Programs that a machine for tests lacks, and set-up that it has behind it. Their lines are read, not run.
NOT_HERE = {"pip", "make", "docker", "ray", "vllm", "lm_eval", "datasette", "source", "hf", "langgraph"}
LANGGRAPH = "127.0.0.1:2024"  # the port of its own server
LOCAL = ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
SENTENCE = ("48 + 24 = 72. ", "The answer is 72.")
HUB = re.compile(r'type = "hub".*\nrepo = ".*"(\nfile = ".*"\nsha256 = ".*")?')

# LiteLLM's own, at its first call and for every chunk. The program of a page makes errors of all others.
for _message, _category in (
    ("Item .* on TypedDict class .* is using the .ReadOnly. qualifier", UserWarning),
    ("Accessing the 'model_.*' attribute on the instance is deprecated", DeprecationWarning),
):
    warnings.filterwarnings("ignore", _message, _category)


def sh(text: str) -> None:
    """Run a block of shell, line by line; a server goes on in the background until the page ends.

    Raises:
        AssertionError: a command ended with an error; with what it printed.
    """
    for line in commands(text):
        if (words := shlex.split(line))[0] == "export":
            name, _, value = words[1].partition("=")
            os.environ.setdefault(name, value)  # the machine's own key is one that its provider takes
        elif line.startswith("viaticum serve"):
            _serve(line)
        elif (
            not NOT_HERE.intersection(words)
            and not line.startswith("python -m sglang")
            and LANGGRAPH not in line
        ):
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", line],
                capture_output=True,
                text=True,
                check=False,
                timeout=240,
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )
            assert done.returncode == 0, f"$ {line}\n{done.stdout}{done.stderr}"


def toml(text: str) -> None:
    """Take a catalogue that a page shows: a file of the current folder, and added to the user's own."""
    if "[models." not in text:
        return
    folder = os.environ.get("DOC_MACHINE")
    if folder is not None:  # weights that a hub would send
        text = HUB.sub(f'type = "path"\npath = "{folder}/talking"', text)
    own = Path(os.environ["XDG_CONFIG_HOME"]) / "viaticum" / "catalogue.toml"
    Path("catalogue.toml").write_text(f"{own.read_text()}\n{text}")
    own.write_text(f"{own.read_text()}\n{text}")


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def _serve(line: str) -> None:
    """Start `viaticum serve` on the page's port, and wait until it answers."""
    port = os.environ.get("DOC_PORT", "8000")
    command = [*shlex.split(line), "--port", port]
    with Path("serve.log").open("ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=_environment())
    atexit.register(server.wait)
    atexit.register(server.terminate)
    end = time.monotonic() + 200
    while time.monotonic() < end:
        assert server.poll() is None, Path("serve.log").read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{line} did not answer: {Path('serve.log').read_text()}")


def furnish(folder: Path) -> None:
    """Write the models and the encoder that the pages of a run of tests share."""
    from tiny_encoder import write_tiny_encoder

    write_talking_model(folder / "talking", SENTENCE)
    letters = [chr(number) for number in range(33, 127)]
    pieces = [*letters, *(f"##{letter}" for letter in letters), "apples", "marbles", "mother", "brother"]
    write_tiny_encoder(folder, pieces, longest=64)


def arrive(home: Path, machine: Path, provider: str, key: str) -> dict[str, str]:
    """A new user's folder on the machine, and the environment that goes with it.

    Args:
        home: an empty folder, in which the page runs.
        machine: as `furnish` wrote it.
        provider: address of a server that speaks OpenAI's API, with /v1.
        key: that it takes.
    """
    for name in ("examples", "constraints.txt", "constraints-cuda.txt"):
        (home / name).symlink_to(ROOT / name)
    write_questions(home)
    settings = home / "config" / "viaticum"
    settings.mkdir(parents=True)
    sources = dict.fromkeys(LOCAL, "talking") | {"all-minilm-l6-v2": "encoder"}
    (settings / "catalogue.toml").write_text(
        "".join(
            f'[models."{name}"]\n[[models."{name}".sources]]\ntype = "path"\npath = "{machine / kept}"\n'
            for name, kept in sources.items()
        )
    )
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS") if name in os.environ}
    return kept | {
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / "config"),
        "XDG_DATA_HOME": str(home / "data"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "OPENAI_API_KEY": key,
        "OPENAI_BASE_URL": provider,
        "DOC_MACHINE": str(machine),
        "DOC_PORT": str(free_port()),
    }


def write_questions(folder: Path, count: int = 60) -> None:
    """Questions of two kinds: the local models' sentence is right on one, the provider's on the other."""
    rng = random.Random(3)

    def name() -> str:
        return "".join(
            rng.choice(["ba", "ri", "to", "mel", "su", "ka", "no", "lin"]) for _ in range(3)
        ).title()

    rows = []
    for number in range(count):
        if number % 2:
            asked, answer = f"{name()} has {number} apples and {name()} {72 - number}. How many in all?", "72"
        else:
            asked, answer = f"Which number did {name()} tell {name()} to multiply {name()} by?", "391"
        rows.append({"id": f"q{number}", "question": asked, "answer": answer})
    (folder / "QUESTIONS.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows[:2]))
    lines = [f"{row['question']},{row['answer']}" for row in rows]
    (folder / "QUESTIONS.csv").write_text("\n".join(["question,answer", *lines, ""]))


def write_talking_model(folder: Path, sentence: tuple[str, ...]) -> None:
    """A Qwen2 that writes one sentence whatever it reads, and ends: real in every other way.

    Every token's embedding is a unit vector, attention and MLP add nothing, and the head maps each piece of
    the sentence to the next one.
    """
    import torch
    from tiny_catalogue import TEMPLATE
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in sentence])
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    size, heads = 272, 4
    config = Qwen2Config(
        vocab_size=len(fast),
        hidden_size=size,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=32768,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    first, *rest = (fast.convert_tokens_to_ids(piece) for piece in sentence)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(len(fast), size))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        head = torch.zeros(len(fast), size)
        head[first, : len(fast)] = 1.0  # after anything that is not of the sentence
        for here, after in zip((first, *rest), (*rest, fast.eos_token_id), strict=True):
            head[:, here] = 0.0
            head[after, here] = 1.0
        model.lm_head.weight.copy_(head)
    model.save_pretrained(folder)
