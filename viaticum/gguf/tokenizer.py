"""The tokenizer that a GGUF file describes, in the form that transformers and the tokenizers library read.

Byte-level vocabularies (`gpt2`) and sentencepiece's (`llama`). Every id of the file stands for the same text
in what is built, which is checked: control and user-defined tokens are added tokens of their own ids, also
where their text is outside the byte alphabet (`<｜User｜>`). Left out is the padding of the embedding at the
end of a vocabulary (`[PAD151665]`), which is no token. transformers builds a tokenizer from such a file too,
but respells what is outside the byte alphabet, so that special tokens fall apart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from viaticum.errors import MissingExtra, WeightsError
from viaticum.gguf.file import END_KEYS, Header
from viaticum.gguf.split_patterns import SPLITTINGS, Splitting

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # types of tokens; 1 is a normal one
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Control tokens that end a turn whatever the metadata says, as llama.cpp takes them.
_END_TEXTS = frozenset(
    {
        "<|endoftext|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<｜end▁of▁sentence｜>",
    }
)
_ADVICE = 'llama.cpp reads it: give the entry engine = "llama", and the folder the tokenizer of the model'


class Vocabulary:
    """The tokens of a file. texts: by id, without padding at the end; types: of each."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.texts: list[str] = header.array("tokenizer.ggml.tokens")
        types = header.array("tokenizer.ggml.token_type") or [1] * len(self.texts)  # any width of integers
        self.types: list[int] = [int(each) for each in types]
        if not self.texts:
            raise WeightsError(f"{header.path}: the GGUF file has no tokens (tokenizer.ggml.tokens)")
        if len(self.types) != len(self.texts):
            raise WeightsError(
                f"{header.path}: the GGUF file has {len(self.texts)} tokens but {len(self.types)} token types"
            )
        while self.types[-1] == UNUSED and self.texts[-1] == f"[PAD{len(self.texts) - 1}]":
            del self.texts[-1], self.types[-1]
        ids = {text: token for token, text in enumerate(self.texts)}
        if len(ids) != len(self.texts):
            first = next(i for i, text in enumerate(self.texts) if ids[text] != i)
            text = self.texts[first]
            raise WeightsError(f"{header.path}: the tokens {first} and {ids[text]} are both {text!r}")
        self.ids = ids

    def named(self, key: str) -> int | None:
        """The id under a key of the metadata, e.g. eos_token_id; None where it is no token of the file."""
        token = self.header.metadata.get(f"tokenizer.ggml.{key}")
        return token if isinstance(token, int) and 0 <= token < len(self.texts) else None

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end a text, that of the metadata first."""
        named = [token for key in END_KEYS if (token := self.named(key)) is not None]
        texts = [
            self.ids[text]
            for text in sorted(_END_TEXTS & self.ids.keys())
            if self.types[self.ids[text]] == CONTROL
        ]
        return list(dict.fromkeys([*named, *texts]))

    @property
    def added(self) -> list[dict[str, Any]]:
        """The tokens that are found in a text as they stand, before anything is merged."""
        return [
            {
                "id": token,
                "content": self.texts[token],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != USER_DEFINED,
            }
            for token, kind in enumerate(self.types)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) and self.texts[token]
        ]


def save_tokenizer(header: Header, vocabulary: Vocabulary, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template.

    Raises:
        WeightsError: the file describes no tokenizer of a known kind, or what was built is another one.
        MissingExtra: the `local` extra is not installed.
    """
    try:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise MissingExtra(error.name or "transformers", "local") from None

    document = _document(header, vocabulary)
    try:
        built = Tokenizer.from_str(json.dumps(document))
    except BaseException as error:  # the library raises no class of its own, and its panics are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise WeightsError(f"{header.path}: its tokens and merges make no tokenizer: {error}") from None
    _check_same(header, vocabulary, built)
    special = {
        name: vocabulary.texts[token]
        for name, key in _SPECIAL.items()
        if (token := vocabulary.named(key)) is not None
    }
    make: Any = PreTrainedTokenizerFast
    make(
        tokenizer_object=built,
        clean_up_tokenization_spaces=False,
        model_max_length=header.of_architecture("context_length"),
        chat_template=_chat_template(header),
        **special,
    ).save_pretrained(folder)


def _check_same(header: Header, vocabulary: Vocabulary, built: Any) -> None:
    size = built.get_vocab_size(with_added_tokens=True)
    if size != len(vocabulary.texts):
        raise WeightsError(
            f"{header.path}: the GGUF file has {len(vocabulary.texts)} tokens, the tokenizer built from it"
            f" {size}"
        )
    for token, text in enumerate(vocabulary.texts):
        if (found := built.id_to_token(token)) != text:
            raise WeightsError(
                f"{header.path}: token {token} is {text!r} in the GGUF file but {found!r} in the tokenizer"
                " built from it"
            )


def _document(header: Header, vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json, parsed."""
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        parts = _byte_level(header, vocabulary)
    elif kind == "llama":
        parts = _sentencepiece(header, vocabulary)
    else:
        raise WeightsError(f"{header.path}: a tokenizer of kind {kind!r} is not supported; {_ADVICE}")
    parts["model"] |= {"vocab": vocabulary.ids, "dropout": None}
    frame = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": vocabulary.added}
    begins_with_bos = header.metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")
    bos = vocabulary.named("bos_token_id") if begins_with_bos else None
    return frame | parts | {"post_processor": None if bos is None else _prefixing(bos, vocabulary.texts[bos])}


def _prefixing(token: int, text: str) -> dict[str, Any]:
    """A post-processor that puts a token before each text."""
    special = {"SpecialToken": {"id": text, "type_id": 0}}
    first, second = ({"Sequence": {"id": each, "type_id": index}} for index, each in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]}},
    }


def _byte_level(header: Header, vocabulary: Vocabulary) -> dict[str, Any]:
    how = _splitting(header, vocabulary)
    bytes_as_letters = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in how.patterns
    ]
    return {
        "normalizer": {"type": "NFC"} if how.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, bytes_as_letters]},
        "decoder": bytes_as_letters,
        "model": {
            "type": "BPE",
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": how.ignore_merges,
            "merges": _merges(header),
        },
    }


def _merges(header: Header) -> list[tuple[str, str]]:
    """Pairs of tokens, the first to be merged first."""
    merges: list[str] = header.array("tokenizer.ggml.merges")
    try:
        cuts = [merge.index(" ", 1) for merge in merges]  # a token may begin with a space
    except ValueError:
        raise WeightsError(f"{header.path}: a merge of the GGUF file names no two tokens") from None
    return [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(merges, cuts, strict=True)]


def _splitting(header: Header, vocabulary: Vocabulary) -> Splitting:
    name = header.metadata.get("tokenizer.ggml.pre")
    if name in (None, "default"):  # of a file from before the key was
        old = {"qwen2": "qwen2", "llama": "llama-bpe" if len(vocabulary.texts) == 128256 else None}
        name = old.get(header.architecture) or name
    if (how := SPLITTINGS.get(str(name))) is None:
        raise WeightsError(
            f"{header.path}: how its tokenizer splits a text is not known (tokenizer.ggml.pre is {name!r}); "
            f"{_ADVICE}"
        )
    return how


def _sentencepiece(header: Header, vocabulary: Vocabulary) -> dict[str, Any]:
    """Merges in the order of the tokens' scores; of Gemma, whose scores have another, of their ids."""
    from transformers.tokenization_utils_base import generate_merges

    unknown = vocabulary.named("unknown_token_id")
    scores = header.array("tokenizer.ggml.scores")
    if header.architecture.startswith("gemma"):
        scores = [-float(token) for token in range(len(vocabulary.texts))]
    if len(scores) < len(vocabulary.texts):
        raise WeightsError(f"{header.path}: the GGUF file lacks scores of its tokens (tokenizer.ggml.scores)")
    pieces = {text: token for text, token in vocabulary.ids.items() if vocabulary.types[token] == 1}
    merges = _merges(header) or generate_merges(
        pieces, {text: scores[token] for text, token in pieces.items()}
    )
    spaced = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    restore: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if spaced:
        restore.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    prepend = [{"type": "Prepend", "prepend": "▁"}] if spaced else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": restore},
        "model": {
            "type": "BPE",
            "unk_token": None if unknown is None else vocabulary.texts[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "merges": merges,
        },
    }


def _chat_template(header: Header) -> str | dict[str, str] | None:
    """The file's template; of several, by name."""
    prefix = "tokenizer.chat_template"
    default = header.metadata.get(prefix)
    named = {
        key[len(prefix) + 1 :]: value
        for key, value in header.metadata.items()
        if key.startswith(f"{prefix}.")
    }
    if named and default is not None:
        return {"default": str(default), **{name: str(value) for name, value in named.items()}}
    return None if default is None else str(default)
