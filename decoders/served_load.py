"""Load a served model: what is here of it, its configuration and tokenizer, joined with its server.

No weights are read. Leaves out the checks of the server (`decoders.served_check`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from viaticum.decoders.served_check import RETRIES, TIMEOUT, TOP, connect
from viaticum.decoders.served_runner import ServedRunner
from viaticum.decoders.vocabulary import end_ids
from viaticum.errors import InputError

# Digits, code, spaces and other scripts are where the tokenizers of families differ.
PROBE = "Hello, wörld!  def f(x):\n\treturn x ** 2  # 12345 日本語 🙂"
WEIGHT_BYTES = 2  # of a weight at the server


@dataclass(frozen=True, slots=True)
class Server:
    """Where a model is served.

    Args:
        api_base: address of the server, such as "http://gpu:8000/v1".
        model: the model's name there; None: the only one.
        key: bearer token.
        timeout: seconds that the server may be silent.
        retries: repetitions of a request that failed in a way that may pass.
        top: log probabilities a position.
    """

    api_base: str
    model: str | None = None
    key: str | None = None
    timeout: float = TIMEOUT
    retries: int = RETRIES
    top: int = TOP


def load_served(
    folder: str | Path,
    server: Server | None,
    *,
    slots: int | Literal["auto"] = "auto",
    max_slots: int,
    context: int | None = None,
) -> ServedRunner:
    """A checked runner of a served model.

    Args:
        folder: config.json, tokenizer and, if it has one, generation_config.json of the model.
        server: where it is served.
        slots: sequences at once; "auto" for `max_slots`, since the server keeps the memory.
        max_slots: upper limit of slots="auto".
        context: maximum tokens of prompt and answer, if fewer than the server takes.

    Raises:
        InputError: no server is named, or the folder lacks a file.
        ModelError: see `connect`.
    """
    if server is None:
        raise InputError('the engine "served" needs the address of a server; give api_base')
    folder = Path(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} needs config.json and the tokenizer of the served model: {str(error).splitlines()[0]}"
        ) from None
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        weights = sum(each.numel() for each in model.parameters())
    return connect(
        server.api_base,
        model=server.model,
        key=server.key,
        timeout=server.timeout,
        retries=server.retries,
        top=server.top,
        vocabulary=int(config.get_text_config().vocab_size),
        probes={PROBE: tokenizer.encode(PROBE, add_special_tokens=False)},
        slots=max_slots if slots == "auto" else slots,
        context=context,
        weight_bytes=WEIGHT_BYTES * weights,
        stop_ids=_stop_ids(folder),
    )


def _stop_ids(folder: Path) -> frozenset[int]:
    try:
        configured = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except OSError:
        return frozenset()
    return end_ids(configured)
