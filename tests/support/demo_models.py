"""The demo's models by other weights: a tiny real pair, or scripted ones that take their time."""

from __future__ import annotations

from pathlib import Path

from token_pairs import write_pair

SMALL, LARGE, PAIR = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "qwen2.5-coder-r-stitch"
ENCODER, DIMENSIONS = "all-minilm-l6-v2", 384


def write_tiny_demo(folder: Path) -> Path:
    """A catalogue in which the default pair and the encoder have tiny weights; their prices stay."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    write_pair(folder)
    words = ["how", "many", "is", "the", "what", "which", "of", *(f"w{n}" for n in range(DIMENSIONS - 7))]
    SentenceTransformer(modules=[BoW(words)], device="cpu").save(str(folder / "encoder"))
    lines = []
    for name, weights in ((SMALL, "small"), (LARGE, "large"), (ENCODER, "encoder")):
        lines.append(
            f'[[models."{name}".sources]]\ntype = "path"\npath = "{folder / weights}"\n'
            if name == ENCODER
            else f'[models."{name}"]\ncontext_length = 8192\n'
            f'[[models."{name}".sources]]\ntype = "path"\npath = "{folder / weights}"\n'
        )
    lines.append(f'[models."{PAIR}"]\ntau = 0.75\n')
    # A learned policy is of the shipped pair's weights, and refuses others.
    lines.append('[models."r-stitch+"]\nrouter = "r-stitch"\ntau = 0.75\n')
    return write_catalogue(folder, lines)


def write_scripted_demo(folder: Path, pause: float) -> Path:
    """A catalogue with two scripted models, which wait `pause` seconds before each word."""
    return write_catalogue(
        folder,
        [
            f'[models.{name}]\ndescription = "scripted"\nkind = "scripted"\ncontext_length = 8192\n'
            f'input_price = 0.1\noutput_price = {price}\ntext = "The answer is 4."\npause = {pause}\n'
            for name, price in (("slow-small", 0.1), ("slow-large", 0.4))
        ],
    )


def write_catalogue(folder: Path, lines: list[str]) -> Path:
    file = folder / "demo.toml"
    file.write_text("\n".join(lines))
    return file
