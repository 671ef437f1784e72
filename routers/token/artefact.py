"""A trained token router on disk: NAME.safetensors and NAME.json.

The JSON holds the checksums of both and of the pair's weights.

Each file is written atomically; a file that is damaged, of another format or for other weights raises an
error that says what to do. Leaves out what the metadata means (`routers.token.neural`,
`routers.token.policy`).
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
from viaticum.files import atomic_write

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Artefact:
    """One kind of artefact.

    Args:
        name: of its files, and in messages.
        format: version number in the JSON file.
        missing: message if a folder has none; may contain {folder}.
        repair: what to do about a damaged one, in messages.
        mismatch: what to do if the pair has other weights, in messages.
    """

    name: str
    format: int
    missing: str
    repair: str
    mismatch: str

    @property
    def weights_file(self) -> str:
        return f"{self.name}.safetensors"

    @property
    def metadata_file(self) -> str:
        return f"{self.name}.json"

    def check_weights(self, metadata: Mapping[str, Any], role: str, name: str, sha256: str) -> None:
        """Check that an artefact was made for these weights.

        Args:
            metadata: of the artefact.
            role: small or large.
            name: of the model.
            sha256: of its weights.

        Raises:
            InputError: it was made for other weights.
        """
        expected = metadata[role]
        if expected["sha256"] != sha256:
            raise InputError(
                f"the {self.name} was made for {expected['name']} with sha256 {expected['sha256'][:12]}, "
                f"and {name} has {sha256[:12]}; {self.mismatch}"
            )

    def save(
        self,
        folder: str | Path,
        state: Mapping[str, Tensor],
        shape: Mapping[str, Any],
        metadata: Mapping[str, Any],
    ) -> None:
        """Write both files.

        Args:
            folder: made if necessary.
            state: weights by name.
            shape: hyperparameters of the network.
            metadata: plain JSON; the checksum of the weights and the format are added.

        Raises:
            InputError: the folder cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {folder}: {error.strerror or error}") from None
        weights = save(dict(state))
        document = {
            "shape": shape,
            **metadata,
            "sha256": hashlib.sha256(weights).hexdigest(),
            "format": self.format,
        }
        atomic_write(folder / self.weights_file, weights)
        atomic_write(folder / self.metadata_file, json.dumps(document, indent=1) + "\n")

    def load(
        self,
        folder: str | Path,
        make: Callable[[dict[str, Any], dict[str, Any]], T],
        network: Callable[[T], nn.Module],
    ) -> T:
        """Read both files.

        Args:
            folder: that `save` wrote.
            make: builds the object from (shape, metadata).
            network: of the object, whose weights are loaded.

        Raises:
            InputError: there is no artefact.
            DataError: it is damaged, of another format, or has weights that are not finite.
        """
        folder = Path(folder)
        try:
            metadata = json.loads((folder / self.metadata_file).read_text(encoding="utf-8"))
            if metadata["format"] != self.format:
                raise DataError(
                    f"{folder} has a {self.name} of format {metadata['format']}; "
                    f"this version reads {self.format}"
                )
            checksum = metadata["sha256"]
            artefact = make(metadata.pop("shape"), metadata)
            weights = (folder / self.weights_file).read_bytes()
        except FileNotFoundError:
            raise InputError(self.missing.format(folder=folder)) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{folder / self.metadata_file} is damaged ({error}); {self.repair}") from None
        weights_path = folder / self.weights_file
        if hashlib.sha256(weights).hexdigest() != checksum:
            raise DataError(
                f"{weights_path} is cut short or not the one that {self.metadata_file} belongs to; "
                f"{self.repair}"
            )
        module = network(artefact)
        try:
            module.load_state_dict(load(weights))
        except (SafetensorError, RuntimeError) as error:
            raise DataError(
                f"{weights_path} does not fit {self.metadata_file} ({str(error).splitlines()[0]}); "
                f"{self.repair}"
            ) from None
        if not all(bool(torch.isfinite(tensor).all()) for tensor in module.state_dict().values()):
            raise DataError(f"{weights_path} has weights that are not finite; {self.repair}")
        module.eval()
        return artefact


def seen_in_training(
    metadata: Mapping[str, Any], ids: Iterable[str], questions: Mapping[str, str | None]
) -> set[str]:
    """Ids of those questions that an artefact was trained on.

    Digests are compared where both sides have them, since an id may be only a line number; else ids.

    Args:
        metadata: of the artefact; its "digests" are those of the training questions' texts.
        ids: of the training questions.
        questions: by id, the digest of the text, or None.
    """
    digests, trained_ids = set(metadata.get("digests", ())), set(ids)
    return {
        name
        for name, digest in questions.items()
        if (digest in digests if digests and digest is not None else name in trained_ids)
    }
