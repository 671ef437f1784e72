"""A tiny encoder on disk that is real in every other way: a BERT of one layer of sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

WORDS = ("how", "many", "apples", "are", "left", "who", "is", "her", "uncle", "##s")
LONGEST = 16  # tokens of a text


def write_tiny_encoder(folder: Path, words: Sequence[str] = WORDS, longest: int = LONGEST) -> Path:
    """Write the encoder, with random weights, and return its own folder below.

    Args:
        words: of the vocabulary; a piece that continues a word begins with ##.
        longest: tokens of a text.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    bert = folder / "bert"
    bert.mkdir(parents=True)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (bert / "vocab.txt").write_text("\n".join(tokens))
    BertTokenizerFast(str(bert / "vocab.txt")).save_pretrained(str(bert))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=2 * longest,
    )
    BertModel(config).save_pretrained(str(bert))
    transformer = Transformer(str(bert), max_seq_length=longest)
    encoder = SentenceTransformer(modules=[transformer, Pooling(8)], device="cpu")
    encoder.save(str(folder / "encoder"))
    return folder / "encoder"
