"""Labelled tokens on disk: the SLM's features at every position of the LLM's texts, and the labels.

A folder contains `manifest.json` (weights, prompts, versions), `features-NNNNN.safetensors` (a row for every
token of some questions), `labels.jsonl` (a line for every position at which the small model's token differs,
both texts, and each verifier's verdict), and `journal.jsonl`, from which a killed run resumes. Leaves out
making them (`training.token_labels`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from viaticum.errors import DataError, InputError
from viaticum.files import atomic_write

MANIFEST, ROWS = "manifest.json", "labels.jsonl"
FORMAT = 1
# Labels of a token; UNKNOWN: it differs, and there is no verdict.
UNKNOWN, IDENTICAL, NEUTRAL, DIVERGENT = -1, 0, 1, 2
_COLUMNS = (
    "place",
    "target",
    "token",
    "second",
    "differs",
    "entropy",
    "top",
    "hidden",
    "known",
    "embeddings",
    "owner",
)


class TokenFeatures(Protocol):
    """Features of a text, see `decoders.features.Features`."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def second(self) -> Tensor: ...
    @property
    def top(self) -> Tensor: ...
    @property
    def hidden(self) -> Tensor: ...
    @property
    def entropy(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Shard:
    """All N tokens of some texts, one row each; the field names are the columns of the file.

    Args:
        questions: ids.
        owner: index of the row's question, int64 [N].
        place: position of the token in the text, int64 [N].
        target: the large model's token, int64 [N].
        token, second: the small model's token and its second choice, indices into `known`, int64 [N].
        differs: whether the models' tokens differ and the large model's does not end the text, bool [N].
        entropy, top, hidden: see `decoders.features.Features`.
        known: the distinct token ids that `token` and `second` refer to, sorted, int64 [U].
        embeddings: the small model's input embeddings of them [U, D].
    """

    questions: tuple[str, ...]
    owner: Tensor
    place: Tensor
    target: Tensor
    token: Tensor
    second: Tensor
    differs: Tensor
    entropy: Tensor
    top: Tensor
    hidden: Tensor
    known: Tensor
    embeddings: Tensor

    @classmethod
    def of(
        cls,
        texts: Sequence[tuple[str, Sequence[int], TokenFeatures]],
        ends: Sequence[int],
        embeddings: Tensor,
    ) -> Shard:
        """Build a shard.

        Args:
            texts: (question id, the large model's tokens, features) of each text.
            ends: stop ids.
            embeddings: the small model's input embeddings [vocabulary, D].
        """
        features = [each for _, _, each in texts]
        predicted = torch.cat([each.tokens for each in features])
        second = torch.cat([each.second for each in features])
        known, indices = torch.unique(torch.stack((predicted, second)), return_inverse=True)
        target = torch.tensor([each for _, tokens, _ in texts for each in tokens])
        lengths = torch.tensor([len(tokens) for _, tokens, _ in texts])
        return cls(
            tuple(question for question, _, _ in texts),
            owner=torch.arange(len(texts)).repeat_interleave(lengths),
            place=torch.cat([torch.arange(int(length)) for length in lengths]),
            target=target,
            token=indices[0],
            second=indices[1],
            differs=(predicted != target) & ~torch.isin(target, torch.tensor(ends)),
            entropy=torch.cat([each.entropy for each in features]),
            top=torch.cat([each.top for each in features]),
            hidden=torch.cat([each.hidden for each in features]),
            known=known,
            embeddings=embeddings[known.to(embeddings.device)].cpu().clone(),
        )

    @classmethod
    def load(cls, path: Path) -> Shard:
        """Read a shard.

        Raises:
            DataError: the file is truncated, not a shard, or has values that are not finite.
        """
        try:
            with safe_open(path, "pt") as file:
                questions = tuple(json.loads(file.metadata()["questions"]))
                values = {name: file.get_tensor(name) for name in _COLUMNS}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} is damaged ({str(error).splitlines()[0]}); "
                "remove it and run `viaticum tokens label` again"
            ) from None
        shard = cls(questions, **values)
        for name in ("entropy", "top", "hidden", "embeddings"):
            if not bool(torch.isfinite(values[name]).all()):
                raise DataError(
                    f"{path}: {name} has values that are not finite; "
                    "remove the file and run `viaticum tokens label` again"
                )
        return shard

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        tensors = {name: getattr(self, name).contiguous() for name in _COLUMNS}
        atomic_write(path, save(tensors, {"questions": json.dumps(self.questions)}))


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("features-*.safetensors"))


@dataclass(frozen=True, slots=True)
class LabelledTokens:
    """The N tokens of all questions of a folder, with the labels of one verifier.

    Args:
        manifest: of the folder.
        questions: ids.
        owner: index of the row's question, int64 [N].
        place: position of the token in its text, int64 [N].
        labels: IDENTICAL, NEUTRAL, DIVERGENT or UNKNOWN, int64 [N].
        entropy, top, hidden: see `decoders.features.Features`.
        token, second: indices into `token_ids` and `embeddings`, int64 [N].
        token_ids: distinct token ids, sorted, int64 [U].
        embeddings: the small model's input embeddings of them [U, D].
        verifier: of the labels.
    """

    manifest: Mapping[str, Any]
    questions: tuple[str, ...]
    owner: Tensor
    place: Tensor
    labels: Tensor
    entropy: Tensor
    top: Tensor
    hidden: Tensor
    token: Tensor
    second: Tensor
    token_ids: Tensor
    embeddings: Tensor
    verifier: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digests(self) -> Mapping[str, str]:
        """Digest of each question's text, by id; older folders have none."""
        digests: Mapping[str, str] = self.manifest.get("digests", {})
        return digests

    @property
    def differing(self) -> Tensor:
        """Whether the two models' tokens differ, bool [N]."""
        return self.labels != IDENTICAL

    def of(self, questions: Sequence[str]) -> LabelledTokens:
        """The tokens of some questions."""
        selected = set(questions)
        rows = torch.tensor([question in selected for question in self.questions])[self.owner]
        return self.where(rows)

    def where(self, rows: Tensor) -> LabelledTokens:
        """Select rows by a mask, bool [N], or by indices."""
        names = ("owner", "place", "labels", "entropy", "top", "hidden", "token", "second")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    @classmethod
    def load(cls, folder: str | Path, verifier: str = "", *, prefer: str = "") -> LabelledTokens:
        """Read a folder.

        Args:
            folder: of labels.
            verifier: of the labels; by default `prefer` if the folder has its labels, else the folder's first
                one.
            prefer: see `verifier`.

        Raises:
            InputError: there is no such folder, or it has no labels by this verifier.
            DataError: it is damaged or incomplete.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not manifest["verifiers"]:
            raise _unfinished(folder)
        first = prefer if prefer in manifest["verifiers"] else manifest["verifiers"][0]
        verifier = verifier or first
        if verifier not in manifest["verifiers"]:
            raise InputError(
                f"{folder} has no labels by {verifier!r}; it has {', '.join(manifest['verifiers'])}; "
                f"add them with: viaticum tokens verify {folder} --verifier {verifier}"
            )
        verdicts = {
            (row["question"], row["place"]): row["verdicts"].get(verifier) for row in read_rows(folder)
        }
        shards = [Shard.load(path) for path in shard_paths(folder)]
        if not shards:
            raise DataError(f"{folder} holds no features; run `viaticum tokens label` again")
        questions = tuple(question for shard in shards for question in shard.questions)
        base, owners, labels = 0, [], []
        for shard in shards:
            owners.append(shard.owner + base)
            labels.append(_labels(shard, verdicts))
            base += len(shard.questions)
        ids = torch.unique(torch.cat([shard.known for shard in shards]))
        token, second = (
            torch.searchsorted(ids, torch.cat([shard.known[getattr(shard, name)] for shard in shards]))
            for name in ("token", "second")
        )
        columns = {
            name: torch.cat([getattr(shard, name) for shard in shards])
            for name in ("place", "entropy", "top", "hidden")
        }
        return cls(
            manifest,
            questions,
            torch.cat(owners),
            labels=torch.cat(labels),
            token=token,
            second=second,
            token_ids=ids,
            embeddings=_embeddings(ids, shards),
            verifier=verifier,
            **columns,
        )


def _labels(shard: Shard, verdicts: Mapping[tuple[str, int], bool | None]) -> Tensor:
    labels = torch.full((len(shard.place),), IDENTICAL)
    for row in shard.differs.nonzero().flatten().tolist():
        verdict = verdicts.get((shard.questions[int(shard.owner[row])], int(shard.place[row])))
        labels[row] = UNKNOWN if verdict is None else DIVERGENT if verdict else NEUTRAL
    return labels


def _embeddings(ids: Tensor, shards: Sequence[Shard]) -> Tensor:
    table = shards[0].embeddings.new_zeros(len(ids), shards[0].embeddings.shape[1])
    for shard in shards:
        table[torch.searchsorted(ids, shard.known)] = shard.embeddings
    return table


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder of labels.

    Raises:
        InputError: there is none.
        DataError: it cannot be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise DataError(
                f"{folder} has labels of format {manifest['format']}; this version reads {FORMAT}"
            )
    except FileNotFoundError:
        raise InputError(
            f"no labels in {folder}; make them with: "
            f"viaticum tokens label --pair PAIR QUESTIONS.jsonl --out {folder}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder / MANIFEST} is damaged ({error}); label again into a new folder") from None
    return manifest


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of `labels.jsonl`.

    Raises:
        DataError: a line is not a row of labels.
    """
    path = folder / ROWS
    try:
        # Bytes, since a str would also be split at U+2028, which a row may contain unescaped.
        lines = path.read_bytes().splitlines()
    except OSError:
        raise _unfinished(folder) from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            _ = row["question"], row["place"], row["verdicts"]
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{path}, line {number}: not a row of labels; run `viaticum tokens label` again"
            ) from None
        yield row


def _unfinished(folder: Path) -> DataError:
    return DataError(f"{folder} is not labelled to the end; run `viaticum tokens label` again")
