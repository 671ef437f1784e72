"""A tiny pair on disk whose texts end by themselves and whose models differ at some tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny_catalogue import write_tiny_model

WORDS = ("eggs", "hens", "boxes", "days", "cups", "cars")


def write_pair(folder: Path, noise: float = 0.008) -> Path:
    """Write a catalogue with `near-small`, `near-large`, their pair `near`, and `far` with other weights."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    for name, seed, disturbed in (("small", 3, noise), ("large", 3, 0.0), ("other", 4, 0.0)):
        write_tiny_model(folder / name, seed)
        model: Any = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(5)
            model.lm_head.weight[model.config.eos_token_id] *= 1.3
            for weight in model.parameters():
                weight += disturbed * torch.randn_like(weight)
        model.save_pretrained(folder / name)
    lines = []
    for name in ("small", "large", "other"):
        lines.append(
            f'[models.near-{name}]\ndescription = "random"\nkind = "local"\ncontext_length = 8192\n'
            f"input_price = 0.1\noutput_price = 0.2\n"
            f'[[models.near-{name}.sources]]\ntype = "path"\npath = "{folder / name}"\n'
        )
    for name, small in (("near", "near-small"), ("far", "near-other")):
        lines.append(
            f'[models.{name}]\ndescription = "both"\nkind = "pair"\nsmall = "{small}"\nlarge = "near-large"\n'
            'router = "r-stitch"\ntau = 0.5\nmode = "routed"\n'
        )
    file = folder / "catalogue.toml"
    file.write_text("\n".join(lines))
    return file


def questions() -> Iterator[dict[str, str]]:
    for number in range(1000):
        word = WORDS[number % len(WORDS)]
        yield {"id": f"q{number}", "question": f"{number} {word} and {number // 2} more. How many {word}?"}


def write_questions(path: Path, count: int) -> Path:
    path.write_text(
        "".join(json.dumps(row) + "\n" for row, _ in zip(questions(), range(count), strict=False))
    )
    return path
