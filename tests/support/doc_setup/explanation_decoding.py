"""Two folders of weights, GGUF files, prompts, and a network to score tokens with."""

from pathlib import Path

import torch
from tiny_catalogue import write_tiny_model
from tiny_gguf import write_tiny_gguf
from transformers import AutoModelForCausalLM

from viaticum.decoders import Request

torch.set_num_threads(1)
for seed, name in enumerate(("0.5b", "1.5b", "32b")):
    write_tiny_model(Path("models") / name, seed)
for file in ("models/1.5b/model.gguf", "models/7b.gguf"):
    write_tiny_gguf(Path(file), AutoModelForCausalLM.from_pretrained("models/1.5b"))

prompts = [[49, 50, 51], [52, 53]]
requests = [Request(prompt, max_new_tokens=4) for prompt in prompts]
request = Request([49], max_new_tokens=4)
