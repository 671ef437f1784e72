r"""How byte-level vocabularies split a text before they merge, by the name in `tokenizer.ggml.pre`.

The patterns are those that the models' own tokenizers give, which llama.cpp knows by the same names
(https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp). Names that are not here are refused:
another pattern gives other tokens, and nothing would tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Splitting:
    """How a text is cut into pieces that are merged each on its own.

    patterns: applied one after another, each to the pieces of the one before.
    nfc: the text is first brought into Unicode's composed form.
    ignore_merges: a piece that is a token as a whole is that token, whatever the merges say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False


_BY_NAMES = {
    ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"): Splitting((_QWEN2,), nfc=True),
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"): Splitting((_LLAMA3,), ignore_merges=True),
    ("dbrx", "smaug-bpe"): Splitting((_LLAMA3,)),
    ("tekken",): Splitting((_TEKKEN,), ignore_merges=True),
    ("gpt-2", "phi-2", "olmo", "mpt", "exaone4"): Splitting((_GPT2,)),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"): Splitting((r"\p{N}", _GPT2)),
}
SPLITTINGS: Mapping[str, Splitting] = {name: how for names, how in _BY_NAMES.items() for name in names}
