"""How many tokens a prompt can have at a provider: by the model's tokenizer, by bytes, or by a learned ratio.

A tokenizer is one that is named in the entry, or one of OpenAI's that LiteLLM's package has; nothing is
downloaded. Every byte counts as a token where there is none: an upper bound of every tokenizer, and several
times too many. Where an entry says `holds = "estimated"`, prompts are held by the ratio of tokens to bytes
that the provider reported before, with a margin: no upper bound, so the ledger reports every overrun.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from viaticum.errors import InputError, MissingExtra
from viaticum.files import atomic_write
from viaticum.models.base import BYTES_PER_TOKEN
from viaticum.weights import cache_dir

TOKENIZERS = ("cl100k_base", "o200k_base")  # those in LiteLLM's package
FIRST_CALLS = 5  # reports before a ratio is believed
LAST_CALLS = 200  # reports that are remembered
LONGEST_FILE = 10 * LAST_CALLS  # lines
RATIO_MARGIN = 0.2  # added to the highest ratio that was reported


class PromptRatio:
    """Tokens a byte of the prompts that one model was sent, as its provider reported them. Thread-safe.

    Args:
        file: keeps the reports for later processes, a line each; what cannot be read or written is left out,
            since a hold may always be larger.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._ratios = deque(_kept(file) if file is not None else (), maxlen=LAST_CALLS)

    def learn(self, bytes_: int, tokens: int) -> None:
        """Take the report of a call. bytes_: its prompt as it is counted without a tokenizer."""
        if bytes_ > 0 and tokens > 0:
            self._ratios.append(tokens / bytes_)
            if self._file is not None:
                with suppress(OSError):
                    self._file.parent.mkdir(parents=True, exist_ok=True)
                    with self._file.open("a") as file:  # one short line: whole, also beside other processes
                        file.write(f"{tokens / bytes_:.6f}\n")

    def likely(self, bytes_: int) -> int:
        """Tokens that a prompt likely has: by the last reports, or by a common ratio before the first one."""
        ratios = tuple(self._ratios)
        return math.ceil(bytes_ * (median(ratios) if ratios else 1 / BYTES_PER_TOKEN))

    def estimate(self, bytes_: int) -> int:
        """Tokens to hold for a prompt; its bytes until enough calls were reported, and never more."""
        ratios = tuple(self._ratios)
        if len(ratios) < FIRST_CALLS:
            return bytes_
        return min(bytes_, math.ceil(bytes_ * max(ratios) * (1 + RATIO_MARGIN)))


def ratio_file(model: str, api_base: str | None) -> Path:
    """Where the ratios of a provider's model are kept, whatever name the catalogue gives it."""
    key = hashlib.sha256(json.dumps([model, api_base]).encode()).hexdigest()[:16]
    return cache_dir() / "prompt_ratios" / f"{key}.txt"


def _kept(file: Path) -> list[float]:
    """The last ratios of a file, which is cut to them once it is long. Lines that are none are left out."""
    try:
        lines = file.read_text().splitlines()
        kept = [value for line in lines[-LAST_CALLS:] if (value := _ratio(line)) is not None]
        if len(lines) > LONGEST_FILE:
            atomic_write(file, "".join(f"{value:.6f}\n" for value in kept))
    except (OSError, ValueError, InputError):
        return []
    return kept


def _ratio(line: str) -> float | None:
    try:
        value = float(line)
    except ValueError:
        return None
    return value if 0 < value < math.inf else None


def named_counter(tokenizer: str) -> Callable[[str], int]:
    """Counts the tokens of a text by a tokenizer: one of `TOKENIZERS`, or the path of a tokenizer.json.

    Special tokens that a text spells are counted as plain text, since providers may read them so.

    Raises:
        InputError: the file cannot be read or is no tokenizer.
        MissingExtra: the package that reads it is not installed.
    """
    return _tiktoken(tokenizer) if tokenizer in TOKENIZERS else _from_file(Path(tokenizer).expanduser())


@cache
def _tiktoken(name: str) -> Callable[[str], int]:
    package = find_spec("litellm")
    try:
        import tiktoken
    except ImportError as error:
        raise MissingExtra(error.name or "tiktoken", "remote") from None
    if package is None or package.origin is None:
        raise MissingExtra("litellm", "remote")
    files = Path(package.origin).parent / "litellm_core_utils" / "tokenizers"
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(files))  # as LiteLLM does: else it would be downloaded
    encoding = tiktoken.get_encoding(name)
    return lambda text: len(encoding.encode_ordinary(text))


@cache
def _from_file(path: Path) -> Callable[[str], int]:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtra(error.name or "tokenizers", "local") from None
    try:
        tokenizer: Any = Tokenizer.from_str(json.dumps(_without_special(json.loads(path.read_bytes()))))
    except OSError as error:
        raise InputError(f"cannot read the tokenizer {path}: {error.strerror or error}") from None
    except Exception as error:  # tokenizers raises bare exceptions
        raise InputError(f"{path} is no tokenizer.json: {' '.join(str(error).split())}") from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _without_special(values: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer without its special tokens, without truncation and padding."""
    added = [token for token in values.get("added_tokens", ()) if not token.get("special")]
    return {**values, "added_tokens": added, "truncation": None, "padding": None}
