"""Labelled tokens on disk: what the small model saw at every place of the large model's texts, and which differences matter.

A folder holds `manifest.json` (weights, prompts, versions), `features-NNNNN.safetensors` (a row for every token of some
questions), `labels.jsonl` (a line for every place where the small model would write another token, both texts, and
each verifier's verdict), and `journal.jsonl`, which a run that was killed goes on from. Leaves out making them
(`training.token_labels`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from viaticum.errors import DataError, InputError

MANIFEST, ROWS, JOURNAL = "manifest.json", "labels.jsonl", "journal.jsonl"
FORMAT = 1
UNKNOWN, IDENTICAL, NEUTRAL, DIVERGENT = (
    -1,
    0,
    1,
    2,
)  # of a token; unknown: it differs, and no verdict was given
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


class Seen(Protocol):
    """Features of a text, as `decoders.features` gives them."""

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
    """All tokens of some texts, one row each, N in all.

    questions: ids; owner: the row's question, an index into them, int64 [N]; place: of the token in the text;
    target: the large model's token; token: the small one's, and second: its next best, indices into known; differs: whether these two do, and
    the large one's does not end the text, bool [N]; entropy, top, hidden: see `decoders.features`. known
    [U]: the different ones of these, sorted, and embeddings [U, D] its input embeddings of them.
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
        cls, texts: Sequence[tuple[str, Sequence[int], Seen]], ends: Sequence[int], embeddings: Tensor
    ) -> Shard:
        """From (question, the large model's tokens, features) of each text; ends: tokens that end one.

        embeddings: the small model's input embeddings of all tokens, [vocabulary, D].
        """
        predicted = torch.cat([seen.tokens for _, _, seen in texts])
        known, places = torch.unique(
            torch.stack((predicted, torch.cat([seen.second for _, _, seen in texts]))), return_inverse=True
        )
        target = torch.tensor([each for _, tokens, _ in texts for each in tokens])
        lengths = torch.tensor([len(tokens) for _, tokens, _ in texts])
        return cls(
            tuple(question for question, _, _ in texts),
            owner=torch.arange(len(texts)).repeat_interleave(lengths),
            place=torch.cat([torch.arange(int(length)) for length in lengths]),
            target=target,
            token=places[0],
            second=places[1],
            differs=(predicted != target) & ~torch.isin(target, torch.tensor(ends)),
            entropy=torch.cat([seen.entropy for _, _, seen in texts]),
            top=torch.cat([seen.top for _, _, seen in texts]),
            hidden=torch.cat([seen.hidden for _, _, seen in texts]),
            known=known,
            embeddings=embeddings[known.to(embeddings.device)].cpu().clone(),
        )

    @classmethod
    def load(cls, path: Path) -> Shard:
        """Raises `DataError` for a file that is cut short or no shard, or holds numbers that are not finite."""
        try:
            with safe_open(path, "pt") as file:
                questions = tuple(json.loads(file.metadata()["questions"]))
                values = {name: file.get_tensor(name) for name in _COLUMNS}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} is damaged ({str(error).splitlines()[0]}); remove it and run `viaticum tokens label` again"
            ) from None
        shard = cls(questions, **values)
        for name in ("entropy", "top", "hidden", "embeddings"):
            if not bool(torch.isfinite(values[name]).all()):
                raise DataError(
                    f"{path}: {name} has values that are not finite; remove the file and run `viaticum tokens label` again"
                )
        return shard

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {name: getattr(self, name).contiguous() for name in _COLUMNS}
        write_bytes(path, save(tensors, {"questions": json.dumps(self.questions)}))


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("features-*.safetensors"))


@dataclass(frozen=True, slots=True)
class LabelledTokens:
    """The tokens of all questions of a folder, with one verifier's labels.

    labels: int64 [N], IDENTICAL, NEUTRAL, DIVERGENT or UNKNOWN; owner: an index into questions; token and second:
    indices into embeddings [U, D] and token_ids [U]; verifier: whose labels. The other columns as in `Shard`.
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
        """Of each question's text, by id; older folders have none."""
        found: Mapping[str, str] = self.manifest.get("digests", {})
        return found

    @property
    def differing(self) -> Tensor:
        """Whether the two models' tokens differ, bool [N]."""
        return self.labels != IDENTICAL

    def of(self, questions: Sequence[str]) -> LabelledTokens:
        """The tokens of some questions alone."""
        wanted = set(questions)
        rows = torch.tensor([question in wanted for question in self.questions])[self.owner]
        return self.where(rows)

    def where(self, rows: Tensor) -> LabelledTokens:
        """Some rows, by a bool mask [N] or indices."""
        names = ("owner", "place", "labels", "entropy", "top", "hidden", "token", "second")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    @classmethod
    def load(cls, folder: str | Path, verifier: str = "", *, prefer: str = "") -> LabelledTokens:
        """Read a folder; verifier: whose labels, by default those by `prefer` if it has them, else by its first one.

        Raises `InputError` for no such folder or a verifier that has not looked at it, `DataError` for damage or a
        folder that was only begun.
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
    """Raises `InputError` where there is no folder of labels, `DataError` for one that cannot be read."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise DataError(
                f"{folder} has labels of format {manifest['format']}; this version reads {FORMAT}"
            )
    except FileNotFoundError:
        raise InputError(
            f"no labels in {folder}; make them with: viaticum tokens label --pair PAIR QUESTIONS.jsonl --out {folder}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder / MANIFEST} is damaged ({error}); label again into a new folder") from None
    return manifest


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of `labels.jsonl`; raises `DataError` naming a broken one."""
    path = folder / ROWS
    try:
        # Bytes, for a str would also be split at U+2028, which a row may hold as it is.
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


def write_whole(path: Path, text: str) -> None:
    """A text file that appears whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """A file that appears whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        scratch.unlink(missing_ok=True)
