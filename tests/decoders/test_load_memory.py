"""The memory that loading takes at its peak: a child process loads a model of 110 MB and watches itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

MEGABYTE = 1_000_000
# Anonymous memory alone: pages of mapped files are the system's to drop. Weights as they are: where the
# processor has AVX-512, packed forms are written beside them.
CHILD = """
import json, sys, threading
import torch, transformers
from viaticum.decoders import load_weights

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

torch.set_num_threads(1)
transformers.Qwen2ForCausalLM  # imported before memory is watched
sys.setswitchinterval(0.0005)
found = {}
for device, dtype in (("meta", "float32"), ("cpu", "bfloat16"), ("cpu", "float32")):
    before, stop = anonymous(), threading.Event()
    peak = before
    def watch():
        global peak
        while not stop.wait(0.0005):
            peak = max(peak, anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = load_weights(sys.argv[1], engine="torch", device=device, dtype=dtype, weights="plain")
    stop.set()
    watcher.join()
    found[f"{device} {dtype}"] = [max(peak, anonymous()) - before, loaded.mapped]
    del loaded
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of 110 MB in bfloat16, the largest tensor 5 MB."""
    config = Qwen2Config(
        vocab_size=2000, hidden_size=768, intermediate_size=3072, num_hidden_layers=6, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("weights")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu").save_pretrained(path)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no anonymous memory")
def test_weights_are_held_once_while_they_load(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True, timeout=240, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert 100 * MEGABYTE < size < 120 * MEGABYTE
    peak, _ = found["meta float32"]  # another device: nothing passes through the host's memory
    assert peak < 15 * MEGABYTE
    peak, mapped = found["cpu bfloat16"]  # as in the file: a mapping of it
    assert peak < 15 * MEGABYTE
    assert mapped == pytest.approx(size, rel=0.01)
    peak, mapped = found["cpu float32"]  # converted: twice the bytes, and no second copy
    assert peak < 2 * size + 15 * MEGABYTE
    assert mapped == 0
