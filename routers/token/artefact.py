"""A learned token router on disk: NOUN.safetensors and NOUN.json, which name each other, and the weights of the pair it is for.

Both are written whole or not at all; a file that is damaged, of another version or for other weights is an error that says
what to do. Leaves out what the facts mean: `routers.token.neural`, `routers.token.policy`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from viaticum.errors import DataError, InputError
from viaticum.routers.token.labels import write_bytes, write_whole

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Artefact:
    """One kind of them. noun: its files' name, and in messages; missing: where a folder has none; again: what to do about
    one that is damaged; other: about other weights of the pair."""

    noun: str
    format: int
    missing: str
    again: str
    other: str

    @property
    def weights(self) -> str:
        return f"{self.noun}.safetensors"

    @property
    def facts(self) -> str:
        return f"{self.noun}.json"

    def check_weights(self, facts: Mapping[str, Any], role: str, name: str, sha256: str) -> None:
        """Raise `InputError` unless it was made for these weights; role: small or large."""
        made = facts[role]
        if made["sha256"] != sha256:
            raise InputError(
                f"the {self.noun} was made for {made['name']} with sha256 {made['sha256'][:12]}, and {name} has "
                f"{sha256[:12]}; {self.other}"
            )

    def save(
        self,
        folder: str | Path,
        state: Mapping[str, Tensor],
        shape: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> None:
        """Raises `InputError` where the folder cannot be written."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {folder}: {error.strerror or error}") from None
        weights = save(dict(state))
        told = {**facts, "sha256": hashlib.sha256(weights).hexdigest(), "format": self.format}
        write_bytes(folder / self.weights, weights)
        write_whole(folder / self.facts, json.dumps({"shape": shape, **told}, indent=1) + "\n")

    def load(
        self,
        folder: str | Path,
        make: Callable[[dict[str, Any], dict[str, Any]], Made],
        network: Callable[[Made], nn.Module],
    ) -> Made:
        """What `make` gives for (shape, facts), with its network's weights. Raises `InputError` and `DataError`."""
        folder = Path(folder)
        try:
            facts = json.loads((folder / self.facts).read_text(encoding="utf-8"))
            if facts["format"] != self.format:
                raise DataError(
                    f"{folder} has a {self.noun} of format {facts['format']}; this version reads {self.format}"
                )
            made = make(facts.pop("shape"), facts)
            weights = (folder / self.weights).read_bytes()
        except FileNotFoundError:
            raise InputError(self.missing.format(folder=folder)) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{folder / self.facts} is damaged ({error}); {self.again}") from None
        if hashlib.sha256(weights).hexdigest() != facts["sha256"]:
            raise DataError(
                f"{folder / self.weights} is cut short or not the one that {self.facts} belongs to; {self.again}"
            )
        state = network(made)
        try:
            state.load_state_dict(load(weights))
        except (SafetensorError, RuntimeError) as error:
            raise DataError(
                f"{folder / self.weights} does not fit {self.facts} ({str(error).splitlines()[0]}); {self.again}"
            ) from None
        if not all(bool(torch.isfinite(tensor).all()) for tensor in state.state_dict().values()):
            raise DataError(f"{folder / self.weights} has weights that are not finite; {self.again}")
        state.eval()
        return made


def seen_in_training(
    facts: Mapping[str, Any], ids: Iterable[str], questions: Mapping[str, str | None]
) -> set[str]:
    """Which of these questions, by id, an artefact learned from. ids: those that it learned from.

    questions: of each the digest of its text, or None. Digests are compared where both sides have them, for an id may be no
    more than the number of a line; else ids.
    """
    digests, names = set(facts.get("digests", ())), set(ids)
    return {
        name
        for name, digest in questions.items()
        if (digest in digests if digests and digest is not None else name in names)
    }
